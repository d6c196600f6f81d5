"""report.png: the scores over the number of shots, a panel for each data set and one for their mean.

A section for each method that trains; zero-shot is a ring in each of them. Where zero-shot is all there is, the scores
stand along one axis, a line for each data set. Colour and marker are the model, a dashed line is the strict mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlcl.report.style import COLOURS, INK, MARKERS, MUTED, RULE, style_axes
from vlcl.report.text import upper_first
from vlcl_eval.report.scores import (
    METHODS,
    Column,
    Model,
    Score,
    average,
    averaged,
    in_order,
    in_shots_order,
    mode_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Shots = int | str
Entry = tuple[str, dict[str, Any]]  # of a legend: label and look
MEAN = "mean"
STYLES = {"elevater": "-", "strict": "--"}
# of zero-shot: a dot within a ring where both modes score the same
ZEROSHOT = {
    "elevater": {"markersize": 8.5, "markerfacecolor": "none", "markeredgewidth": 1.6},
    "strict": {"markersize": 4},
}
# inches
SIDE, TITLE, LINE = 0.3, 0.68, 0.23
PANEL = {1: (7.4, 3.7), 2: (4.4, 3.2), 3: (3.6, 2.9), 4: (3.2, 2.7), 5: (2.8, 2.5)}  # by the panels in a row
LEFT, RIGHT, ABOVE, BELOW = 0.45, 0.15, 0.5, 0.4  # from a panel's edges to its axes
BESIDE = 0.13  # between the models of a row of zero-shot scores
SECTION = 0.58  # a section's heading


@dataclass(frozen=True)
class Line:
    """One model and mode in a panel; zero-shot is a line of one point, at 0 shots."""

    model: int
    mode: str
    points: Mapping[Shots, Score]


@dataclass(frozen=True)
class Panel:
    title: str
    subtitle: str
    lines: Sequence[Line]

    @property
    def shots(self) -> set[Shots]:
        return {shots for line in self.lines for shots in line.points}


def draw(models: Sequence[Model], path: Path) -> None:
    """Write the figure as PNG, whatever the suffix of `path`."""
    found = {column.method for model in models for column in model.columns}
    trained = [method for method in METHODS if method in found and method != "zeroshot"]
    if trained:
        canvas = _draw_sections(models, {METHODS[method]: _panels(models, method) for method in trained})
    else:
        canvas = _draw_zeroshot(models, _panels(models, "zeroshot"))
    canvas.savefig(path, format="png", dpi=150)


def _panels(models: Sequence[Model], method: str) -> list[Panel]:
    """That of the mean, where there are several data sets, then one for each data set with a score of `method`."""
    shown = [[column for column in model.columns if column.method in ("zeroshot", method)] for model in models]
    datasets = in_order(name for model in models for name, column in model.cells if column.method == method)
    panels = []
    for name in datasets:
        cells = [{column: model.cells[name, column] for column in columns if (name, column) in model.cells}
                 for model, columns in zip(models, shown)]  # fmt: skip
        found = [cell for by_column in cells for cell in by_column.values()]
        sample = ", a sample" if any(cell.sample for cell in found) else ""
        scores = [{column: cell.score for column, cell in by_column.items()} for by_column in cells]
        panels.append(Panel(name, found[0].metric + sample, _lines(scores)))
    # all points of the mean are of the same data sets, or they could not be compared
    everywhere = [
        name for name in averaged(datasets)
        if all((name, column) in model.cells for model, columns in zip(models, shown) for column in columns)
    ]  # fmt: skip
    if len(datasets) > 1 and everywhere:
        means = [{column: average(model.cells[name, column] for name in everywhere) for column in columns}
                 for model, columns in zip(models, shown)]  # fmt: skip
        which = (
            "data sets" if len(everywhere) == len(datasets) else f"of {len(datasets)} data sets, those with every point"
        )
        panels.insert(0, Panel(MEAN, f"{len(everywhere)} {which}", _lines(means)))
    return panels


def _lines(scores: Sequence[Mapping[Column, Score]]) -> list[Line]:
    lines = []
    for model, by_column in enumerate(scores):
        for kind in dict.fromkeys((column.method, column.mode) for column in by_column):
            points = {
                column.shots: score for column, score in by_column.items() if (column.method, column.mode) == kind
            }
            lines.append(Line(model, kind[1], points))
    return lines


def _draw_sections(models: Sequence[Model], sections: Mapping[str, Sequence[Panel]]) -> Figure:
    grids = [_grid(len(panels)) for panels in sections.values()]
    width = 2 * SIDE + max(columns * PANEL[columns][0] for columns, _ in grids)
    legends, head = _legends(models, width)
    heights = [SECTION + PANEL[columns][1] * max(row + span for _, row, span in places) for columns, places in grids]
    height = head + sum(heights) + SIDE
    canvas = _canvas(width, height, "Scores (%) over the number of training images per class")
    _draw_legends(canvas, legends)
    top = head
    for (title, panels), (columns, places), tall in zip(sections.items(), grids, heights):
        _write(canvas, SIDE, top + 0.42, upper_first(title), color=INK, fontsize=12.5, weight="bold")
        shots = sorted(set().union(*(panel.shots for panel in panels)), key=in_shots_order)
        wide, high = PANEL[columns]
        for panel, (column, row, span) in zip(panels, places):
            box = (SIDE + column * wide, top + SECTION + row * high, span * wide, span * high)
            _draw_panel(_axes(canvas, box), panel, shots)
        top += tall
    return canvas


def _grid(count: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Panels in a row, and (column, row, span) of each panel; of many, the first is twice as wide and high."""
    columns = count if count <= 4 else 3 if count <= 6 else 4 if count <= 8 else 5
    if count <= 8:
        return columns, [(place % columns, place // columns, 1) for place in range(count)]
    free = [(place % columns, place // columns, 1) for place in range(count + 3)]
    return columns, [(0, 0, 2), *(place for place in free if place[0] > 1 or place[1] > 1)]


def _canvas(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), facecolor="white")
    _write(canvas, SIDE, 0.45, title, color=INK, fontsize=14)
    return canvas


def _write(canvas: Figure, left: float, down: float, text: str, **look: Any) -> None:
    """Text whose base line starts so many inches from the upper left corner."""
    width, height = canvas.get_size_inches()
    canvas.text(left / width, 1 - down / height, text, **look)


def _axes(canvas: Figure, box: tuple[float, float, float, float]) -> Axes:
    """Axes within a panel of (left, top, width, height) inches from the upper left corner."""
    width, height = canvas.get_size_inches()
    left, top, wide, high = box
    wide, high, left, top = wide - LEFT - RIGHT, high - ABOVE - BELOW, left + LEFT, top + ABOVE
    axes = canvas.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))
    return axes


def _look(model: int) -> dict[str, Any]:
    """Colour and marker of a model; a ninth has the colour of the first with another marker."""
    times, colour = divmod(model, len(COLOURS))
    return {"color": COLOURS[colour], "marker": MARKERS[(model + times) % len(MARKERS)]}


def _model_entries(models: Sequence[Model]) -> list[Entry]:
    return [(model.label, {**_look(place), "markersize": 6.5, "linewidth": 1.8}) for place, model in enumerate(models)]


def _style_entries(models: Sequence[Model]) -> list[Entry]:
    """What the lines, rings and bars of the figure are, as far as they are there."""
    columns = sorted({column for model in models for column in model.columns}, key=lambda column: column.place)
    entries: list[Entry] = []
    for mode in sorted({column.mode for column in columns}):
        trained = [column for column in columns if column.mode == mode and column.method != "zeroshot"]
        if trained:
            entries.append((mode_title(models, trained), {"color": MUTED, "linestyle": STYLES[mode]}))
        if any(column.method == "zeroshot" for column in columns if column.mode == mode):
            entries.append((f"zero-shot, {mode}", {"color": MUTED, "marker": "o", "linestyle": "", **ZEROSHOT[mode]}))
    if any(cell.score.sd is not None for model in models for cell in model.cells.values()):
        bar = {"color": MUTED, "marker": "|", "markersize": 13, "linestyle": ""}
        entries.append(("standard deviation over seeds", bar))
    return entries


def _legends(models: Sequence[Model], width: float) -> tuple[list[tuple[list[Entry], int]], float]:
    """The entries of each legend with the number of its columns, and the inches down to what is below them."""
    legends = []
    for entries in (_model_entries(models), _style_entries(models)):
        longest = max(len(label) for label, _ in entries)
        legends.append((entries, max(1, min(len(entries), int((width - 2 * SIDE) / (0.7 + 0.08 * longest))))))
    return legends, TITLE + sum(LINE * -(-len(entries) // columns) for entries, columns in legends)


def _draw_legends(canvas: Figure, legends: Sequence[tuple[Sequence[Entry], int]]) -> None:
    from matplotlib.lines import Line2D

    width, height = canvas.get_size_inches()
    top = 0.6
    for entries, columns in legends:
        handles = [Line2D([], [], label=label, **look) for label, look in entries]
        canvas.legend(handles=handles, loc="upper left", bbox_to_anchor=(SIDE / width, 1 - top / height), ncols=columns,
                      frameon=False, fontsize=10.5, labelcolor=INK, borderaxespad=0, borderpad=0, columnspacing=1.6,
                      handlelength=2.6)  # fmt: skip
        top += LINE * -(-len(entries) // columns)


def _draw_panel(axes: Axes, panel: Panel, shots: Sequence[Shots]) -> None:
    from matplotlib.ticker import MaxNLocator

    places = sorted({(line.model, line.mode) for line in panel.lines if 0 not in line.points})
    ringed = sorted({line.model for line in panel.lines if 0 in line.points})
    for line in panel.lines:
        if 0 in line.points:
            aside = min(0.22, 0.7 / len(ringed)) * (ringed.index(line.model) - (len(ringed) - 1) / 2)
        else:  # so that no bar hides another
            aside = min(0.08, 0.4 / len(places)) * (places.index((line.model, line.mode)) - (len(places) - 1) / 2)
        points = sorted(line.points, key=in_shots_order)
        xs, scores = [shots.index(count) + aside for count in points], [line.points[count] for count in points]
        look = {**_look(line.model), **(ZEROSHOT[line.mode] if 0 in line.points else {"markersize": 5.5})}
        axes.plot(xs, [score.mean for score in scores], linewidth=1.7, linestyle=STYLES[line.mode], zorder=4, **look)
        for x, score in zip(xs, scores):
            if score.sd is not None:
                axes.errorbar(x, score.mean, score.sd, color=look["color"], elinewidth=1.2, capsize=3, zorder=3)
    axes.set_xlim(-0.4, len(shots) - 0.6)
    axes.set_xticks(range(len(shots)), [str(count) for count in shots])
    _set_score_limits(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    style_axes(axes, size=9.5)
    _head(axes, panel)


def _set_score_limits(axes: Axes) -> None:
    """Room around the scores, and a height of at least four points, so that noise does not look like a difference."""
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max(2.0, (high - low) / 2)
    axes.set_ylim(max(middle - half, -2), min(middle + half, 102))


def _head(axes: Axes, panel: Panel) -> None:
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    bold = "bold" if panel.title == MEAN else "normal"
    axes.annotate(panel.title, (0, 1), (-32, 22), color=INK, fontsize=10, weight=bold, **place)
    axes.annotate(panel.subtitle, (0, 1), (-32, 10), color=MUTED, fontsize=8.5, **place)


def _draw_zeroshot(models: Sequence[Model], panels: Sequence[Panel]) -> Figure:
    width = 8.6
    legends, head = _legends(models, width)
    row = 0.16 + BESIDE * len(models)
    tall = row * len(panels)
    canvas = _canvas(width, head + tall + ABOVE + BELOW, "Zero-shot scores (%)")
    _draw_legends(canvas, legends)
    names = 3.6  # inches
    axes = _axes(canvas, (names, head - ABOVE + 0.1, width - names - SIDE, tall + ABOVE + BELOW))
    style_axes(axes, size=9.5, rules=None)
    for place, panel in enumerate(panels):
        axes.axhline(place, color=RULE, linewidth=0.8)
        for line in panel.lines:
            y = place + BESIDE / row * (line.model - (len(models) - 1) / 2)
            score = line.points[0].mean
            axes.plot(score, y, zorder=4, clip_on=False, linestyle="", **{**_look(line.model), **ZEROSHOT[line.mode]})
            if len(models) == 1 and line is panel.lines[0]:
                axes.annotate(f"{score:.1f}", (score, y), (8, 0), textcoords="offset points", va="center", color=INK,
                              fontsize=9.5, annotation_clip=False,
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    axes.set_yticks(range(len(panels)), [f"{panel.title}  ({panel.subtitle})" for panel in panels])
    axes.set_ylim(len(panels) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    return canvas
