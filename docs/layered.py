"""A layered picture: rows of places, ordered for few crossings of the links between them, then placed side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

GAP = 22  # between two places of a row


@dataclass
class Grid:
    """Rows of places, lowest first: names, and (name, row) where links to that name pass through the row."""

    rows: list[list[object]]
    links: list[tuple[object, object]] = field(default_factory=list)  # from the upper row to the next lower one
    x: dict[object, float] = field(default_factory=dict)


def crossings(upper: list[object], lower: list[object], links: list[tuple[object, object]]) -> int:
    up, down = ({item: n for n, item in enumerate(row)} for row in (upper, lower))
    pairs = [(up[a], down[b]) for a, b in links if a in up and b in down]
    return sum((a - c) * (b - d) < 0 for n, (a, b) in enumerate(pairs) for c, d in pairs[:n])


def total_crossings(grid: Grid) -> int:
    return sum(crossings(grid.rows[n + 1], grid.rows[n], grid.links) for n in range(len(grid.rows) - 1))


def untangle(grid: Grid, rounds: int = 120) -> None:
    """Order each row for few crossings: rows sorted by the mean place of their neighbours, then swaps; the best of
    many starts with seeded orders."""
    rng = np.random.default_rng(0)
    best: tuple[int, list[list[object]]] = (total_crossings(grid), [list(row) for row in grid.rows])
    for _ in range(rounds):
        grid.rows = (
            [[row[i] for i in rng.permutation(len(row))] for row in best[1]]
            if rng.random() < 0.5
            else [list(row) for row in best[1]]
        )
        for _ in range(6):
            for down in (True, False):
                _sweep(grid, down)
        while _swap(grid):
            pass
        if (score := total_crossings(grid)) < best[0]:
            best = score, [list(row) for row in grid.rows]
        grid.rows = [list(row) for row in best[1]]


def _sweep(grid: Grid, down: bool) -> None:
    numbers = range(1, len(grid.rows)) if not down else range(len(grid.rows) - 2, -1, -1)
    for number in numbers:
        other = grid.rows[number + 1 if down else number - 1]
        place = {item: n / max(len(other) - 1, 1) for n, item in enumerate(other)}
        own = {item: n / max(len(grid.rows[number]) - 1, 1) for n, item in enumerate(grid.rows[number])}
        near = {item: [place[b if a == item else a] for a, b in grid.links
                       if item in (a, b) and (b if a == item else a) in place] for item in own}  # fmt: skip
        grid.rows[number].sort(key=lambda item: float(np.mean(near[item])) if near[item] else own[item])


def _swap(grid: Grid) -> bool:
    """Swap neighbours where that removes crossings; whether any were."""
    better = False
    for number, row in enumerate(grid.rows):
        around = [n for n in (number - 1, number) if 0 <= n < len(grid.rows) - 1]

        def here(around: list[int] = around) -> int:
            return sum(crossings(grid.rows[n + 1], grid.rows[n], grid.links) for n in around)

        for n in range(len(row) - 1):
            before = here()
            row[n], row[n + 1] = row[n + 1], row[n]
            if here() < before:
                better = True
            else:
                row[n], row[n + 1] = row[n + 1], row[n]
    return better


def place(grid: Grid, left: float, right: float, box: float, thin: float) -> None:
    """x of every place: near the mean of its neighbours, in the order of its row, without overlap, inside the page.
    `box`, `thin`: widths of a named place and of one where links pass."""
    for row in grid.rows:
        grid.x |= dict(zip(row, np.linspace(left + 80, right - 80, max(len(row), 2))))
    for sweep in range(60):
        for number in range(len(grid.rows)) if sweep % 2 else range(len(grid.rows) - 1, -1, -1):
            row = grid.rows[number]
            wanted = []
            for item in row:
                near = [grid.x[b if a == item else a] for a, b in grid.links if item in (a, b)]
                wanted.append(float(np.mean(near)) if near else grid.x[item])
            for item, x in zip(
                row, spread(wanted, [box if isinstance(item, str) else thin for item in row], left, right)
            ):
                grid.x[item] = x


def spread(wanted: list[float], widths: list[float], left: float, right: float) -> list[float]:
    """The places nearest to the wanted ones (least squares) that keep the order and the gaps."""
    apart = np.concatenate([[0], np.cumsum([(a + b) / 2 + GAP for a, b in pairwise(widths)])])
    blocks: list[list[float]] = []  # [sum, count] of items that touch: pooled neighbours
    for x in np.asarray(wanted) - apart:
        blocks.append([float(x), 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            last = blocks.pop()
            blocks[-1] = [blocks[-1][0] + last[0], blocks[-1][1] + last[1]]
    flat = [total / count for total, count in blocks for _ in range(int(count))]
    low, high = left + widths[0] / 2, right - widths[-1] / 2 - apart[-1]
    return [float(min(max(x, low), max(low, high)) + a) for x, a in zip(flat, apart)]
