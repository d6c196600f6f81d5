"""Pictures alone: two random views of each for training, or a picture with its label for evaluation.

A view is a function of (seed, epoch, row, view), whoever makes it and when. torchvision's v2 transforms, in MoCo-v3's
order: crop, jitter, grey, blur, solarize, mirror.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from vlcl.data.decode import BadSample, Keys, Limits, content_of, wanted_files
from vlcl.data.preprocess import ToPixels, in_two_parts, seed_generators
from vlcl.data.reader import Sources, Stacked, check_types, picture_from, read_run
from vlcl.data.shard import RawSample, Wanted

LABEL = "cls"
NO_LABEL, NOT_A_LABEL = "no label", "label is no whole number"
LARGE_SIDE = 224  # pixels: what standard deviations of the blur are told for
SOLARIZE_FROM = 128


@dataclass(frozen=True)
class ViewAugmentation:
    """What is done to a picture for a view; pairs of numbers are of view one and of view two. docs/config.md has the
    units."""

    crop_scale: Sequence[float] = (0.08, 1.0)
    flip_prob: float = 0.5
    color_jitter: Sequence[float] | None = (0.4, 0.4, 0.2, 0.1)
    color_jitter_prob: float = 0.8
    gray_scale_prob: float = 0.2
    blur_prob: Sequence[float] = (1.0, 0.1)
    blur_sigma: Sequence[float] = (0.1, 2.0)
    solarize_prob: Sequence[float] = (0.0, 0.2)

    def of_view(self, view: int, side: int, interpolation: str) -> Callable[[Image.Image], Tensor]:
        """RGB picture -> uint8 [3, side, side]. What would change nothing is left out, and draws no numbers."""
        resized = InterpolationMode(interpolation)
        scale = self.crop_scale[0], self.crop_scale[1]
        steps: list[Any] = [v2.RandomResizedCrop(side, scale, interpolation=resized)]
        if self.color_jitter is not None and self.color_jitter_prob:
            steps.append(v2.RandomApply([v2.ColorJitter(*self.color_jitter)], self.color_jitter_prob))
        if self.gray_scale_prob:
            steps.append(v2.RandomGrayscale(self.gray_scale_prob))
        if self.blur_prob[view]:
            shrink = min(side / LARGE_SIDE, 1.0)
            least, most = (sigma * shrink for sigma in self.blur_sigma)
            reach = max(min(math.ceil(3 * most), side - 1), 1)
            steps.append(v2.RandomApply([v2.GaussianBlur(2 * reach + 1, (least, most))], self.blur_prob[view]))
        if self.solarize_prob[view]:
            steps.append(v2.RandomSolarize(SOLARIZE_FROM, self.solarize_prob[view]))
        if self.flip_prob:
            steps.append(v2.RandomHorizontalFlip(self.flip_prob))
        return ToPixels(steps)


@dataclass(frozen=True)
class PictureDecoder:
    """Where pictures are in a sample, and what they may ask for."""

    keys: Keys
    limits: Limits
    background: str

    def image(self, files: Mapping[str, bytes]) -> Image.Image:
        """RGB, upright. Raises BadSample."""
        return picture_from(files, self.keys, self.limits, self.background)

    def label(self, files: Mapping[str, bytes]) -> int:
        """The number in the sample's .cls file. Raises BadSample."""
        if LABEL not in files:
            raise BadSample(NO_LABEL, f"has no .{LABEL}")
        text = content_of(files, LABEL).strip()
        if not text.isdigit() or len(text) > 9:
            raise BadSample(NOT_A_LABEL, repr(text[:20]))
        return int(text)


class _PictureReader:
    random, at_hand = True, False

    def __init__(self, sources: Sources, decoder: PictureDecoder, more: str = "") -> None:
        """more: a suffix that is read besides the picture's."""
        self.urls, self.fetching, self.decoder = sources.urls, sources.fetching, decoder
        self.keys = replace(decoder.keys, text=more or decoder.keys.image, json_text=None)
        self.wanted = wanted_files(self.keys, decoder.limits)

    def with_all_files(self) -> Self:
        whole = copy(self)
        whole.wanted = Wanted(None, self.decoder.limits.max_bytes)
        return whole

    def read(self, shard: int, start: int, stop: int) -> Iterator[tuple[int, RawSample | BadSample]]:
        return read_run(self.urls[shard], start, stop, self.wanted, self.fetching)


class ViewReader(_PictureReader):
    """Two views a picture, uint8 [B, 3, H, W] each, which the model normalizes; a batch has view one as images, view
    two in the place of tokens."""

    def __init__(
        self, sources: Sources, decoder: PictureDecoder, views: Sequence[Callable[[Image.Image], Tensor]], seed: int
    ) -> None:
        super().__init__(sources, decoder)
        self.views, self.seed = tuple(views), seed

    def prepare(self, sample: RawSample, epoch: int, row: int) -> list[Tensor]:
        check_types(sample.files, self.keys.suffixes)
        image, found = self.decoder.image(sample.files), []
        for number, view in enumerate(self.views):
            seed_generators(self.seed, epoch, row, number)
            found.append(view(image))
        return found

    def stack(self, prepared: Sequence[list[Tensor]]) -> Stacked:
        one, two = (torch.stack(pictures) for pictures in zip(*prepared))
        return Stacked(one, two, None, 0)


class LabelledReader(_PictureReader):
    """Pictures as evaluation sees them; a batch has labels [B] in the place of tokens. preprocess: as of a model; seed:
    that of its random part, which then depends on (seed, row). pixels: leave the pictures uint8, for a model that
    normalizes them."""

    random = False

    def __init__(
        self,
        sources: Sources,
        decoder: PictureDecoder,
        preprocess: Callable[[Image.Image], Tensor],
        seed: int | None = None,
        pixels: bool = False,
    ) -> None:
        super().__init__(sources, decoder, LABEL)
        self.parts, self.seed = in_two_parts(preprocess, pixels), seed

    def prepare(self, sample: RawSample, epoch: int, row: int) -> tuple[Tensor, int]:
        if self.seed is not None:
            seed_generators(self.seed, row)
        return self.parts.picture(self.decoder.image(sample.files)), self.decoder.label(sample.files)

    def stack(self, prepared: Sequence[tuple[Tensor, int]]) -> Stacked:
        pictures, labels = zip(*prepared)
        return Stacked(self.parts.finish(torch.stack(pictures)), torch.tensor(labels), None, 0)


def make_view_reader(
    sources: Sources, decoder: PictureDecoder, how: ViewAugmentation, side: int, interpolation: str, seed: int
) -> ViewReader:
    return ViewReader(sources, decoder, [how.of_view(view, side, interpolation) for view in (0, 1)], seed)
