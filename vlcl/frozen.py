"""A locked image tower computed once: what it gives for pictures that are always the same is kept in their place.

LiT (Zhai et al., 2022) trains a text tower against an image tower that does not change. Without augmentation the
pictures do not change either: then a step needs no pass through that tower, which is most of its cost.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from vlcl import distributed
from vlcl.config import Config
from vlcl.data.cache import CacheReader
from vlcl.data.reader import Reader
from vlcl.data.room import Room, size_in_words
from vlcl.errors import UserError, first_line
from vlcl.files import replacing_file
from vlcl.model import Built, DualEncoder

VERSION = 1  # of the files


def why_not(config: Config, encoder: DualEncoder, sharded: bool) -> str | None:
    """What is in the way of keeping the outputs of a locked image tower; None where nothing is. For settings that do
    not ask for it (nothing locked, nothing cached), ""."""
    model, data = config.model, config.data
    if model.kind != "clip" or not model.lock_image or data.cache is None:
        return ""
    for is_so, reason in (
        (data.augment != "none", f"data.augment={data.augment} makes other pictures each time"),
        (bool(model.patch_dropout), f"model.patch_dropout={model.patch_dropout} leaves out others each time"),
        (sharded, "the towers are in pieces over the ranks (FSDP)"),
        (not encoder.image_is_frozen, "a part of that tower trains"),
    ):
        if is_so:
            return reason
    return None


def keep_features(
    config: Config, readers: Mapping[str, Reader], built: Built, device: torch.device, ranks: int,
    autocast: Callable[..., AbstractContextManager[object]], say: Callable[[str], None],
) -> dict[str, Reader]:  # fmt: skip
    """`readers` (of what data.cache keeps) with the frozen features in place of pictures (a collective). built: with
    the weights of this run, on `device`. ranks: of this machine, each of which keeps as much in its memory. Raises
    UserError where there is no room."""
    found: dict[str, Reader] = {}

    def keep() -> None:
        for split, reader in readers.items():
            assert isinstance(reader, CacheReader), "a cache is what why_not asks for"
            features_NF = _Features(built, reader, config, device, autocast).kept(f"data.{split}", ranks, say)
            if features_NF is None:
                say(f"note: data.{split}: pictures are kept: what is frozen of the image tower gives no vectors")
            found[split] = reader if features_NF is None else reader.with_features(features_NF)

    encoder, training = built.encoder, built.encoder.training
    encoder.eval()
    distributed.together(keep)
    encoder.train(training)
    return found


class _Features:
    """Of all rows of a reader."""

    def __init__(
        self, built: Built, reader: CacheReader, config: Config, device: torch.device,
        autocast: Callable[..., AbstractContextManager[object]],
    ) -> None:  # fmt: skip
        self.encoder, self.reader, self.device, self.autocast = built.encoder, reader, device, autocast
        self.batch = config.eval.batch_size
        model = {key: x for key, x in built.config["model_cfg"].items() if key != "text_cfg"}
        self.about = [VERSION, torch.__version__, device.type, config.train.precision, model]

    def kept(self, key: str, ranks: int, say: Callable[[str], None]) -> Tensor | None:
        """[N, F] in float32, from memory or mapped from a file beside the cache's own, which is made where it is not
        there yet. None where no picture is good, or the tower's frozen part gives no vectors."""
        rows, folder = len(self.reader.reason_N), self.reader.cache.folder
        first = next((row for row, bad in enumerate(self.reader.reason_N) if not bad), None)
        if first is None or (features_1F := self._of([first])) is None:
            return None
        width = features_1F.shape[1]
        need, started = 4 * rows * width, time.monotonic()
        what = f"{key}: features of the locked image tower, {rows:,} x {width}, {size_in_words(need)}"
        if folder is None:
            Room.in_memory(key, ranks).check(need, rows, rows)
            features_NF = torch.cat(list(self._batches(width)))
            if distributed.rank() == 0:
                say(f"{what}, kept in memory, in {time.monotonic() - started:.1f} s")
            return features_NF
        file = folder / f"features-{self._name()}.npy"
        if not file.exists():  # it appears as a whole: no need of the lock, which a read-only folder would not give
            try:
                with FileLock(folder / f".{file.name}.lock"):
                    if not file.exists():
                        Room.on_disk(key, folder).check(need, rows, rows)
                        self._write(file, rows, width)
                        say(f"{what}, kept in {file}, in {time.monotonic() - started:.1f} s")
            except OSError as error:
                raise UserError(f"{file} cannot be written: {error}. Make room, or set data.cache=memory") from None
        return _mapped(file, rows, width)

    def _write(self, file: Path, rows: int, width: int) -> None:
        with replacing_file(file) as building:
            kept = np.lib.format.open_memmap(building, "w+", np.float32, (rows, width))
            start = 0
            for part_BF in self._batches(width):
                kept[start : start + len(part_BF)] = part_BF.numpy()
                start += len(part_BF)
            kept.flush()

    def _batches(self, width: int) -> Iterator[Tensor]:
        """[B, F] on the CPU, in the order of rows; zeros for bad samples, which no batch of training has."""
        for start in range(0, len(self.reader.reason_N), self.batch):
            bad_B = self.reader.reason_N[start : start + self.batch]
            part_BF = torch.zeros(len(bad_B), width)
            good = [place for place, bad in enumerate(bad_B) if not bad]
            features = self._of([start + place for place in good]) if good else None
            if features is not None:
                part_BF[good] = features
            yield part_BF

    @torch.no_grad()
    def _of(self, rows: list[int]) -> Tensor | None:
        """[B, F] of good rows, on the CPU."""
        with self.autocast():
            features_BF = self.encoder.frozen_image(self.reader.pictures(rows).to(self.device))
        return None if features_BF is None else features_BF.float().cpu()

    def _name(self) -> str:
        """By all that the features depend on; the folder's name tells of the pictures. Weights alone would not do:
        those of an architecture with GELU fit the one with QuickGELU."""
        seen = hashlib.sha256(json.dumps(self.about, sort_keys=True, default=str).encode())
        for name, x in self.encoder.frozen_weights():
            seen.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
            seen.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return seen.hexdigest()[:16]


def _mapped(file: Path, rows: int, width: int) -> Tensor:
    try:
        features_NF = np.load(file, mmap_mode="c", allow_pickle=False)
        if features_NF.shape == (rows, width) and features_NF.dtype == np.float32:
            return torch.from_numpy(features_NF)
        problem = f"it has {features_NF.dtype} {features_NF.shape}"
    except (OSError, ValueError, EOFError) as error:
        problem = first_line(error)
    raise UserError(f"{file} is damaged ({problem}). It is made anew where it is not there: rm {file}")
