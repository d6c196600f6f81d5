"""Which cells `vlcl compare --tune` wants in the light of the results that are there.

A function of what it is given: a comparison that was stopped, asked again, wants what it had wanted. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlcl.compare.comparison import Result, best_rate, merit_of
from vlcl.compare.grid import Cell


def wanted_cells(cells: Sequence[Cell], results: Mapping[str, Result], select: Sequence[str]) -> list[Cell]:
    """Of all cells that a search may want, those it wants now, in their order. `results` by cell name; `select`: the
    metrics whose mean chooses.

    Of each loss and batch size: the first seed at the given rates; while the best of them stands at an end, at the next
    rate beyond as well; then the other seeds at the best.
    """
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.loss, cell.batch_size), []).append(cell)
    wanted = {name for group in groups.values() for name in _wanted_of_group(group, results, select)}
    return [cell for cell in cells if cell.name in wanted]


def _wanted_of_group(cells: Sequence[Cell], results: Mapping[str, Result], select: Sequence[str]) -> list[str]:
    """The names of those of one loss and batch size."""
    first_seed = sorted((cell for cell in cells if cell.seed == cells[0].seed), key=lambda cell: cell.lr)
    given = [place for place, cell in enumerate(first_seed) if cell.beyond == 0]
    low, high = given[0], given[-1]
    while True:
        tried = first_seed[low : high + 1]
        found = {cell.lr: [results.get(cell.name) or Result(cell)] for cell in tried}
        names = [cell.name for cell in tried]
        if not all(result.is_over for ended in found.values() for result in ended):
            return names
        if all(result.value is None for ended in found.values() for result in ended):
            return names  # all of them failed: nothing to choose from
        best = best_rate(found, merit_of(select))
        if best == tried[0].lr and low > 0:
            low -= 1
        elif best == tried[-1].lr and high < len(first_seed) - 1:
            high += 1
        else:
            return names + [cell.name for cell in cells if cell.lr == best]
