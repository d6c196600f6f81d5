"""Writes the weights of the locked image tower of locked.yaml: patches of training pictures, no labels, no captions.

python benchmarks/evidence/make_patches.py [icons-locked.yaml]

Features of Coates, Ng and Lee (AISTATS 2011): 256 whitened patches of 7 pixels as filters, rectified, averaged over a
grid of four by four; then their 256 principal components, whose positive and negative parts are the 512 features. Each
of these steps is a layer of a ResNet of timm's (locked/trunk/config.json), so that any tool can load the tower.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vlcl.config import load_config
from vlcl.data.cache import CacheReader
from vlcl.errors import UserError
from vlcl.from_config import make_model, make_reader, open_splits

FOLDER = Path(__file__).parent
SIDE, PATCHES, FILTERS, GRID = 7, 100_000, 256, 4
FLAT = 0.2  # of the median variance of a patch: what has less is background
RIDGE = 0.1  # of the mean variance, added before whitening
CONTRAST = 1e-3  # likewise, before components are scaled by the root of their deviation


def filters_of(images_NCHW: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Whitened patches, taken at random: (weight, bias) of a convolution."""
    n, channels, height, width = images_NCHW.shape
    which = torch.randint(n, (PATCHES,), generator=random).tolist()
    top, left = (torch.randint(x - SIDE + 1, (PATCHES,), generator=random).tolist() for x in (height, width))
    cut = [images_NCHW[i, :, t : t + SIDE, s : s + SIDE].flatten() for i, t, s in zip(which, top, left)]
    patch_PV = torch.stack(cut)
    variance_P = patch_PV.var(1)
    patch_PV = patch_PV[variance_P > FLAT * variance_P.median()]
    mean_V = patch_PV.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patch_PV.T))
    whiten_VV = vectors @ torch.diag((values + RIDGE * values.mean()).rsqrt()) @ vectors.T
    chosen_KV = patch_PV[torch.randperm(len(patch_PV), generator=random)[:FILTERS]]
    filter_KV = F.normalize((chosen_KV - mean_V) @ whiten_VV, dim=1) @ whiten_VV
    return filter_KV.view(FILTERS, channels, SIDE, SIDE), -(filter_KV @ mean_V)


def pooled(images_NCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[N, FILTERS, GRID, GRID]: as the first layers of the trunk will."""
    found = []
    for part in images_NCHW.split(256):
        seen = F.max_pool2d(F.conv2d(part, weight, stride=2, padding=SIDE // 2), 3, 2, 1)
        found.append(F.avg_pool2d(F.relu(seen + bias[:, None, None]), 2))
    return torch.cat(found)


def components_of(grid_NKGG: Tensor) -> tuple[Tensor, Tensor]:
    """(the mean, [FILTERS, K, GRID, GRID] principal components scaled to even out their contrast)."""
    flat_NV = grid_NKGG.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat_NV.T))
    values, vectors = values.flip(0)[:FILTERS], vectors.flip(1)[:, :FILTERS]
    scaled_VC = vectors / (values + CONTRAST * values[0]) ** 0.25
    return flat_NV.mean(0).view(grid_NKGG.shape[1:]).float(), scaled_VC.T.reshape(-1, *grid_NKGG.shape[1:]).float()


def as_it_is(convolution: nn.Conv2d) -> None:
    """The identity."""
    convolution.weight.zero_()
    channels = range(len(convolution.weight))
    convolution.weight[channels, channels, 1, 1] = 1


@torch.no_grad()
def write_into(trunk: Any, weight: Tensor, bias: Tensor, mean_KGG: Tensor, component_CKGG: Tensor) -> None:
    stem, first, second, third = trunk.stem.conv, *(trunk.stages[i].blocks[0] for i in (1, 2, 3))
    for block in (first, second, third):
        block.downsample.conv.weight.zero_()  # no way around a block
        as_it_is(block.conv2)
    stem.weight.copy_(weight)
    first.norm1.bias.copy_(bias)  # then rectified
    channels = torch.arange(FILTERS)
    first.conv1.weight.zero_()
    first.conv1.weight[channels, channels, 1:, 1:] = 0.25  # the mean of two by two
    second.conv1.weight.zero_()
    third.conv1.weight.zero_()
    signed = torch.cat([component_CKGG, -component_CKGG])
    for row in range(2):
        for column in range(2):  # four neighbours side by side as channels, twice
            part = channels + FILTERS * (2 * row + column)
            second.conv1.weight[part, channels, 1 + row, 1 + column] = 1
            for below in range(2):
                for beside in range(2):
                    seen = signed[:, :, 2 * below + row, 2 * beside + column]
                    third.conv1.weight[:, part, 1 + below, 1 + beside] = seen
    third.norm2.bias.copy_(-(signed * mean_KGG).sum((1, 2, 3)))  # then rectified


@torch.no_grad()
def main(experiment: str) -> None:
    config = load_config(str(FOLDER / experiment), ["model.pretrained_image=null"])
    built = make_model(config)
    sources = open_splits(config.data)[0]
    reader = make_reader("data.train", config, sources, built)
    assert isinstance(reader, CacheReader)
    images = built.encoder.normalized(reader.pictures(range(sources.num_samples)))
    weight, bias = filters_of(images, torch.Generator().manual_seed(0))
    grid = pooled(images, weight, bias)
    trunk = timm.create_model(f"local-dir:{FOLDER / 'locked' / 'trunk'}", pretrained=False)
    mean, components = components_of(grid)
    write_into(trunk, weight, bias, mean, components)
    expected = torch.einsum("ckgh,nkgh->nc", components, grid[:100] - mean)
    found = trunk.eval()(images[:100])
    assert torch.allclose(found, torch.cat([expected, -expected], 1).relu(), atol=1e-2 * found.std()), (
        "not the features"
    )
    target = Path(config.data.cache or ".") / "patches.safetensors"
    save_file({f"trunk.{name}": x for name, x in trunk.state_dict().items()}, target)
    print(f"{target}: {found.shape[1]} features from {sources.num_samples:,} pictures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", default="locked.yaml", choices=("locked.yaml", "icons-locked.yaml"))
    experiment = parser.parse_args().experiment
    data = "icons" if experiment.startswith("icons") else "emoji"
    try:
        main(experiment)
    except UserError as error:
        raise SystemExit(f"error: {error}\nto make them: vlcl data {data} data/{data}") from None
