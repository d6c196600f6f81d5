"""Sums over all pairs of a batch, tile by tile: what a contrastive loss costs, in three matrix products and no B x G
matrix. The products are torch's; what happens to a tile between them is one kernel each on CUDA in float32
(vlcl/losses/pairwise_triton.py, where triton is installed), and torch's operations elsewhere.

Notation as in vlcl/batch.py, and C candidates: the G pairs of all ranks, then M more (a bank of older features, M may
be 0). For anchor i of ours, direction k (0: image i against texts j, 1: text i against images j), scale kappa_ik and
offset o_ik:

    x_ij = kappa_ik cos_ij - o_ik          negatives j of i: the candidates of another row (and caption: Candidates)
                                           (relative: kappa_ik (cos_ij - cos_ii) - o_ik)
    w_ij = e^x (cut at e^cap), or sigmoid(x)

`pair_statistics` sums e^{kappa cos}; `weighted_sum` sums w over our anchors and is what gets differentiated: its
gradient to a feature is sum_j w_ij kappa_ik (the other side's feature), over our anchors AND those of other ranks that
see this feature as a candidate (from their kappa and offset, constants here). So no gradient of features crosses ranks.

Misuse: the value of `weighted_sum` in a world of W is our anchors' part, its feature gradients are everybody's. Only
the mean over ranks of both, as DDP takes it, is one function and its gradient.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlcl.errors import first_line
from vlcl.losses.pairs import Candidates, Kernels, Statistics, Sums, Weighing, own_cosines, row_dot

TILE = {"cpu": 1 << 19, "cuda": 1 << 26}  # similarities at a time
WIDTH = {"cpu": 1 << 10, "cuda": 1 << 13}  # candidates at a time
KEPT = {"cpu": 1 << 24, "cuda": 1 << 26}  # similarities that a step may keep from the statistics for the weights
MASKED = -1e4  # a cosine that no scale from 1 to 200 lifts to a weight above 0, and whose product with 0 is 0


@dataclass(frozen=True)
class Tile:
    """Rows `r` of our anchors of a direction against candidates `c`; `own`: these are our own pairs' other sides, whose
    opposite direction is the same tile read down its columns."""

    direction: int
    r: slice
    c: slice
    own: bool
    column_weights: bool  # whether the candidates are anchors of this step, too


def tiles(num_own: int, candidates: Candidates, with_bank: bool = True) -> Iterator[Tile]:
    """The tiles that cover both directions, the square of our own pairs once (keys: in both directions)."""
    size, widest = (sizes.get(candidates.image_CD.device.type, sizes["cpu"]) for sizes in (TILE, WIDTH))
    start, stop = candidates.start, candidates.start + num_own
    end = len(candidates.row_C) if with_bank else candidates.num_pairs
    pairs = candidates.num_pairs
    segments = [
        (start, stop, True, True),
        (0, start, False, True),
        (stop, pairs, False, True),
        (pairs, end, False, False),
    ]
    if candidates.keys:
        segments = [(0, end, False, False)]
    for direction in (0, 1):
        for first, last, own, column_weights in segments:
            if first == last or (own and direction == 1):
                continue
            width = min(last - first, widest)
            height = max(1, min(num_own, size // width))
            for top in range(0, num_own, height):
                rows = slice(top, min(top + height, num_own))
                for left in range(first, last, width):
                    yield Tile(direction, rows, slice(left, min(left + width, last)), own, column_weights)


def _on_tiles(kernels: Kernels, feature_BD: Tensor, captions: bool = False) -> ModuleType:
    """What has `sum_tile` and `weigh_tile`: this file, or the kernels, which know of rows alone."""
    here = sys.modules[__name__]
    if captions or kernels == "torch" or not feature_BD.is_cuda or feature_BD.dtype != torch.float32:
        return here
    if kernels == "auto" and not _kernels_run(feature_BD.device):
        return here
    from vlcl.losses import pairwise_triton

    return pairwise_triton


@cache
def _kernels_run(device: torch.device) -> bool:
    """Whether triton is installed and works here, which takes a C compiler, and a GPU that it knows."""
    try:
        from vlcl.losses import pairwise_triton

        logs_21, row_1 = torch.zeros(2, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        pairwise_triton.sum_tile(logs_21[:1].clone(), row_1, row_1 + 1, logs_21[0].clone(), None, logs_21, None)
        logs_21.tolist()
    except ImportError:  # as on Windows
        return False
    except Exception as error:  # whatever a compiler may raise
        warnings.warn(f"the loss runs without its kernels, as Triton fails here: {first_line(error)}", stacklevel=2)
        return False
    return True


def _mask_(cos_RC: Tensor, row_R: Tensor, row_C: Tensor, fill: float) -> Tensor:
    """`fill` where the candidate is no negative."""
    if row_R.dim() == 1:
        return cos_RC.masked_fill_((row_R[:, None] == row_C[None, :]) | (row_C < 0)[None, :], fill)
    same_RC = (row_R[:, None, 0] == row_C[None, :, 0]) | (row_R[:, None, 1] == row_C[None, :, 1])
    return cos_RC.masked_fill_(same_RC.logical_or_((row_C[:, 0] < 0)[None, :]), fill)


@torch.no_grad()
def pair_statistics(
    image_BD: Tensor, text_BD: Tensor, row_B: Tensor, candidates: Candidates, scale_BK: Tensor,
    kernels: Kernels = "auto", keep: bool = False,
) -> Statistics:  # fmt: skip
    """keep: the cosines as well, for `Weighing.cosines`, unless they are more than KEPT.

    As a loop, for direction 0 (1 swaps image and text):

    for i in range(B):
        negatives = [j for j in range(C) if row_C[j] not in (row_B[i], -1)]
        log_sum[i, 0] = log(sum(exp(scale[i, 0] * image[i] @ text_C[j]) for j in negatives))
        log_square[i, 0] = log(sum(exp(2 * scale[i, 0] * image[i] @ text_C[j]) for j in negatives))
    """
    work = _on_tiles(kernels, image_BD, row_B.dim() == 2)
    logs_2BK = scale_BK.new_full((2, *scale_BK.shape), -torch.inf)
    once = 0 if candidates.keys else len(row_B)  # our own square, the others in both directions
    keep = keep and len(row_B) * (2 * len(candidates.row_C) - once) <= KEPT.get(image_BD.device.type, 0)
    cosines = []
    for tile in tiles(len(row_B), candidates):
        k, r, c = tile.direction, tile.r, tile.c
        mine = slice(c.start - candidates.start, c.stop - candidates.start)  # of an own tile
        cos_RC = (image_BD, text_BD)[k][r] @ candidates.other(k)[c].T
        columns = (scale_BK[mine, 1 - k], logs_2BK[:, mine, 1 - k]) if tile.own else (None, None)
        work.sum_tile(cos_RC, row_B[r], candidates.row_C[c], scale_BK[r, k], columns[0], logs_2BK[:, r, k], columns[1])
        if keep:
            cosines.append(cos_RC)
    return Statistics(logs_2BK[0], logs_2BK[1], tuple(cosines))


def sum_tile(
    cos_RC: Tensor, row_R: Tensor, row_C: Tensor, scale_R: Tensor, scale_C: Tensor | None, logs_2R: Tensor,
    logs_2C: Tensor | None,
) -> None:  # fmt: skip
    """Add to the log of the sums of e^s and e^2s over the negatives, in place: logs_2R along rows, s = scale_R cos, and
    logs_2C along columns, s = scale_C cos (None: not wanted). Of cos_RC, only what is no negative may change."""
    cos_RC = _mask_(cos_RC, row_R, row_C, -torch.inf)
    logs_2R.copy_(torch.logaddexp(logs_2R, _log_sums(cos_RC * scale_R[:, None], 1)))
    if logs_2C is not None:
        assert scale_C is not None
        logs_2C.copy_(torch.logaddexp(logs_2C, _log_sums(cos_RC * scale_C, 0)))


def _log_sums(x: Tensor, dim: int) -> Tensor:
    """log of the sums of e^x and of e^2x along `dim`, for any finite x and -inf; overwrites x."""
    largest = x.amax(dim, keepdim=True)
    largest = largest.masked_fill_(largest == -torch.inf, 0.0)
    e = x.sub_(largest).exp_()
    largest = largest.squeeze(dim)
    return torch.stack([e.sum(dim).log_().add_(largest), _dot(e, e, dim).log_().add_(2 * largest)])


def _dot(x: Tensor, y: Tensor, dim: int) -> Tensor:
    return torch.linalg.vecdot(x, y, dim=dim)


def weighted_sum(
    image_BD: Tensor, text_BD: Tensor, scale_BK: Tensor, offset_BK: Tensor, weighing: Weighing
) -> tuple[Tensor, Sums]:
    """The sum over our anchors, both directions and negatives of w (kind "exp") or softplus(x) ("softplus").

    Differentiable in image_BD, text_BD, scale_BK and offset_BK. As a loop, for direction 0 in a world of one:

        for i in range(B):
            for j in negatives of i:
                x = scale[i, 0] * (image[i] @ text_C[j] - relative * image[i] @ text[i]) - offset[i, 0]
                total += exp(x) if x < cap else exp(cap)          the gradient goes on as exp(cap) * (gradient of x)

    Gradients are computed with the value: the backward pass only scales them.
    """
    if weighing.relative:
        candidates = weighing.candidates
        if not candidates.keys:  # keys are no anchors, so that nobody asks for the offsets of others
            pairs = slice(candidates.num_pairs)
            own_GK = weighing.scale_GK * row_dot(candidates.image_CD[pairs], candidates.text_CD[pairs])
            weighing = replace(weighing, offset_GK=weighing.offset_GK + own_GK)
    total, weight_BK, cosine_BK, square_BK = _WeightedSum.apply(image_BD, text_BD, scale_BK, offset_BK, weighing)
    return total, Sums(weight_BK, cosine_BK, square_BK)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image_BD: Tensor, text_BD: Tensor, scale_BK: Tensor, offset_BK: Tensor, weighing: Weighing
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total, sums, gradients = _differentiated(image_BD, text_BD, scale_BK, offset_BK, weighing)
        ctx.save_for_backward(image_BD, text_BD, scale_BK, offset_BK)
        ctx.weighing, ctx.gradients = replace(weighing, cosines=()), gradients
        ctx.mark_non_differentiable(sums.weight_BK, sums.cosine_BK, sums.square_BK)
        return total, sums.weight_BK, sums.cosine_BK, sums.square_BK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Scaled in place, as two more [B, D] would be half of all memory; a second backward pass computes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            image_BD, text_BD, scale_BK, offset_BK = ctx.saved_tensors
            with torch.autocast(grad_output.device.type, enabled=False):  # backward() may be called within one
                gradients = _differentiated(image_BD, text_BD, scale_BK, offset_BK, ctx.weighing)[2]
        return (*(gradient.mul_(grad_output) for gradient in gradients), None)


@torch.no_grad()
def _differentiated(
    image_BD: Tensor, text_BD: Tensor, scale_BK: Tensor, offset_BK: Tensor, weighing: Weighing
) -> tuple[Tensor, Sums, list[Tensor]]:
    """The total, the sums, and the total's gradients to image_BD, text_BD, scale_BK and offset_BK."""
    if not weighing.relative:
        total, sums, (image, text) = _walk(image_BD, text_BD, scale_BK, offset_BK, weighing)
        return total, sums, [image, text, sums.cosine_BK.clone(), -sums.weight_BK]
    keys = weighing.candidates.keys_of(len(image_BD))
    own_BK = own_cosines(image_BD, text_BD, keys)
    total, sums, (image, text) = _walk(image_BD, text_BD, scale_BK, offset_BK + scale_BK * own_BK, weighing)
    own_weight_BK = scale_BK * sums.weight_BK  # every x_ij has -kappa cos_ii in it
    if keys is not None:
        image.addcmul_(own_weight_BK[:, :1], keys.text, value=-1)
        text.addcmul_(own_weight_BK[:, 1:], keys.image, value=-1)
    else:
        own_weight_B1 = own_weight_BK.sum(dim=1, keepdim=True)
        image.addcmul_(own_weight_B1, text_BD, value=-1)
        text.addcmul_(own_weight_B1, image_BD, value=-1)
    return total, sums, [image, text, sums.cosine_BK - own_BK * sums.weight_BK, -sums.weight_BK]


@torch.no_grad()
def _walk(
    image_BD: Tensor, text_BD: Tensor, scale_BK: Tensor, offset_BK: Tensor, weighing: Weighing
) -> tuple[Tensor, Sums, list[Tensor]]:
    """The total, the sums, and the total's gradients to image_BD and text_BD at fixed scales and offsets (of which all
    have the pair's own cosine in them by now, where x is relative to it)."""
    row_B, candidates = weighing.row_B, weighing.candidates
    work = _on_tiles(weighing.kernels, image_BD, row_B.dim() == 2)
    sums_4BK = scale_BK.new_zeros((4, *scale_BK.shape))
    grads = [torch.zeros_like(image_BD), torch.zeros_like(text_BD)]
    for index, tile in enumerate(tiles(len(row_B), candidates, weighing.with_bank)):
        k, r, c = tile.direction, tile.r, tile.c
        mine = slice(c.start - candidates.start, c.stop - candidates.start)  # of an own tile
        anchor_RD, other_CD = (image_BD, text_BD)[k][r], candidates.other(k)[c]
        columns = (weighing.scale_GK[c, 1 - k], weighing.offset_GK[c, 1 - k]) if tile.column_weights else None
        cos_RC = weighing.cosines[index] if weighing.cosines else anchor_RD @ other_CD.T
        slope_RC = work.weigh_tile(
            cos_RC, row_B[r], candidates.row_C[c], (scale_BK[r, k], offset_BK[r, k]), columns, weighing.cap,
            weighing.kind, sums_4BK[:, r, k], sums_4BK[:, mine, 1 - k] if tile.own else None,
        )  # fmt: skip
        grads[k][r].addmm_(slope_RC, other_CD)
        if tile.own:
            grads[1 - k][mine].addmm_(slope_RC.T, anchor_RD)
    weight_BK, cosine_BK, square_BK, value_BK = sums_4BK
    return value_BK.sum(), Sums(weight_BK, cosine_BK, square_BK), grads


def weigh_tile(
    cos_RC: Tensor, row_R: Tensor, row_C: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor] | None,
    cap: float, kind: str, sums_4R: Tensor, sums_4C: Tensor | None,
) -> Tensor:  # fmt: skip
    """The derivative of the sums of both directions to cos_RC. Adds the sums of w, w cos, w^2 and of what the total has
    to sums_4R along rows and to sums_4C along columns (None: not wanted), in place.

    rows, columns: scale and offset of the anchors there; columns None: the candidates are no anchors. Overwrites
    cos_RC.
    """
    cos_RC = _mask_(cos_RC, row_R, row_C, MASKED)
    scale_R1, offset_R1 = (x[:, None] for x in rows)
    row_RC, value_RC = _weights(cos_RC, scale_R1, offset_R1, cap, kind)
    _add(sums_4R, row_RC, cos_RC, value_RC, 1)
    slope_RC = row_RC * scale_R1
    if columns is None:
        return slope_RC
    scale_C, offset_C = columns
    if kind == "softplus":  # one scale and offset: the other direction's weight of a pair is this one
        column_RC = row_RC
    else:
        column_RC, value_RC = _weights(cos_RC, scale_C, offset_C, cap, kind)
    if sums_4C is not None:
        _add(sums_4C, column_RC, cos_RC, value_RC, 0)
    return slope_RC.addcmul_(column_RC, scale_C)


def _weights(cos_RC: Tensor, scale: Tensor, offset: Tensor, cap: float, kind: str) -> tuple[Tensor, Tensor]:
    """w of a tile, and what the total sums."""
    x = torch.addcmul(-offset, cos_RC, scale)
    if kind == "softplus":
        value = torch.logaddexp(x, x.new_zeros(()))  # not F.softplus, which is off by e^-20 above 20
        return x.sigmoid_(), value
    w = x.clamp_(max=cap).exp_()
    return w, w


def _add(sums_4: Tensor, w_RC: Tensor, cos_RC: Tensor, value_RC: Tensor, dim: int) -> None:
    weight = w_RC.sum(dim)
    value = weight if value_RC is w_RC else value_RC.sum(dim)
    for total, part in zip(sums_4, (weight, _dot(w_RC, cos_RC, dim), _dot(w_RC, w_RC, dim), value)):
        total += part
