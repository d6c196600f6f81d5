"""Parameter groups, optimizer, learning-rate schedule, averaged weights. The schedule is a function of the step:
nothing to save, nothing that a launcher could step twice."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # pyright: ignore[reportPrivateImportUsage]
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vlcl.errors import UserError

OF_THE_STEP = {"warmup", "schedule", "lr_min", "clip_norm"}  # settings of `optim` that the training step reads itself

_SETTINGS = ("peak_lr", "weight_decay", "betas", "eps")  # of a parameter group


def parameter_groups(encoder: nn.Module, lr: float, weight_decay: float, logit_scale_lr: float) -> list[dict[str, Any]]:
    """Weight matrices with decay; norms, biases and other vectors without; logit_scale on its own.

    `peak_lr` of each group is what `set_learning_rate` scales. A logit_scale_lr of 0 fixes the temperature.
    """
    decay, no_decay, scale = [], [], []
    for name, parameter in encoder.named_parameters():
        if name.endswith("logit_scale"):
            parameter.requires_grad_(logit_scale_lr != 0)
            scale.append(parameter)
        elif parameter.requires_grad:
            (no_decay if parameter.ndim < 2 or name.endswith("bias") else decay).append(parameter)
    if not any(p.requires_grad for p in decay + no_decay + scale):
        raise UserError(
            "nothing is left to train: model.lock_image, model.lock_text and optim.logit_scale_lr=0 freeze it all"
        )
    groups = [
        {"params": decay, "weight_decay": weight_decay, "peak_lr": lr},
        {"params": no_decay, "weight_decay": 0.0, "peak_lr": lr},
        {"params": scale, "weight_decay": 0.0, "peak_lr": logit_scale_lr},
    ]
    return [group for group in groups if any(p.requires_grad for p in group["params"])]


def build_optimizer(
    encoder: nn.Module, *, name: str, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float,
    logit_scale_lr: float | None, logit_scale_ratio: float,
) -> torch.optim.Optimizer:  # fmt: skip
    """`adamw` (with these betas and eps), or `timm/NAME` with timm's defaults for all but the rate and the decay.

    The arguments are the settings of the section `optim`, but for those OF_THE_STEP.
    """
    scale_lr = logit_scale_ratio * lr if logit_scale_lr is None else logit_scale_lr
    groups = parameter_groups(encoder, lr, weight_decay, scale_lr)
    betas = (beta1, beta2)
    if name == "adamw":
        fused = groups[0]["params"][0].device.type in ("cpu", "cuda")  # a loop over parameters is several times slower
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
    timm_name = name.removeprefix("timm/")
    known = list_optimizers()
    if timm_name not in known:
        near = difflib.get_close_matches(timm_name, known, n=3)
        hint = f"; did you mean {' or '.join(f'timm/{n}' for n in near)}?" if near else ""
        raise UserError(f"optim.name={name!r} is no optimizer of timm{hint} (timm.optim.list_optimizers() lists them)")
    return create_optimizer_v2(groups, opt=timm_name, lr=lr)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """The state of a checkpoint, with the settings of now: a rate or a decay that was changed holds from here on. `lr`
    stays that of the last step."""
    now = [{key: group[key] for key in _SETTINGS if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, now):
        group.update(settings)


def rate_factor(step: int, total_steps: int, warmup: int, schedule: str, floor: float) -> float:
    """Share of the peak rate at `step` (from 0): linear over `warmup` steps, then constant or cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def averaged_copy(encoder: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of the weights (update it with `.update_parameters`), or None for a decay of 0."""
    if decay == 0:
        return None
    return AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)
