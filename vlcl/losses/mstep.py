"""The M-step: a weighted surrogate of the logits whose gradient is the gradient of the generalized loss.

Notation (B, G, D as in vlcl/batch.py). kappa = exp(logit_scale), s_ij = kappa <v_i, t_j>, and relative to the pair's
own similarity h_ij = s_ij - s_ii. The negatives of pair i are the n_i candidates j of another row (a pair that occurs
twice is not its own negative). For the direction image to text, text to image being symmetric:

    generalized loss      l_i = -s_ii + log Z_i = log(1 + (N-1) g_i),    g_i = mean over all negatives of e^{h_ij}
    its gradient          sum_j w_ij grad h_ij,                          w_ij = (N-1)/n_i e^{h_ij} / (1 + (N-1) g_i)

With g_i held at the E-step's estimate, that is the M-step of stochastic EM: the surrogate u_i Z-hat_i is linear in
e^{h_ij}, so any batch of negatives estimates its gradient without bias (Chen et al., NeurIPS 2022). Where the pair's
own similarity stays outside, -s_ii + u_i Z-hat_i (the absolute form), the positive pulls with weight 1, and not with
what its negatives' weights happen to add up to: sum_j w_ij grad s_ij - grad s_ii. With log c_i the
log-normalizer divided by N-1, log w_ij = h_ij - log n_i - log c_i: an offset of kappa cos_ij a pair and direction,
which is all that vlcl/losses/pairwise.py needs to know of both steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlcl.batch import Aux, Features, Peers

# Far above any weight that training survives, and its products and sums over a batch stay finite in float32: the cap
# that is always on.
LARGEST_LOG_WEIGHT = 50.0
LOG_LIMIT = 1000.0  # keeps an offset finite where a pair has no negatives at all


@dataclass(frozen=True)
class LossOutput:
    """`loss`: scalar; its value is this rank's part of the generalized loss, its gradient the surrogate's. The mean
    over ranks (as DDP takes it) of value and gradient is that of one rank holding all G pairs.

    `aux`: what to remember for the rows of the global batch (rows by name, and shared parts); None where the loss
    remembers nothing. `metrics`: scalars of this rank, detached. `pair_loss_B`: the value of each pair, detached; None
    where the loss does not come apart.
    """

    loss: Tensor
    aux: Aux | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    pair_loss_B: Tensor | None = None


@dataclass(frozen=True)
class Temperature:
    """tau = 1 / kappa of each anchor, and how it moves.

    "learned": the model's logit_scale, by its gradient. "fixed": logit_scale, without one. "rho": the loss is
    tau (l + rho) (FastCLIP-v3: robust, the term tau rho holds the temperature up). "pair": one tau a pair and
    direction, in the rows `tau`, of the loss tau_i (l_i + rho), moved by `rule` "momentum" (iSogCLR: m <- (1 - b) m +
    b g; tau -= lr m) or "adam" (FastCLIP-v2), with g clipped to +-5 and tau kept in [tau_min, tau_max]. The gradient of
    the last two is

        d/dtau = l_i + rho - sum_j w_ij h_ij
    """

    kind: str = "learned"
    rho: float = 6.5
    rule: str = "momentum"
    lr: float = 1e-3
    beta: float = 0.9
    tau: float = 0.05
    tau_min: float = 0.01
    tau_max: float = 1.0

    @property
    def columns(self) -> tuple[str, ...]:
        if self.kind != "pair":
            return ()
        return ("tau", "tau_mean", "tau_square") if self.rule == "adam" else ("tau", "tau_mean")

    def scales(self, features: Features, peers: Peers, aux: Aux) -> tuple[Tensor, Tensor]:
        """kappa of our anchors [B, 2], with gradient where it has one, and of all ranks' [G, 2], without."""
        num_own = features.image_BD.shape[0]
        scale = features.logit_scale.to(features.image_BD.dtype)
        if self.kind == "pair":
            scale_GK = 1.0 / self._tau(aux).to(scale)
            own = scale_GK[peers.start : peers.start + num_own]
            return own + 0.0 * scale, scale_GK  # DDP waits for every parameter's gradient, if it is 0
        if self.kind == "fixed":
            scale = scale.detach() + 0.0 * scale
        return scale.expand(num_own, 2), scale.detach().expand(len(peers.row_G), 2)

    def log_factor(self, scale_GK: Tensor) -> Tensor | float:
        """log of the tau that multiplies a pair's loss."""
        return -scale_GK.log() if self.kind in ("rho", "pair") else 0.0

    def factor(self, scale_GK: Tensor) -> Tensor:
        """The tau that multiplies a pair's loss, 1 where none does."""
        return torch.exp(torch.as_tensor(self.log_factor(scale_GK)))

    def _tau(self, aux: Aux) -> Tensor:
        tau_GK = aux.rows["tau"]
        return torch.where(torch.isnan(tau_GK), self.tau, tau_GK)

    def update(self, gradient_GK: Tensor, aux: Aux) -> dict[str, Tensor]:
        """The rows of `kind` "pair" after a visit, `gradient_GK` being d/dtau_i."""
        g = gradient_GK.clamp(-5.0, 5.0)
        mean = aux.rows["tau_mean"].to(g).nan_to_num(0.0)
        if self.rule == "momentum":
            mean = (1 - self.beta) * mean + self.beta * g
            tau = self._tau(aux).to(g) - self.lr * mean
            return {"tau": tau.clamp(self.tau_min, self.tau_max), "tau_mean": mean}
        assert aux.visits_G is not None
        visits = (aux.visits_G.to(g) + 1)[:, None]
        square = aux.rows["tau_square"].to(g).nan_to_num(0.0)
        mean, square = self.beta * mean + (1 - self.beta) * g, 0.98 * square + 0.02 * g * g
        direction = mean / (1 - self.beta**visits) / ((square / (1 - 0.98**visits)).sqrt() + 1e-8)
        tau = (self._tau(aux).to(g) - self.lr * direction).clamp(self.tau_min, self.tau_max)
        return {"tau": tau, "tau_mean": mean, "tau_square": square}


def generalized_loss(a: Tensor, log_num_negatives: Tensor | float) -> Tensor:
    """-s_ii + log Z_i = log(1 + (N-1) e^a), elementwise, a in relative form."""
    # Not softplus: past its threshold (20) it returns its argument, which float64 can tell from the truth.
    return torch.logaddexp(a + log_num_negatives, torch.zeros_like(a))


def log_normalizer(
    a: Tensor, own: Tensor, log_num_negatives: Tensor | float, *, positive: bool, relative: bool
) -> Tensor:
    """log c = log(Z / (N-1)), in the form of a. Z = (N-1) e^a, and the pair's own e^{s_ii} where `positive`; `own`:
    s_ii, 0 as seen from itself (`relative`)."""
    if not positive:
        log_c = a
    elif relative:
        log_c = generalized_loss(a, log_num_negatives) - log_num_negatives
    else:
        log_c = torch.logaddexp(own - log_num_negatives, a)
    return log_c.clamp(-LOG_LIMIT, LOG_LIMIT)


def positive_share(own: Tensor, log_c: Tensor, log_num_negatives: Tensor | float) -> Tensor:
    """e^{s_ii} / Z in the absolute form: the weight of the pair's own term."""
    return torch.exp(own - log_c - log_num_negatives)


def largest_log_weight(max_log_weight: float | None) -> float:
    """The cap on a negative's log weight: the one that was chosen, if it is below the one that is always on."""
    return LARGEST_LOG_WEIGHT if max_log_weight is None else min(max_log_weight, LARGEST_LOG_WEIGHT)


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def with_value(value: Tensor, gradient_of: Tensor) -> Tensor:
    """A scalar that reads as `value` and differentiates as `gradient_of`."""
    return value.detach() + (gradient_of - gradient_of.detach())
