"""The modules of MoCo-v3 (Chen, Xie and He, ICCV 2021) behind the call that vlcl trains: two views -> Features.

    q = unit(predictor(projector(tower(view))))           with gradient
    k = unit(momentum copy of projector(tower(view)))     without

The momentum copy follows once an optimizer step: copy <- m copy + (1 - m) weights, m from `start` to `end` along a
cosine over the run. Its BatchNorm sees the batch as the other's does; running statistics are each one's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from vlcl.batch import Features, Keys
from vlcl.model import DualEncoder, unit


def mlp(layers: int, width_in: int, hidden: int, width_out: int, last_norm: bool) -> nn.Sequential:
    """`layers` linear maps without bias, BatchNorm and ReLU between them; last_norm: a BatchNorm without weights at the
    end."""
    widths = [width_in, *[hidden] * (layers - 1), width_out]
    parts: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths)):
        parts.append(nn.Linear(before, after, bias=False))
        if number < layers - 1:
            parts += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        elif last_norm:
            parts.append(nn.BatchNorm1d(after, affine=False))
    return nn.Sequential(*parts)


class ViewTowers(nn.Module):
    """visual: pictures [B, C, H, W] -> features [B, W]; projector: [B, W] -> [B, D]; predictor: [B, D] -> [B, D]."""

    def __init__(self, visual: nn.Module, projector: nn.Module, predictor: nn.Module, tau: float) -> None:
        super().__init__()
        self.visual, self.projector, self.predictor = visual, projector, predictor
        self.momentum = copy.deepcopy(nn.ModuleDict({"visual": visual, "projector": projector}))
        self.momentum.requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / tau)))

    def query(self, images_BCHW: Tensor) -> Tensor:
        return self.predictor(self.projector(self.visual(images_BCHW)))

    @torch.no_grad()
    def key(self, images_BCHW: Tensor) -> Tensor:
        return self.momentum["projector"](self.momentum["visual"](images_BCHW))

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """The features that are kept after training: before the projector."""
        return self.visual(images_BCHW)

    def set_grad_checkpointing(self) -> None:
        for tower in (self.visual, self.momentum["visual"]):
            tower.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True)
class Momentum:
    """The share of the copy that stays, over `steps` optimizer steps."""

    start: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        progress = min(step / max(self.steps, 1), 1.0)
        return self.end - (self.end - self.start) * 0.5 * (1 + math.cos(math.pi * progress))


class ViewEncoder(DualEncoder):
    """ViewTowers as `view one, view two -> Features` with keys; `image` gives a picture's features, unit length."""

    has_text = False
    clip: ViewTowers

    def forward(self, images_BCHW: Tensor, tokens_BL: Tensor) -> Features:
        """Both of [B, C, H, W], normalized or uint8: what a batch has in the place of tokens is view two."""
        one, two = self.normalized(images_BCHW), self.normalized(tokens_BL)
        keys = Keys(unit(self.clip.key(one)), unit(self.clip.key(two)))
        bias = getattr(self.clip, "logit_bias", None)
        return Features(unit(self.clip.query(one)), unit(self.clip.query(two)), self.clip.logit_scale.exp(), bias, keys)

    def text(self, tokens_BL: Tensor) -> Tensor:
        raise AssertionError("views have no text tower")

    def follow(self, optimizer: torch.optim.Optimizer, kept: Callable[[], float]) -> None:
        """From now on the momentum copy follows after each step of `optimizer`; kept: the share of it that stays."""
        optimizer.register_step_post_hook(lambda *_: self.update(kept()))

    @torch.no_grad()
    def update(self, kept: float) -> None:
        """copy <- kept * copy + (1 - kept) * weights, of every parameter."""
        own = [*self.clip.visual.parameters(), *self.clip.projector.parameters()]
        for copy_, x in zip(self.clip.momentum.parameters(), own, strict=True):
            copy_.lerp_(x, 1 - kept)
