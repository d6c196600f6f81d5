"""`data.decode=fast`: training's random crop for less time, with pixels within rounding of torchvision's.

- A JPEG is decoded at a half, a quarter or an eighth of its size, by its decoder, where the crop has pixels to spare.
- The crop is taken before anything is converted or resized.
- It is resized by torch, whose bicubic method with antialiasing is Pillow's, in vector instructions.

The crop itself is the one that `RandomResizedCrop` chooses, of the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transform import MaybeConvertMode
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomResizedCrop, ToTensor

from vlcl.data.decode import BACKGROUND, can_reduce, load_image
from vlcl.data.preprocess import Transform

# A crop keeps this many times the pixels of the model's input a side when its JPEG is decoded smaller: the decoder's
# smaller pixels are means of squares, sharper than the filter that then follows. At 1.0 photographs are 2 of 255 off
# the exact path in the mean, at 1.5 1.2.
MARGIN = 1.5
_MODES = {InterpolationMode.BICUBIC: "bicubic", InterpolationMode.BILINEAR: "bilinear"}
_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

Box = tuple[int, int, int, int]  # left, top, width, height, in pixels of the upright picture


@dataclass(frozen=True)
class FastCrop:
    """Called with what `open_image` gave, or with a picture: uint8 [3, H, W], what `in_two_parts(...).picture` makes of
    the decoded picture but for rounding. steps: what follows the crop. mode: "bicubic" or "bilinear"."""

    crop: RandomResizedCrop
    steps: Sequence[Transform]
    mode: str
    background: str = BACKGROUND

    def __call__(self, image: Image.Image) -> Tensor:
        if not can_reduce(image):
            image = load_image(image, self.background)
        box = crop_box(self.crop, image.width, image.height)
        return self._through_steps(self.resized(image, box))

    def resized(self, image: Image.Image, box: Box) -> Tensor:
        """uint8 [3, H, W] of a part of an opened or decoded picture."""
        left, top, width, height = box
        rows, columns = self.crop.size
        reduced = 1
        if can_reduce(image):
            spare = min(width / columns, height / rows) / MARGIN
            reduced = next((k for k in (8, 4, 2) if spare >= k), 1)
            image = load_image(image, self.background, reduced)
        if reduced > 1:  # the corners lie between the pixels: Pillow takes them so
            part = (left / reduced, top / reduced, (left + width) / reduced, (top + height) / reduced)
            return _tensor(image.resize((columns, rows), _PILLOW[self.mode], box=part))
        pixels_CHW = _tensor(image.crop((left, top, left + width, top + height)))
        return F.interpolate(pixels_CHW[None], (rows, columns), mode=self.mode, antialias=True)[0]

    def _through_steps(self, pixels_CHW: Tensor) -> Tensor:
        if self.steps:
            image = Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())
            for step in self.steps:
                image = step(image)
            pixels_CHW = _tensor(image)
        return pixels_CHW.contiguous()


def fast_crop(preprocess: Callable[[Image.Image], Tensor], background: str = BACKGROUND) -> FastCrop | None:
    """For preprocessing that begins with a random crop and ends with ToTensor and Normalize; None for any other."""
    steps = preprocess.transforms if isinstance(preprocess, Compose) else []
    if len(steps) < 3 or not (isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize)):
        return None
    crop, between = steps[0], [step for step in steps[1:-2] if not isinstance(step, MaybeConvertMode)]  # RGB it is
    mode = _MODES.get(crop.interpolation) if type(crop) is RandomResizedCrop else None
    return FastCrop(crop, between, mode, background) if mode else None


def crop_box(crop: RandomResizedCrop, width: int, height: int) -> Box:
    """`crop.get_params` of a picture of that size, which draws the same numbers in a third of the time."""
    (least, most), (narrow, wide) = crop.scale, torch.log(torch.tensor(crop.ratio)).tolist()
    draw, area = torch.empty(1), width * height
    for _ in range(10):
        part = area * draw.uniform_(least, most).item()
        ratio = draw.uniform_(narrow, wide).exp_().item()
        w, h = round(math.sqrt(part * ratio)), round(math.sqrt(part / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)))
            left = int(torch.randint(0, width - w + 1, (1,)))
            return left, top, w, h
    w, h = width, height  # as much of the middle as the ratio allows
    if width / height < min(crop.ratio):
        h = round(width / min(crop.ratio))
    elif width / height > max(crop.ratio):
        w = round(height * max(crop.ratio))
    return (width - w) // 2, (height - h) // 2, w, h


def _tensor(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]; in memory the channels of a pixel lie side by side, which `interpolate` is fast with."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
