"""The contrastive losses: each is an E-step (how a pair's log-normalizer is estimated, estep.py) and an M-step (which
surrogate of the logits it weights, mstep.py), put together in contrastive.py; presets.py has them by name.

A loss is called as `loss(features, peers, aux, step)` and returns a `LossOutput`. It is a pure function of these:
no process group, no table, no config inside. `features` carry gradient, `peers` never do. What it remembers from step
to step is `aux`, which vlcl/loss_state.py keeps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from vlcl.batch import Aux, Features, Peers
from vlcl.config.losses import default_settings
from vlcl.losses.contrastive import ContrastiveLoss
from vlcl.losses.mstep import LossOutput
from vlcl.losses.pairs import Kernels
from vlcl.losses.presets import PRESETS, Span
from vlcl.losses.siglip import SigLIPLoss

__all__ = ["PRESETS", "ContrastiveLoss", "Loss", "LossOutput", "SigLIPLoss", "Span", "build_loss"]

Setting = str | float | bool | None


class Loss(Protocol):
    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what it remembers a row, two floats each (one a direction)."""
        ...

    @property
    def meaning_of_rows(self) -> str:
        """What the remembered numbers stand for, in words, where losses of one name differ in it: those of other
        settings have the same names and shapes, perhaps. Checkpoints are told apart by it."""
        ...

    def initial(self, width: int) -> dict[str, Tensor]:
        """What it remembers besides rows, at the start of a run; `width`: D."""
        ...

    def __call__(self, features: Features, peers: Peers, aux: Aux | None = None, step: int = 0) -> LossOutput: ...


def build_loss(
    name: str, *, num_pairs: int, total_steps: int = 1, steps_per_epoch: int = 1, seed: int = 0,
    kernels: Kernels = "auto", same_caption: str = "negative", **settings: Setting,
) -> ContrastiveLoss | SigLIPLoss:  # fmt: skip
    """The loss called `name` for a data set of `num_pairs` pairs and a run of `total_steps` steps.

    `settings` are the loss's own (the fields of its config block, which has their defaults). Raises KeyError for an
    unknown name, TypeError for a setting that the loss does not have. `gamma` and `form` of `em`, where they are not
    given, are those for a batch of 16; `gain_of(pairs)` and `form_of(pairs)` of vlcl/config/by_batch.py have others.
    `kernels`: what sums over pairs on CUDA. `same_caption`: whether pairs of one caption are each other's "negative",
    or "ignore" each other.
    """
    span = Span(num_pairs, total_steps, steps_per_epoch, seed)
    loss = replace(PRESETS[name](span, **{**default_settings(name), **settings}), kernels=kernels)
    if same_caption == "negative":
        return loss
    meaning = f"{loss.meaning_of_rows}, same captions ignored" if loss.columns else loss.meaning_of_rows
    return replace(loss, same_caption=same_caption, meaning_of_rows=meaning)
