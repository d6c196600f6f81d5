"""`vlcl compare`: one experiment over losses x batch sizes x learning rates x seeds, and one table and figure of it.

vlcl compare configs/openmoji.yaml --loss em,infonce --batch-size 16,64,256 --seeds 3

Held equal in all cells: the number of samples seen, the samples of the warm-up, and every setting that the grid does
not vary. Not scaled with the batch size: the learning rate (--lr gives a grid), weight decay, Adam's betas, train.ema.
A difference within the bars is no result, and the seeds of one data set say nothing about another.

A cell is an ordinary run in a folder of its own. grid.py makes the cells, report.py shows them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from vlcl.compare.grid import (
    Cell,
    Grid,
    check_grid,
    make_cells,
    metric_names,
    open_data,
    parse_losses,
    parse_numbers,
    with_length,
)
from vlcl.compare.report import Comparison, Result, means_table, show_value, write_all
from vlcl.config import Config, load_config
from vlcl.config.errors import show
from vlcl.errors import UserError
from vlcl.logs import METRICS_FILE, read_metrics

FREE = ("train.output", "train.overwrite", "resume")  # where a cell lies and how it starts may differ between two calls
LOG_FILE = "log.txt"  # in a cell's folder: what `vlcl train` would have printed


def compare(
    config: str | Path,
    *,
    losses: Sequence[str],
    batch_sizes: Sequence[int],
    seeds: int | Sequence[int],
    lrs: Sequence[float] = (),
    metric: str | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Comparison:
    """Run every cell of the grid that is not finished yet, one after another in this process; return all results.

    config: path or name of an experiment; what it sees at its own batch size is what every cell sees. losses: names,
    with settings where wanted: "em", "em:gamma=0.5:order=before". seeds: how many (3 is 0, 1, 2), or which. lrs:
    learning rates of each loss and batch size; none: the config's. metric: a held-out metric of metrics.jsonl; None:
    the mean of both ways' R@1. output: folder of the cells and of compare.md, compare.json and compare.png, which are
    rewritten after every cell; None: runs/compare-NAME. overrides: settings of every cell, "section.key=value".

    Raises UserError for any mistake in these before anything is trained. A cell that fails is recorded in its result's
    `error`, and the others go on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("vlcl compare runs in one process; start it without accelerate launch or torchrun")
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    output = None if output is None else str(output)
    grid = Grid(
        str(config), tuple(losses), tuple(batch_sizes), tuple(seeds), tuple(lrs), metric, output, tuple(overrides)
    )
    check_grid(grid)
    base = load_config(config, overrides)
    names = metric_names(base, metric)
    cells = make_cells(grid, base)
    data = open_data(base, cells)
    cells = [with_length(cell, base, data.samples) for cell in cells]
    check_folders(cells)
    results = tuple(result_of(cell, names) for cell in cells)
    return run_cells(Comparison(grid.folder, grid.command, names, data, results))


def main(
    config: str,
    loss: str,
    batch_size: str,
    seeds: str,
    lr: str | None,
    metric: str | None,
    output: str | None,
    overrides: Sequence[str],
) -> bool:
    """The command, with its options as they were typed. Returns whether every cell has a result."""
    numbers = parse_numbers("--seeds", seeds.removesuffix(","), int)  # `7` is seven seeds, `7,` is the seed 7
    comparison = compare(
        config,
        losses=parse_losses(loss),
        batch_sizes=parse_numbers("--batch-size", batch_size, int),
        seeds=numbers if "," in seeds else numbers[0],
        lrs=parse_numbers("--lr", lr, float) if lr is not None else (),
        metric=metric,
        output=output,
        overrides=overrides,
    )
    return not any(result.error for result in comparison.results)


def run_cells(comparison: Comparison) -> Comparison:
    """Run the cells that have no result yet, with a line and fresh outputs after each."""
    logging.getLogger().addFilter(lambda record: "No pretrained weights loaded" not in record.getMessage())
    results = list(comparison.results)
    todo = [place for place, result in enumerate(results) if not result.is_over]
    finished = len(results) - len(todo)
    print(f"{len(results)} cells of {comparison.data.samples:,} samples, {finished} of them finished earlier")
    write_all(comparison)
    started = time.monotonic()
    for done, place in enumerate(todo, 1):
        cell, began = results[place].cell, time.monotonic()
        print(f"cell {finished + done}/{len(results)} {cell.name}: ", end="", flush=True)
        results[place] = run_cell(cell, comparison.metric)
        comparison = dataclasses.replace(comparison, results=tuple(results))
        write_all(comparison)
        now = time.monotonic()
        left = f", about {duration((now - started) / done * (len(todo) - done))} left" if done < len(todo) else ""
        print(f"{outcome(comparison, results[place])}, {duration(now - began)}{left}", flush=True)
    print(f"\n{means_table(comparison)}\n\ntable and figure: {comparison.folder}/compare.md, compare.png")
    return comparison


def run_cell(cell: Cell, metric: Sequence[str]) -> Result:
    """Train the cell to its end. What stops it ends up in the result: a mistake, broken numbers, too little memory."""
    from torch import OutOfMemoryError

    from vlcl.train import train

    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        with open(cell.folder / LOG_FILE, "a", encoding="utf-8") as log, redirect_stdout(log):
            train(start_of(cell))
    except (UserError, OSError, OutOfMemoryError) as error:
        return Result(cell, error=str(error))
    return result_of(cell, metric)


def start_of(cell: Cell) -> Config:
    """The cell's settings with where to begin: after its last checkpoint, or, stopped before the first, anew."""
    from vlcl.checkpoint import complete_steps

    resume = "latest" if complete_steps(cell.folder) else None
    # check_folders has seen that what is there is this very cell
    overwrite = resume is None and (cell.folder / "config.yaml").is_file()
    train = cell.config.train.model_copy(update={"overwrite": overwrite})
    return cell.config.model_copy(update={"train": train, "resume": resume})


def result_of(cell: Cell, metric: Sequence[str]) -> Result:
    """What a finished cell has: a checkpoint of its last step and an evaluation of it. Otherwise a result without."""
    from vlcl.checkpoint import complete_steps, step_of

    saved = complete_steps(cell.folder)
    if not saved or step_of(saved[-1]) != cell.steps or not (cell.folder / METRICS_FILE).is_file():
        return Result(cell)
    last = [line for line in read_metrics(cell.folder) if line["step"] == cell.steps]
    values = {name: value for line in last for name, value in line.items() if name.startswith("val/")}
    if not set(metric) <= set(values):
        return Result(cell)
    broken = [name for name in metric if values[name] is None]
    if broken:
        return Result(cell, values, error=f"{broken[0]} is not a number")
    return Result(cell, values, value=sum(values[name] for name in metric) / len(metric))


def check_folders(cells: Sequence[Cell]) -> None:
    """UserError where the folder of a cell holds a run of other settings: going on in it would mix two experiments."""
    different: dict[Path, list[str]] = {}
    for cell in cells:
        if (file := cell.folder / "config.yaml").is_file():
            there, now = settings_of(load_config(file)), settings_of(cell.config)
            keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
            if keys:
                different[cell.folder] = [f"  {k}: {show(there.get(k))} there, {show(now.get(k))} now" for k in keys]
    if different:
        folder, lines = next(iter(different.items()))
        others = f" (and {len(different) - 1} cells beside it)" if len(different) > 1 else ""
        raise UserError("\n".join([
            f"{folder}{others} holds a run of other settings:", *lines,
            "give the settings that it was run with, another --output, or delete the folder to run the cell anew",
        ]))  # fmt: skip


def settings_of(config: Config) -> dict[str, Any]:
    """All settings of a run by key (section.name), but for those that are free."""
    sections = config.model_dump()
    values = {"resume": sections.pop("resume")}
    values |= {f"{section}.{name}": v for section, settings in sections.items() for name, v in settings.items()}
    return {key: value for key, value in values.items() if key not in FREE}


def outcome(comparison: Comparison, result: Result) -> str:
    return f"failed: {result.error}" if result.error else show_value(comparison, result.value)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
