"""The E-step: how a pair's log-normalizer is estimated. In relative form and in logarithms (vlcl/losses/mstep.py):

    a_i = log(epsilon + mean over negatives of e^{h_ij})      (e^{h} is never formed unshifted: kappa may be 100)

With the augmentation 1/Z_i = integral of e^{-u_i Z_i} du_i, the auxiliary variable u_i given the model is exponential
with rate Z_i (Chen et al., NeurIPS 2022), so E[u_i] = 1/Z_i. Every estimator here is a prediction plus a remembered
residual, a row a pair, each of them optional (vlcl/losses/predictors.py has the predictions):

    a_i = prediction_i + r_i,      e^{r_i} <- (1 - gamma) e^{r_i} + gamma e^{a_hat_i - prediction_i}

| prediction | residual | |
|---|---|---|
| none | none | the batch itself: InfoNCE, DCL |
| none | remembered | a moving average of e^a: SogCLR, FastCLIP, SCENT |
| Level: the running mean of a over pairs | remembered | the same, corrected for the drift since a row's last visit |
| Similarity: -s_ii of now; Level with it | remembered | EM's default: a row keeps what only a visit can tell |
| Prototypes: of the embeddings | none, or remembered | NeuCLIP, or with each row's own correction |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vlcl.batch import Aux, Peers


@dataclass(frozen=True)
class Context:
    """What a prediction may look at. `scale_GK`: kappa of each anchor; `reference_GK`: what e^{s_ij} is relative to
    (kappa cos_ii; 0 in the absolute form); `epsilon` as in the file's header."""

    peers: Peers
    num_own: int
    step: int
    scale_GK: Tensor
    reference_GK: Tensor
    epsilon: float


class Predictor(Protocol):
    estimates: ClassVar[bool]
    """whether what it predicts is an estimate of a by itself, for a row that was never visited"""

    def initial(self, width: int) -> dict[str, Tensor]:
        """Shared parts at the start; `width`: D."""
        ...

    def predict(self, shared: dict[str, Tensor], context: Context) -> Tensor:
        """[G, 2]; NaN while there is nothing to predict from."""
        ...

    def update(self, shared: dict[str, Tensor], a_hat_GK: Tensor, context: Context) -> dict[str, Tensor]:
        """The shared parts after this batch."""
        ...


@dataclass(frozen=True)
class Rate:
    """gamma, the weight of the batch in a row's average; a row's first visit always takes 1.

    "constant": gamma. "cosine": from 1 at step 0 down to gamma_min at `horizon` steps, constant within every `every`
    steps (FastCLIP: an epoch). "visits": 1 / visits of the row, a running mean. "adaptive": sigmoid(a + log_alpha), a
    the row's value: SCENT's proximal mirror descent nu <- nu + log(1 + alpha e^{a_hat}) - log(1 + alpha e^{nu}).
    "sgd": no average but a <- a - gamma (1 - e^{a_hat - a}), upwards at most to a_hat: the exponential would overshoot
    by thousands, and a row comes down by gamma a visit at most.
    """

    kind: str = "constant"
    gamma: float = 0.8
    gamma_min: float = 0.2
    horizon: int = 1
    every: int = 1
    log_alpha: float = 10.0

    def of(self, a_GK: Tensor, visits_G: Tensor, step: int) -> Tensor:
        if self.kind == "adaptive":
            return torch.sigmoid(a_GK + self.log_alpha)
        if self.kind == "visits":
            return (1.0 / (visits_G.to(a_GK.dtype) + 1))[:, None].expand_as(a_GK)
        gamma = self.gamma
        if self.kind == "cosine":
            progress = min(step // self.every * self.every / self.horizon, 1.0)
            gamma = self.gamma_min + (1 - self.gamma_min) * 0.5 * (1 + math.cos(math.pi * progress))
        return torch.full_like(a_GK, gamma)

    def mix(self, old_GK: Tensor, new_GK: Tensor, gamma_GK: Tensor) -> Tensor:
        """The row after its visit; `old_GK` NaN where there was none."""
        if self.kind == "sgd":
            mixed_GK = old_GK - gamma_GK * (1 - torch.exp((new_GK - old_GK).clamp(max=20.0)))
            mixed_GK = torch.where(new_GK > old_GK, torch.minimum(mixed_GK, new_GK), mixed_GK)
        else:
            mixed_GK = moving_average(old_GK, new_GK, gamma_GK)
        return torch.where(torch.isnan(old_GK), new_GK, mixed_GK)


def moving_average(old: Tensor, new: Tensor, gamma: Tensor) -> Tensor:
    """log((1 - gamma) e^old + gamma e^new)."""
    return torch.logaddexp(torch.log1p(-gamma) + old, gamma.log() + new)


@dataclass(frozen=True)
class EStep:
    """`rate` None: nothing is remembered for a row."""

    rate: Rate | None = None
    predictor: Predictor | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.rate is None else ("residual",)

    def initial(self, width: int) -> dict[str, Tensor]:
        return {} if self.predictor is None else self.predictor.initial(width)

    def prior(self, aux: Aux, context: Context) -> Tensor:
        """a_GK before this batch is mixed in; NaN where nothing is known of a pair."""
        shape = context.scale_GK
        if self.predictor is not None:
            prior_GK = self.predictor.predict(aux.shared, context).to(shape)
            if self.rate is None:
                return prior_GK
            residual_GK = aux.rows["residual"].to(shape)
            return prior_GK + (residual_GK.nan_to_num(0.0) if self.predictor.estimates else residual_GK)
        return torch.full_like(shape, torch.nan) if self.rate is None else aux.rows["residual"].to(shape)

    def update(self, prior_GK: Tensor, a_hat_GK: Tensor, aux: Aux, context: Context) -> tuple[Tensor, Aux, Tensor]:
        """a_GK after this batch, what to remember, and gamma_GK."""
        shared, predicted_GK = {}, torch.zeros_like(a_hat_GK)
        if self.predictor is not None:
            shared = self.predictor.update(aux.shared, a_hat_GK, context)
            predicted_GK = self.predictor.predict(shared, context).to(a_hat_GK)
        if self.rate is None:
            a_GK = a_hat_GK if self.predictor is None else predicted_GK
            return a_GK, Aux(shared=shared), torch.ones_like(a_GK)
        old_GK = aux.rows["residual"].to(a_hat_GK)
        assert aux.visits_G is not None
        gamma_GK = self.rate.of(prior_GK, aux.visits_G, context.step)
        residual_GK = self.rate.mix(old_GK, a_hat_GK - predicted_GK, gamma_GK)
        gamma_GK = torch.where(torch.isnan(old_GK), 1.0, gamma_GK)
        return predicted_GK + residual_GK, Aux({"residual": residual_GK}, shared=shared), gamma_GK


def log_mean(log_sum: Tensor, log_count: Tensor | float, reference: Tensor, epsilon: float) -> Tensor:
    """a_hat = log(epsilon + mean over the negatives at hand of e^{s_ij - reference_i}), from the log of their sum of
    e^{s_ij} and of their number."""
    return floored(log_sum - reference - log_count, epsilon)


def floored(a: Tensor, epsilon: float) -> Tensor:
    """log(epsilon + e^a)."""
    return torch.logaddexp(a, torch.full_like(a, math.log(epsilon))) if epsilon > 0 else a


def in_use(prior: Tensor, a: Tensor, order: str) -> Tensor:
    """The a that weighs: from "before" the batch was mixed in, where there is one, or from "after"."""
    return torch.where(torch.isfinite(prior) & (order == "before"), prior, a)


def log_exponential(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """log of Exp(1) samples, float64, on the CPU as `generator` is."""
    return torch.empty(shape, dtype=torch.float64).exponential_(generator=generator).clamp(min=1e-30).log()
