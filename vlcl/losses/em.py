"""The EM-augmented loss: every pair against all N - 1 others, trained with batches of any size.

The generalized loss -s_ii + log Z_i with Z_i over ALL pairs is augmented with one variable a pair and direction, given
the model exponential with rate Z_i; the augmented loss is linear in Z_i, so that a batch gives an unbiased gradient of
it, and stochastic EM trains it (Chen et al., "Why do We Need Large Batchsizes in Contrastive Learning? A Gradient-Bias
Perspective", NeurIPS 2022). The schedule of gamma is ours; the paper's is not claimed.

    E-step   a_i <- log((1 - gamma) e^{a_i} + gamma e^{a_hat_i});   u_i = 1/Z_i ("mean")  or  u_i ~ Exp(1)/Z_i
    ("sample") M-step   gradient of u_i Z_hat_i(theta), u_i held constant      (mstep.py)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcl.batch import Aux, Features, Peers
from vlcl.losses.estep import estimate_batch, generalized_loss, log_normalizer, moving_average
from vlcl.losses.mstep import LossOutput, similarities, surrogate, with_value


@dataclass(frozen=True)
class EMLoss:
    """Features, peers, aux -> LossOutput, `aux` and the output's `aux_GK` being a_i of both directions.

    num_pairs: N. total_steps: length of the run, for the cosine schedule.
    mode: "mean" or "sample". order: whether the weights come from the row "before" this batch is mixed in or "after".
    gamma: weight of the batch in the running average, in (0, 1]; gamma_schedule "constant", "cosine" (from 1 down to
    gamma_min over the run) or "visits" (1 / visits of the row, a running mean); a row's first visit always takes 1.
    epsilon: floor of the mean of e^h. positive: whether Z_i has the pair's own e^{s_ii}. max_log_weight: cap on the log
    of a negative's weight (InfoNCE's weights are below 1, so 0 caps there).

    With N = B, gamma = 1, epsilon = 0 it is InfoNCE, in value and gradient. As a loop over the pairs of a world of one,
    for the direction image to text, h[j] = kappa (v[i] @ t[j] - v[i] @ t[i]) and n negatives:

        a_hat = log(epsilon + sum(exp(h[j]) for negatives j) / n)
        a_new = a_hat if isnan(a_old[i]) else log((1 - gamma) * exp(a_old[i]) + gamma * exp(a_hat))
        a = a_old[i] if order == "before" and not isnan(a_old[i]) else a_new
        Z = (positive + (N - 1) * exp(a))                     relative to e^{s_ii}
        u = 1 / Z  or  Exp(1) sample / Z
        surrogate += sum(u * (N - 1) / n * exp(h[j]) * h[j])  with gradient through the last factor only
        value += log(1 + (N - 1) * exp(a_new))
    """

    num_pairs: int
    total_steps: int = 1
    mode: str = "mean"
    order: str = "after"
    gamma: float = 0.8
    gamma_schedule: str = "constant"
    gamma_min: float = 0.2
    epsilon: float = 1e-8
    positive: bool = True
    max_log_weight: float | None = None
    seed: int = 0

    num_columns = 2

    def __call__(self, features: Features, peers: Peers, aux: Aux | None = None, step: int = 0) -> LossOutput:
        if aux is None:
            raise ValueError("the EM loss needs the pair table's values of the batch (aux)")
        pair = similarities(features, peers)
        ours = slice(peers.start, peers.start + features.image_BD.shape[0])
        log_negatives = math.log(max(self.num_pairs - 1, 1))
        with torch.no_grad():
            a_hat_BK, log_n_B, metrics = estimate_batch(pair, self.epsilon)
            a_old_BK = aux.values_GK[ours].to(a_hat_BK.dtype)
            gamma_BK = self._gamma(aux.visits_G[ours].to(a_hat_BK.dtype), step)[:, None].expand_as(a_hat_BK)
            a_new_BK = moving_average(a_old_BK, a_hat_BK, gamma_BK)
            a_BK = torch.where(torch.isnan(a_old_BK), a_new_BK, a_old_BK) if self.order == "before" else a_new_BK
            log_c_BK = log_normalizer(a_BK, log_negatives, self.positive)
            small_GX = peers.gather(torch.cat([a_new_BK, log_c_BK, log_n_B[:, None]], dim=1))
            a_new_GK, log_c_GK, log_n_G = small_GX.tensor_split([2, 4], dim=1)
            if self.mode == "sample":
                log_c_GK = log_c_GK - self._log_exponential(log_c_GK, step)
            value = generalized_loss(a_new_BK, log_negatives).mean()
            drift_BK = (a_hat_BK - a_old_BK).abs()
        loss = with_value(value, surrogate(pair, log_c_GK, log_n_G[:, 0], peers, self.max_log_weight))
        metrics |= {
            "loss": value,
            "gamma": gamma_BK.mean(),
            "first_visits": (aux.visits_G[ours] == 0).float().mean(),
            "drift": drift_BK.nanmean().nan_to_num(0.0),
        }
        return LossOutput(loss, a_new_GK, metrics)

    def _gamma(self, visits_B: Tensor, step: int) -> Tensor:
        if self.gamma_schedule == "visits":
            return 1.0 / (visits_B + 1)
        gamma = self.gamma
        if self.gamma_schedule == "cosine":
            progress = min(step / max(self.total_steps, 1), 1.0)
            gamma = self.gamma_min + (1 - self.gamma_min) * 0.5 * (1 + math.cos(math.pi * progress))
        return torch.full_like(visits_B, gamma)

    def _log_exponential(self, like_GK: Tensor, step: int) -> Tensor:
        """log of Exp(1) samples, the same on every rank and on resume: they depend on (seed, step) alone."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        sample_GK = torch.empty(like_GK.shape, dtype=torch.float64).exponential_(generator=generator)
        return sample_GK.clamp(min=1e-30).log().to(like_GK)
