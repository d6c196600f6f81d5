"""compare.png: a line a loss over the batch size, with bars and seeds."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from vlcl.compare.comparison import Comparison
from vlcl.report.style import COLOURS, INK, MARKERS, MUTED, style_axes
from vlcl.report.text import upper_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        if comparison.num_rates > 1 and len(comparison.losses) <= 2:  # more would hide each other; the table has them
            low = min(*p.values, y - (p.sd or 0))
            axes.annotate(f"lr {p.cell.lr:.3g}", (x, low), (0, -8), textcoords="offset points", ha="center", va="top",
                          color=colour, fontsize=8.5, zorder=5)  # fmt: skip


def _subtitle(comparison: Comparison) -> list[str]:
    counts = sorted({len(point.values) for point in comparison.points if point.best and point.values})
    seeds = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
    bars = f"mean and standard deviation of {seeds} seeds (rings)" if counts[-1:] > [1] else "one seed, no error bars"
    chosen = " on held-out pairs that are not shown" * comparison.chosen_elsewhere
    notes = [f"each at its best learning rate{', chosen' * bool(chosen)}{chosen}"] * (comparison.num_rates > 1)
    if failed := sum(bool(result.error) for result in comparison.results):
        notes.append(f"{failed} of {len(comparison.results)} cells failed, and are left out")
    first = f"{comparison.data.samples:,} samples seen at every batch size; {bars}"
    return [first, "; ".join(notes)] if notes else [first]
