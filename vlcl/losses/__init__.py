"""The contrastive losses: each is an E-step (how a pair's log-normalizer is estimated, estep.py) and an M-step (which
surrogate of the logits it weights, mstep.py). This file is the registry.

A loss is called as `loss(features, peers, aux, step)` and returns a `LossOutput`. It is a pure function of these:
no process group, no table, no config inside. `features` carry gradient, `peers` never do.
"""

from __future__ import annotations

from typing import Any, Protocol

from vlcl.batch import Aux, Features, Peers
from vlcl.losses.em import EMLoss
from vlcl.losses.infonce import InfoNCELoss
from vlcl.losses.mstep import LossOutput

__all__ = ["LOSSES", "EMLoss", "InfoNCELoss", "Loss", "LossOutput", "build_loss"]


class Loss(Protocol):
    num_columns: int  # auxiliary columns a pair; 0: no table

    def __call__(self, features: Features, peers: Peers, aux: Aux | None = None, step: int = 0) -> LossOutput: ...


LOSSES: dict[str, type[Any]] = {"infonce": InfoNCELoss, "em": EMLoss}


def build_loss(name: str, *, num_pairs: int, total_steps: int, seed: int = 0, **settings: Any) -> Loss:
    """The loss called `name` for a data set of `num_pairs` pairs and a run of `total_steps` steps.

    `settings` are the loss's own (the fields of its config block). Raises KeyError for an unknown name.
    """
    if name == "infonce":
        return InfoNCELoss(**settings)
    return LOSSES[name](num_pairs=num_pairs, total_steps=total_steps, seed=seed, **settings)
