"""Which parameters are decayed, and how fast each learns: by its tower, its depth in it, and its kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from torch import nn

from vlcl.errors import UserError

# Where towers keep their blocks in order (open_clip, timm, transformers), and what comes before the first of them.
CONTAINERS = {"resblocks", "blocks", "block", "layers", "layer", "stages"}
STEM = re.compile(r"embed|^(conv|bn)\d|ln_pre|norm_pre|token|stem|patch")

NO_TOWER = ("logit_", "text_decoder")  # CoCa's captioner does not train


@dataclass(frozen=True)
class Rates:
    """Peak learning rates: lr_image and lr_text of the last layers, times decay_* for each block before them."""

    lr_image: float
    lr_text: float
    logit_scale: float
    decay_image: float = 1.0
    decay_text: float = 1.0


def parameter_groups(
    encoder: nn.Module, rates: Rates, weight_decay: float, no_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Weight matrices with decay; norms, biases, other vectors and what fits a pattern of no_decay without; logit_scale
    on its own. What has the same rate and decay is one group.

    `peak_lr` of each group is what `set_learning_rate` scales. A logit_scale rate of 0 fixes the temperature. Raises
    UserError where nothing is left to train, for a pattern that no name fits, and where a tower's blocks are not known.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    scale = []
    factors = _layer_factors(encoder, rates)
    for name, parameter in encoder.named_parameters():
        if name.endswith("logit_scale"):
            parameter.requires_grad_(rates.logit_scale != 0)
            scale.append(parameter)
        elif parameter.requires_grad:
            plain = parameter.ndim < 2 or _is_bias(name) or any(fnmatchcase(name, pattern) for pattern in no_decay)
            lr = (rates.lr_image if _of_image(name) else rates.lr_text) * factors.get(name, 1.0)
            groups.setdefault((plain, lr), []).append(parameter)
    if not groups and not any(p.requires_grad for p in scale):
        raise UserError(
            "nothing is left to train: model.lock_image, model.lock_text and optim.logit_scale_lr=0 freeze it all"
        )
    _check_patterns(no_decay, [name for name, _ in encoder.named_parameters()])
    ordered = sorted(groups, key=lambda key: (key[0], -key[1]))
    made = [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else weight_decay, "peak_lr": key[1]} for key in ordered
    ]
    made.append({"params": scale, "weight_decay": 0.0, "peak_lr": rates.logit_scale})
    return [group for group in made if any(p.requires_grad for p in group["params"])]


def layer_numbers(names: Iterable[str]) -> dict[str, int]:
    """How many layers before the end of its tower each parameter lies: 0 for heads and last norms, 1 for the last
    block, one more for each block before it and for the embeddings. `names`: of one tower; empty where none has a
    block's number."""
    blocks = {name: _block(name) for name in names}
    depth = {block: number for number, block in enumerate(sorted({b for b in blocks.values() if b}, reverse=True), 1)}
    if not depth:
        return {}
    stem = len(depth) + 1
    return {name: depth[block] if block else stem if _in_stem(name) else 0 for name, block in blocks.items()}


def _layer_factors(encoder: nn.Module, rates: Rates) -> dict[str, float]:
    factors = {}
    for tower, decay in (("image", rates.decay_image), ("text", rates.decay_text)):
        if decay == 1:
            continue
        names = [name for name, _ in encoder.named_parameters()
                 if _of_image(name) == (tower == "image") and not any(part in name for part in NO_TOWER)]  # fmt: skip
        if not (numbers := layer_numbers(names)):
            raise UserError(
                f"optim.{tower}_layer_decay={decay}: vlcl does not know the order of this {tower} tower's blocks "
                f"(its parameters begin with {', '.join(names[:2])}); leave it at 1"
            )
        factors |= {name: decay**number for name, number in numbers.items()}
    return factors


def _of_image(name: str) -> bool:
    return "visual." in name


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]  # relative_position_bias_table as well, as in open_clip


def _block(name: str) -> tuple[int, ...]:
    """The number of the parameter's block, stage first where there are stages; () outside of all blocks."""
    parts, numbers = name.split("."), []
    if any("embed" in part for part in parts):  # some have stages of their own
        return ()
    for part, after in pairwise(parts):
        if stage := re.fullmatch(r"layer(\d+)", part):  # ResNets
            numbers.append(int(stage[1]))
            numbers += [int(after)] if after.isdigit() else []
        elif part in CONTAINERS and after.isdigit():
            numbers.append(int(after))
    return tuple(numbers)


def _in_stem(name: str) -> bool:
    parts = [part for part in name.split(".") if part not in ("clip", "visual", "trunk", "text", "transformer")]
    return not any("pool" in part or "head" in part for part in parts) and any(STEM.search(part) for part in parts)


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"optim.no_decay: no parameter's name fits {pattern!r}; they are such as {', '.join(names[:3])}"
            )
