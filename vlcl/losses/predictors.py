"""What a pair's log-normalizer is predicted from, where a row remembers only its distance from that: PREDICTORS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcl.losses.estep import Context, Predictor, floored


@dataclass(frozen=True)
class Similarity:
    """Predicts -s_ii, the part of a in relative form that is known at use: a row remembers log mean e^{s_ij} (the
    absolute form), and is read with the similarity and the scale that the pair has now."""

    estimates: ClassVar[bool] = False

    def initial(self, width: int) -> dict[str, Tensor]:
        return {}

    def predict(self, shared: dict[str, Tensor], context: Context) -> Tensor:
        return -context.reference_GK

    def update(self, shared: dict[str, Tensor], a_hat_GK: Tensor, context: Context) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Level:
    """Predicts the same for every pair of a direction: the running mean of the batches' mean a_hat, over about
    1 / (1 - `decay`) batches; with `similarity`, of a_hat + s_ii, and less the pair's own s_ii.

    What a row remembers is then its distance from that mean, so that a row visited long ago moves with the model. The
    batch's own bias (the log of a small mean) is in the mean before and after, and cancels.

    As a loop, with `similarity` (it leaves a row what only a visit can tell):

        level = decay * level + (1 - decay) * mean(log(mean(exp(kappa * v[i] @ t[j]) for j)) for i in batch)
        row[i] = (log mean e^{s_ij} then) - (level then)        a[i] = row[i] + (level now) - (s_ii now)
    """

    estimates: ClassVar[bool] = True

    decay: float = 0.9
    similarity: bool = False

    def _known(self, context: Context) -> Tensor:
        return context.reference_GK if self.similarity else torch.zeros_like(context.reference_GK)

    def initial(self, width: int) -> dict[str, Tensor]:
        return {"level": torch.zeros(3)}  # sums of both directions, and of the weights

    def predict(self, shared: dict[str, Tensor], context: Context) -> Tensor:
        level = shared["level"].to(context.scale_GK)
        return level[:2] / level[2] - self._known(context)  # 0 / 0 is NaN: nothing is known yet

    def update(self, shared: dict[str, Tensor], a_hat_GK: Tensor, context: Context) -> dict[str, Tensor]:
        kept_GK = a_hat_GK + self._known(context)
        now = torch.cat([kept_GK.mean(dim=0), kept_GK.new_ones(1)]).to(shared["level"])
        return {"level": self.decay * shared["level"] + (1 - self.decay) * now}


@dataclass(frozen=True)
class Prototypes:
    """Predicts a from a pair's embedding: NeuCLIP's normalizer network (arXiv:2511.08417).

        a(x_i) = log(epsilon + 1/m sum over k of e^{kappa (cos(x_i, W_k) - cos_ii)})

    W has m = `size` rows, one W a direction, trained by `steps` AdaGrad steps a batch of learning rate `lr` on
    e^{-a}(epsilon + g-hat) + a - 1, whose minimum over a is log(epsilon + g-hat), and started anew from recent
    embeddings every `restart` optimizer steps. We know the paper from its abstract and from notes on it; the learning
    rate is ours.
    """

    estimates: ClassVar[bool] = True

    size: int = 4096
    steps: int = 10
    lr: float = 0.01
    restart: int = 500

    def initial(self, width: int) -> dict[str, Tensor]:
        return {
            "prototypes": torch.zeros(2, self.size, width),
            "prototypes_square": torch.zeros(2, self.size, width),
            "prototypes_filled": torch.zeros(self.size, dtype=torch.bool),
        }

    def predict(self, shared: dict[str, Tensor], context: Context) -> Tensor:
        peers = context.peers
        return torch.stack(
            [
                self._a(shared, k, x_GD.to(context.scale_GK), context, slice(None))
                for k, x_GD in enumerate((peers.image_GD, peers.text_GD))
            ],
            dim=1,
        )

    def _a(self, shared: dict[str, Tensor], k: int, x_GD: Tensor, context: Context, ours: slice) -> Tensor:
        """a of direction k (its prototypes stand for the other side's embeddings); NaN while none is filled."""
        w_MD, filled_M = F.normalize(shared["prototypes"][k].to(x_GD), dim=1, eps=1e-12), shared["prototypes_filled"]
        scale_G1, reference_G1 = context.scale_GK[ours, k, None], context.reference_GK[ours, k, None]
        x_GM = (scale_G1 * (x_GD @ w_MD.T) - reference_G1).masked_fill(~filled_M, -torch.inf)
        a_G = torch.logsumexp(x_GM, dim=1) - filled_M.sum().log()
        return floored(a_G, context.epsilon).masked_fill(~filled_M.any(), torch.nan)

    def update(self, shared: dict[str, Tensor], a_hat_GK: Tensor, context: Context) -> dict[str, Tensor]:
        shared = self._restart(shared, context)
        peers, ours = context.peers, slice(context.peers.start, context.peers.start + context.num_own)
        share = peers.world / len(peers.row_G)  # ranks may hold different numbers of pairs, or none
        for _ in range(self.steps):
            with torch.enable_grad():
                moving = {**shared, "prototypes": shared["prototypes"].detach().requires_grad_()}
                loss = a_hat_GK.new_zeros(())
                for k, x_GD in enumerate((peers.image_GD, peers.text_GD)):
                    a_B = self._a(moving, k, x_GD[ours].to(a_hat_GK), context, ours)
                    loss = loss + (torch.exp((a_hat_GK[ours, k] - a_B).clamp(max=20.0)) + a_B - 1).sum()
                (gradient,) = torch.autograd.grad(loss, moving["prototypes"])
            gradient = peers.mean(gradient * share)
            square = shared["prototypes_square"] + gradient * gradient
            moved = shared["prototypes"] - self.lr * gradient / (square.sqrt() + 1e-10)
            shared = {**shared, "prototypes": moved, "prototypes_square": square}
        return shared

    def _restart(self, shared: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        """In the first steps of each period, places are filled with the batch's embeddings, one batch after another."""
        peers, size = context.peers, self.size
        num = min(len(peers.row_G), size)
        first = context.step % self.restart * num
        if first >= size:
            return shared
        places = torch.arange(first, min(first + num, size), device=peers.row_G.device)
        new = torch.stack([peers.candidates.other(k) for k in (0, 1)])[:, : len(places)].to(shared["prototypes"])
        return {
            "prototypes": shared["prototypes"].index_copy(1, places, new),
            "prototypes_square": shared["prototypes_square"].index_fill(1, places, 0.0),
            "prototypes_filled": shared["prototypes_filled"].index_fill(0, places, True),
        }


PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "similarity": Similarity,
    "level": Level,
    "drift": partial(Level, similarity=True),
    "prototypes": Prototypes,
}  # as loss.prediction names them
