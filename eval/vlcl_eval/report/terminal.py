"""Tables on a terminal: columns that do not fit come below, with the first columns again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

GAP = 2  # behind each column but the last
Rows = Sequence[Sequence[str]]


def console() -> Console:
    """Of stdout. A file or a pipe has no width that a table must keep to."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=10_000)


def print_table(out: Console, rows: Rows, repeated: int) -> None:
    """`rows[0]` is the head; the `repeated` first columns are on the left of each part; a cell in `**` is bold."""
    for number, columns in enumerate(fitting(rows, out.width, repeated)):
        if number:
            out.print()
        _print_part(out, [[row[column] for column in columns] for row in rows], repeated)


def fitting(rows: Rows, width: int, repeated: int) -> list[list[int]]:
    """Columns in groups that fit beside the `repeated` first ones, which each group has."""
    widths = [GAP + max(len(row[column].strip("*")) for row in rows) for column in range(len(rows[0]))]
    groups = [list(range(repeated))]
    for column in range(repeated, len(widths)):
        if len(groups[-1]) > repeated and sum(widths[c] for c in [*groups[-1], column]) > width + GAP:
            groups.append(list(range(repeated)))
        groups[-1].append(column)
    return groups


def _print_part(out: Console, rows: Rows, left: int) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    heads = [Column(Text(head), justify="left" if place < left else "right") for place, head in enumerate(rows[0])]
    grid = Table(*heads, box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for row in rows[1:]:
        grid.add_row(*(Text(cell.strip("*"), style="bold" if cell.startswith("**") else "") for cell in row))
    out.print(grid)
