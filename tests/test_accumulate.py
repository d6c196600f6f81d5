"""Chunks give the gradients of one piece: towers, logit_scale, under patch dropout, on 1 and 2 ranks, for each loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import open_clip
import pytest
import torch
from ranks import on_ranks
from shards import TINY_MODEL
from torch import Tensor, nn

from vlcl import distributed
from vlcl.accumulate import Towers
from vlcl.batch import Aux, Batch, Features
from vlcl.loss_state import LossState
from vlcl.losses import build_loss
from vlcl.model import DualEncoder

G = 8
LOSSES = {
    "infonce": build_loss("infonce", num_pairs=50),
    "em": build_loss("em", num_pairs=50, gamma=0.5),
    "em-before": build_loss("em", num_pairs=50, order="before", prediction=None),
    "siglip": build_loss("siglip", num_pairs=50),
    "fastclip-v3": build_loss("fastclip-v3", num_pairs=50),
}


def tiny(patch_dropout: float) -> DualEncoder:
    torch.manual_seed(0)
    cfg: dict[str, Any] = TINY_MODEL["model_cfg"]
    vision = open_clip.CLIPVisionCfg(**cfg["vision_cfg"] | {"patch_size": 8, "patch_dropout": patch_dropout})
    text = open_clip.CLIPTextCfg(**cfg["text_cfg"])
    return DualEncoder(open_clip.CLIP(cfg["embed_dim"], vision, text)).double().train()


def tiny_for(name: str, patch_dropout: float) -> DualEncoder:
    encoder = tiny(patch_dropout)
    if name == "siglip":
        encoder.clip.logit_bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
    return encoder


def gradients(name: str, chunks: int, patch_dropout: float, wrapped: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    images = torch.randn(G, 3, 32, 32, generator=g, dtype=torch.float64)
    tokens = torch.randint(1, 49407, (G, 8), generator=g)
    rank, world = distributed.rank(), distributed.world_size()
    part = slice(rank * G // world, (rank + 1) * G // world)
    batch = Batch(images[part], tokens[part], torch.arange(G)[part])
    encoder = tiny_for(name, patch_dropout)
    model = nn.parallel.DistributedDataParallel(encoder) if wrapped else encoder
    no_sync = (lambda m: m.no_sync()) if wrapped else (lambda m: nullcontext())
    towers = Towers(model, chunks, lambda x: x.backward(), no_sync)
    torch.manual_seed(10 + rank)
    features = towers.forward(batch)
    peers = distributed.gather_peers(features, batch.row_B)
    out = LOSSES[name](features, peers, LossState(LOSSES[name], 50, 16).read(peers.row_G))
    towers.backward(out.loss)
    return {key: p.grad for key, p in encoder.named_parameters() if p.grad is not None} | {"loss": out.loss.detach()}


@pytest.mark.parametrize("name", list(LOSSES))
def test_chunks_give_the_whole_batchs_gradients(name: str) -> None:
    whole = gradients(name, 1, 0.0, wrapped=False)
    assert whole["clip.logit_scale"].abs() > 1e-4
    assert (name == "siglip") == ("clip.logit_bias" in whole)
    for chunks in (2, 4, 8):
        parts = gradients(name, chunks, 0.0, wrapped=False)
        for key, value in whole.items():
            torch.testing.assert_close(parts[key], value, rtol=1e-6, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def test_both_passes_see_the_same_patches() -> None:
    """The loss's features are those that are differentiated: a step along the gradient predicts the loss."""
    first = gradients("infonce", 4, 0.5, wrapped=False)
    again = gradients("infonce", 4, 0.5, wrapped=False)
    assert all(torch.equal(first[key], again[key]) for key in first)
    # One chunk over the whole draws the same masks in another order, so compare against autograd through the chunks.
    g = torch.Generator().manual_seed(1)
    images = torch.randn(G, 3, 32, 32, generator=g, dtype=torch.float64)
    tokens = torch.randint(1, 49407, (G, 8), generator=g)
    encoder = tiny(0.5)
    torch.manual_seed(10)
    parts = [encoder(x, y) for x, y in zip(images.chunk(4), tokens.chunk(4))]
    features = Features(
        torch.cat([p.image_BD for p in parts]), torch.cat([p.text_BD for p in parts]), parts[0].logit_scale
    )
    LOSSES["infonce"](features, distributed.gather_peers(features, torch.arange(G))).loss.backward()
    for key, p in encoder.named_parameters():
        torch.testing.assert_close(first[key], p.grad, rtol=1e-6, atol=1e-9)


def two_rank_cases() -> dict[str, dict[str, Tensor]]:
    return {f"{name}-{chunks}": gradients(name, chunks, 0.0, wrapped=True) for name in LOSSES for chunks in (1, 2)}


def test_chunks_on_two_ranks() -> None:
    for results in on_ranks(2, two_rank_cases):
        for name in LOSSES:
            whole = gradients(name, 1, 0.0, wrapped=False)
            for chunks in (1, 2):
                for key in whole.keys() - {"loss"}:
                    torch.testing.assert_close(results[f"{name}-{chunks}"][key], whole[key], rtol=1e-6, atol=1e-9)


def part_gradients(parts: int) -> dict[str, Tensor]:
    """Gradients of a step whose parts have negatives of their own, on this rank's half of the pairs."""
    g = torch.Generator().manual_seed(1)
    images = torch.randn(G, 3, 32, 32, generator=g, dtype=torch.float64)
    tokens = torch.randint(1, 49407, (G, 8), generator=g)
    rank, world = distributed.rank(), distributed.world_size()
    # Part p of rank r holds the pairs that part p of one rank would hold.
    own = torch.cat([x.chunk(world)[rank] for x in torch.arange(G).chunk(parts)])
    encoder = tiny(0.0)
    wrapped = distributed.initialized()
    model = nn.parallel.DistributedDataParallel(encoder) if wrapped else encoder
    no_sync = (lambda m: m.no_sync()) if wrapped else (lambda m: nullcontext())
    towers = Towers(model, parts, lambda x: x.backward(), no_sync, alone=True)
    loss = LOSSES["em-before"]
    residual, visits = torch.linspace(-2, 1, 100).reshape(50, 2), torch.ones(50, dtype=torch.long)
    for part in towers.parts(Batch(images[own], tokens[own], own)):
        features = towers.forward(part)
        peers = distributed.gather_peers(features, part.row_B)
        here = Aux({"residual": residual[peers.row_G]}, visits[peers.row_G])
        towers.backward(loss(features, peers, here).loss)
    return {key: p.grad for key, p in encoder.named_parameters() if p.grad is not None}


def test_parts_of_a_decomposable_loss_add_up() -> None:
    """The mean of the parts' own gradients, on one rank and on two; no forward pass is done twice."""
    got = part_gradients(2)
    for results in on_ranks(2, part_gradients, 2):
        for key, value in got.items():
            torch.testing.assert_close(results[key], value, rtol=1e-6, atol=1e-9)
    g = torch.Generator().manual_seed(1)
    images = torch.randn(G, 3, 32, 32, generator=g, dtype=torch.float64)
    tokens = torch.randint(1, 49407, (G, 8), generator=g)
    encoder, loss = tiny(0.0), LOSSES["em-before"]
    residual = torch.linspace(-2, 1, 100).reshape(50, 2)
    for row in torch.arange(G).chunk(2):
        features = encoder(images[row], tokens[row])
        peers = distributed.gather_peers(features, row)
        (loss(features, peers, Aux({"residual": residual[row]}, torch.ones(4, dtype=torch.long))).loss / 2).backward()
    for key, p in encoder.named_parameters():
        torch.testing.assert_close(got[key], p.grad, rtol=1e-6, atol=1e-9)
