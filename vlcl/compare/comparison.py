"""What a comparison found: results of cells, points over their seeds, the best learning rate, paired differences.

A point is a loss, batch size and learning rate: the mean over its seeds, and their standard deviation (n - 1 in the
denominator; none with one seed). Seeds without a result count in neither. Numbers only: report.py and figure.py show
them. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from vlcl.compare.grid import Cell, Data
from vlcl.metrics import COMPARABLE, Metric, is_test, metric_of, on_val

# Student's t, 97.5 %, for 1, 2, ... 30 degrees of freedom; for more, the last: an interval a little too wide.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A cell with what it came to. Neither value nor error: it has not run to its end yet.

    value: what is shown; choice: what its learning rate is chosen by, None where that is the value.
    """

    cell: Cell
    metrics: dict[str, float | None] = field(default_factory=dict)
    value: float | None = None
    error: str | None = None
    choice: float | None = None

    @property
    def is_over(self) -> bool:
        return self.value is not None or self.error is not None

    @property
    def chosen_by(self) -> float | None:
        return self.value if self.choice is None else self.choice


def result_from(cell: Cell, values: Mapping[str, float | None], metric: Sequence[str], select: Sequence[str]) -> Result:
    """The result of a run that ended with these held-out metrics; one without a value where a metric is missing."""
    values = dict(values)
    if not {*metric, *select} <= set(values):
        return Result(cell)
    broken = [name for name in (*metric, *select) if values[name] is None]
    if broken:
        return Result(cell, values, error=f"{broken[0]} is not a number")
    shown, chosen = (mean(values[name] or 0.0 for name in names) for names in (metric, select))
    return Result(cell, values, value=shown, choice=chosen)


def merit_of(names: Sequence[str]) -> Callable[[float], float]:
    """How good a mean of these metrics is: the best has the highest."""
    metric = metric_of(names[0])
    assert metric is not None  # grid.metric_names has seen to that
    return metric.merit


def shared_seeds(rates: Mapping[float, Sequence[Result]]) -> set[int]:
    """The seeds that all of the learning rates are run with."""
    return set.intersection(*({result.cell.seed for result in results} for results in rates.values()))


def best_rate(rates: Mapping[float, Sequence[Result]], merit: Callable[[float], float]) -> float:
    """The learning rate of most finished seeds (one at which a seed diverges is not best), then of the best mean of
    what chooses. Rates are compared on the seeds that all of them have. Where nothing is finished: the first."""
    seeds = shared_seeds(rates)
    ended = {
        lr: {r.cell.seed: merit(r.chosen_by) for r in results if r.cell.seed in seeds and r.chosen_by is not None}
        for lr, results in rates.items()
    }
    most = max(map(len, ended.values()))
    left = [lr for lr, found in ended.items() if len(found) == most]
    if most == 0:
        return left[0]
    shared = set.intersection(*(set(ended[lr]) for lr in left))
    return max(left, key=lambda lr: mean(value for seed, value in ended[lr].items() if seed in shared or not shared))


@dataclass(frozen=True)
class Point:
    """One loss, batch size and learning rate, over its seeds. choice: the mean of what chooses the rate, over the seeds
    that all rates are run with; at_end: no rate beyond it was tried."""

    results: tuple[Result, ...]
    best: bool = True  # of the learning rates
    choice: float | None = None
    at_end: bool = False

    @property
    def cell(self) -> Cell:
        return self.results[0].cell

    @property
    def values(self) -> list[float]:
        return [result.value for result in self.results if result.value is not None]

    @property
    def mean(self) -> float | None:
        return mean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A loss less the first loss at one batch size, each at its best learning rate: a value a seed that both have."""

    point: Point
    first: Point
    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return mean(self.values) if self.values else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % confidence interval by Student's t over the seeds; None with fewer than two."""
        n = len(self.values)
        return T_975[min(n - 1, len(T_975)) - 1] * stdev(self.values) / math.sqrt(n) if n > 1 else None


@dataclass(frozen=True)
class Comparison:
    """A grid and its results. `metric`: the names whose mean is a result's value; `select`: those whose mean chooses
    the learning rate, () where these are the same. scale_lr: how rates grow with the batch size. searched: the rates
    were found by --tune."""

    folder: Path
    command: str
    metric: tuple[str, ...]
    data: Data
    results: tuple[Result, ...]
    select: tuple[str, ...] = ()
    scale_lr: str = "none"
    searched: bool = False

    @property
    def points(self) -> list[Point]:
        """All points, the learning rates of a loss and batch size after one another, the best of them marked."""
        groups: dict[tuple[str, int], dict[float, list[Result]]] = {}
        for result in sorted(self.results, key=self._place):
            cell = result.cell
            groups.setdefault((cell.loss, cell.batch_size), {}).setdefault(cell.lr, []).append(result)
        points = []
        for rates in groups.values():
            best, seeds = best_rate(rates, merit_of(self.select or self.metric)), shared_seeds(rates)
            ends = min(rates), max(rates)
            for lr, results in rates.items():
                found = [r.chosen_by for r in results if r.cell.seed in seeds and r.chosen_by is not None]
                points.append(Point(tuple(results), lr == best, mean(found) if found else None, lr in ends))
        return points

    def _place(self, result: Result) -> tuple[float, ...]:
        cell = result.cell
        return self.losses.index(cell.loss), cell.batch_size, cell.lr if self.searched else 0

    @property
    def differences(self) -> list[Difference]:
        """Of each loss to the first one, by batch size."""
        best = {(p.cell.batch_size, p.cell.loss): p for p in self.points if p.best}
        found = []
        for size, loss in sorted(best, key=lambda key: (key[0], self.losses.index(key[1]))):
            point, first = best[size, loss], best.get((size, self.losses[0]))
            if loss == self.losses[0] or first is None:
                continue
            theirs = {result.cell.seed: result.value for result in first.results}
            pairs = [(result.value, theirs.get(result.cell.seed)) for result in point.results]
            values = tuple(a - b for a, b in pairs if a is not None and b is not None)
            found.append(Difference(point, first, values))
        return found

    @property
    def losses(self) -> list[str]:
        return list(dict.fromkeys(result.cell.loss for result in self.results))

    @property
    def num_rates(self) -> int:
        """The most learning rates that a loss was run with at one batch size."""
        rates: dict[tuple[str, int], set[float]] = {}
        for result in self.results:
            rates.setdefault((result.cell.loss, result.cell.batch_size), set()).add(result.cell.lr)
        return max(map(len, rates.values()), default=0)

    @property
    def chosen_elsewhere(self) -> bool:
        """Whether learning rates were chosen, and by another metric than is shown."""
        return self.num_rates > 1 and bool(self.select) and self.select != self.metric

    @property
    def percent(self) -> bool:
        return all(metric.figure and metric.figure.percent for metric in _records(self.metric))

    @property
    def title(self) -> str:
        shown = _records([on_val(name) for name in self.metric])  # whose titles do not say "test"
        ways = " and ".join(metric.figure.title.lower() for metric in shown if metric.figure)
        kind = "test" if is_test(self.metric[0]) else "held-out"
        return f"{kind} {shown[0].label}, {'mean of ' if len(self.metric) > 1 else ''}{ways}"


def _records(names: Sequence[str]) -> list[Metric]:
    return [metric for metric in COMPARABLE if metric.name in names]
