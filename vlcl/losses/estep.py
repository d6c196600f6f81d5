"""The E-step: how a pair's log-normalizer is estimated. All in relative form and in logarithms (vlcl/losses/mstep.py):

    a_i = log(epsilon + mean over negatives of e^{h_ij})      (e^{h} is never formed unshifted: kappa may be 100)

With the augmentation 1/Z_i = integral of e^{-u_i Z_i} du_i, the auxiliary variable u_i given the model is exponential
with rate Z_i (Chen et al., NeurIPS 2022), so E[u_i] = 1/Z_i.
Stochastic EM keeps a running average of Z_i, a row a pair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlcl.losses.mstep import Similarities


def batch_estimate(h_BG: Tensor, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """a-hat_B from the negatives of this batch (-inf where not one), and log n_B (0 where not one).

    As a loop: a_hat[i] = log(epsilon + sum over negatives j of exp(h[i, j]) / n[i]).
    """
    count_B = (h_BG > -torch.inf).sum(dim=1)
    log_n_B = count_B.clamp(min=1).to(h_BG.dtype).log()
    a_hat_B = torch.logsumexp(h_BG, dim=1) - log_n_B
    if epsilon > 0:
        a_hat_B = torch.logaddexp(a_hat_B, torch.full_like(a_hat_B, math.log(epsilon)))
    return a_hat_B, log_n_B


def moving_average(a_old_BK: Tensor, a_hat_BK: Tensor, gamma_BK: Tensor) -> Tensor:
    """log((1 - gamma) e^{a_old} + gamma e^{a_hat}) a row; a row never written (NaN) takes a_hat whatever gamma is."""
    mixed_BK = torch.logaddexp(torch.log1p(-gamma_BK) + a_old_BK, gamma_BK.log() + a_hat_BK)
    return torch.where(torch.isnan(a_old_BK), a_hat_BK, mixed_BK)


def log_normalizer(a: Tensor, log_num_negatives: Tensor | float, positive: bool) -> Tensor:
    """log c = log((1 + (N-1) e^a) / (N-1)) with the positive in, or a itself without it."""
    return generalized_loss(a, log_num_negatives) - log_num_negatives if positive else a


def generalized_loss(a: Tensor, log_num_negatives: Tensor | float) -> Tensor:
    """-s_ii + log Z_i = log(1 + (N-1) e^a), elementwise."""
    # Not softplus: past its threshold (20) it returns its argument, which float64 can tell from the truth.
    return torch.logaddexp(a + log_num_negatives, torch.zeros_like(a))


def effective_negatives(h_BG: Tensor) -> Tensor:
    """Mean over our anchors of 1 / sum_j p_j^2, p the softmax over the batch's negatives: how many of them matter."""
    return torch.exp(2 * torch.logsumexp(h_BG, dim=1) - torch.logsumexp(2 * h_BG, dim=1)).nan_to_num(0.0).mean()


def estimate_batch(pair: tuple[Similarities, Similarities], epsilon: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Both directions' a-hat_BK, log n_B, and the metrics that every loss reports, on one axis for all of them."""
    h_pair = [sims.relative_BG() for sims in pair]
    estimates = [batch_estimate(h_BG, epsilon) for h_BG in h_pair]
    a_hat_BK = torch.stack([a_B for a_B, _ in estimates], dim=1)
    log_n_B = estimates[0][1]
    metrics = {
        "infonce": generalized_loss(a_hat_BK, log_n_B[:, None]).mean(),
        "effective_negatives": torch.stack([effective_negatives(h_BG) for h_BG in h_pair]).mean(),
    }
    return a_hat_BK, log_n_B, metrics
