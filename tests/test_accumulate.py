"""Chunks give the gradients of one piece: towers, logit_scale, under patch dropout, on 1 and 2 ranks, for each loss."""

from __future__ import annotations

from contextlib import nullcontext

import open_clip
import pytest
import torch
from ranks import on_ranks
from shards import TINY_MODEL
from torch import Tensor, nn

from vlcl import distributed
from vlcl.accumulate import Towers
from vlcl.batch import Batch, Features
from vlcl.losses import EMLoss, InfoNCELoss
from vlcl.model import DualEncoder
from vlcl.pair_table import PairTable

G = 8
LOSSES = {"infonce": InfoNCELoss(), "em": EMLoss(50, gamma=0.5), "em-before": EMLoss(50, order="before")}


def tiny(patch_dropout: float) -> DualEncoder:
    torch.manual_seed(0)
    cfg = TINY_MODEL["model_cfg"]
    vision = {**cfg["vision_cfg"], "patch_size": 8, "patch_dropout": patch_dropout}
    return DualEncoder(open_clip.CLIP(cfg["embed_dim"], vision, cfg["text_cfg"])).double().train()


def gradients(name: str, chunks: int, patch_dropout: float, wrapped: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    images = torch.randn(G, 3, 32, 32, generator=g, dtype=torch.float64)
    tokens = torch.randint(1, 49407, (G, 8), generator=g)
    rank, world = distributed.rank(), distributed.world_size()
    part = slice(rank * G // world, (rank + 1) * G // world)
    batch = Batch(images[part], tokens[part], torch.arange(G)[part])
    encoder = tiny(patch_dropout)
    model = nn.parallel.DistributedDataParallel(encoder) if wrapped else encoder
    no_sync = (lambda m: m.no_sync()) if wrapped else (lambda m: nullcontext())
    towers = Towers(model, chunks, lambda x: x.backward(), no_sync)
    torch.manual_seed(10 + rank)
    features = towers.forward(batch)
    peers = distributed.gather_peers(features, batch.row_B)
    out = LOSSES[name](features, peers, PairTable(50).read(peers.row_G))
    towers.backward(out.loss)
    return {key: p.grad for key, p in encoder.named_parameters() if p.grad is not None} | {"loss": out.loss.detach()}


@pytest.mark.parametrize("name", list(LOSSES))
def test_chunks_give_the_whole_batchs_gradients(name: str) -> None:
    whole = gradients(name, 1, 0.0, wrapped=False)
    assert whole["clip.logit_scale"].abs() > 1e-4
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
    InfoNCELoss()(features, distributed.gather_peers(features, torch.arange(G))).loss.backward()
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
