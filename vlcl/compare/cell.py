"""One cell of a comparison: train it to its end, and read what its run folder says. Torch is imported where it trains.

A cell is an ordinary run in a folder of its own, and that folder is the truth about it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcl.compare.comparison import Result, result_from
from vlcl.compare.grid import Cell
from vlcl.config import Config, load_config
from vlcl.config.errors import show
from vlcl.errors import UserError
from vlcl.logs import METRICS_FILE, is_news, read_metrics
from vlcl.metrics import is_held_out

# Where a cell lies, how it starts and how its data are read may differ between two calls.
FREE = ("train.output", "train.overwrite", "resume", "data.workers", "data.cache")
LOG_FILE = "log.txt"  # in a cell's folder: what `vlcl train` would have printed


@dataclass(frozen=True)
class Ran:
    """A cell was run, to its end or to an error, and what that cost.

    seconds: by the clock; cpu_seconds: of the process that ran it and of those that read data for it; resumed_from: the
    step that it went on from, so that the cost is of the rest.
    """

    error: str | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    resumed_from: int = 0
    torch: str | None = None
    threads: int | None = None
    device: str | None = None


def run_cell(cell: Cell, jobs: int = 1) -> Ran:
    """Train the cell to its end. What stops it ends up in the answer: a mistake, broken numbers, too little memory.

    jobs: how many cells share the machine, which counts where data.workers is null.
    """
    import torch

    from vlcl.data.stream import pick_workers
    from vlcl.stop import Stopped
    from vlcl.train import train

    logging.getLogger().addFilter(is_news)
    began, cpu, error = time.monotonic(), _cpu_seconds(), None
    config, first = start_of(cell)
    cached = config.data.cache is not None and config.data.augment == "none"  # no readers, whoever shares the machine
    if jobs > 1 and config.data.workers is None and not cached:
        data = config.data.model_copy(update={"workers": pick_workers(config.data.streams, jobs)})
        config = config.model_copy(update={"data": data})
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        with open(cell.folder / LOG_FILE, "a", encoding="utf-8") as log, redirect_stdout(log):
            train(config)
    except Stopped as stopped:  # the comparison was asked to stop, not only this cell
        raise SystemExit(128 + stopped.number) from None
    except (UserError, OSError, torch.OutOfMemoryError) as caught:
        error = str(caught)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Ran(
        error, time.monotonic() - began, _cpu_seconds() - cpu, first, torch.__version__, torch.get_num_threads(), device
    )  # fmt: skip


def _cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def start_of(cell: Cell) -> tuple[Config, int]:
    """The cell's settings with where to begin: after its last checkpoint, or, stopped before the first, anew. And the
    step that this is."""
    from vlcl.checkpoint import complete_steps, step_of

    steps = complete_steps(cell.folder)
    # check_folders has seen that what is there is this very cell
    overwrite = not steps and (cell.folder / "config.yaml").is_file()
    train = cell.config.train.model_copy(update={"overwrite": overwrite})
    config = cell.config.model_copy(update={"train": train, "resume": "latest" if steps else None})
    return config, step_of(steps[-1]) if steps else 0


def result_of(cell: Cell, metric: Sequence[str], select: Sequence[str]) -> Result:
    """What a finished cell has: a checkpoint of its last step and an evaluation of it. Otherwise a result without."""
    from vlcl.checkpoint import complete_steps, step_of

    saved = complete_steps(cell.folder)
    if not saved or step_of(saved[-1]) != cell.steps or not (cell.folder / METRICS_FILE).is_file():
        return Result(cell)
    return result_from(cell, held_out(cell), metric, select)


def held_out(cell: Cell) -> dict[str, float | None]:
    """The held-out metrics of the cell's last step."""
    last = [line for line in read_metrics(cell.folder) if line["step"] == cell.steps]
    return {name: value for line in last for name, value in line.items() if is_held_out(name)}


def training(cell: Cell) -> dict[str, float | None]:
    """The other metrics of the cell's last step: train/..., speed/..., data/..."""
    frame = ("step", "time", "total_steps")
    last = [line for line in read_metrics(cell.folder) if line["step"] == cell.steps]
    return {n: value for line in last for n, value in line.items() if n not in frame and not is_held_out(n)}


def check_folders(cells: Sequence[Cell], digests: Mapping[str, str | None]) -> None:
    """UserError where the folder of a cell holds a run of other settings or data: going on in it would mix two
    experiments. `digests`: of data.train, data.val and data.test."""
    different: dict[Path, list[str]] = {}
    for cell in cells:
        recorded = _digests_of(cell.folder)
        if changed := [f"data.{name}" for name, digest in recorded.items() if digest != digests.get(name)]:
            raise UserError(
                f"{cell.folder} holds a run of other data ({' and '.join(changed)}: the shards have changed since). "
                "Give another --output, or delete the folder to run the cell anew"
            )
        if (file := cell.folder / "config.yaml").is_file():
            there, now = settings_of(load_config(file)), settings_of(cell.config)
            keys = [key for key in {**there, **now} if there.get(key) != now.get(key) and key not in FREE]
            if keys:
                different[cell.folder] = [f"  {k}: {show(there.get(k))} there, {show(now.get(k))} now" for k in keys]
    if different:
        folder, lines = next(iter(different.items()))
        others = f" (and {len(different) - 1} cells beside it)" if len(different) > 1 else ""
        raise UserError("\n".join([
            f"{folder}{others} holds a run of other settings:", *lines,
            "give the settings that it was run with, another --output, or delete the folder to run the cell anew",
        ]))  # fmt: skip


def _digests_of(folder: Path) -> dict[str, str | None]:
    """Of the data that the run there was begun with; none where it has not been begun."""
    file = folder / "data.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {"train": record["digest"], **record["held_out"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} does not say what data the run was of; delete {folder} to run the cell anew") from None


def settings_of(config: Config) -> dict[str, Any]:
    """All settings of a run by key (section.name)."""
    sections = config.model_dump()
    values = {"resume": sections.pop("resume")}
    return values | {f"{section}.{name}": v for section, settings in sections.items() for name, v in settings.items()}
