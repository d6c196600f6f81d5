"""The section `optim`: optimizer, parameter groups, learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlcl.config.errors import Allowed
from vlcl.config.types import Fraction, Index, NotNegative, Positive, Rate, Section, Words


class OptimConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Annotated[str, Field(pattern=r"^(adamw|timm/.+)$"), Allowed("adamw, or timm/NAME")] = "adamw"
    """`adamw`, or `timm/NAME` for one of timm's (`timm/muon`, `timm/lamb`, `timm/lion`, ...)"""
    lr: Positive = 5e-4
    """peak learning rate"""
    image_lr: Positive | None = None
    """peak learning rate of the image tower; null: `optim.lr`"""
    text_lr: Positive | None = None
    """peak learning rate of the text tower; null: `optim.lr`"""
    image_layer_decay: Rate = 1.0
    """the learning rate of each block of the image tower over that of the block after it: below 1 the early layers of
    a pretrained tower move less"""
    text_layer_decay: Rate = 1.0
    """the same for the text tower"""
    weight_decay: NotNegative = 0.2
    """decoupled weight decay of the weight matrices (not of biases, norms and logit_scale)"""
    no_decay: Words | None = None
    """patterns of parameter names (`*embedding*`) that are left out of the weight decay as well"""
    beta1: Fraction = 0.9
    """decay of the first moment, per step (adamw; timm's optimizers keep their own)"""
    beta2: Fraction = 0.98
    """decay of the second moment, per step (adamw)"""
    eps: Positive = 1e-6
    """added to the root of the second moment (adamw)"""
    warmup: Index = 2000
    """optimizer steps of linear warm-up from 0 to `optim.lr`"""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """after the warm-up: `cosine` down to `optim.lr_min` at the last step, `constant`, or `wsd` (warm-up, stable,
    decay): constant, and at last a cooldown to `optim.lr_min`"""
    cooldown: Rate = 0.2
    """share of all steps that the cooldown takes (wsd)"""
    cooldown_shape: Literal["linear", "sqrt", "cosine"] = "sqrt"
    """how the rate falls in the cooldown, p being the share of it that is over: 1 - p, 1 - sqrt(p), or half a cosine"""
    lr_min: NotNegative = 0.0
    """end of the cosine and of the cooldown"""
    clip_norm: Positive | None = 1.0
    """cap on the global gradient norm; null: none"""
    logit_scale_lr: NotNegative | None = None
    """peak learning rate of logit_scale; null: `optim.logit_scale_ratio` times `optim.lr`; 0: the temperature is
    fixed"""
    logit_scale_ratio: Positive | None = None
    """peak learning rate of logit_scale over `optim.lr`, where `optim.logit_scale_lr` does not say it; null: 0.2, and
    0.2 sqrt(B / 256) for a `train.batch_size` B below 256"""
