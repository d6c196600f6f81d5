"""What several runs of one data set found at their last evaluation, side by side.

python examples/side_by_side.py RUN RUN ...
"""

import sys
from pathlib import Path

import yaml

from vlcl.errors import UserError
from vlcl.logs import read_metrics
from vlcl.metrics import is_held_out


def last_evaluation(run: Path) -> dict[str, float]:
    """The shares of held-out pairs that the run got right, by metric."""
    found = [line for line in read_metrics(run) if any(is_held_out(name) for name in line)]
    if not found:
        raise UserError(f"{run} has no evaluation: give a run with data.val")
    return {name: value for name, value in found[-1].items() if "_R@" in name or name.endswith("_top1")}


def table(runs: list[Path]) -> str:
    results = [last_evaluation(run) for run in runs]
    losses = [yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["loss"]["name"] for run in runs]
    names = [name for name in results[0] if all(name in result for result in results)]
    rows = [["", *losses], *([name, *(f"{result[name]:.1%}" for result in results)] for name in names)]
    return "\n".join(f"{name:26}" + "".join(f"{value:>12}" for value in values) for name, *values in rows)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        print(table([Path(run) for run in sys.argv[1:]]))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
