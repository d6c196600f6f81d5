"""The loss of two views of a picture against a momentum encoder's keys (MoCo-v3, Chen, Xie and He, ICCV 2021).

Any loss of the family knows the two directions: view one's query against the keys of view two, and the other way
round. MoCo-v3 adds them up, each times 2 tau, where the family takes their mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vlcl.batch import Aux, Features, Peers
from vlcl.losses.contrastive import ContrastiveLoss
from vlcl.losses.mstep import LossOutput
from vlcl.losses.siglip import SigLIPLoss


@dataclass(frozen=True)
class SymmetrizedLoss:
    """2 tau [l(q1, k2) + l(q2, k1)] of `loss`, whose own value is the mean of the two.

    tau is 1 / features.logit_scale, held constant; a loss that is multiplied by tau already (FastCLIP-v3's form, and
    the temperatures of each pair) is multiplied by 4 alone. What is remembered and logged is the loss's own.
    """

    loss: ContrastiveLoss | SigLIPLoss

    @property
    def columns(self) -> tuple[str, ...]:
        return self.loss.columns

    @property
    def meaning_of_rows(self) -> str:
        return self.loss.meaning_of_rows

    def initial(self, width: int) -> dict[str, Tensor]:
        return self.loss.initial(width)

    def __call__(self, features: Features, peers: Peers, aux: Aux | None = None, step: int = 0) -> LossOutput:
        if features.keys is None:
            raise ValueError("views are compared with keys of a momentum encoder: features.keys is None")
        out = self.loss(features, peers, aux, step)
        has_tau = isinstance(self.loss, ContrastiveLoss) and self.loss.temperature.kind in ("rho", "pair")
        return replace(out, loss=out.loss * (4.0 if has_tau else 4.0 / features.logit_scale.detach()))
