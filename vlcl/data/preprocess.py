"""From a decoded picture to the numbers that a model sees, in two parts: what each picture needs, and arithmetic that a
batch takes at once. And the seeds of the random part.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor


@dataclass(frozen=True)
class TwoParts:
    """A preprocessing cut in two: `finish(torch.stack([picture(x), ...]))` has the bits of stacked preprocessing.

    picture: an RGB picture -> uint8 [3, H, W], cropped and resized. finish: uint8 [B, 3, H, W] -> float32, normalized.
    """

    picture: Callable[[Image.Image], Tensor]
    finish: Callable[[Tensor], Tensor]


def in_two_parts(preprocess: Callable[[Image.Image], Tensor]) -> TwoParts:
    """Cut before the last two steps where they are ToTensor and Normalize, as open_clip's are; the same operations on
    the same numbers follow, a batch at a time. Anything else stays whole: `picture` does it all, in float32."""
    steps = preprocess.transforms if isinstance(preprocess, Compose) else []
    if len(steps) < 2 or not (isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize)):
        return TwoParts(preprocess, lambda x: x)
    return TwoParts(_Cropped(steps[:-2]), _Normalized(steps[-1]))


@dataclass(frozen=True)
class _Cropped:
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


def seed_generators(*key: int) -> None:
    """Random transforms draw from (seed, epoch, row, ...): within `own_generators`, before each picture."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would seed the GPUs too
    random.seed(seed)
