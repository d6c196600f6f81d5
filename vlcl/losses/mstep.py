"""The M-step: a weighted surrogate of the logits whose gradient is the gradient of the generalized loss.

Notation (B, G, D as in vlcl/batch.py). kappa = exp(logit_scale), s_ij = kappa <v_i, t_j>, and relative to the pair's
own similarity h_ij = s_ij - s_ii. The negatives of pair i are the n_i pairs j of the global batch of another row (a
pair that occurs twice is not its own negative). For the direction image to text, text to image being symmetric:

    generalized loss      l_i = -s_ii + log Z_i = log(1 + (N-1) g_i),    g_i = mean over all negatives of e^{h_ij}
    its gradient          sum_j w_ij grad h_ij,                          w_ij = (N-1)/n_i e^{h_ij} / (1 + (N-1) g_i)

With g_i held at the E-step's estimate, that is the M-step of stochastic EM: the surrogate is linear in e^{h_ij}, so any
batch of negatives estimates its gradient without bias (Chen et al., NeurIPS 2022). With log c_i the log-normalizer
divided by N-1, log w_ij = h_ij - log n_i - log c_i, which is all that this file needs to know of the E-step.

No gradient of features crosses ranks. The part of a pair's loss that depends on a peer's features is computed by that
peer ("column" terms below), from our features as constants and our two floats a pair and direction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlcl.batch import Features, Peers

# Far above any weight that training survives, and its products and sums over a batch stay finite in float32: the cap
# that is always on.
LARGEST_LOG_WEIGHT = 50.0


@dataclass(frozen=True)
class LossOutput:
    """`loss`: scalar; its value is this rank's mean of the generalized loss, its gradient the surrogate's. The mean
    over ranks (as DDP takes it) of value and gradient is that of one rank holding all G pairs.

    `aux_GK`: what to store in the pair table for the rows of the global batch; None where the loss has no table.
    `metrics`: scalars of this rank, detached.
    """

    loss: Tensor
    aux_GK: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Similarities:
    """Cosines of one direction: our anchors against all candidates, with what both terms of the surrogate share."""

    cos_BG: Tensor  # <anchor_i, candidate_j>; gradient to our anchors only
    own_cos_B: Tensor  # <anchor_i, its own candidate>; gradient to both, they live on one rank
    logit_scale: Tensor
    negative_BG: Tensor  # bool

    def relative_BG(self) -> Tensor:
        """h_ij, -inf where j is no negative of i; no gradient."""
        with torch.no_grad():
            h_BG = self.logit_scale * (self.cos_BG - self.own_cos_B[:, None])
            return h_BG.masked_fill(~self.negative_BG, -torch.inf)


def similarities(features: Features, peers: Peers) -> tuple[Similarities, Similarities]:
    """Image-to-text and text-to-image cosines, in float32 at least and outside autocast."""
    with torch.autocast(features.image_BD.device.type, enabled=False):
        image_BD, text_BD = _at_least_float32(features.image_BD), _at_least_float32(features.text_BD)
        row_B = peers.row_G[peers.start : peers.start + image_BD.shape[0]]
        negative_BG = row_B[:, None] != peers.row_G[None, :]
        own_cos_B = (image_BD * text_BD).sum(dim=1)
        image_to_text_BG = image_BD @ peers.text_GD.to(image_BD.dtype).T
        text_to_image_BG = text_BD @ peers.image_GD.to(text_BD.dtype).T
    scale = features.logit_scale.to(image_BD.dtype)
    return (
        Similarities(image_to_text_BG, own_cos_B, scale, negative_BG),
        Similarities(text_to_image_BG, own_cos_B, scale, negative_BG),
    )


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def own_similarity(peers: Peers) -> Tensor:
    """<v_i, t_i> of all ranks' pairs."""
    return (_at_least_float32(peers.image_GD) * _at_least_float32(peers.text_GD)).sum(dim=1)


def surrogate(
    pair: tuple[Similarities, Similarities],
    log_c_GK: Tensor,
    log_n_G: Tensor,
    peers: Peers,
    max_log_weight: float | None = None,
) -> Tensor:
    """The surrogate of both directions, averaged over our B pairs: a scalar whose value means nothing.

    As a loop, for the direction image to text on a world of one, w_ij without gradient:

        total = 0
        for i in range(B):
            for j in range(B):
                if row[i] != row[j]:
                    h = kappa * (v[i] @ t[j] - v[i] @ t[i])
                    w = min(exp(h - log n[i] - log_c[i]), exp(max_log_weight))
                    total += w * h
        surrogate = total / B           (and the mean of it with the other direction)

    On W ranks v[i] @ t[j] has its gradient to v[i] on i's rank (row term) and to t[j] on j's rank (column term); kappa
    has it on i's rank alone.
    """
    cap = LARGEST_LOG_WEIGHT if max_log_weight is None else min(max_log_weight, LARGEST_LOG_WEIGHT)
    num_own = pair[0].cos_BG.shape[0]
    own_G = own_similarity(peers)
    ours = slice(peers.start, peers.start + num_own)
    total = pair[0].cos_BG.new_zeros(())
    for direction, sims in enumerate(pair):
        scale = sims.logit_scale
        with torch.no_grad():
            offset_B = log_n_G[ours] + log_c_GK[ours, direction]
            row_weight_BG = torch.exp((sims.relative_BG() - offset_B[:, None]).clamp(max=cap))
            # Candidate j of ours seen from anchor i of anybody: the other direction's normalizer, over our own columns.
            offset_G = scale * own_G + log_n_G + log_c_GK[:, 1 - direction]
            column_BG = (scale * sims.cos_BG - offset_G[None, :]).clamp(max=cap)
            column_weight_BG = torch.exp(column_BG.masked_fill(~sims.negative_BG, -torch.inf))
        row = (row_weight_BG * sims.cos_BG).sum() - (row_weight_BG.sum(dim=1) * sims.own_cos_B).sum()
        column = (column_weight_BG * sims.cos_BG).sum()
        total = total + scale * row + scale.detach() * column
    return total / (2 * num_own)


def with_value(value: Tensor, gradient_of: Tensor) -> Tensor:
    """A scalar that reads as `value` and differentiates as `gradient_of`."""
    return value.detach() + (gradient_of - gradient_of.detach())
