"""`vlcl compare`: one experiment over losses x batch sizes x learning rates x seeds, and one table and figure of it.

vlcl compare configs/openmoji.yaml --loss em,infonce --batch-size 16,64,256 --seeds 3

Held equal in all cells: the number of samples seen, the samples of the warm-up, and every setting that the grid does
not vary. Not scaled with the batch size unless --scale-lr says so: the learning rate (--lr gives a grid). Never scaled:
weight decay, Adam's betas, train.ema. A difference within the bars is no result, and the seeds of one data set say
nothing about another.

grid.py makes the cells, search.py says which are wanted, cell.py runs one and pool.py several at once, results.py keeps
what they found, comparison.py has the numbers, report.py and figure.py show them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from vlcl.compare.cell import Ran, check_folders, result_of, run_cell
from vlcl.compare.comparison import Comparison, Result
from vlcl.compare.grid import (
    Cell,
    Data,
    Grid,
    check_grid,
    make_cells,
    metric_names,
    open_data,
    parse_losses,
    parse_numbers,
    selecting_names,
    with_length,
)
from vlcl.compare.pool import environments_of, run_in_pool, visible_gpus
from vlcl.compare.report import means_table, show_value, write_all
from vlcl.compare.results import ResultsFile
from vlcl.compare.search import wanted_cells
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.paths import check_data

FIGURE_EVERY = 30  # seconds: drawing takes one, which is much beside a cell of ten


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
    select_on: str | None = None,
    scale_lr: str = "none",
    tune: bool = False,
    widen: int = 2,
    results: str | Path | None = None,
    discard: bool = False,
    jobs: int = 1,
) -> Comparison:
    """Run every cell of the grid that is not finished yet; return all results.

    config: path or name of an experiment; what it sees at its own batch size is what every cell sees. losses: names,
    with settings where wanted: "em", "em:gamma=0.5:order=before". seeds: how many (3 is 0, 1, 2), or which. lrs:
    learning rates of each loss and batch size; none: the config's. metric: a held-out metric of metrics.jsonl, which is
    shown; None: the mean of both ways' R@1, of data.test where that is set. output: folder of the cells and of
    compare.md, compare.json and compare.png, which are rewritten after every cell; None: runs/compare-NAME. overrides:
    settings of every cell, "section.key=value".

    select_on: the held-out metric that chooses the learning rate; None: that which is shown, on data.val. scale_lr: lrs
    are for the config's batch size, and grow as "sqrt" or "linear" in it. tune: compare rates with the first seed only,
    up to `widen` more at each end while the best stands there, and run the other seeds at the best. results: a file
    that finished cells are appended to, a line each, and that has cells which need not be run again; discard: their
    folders are deleted then. jobs: cells at a time, each in a process with its share of the cores.

    Raises UserError for any mistake in these before anything is trained. A cell that fails is recorded in its result's
    `error`, and the others go on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("vlcl compare starts as one process (others by --jobs): no accelerate launch, no torchrun")
    grid = Grid(
        str(config), tuple(losses), tuple(batch_sizes), tuple(range(seeds) if isinstance(seeds, int) else seeds),
        tuple(lrs), metric, None if output is None else str(output), tuple(overrides), select_on, scale_lr, tune, widen,
        None if results is None else str(results), discard, jobs,
    )  # fmt: skip
    check_grid(grid)
    base = load_config(config, overrides)
    check_data(base.data)
    metrics = metric_names(base, metric)
    select = selecting_names(base, grid, metrics)
    cells = make_cells(grid, base)
    data = open_data(base, cells)
    cells = [with_length(cell, base, data.samples) for cell in cells]
    check_folders(cells, data.digests)
    return Session(grid, metrics, select, cells, data).run()


def main(
    config: str, loss: str, batch_size: str, seeds: str, lr: str | None, overrides: Sequence[str], **options: Any
) -> bool:
    """The command, with its options as they were typed; `options`: those that `compare` takes as they are. Returns
    whether every cell has a result."""
    numbers = parse_numbers("--seeds", seeds.removesuffix(","), int)  # `7` is seven seeds, `7,` is the seed 7
    comparison = compare(
        config,
        losses=parse_losses(loss),
        batch_sizes=parse_numbers("--batch-size", batch_size, int),
        seeds=numbers if "," in seeds else numbers[0],
        lrs=parse_numbers("--lr", lr, float) if lr is not None else (),
        overrides=overrides,
        **options,
    )
    return not any(result.error for result in comparison.results)


class Session:
    """One call of the command: the cells that it may want, and what is known of them so far."""

    def __init__(
        self, grid: Grid, metric: tuple[str, ...], select: tuple[str, ...], cells: Sequence[Cell], data: Data
    ) -> None:
        from vlcl.launcher import precision_here

        self.grid, self.metric, self.select, self.cells, self.data = grid, metric, select, cells, data
        path = Path(grid.results) if grid.results is not None else None
        self.file = ResultsFile(path, cells, data.digests, precision_here()) if path else None
        self.results: dict[str, Result] = {}
        self.kept = 0  # cells that the file has
        self.drawn = -FIGURE_EVERY

    def run(self) -> Comparison:
        """Find what is finished, run the rest, with a line and fresh outputs after each cell."""
        self.find_finished()
        comparison = self.comparison()
        earlier = sum(result.is_over for result in comparison.results)
        self.say_hello(comparison, earlier)
        write_all(comparison)
        started = time.monotonic()
        with closing(self.run_waiting()) as cells:  # so that Ctrl-C stops them, wherever it comes
            for done, (cell, ran) in enumerate(cells, 1):
                result = self.take(cell, ran)
                comparison = self.comparison()
                self.write(comparison)
                left = len(self.waiting())
                pace = (time.monotonic() - started) / done
                rest = f", about {duration(pace * left)} left{' or more' * self.grid.tune}" if left else ""
                place = f"cell {earlier + done}/{len(comparison.results)} {cell.name}: " if self.grid.jobs > 1 else ""
                print(f"{place}{outcome(comparison, result)}, {duration(ran.seconds or 0)}{rest}", flush=True)
        write_all(comparison)
        print(f"\n{means_table(comparison)}\n\ntable and figure: {comparison.folder}/compare.md, compare.png")
        return comparison

    def find_finished(self) -> None:
        """Results of the file, and of run folders, which the file gets to know of."""
        for cell in self.cells:
            result = self.file.result(cell, self.metric, self.select) if self.file else Result(cell)
            in_file = result.is_over
            self.kept += in_file
            if not in_file:
                result = result_of(cell, self.metric, self.select)
            if result.is_over:
                self.results[cell.name] = result
                self.keep(result, None, in_file)

    def take(self, cell: Cell, ran: Ran) -> Result:
        """The result of a cell that was run."""
        result = Result(cell, error=ran.error) if ran.error else result_of(cell, self.metric, self.select)
        if not result.is_over:
            result = Result(cell, error=f"{cell.folder} has no evaluation of its last step")
        self.results[cell.name] = result
        self.keep(result, ran, in_file=False)
        return result

    def keep(self, result: Result, ran: Ran | None, in_file: bool) -> None:
        """Write a finished cell to the file, and delete its folder if that is wanted, in this order."""
        if self.file is None or result.error:
            return
        if not in_file:
            self.file.append(result, ran)
        if self.grid.discard:
            shutil.rmtree(result.cell.folder, ignore_errors=True)

    def wanted(self) -> list[Cell]:
        return wanted_cells(self.cells, self.results, self.select) if self.grid.tune else list(self.cells)

    def waiting(self) -> list[Cell]:
        return [cell for cell in self.wanted() if cell.name not in self.results]

    def comparison(self) -> Comparison:
        results = tuple(self.results.get(cell.name) or Result(cell) for cell in self.wanted())
        grid = self.grid
        return Comparison(
            grid.folder, grid.command, self.metric, self.data, results, self.select, grid.scale_lr, grid.tune
        )

    def run_waiting(self) -> Generator[tuple[Cell, Ran], None, None]:
        """Run cells while there are some waiting; yields each with what became of it."""
        jobs = self.grid.jobs
        if jobs > 1:
            import torch

            from vlcl.data.stream import cpu_cores

            environments = environments_of(jobs, cpu_cores(), visible_gpus(torch.cuda.device_count()))
            yield from run_in_pool(self.waiting, jobs, partial(run_cell, jobs=jobs), environments)
            return
        while waiting := self.waiting():
            wanted = self.wanted()
            number = sum(cell.name in self.results for cell in wanted) + 1
            print(f"cell {number}/{len(wanted)} {waiting[0].name}: ", end="", flush=True)
            yield waiting[0], run_cell(waiting[0])

    def say_hello(self, comparison: Comparison, earlier: int) -> None:
        cells, file = len(comparison.results), f" ({self.kept} in {self.grid.results})" if self.kept else ""
        for problem in self.file.problems if self.file else ():
            print(f"note: {problem}")
        more = ", more as the search goes on" if self.grid.tune else ""
        print(f"{cells} cells of {self.data.samples:,} samples{more}, {earlier} of them finished earlier{file}")

    def write(self, comparison: Comparison) -> None:
        now = time.monotonic()
        draw = now - self.drawn > FIGURE_EVERY
        self.drawn = now if draw else self.drawn
        write_all(comparison, figure=draw)


def outcome(comparison: Comparison, result: Result) -> str:
    return f"failed: {result.error}" if result.error else show_value(comparison, result.value)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
