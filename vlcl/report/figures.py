"""How a figure of vlcl/metrics.py is drawn, from the records of a run, as inline SVG.

Colours are written as CSS variables (`var(--s1)`, ...), so that one drawing serves a light and a dark page. Figures
are made through matplotlib's objects: no pyplot, no global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlcl.metrics import Figure
from vlcl.report.style import style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = tuple[list[int], list[float]]  # steps, values

WIDTH, HEIGHT = 5.7, 3.1  # inches
BOTTOM, TOP, RIGHT = 0.155, 0.96, 0.985  # of the axes, as shares of the drawing
LEGEND = 0.07  # above the axes

# A colour that matplotlib writes, and the CSS variable that takes its place in the SVG.
_INK, _MUTED, _RULE = "#010101", "#010102", "#010103"
_CSS = {
    _INK: "--ink", _MUTED: "--muted", _RULE: "--rule", "#010104": "--s1", "#010105": "--s2",
    "#010106": "--r1", "#010107": "--r5", "#010108": "--r10",
}  # fmt: skip
_HEX = {variable: code for code, variable in _CSS.items()}


def points_of(records: Sequence[Mapping[str, Any]], name: str) -> Points:
    """The finite values of one metric, by step; of a step that was logged twice, the later."""
    found = {record["step"]: float(record[name]) for record in records if _is_number(record.get(name))}
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def draw(figure: Figure, records: Sequence[Mapping[str, Any]]) -> str | None:
    """The figure as an <svg> element, or None where none of its metrics was logged."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    series = [(metric, points_of(records, metric.name)) for metric in figure.metrics]
    series = [(metric, points) for metric, points in series if points[0]]
    if not series:
        return None
    # letters stay letters, in the page's own font; ids differ between the figures of a page
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.title, "font.family": "sans-serif"}):
        canvas = Canvas(figsize=(WIDTH, HEIGHT))
        axes = canvas.add_axes((0.0, 0.0, 1.0, 1.0))  # placed below, when its numbers are known
        for metric, points in series:
            _draw_line(axes, points, metric.label, _HEX[metric.colour], figure.noisy)
        style_axes(axes, size=11, muted=_MUTED, rule=_RULE)
        axes.set_xlabel("optimizer step", color=_MUTED, fontsize=11)
        axes.set_ylabel(figure.axis, color=_MUTED, fontsize=11)
        axes.margins(x=0.015)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if len(steps := {step for _, points in series for step in points[0]}) == 1:
            axes.set_xticks([*steps])
        if figure.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        elif axes.get_ylim()[1] >= 1000:
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))  # 1,000.1 among its neighbours
        if figure.from_zero:
            axes.set_ylim(bottom=0)
        top = TOP
        if any(metric.label for metric, _ in series):
            top -= LEGEND
            axes.legend(
                loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=11.5,
                labelcolor=_INK, borderaxespad=0.2, handlelength=1.4, columnspacing=1.4,
            )  # fmt: skip
        left = _left_of(axes)
        axes.set_position((left, BOTTOM, RIGHT - left, top - BOTTOM))
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), f"{figure.title} over steps")


def _left_of(axes: Axes) -> float:
    """Where the axes begin, beside the numbers and the words; layout="constrained" draws twice to find that."""
    numbers = axes.yaxis.get_major_formatter().format_ticks(list(axes.yaxis.get_majorticklocs()))
    return (0.38 + 0.088 * max(map(len, numbers), default=0)) / WIDTH


def _draw_line(axes: Axes, points: Points, label: str, color: str, noisy: bool) -> None:
    """The values; where they are noisy and many, faint, under their running mean."""
    steps, values = _thin(points, 500)
    if len(steps) <= 60 or not noisy:
        marker = "o" if len(steps) <= 15 else None
        axes.plot(steps, values, color=color, linewidth=2, marker=marker, markersize=4, label=label, clip_on=False)
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.4)
    axes.plot(steps, _running_mean(values, max(3, len(values) // 30)), color=color, linewidth=2, label=label)


def _thin(points: Points, most: int) -> Points:
    """At most about `most` points, each the mean of its neighbours: a long run must not make a page of megabytes."""
    steps, values = points
    width = -(-len(steps) // most)
    chunks = range(0, len(steps), width)
    return [steps[min(at + width, len(steps)) - 1] for at in chunks], [_mean(values[at : at + width]) for at in chunks]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    half = width // 2
    return [_mean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _inline(svg: str, name: str) -> str:
    """The drawing as an element of a page: no XML head, no metadata, sized by the page, coloured by its CSS."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]+"', svg)
    assert view_box
    svg = re.sub(r"<svg[^>]*>", f'<svg {view_box[0]} role="img" aria-label="{name}">', svg, count=1)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # the same in every figure; those of clip paths differ, and stay
    svg = re.sub(r"font-family: [^;]+; ?", "", svg)  # the page's font ...
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)  # ... also where matplotlib is older
    # a tenth of a pixel is enough for a line, at half the bytes
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\d\.\d)\d+", r"\1", path[0]), svg)
    for code, variable in _CSS.items():
        svg = svg.replace(code, f"var({variable})")
    return svg.strip()
