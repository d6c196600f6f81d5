"""From a decoded picture to the numbers that a model sees, in two parts: what each picture needs, and arithmetic that a
batch takes at once. And the random part of training: what is done to a picture, and its seeds.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    ColorJitter,
    Compose,
    GaussianBlur,
    Normalize,
    RandAugment,
    RandomApply,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)

Transform = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Augmentation:
    """What training does to a picture, in this order; docs/config.md has the units. The defaults are open_clip's."""

    crop_scale: Sequence[float] = (0.9, 1.0)
    crop_ratio: Sequence[float] | None = None
    flip_prob: float = 0.0
    rand_augment: Sequence[int] | None = None
    color_jitter: Sequence[float] | None = None
    color_jitter_prob: float = 1.0
    gray_scale_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: Sequence[float] = (0.1, 2.0)

    def steps(self, side: int) -> list[Transform]:
        """What follows the crop, by torchvision; a step that would change nothing is none, and draws no numbers. side:
        the shorter of the cropped picture, in pixels."""
        found: list[Transform] = []
        if self.flip_prob:
            found.append(RandomHorizontalFlip(self.flip_prob))
        if self.rand_augment is not None:
            operations, strength = self.rand_augment
            found.append(RandAugment(operations, strength))
        if self.color_jitter is not None and self.color_jitter_prob:
            found.append(RandomApply([ColorJitter(*self.color_jitter)], self.color_jitter_prob))
        if self.gray_scale_prob:
            found.append(RandomGrayscale(self.gray_scale_prob))
        if self.blur_prob:  # the window holds three standard deviations, or what a mirrored border can fill
            reach = min(math.ceil(3 * self.blur_sigma[1]), side - 1)
            blur = GaussianBlur(2 * reach + 1, (self.blur_sigma[0], self.blur_sigma[1]))
            found.append(RandomApply([blur], self.blur_prob))
        return found


def augmented(preprocess: Callable[[Image.Image], Tensor], how: Augmentation) -> Callable[[Image.Image], Tensor]:
    """open_clip's preprocessing of training, a random crop first and then, last, ToTensor and Normalize, with another
    crop and with more between. `preprocess` itself where that is what it does."""
    if how == Augmentation():
        return preprocess
    assert isinstance(preprocess, Compose)
    crop, *between, to_tensor, normalize = preprocess.transforms
    assert isinstance(crop, RandomResizedCrop)
    ratio = crop.ratio if how.crop_ratio is None else how.crop_ratio
    crop = RandomResizedCrop(crop.size, how.crop_scale, ratio, interpolation=crop.interpolation)
    return Compose([crop, *between, *how.steps(min(crop.size)), to_tensor, normalize])


@dataclass(frozen=True)
class TwoParts:
    """A preprocessing cut in two: `finish(torch.stack([picture(x), ...]))` has the bits of stacked preprocessing.

    picture: an RGB picture -> uint8 [3, H, W], cropped and resized. finish: uint8 [B, 3, H, W] -> float32, normalized;
    or nothing, where the model does that (DualEncoder.normalized).
    """

    picture: Callable[[Image.Image], Tensor]
    finish: Callable[[Tensor], Tensor]


def in_two_parts(preprocess: Callable[[Image.Image], Tensor], pixels: bool = False) -> TwoParts:
    """Cut before the last two steps where they are ToTensor and Normalize, as open_clip's are; the same operations on
    the same numbers follow, a batch at a time, or are left to the model (pixels). Anything else stays whole: `picture`
    does it all, in float32."""
    steps = preprocess.transforms if isinstance(preprocess, Compose) else []
    if len(steps) < 2 or not (isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize)):
        return TwoParts(preprocess, as_it_is)
    return TwoParts(ToPixels(steps[:-2]), as_it_is if pixels else _Normalized(steps[-1]))


def as_it_is(images_BCHW: Tensor) -> Tensor:
    return images_BCHW


@dataclass(frozen=True)
class ToPixels:
    """Pictures through `steps`, and then as uint8 [3, H, W]."""

    steps: Sequence[Callable[[Image.Image], Image.Image]]

    def __call__(self, image: Image.Image) -> Tensor:
        for step in self.steps:
            image = step(image)
        return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


@dataclass(frozen=True)
class _Normalized:
    normalize: Normalize

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        return self.normalize(pixels_BCHW.to(torch.float32).div_(255))


@contextmanager
def own_generators() -> Iterator[None]:
    """Inside, the generators that random transforms draw from may be seeded; afterwards they are as they were."""
    saved = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        random.setstate(saved[1])


def seed_generators(*key: int | str) -> None:
    """Random transforms draw from (seed, epoch, row, ...): within `own_generators`, before each picture."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would seed the GPUs too
    random.seed(seed)
