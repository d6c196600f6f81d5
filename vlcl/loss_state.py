"""LossState: what a loss remembers from step to step, by name, saved and re-sharded as one.

Rows (two floats a name, pair and direction) live in the pair table, sharded over the ranks; shared parts (a bank of
recent embeddings, prototypes, running means) are small and the same on every rank. The training step reads and writes
without knowing which loss runs; a loss that remembers nothing has a state in which every call does nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlcl import distributed
from vlcl.batch import Aux
from vlcl.losses import Loss
from vlcl.pair_table import PairTable

SHARED_FILE = "shared.safetensors"


class LossState:
    """The state of `loss` over `num_rows` pairs (N) of `width`-wide (D) embeddings, at its start."""

    def __init__(self, loss: Loss, num_rows: int, width: int, device: torch.device | str = "cpu") -> None:
        self.columns = loss.columns
        self.table = PairTable(num_rows, 2 * len(self.columns), device) if self.columns else None
        self.shared = {name: x.to(device) for name, x in loss.initial(width).items()}
        self._before = self.shared

    def read(self, row_G: Tensor) -> Aux:
        """What the loss needs for the rows of a global batch, on every rank (a collective)."""
        if self.table is None:
            return Aux({}, torch.zeros_like(row_G), self.shared)
        values_GK, visits_G = self.table.read(row_G)
        return Aux(dict(zip(self.columns, values_GK.split(2, dim=1))), visits_G, self.shared)

    def write(self, row_G: Tensor, aux: Aux | None) -> None:
        """Keep what the loss returned; every rank passes the same."""
        if aux is None:
            return
        self.shared = {**self.shared, **aux.shared}
        if self.table is not None and aux.rows:
            self.table.write(row_G, torch.cat([aux.rows[name] for name in self.columns], dim=1))

    def begin(self) -> None:
        """From here on, what is written can be taken back."""
        self._before = self.shared
        if self.table is not None:
            self.table.begin()

    def take_back(self) -> None:
        """Undo what was written since `begin`, to the bit."""
        self.shared = self._before
        if self.table is not None:
            self.table.take_back()

    def files(self) -> dict[str, dict[str, Tensor]]:
        """What this rank keeps, by the names of the files to save it in: the tensors themselves, no copies."""
        found = {} if self.table is None else self.table.files()
        return found | {SHARED_FILE: self.shared} if self.shared and distributed.rank() == 0 else found

    def save(self, folder: Path) -> None:
        """Write `files` to the folder; OSError where it fails."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in self.files().items():
            save_file({key: x.cpu().contiguous() for key, x in tensors.items()}, folder / name)

    def load(self, folder: Path) -> None:
        """Fill the state from `save` of any number of ranks; ValueError where it is of another loss, N or size."""
        if self.table is not None:
            self.table.load(folder)
        if not self.shared:
            return
        try:
            saved = load_file(folder / SHARED_FILE)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / SHARED_FILE} cannot be read: {error}") from None
        expected = {name: tuple(x.shape) for name, x in self.shared.items()}
        found = {name: tuple(x.shape) for name, x in saved.items()}
        if expected != found:
            raise ValueError(f"the loss remembers {expected}, the checkpoint holds {found}: other settings of the loss")
        self.shared = {name: x.to(self.shared[name].device) for name, x in saved.items()}
