"""Few-shot scores behind docs/evidence.md: the models of the study `emoji` at batch 32 and 256, on digits and clothes.

    vlcl data emoji data/emoji && vlcl data mnist data/elevater && vlcl data mnist data/elevater --source fashion
    python benchmarks/evidence/few_shot.py

Each loss and batch at the learning rate that the study has chosen (seed 0), or untrained; ELEVATER's linear
probe, strict mode (last epoch: no choice on test pictures), three subsets of training pictures a model. Writes
docs/evidence/few_shot.md.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

FOLDER = Path(__file__).parent
OUT = Path("runs/evidence/few_shot")
TABLE = FOLDER.parents[1] / "docs" / "evidence" / "few_shot.md"
RATES = {("infonce", 32): 4e-3, ("infonce", 256): 2e-3, ("em", 32): 1e-3, ("em", 256): 2e-3}  # at batch 128
SEEDS, SHOTS, SETS = (0,), (5, 20, 50), ("mnist", "fashion-mnist")


def trained() -> Iterator[tuple[str, Path]]:
    """A name and a run for each model, which are trained where they are not there yet."""
    for (loss, batch), rate in RATES.items():
        for seed in SEEDS:
            run = OUT / f"{loss}-{batch}-{seed}"
            given = {"loss.name": loss, "train.batch_size": batch, "optim.lr": rate * math.sqrt(batch / 128),
                     "train.seed": seed, "train.output": run, "resume": "auto"}  # fmt: skip
            if loss == "em":
                given["loss.form"] = "relative"  # the default when the committed table was made
            vlcl("train", str(FOLDER / "emoji.yaml"), *(f"{key}={x}" for key, x in given.items()))
            yield f"{loss}, {batch}", run
    run = OUT / "untrained"
    vlcl("train", str(FOLDER / "emoji.yaml"), "train.epochs=null", "train.steps=1", "optim.lr=1e-12", "resume=auto",
         f"train.output={run}")  # fmt: skip
    yield "untrained", run


def vlcl(*arguments: str) -> None:
    """A command of vlcl; where it fails, it has said why."""
    if subprocess.run([sys.executable, "-m", "vlcl.cli", *arguments], check=False).returncode:
        raise SystemExit(f"stopped at: vlcl {' '.join(arguments)}")


def main() -> None:
    scores: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for name, run in trained():
        results = OUT / f"eval-{run.name}"
        vlcl("eval", "elevater", str(run), "--data-root", "data/elevater", "--datasets", ",".join(SETS),
             "--mode", "strict", "--shots", ",".join(map(str, SHOTS)), "--output", str(results))  # fmt: skip
        for line in map(json.loads, (results / "results.jsonl").read_text().splitlines()):
            scores[name, line["dataset"], line["shots"]].append(line["score"])
    names = list(dict.fromkeys(name for name, _, _ in scores))
    head = [f"{name}, {shots}" for name in SETS for shots in SHOTS]
    rows = [["model", *head], ["---"] * (1 + len(head))]
    for name in names:
        cells = [scores[name, data, shots] for data in SETS for shots in SHOTS]
        rows.append([name, *(f"{mean(x):.1f} ± {stdev(x):.1f} (n={len(x)})" for x in cells)])
    TABLE.write_text("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n", encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
