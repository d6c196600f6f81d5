"""`data.cache`: all samples of some sources, decoded once, so that later epochs read no tar and decode no picture.

What is kept is the picture as it was decoded, where training crops it anew each time, or the preprocessed one, where
that is always the same; and the tokens of all its captions. Rows, their order, and what is wrong with a sample stay as
they are without a cache: the bad ones are remembered with their reason. In memory, or in a folder that runs share:
uint8 in flat files, mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from vlcl.data.archive import local_path
from vlcl.data.captions import Choice
from vlcl.data.decode import BadSample
from vlcl.data.fast_crop import fast_crop
from vlcl.data.preprocess import TwoParts, in_two_parts
from vlcl.data.reader import MISSING, UNREADABLE, Decoder, Sources, Stacked, read_run
from vlcl.data.room import MEMORY, Room, size_in_words
from vlcl.data.urls import lasting
from vlcl.errors import UserError
from vlcl.files import replacing

VERSION = 2  # of the files
META, PIXELS, ARRAYS = "cache.json", "pixels.bin", ("size_N2", "tokens_TL", "cut_T", "count_NP", "reason_N")


@dataclass(frozen=True)
class Cache:
    """Decoded samples by row. uint8 pictures lie end to end in `pixels`, in row order: [height, width, 3] as decoded,
    [3, height, width] where `finished` (cropped and resized, not normalized); size_N2 is (height, width), 0 for a bad
    sample. tokens_TL: of all captions, in row order; cut_T: whether one was cut; count_NP: how many each row has in
    each of P places (Captions of vlcl/data/captions.py). reason_N: 0 for a good one, else k for reasons[k - 1]. folder:
    where it is mapped from, if not in memory.
    """

    pixels: Tensor
    size_N2: Tensor
    tokens_TL: Tensor
    cut_T: Tensor
    count_NP: Tensor
    reason_N: Tensor
    reasons: tuple[str, ...]
    finished: bool
    folder: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # to workers that are no forks: the name of the files, not the pixels
        fields = (self.pixels, *self.arrays, self.reasons, self.finished)
        return (Cache, fields) if self.folder is None else (read_cache, (self.folder,))

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """Those of ARRAYS."""
        return self.size_N2, self.tokens_TL, self.cut_T, self.count_NP, self.reason_N

    @cached_property
    def start_N(self) -> np.ndarray:
        """Where in `pixels` each row's picture starts."""
        ends = (3 * self.size_N2.long().prod(dim=1)).cumsum(0)
        return np.concatenate([[0], ends.numpy()])

    @cached_property
    def first_N(self) -> np.ndarray:
        """Where in `tokens_TL` each row's captions start."""
        return np.concatenate([[0], self.count_NP.sum(dim=1).cumsum(0).numpy()])

    @cached_property
    def picture_bytes(self) -> int:
        """Of each picture, where all are `finished`."""
        return int(3 * self.size_N2.long().prod(dim=1).max())

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.pixels, *self.arrays))

    def image(self, row: int) -> Image.Image:
        """The RGB picture of a row, where they are not `finished`."""
        height, width = self.size_N2[row].tolist()
        start, stop = self.start_N[row : row + 2].tolist()
        return Image.fromarray(self.pixels[start:stop].view(height, width, 3).numpy())


class CacheReader:
    """The samples of a `Cache` for a stream (see `vlcl.data.reader.Reader`): a sample is its row. choice, fast, pixels:
    as of `ShardReader`."""

    def __init__(
        self, cache: Cache, sources: Sources, preprocess: Callable[[Image.Image], Tensor],
        choice: Choice | None = None, fast: bool = False, pixels: bool = False,
    ) -> None:  # fmt: skip
        self.cache, self.offsets, self.parts = cache, sources.offsets, in_two_parts(preprocess, pixels)
        self.picture = (fast_crop(preprocess) if fast else None) or self.parts.picture
        self.choice, self.first_N, self.count_NP = choice, cache.first_N, cache.count_NP.numpy()
        self.reason_N = cache.reason_N.numpy().tobytes()  # numbers by row, at a list's speed
        self.features_NF: Tensor | None = None
        self.random, self.at_hand = not cache.finished, cache.finished

    def with_features(self, features_NF: Tensor) -> CacheReader:
        """One that gives these, [N, F] by row, in place of pictures (vlcl/frozen.py), which leave the memory."""
        found = copy(self)
        if self.cache.folder is None:
            found.cache = replace(self.cache, pixels=torch.empty(0, dtype=torch.uint8))
        found.features_NF = features_NF
        return found

    def pictures(self, rows: Sequence[int]) -> Tensor:
        """[B, 3, H, W] of good rows, where all are `finished`, as batches have them."""
        return self.parts.finish(self._pixels(rows, ()))

    def with_all_files(self) -> CacheReader:
        raise UserError("data.stages need data.cache=null: a cache keeps no files that they could work on")

    def read(self, shard: int, start: int, stop: int) -> Iterator[tuple[int, int | BadSample]]:
        offset, reasons = self.offsets[shard], self.cache.reasons
        for position in range(start, stop):
            reason = self.reason_N[offset + position]
            yield position, BadSample(reasons[reason - 1]) if reason else offset + position

    def prepare(self, sample: int, epoch: int, row: int) -> tuple[int, Tensor | None, range]:
        """The row, its picture, and the places of its captions."""
        start, stop = self.first_N[sample : sample + 2].tolist()
        if self.choice is not None:
            start += self.choice(self.count_NP[sample].tolist(), epoch, row) if stop - start > 1 else 0
            stop = start + 1
        return sample, None if self.cache.finished else self.picture(self.cache.image(sample)), range(start, stop)

    def stack(self, prepared: Sequence[tuple[int, Tensor | None, range]]) -> Stacked:
        rows, pictures, places = zip(*prepared)
        place_T = torch.tensor(list(chain.from_iterable(places)))
        tokens_TL, truncated = self.cache.tokens_TL[place_T].long(), int(self.cache.cut_T[place_T].sum())
        count_B = None if self.choice is not None else torch.tensor(list(map(len, places)))
        if self.features_NF is not None:
            return Stacked(self.features_NF[list(rows)], tokens_TL, count_B, truncated)
        return Stacked(self.parts.finish(self._pixels(rows, pictures)), tokens_TL, count_B, truncated)

    def _pixels(self, rows: Sequence[int], pictures: Sequence[Tensor]) -> Tensor:
        cache = self.cache
        if not cache.finished:
            return torch.stack(list(pictures))
        height, width = cache.size_N2[rows[0]].tolist()
        places = torch.from_numpy(cache.start_N[list(rows)] // cache.picture_bytes)
        return cache.pixels.view(-1, 3, height, width)[places]


def open_cache(
    place: str, sources: Sources, decoder: Decoder, *, finished: bool, about: Mapping[str, Any], key: str,
    ranks: int = 1, say: Callable[[str], None] = print,
) -> Cache:  # fmt: skip
    """The cache of all samples, read and decoded now where it is not there yet.

    place: "memory" or a folder; several processes may ask for the same one at once, the first of them makes it.
    finished: keep what `decoder.preprocess` makes of a picture, and not the picture. about: all else that the kept
    values depend on (tokenizer, preprocessing). key: the setting that names the samples, ranks: processes of this
    machine that keep as much. Raises UserError where there is no room.
    """
    parts = in_two_parts(decoder.preprocess) if finished else None
    if place != MEMORY:
        return _in_folder(Path(place), sources, decoder, parts, dict(about), key, say)
    started, pixels = time.monotonic(), bytearray()
    kept = _decode(sources, decoder, parts, pixels.extend, Room.in_memory(key, ranks))
    cache = Cache(torch.frombuffer(pixels or bytearray(1), dtype=torch.uint8)[: len(pixels)], *kept, finished)
    say(f"{key}: {sources.num_samples:,} pairs kept in memory, {_told(cache, started)}")
    return cache


_NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, EOFError)  # of a cache that is damaged, or not there


def _decode(
    sources: Sources, decoder: Decoder, parts: TwoParts | None, write: Callable[[bytes], Any], room: Room
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Give all pictures to `write`, in row order. Returns the ARRAYS and the reasons."""
    total, taken, row = sources.num_samples, 0, 0
    size_N2, reason_N = torch.zeros(total, 2, dtype=torch.int32), torch.zeros(total, dtype=torch.uint8)
    count_NP = torch.zeros(total, len(decoder.keys.places), dtype=torch.int32)
    tokens, cut, length, reasons = bytearray(), bytearray(), 1, {}
    for url, count in zip(sources.urls, sources.counts):
        for _, sample in read_run(url, 0, count, decoder.wanted, sources.fetching):
            try:
                if isinstance(sample, BadSample):
                    raise sample
                image, captions = decoder.raw(sample.files)
                pixels = np.asarray(image) if parts is None else parts.picture(image).numpy()
                assert pixels.dtype == np.uint8, "preprocessing that does not end in ToTensor, Normalize"
                tokens_TL, cut_T = decoder.tokens(list(captions.texts))
                length = tokens_TL.shape[1]
                tokens += tokens_TL.to(torch.int32).numpy().tobytes()
                cut += cut_T.numpy().tobytes()
                count_NP[row] = torch.tensor(captions.counts)
                size_N2[row] = torch.tensor(pixels.shape[:2] if parts is None else pixels.shape[1:])
                write(pixels.tobytes())
                taken += pixels.nbytes
            except BadSample as bad:
                reason_N[row] = reasons.setdefault(bad.reason, len(reasons) + 1)
            row += 1
            room.check(taken + len(tokens), row, total)
    tokens_TL = torch.frombuffer(tokens or bytearray(4), dtype=torch.int32)[: len(tokens) // 4].view(-1, length)
    cut_T = torch.frombuffer(cut or bytearray(1), dtype=torch.bool)[: len(cut)]
    return size_N2, tokens_TL, cut_T, count_NP, reason_N, tuple(reasons)


def _in_folder(
    place: Path, sources: Sources, decoder: Decoder, parts: TwoParts | None, about: dict[str, Any], key: str,
    say: Callable[[str], None],
) -> Cache:  # fmt: skip
    facts = _facts(sources, decoder, parts is not None, about)
    folder = place / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    with suppress(*_NOT_WHOLE):  # it appears as a whole: no need of the lock, which a read-only folder would not give
        return read_cache(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f".{folder.name}.lock"):  # freed by the system where its holder is killed
            try:
                return read_cache(folder)
            except _NOT_WHOLE as error:
                why = f"{folder} is damaged ({error})" if folder.exists() else "these samples are not kept yet"
            say(f"{key}: {why}; decoding {sources.num_samples:,} pairs into {folder} ...")
            started = time.monotonic()
            with replacing([folder], check=lambda target: None) as (building,):
                _write(building, sources, decoder, parts, Room.on_disk(key, place), facts)
            cache = read_cache(folder)
    except OSError as error:
        raise UserError(f"data.cache={place}: {error}. Take another folder, or data.cache=memory") from None
    say(f"{key}: kept, {_told(cache, started)}")
    return cache


def _write(
    folder: Path, sources: Sources, decoder: Decoder, parts: TwoParts | None, room: Room, facts: dict[str, Any]
) -> None:
    with open(folder / PIXELS, "wb") as file:
        *arrays, reasons = _decode(sources, decoder, parts, file.write, room)
        written = file.tell()
    if passing := {MISSING, UNREADABLE} & set(reasons):  # kept, it would be believed for good
        raise UserError(
            f"data.cache={folder.parent}: {room.key} has samples that could not be read "
            f"({', '.join(sorted(passing))}), so that nothing is kept. `vlcl data verify SHARDS` names them; try "
            "again, or take data.cache=null, which leaves them out"
        )
    for name, x in zip(ARRAYS, arrays):
        np.save(folder / f"{name}.npy", x.numpy(), allow_pickle=False)
    meta = {"version": VERSION, "bytes": written, "reasons": reasons, "finished": parts is not None, "facts": facts}
    (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def read_cache(folder: Path) -> Cache:
    """Map a cache that `open_cache` has written. Raises one of _NOT_WHOLE where it is not whole."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    if (size := (folder / PIXELS).stat().st_size) != meta["bytes"]:
        raise ValueError(f"{PIXELS} has {size:,} bytes, not {meta['bytes']:,}")
    size_N2, tokens_TL, cut_T, count_NP, reason_N = (
        torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False)) for name in ARRAYS
    )
    captions = int(count_NP.sum())
    if not (len(size_N2) == len(count_NP) == len(reason_N) and len(tokens_TL) == len(cut_T) == captions):
        raise ValueError(f"{' and '.join(ARRAYS)} do not belong together")
    if (size := 3 * int(size_N2.long().prod(dim=1).sum())) != meta["bytes"]:
        raise ValueError(f"the pictures take {size:,} bytes, {PIXELS} has {meta['bytes']:,}")
    # "c": pages are shared with all who map the file; nobody writes, but torch wants to be allowed to
    mapped = np.memmap(folder / PIXELS, np.uint8, "c") if meta["bytes"] else np.zeros(0, np.uint8)
    pixels, reasons = torch.from_numpy(mapped), tuple(meta["reasons"])
    return Cache(pixels, size_N2, tokens_TL, cut_T, count_NP, reason_N, reasons, meta["finished"], folder)


def _facts(sources: Sources, decoder: Decoder, finished: bool, about: dict[str, Any]) -> dict[str, Any]:
    """All that the kept values depend on. Of local shards the time of their last change as well: other contents may
    have the same names and sizes, which is all that a manifest knows."""
    files = []
    for url in sources.urls:
        path = local_path(url)
        stat = Path(path).stat() if path else None
        files.append(
            [lasting(url)] if stat is None else [str(Path(path or "").resolve()), stat.st_size, stat.st_mtime_ns]
        )
    return {
        "version": VERSION, "rows": sources.digest, "files": files, "keys": asdict(decoder.keys),
        "limits": asdict(decoder.limits), "background": decoder.background,
        "finished": finished, "pillow": PIL.__version__, "about": about,
    }  # fmt: skip


def _told(cache: Cache, started: float) -> str:
    bad = int((cache.reason_N > 0).sum())
    what = "preprocessed" if cache.finished else "decoded"
    size, seconds = size_in_words(cache.bytes), time.monotonic() - started
    return f"{what}, {size}, in {seconds:.1f} s" + (f"; {bad:,} bad" if bad else "")
