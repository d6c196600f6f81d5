"""Optimizer, learning-rate schedule, averaged weights. The schedule is a function of the step:
nothing to save, nothing that a launcher could step twice."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vlcl.config import OptimConfig
from vlcl.errors import UserError
from vlcl.parameter_groups import Rates, parameter_groups
from vlcl.pieces import Stored
from vlcl.sharding import local, piece_of

# Settings of `optim` that the training step reads itself.
OF_THE_STEP = {"warmup", "schedule", "cooldown", "cooldown_shape", "lr_min", "clip_norm"}
_SETTINGS = ("peak_lr", "weight_decay", "betas", "eps")  # of a parameter group


def build_optimizer(
    encoder: nn.Module, *, name: str, lr: float, image_lr: float | None, text_lr: float | None,
    image_layer_decay: float, text_layer_decay: float, weight_decay: float, no_decay: Sequence[str] | None,
    beta1: float, beta2: float, eps: float, logit_scale_lr: float | None, logit_scale_ratio: float,
) -> torch.optim.Optimizer:  # fmt: skip
    """`adamw` (with these betas and eps), or `timm/NAME` with timm's defaults for all but the rate and the decay.

    The arguments are the settings of the section `optim`, but for those OF_THE_STEP.
    """
    scale_lr = logit_scale_ratio * lr if logit_scale_lr is None else logit_scale_lr
    rates = Rates(image_lr or lr, text_lr or lr, scale_lr, image_layer_decay, text_layer_decay)
    groups = parameter_groups(encoder, rates, weight_decay, no_decay or ())
    betas = (beta1, beta2)
    if name == "adamw":
        fused = groups[0]["params"][0].device.type in ("cpu", "cuda")  # a loop over parameters is several times slower
        fused &= all(len({*map(type, group["params"])}) == 1 for group in groups)  # no sharded ones beside whole ones
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
    timm_name = name.removeprefix("timm/")
    known = list_optimizers()
    if timm_name not in known:
        near = difflib.get_close_matches(timm_name, known, n=3)
        hint = f"; did you mean {' or '.join(f'timm/{n}' for n in near)}?" if near else ""
        raise UserError(f"optim.name={name!r} is no optimizer of timm{hint} (timm.optim.list_optimizers() lists them)")
    return create_optimizer_v2(groups, opt=timm_name, lr=lr)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """The state of a checkpoint, whose moments may be `Stored`, with the settings of now: a rate or a decay that was
    changed holds from here on. `lr` stays that of the last step."""
    now = [{key: group[key] for key in _SETTINGS if key in group} for group in optimizer.param_groups]
    for parameter, moments in _by_parameter(optimizer, saved):
        for name, x in moments.items():
            if isinstance(x, Stored) or x.shape == parameter.shape:
                moments[name] = piece_of(x, parameter).clone()  # or all of it, or the file, would stay
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, now):
        group.update(settings)


def _by_parameter(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
    """Each parameter with what is saved of it: they are numbered through all groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    yield from ((p, saved["state"][number]) for number, p in enumerate(parameters) if number in saved["state"])


FALL = {  # what is left of the rate when a share p of the way down is over
    "linear": lambda p: 1 - p,
    "sqrt": lambda p: 1 - math.sqrt(p),
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
}


def rate_factor(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Share of the peak rate at `step` (from 0): linear over `optim.warmup` steps, then as `optim.schedule` says.

    `wsd`: constant until the last share `optim.cooldown` of all steps (1 - sqrt: Haegele et al., NeurIPS 2024).
    """
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return 1.0
    whole = optim.schedule == "cosine"
    begin = optim.warmup if whole else max(optim.warmup, total_steps - round(optim.cooldown * total_steps))
    progress = min(max(step - begin, 0) / max(total_steps - begin, 1), 1.0)
    floor = optim.lr_min / optim.lr
    return floor + (1 - floor) * FALL["cosine" if whole else optim.cooldown_shape](progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def averaged_copy(encoder: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of the weights (update it with `.update_parameters`), or None for a decay of 0."""
    if decay == 0:
        return None
    average = get_ema_multi_avg_fn(decay)

    def of_pieces(averaged: Sequence[Tensor], now: Sequence[Tensor], count: Tensor | int) -> None:
        average([local(x) for x in averaged], [local(x) for x in now], count)

    return AveragedModel(encoder, multi_avg_fn=of_pieces, use_buffers=False)
