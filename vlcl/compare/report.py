"""What a comparison shows: compare.md, compare.json and compare.png, from the results of its cells.

A point is a loss, batch size and learning rate: the mean over its seeds, and their standard deviation (n - 1 in the
denominator; none with one seed). Seeds without a result count in neither, and the table says how many these are.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from vlcl.compare.grid import Cell, Data
from vlcl.errors import UserError
from vlcl.files import replace_text, replacing_file
from vlcl.metrics import COMPARABLE, Metric
from vlcl.report.style import COLOURS, INK, MARKERS, MUTED, style_axes
from vlcl.report.text import markdown_table, upper_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Result:
    """A cell with what it came to. Neither value nor error: it has not run to its end yet."""

    cell: Cell
    metrics: dict[str, float | None] = field(default_factory=dict)
    value: float | None = None
    error: str | None = None

    @property
    def is_over(self) -> bool:
        return self.value is not None or self.error is not None


@dataclass(frozen=True)
class Point:
    """One loss, batch size and learning rate, over its seeds."""

    results: tuple[Result, ...]
    best: bool = True  # of the learning rates

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
class Comparison:
    """A grid and its results. `metric`: the names whose mean is a result's value."""

    folder: Path
    command: str
    metric: tuple[str, ...]
    data: Data
    results: tuple[Result, ...]

    @property
    def points(self) -> list[Point]:
        """All points, the learning rates of a loss and batch size after one another, the best of them marked.

        That is the one of most finished seeds, then of the best mean: a rate at which a seed diverges is not best.
        """
        groups: dict[tuple[str, int], dict[float, list[Result]]] = {}
        for result in sorted(self.results, key=self._place):
            cell = result.cell
            groups.setdefault((cell.loss, cell.batch_size), {}).setdefault(cell.lr, []).append(result)
        points = []
        for rates in groups.values():
            found = [Point(tuple(results)) for results in rates.values()]
            merit = self._compared[0].merit
            best = max(found, key=lambda point: (len(point.values), merit(point.mean or 0.0)))
            points += [Point(point.results, point is best) for point in found]
        return points

    def _place(self, result: Result) -> list[int]:
        cell = result.cell
        return [self.losses.index(cell.loss), cell.batch_size]

    @property
    def losses(self) -> list[str]:
        return list(dict.fromkeys(result.cell.loss for result in self.results))

    @property
    def num_rates(self) -> int:
        return len({result.cell.lr for result in self.results})

    @property
    def _compared(self) -> list[Metric]:
        return [metric for metric in COMPARABLE if metric.name in self.metric]

    @property
    def percent(self) -> bool:
        return all(metric.figure and metric.figure.percent for metric in self._compared)

    @property
    def title(self) -> str:
        ways = " and ".join(metric.figure.title.lower() for metric in self._compared if metric.figure)
        return f"held-out {self._compared[0].label}, {'mean of ' if len(self.metric) > 1 else ''}{ways}"


def show_value(comparison: Comparison, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}%" if comparison.percent else f"{value:.4g}"


def write_all(comparison: Comparison) -> None:
    """compare.md, compare.json and compare.png; a reader finds the old or the new one, never half of either."""
    folder = comparison.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "compare.md", page(comparison))
        replace_text(folder / "compare.json", json.dumps(as_json(comparison), indent=2) + "\n")
        with replacing_file(folder / "compare.png") as temporary:
            draw(comparison, temporary)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error}; give another --output, or make room") from None


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers: the points, and the cells with every held-out metric."""
    points = [
        {
            "loss": p.cell.loss, "batch_size": p.cell.batch_size, "lr": p.cell.lr, "best_lr": p.best, "mean": p.mean,
            "sd": p.sd, "n": len(p.values), "steps": p.cell.steps, "samples": p.cell.samples,
        }
        for p in comparison.points
    ]  # fmt: skip
    cells = [
        {
            "cell": r.cell.name, "loss": r.cell.loss, "batch_size": r.cell.batch_size, "lr": r.cell.lr,
            "seed": r.cell.seed, "steps": r.cell.steps, "samples": r.cell.samples, "value": r.value, "error": r.error,
            "metrics": r.metrics,
        }
        for r in comparison.results
    ]  # fmt: skip
    data = dataclasses.asdict(comparison.data)
    return {"command": comparison.command, "metric": comparison.metric, **data, "points": points, "cells": cells}


def page(comparison: Comparison) -> str:
    """compare.md."""
    results = comparison.results
    failed, over = sum(bool(result.error) for result in results), sum(result.is_over for result in results)
    state = f"{over - failed} of {len(results)} cells have a result, {failed} failed, {len(results) - over} not run yet"
    return "\n".join([
        f"# {upper_first(comparison.title)}", "", "```", comparison.command, "```", "",
        f"{state}. {_explanation(comparison)}", "", "![The figure of this table](compare.png)", "",
        means_table(comparison), "", "## Every cell", "", cells_table(comparison), "",
    ])  # fmt: skip


def _explanation(comparison: Comparison) -> str:
    data, names = comparison.data, " and ".join(f"`{name}`" for name in comparison.metric)
    held_out = f", {data.val_pairs:,} held-out pairs" if data.val_pairs else ""
    best = (
        " Bold: the best learning rate by its mean (of those with most finished seeds). It is chosen on the held-out "
        "data that it is shown for, and so looks a little too good."
    )
    return (
        f"{'Mean of ' if len(comparison.metric) > 1 else ''}{names} at the end of training{held_out}. "
        f"{data.samples:,} samples seen in every cell, as nearly as whole steps allow ({data.pairs:,} training pairs, "
        f"{data.samples / data.pairs:.1f} passes). sd: standard deviation over the n seeds (n - 1 in the denominator)."
    ) + best * (comparison.num_rates > 1)


def means_table(comparison: Comparison) -> str:
    rows = [["loss", "batch size", "lr", "steps", "samples seen", "mean", "sd", "n", ""]]
    for point in comparison.points:
        cell, failed = point.cell, sum(bool(result.error) for result in point.results)
        waiting = sum(not result.is_over for result in point.results)
        notes = [f"{failed} failed"] * (failed > 0) + [f"{waiting} not run"] * (waiting > 0)
        notes += ["one seed, no sd"] * (len(point.values) == 1)
        average = show_value(comparison, point.mean)
        bold = point.best and comparison.num_rates > 1 and point.values
        rows.append([
            f"`{cell.loss}`", str(cell.batch_size), f"{cell.lr:g}", f"{cell.steps:,}", f"{cell.samples:,}",
            f"**{average}**" if bold else average, show_value(comparison, point.sd), str(len(point.values)),
            ", ".join(notes),
        ])  # fmt: skip
    return markdown_table(rows, numbers=range(1, 8))


def cells_table(comparison: Comparison) -> str:
    parts = comparison.metric if len(comparison.metric) > 1 else ()
    rows = [["cell", "seed", *(f"`{name}`" for name in parts), "result"]]
    for point in comparison.points:
        for result in point.results:
            values = [show_value(comparison, result.metrics.get(name)) for name in parts]
            end = f"failed: {result.error}" if result.error else show_value(comparison, result.value)
            rows.append([result.cell.name, str(result.cell.seed), *values, end if result.is_over else "not run yet"])
    return markdown_table(rows, numbers=range(1, 2 + len(parts)))


def draw(comparison: Comparison, path: Path) -> None:
    """The figure: a line a loss over the batch size, bars of one standard deviation, and each seed as a small point."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    columns = max(1, 110 // (max(map(len, comparison.losses)) + 9))  # of the legend, by the length of its labels
    lines = _subtitle(comparison)
    legend = 0.57 + 0.19 * len(lines)  # in inches from the top: what is above the legend, what is above the axes
    head = legend + 0.14 + 0.222 * -(-len(comparison.losses) // columns)
    height = head + 3.8
    canvas = Canvas(figsize=(7.6, height), facecolor="white")
    axes = canvas.add_axes((0.085, 0.62 / height, 0.89, 3.18 / height))
    axes.set_xscale("log", base=2)
    for place, loss in enumerate(comparison.losses):
        _draw_loss(axes, comparison, loss, place)
    sizes = sorted({result.cell.batch_size for result in comparison.results})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(sizes[0] / 2**0.4, sizes[-1] * 2**0.4)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g}%" if comparison.percent else f"{y:.4g}"))
    axes.margins(y=0.1 if comparison.num_rates > 1 else 0.05)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))
    axes.set_xlabel("batch size (logarithmic)", color=MUTED, fontsize=11, labelpad=6)
    style_axes(axes, size=11, pad=6)
    if axes.get_legend_handles_labels()[0]:
        canvas.legend(loc="upper left", bbox_to_anchor=(0.015, 1 - legend / height), ncols=columns, frameon=False,
                      fontsize=10.5, labelcolor=INK, columnspacing=1.6, borderaxespad=0)  # fmt: skip
    canvas.text(0.02, 1 - 0.37 / height, upper_first(comparison.title), color=INK, fontsize=13.5)
    canvas.text(0.02, 1 - 0.47 / height, "\n".join(lines), color=MUTED, fontsize=9.5, va="top", linespacing=1.4)
    canvas.savefig(path, format="png", dpi=160)


def _draw_loss(axes: Axes, comparison: Comparison, loss: str, place: int) -> None:
    points = [p for p in comparison.points if p.cell.loss == loss and p.best and p.values]
    times, look = divmod(place, len(COLOURS))  # a ninth loss looks like the first, but for its dashes
    colour, marker, style = COLOURS[look], MARKERS[look], ("-", "--", ":")[times % 3]
    # beside each other, within a third of a doubling, so that no bar hides another
    apart = min(0.1, 0.33 / len(comparison.losses))
    aside = 2 ** (apart * (place - (len(comparison.losses) - 1) / 2))
    xs, ys = [p.cell.batch_size * aside for p in points], [mean(p.values) for p in points]
    axes.plot(xs, ys, color=colour, linewidth=1.8, linestyle=style, marker=marker, markersize=6.5, label=loss, zorder=4)
    for x, y, p in zip(xs, ys, points):
        if p.sd is not None:
            axes.errorbar(x, y, p.sd, color=colour, elinewidth=1.4, capsize=4, capthick=1.4, zorder=3)
            axes.scatter([x] * len(p.values), p.values, s=20, facecolors="white", edgecolors=colour, zorder=3.5,
                         clip_on=False)  # fmt: skip
        if comparison.num_rates > 1:
            low = min(*p.values, y - (p.sd or 0))
            axes.annotate(f"lr {p.cell.lr:g}", (x, low), (0, -8), textcoords="offset points", ha="center", va="top",
                          color=colour, fontsize=8.5, zorder=5)  # fmt: skip


def _subtitle(comparison: Comparison) -> list[str]:
    counts = sorted({len(point.values) for point in comparison.points if point.best and point.values})
    seeds = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
    bars = f"mean and standard deviation of {seeds} seeds (rings)" if counts[-1:] > [1] else "one seed, no error bars"
    notes = ["each at its best learning rate"] * (comparison.num_rates > 1)
    if failed := sum(bool(result.error) for result in comparison.results):
        notes.append(f"{failed} of {len(comparison.results)} cells failed, and are left out")
    first = f"{comparison.data.samples:,} samples seen at every batch size; {bars}"
    return [first, "; ".join(notes)] if notes else [first]
