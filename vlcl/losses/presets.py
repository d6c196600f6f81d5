"""The losses by name, each a choice of an E-step and an M-step (docs/losses.md has the table).

A preset is a function of the run (`Span`) and its own settings; vlcl/config/losses.py has their types and meanings.
Where a paper's code and text differ, or neither says, the docs say what we took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlcl.losses.contrastive import ContrastiveLoss
from vlcl.losses.estep import EStep, Level, Rate
from vlcl.losses.mstep import Temperature
from vlcl.losses.prototypes import Prototypes
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
    mode: str = "mean",
    order: str = "after",
    form: str = "relative",
    gamma: float = 0.8,
    gamma_schedule: str = "constant",
    gamma_min: float = 0.2,
    log_alpha: float = 10.0,
    prediction: str | None = None,
    epsilon: float = 1e-8,
    positive: bool = True,
    max_log_weight: float | None = None,
    bank: int = 0,
    bank_negatives: bool = False,
    temperature: str = "learned",
    rho: float = 6.5,
    tau_lr: float = 1e-3,
    tau: float = 0.05,
    tau_min: float = 0.01,
    tau_max: float = 1.0,
) -> ContrastiveLoss:
    predictor = {None: None, "level": Level(), "prototypes": Prototypes()}[prediction]
    rate = Rate(gamma_schedule, gamma, gamma_min, max(span.total_steps, 1), log_alpha=log_alpha)
    return ContrastiveLoss(
        num_pairs=span.num_pairs, estep=EStep(rate, predictor), order=order, form=form, positive=positive,
        epsilon=epsilon, sample=mode == "sample", max_log_weight=max_log_weight, bank=bank,
        bank_negatives=bank_negatives, seed=span.seed,
        temperature=Temperature(temperature, rho, "momentum", tau_lr, tau=tau, tau_min=tau_min, tau_max=tau_max),
    )  # fmt: skip


def _table(span: Span, rate: Rate, temperature: Temperature, epsilon: float) -> ContrastiveLoss:
    """What SogCLR and its descendants share: relative form, positive out, a row updated before it is used."""
    return ContrastiveLoss(span.num_pairs, EStep(rate), temperature, positive=False, epsilon=epsilon)


def _epochs(span: Span, gamma_min: float, share: float) -> Rate:
    """FastCLIP's schedule: a cosine over `share` of the run, constant within an epoch, 1 in the first."""
    every = max(span.steps_per_epoch, 1)
    epochs = max(round(span.total_steps / every * share), 1)
    return Rate("cosine", gamma_min=gamma_min, horizon=epochs * every, every=every)


def sogclr(span: Span, *, gamma: float = 0.9, epsilon: float = 1e-14) -> ContrastiveLoss:
    return _table(span, Rate(gamma=gamma), Temperature("fixed"), epsilon)


def isogclr(
    span: Span, *, gamma: float = 0.8, rho: float = 6.0, tau: float = 0.01, tau_lr: float = 1e-3,
    tau_min: float = 0.005, tau_max: float = 0.05, epsilon: float = 1e-10,
) -> ContrastiveLoss:  # fmt: skip
    temperature = Temperature("pair", rho, "momentum", tau_lr, tau=tau, tau_min=tau_min, tau_max=tau_max)
    return _table(span, Rate(gamma=gamma), temperature, epsilon)


def fastclip_v1(
    span: Span, *, gamma_min: float = 0.2, gamma_epochs: float = 0.5, epsilon: float = 1e-14
) -> ContrastiveLoss:
    return _table(span, _epochs(span, gamma_min, gamma_epochs), Temperature("fixed"), epsilon)


def fastclip_v2(
    span: Span, *, gamma_min: float = 0.2, gamma_epochs: float = 0.5, rho: float = 7.0, tau: float = 0.03,
    tau_lr: float = 0.0133, tau_min: float = 0.01, tau_max: float = 1.0, epsilon: float = 1e-14,
) -> ContrastiveLoss:  # fmt: skip
    temperature = Temperature("pair", rho, "adam", tau_lr, tau=tau, tau_min=tau_min, tau_max=tau_max)
    return _table(span, _epochs(span, gamma_min, gamma_epochs), temperature, epsilon)


def fastclip_v3(
    span: Span, *, gamma_min: float = 0.2, gamma_epochs: float = 0.5, rho: float = 6.5, epsilon: float = 1e-14
) -> ContrastiveLoss:
    return _table(span, _epochs(span, gamma_min, gamma_epochs), Temperature("rho", rho), epsilon)


def scent(span: Span, *, log_alpha: float = 10.0, rho: float = 6.5, epsilon: float = 1e-14) -> ContrastiveLoss:
    return _table(span, Rate("adaptive", log_alpha=log_alpha), Temperature("rho", rho), epsilon)


def neuclip(
    span: Span, *, prototypes: int = 4096, prototype_steps: int = 10, prototype_lr: float = 0.01, restart: int = 500,
    rho: float = 6.5, epsilon: float = 1e-14,
) -> ContrastiveLoss:  # fmt: skip
    estep = EStep(None, Prototypes(prototypes, prototype_steps, prototype_lr, restart))
    return ContrastiveLoss(span.num_pairs, estep, Temperature("rho", rho), positive=False, epsilon=epsilon)


PRESETS: dict[str, Callable[..., Any]] = {
    "infonce": infonce, "dcl": dcl, "siglip": siglip, "sogclr": sogclr, "isogclr": isogclr, "fastclip-v1": fastclip_v1,
    "fastclip-v2": fastclip_v2, "fastclip-v3": fastclip_v3, "scent": scent, "neuclip": neuclip, "em": em,
}  # fmt: skip
