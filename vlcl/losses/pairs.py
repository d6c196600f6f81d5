"""What the sums over pairs take and give, whichever code does the work (vlcl/losses/pairwise.py has the notation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlcl.batch import Keys, Peers

Kernels = Literal["auto", "torch", "triton"]  # for float32 on CUDA; auto: triton where it is installed


@dataclass(frozen=True)
class Candidates:
    """What our pairs are compared with; no gradient. `row_C` of -1: an empty place. Ours are `start` .. `start + B`;
    the first `num_pairs` (G) are pairs of this step, whose anchors see our features in turn, unless these are `keys`:
    of a momentum encoder, so that our features are anchors and nothing else. Wherever pairs are told apart by rows,
    [C, 2] rows and captions may stand for [C] rows: a negative then differs in both."""

    image_CD: Tensor
    text_CD: Tensor
    row_C: Tensor
    start: int
    num_pairs: int
    keys: bool = False

    def keys_of(self, num_own: int) -> Keys | None:
        """Our own pairs' keys."""
        ours = slice(self.start, self.start + num_own)
        return Keys(self.image_CD[ours], self.text_CD[ours]) if self.keys else None

    def other(self, direction: int) -> Tensor:
        return self.text_CD if direction == 0 else self.image_CD


@dataclass(frozen=True)
class Weighing:
    """What a weighted sum holds constant: our rows, what they are compared with, scale and offset of all anchors of
    this step (ours too), and the function of x that is summed: "exp", cut at e^cap, or "softplus", which takes one
    scale and offset for all. `with_bank`: over the candidates beyond the G pairs, too. `relative`: the pair's own
    cosine is taken off the others'. `cosines`: of the tiles, in their order, where they are at hand; overwritten."""

    row_B: Tensor
    candidates: Candidates
    scale_GK: Tensor
    offset_GK: Tensor
    cap: float
    kind: Literal["exp", "softplus"] = "exp"
    with_bank: bool = False
    relative: bool = False
    kernels: Kernels = "auto"
    cosines: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Statistics:
    """Over each anchor's negatives: log sum of e^{kappa cos}, and log sum of its square. `cosines`: of the tiles, in
    their order, if they were kept."""

    log_sum_BK: Tensor
    log_square_BK: Tensor
    cosines: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Sums:
    """Over each anchor's negatives: of w, w cos and w^2. No gradient."""

    weight_BK: Tensor
    cosine_BK: Tensor
    square_BK: Tensor


def captions_of(peers: Peers, same_caption: str) -> Tensor | None:
    """The captions that keep pairs from being each other's negatives; None where none do. Raises ValueError."""
    if same_caption == "negative":
        return None
    if peers.caption_G is None:
        raise ValueError("same_caption='ignore' needs peers.caption_G: gather_peers(..., caption_B=batch.caption_B)")
    return peers.caption_G


def named(row: Tensor, caption: Tensor | None) -> Tensor:
    """What tells pairs apart: rows, or [n, 2] rows and captions."""
    return row if caption is None else torch.stack([row, caption], dim=1)


@torch.no_grad()
def row_dot(x_BD: Tensor, y_BD: Tensor) -> Tensor:
    """<x_i, y_i> as [B, 1], without a [B, D] product in memory."""
    return torch.bmm(x_BD[:, None, :], y_BD[:, :, None])[:, :, 0]


def own_cosines(image_BD: Tensor, text_BD: Tensor, keys: Keys | None) -> Tensor:
    """The cosine of each pair: [B, 1], the same seen from both sides; [B, 2] with keys, as [image with the text's key,
    text with the image's]."""
    if keys is None:
        return row_dot(image_BD, text_BD)
    return torch.cat([row_dot(image_BD, keys.text), row_dot(text_BD, keys.image)], dim=1)


def own_cosines_to_train(image_BD: Tensor, text_BD: Tensor, keys: Keys | None) -> Tensor:
    """`own_cosines`, with gradient to image_BD and text_BD."""
    pairs = [(image_BD, text_BD)] if keys is None else [(image_BD, keys.text), (text_BD, keys.image)]
    return torch.stack([(x_BD * y_BD).sum(dim=1) for x_BD, y_BD in pairs], dim=1)


def log_count(row_G: Tensor, row_C: Tensor) -> Tensor:
    """log of how many candidates are negatives of each pair (0 where none is): those there, less those of its row or
    its caption."""
    if row_G.dim() == 1:
        return _those_left((row_C >= 0).sum(), _same(row_G, row_C))
    row_C = row_C[row_C[:, 0] >= 0]
    both = torch.unique(torch.cat([row_G, row_C]), dim=0, return_inverse=True)[1]
    same_G = _same(row_G[:, 0], row_C[:, 0]) + _same(row_G[:, 1], row_C[:, 1])
    return _those_left(len(row_C), same_G - _same(both[: len(row_G)], both[len(row_G) :]))


def _same(x_G: Tensor, x_C: Tensor) -> Tensor:
    """How many of x_C equal each of x_G."""
    sorted_C, x_G = x_C.sort().values, x_G.contiguous()
    return torch.searchsorted(sorted_C, x_G, right=True) - torch.searchsorted(sorted_C, x_G)


def _those_left(there: Tensor | int, same_G: Tensor) -> Tensor:
    return (there - same_G).clamp(min=1).double().log()
