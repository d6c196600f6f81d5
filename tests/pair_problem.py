"""Arguments of the sums over pairs (vlcl/losses/pairwise.py), of any size, for the tests of both of its backends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcl.losses.pairs import Candidates, Kernels, Statistics, Sums, Weighing
from vlcl.losses.pairwise import pair_statistics, weighted_sum


@dataclass
class Problem:
    """Arguments of weighted_sum; ours are `start` .. `start + own` of G pairs, M more are a bank."""

    image_CD: Tensor
    text_CD: Tensor
    row_C: Tensor
    start: int
    own: int
    pairs: int
    scale_GK: Tensor
    offset_GK: Tensor
    cap: float = 50.0
    kind: Literal["exp", "softplus"] = "exp"
    with_bank: bool = False
    relative: bool = False
    kernels: Kernels = "torch"

    @property
    def ours(self) -> slice:
        return slice(self.start, self.start + self.own)

    @property
    def candidates(self) -> Candidates:
        return Candidates(self.image_CD, self.text_CD, self.row_C, self.start, self.pairs)

    def to(self, to: Any) -> Problem:
        """On another device, or in another type."""
        parts = (
            "image_CD",
            "text_CD",
            "scale_GK",
            "offset_GK",
            *(["row_C"] if not isinstance(to, torch.dtype) else []),
        )
        return replace(self, **{name: getattr(self, name).to(to) for name in parts})

    def leaves(self) -> list[Tensor]:
        parts = (self.image_CD, self.text_CD, self.scale_GK, self.offset_GK)
        return [x[self.ours].clone().requires_grad_() for x in parts]

    @property
    def weighing(self) -> Weighing:
        return Weighing(
            self.row_C[self.ours], self.candidates, self.scale_GK, self.offset_GK, self.cap, self.kind, self.with_bank,
            self.relative, self.kernels,
        )  # fmt: skip

    def weighted_sum(self, image: Tensor, text: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Sums]:
        return weighted_sum(image, text, scale, offset, self.weighing)

    def statistics(self) -> Statistics:
        parts = (self.image_CD[self.ours], self.text_CD[self.ours], self.row_C[self.ours])
        return pair_statistics(*parts, self.candidates, self.scale_GK[self.ours], self.kernels)


def make_problem(
    own: int = 5, left: int = 0, right: int = 0, bank: int = 0, width: int = 4, names: int = 1000, seed: int = 0,
    scale: float = 8.0, **options: Any,
) -> Problem:  # fmt: skip
    """Features, rows out of `names` (few: many duplicates), scales and offsets of `own` pairs among others."""
    g = torch.Generator().manual_seed(seed)
    pairs = left + own + right

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    image, text = (F.normalize(normal(pairs + bank, width), dim=1) for _ in range(2))
    row = torch.randint(0, names, (pairs + bank,), generator=g)
    row[pairs + bank // 2 :] = -1
    shape = (1, 1) if options.get("kind") == "softplus" else (pairs, 2)
    scales = (1 + scale * torch.rand(*shape, generator=g, dtype=torch.float64)).expand(pairs, 2)
    offsets = (2 * normal(*shape)).expand(pairs, 2)
    return Problem(image, text, row, left, own, pairs, scales, offsets, **options)
