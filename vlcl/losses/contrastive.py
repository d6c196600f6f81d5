"""One loss for the whole family: an E-step (estep.py), then an M-step (mstep.py) on the batch's pairs (pairwise.py).

What the names stand for is in presets.py: InfoNCE, DCL, SogCLR, iSogCLR, FastCLIP, SCENT, NeuCLIP and EM are values of
the fields below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlcl.batch import Aux, Features, Peers
from vlcl.losses.estep import Context, EStep, generalized_loss, log_exponential, log_normalizer
from vlcl.losses.mstep import LARGEST_LOG_WEIGHT, LossOutput, Temperature, at_least_float32, with_value
from vlcl.losses.pairs import Candidates, Sums, Weighing
from vlcl.losses.pairwise import pair_statistics, row_dot, weighted_sum

LOG_LIMIT = 1000.0  # keeps an offset finite where a pair has no negatives at all


@dataclass(frozen=True)
class ContrastiveLoss:
    """Features, peers, aux -> LossOutput; a pure function of these and the step.

    num_pairs: N; None: the batch's own number, as in InfoNCE. order: whether the weights come from the row "before"
    this batch is mixed in or "after". form: similarities "relative" to the pair's own, or "absolute". positive: whether
    Z_i has the pair's own e^{s_ii}. epsilon: floor of the mean of e^h. sample: u ~ Exp(1)/Z instead of its mean.
    max_log_weight: cap on the log of a negative's weight, times tau where the loss is (InfoNCE's weights are below 1).
    bank: how many recent pairs of all ranks the E-step averages over besides the batch; bank_negatives: the M-step too.

    As a loop over the pairs of a world of one, for the direction image to text, n negatives, the E-step of a moving
    average and h[j] = kappa (v[i] @ t[j] - v[i] @ t[i]):

        a_hat = log(epsilon + sum(exp(h[j]) for negatives j) / n)
        a_new = a_hat if isnan(a_old[i]) else log((1 - gamma) * exp(a_old[i]) + gamma * exp(a_hat))
        a = a_old[i] if order == "before" and not isnan(a_old[i]) else a_new
        Z = (positive + (N - 1) * exp(a))                     relative to e^{s_ii}
        u = 1 / Z  or  Exp(1) sample / Z
        surrogate += sum(u * (N - 1) / n * exp(h[j]) * h[j])  with gradient through the last factor only
        value += log(1 + (N - 1) * exp(a_new))
    """

    num_pairs: int | None = None
    estep: EStep = field(default_factory=EStep)
    temperature: Temperature = field(default_factory=Temperature)
    order: str = "after"
    form: str = "relative"
    positive: bool = True
    epsilon: float = 0.0
    sample: bool = False
    max_log_weight: float | None = None
    bank: int = 0
    bank_negatives: bool = False
    seed: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the rows that it remembers."""
        return (*self.estep.columns, *self.temperature.columns)

    def initial(self, width: int) -> dict[str, Tensor]:
        """The shared parts that it remembers, at the start; `width`: D."""
        parts = self.estep.initial(width)
        if self.bank:
            parts |= {
                "bank_image": torch.zeros(self.bank, width),
                "bank_text": torch.zeros(self.bank, width),
                "bank_row": torch.full((self.bank,), -1),
            }
        return parts

    def __call__(self, features: Features, peers: Peers, aux: Aux | None = None, step: int = 0) -> LossOutput:
        aux = aux or Aux()
        self._check(aux)
        with torch.autocast(features.image_BD.device.type, enabled=False):
            return _Step(self, features, peers, aux, step).run()

    def _check(self, aux: Aux) -> None:
        missing = [*(set(self.columns) - set(aux.rows)), *(set(self.initial(1)) - set(aux.shared))]
        if missing:
            raise ValueError(
                f"this loss remembers {', '.join(sorted(missing))}: pass aux, what LossState.read(peers.row_G) gives"
            )


class _Step:
    """One call of a ContrastiveLoss: the tensors that its parts share."""

    def __init__(self, loss: ContrastiveLoss, features: Features, peers: Peers, aux: Aux, step: int) -> None:
        self.loss, self.peers, self.aux = loss, peers, aux
        self.image_BD, self.text_BD = at_least_float32(features.image_BD), at_least_float32(features.text_BD)
        num_own, num_all = self.image_BD.shape[0], len(peers.row_G)
        self.ours = slice(peers.start, peers.start + num_own)
        self.row_B = peers.row_G[self.ours]
        self.scale_BK, self.scale_GK = loss.temperature.scales(features, peers, aux)
        image_GD, text_GD = peers.image_GD.to(self.image_BD.dtype), peers.text_GD.to(self.text_BD.dtype)
        self.own_GK = self.scale_GK * row_dot(image_GD, text_GD)  # kappa cos_ii, in units of logits; no gradient
        self.own_BK = self.own_GK[self.ours]
        self.relative = loss.form == "relative"
        self.reference_GK = self.own_GK if self.relative else torch.zeros_like(self.own_GK)
        self.reference_BK = self.reference_GK[self.ours]
        self.context = Context(peers, num_own, step, self.scale_GK, self.reference_GK, loss.epsilon)
        parts = {"image": image_GD, "text": text_GD, "row": peers.row_G}
        if loss.bank:
            parts = {name: torch.cat([x, aux.shared[f"bank_{name}"].to(x)]) for name, x in parts.items()}
        self.candidates = Candidates(parts["image"], parts["text"], parts["row"], peers.start, num_all)
        self.factor = peers.world / num_all  # DDP's mean over ranks of this rank's sums is the mean over all pairs
        self.log_n_GK = _log_count(peers.row_G, self.candidates.row_C).to(self.scale_GK)[:, None].expand(-1, 2)
        self.log_batch_GK = _log_count(peers.row_G, peers.row_G).to(self.scale_GK)[:, None].expand(-1, 2)

    def run(self) -> LossOutput:
        loss, prior_GK = self.loss, self.loss.estep.prior(self.aux, self.context)
        if loss.num_pairs is None:
            self.log_negatives_GK = self.log_n_GK
        else:
            self.log_negatives_GK = torch.full_like(self.log_n_GK, math.log(max(loss.num_pairs - 1, 1)))
        differentiable = (self.image_BD, self.text_BD, self.scale_BK)  # a tower may be locked
        weigh = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
        surrogate, sums = None, None
        if weigh and self._weights_are_known(prior_GK):
            surrogate, sums = self._weigh(prior_GK)
            log_sum_BK, log_square_BK = self._log_sums(sums)
            a_hat_GK = self._join(self._a_hat(log_sum_BK, prior_GK[self.ours]))
            a_GK, update, gamma_GK = loss.estep.update(prior_GK, a_hat_GK, self.aux, self.context)
        else:
            log_sum_BK, log_square_BK = self._log_sums(None)
            a_hat_GK = self._join(self._a_hat(log_sum_BK, prior_GK[self.ours]))
            a_GK, update, gamma_GK = loss.estep.update(prior_GK, a_hat_GK, self.aux, self.context)
            known = torch.isfinite(prior_GK) & (loss.order == "before")
            if weigh:
                surrogate, sums = self._weigh(torch.where(known, prior_GK, a_GK))
        a_BK = a_GK[self.ours]
        value_BK = generalized_loss(self._relative(a_BK), self.log_negatives_GK[self.ours])
        rows = dict(update.rows)
        if loss.temperature.kind == "pair":
            rows |= self._move_temperatures(a_GK, sums)
        out_aux = Aux(rows, shared={**update.shared, **self._fill_bank()})
        metrics = self._metrics(value_BK, log_sum_BK, log_square_BK, a_hat_GK, prior_GK, gamma_GK)
        objective = self._with_temperature(a_BK, value_BK)
        total = objective.detach() if surrogate is None else with_value(objective, surrogate + objective)
        return LossOutput(total, out_aux if rows or out_aux.shared else None, metrics)

    def _weights_are_known(self, prior_GK: Tensor) -> bool:
        """Whether one pass over the tiles does: weights from the rows as they were, a-hat as a by-product of it."""
        loss = self.loss
        single = loss.order == "before" and loss.max_log_weight is None and (loss.bank_negatives or not loss.bank)
        return single and bool(torch.isfinite(prior_GK).all())  # the same answer on every rank: rows are read whole

    def _weigh(self, a_GK: Tensor) -> tuple[Tensor, Sums]:
        """The surrogate with the weights of log-normalizers a, and its sums."""
        loss = self.loss
        log_c_GK = self._log_c(a_GK).clamp(-LOG_LIMIT, LOG_LIMIT)
        if loss.sample:
            log_c_GK = log_c_GK - log_exponential(tuple(log_c_GK.shape), loss.seed, self.context.step).to(log_c_GK)
        log_m_GK = self.log_n_GK if loss.bank_negatives else self.log_batch_GK
        rest_GK = log_m_GK + log_c_GK - loss.temperature.log_factor(self.scale_GK)
        self.offset_BK = (self.reference_GK + rest_GK)[self.ours]
        cap = LARGEST_LOG_WEIGHT if loss.max_log_weight is None else min(loss.max_log_weight, LARGEST_LOG_WEIGHT)
        weighing = Weighing(
            self.row_B, self.candidates, self.scale_GK, rest_GK, cap, with_bank=loss.bank_negatives,
            relative=self.relative,
        )  # fmt: skip
        total, sums = weighted_sum(self.image_BD, self.text_BD, self.scale_BK, rest_GK[self.ours], weighing)
        surrogate = total * self.factor / 2
        if not self.relative:  # the positive's own term, which the relative form has in every h
            own_weight_BK = torch.exp(self.own_BK - log_c_GK[self.ours] - self.log_negatives_GK[self.ours])
            own_BK = self.scale_BK * (self.image_BD * self.text_BD).sum(dim=1, keepdim=True)
            own_BK = own_BK * torch.exp(torch.as_tensor(loss.temperature.log_factor(self.scale_GK[self.ours])))
            surrogate = surrogate - ((1 - loss.positive * own_weight_BK) * own_BK).sum() * self.factor / 2
        return surrogate, sums

    def _log_sums(self, sums: Sums | None) -> tuple[Tensor, Tensor]:
        """log sum_j e^{s_ij} and log sum_j e^{2 s_ij} of our anchors: off the weights' sums where there are some, and
        no weight was lost to underflow or to the cap."""
        if sums is not None:
            square_BK, tiny = sums.square_BK, torch.finfo(sums.square_BK.dtype).tiny
            kept = (sums.weight_BK < math.exp(LARGEST_LOG_WEIGHT)) & (square_BK >= tiny) & square_BK.isfinite()
            if bool(kept.all()):
                return sums.weight_BK.log() + self.offset_BK, square_BK.log() + 2 * self.offset_BK
        found = pair_statistics(self.image_BD, self.text_BD, self.row_B, self.candidates, self.scale_BK.detach())
        return found.log_sum_BK, found.log_square_BK

    def _log_c(self, a_GK: Tensor) -> Tensor:
        log_negatives_GK = self.log_negatives_GK
        if self.relative or not self.loss.positive:
            return log_normalizer(a_GK, log_negatives_GK, self.loss.positive)
        return torch.logaddexp(self.own_GK - log_negatives_GK, a_GK)

    def _a_hat(self, log_sum_BK: Tensor, prior_BK: Tensor) -> Tensor:
        """The batch's estimate; a pair without negatives in it keeps what was known of it."""
        a_hat_BK = log_sum_BK - self.reference_BK - self.log_n_GK[self.ours]
        if self.loss.epsilon > 0:
            a_hat_BK = torch.logaddexp(a_hat_BK, torch.full_like(a_hat_BK, math.log(self.loss.epsilon)))
        return torch.where((log_sum_BK == -torch.inf) & prior_BK.isfinite(), prior_BK, a_hat_BK)

    def _relative(self, a_BK: Tensor) -> Tensor:
        return a_BK if self.relative else a_BK - self.own_BK

    def _join(self, x_BK: Tensor) -> Tensor:
        return self.peers.gather(x_BK.contiguous())

    def _with_temperature(self, a_BK: Tensor, value_BK: Tensor) -> Tensor:
        """The value to report: the generalized loss. For "rho": tau (l + rho), with its gradient to tau."""
        temperature = self.loss.temperature
        if temperature.kind != "rho":
            return value_BK.sum() * self.factor / 2
        log_z_BK = value_BK if self.loss.positive else self._relative(a_BK)
        return ((log_z_BK.detach() + temperature.rho) / self.scale_BK).sum() * self.factor / 2

    def _move_temperatures(self, a_GK: Tensor, sums: Sums | None) -> dict[str, Tensor]:
        if sums is None:  # frozen weights: temperatures stay
            return {name: self.aux.rows[name] for name in self.loss.temperature.columns}
        factor_BK = torch.exp(torch.as_tensor(self.loss.temperature.log_factor(self.scale_GK[self.ours])))
        own_BK, scale_BK = self.own_BK, self.scale_BK.detach()
        mean_h_BK = (scale_BK * sums.cosine_BK - own_BK * sums.weight_BK) / factor_BK
        a_BK = self._relative(a_GK[self.ours])
        log_z_BK = generalized_loss(a_BK, self.log_negatives_GK[self.ours]) if self.loss.positive else a_BK
        gradient_GK = self._join(log_z_BK + self.loss.temperature.rho - mean_h_BK)
        return self.loss.temperature.update(gradient_GK, self.aux)

    def _fill_bank(self) -> dict[str, Tensor]:
        """This batch in front, the oldest dropped."""
        if not self.loss.bank:
            return {}
        candidates, size = self.candidates, self.loss.bank
        parts = {"image": candidates.image_CD, "text": candidates.text_CD, "row": candidates.row_C}
        return {f"bank_{name}": x[:size].to(self.aux.shared[f"bank_{name}"].dtype) for name, x in parts.items()}

    def _metrics(
        self, value_BK: Tensor, log_sum_BK: Tensor, log_square_BK: Tensor, a_hat_GK: Tensor, prior_GK: Tensor,
        gamma_GK: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        in_batch_BK = log_sum_BK - self.own_BK + (self.log_batch_GK - self.log_n_GK)[self.ours]
        metrics = {
            "loss": value_BK.mean(),
            "infonce": torch.logaddexp(in_batch_BK, torch.zeros_like(in_batch_BK)).mean(),
            "effective_negatives": torch.exp(2 * log_sum_BK - log_square_BK).nan_to_num(0.0).mean(),
        }
        if self.loss.estep.rate is not None or self.loss.estep.predictor is not None:
            metrics["drift"] = (a_hat_GK - prior_GK)[self.ours].abs().nanmean().nan_to_num(0.0)
        if self.loss.estep.rate is not None:
            assert self.aux.visits_G is not None
            metrics["gamma"] = gamma_GK[self.ours].mean()
            metrics["first_visits"] = (self.aux.visits_G[self.ours] == 0).float().mean()
        if self.loss.temperature.kind == "pair":
            metrics["pair_scale"] = self.scale_GK[self.ours].mean()
        return metrics


def _log_count(row_G: Tensor, row_C: Tensor) -> Tensor:
    """log of how many candidates are negatives of each pair (0 where none is): those there, less those of its row."""
    sorted_C = row_C.sort().values
    same_G = torch.searchsorted(sorted_C, row_G, right=True) - torch.searchsorted(sorted_C, row_G)
    return ((row_C >= 0).sum() - same_G).clamp(min=1).double().log()
