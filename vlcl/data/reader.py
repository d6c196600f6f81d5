"""Sources of samples, and how one sample is read: the files of its shard -> picture and caption -> tensors."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlcl.data.captions import Captions, Choice, LongCaptions, captions_from
from vlcl.data.decode import (
    BACKGROUND,
    DEFAULT_KEYS,
    DEFAULT_LIMITS,
    BadSample,
    Keys,
    Limits,
    check_size,
    decode_image,
    image_bytes_from,
    open_image,
    to_rgb,
    wanted_files,
)
from vlcl.data.fast_crop import fast_crop
from vlcl.data.manifest import Source
from vlcl.data.preprocess import in_two_parts
from vlcl.data.remote import AS_DEFAULT, Fetching
from vlcl.data.shard import EVERYTHING, RawSample, ShardError, Wanted, read_samples
from vlcl.data.urls import without_secrets
from vlcl.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoder:
    """Raw sample -> (image tensor, token tensor). `preprocess`: PIL image -> tensor; `tokenize`: texts -> [n, L]."""

    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor]
    keys: Keys = DEFAULT_KEYS
    limits: Limits = DEFAULT_LIMITS
    background: str = BACKGROUND

    @cached_property
    def wanted(self) -> Wanted:
        """The files of a sample that are read."""
        return wanted_files(self.keys, self.limits)

    def raw(self, files: Mapping[str, bytes], decoded: bool = True) -> tuple[Image.Image, Captions]:
        """The picture (RGB, upright; or as `open_image` gives it) and its captions. Raises BadSample."""
        captions = captions_from(files, self.keys, self.limits)
        return picture_from(files, self.keys, self.limits, self.background, decoded), captions

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[T, L] tokens, and [T] whether a text was cut to have no more than L of them.

        With room for one token more, a text that was cut has another one in its last places. Tokenizers without a
        `context_length` (none of open_clip's) or with a reduction of their own (words left out) are taken to cut
        nothing.
        """
        tokens_TL = self.tokenize(texts)
        length, cut_T = tokens_TL.shape[1], torch.zeros(len(tokens_TL), dtype=torch.bool)
        if self.padding is None or length < 2:
            return tokens_TL, cut_T
        full = [n for n, before_last in enumerate(tokens_TL[:, -2].tolist()) if before_last != self.padding]
        if full:
            tokenize: Any = self.tokenize
            longer_FL = tokenize([texts[n] for n in full], context_length=length + 1)
            other = (longer_FL[:, :length] != tokens_TL[full]).any(dim=1)
            cut_T[full] = other | (longer_FL[:, length] != self.padding)
        return tokens_TL, cut_T

    @cached_property
    def padding(self) -> int | None:
        """The token that fills a row up; None where `tokenize` cannot tell what it cut."""
        length, reduction = (getattr(self.tokenize, name, None) for name in ("context_length", "reduction_fn"))
        return int(self.tokenize([""])[0, -1]) if length and reduction is None else None


def picture_from(
    files: Mapping[str, Any], keys: Keys, limits: Limits, background: str, decoded: bool = True
) -> Image.Image:
    """RGB, upright; or as `open_image` gives it. Raises BadSample."""
    image: Any = image_bytes_from(files, keys)
    if isinstance(image, Image.Image):  # decoded by one of the user's stages
        check_size(*image.size, limits)
        return to_rgb(image, background)
    return decode_image(image, limits, background) if decoded else open_image(image, limits)


def check_types(files: Mapping[str, Any], suffixes: frozenset[str]) -> None:
    """Raise UserError where a stage has left what cannot be read on."""
    for suffix in suffixes & files.keys():
        if not isinstance(files[suffix], bytes | Image.Image):
            raise UserError(
                f"data.stages gave on a {type(files[suffix]).__name__} as {suffix!r}: a file is its bytes, or "
                'text, or a PIL picture, as webdataset.decode("pil") gives it'
            )


@dataclass(frozen=True)
class Sources:
    """Several sources as one: shards end to end, rows counted through."""

    parts: tuple[Source, ...]
    fetching: Fetching = AS_DEFAULT

    @cached_property
    def urls(self) -> tuple[str, ...]:
        return tuple(url for part in self.parts for url in part.urls)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(shard.samples for part in self.parts for shard in part.manifest.shards)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return tuple(np.concatenate([[0], np.cumsum(self.counts)])[:-1].tolist())

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    @property
    def digest(self) -> str:
        """One hash of all manifests: rows mean the same pairs if and only if it is the same."""
        return hashlib.sha256("".join(part.manifest.digest for part in self.parts).encode()).hexdigest()


MISSING, UNREADABLE = "missing from shard", "unreadable shard"  # not of the sample: the next try may go better


def read_run(
    url: str, start: int, stop: int, wanted: Wanted = EVERYTHING, fetching: Fetching = AS_DEFAULT
) -> Iterator[tuple[int, RawSample | BadSample]]:
    """(position, sample) for exactly start .. stop; what cannot be read is a BadSample, and a shard that breaks off is
    warned of by name."""
    position, reason = start, MISSING
    try:
        for sample in islice(read_samples(url, start, wanted, fetching), stop - start):
            yield position, sample
            position += 1
    except (ShardError, OSError) as error:
        reason = UNREADABLE
        logger.warning("%s", error if isinstance(error, ShardError) else without_secrets(f"{url}: {error}"))
    for missing in range(position, stop):
        yield missing, BadSample(reason)


class Reader(Protocol):
    """Where the samples of a stream come from: shards (`ShardReader`), or what data.cache kept (`CacheReader`)."""

    random: bool
    """whether `prepare` may draw random numbers"""
    at_hand: bool
    """whether samples cost so little that worker processes would cost more"""

    def read(self, shard: int, start: int, stop: int) -> Iterator[tuple[int, Any | BadSample]]:
        """(position, sample) for exactly start .. stop."""
        ...

    def prepare(self, sample: Any, epoch: int, row: int) -> Any:
        """What each sample needs on its own. Raises BadSample."""
        ...

    def stack(self, prepared: Sequence[Any]) -> Stacked:
        """Of prepared samples, at least one."""
        ...

    def with_all_files(self) -> Reader:
        """One whose samples have all their files, for stages of the user's own. Raises UserError."""
        ...


class Stacked(NamedTuple):
    """Of a `Batch`, which says what they are."""

    images_BCHW: Tensor
    tokens_BL: Tensor
    count_B: Tensor | None
    truncated: int


class ShardReader:
    """Samples read from their tars, decoded each time. choice: of a caption; None: all of them, for evaluation. long:
    what is kept of the chosen one where it is too long; None: its start. fast: crop as vlcl/data/fast_crop.py does,
    where that can be. pixels: leave the pictures uint8, for a model that normalizes them."""

    random, at_hand = True, False

    def __init__(
        self, sources: Sources, decoder: Decoder, choice: Choice | None = None, long: LongCaptions | None = None,
        fast: bool = False, pixels: bool = False,
    ) -> None:  # fmt: skip
        self.urls, self.fetching, self.decoder, self.wanted = sources.urls, sources.fetching, decoder, decoder.wanted
        self.choice, self.long = choice, long
        self.parts, self.fast = in_two_parts(decoder.preprocess, pixels), None
        if fast:
            self.fast = fast_crop(decoder.preprocess, decoder.background)
        # A reduction leaves out words at random: of the sample's numbers, then, and not of the batch's.
        self.alone = getattr(decoder.tokenize, "reduction_fn", None) is not None or long is not None

    def with_all_files(self) -> ShardReader:
        whole = copy(self)
        whole.wanted = Wanted(None, self.decoder.limits.max_bytes)
        return whole

    def read(self, shard: int, start: int, stop: int) -> Iterator[tuple[int, RawSample | BadSample]]:
        return read_run(self.urls[shard], start, stop, self.wanted, self.fetching)

    def prepare(
        self, sample: RawSample, epoch: int, row: int
    ) -> tuple[Tensor, Sequence[str], tuple[Tensor, Tensor] | None]:
        """The picture, its captions, and the tokens of these where they must not wait for the batch."""
        if self.wanted != self.decoder.wanted:
            check_types(sample.files, self.decoder.keys.suffixes)
        image, captions = self.decoder.raw(sample.files, decoded=self.fast is None)
        texts = captions.texts
        if self.choice is not None:
            texts = (texts[self.choice(captions.counts, epoch, row)],)
        picture = self.fast(image) if self.fast else self.parts.picture(image)
        return picture, texts, self._tokens(texts, epoch, row) if self.alone else None

    def _tokens(self, texts: Sequence[str], epoch: int, row: int) -> tuple[Tensor, Tensor]:
        tokens_TL, cut_T = self.decoder.tokens(texts)
        if self.long is not None and cut_T.any():  # it still counts as truncated
            kept = self.long(texts[0], lambda text: bool(self.decoder.tokens([text])[1]), epoch, row)
            tokens_TL, _ = self.decoder.tokens([kept])
        return tokens_TL, cut_T

    def stack(self, prepared: Sequence[tuple[Tensor, Sequence[str], tuple[Tensor, Tensor] | None]]) -> Stacked:
        pictures, texts, tokens = zip(*prepared)
        count_B = None if self.choice is not None else torch.tensor([len(x) for x in texts])
        if self.alone:
            tokens_TL, cut_T = (torch.cat(x) for x in zip(*tokens))
        else:
            tokens_TL, cut_T = self.decoder.tokens(list(chain.from_iterable(texts)))
        return Stacked(self.parts.finish(torch.stack(pictures)), tokens_TL, count_B, int(cut_T.sum()))


def captioned_at(sources: Sources, rows: Sequence[int], decoder: Decoder) -> list[tuple[Image.Image, tuple[str, ...]]]:
    """Picture and captions of some rows, for showing: seeks to each. Raises BadSample."""
    found = []
    for row in rows:
        shard = int(np.searchsorted(sources.offsets, row, side="right")) - 1
        place = row - sources.offsets[shard]
        ((_, sample),) = read_run(sources.urls[shard], place, place + 1, decoder.wanted, sources.fetching)
        if isinstance(sample, BadSample):
            raise sample
        image, captions = decoder.raw(sample.files)
        found.append((image, captions.texts))
    return found


def samples_at(sources: Sources, rows: Sequence[int], decoder: Decoder) -> list[tuple[Image.Image, str]]:
    """Picture and first caption of some rows. Raises BadSample."""
    return [(image, texts[0]) for image, texts in captioned_at(sources, rows, decoder)]
