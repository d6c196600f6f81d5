"""Words of reports: tables that read well as text and as Markdown. No torch."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table, aligned for those who read it as text; `numbers`: the columns whose cells stand to the right."""
    clean = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[column]) for row in clean)) for column in range(len(clean[0]))]
    widths[-1] = max(3, len(clean[0][-1]))  # messages of any length: not padded
    rule = ["-" * (width - 1) + ":" if column in numbers else "-" * width for column, width in enumerate(widths)]
    aligned = [
        [cell.rjust(width) if column in numbers else cell.ljust(width)
         for column, (cell, width) in enumerate(zip(row, widths))]
        for row in (clean[0], rule, *clean[1:])
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]
