"""One loss for the whole family: an E-step (estep.py), then an M-step (mstep.py) on the batch's pairs (pairwise.py).

What the names stand for is in presets.py: InfoNCE, DCL, SogCLR, iSogCLR, FastCLIP, SCENT, NeuCLIP and EM are values of
the fields below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlcl.batch import Aux, Features, Keys, Peers
from vlcl.losses.estep import Context, EStep, in_use, log_exponential, log_mean
from vlcl.losses.mstep import (
    LARGEST_LOG_WEIGHT,
    LossOutput,
    Temperature,
    at_least_float32,
    generalized_loss,
    largest_log_weight,
    log_normalizer,
    positive_share,
    with_value,
)
from vlcl.losses.pairs import (
    Candidates,
    Kernels,
    Statistics,
    Sums,
    Weighing,
    captions_of,
    log_count,
    named,
    own_cosines,
    own_cosines_to_train,
)
from vlcl.losses.pairwise import pair_statistics, weighted_sum


@dataclass(frozen=True)
class ContrastiveLoss:
    """Features, peers, aux -> LossOutput; a pure function of these and the step.

    num_pairs: N; None: the batch's own number, as in InfoNCE. order: whether the weights come from the row "before"
    this batch is mixed in or "after". form: similarities "relative" to the pair's own, "absolute" or "balanced".
    positive: whether Z_i has e^{s_ii}. epsilon: floor of the mean of e^h. sample: u ~ Exp(1)/Z instead of its mean.
    max_log_weight: cap on the log of a negative's weight, times tau where the loss is (InfoNCE's weights are below 1).
    bank: how many recent pairs of all ranks the E-step averages over besides the batch; bank_negatives: the M-step too.
    meaning_of_rows: as `Loss` has it. kernels: what sums over pairs. same_caption: whether pairs of one caption are
    each other's "negative", or "ignore" each other; then N - 1 becomes (N - 1) n / (n with them).

    As a loop over the pairs of a world of one, for the direction image to text, n negatives, the E-step of a moving
    average and h[j] = kappa (v[i] @ t[j] - v[i] @ t[i]):

        a_hat = log(epsilon + sum(exp(h[j]) for negatives j) / n)
        a_new = a_hat if isnan(a_old[i]) else log((1 - gamma) * exp(a_old[i]) + gamma * exp(a_hat))
        a = a_old[i] if order == "before" and not isnan(a_old[i]) else a_new
        Z = (positive + (N - 1) * exp(a))                     relative to e^{s_ii}
        u = 1 / Z  or  Exp(1) sample / Z
        surrogate += sum(u * (N - 1) / n * exp(h[j]) * h[j])  with gradient through the last factor only
        value += log(1 + (N - 1) * exp(a_new))

    In the absolute form h[j] = kappa v[i] @ t[j] and surrogate -= pull * kappa v[i] @ t[i], pull = 1 - positive *
    e^{s_ii} * u; balanced: times the batch's sum of u * (N - 1) / n * exp(h[j]) over its sum of pulls.
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
    meaning_of_rows: str = "plain"
    kernels: Kernels = "auto"
    same_caption: str = "negative"

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
            if self.same_caption == "ignore":
                parts["bank_caption"] = torch.zeros(self.bank, dtype=torch.int64)
        return parts

    def __call__(self, features: Features, peers: Peers, aux: Aux | None = None, step: int = 0) -> LossOutput:
        aux = aux or Aux()
        self._check(aux)
        with torch.autocast(features.image_BD.device.type, enabled=False):
            return _Step.of(self, features, peers, aux, step).run()

    @property
    def relative(self) -> bool:
        return self.form == "relative"

    def reference(self, own: Tensor) -> Tensor:
        """What similarities and rows are relative to: kappa cos_ii, or 0 in the absolute form."""
        return own if self.relative else torch.zeros_like(own)

    def _check(self, aux: Aux) -> None:
        missing = [*(set(self.columns) - set(aux.rows)), *(set(self.initial(1)) - set(aux.shared))]
        if missing:
            raise ValueError(
                f"this loss remembers {', '.join(sorted(missing))}: pass aux, what LossState.read(peers.row_G) gives"
            )


@dataclass(frozen=True)
class _Estimate:
    """What the E-step finds: a before this batch is mixed in (NaN: unknown), the batch's own, a after; the rate, and
    what to remember."""

    prior_GK: Tensor
    a_hat_GK: Tensor
    a_GK: Tensor
    update: Aux
    gamma_GK: Tensor


@dataclass(frozen=True)
class _Surrogate:
    """What the M-step finds: a scalar for its gradient, sums of its weights e^{s_ij - offset_i}; positives' weights."""

    objective: Tensor
    sums: Sums
    offset_BK: Tensor
    pull_BK: Tensor


@dataclass(frozen=True)
class _Step:
    """One call of a ContrastiveLoss. own_GK: kappa cos_ii, in units of logits, no gradient. log_n_GK: log of each
    anchor's number of negatives among the candidates, log_batch_GK: in the batch, log_negatives_GK: in all data.
    factor: makes this rank's sum over pairs its part of a mean, as DDP's mean over ranks is one over all pairs."""

    loss: ContrastiveLoss
    aux: Aux
    context: Context
    candidates: Candidates
    image_BD: Tensor
    text_BD: Tensor
    scale_BK: Tensor
    own_GK: Tensor
    log_n_GK: Tensor
    log_batch_GK: Tensor
    log_negatives_GK: Tensor
    factor: float

    @classmethod
    def of(cls, loss: ContrastiveLoss, features: Features, peers: Peers, aux: Aux, step: int) -> _Step:
        image_BD, text_BD = at_least_float32(features.image_BD), at_least_float32(features.text_BD)
        compared = peers.candidates
        parts = {"image": compared.image.to(image_BD.dtype), "text": compared.text.to(text_BD.dtype)}
        parts["row"] = peers.row_G
        if (caption_G := captions_of(peers, loss.same_caption)) is not None:
            parts["caption"] = caption_G
        row_G = named(peers.row_G, caption_G)
        num_own, num_all = len(image_BD), len(peers.row_G)
        scale_BK, scale_GK = loss.temperature.scales(features, peers, aux)
        own_GK = scale_GK * own_cosines(
            peers.image_GD.to(image_BD), peers.text_GD.to(text_BD),
            None if peers.keys is None else Keys(parts["image"], parts["text"]),
        )  # fmt: skip
        context = Context(peers, num_own, step, scale_GK, loss.reference(own_GK), loss.epsilon)
        if loss.bank:
            parts = {name: torch.cat([x, aux.shared[f"bank_{name}"].to(x)]) for name, x in parts.items()}
        row_C = named(parts["row"], parts.get("caption"))
        keys = peers.keys is not None
        candidates = Candidates(parts["image"], parts["text"], row_C, peers.start, num_all, keys)
        log_batch_GK = log_n_GK = log_count(row_G, row_C).to(scale_GK)[:, None].expand(-1, 2)
        if loss.bank:
            log_batch_GK = log_count(row_G, row_G).to(scale_GK)[:, None].expand(-1, 2)
        log_negatives_GK = log_n_GK
        if loss.num_pairs is not None:
            log_negatives_GK = torch.full_like(log_n_GK, math.log(max(loss.num_pairs - 1, 1)))
            if caption_G is not None:  # the share that is left of the candidates stands for that of all data
                log_others_G = log_count(peers.row_G, parts["row"]).to(scale_GK)
                log_negatives_GK = log_negatives_GK + log_n_GK - log_others_G[:, None]
        return cls(
            loss, aux, context, candidates, image_BD, text_BD, scale_BK, own_GK, log_n_GK, log_batch_GK,
            log_negatives_GK, peers.world / num_all,
        )  # fmt: skip

    @property
    def ours(self) -> slice:
        return slice(self.candidates.start, self.candidates.start + self.context.num_own)

    @property
    def row_B(self) -> Tensor:
        """Ours, with captions where these count."""
        return self.candidates.row_C[self.ours]

    def run(self) -> LossOutput:
        prior_GK = self.loss.estep.prior(self.aux, self.context)
        trained = torch.is_grad_enabled() and any(
            x.requires_grad
            for x in (self.image_BD, self.text_BD, self.scale_BK)  # a tower may be locked
        )
        if trained and self.weights_are_known(prior_GK):
            surrogate = self.m_step(prior_GK)
            seen = self.seen_by(surrogate) or self.look()
            estimate = self.e_step(prior_GK, seen)
        else:
            seen = self.look(keep=trained and not self.loss.bank)
            estimate = self.e_step(prior_GK, seen)
            a_GK = in_use(prior_GK, estimate.a_GK, self.loss.order)
            surrogate = self.m_step(a_GK, seen.cosines) if trained else None
        return self.output(seen, estimate, surrogate)

    def weights_are_known(self, prior_GK: Tensor) -> bool:
        """Whether one pass over the tiles does: weights from the rows as they were, a-hat as a by-product of it."""
        loss = self.loss
        single = loss.order == "before" and loss.max_log_weight is None and (loss.bank_negatives or not loss.bank)
        return single and bool(torch.isfinite(prior_GK).all())  # the same answer on every rank: rows are read whole

    def look(self, keep: bool = False) -> Statistics:
        return pair_statistics(
            self.image_BD, self.text_BD, self.row_B, self.candidates, self.scale_BK.detach(), self.loss.kernels, keep
        )

    def seen_by(self, surrogate: _Surrogate) -> Statistics | None:
        """What the weights' sums show; None where one was lost to underflow or to the cap."""
        weight_BK, square_BK = surrogate.sums.weight_BK, surrogate.sums.square_BK
        tiny = torch.finfo(square_BK.dtype).tiny
        kept = (weight_BK < math.exp(LARGEST_LOG_WEIGHT)) & (square_BK >= tiny) & square_BK.isfinite()
        if not bool(kept.all()):
            return None
        return Statistics(weight_BK.log() + surrogate.offset_BK, square_BK.log() + 2 * surrogate.offset_BK)

    def e_step(self, prior_GK: Tensor, seen: Statistics) -> _Estimate:
        ours, log_sum_BK = self.ours, seen.log_sum_BK
        a_hat_BK = log_mean(log_sum_BK, self.log_n_GK[ours], self.context.reference_GK[ours], self.loss.epsilon)
        prior_BK = prior_GK[ours]  # a pair without negatives in the batch keeps what was known of it
        a_hat_BK = torch.where((log_sum_BK == -torch.inf) & prior_BK.isfinite(), prior_BK, a_hat_BK)
        a_hat_GK = self._join(a_hat_BK)
        return _Estimate(prior_GK, a_hat_GK, *self.loss.estep.update(prior_GK, a_hat_GK, self.aux, self.context))

    def m_step(self, a_GK: Tensor, cosines: tuple[Tensor, ...] = ()) -> _Surrogate:
        """The surrogate with the weights of log-normalizers a. `cosines`: what `look` has kept; overwritten."""
        loss, ours, scale_GK = self.loss, self.ours, self.context.scale_GK
        log_c_GK = log_normalizer(
            a_GK, self.own_GK, self.log_negatives_GK, positive=loss.positive, relative=loss.relative
        )
        if loss.sample:  # the same on every rank and on resume: it depends on seed and step alone
            generator = torch.Generator().manual_seed((loss.seed << 32) + self.context.step)
            log_c_GK = log_c_GK - log_exponential(log_c_GK.shape, generator).to(log_c_GK)
        log_m_GK = self.log_n_GK if loss.bank_negatives else self.log_batch_GK
        rest_GK = log_m_GK + log_c_GK - loss.temperature.log_factor(scale_GK)
        weighing = Weighing(
            self.row_B, self.candidates, scale_GK, rest_GK, largest_log_weight(loss.max_log_weight),
            with_bank=loss.bank_negatives, relative=loss.relative, kernels=loss.kernels, cosines=cosines,
        )  # fmt: skip
        total, sums = weighted_sum(self.image_BD, self.text_BD, self.scale_BK, rest_GK[ours], weighing)
        objective, pull_BK = total * self.factor / 2, sums.weight_BK
        if not loss.relative:  # the positive's own term, which the relative form has in every h
            share_BK = positive_share(self.own_GK[ours], log_c_GK[ours], self.log_negatives_GK[ours])
            cos_BK = own_cosines_to_train(self.image_BD, self.text_BD, self.candidates.keys_of(self.context.num_own))
            pull_BK = self.pull((1 - loss.positive * share_BK) * loss.temperature.factor(scale_GK[ours]), pull_BK)
            objective = objective - (pull_BK * self.scale_BK * cos_BK).sum() * self.factor / 2
        return _Surrogate(objective, sums, (self.context.reference_GK + rest_GK)[ours], pull_BK)

    def pull(self, right_BK: Tensor, push_BK: Tensor) -> Tensor:
        """What positives pull with: as is right if rows are; balanced, in all as their negatives push."""
        if self.loss.form == "absolute":
            return right_BK
        right, push = self.context.peers.mean(torch.stack([right_BK.sum(), push_BK.sum()]))
        return right_BK * (push / right.clamp(min=torch.finfo(right.dtype).tiny))

    def output(self, seen: Statistics, estimate: _Estimate, surrogate: _Surrogate | None) -> LossOutput:
        a_BK = self._relative(estimate.a_GK[self.ours])
        value_BK = generalized_loss(a_BK, self.log_negatives_GK[self.ours])
        objective = self._with_temperature(a_BK, value_BK)
        total = objective.detach() if surrogate is None else with_value(objective, surrogate.objective + objective)
        rows = dict(estimate.update.rows)
        if self.loss.temperature.kind == "pair":
            rows |= self._move_temperatures(a_BK, value_BK, surrogate)
        aux = Aux(rows, shared={**estimate.update.shared, **self._fill_bank()})
        metrics = self._metrics(value_BK, seen, estimate)
        return LossOutput(total, aux if rows or aux.shared else None, metrics, value_BK.detach().mean(dim=1))

    def _relative(self, a_BK: Tensor) -> Tensor:
        return a_BK if self.loss.relative else a_BK - self.own_GK[self.ours]

    def _join(self, x_BK: Tensor) -> Tensor:
        return self.context.peers.gather(x_BK.contiguous())

    def _with_temperature(self, a_BK: Tensor, value_BK: Tensor) -> Tensor:
        """The value to report: the generalized loss. For "rho": tau (l + rho), with its gradient to tau."""
        temperature = self.loss.temperature
        if temperature.kind != "rho":
            return value_BK.sum() * self.factor / 2
        log_z_BK = value_BK if self.loss.positive else a_BK
        return ((log_z_BK.detach() + temperature.rho) / self.scale_BK).sum() * self.factor / 2

    def _move_temperatures(self, a_BK: Tensor, value_BK: Tensor, surrogate: _Surrogate | None) -> dict[str, Tensor]:
        temperature = self.loss.temperature
        if surrogate is None:  # frozen weights: temperatures stay
            return {name: self.aux.rows[name] for name in temperature.columns}
        sums, own_BK, scale_BK = surrogate.sums, self.own_GK[self.ours], self.scale_BK.detach()
        factor_BK = temperature.factor(self.context.scale_GK[self.ours])
        mean_h_BK = (scale_BK * sums.cosine_BK - own_BK * surrogate.pull_BK) / factor_BK
        log_z_BK = value_BK if self.loss.positive else a_BK
        return temperature.update(self._join(log_z_BK + temperature.rho - mean_h_BK), self.aux)

    def _fill_bank(self) -> dict[str, Tensor]:
        """This batch in front, the oldest dropped."""
        if not self.loss.bank:
            return {}
        candidates, size = self.candidates, self.loss.bank
        parts = {"image": candidates.image_CD, "text": candidates.text_CD, "row": candidates.row_C}
        if candidates.row_C.dim() == 2:
            parts["row"], parts["caption"] = candidates.row_C.unbind(dim=1)
        return {f"bank_{name}": x[:size].to(self.aux.shared[f"bank_{name}"].dtype) for name, x in parts.items()}

    def _metrics(self, value_BK: Tensor, seen: Statistics, estimate: _Estimate) -> dict[str, Tensor]:
        ours, estep, log_sum_BK = self.ours, self.loss.estep, seen.log_sum_BK
        in_batch_BK = log_sum_BK - self.own_GK[ours] + (self.log_batch_GK - self.log_n_GK)[ours]
        metrics = {
            "loss": value_BK.mean(),
            "infonce": torch.logaddexp(in_batch_BK, torch.zeros_like(in_batch_BK)).mean(),
            "effective_negatives": torch.exp(2 * log_sum_BK - seen.log_square_BK).nan_to_num(0.0).mean(),
        }
        if estep.rate is not None or estep.predictor is not None:
            metrics["drift"] = (estimate.a_hat_GK - estimate.prior_GK)[ours].abs().nanmean().nan_to_num(0.0)
        if estep.rate is not None:
            assert self.aux.visits_G is not None
            metrics["gamma"] = estimate.gamma_GK[ours].mean()
            metrics["first_visits"] = (self.aux.visits_G[ours] == 0).float().mean()
        if self.loss.temperature.kind == "pair":
            metrics["pair_scale"] = self.context.scale_GK[ours].mean()
        return metrics
