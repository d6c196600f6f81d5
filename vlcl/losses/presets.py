"""The losses by name, each a choice of an E-step and an M-step (docs/losses.md has the table).

A preset is a function of the run (`Span`) and all of its own settings; vlcl/config/losses.py has their types, meanings
and defaults. Where a paper's code and text differ, or neither says, the docs say what we took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlcl.config.by_batch import form_of, gain_of
from vlcl.losses.contrastive import ContrastiveLoss
from vlcl.losses.estep import EStep, Rate
from vlcl.losses.mstep import Temperature
from vlcl.losses.predictors import PREDICTORS, Prototypes
from vlcl.losses.siglip import SigLIPLoss


@dataclass(frozen=True)
class Span:
    """What a schedule depends on. `num_pairs`: N. Lengths in optimizer steps."""

    num_pairs: int
    total_steps: int = 1
    steps_per_epoch: int = 1
    seed: int = 0


def infonce(span: Span) -> ContrastiveLoss:
    return ContrastiveLoss()


def dcl(span: Span) -> ContrastiveLoss:
    return ContrastiveLoss(positive=False)


def siglip(span: Span) -> SigLIPLoss:
    return SigLIPLoss()


def em(
    span: Span,
    *,
    mode: str,
    order: str,
    form: str | None,
    gamma: float | None,
    gamma_schedule: str,
    gamma_min: float,
    log_alpha: float,
    prediction: str | None,
    epsilon: float,
    positive: bool,
    max_log_weight: float | None,
    bank: int,
    bank_negatives: bool,
    temperature: str,
    rho: float,
    tau_lr: float,
    tau: float,
    tau_min: float,
    tau_max: float,
) -> ContrastiveLoss:
    form = form_of(order=order, prediction=prediction) if form is None else form
    predictor = None if prediction is None else PREDICTORS[prediction]()
    of_form = form != "relative" and prediction in (None, "level")  # else the pair's own similarity is in no row
    gain = gain_of() if gamma is None else gamma
    rate = Rate(gamma_schedule, gain, gamma_min, max(span.total_steps, 1), log_alpha=log_alpha)
    return ContrastiveLoss(
        num_pairs=span.num_pairs, estep=EStep(rate, predictor), order=order, form=form, positive=positive,
        epsilon=epsilon, sample=mode == "sample", max_log_weight=max_log_weight, bank=bank,
        bank_negatives=bank_negatives, seed=span.seed,
        temperature=Temperature(temperature, rho, "momentum", tau_lr, tau=tau, tau_min=tau_min, tau_max=tau_max),
        meaning_of_rows=_meaning(
            form="absolute" if of_form else None, prediction=prediction,
            temperature=temperature if temperature == "pair" else None, bank=bank,
        ),
    )  # fmt: skip


def _meaning(**chosen: str | int | None) -> str:
    """In words, the settings that decide what is remembered: those that are chosen other than plain (None, 0)."""
    return ", ".join(f"{name} {value}" for name, value in chosen.items() if value) or "plain"


def _table(span: Span, rate: Rate, temperature: Temperature, epsilon: float) -> ContrastiveLoss:
    """What SogCLR and its descendants share: relative form, positive out, a row updated before it is used."""
    return ContrastiveLoss(span.num_pairs, EStep(rate), temperature, positive=False, epsilon=epsilon)


def _epochs(span: Span, gamma_min: float, share: float) -> Rate:
    """FastCLIP's schedule: a cosine over `share` of the run, constant within an epoch, 1 in the first."""
    every = max(span.steps_per_epoch, 1)
    epochs = max(round(span.total_steps / every * share), 1)
    return Rate("cosine", gamma_min=gamma_min, horizon=epochs * every, every=every)


def sogclr(span: Span, *, gamma: float, epsilon: float) -> ContrastiveLoss:
    return _table(span, Rate(gamma=gamma), Temperature("fixed"), epsilon)


def isogclr(
    span: Span, *, gamma: float, rho: float, tau: float, tau_lr: float, tau_min: float, tau_max: float, epsilon: float
) -> ContrastiveLoss:
    temperature = Temperature("pair", rho, "momentum", tau_lr, tau=tau, tau_min=tau_min, tau_max=tau_max)
    return _table(span, Rate(gamma=gamma), temperature, epsilon)


def fastclip_v1(span: Span, *, gamma_min: float, gamma_epochs: float, epsilon: float) -> ContrastiveLoss:
    return _table(span, _epochs(span, gamma_min, gamma_epochs), Temperature("fixed"), epsilon)


def fastclip_v2(
    span: Span, *, gamma_min: float, gamma_epochs: float, rho: float, tau: float, tau_lr: float, tau_min: float,
    tau_max: float, epsilon: float,
) -> ContrastiveLoss:  # fmt: skip
    temperature = Temperature("pair", rho, "adam", tau_lr, tau=tau, tau_min=tau_min, tau_max=tau_max)
    return _table(span, _epochs(span, gamma_min, gamma_epochs), temperature, epsilon)


def fastclip_v3(span: Span, *, gamma_min: float, gamma_epochs: float, rho: float, epsilon: float) -> ContrastiveLoss:
    return _table(span, _epochs(span, gamma_min, gamma_epochs), Temperature("rho", rho), epsilon)


def scent(span: Span, *, log_alpha: float, rho: float, epsilon: float) -> ContrastiveLoss:
    return _table(span, Rate("adaptive", log_alpha=log_alpha), Temperature("rho", rho), epsilon)


def neuclip(
    span: Span, *, prototypes: int, prototype_steps: int, prototype_lr: float, restart: int, rho: float, epsilon: float
) -> ContrastiveLoss:  # fmt: skip
    estep = EStep(None, Prototypes(prototypes, prototype_steps, prototype_lr, restart))
    return ContrastiveLoss(
        span.num_pairs, estep, Temperature("rho", rho), positive=False, epsilon=epsilon,
        meaning_of_rows=_meaning(prototypes=prototypes),
    )  # fmt: skip


PRESETS: dict[str, Callable[..., ContrastiveLoss | SigLIPLoss]] = {
    "infonce": infonce, "dcl": dcl, "siglip": siglip, "sogclr": sogclr, "isogclr": isogclr, "fastclip-v1": fastclip_v1,
    "fastclip-v2": fastclip_v2, "fastclip-v3": fastclip_v3, "scent": scent, "neuclip": neuclip, "em": em,
}  # fmt: skip
