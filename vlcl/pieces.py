"""Tensors in files, whole or in pieces, of which each rank has written its own and any number of ranks reads what it
needs:

    STEP/model.safetensors                                    whole
    STEP/model/00000-of-00002.safetensors, 00001-of-...       rows of each tensor; the headers say which, of how many

A folder below STEP, since open_clip takes any file of weights beside its config for all of them.

Why no torch.distributed.checkpoint: its own files have a pickle, which can run code. Its writer of safetensors
(HuggingFaceStorageWriter) makes each file in memory before it is written, keeps no full shapes (without its last piece
a tensor would be a smaller one), takes tensors alone, and its background saves meet the other ranks, where a kill of
one leaves the others waiting. The headers here are those of its files: its reader, and its consolidation, read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INFO, OFFSETS, SHAPE = "DCP_SHARDING_INFO", "saved_offsets", "full_shape"  # the last one is ours


@dataclass(frozen=True)
class Piece:
    """rows: [n, ...], those from `start` on of a tensor of `shape`; all of it where it has no dimension."""

    rows: Tensor
    start: int
    shape: tuple[int, ...]


def file_name(number: int, count: int) -> str:
    return f"{number:05d}-of-{count:05d}.safetensors"


def folder_of(name: str) -> str:
    """Where the pieces of a file are: `model` for model.safetensors."""
    return name.partition(".")[0]


def stored(folder: Path, name: str) -> Path:
    """The file `name` of a checkpoint or, where it has pieces instead, their folder. It need not exist."""
    pieces = folder / folder_of(name)
    return pieces if not (folder / name).is_file() and any(pieces.glob("*-of-*.safetensors")) else folder / name


def save_pieces(pieces: Mapping[str, Piece], path: Path) -> None:
    """Write one file, this rank's; OSError or SafetensorError where it fails."""
    info = {
        name: {OFFSETS: [x.start, *[0] * (len(x.shape) - 1)] if x.shape else [], SHAPE: list(x.shape)}
        for name, x in pieces.items()
    }
    # One entry, sorted: safetensors writes several in any order, and the same state is to be the same bytes.
    save_file({name: x.rows for name, x in pieces.items()}, path, {INFO: json.dumps(info, sort_keys=True)})


@dataclass(frozen=True)
class Stored:
    """A tensor of `shape` in files: `stored[a:b]` reads these rows alone, into memory of their own."""

    name: str
    shape: torch.Size
    parts: tuple[tuple[Any, range], ...]  # open files, and the rows that each has, in order

    def __getitem__(self, rows: slice) -> Tensor:
        wanted = range(*rows.indices(self.shape[0]))
        found = [self.parts[0][0].get_tensor(self.name)[:0]]
        for file, there in self.parts:
            start, stop = max(there.start, wanted.start), min(there.stop, wanted.stop)
            if start < stop:
                found.append(file.get_slice(self.name)[start - there.start : stop - there.start])
        return torch.cat(found)

    def whole(self) -> Tensor:
        """All of it; what one file has alone is a view of the file."""
        return self[:] if len(self.parts) > 1 else self.parts[0][0].get_tensor(self.name)


@contextmanager
def opened(path: Path) -> Iterator[dict[str, Stored]]:
    """The tensors of a file, or of a folder of pieces, by name. SafetensorError or OSError, with the file, where one is
    damaged or missing."""
    if not path.is_dir():
        with safe_open(path, framework="pt") as file:
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            yield {name: Stored(name, shape, ((file, _rows(shape)),)) for name, shape in shapes.items()}
        return
    with ExitStack() as stack:
        parts: dict[str, list[tuple[Any, range]]] = {}
        shapes = {}
        for place in sorted(path.glob("*.safetensors")):
            try:
                file = stack.enter_context(safe_open(place, framework="pt"))
            except SafetensorError as error:
                raise SafetensorError(f"{place}: {error}") from None
            for name, shape, rows in _described(place, file):
                if shapes.setdefault(name, shape) != shape:
                    raise SafetensorError(f"{place}: {name} is {[*shape]} here, {[*shapes[name]]} in other files")
                parts.setdefault(name, []).append((file, rows))
        for name, shape in shapes.items():
            _check_rows(path, name, [rows for _, rows in parts[name]], _rows(shape))
        yield {name: Stored(name, shape, tuple(parts[name])) for name, shape in shapes.items()}


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder of pieces, whole. Raises what `opened` does."""
    with opened(path) as tensors:
        return {name: x.whole() for name, x in tensors.items()}


def _rows(shape: torch.Size) -> range:
    return range(shape[0] if shape else 1)


def _described(path: Path, file: Any) -> list[tuple[str, torch.Size, range]]:
    """Name, full shape and rows of each piece in a file. SafetensorError where the header does not fit what follows."""
    found = []
    try:
        info = json.loads(file.metadata()[INFO])
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            here, shape = file.get_slice(name).get_shape(), torch.Size(info[name][SHAPE])
            start, *others = info[name][OFFSETS] or [0]
            if any(others) or len(here) != len(shape) or list(here[1:]) != list(shape[1:]):
                raise ValueError(f"{name} is no part of its rows")
            found.append((name, shape, range(start, start + (here[0] if here else 1))))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise SafetensorError(f"{path} is no piece of a checkpoint ({type(error).__name__}: {error})") from None
    return found


def _check_rows(path: Path, name: str, parts: list[range], whole: range) -> None:
    """SafetensorError unless the parts, in the order of their files, are the rows of `name`."""
    end = 0
    for rows in [*parts, range(len(whole), len(whole))]:
        if rows.start > end:
            raise SafetensorError(f"{path} lacks rows {end} .. {rows.start - 1} of {name}: a file of it is missing")
        if rows.start < end:
            raise SafetensorError(f"{path} has rows {rows.start} .. {end - 1} of {name} twice: of two checkpoints")
        end = rows.stop
