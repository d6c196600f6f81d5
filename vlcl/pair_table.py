"""PairTable: the auxiliary variables, one row a training pair, each rank owning 1/W of the rows.

Who owns what: rank r holds the rows `distributed.own_rows(num_rows)` as a [rows, K] float32 tensor on the
accelerator, with a visit count a row. `read` is one sum-reduce of G*(K+1) floats (each rank fills what it owns);
`write` is local. NaN marks a row never written, so a forgotten write is loud; never 0, which is a legal value.
Misuse: calling `read` on some ranks only hangs; `write` needs the same arguments on every rank.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlcl import distributed


class PairTable:
    """`num_rows` rows x `num_columns` float32 columns, sharded over the ranks.

    >>> table = PairTable(num_rows=4, num_columns=2)
    >>> table.write(torch.tensor([3]), torch.tensor([[1.0, 2.0]]))
    >>> table.read(torch.tensor([3]))[0]
    tensor([[1., 2.]])
    """

    def __init__(self, num_rows: int, num_columns: int = 2, device: torch.device | str = "cpu") -> None:
        if num_rows < 1 or num_columns < 1:
            raise ValueError(f"a pair table needs rows and columns, got {num_rows} x {num_columns}")
        self.num_rows, self.num_columns = num_rows, num_columns
        self._own = distributed.own_rows(num_rows)
        # One row more than owned: reads and writes of rows that live elsewhere land there, with no branch and no
        # host synchronisation.
        self._values = torch.full((len(self._own) + 1, num_columns), torch.nan, device=device)
        self._visits = torch.zeros(len(self._own) + 1, dtype=torch.int32, device=device)
        self._undo: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def _slot(self, row_G: Tensor, keep_G: Tensor | None = None) -> Tensor:
        mine_G = (row_G >= self._own.start) & (row_G < self._own.stop)
        if keep_G is not None:
            mine_G = mine_G & keep_G
        return torch.where(mine_G, row_G - self._own.start, len(self._own))

    def _check(self, row_G: Tensor) -> None:
        """A row that nobody owns would read as 0, which is a legal value."""
        if not row_G.numel():
            return
        inside = (row_G.min() >= 0) & (row_G.max() < self.num_rows)
        if row_G.is_cuda:  # no wait for the device: it stops by itself
            torch._assert_async(inside)  # pyright: ignore[reportPrivateImportUsage]
        elif not inside:
            raise ValueError(
                f"row ids {int(row_G.min())} .. {int(row_G.max())} are not all rows of the table (0 .. "
                f"{self.num_rows - 1}): not the shards it was made for; vlcl data index SHARDS, then a new run"
            )

    @torch.no_grad()
    def read(self, row_G: Tensor) -> tuple[Tensor, Tensor]:
        """values_GK and visits_G of the rows of a global batch, in its order, on every rank. ValueError for a row id
        outside 0..N-1 (on a GPU: a device-side assertion)."""
        self._check(row_G)
        slot_G = self._slot(row_G)
        mine_G1 = (slot_G < len(self._own))[:, None]
        both_GX = torch.cat([self._values[slot_G], self._visits[slot_G, None].float()], dim=1)
        both_GX = distributed.all_sum(torch.where(mine_G1, both_GX, 0.0))
        return both_GX[:, :-1], both_GX[:, -1].long()

    @torch.no_grad()
    def write(self, row_G: Tensor, values_GK: Tensor) -> None:
        """Store the rows that this rank owns. A row that occurs twice keeps the values of its last place in the
        batch, and counts one visit. ValueError for a row id outside 0..N-1."""
        self._check(row_G)
        by_row_G = torch.argsort(row_G, stable=True)
        sorted_G = row_G[by_row_G]
        last_G = torch.ones_like(row_G, dtype=torch.bool)
        last_G[by_row_G[:-1]] = sorted_G[:-1] != sorted_G[1:]
        slot_G = self._slot(row_G, keep_G=last_G)
        if self._undo is not None:
            self._undo.append((slot_G, self._values[slot_G], self._visits[slot_G]))
        self._values[slot_G] = values_GK.to(self._values.dtype)
        self._visits[slot_G] += 1

    def begin(self) -> None:
        """From here on, what is written can be taken back."""
        self._undo = []

    @torch.no_grad()
    def take_back(self) -> None:
        """Undo what was written since `begin`, to the bit."""
        for slot_G, values_GK, visits_G in reversed(self._undo or []):
            self._values[slot_G] = values_GK
            self._visits[slot_G] = visits_G
        self._undo = None

    @property
    def rows_written(self) -> int:
        """How many rows of the whole table have been visited (a collective)."""
        return int(distributed.all_sum((self._visits[:-1] > 0).sum()))

    def files(self) -> dict[str, dict[str, Tensor]]:
        """This rank's rows as the content of a safetensors file, by its name: views, no copies. None where there are
        more ranks than rows."""
        name = f"rows-{self._own.start:012d}-{self._own.stop:012d}.safetensors"
        return {name: {"values": self._values[:-1], "visits": self._visits[:-1]}} if self._own else {}

    def save(self, folder: Path) -> None:
        """Write this rank's rows as a file of their own; OSError where it fails. Not a collective."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in self.files().items():
            save_file({key: x.cpu() for key, x in tensors.items()}, folder / name)

    def load(self, folder: Path) -> None:
        """Fill this rank's rows from `save` of any number of ranks; ValueError where rows are missing, or K differs."""
        found = 0
        for file, saved in _files_of_rows(folder):
            found = saved.stop
            both = range(max(saved.start, self._own.start), min(saved.stop, self._own.stop))
            try:
                with safe_open(file, "pt") as tensors:
                    rows, columns = tensors.get_slice("values").get_shape()
                    if rows != len(saved):
                        raise ValueError(f"{file} has {rows} rows: not what its name says")
                    if columns != self.num_columns:
                        raise ValueError(f"{file} has {columns} columns, the table {self.num_columns}")
                    there, here = (slice(both.start - x.start, both.stop - x.start) for x in (saved, self._own))
                    if both:
                        self._values[here] = tensors.get_slice("values")[there].to(self._values)
                        self._visits[here] = tensors.get_slice("visits")[there].to(self._visits)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from None
        if found != self.num_rows:
            raise ValueError(f"{folder} has {found} rows, the table {self.num_rows}")


def _files_of_rows(folder: Path) -> list[tuple[Path, range]]:
    """The files of a saved table and the rows that each has, in order. ValueError where they do not
    follow one another from row 0 on."""
    found: list[tuple[Path, range]] = []
    for file in sorted(folder.glob("rows-*-*.safetensors")):
        _, start, stop = file.stem.split("-")
        expected = found[-1][1].stop if found else 0
        if int(start) < expected:
            raise ValueError(f"{folder} has files of two tables: {found[-1][0].name} and {file.name}")
        if int(start) > expected:
            raise ValueError(f"{folder} lacks the rows {expected} .. {int(start) - 1}: a file of it is missing")
        found.append((file, range(int(start), int(stop))))
    return found
