"""Tensors by row number, kept in a folder: what was computed once is there for the next run.

    FOLDER/00000017-4d2e.safetensors    some rows, in any order: `rows` int64 [n] and `values` [n, ...], and the key:
                                        what they were computed from; a chunk of another key is removed

A chunk is written under a name of its own and renamed when it is whole, so an interrupted extraction goes on where it
stopped, and several ranks write side by side. A damaged chunk is removed and its rows are computed again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlcl.errors import UserError, reason
from vlcl.files import replacing_file


class RowStore:
    """`key`: what the values depend on, as strings; it names the folder below `cache` and is written in every chunk."""

    def __init__(self, cache: Path, name: str, key: dict[str, str]) -> None:
        self.folder, self.key = cache / name, {"key": json.dumps(key, sort_keys=True)}
        self.dropped: list[str] = []

    def save(self, rows: Sequence[int], values: Tensor) -> None:
        """One chunk: values[i] belongs to rows[i]."""
        target = self.folder / f"{rows[0]:08d}-{uuid4().hex[:8]}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing_file(target) as temporary:
                save_file({"rows": torch.tensor(rows), "values": values.contiguous()}, temporary, self.key)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the cache {self.folder} cannot be written: {reason(error)}; make room, then start again"
            ) from None

    def rows(self) -> dict[int, tuple[Path, int]]:
        """Where each stored row is: its chunk, and the place in it. Damaged chunks are removed, see `dropped`."""
        found: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as chunk:
                    if (chunk.metadata() or {}).get("key") != self.key["key"]:
                        raise SafetensorError("it was computed from another model or other images")
                    rows = chunk.get_tensor("rows").tolist()
            except (SafetensorError, OSError) as error:
                self.dropped.append(f"{path}: {error}; its rows are computed again")
                path.unlink(missing_ok=True)
                continue
            found |= {row: (path, place) for place, row in enumerate(rows)}
        return found

    def load(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), ...] in the order of `rows`. All must be stored."""
        found = self.rows()
        if missing := [row for row in rows if row not in found]:
            raise UserError(
                f"{self.folder} lacks {len(missing)} images that another rank should have put there: --cache must be a "
                "folder that all ranks see"
            )
        by_chunk: dict[Path, list[tuple[int, int]]] = {}
        for place, row in enumerate(rows):
            path, source = found[row]
            by_chunk.setdefault(path, []).append((place, source))
        out = torch.empty(0)
        for path, places in by_chunk.items():
            with safe_open(path, "pt") as chunk:
                values = chunk.get_tensor("values")
            if len(out) != len(rows):
                out = values.new_empty((len(rows), *values.shape[1:]))
            target, source = (torch.tensor(column) for column in zip(*places))
            out[target] = values[source]
        return out


def check_cache(cache: Path) -> None:
    """Before anything is computed: UserError where nothing could be kept."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise UserError(f"the cache {cache} cannot be written: {error}; choose another folder with --cache") from None
