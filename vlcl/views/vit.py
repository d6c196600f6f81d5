"""What MoCo-v3 does to a ViT: positions of sines and cosines that do not train, weights drawn evenly, and a patch
projection that keeps its random start. For timm's ViTs and open_clip's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def is_vit(tower: nn.Module) -> bool:
    return _patches(tower) is not None and _positions(tower) is not None


def _positions(tower: Any) -> nn.Parameter | None:
    """[1, T, D] in timm, [T, D] in open_clip."""
    for name in ("pos_embed", "positional_embedding"):
        if isinstance(found := getattr(tower, name, None), nn.Parameter):
            return found
    return None


def _patches(tower: Any) -> nn.Conv2d | None:
    found = getattr(getattr(tower, "patch_embed", None), "proj", getattr(tower, "conv1", None))
    return found if isinstance(found, nn.Conv2d) else None


def positions_2d(height: int, width: int, dim: int) -> Tensor:
    """[height * width, dim], rows first: a quarter of dim each for sin x, cos x, sin y, cos y, at frequencies
    10000^(-k / (dim / 4)). ValueError where 4 does not divide dim.

    for y in range(height): for x in range(width): for k in range(dim / 4):
        w = 10000 ** (-k / (dim / 4));  p[y, x] = [sin(x w), cos(x w), sin(y w), cos(y w)]
    """
    if dim % 4:
        raise ValueError(f"positions of sines and cosines need a width that 4 divides, this tower has {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    parts = [fn(axis.flatten()[:, None] * omega) for axis in (x, y) for fn in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()


@torch.no_grad()
def fix_positions(tower: nn.Module) -> None:
    """Sines and cosines, without gradient; a class token, which comes first, has 0."""
    positions, patches = _positions(tower), _patches(tower)
    assert positions is not None
    assert patches is not None
    flat = positions.view(-1, positions.shape[-1])
    side = math.isqrt(len(flat))
    tokens = len(flat) - side * side  # before the patches: a class token, registers
    height = width = side
    if (grid := getattr(getattr(tower, "patch_embed", None), "grid_size", None)) is not None:
        height, width = grid
        tokens = len(flat) - height * width
    flat.zero_()
    flat[tokens:] = positions_2d(height, width, flat.shape[1])
    positions.requires_grad_(False)


@torch.no_grad()
def init_vit(tower: nn.Module) -> None:
    """Linear layers by Glorot's rule, uniform, the three of an attention each for itself; the patch projection by the
    same rule as the linear map that it is; biases 0."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # open_clip's
            _glorot_parts(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear):
            _glorot_parts(module.weight) if name.endswith("qkv") else nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = _patches(tower)
    assert patches is not None
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)


def _glorot_parts(weight: Tensor) -> None:
    """Queries, keys and values, stacked in one matrix of three squares."""
    for part in weight.chunk(3):
        nn.init.xavier_uniform_(part)


def freeze_patches(tower: nn.Module) -> None:
    patches = _patches(tower)
    assert patches is not None
    patches.requires_grad_(False)
