"""`python docs/draw_architecture.py`: docs/images/rooms.png, drawn from the imports in the source, and data_flow.png.

Rooms: an arrow leads from a room to one that it imports. Left out are arrows that follow from others (A to C where A
imports B and B imports C), and those to errors and batch, which all rooms may import. Arrows to one room run together.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from layered import Grid, place, untangle
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from import_order import EXCEPTIONS, ORDER, arrows, level, reached, read_imports  # noqa: E402

IMAGES = ROOT / "docs" / "images"
INK, MUTED, BAND, BOX = "#1f2933", "#66717e", "#f3f5f8", "#ffffff"
COLOURS = ("#1f6fb4", "#c2571a", "#2e8b57", "#8a4fae", "#b3243b", "#1b8a99", "#8c6d1f", "#c0398b", "#5b6ee1", "#6b7a1f",
           "#4a7a8c", "#d08a00")  # fmt: skip
WIDTH, BOX_WIDTH, BOX_HEIGHT, ROW, THIN = 1860, 160, 36, 92, 16  # pixels
ACROSS = 150, WIDTH - 20  # where rooms may be, from left to right
FREE = {"vlcl.errors", "vlcl.batch"}
ABOVE_ORDER = {"vlcl_eval": "train", "vlcl_data_prep": "model"}  # beside which line of the order they are drawn


def drawn_arrows() -> dict[str, set[str]]:
    """Room -> rooms, as they are drawn: vlcl_eval and vlcl_data_prep as one box each."""
    graph: dict[str, set[str]] = {}
    for room, imported in arrows(
        one for one in read_imports() if (one.importer, one.imported) not in EXCEPTIONS
    ).items():
        name = room if room.startswith("vlcl.") else room.split(".")[0]
        if name != "vlcl":
            graph.setdefault(name, set()).update(x for x in imported if x.startswith("vlcl."))
    graph["vlcl.cli"] |= {"vlcl_eval", "vlcl_data_prep"}  # by name, when a command of theirs is typed
    return {
        room: {x for x in imported - FREE if not any(x in reached(other, graph) for other in imported - {x})}
        for room, imported in graph.items()
        if room not in FREE
    }


def digest(graph: dict[str, set[str]]) -> str:
    """What the picture shows, as one hash: written into the PNG, compared by tests/test_architecture.py."""
    text = "\n".join(f"{room}: {' '.join(sorted(imported))}" for room, imported in sorted(graph.items()))
    return hashlib.sha256((text + repr(ORDER)).encode()).hexdigest()


def rows_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """A row for each room: a line of the order has as many as its rooms need to be above what they import there."""

    def line(room: str) -> int:
        found = level(ABOVE_ORDER.get(room, room))
        assert found is not None, f"{room} has no place in the order"
        return found

    depth: dict[str, int] = {}

    def depth_of(room: str) -> int:
        if room not in depth:
            depth[room] = 1 + max((depth_of(x) for x in graph[room] if line(x) == line(room)), default=-1)
        return depth[room]

    first, rows = 0, {}
    for number in range(len(ORDER)):
        here = [room for room in graph if line(room) == number]
        rows |= {room: first + depth_of(room) for room in here}
        first = max((rows[room] + 1 for room in here), default=first)
    return rows


def make_grid(graph: dict[str, set[str]]) -> Grid:
    rows = rows_of(graph)
    names: list[list[object]] = [
        [*sorted(room for room in rows if rows[room] == row)] for row in range(max(rows.values()) + 1)
    ]
    grid = Grid(names)
    for target in sorted(graph):
        sources = sorted(room for room in graph if target in graph[room])
        top = max((rows[room] for room in sources), default=0)
        passing = range(rows[target] + 1, top)
        for row in passing:
            grid.rows[row].append((target, row))
            grid.links.append(((target, row), (target, row - 1) if row - 1 > rows[target] else target))
        for room in sources:
            grid.links.append((room, (target, rows[room] - 1) if rows[room] - 1 > rows[target] else target))
    return grid


def page(height: int, width: int = WIDTH) -> tuple[Figure, Axes]:
    plt.rcParams["font.family"] = "DejaVu Sans"
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, edge: str = INK, fill: str = BOX) -> None:
    axes.add_patch(
        FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=7",
                       facecolor=fill, edgecolor=edge, linewidth=1.4, zorder=3)
    )  # fmt: skip


def save(figure: Figure, name: str, about: str) -> None:
    figure.savefig(IMAGES / name, dpi=100, metadata={"Software": None, "Description": about})
    plt.close(figure)


def draw_rooms() -> None:
    graph = drawn_arrows()
    rows, grid = rows_of(graph), make_grid(graph)
    untangle(grid)
    place(grid, *ACROSS, BOX_WIDTH, THIN)
    base = 120
    height = base + len(grid.rows) * ROW + 6
    figure, axes = page(height)
    y = {item: base + number * ROW + ROW / 2 for number, row in enumerate(grid.rows) for item in row}
    targets = [room for room in sorted(graph) if sum(room in x for x in graph.values()) > 1]
    colours = {room: COLOURS[n % len(COLOURS)] for n, room in enumerate(targets)}
    draw_bands(axes, rows, base, height)
    for source, target in grid.links:
        room = target if isinstance(target, str) else target[0]  # pyright: ignore[reportIndexIssue]
        link(axes, grid.x[source], y[source], grid.x[target], y[target], colours.get(room, MUTED),
             isinstance(source, str), isinstance(target, str), room in ABOVE_ORDER)  # fmt: skip
    for room in rows:
        box(axes, grid.x[room], y[room], BOX_WIDTH, BOX_HEIGHT, colours.get(room, INK),
            "#eef4fb" if "." not in room else BOX)  # fmt: skip
        axes.text(grid.x[room], y[room], room.removeprefix("vlcl."), ha="center", va="center", fontsize=12.5, color=INK,
                  zorder=4)  # fmt: skip
    box(axes, (150 + WIDTH - 20) / 2, 82, WIDTH - 170, BOX_HEIGHT)
    axes.text((150 + WIDTH - 20) / 2, 82, "errors      batch        every room above may import these two", ha="center",
              va="center", fontsize=12.5, color=INK, zorder=4)  # fmt: skip
    legend = "An arrow leads to what is imported; one that follows from others is left out. Dotted: looked up by name"
    axes.text(20, 26, f"{legend} when a command is typed.", fontsize=11.5, color=MUTED, va="center")
    save(figure, "rooms.png", digest(graph))


def draw_bands(axes: Axes, rows: dict[str, int], base: float, height: float) -> None:
    """A band for each line of the order, with what it is at the left."""
    names = ("base", "parts", "towers, table", "models on disk", "a run", "commands", "many runs", "the command line")
    edges = [
        min(row for room, row in rows.items() if level(ABOVE_ORDER.get(room, room)) == n) for n in range(1, len(ORDER))
    ]
    edges += [max(rows.values()) + 1]
    for number, (low, high) in enumerate(pairwise(edges), 1):
        bottom, top = base + low * ROW, base + high * ROW
        axes.add_patch(Rectangle((10, bottom + 3), WIDTH - 20, top - bottom - 6, facecolor=BAND, edgecolor="none"))
        axes.text(22, (bottom + top) / 2, names[number], fontsize=11.5, color=MUTED, va="center")
    axes.add_patch(Rectangle((10, 52), WIDTH - 20, base - 55, facecolor=BAND, edgecolor="none"))
    axes.text(22, 82, names[0], fontsize=11.5, color=MUTED, va="center")


def link(
    axes: Axes, x0: float, y0: float, x1: float, y1: float, colour: str, from_box: bool, to_box: bool, dotted: bool
) -> None:
    """A curve from below the upper place to above the lower one; through a passing place it goes on straight."""
    half = BOX_HEIGHT / 2
    start, end = y0 - half, y1 + half + (6 if to_box else 0)
    middle = (start + end) / 2
    points = [(x0, start), (x0, middle), (x1, middle), (x1, end)]
    codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    if not from_box:
        points, codes = [(x0, y0 + half), *points], [Curve.MOVETO, Curve.LINETO, *codes[1:]]
    style = {"linestyle": (0, (1, 2))} if dotted else {}
    axes.add_patch(
        PathPatch(Curve(points, codes), facecolor="none", edgecolor=colour, linewidth=1.6, zorder=2, **style)
    )
    if to_box:
        head = {"arrowstyle": "-|>", "mutation_scale": 13, "linewidth": 0, "shrinkA": 0, "shrinkB": 0}
        axes.add_patch(FancyArrowPatch((x1, end + 2), (x1, y1 + half), color=colour, zorder=2, **head))


@dataclass(frozen=True)
class Step:
    """A box of the data flow: its column and row, a title, lines below it, and the file that does it."""

    column: float
    row: float
    title: str
    lines: tuple[str, ...]
    file: str
    colour: str = INK


DATA, TOWERS, LOSS, STATE, DISK = COLOURS[0], COLOURS[2], COLOURS[1], COLOURS[3], MUTED
FLOW = {
    "shards": Step(0, 0, "shards + manifest", ("*.tar, manifest.json", "row = offset + place"), "manifest.py", DATA),
    "sample": Step(1, 0, "sample", ("image bytes, caption,", "row, known by now"), "shard.py, order.py", DATA),
    "batch": Step(2, 0, "Batch", ("images_BCHW, tokens_BL,", "row_B"), "stream.py, decode.py", DATA),
    "features": Step(3, 0, "Features", ("image_BD, text_BD,", "logit_scale"), "model.py, accumulate.py", TOWERS),
    "peers": Step(4, 0, "Peers", ("image_GD, text_GD, row_G:", "all ranks', no gradient"), "distributed.py", TOWERS),
    "state": Step(4, 1, "loss state", ("rows of the pair table,", "shared tensors"), "loss_state.py", STATE),
    "loss": Step(3, 1, "loss", ("E-step: log-normalizers a", "M-step: weighted surrogate"), "losses/", LOSS),
    "step": Step(2, 1, "step", ("backward, clip, rate,", "optimizer, average"), "train.py, optim.py", LOSS),
    "evaluate": Step(1, 1, "metrics", ("means of the steps;", "held-out evaluation"), "metrics.py, logs.py", DISK),
    "report": Step(0, 1, "report.html", ("curves, pictures that", "captions retrieve"), "report/", DISK),
    "saved": Step(2, 2, "step-00001000/", ("weights, optimizer, table,", "place in the data"), "checkpoint.py", DISK),
    "load": Step(1, 2, "load_model", ("encoder, preprocessing,", "tokenizer"), "checkpoint.py", DISK),
    "eval": Step(0, 3, "vlcl eval", ("ELEVATER, zero-shot,", "retrieval"), "eval/vlcl_eval/", DATA),
    "export": Step(1, 3, "vlcl export", ("for transformers,", "open_clip, ONNX Runtime"), "export/, hf/", DATA),
    "bias": Step(2, 3, "vlcl bias", ("gradients of mini-batches", "against the exact one"), "gradient_bias/", DATA),
}  # fmt: skip
FLOW_WIDTH, STEP_WIDTH, STEP_HEIGHT, COLUMN, LINE = 1400, 226, 96, 276, 160


def draw_flow() -> None:
    height = 4 * LINE + 4
    figure, axes = page(height, FLOW_WIDTH)
    at = {name: (148 + COLUMN * s.column, height - 82 - LINE * s.row) for name, s in FLOW.items()}
    for name, s in FLOW.items():
        x, y = at[name]
        box(axes, x, y, STEP_WIDTH, STEP_HEIGHT, s.colour)
        axes.text(x, y + 31, s.title, ha="center", va="center", fontsize=13.5, weight="bold", color=s.colour, zorder=4)
        axes.text(
            x, y + 1, "\n".join(s.lines), ha="center", va="center", fontsize=11, color=INK, zorder=4, linespacing=1.3
        )
        axes.text(x, y - 34, s.file, ha="center", va="center", fontsize=10, style="italic", color=MUTED, zorder=4)
    w, h = STEP_WIDTH / 2, STEP_HEIGHT / 2

    def right(a: str, b: str, shift: float = 0) -> None:
        flow_arrow(axes, (at[a][0] + w, at[a][1] + shift), (at[b][0] - w, at[b][1] + shift))

    def left(a: str, b: str, shift: float = 0) -> None:
        flow_arrow(axes, (at[a][0] - w, at[a][1] + shift), (at[b][0] + w, at[b][1] + shift))

    def down(a: str, b: str, shift: float = 0) -> None:
        flow_arrow(axes, (at[a][0] + shift, at[a][1] - h), (at[b][0] + shift, at[b][1] + h))

    for a, b in (("shards", "sample"), ("sample", "batch"), ("batch", "features"), ("features", "peers")):
        right(a, b)
    down("features", "loss")
    down("peers", "state", 50)
    flow_arrow(axes, (at["peers"][0] - w + 34, at["peers"][1] - h), (at["loss"][0] + w - 34, at["loss"][1] + h))
    left("state", "loss", 20)
    right("loss", "state", -20)
    for a, b in (("loss", "step"), ("step", "evaluate"), ("evaluate", "report"), ("saved", "load")):
        left(a, b)
    down("step", "saved")
    down("saved", "bias")
    down("load", "export")
    flow_arrow(axes, (at["load"][0] - w + 34, at["load"][1] - h), (at["eval"][0] + w - 34, at["eval"][1] + h))
    flow_arrow(
        axes,
        (at["step"][0] + w - 34, at["step"][1] + h),
        (at["features"][0] - w + 34, at["features"][1] - h),
        dashed=True,
    )
    (x, y), (saved_x, saved_y) = at["state"], at["saved"]
    flow_arrow(axes, (x, y - h), (saved_x + w, saved_y), corner=(x, saved_y))
    note(axes, at["state"][0] + 60, (at["peers"][1] + at["state"][1]) / 2, "row_G", "left")
    note(axes, (at["state"][0] + at["loss"][0]) / 2, at["loss"][1] + 30, "read", "center")
    note(axes, (at["state"][0] + at["loss"][0]) / 2, at["loss"][1] - 10, "write", "center")
    note(
        axes,
        (at["step"][0] + at["features"][0]) / 2 - 20,
        (at["step"][1] + at["features"][1]) / 2 + 12,
        "new weights",
        "right",
    )
    note(
        axes,
        (at["state"][0] + at["saved"][0]) / 2 + 60,
        saved_y + 12,
        "each rank's rows, saved for any number of ranks",
        "center",
    )
    axes.text(at["features"][0] - w, at["bias"][1] - 8,
              "B pairs of this rank, G of all ranks, D width,\nL tokens, C H W channels, height, width.\n"
              "No gradient of features crosses ranks.",
              fontsize=11, color=MUTED, va="center", linespacing=1.5)  # fmt: skip
    save(figure, "data_flow.png", "the data flow of vlcl")


def note(axes: Axes, x: float, y: float, text: str, side: str) -> None:
    axes.text(x, y, text, fontsize=10.5, color=MUTED, ha=side, va="center", zorder=4)


def flow_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], *, corner: tuple[float, float] | None = None,
    dashed: bool = False,
) -> None:  # fmt: skip
    if corner is not None:
        axes.plot(*zip(start, corner), color=MUTED, linewidth=1.6, zorder=2, solid_capstyle="round")
        start = corner
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=15, color=MUTED, linewidth=1.6, zorder=2,
                        shrinkA=0, shrinkB=0, linestyle=(0, (4, 3)) if dashed else "-")
    )  # fmt: skip


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    draw_rooms()
    draw_flow()
    print(f"written: {IMAGES / 'rooms.png'}, {IMAGES / 'data_flow.png'}")
