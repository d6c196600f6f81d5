"""Retrieval recall against a slow count, ties in expectation, and the same on 1, 2 and 3 ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

from vlcl import distributed
from vlcl.batch import Batch, Features
from vlcl.data.class_folders import imagenet_names
from vlcl.errors import UserError
from vlcl.zeroshot import EncodedPairs, encode_pairs, infonce, recall_at_k, retrieval


def pairs(n: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(n, 8, generator=g), dim=1)
    return image, F.normalize(image + 0.6 * torch.randn(n, 8, generator=g), dim=1)


def slow_recall(query: torch.Tensor, candidate: torch.Tensor, k: int) -> float:
    hits = 0
    for i in range(len(query)):
        ranked = sorted(range(len(candidate)), key=lambda j: -float(query[i] @ candidate[j]))
        hits += i in ranked[:k]
    return hits / len(query)


def recalls() -> list[float]:
    image, text = pairs()
    return recall_at_k(image, text, (1, 5, 10), chunk=4) + recall_at_k(text, image, (1, 5, 10), chunk=100)


def test_recall_is_the_slow_count_on_any_number_of_ranks() -> None:
    image, text = pairs()
    expected = [slow_recall(a, b, k) for a, b in ((image, text), (text, image)) for k in (1, 5, 10)]
    assert 0.1 < expected[0] < 0.9
    assert recalls() == pytest.approx(expected)
    for world in (2, 3):
        for got in on_ranks(world, recalls):
            assert got == pytest.approx(expected)


def test_scores_are_not_rounded_by_autocast() -> None:
    image, _ = pairs()
    near = F.normalize(image + 30 * image.mean(dim=0) / image.mean(dim=0).norm(), dim=1)  # cosines near 1
    with torch.autocast("cpu", torch.bfloat16):
        assert recall_at_k(near, near, (1,)) == pytest.approx([1.0])


def test_a_model_that_says_the_same_of_everything_gets_chance() -> None:
    same = F.normalize(torch.ones(20, 4), dim=1)
    assert recall_at_k(same, same, (1, 5)) == pytest.approx([1 / 20, 5 / 20])


def test_no_number_is_no_recall() -> None:
    image, text = pairs(5)
    image[2] = math.nan
    assert all(
        math.isnan(value)
        for value in retrieval(EncodedPairs(image, text, torch.ones(5, dtype=torch.long), torch.arange(5), {})).values()
    )


def test_the_held_out_loss_is_that_of_a_loop_over_batches() -> None:
    image, text = pairs(11)
    count = torch.tensor([1 + n % 3 for n in range(11)])
    captions = torch.cat([text[n : n + 1] if j == 0 else torch.zeros(1, text.shape[1]) for n in range(11)
                          for j in range(int(count[n]))])  # fmt: skip
    found = EncodedPairs(image, captions, count, torch.arange(11), {})
    expected = 0.0
    for start in range(0, 11, 4):  # batches of 4, 4 and 3
        score = 7.0 * image[start : start + 4] @ text[start : start + 4].T
        own = torch.arange(len(score))
        for way in (score, score.T):
            expected += float(F.cross_entropy(way, own, reduction="sum")) / 2 / 11
    for chunk in (1, 3, 1024):
        assert infonce(found, 7.0, 4, chunk) == pytest.approx(expected, rel=1e-5)


class Fake(torch.nn.Module):
    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> Features:
        return Features(images, self.text(tokens), torch.tensor(1.0))

    def text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Equal captions differ by noise, as in batches of other sizes."""
        return tokens[:, :1] + 1e-6 * torch.rand(len(tokens), 1)


def encode() -> EncodedPairs:
    """Ranks bring 4, 3, ... pairs, the last none, in reverse order of rows. Row n has 1 + n % 3 captions: 10 n, and
    then -1."""
    rank, world = distributed.rank(), distributed.world_size()
    mine = torch.arange(10)[rank :: max(world - 1, 1)].flip(0) if rank < max(world - 1, 1) else torch.arange(0)
    tokens = torch.tensor([[token, 7] for n in mine.tolist() for token in (10 * n, -1, -1)[: 1 + n % 3]]).view(-1, 2)
    batch = Batch(mine[:, None].float(), tokens, mine, skipped={"bad": 1}, count_B=1 + mine % 3)
    fake: Any = Fake()  # has a forward of the same form
    return encode_pairs(fake, [batch] if len(mine) else [], torch.device("cpu"))


def test_uneven_ranks_put_their_pairs_together() -> None:
    for world in (1, 3):
        for found in on_ranks(world, encode):
            assert found.row_N.tolist() == list(range(10))
            assert found.image_ND[:, 0].tolist() == list(range(10))
            assert found.skipped == {"bad": max(world - 1, 1)}
            assert found.count_N.tolist() == [1 + n % 3 for n in range(10)]
            expected = [token for n in range(10) for token in (10 * n, -1, -1)[: 1 + n % 3]]
            assert found.text_TD[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
            assert len({x for x in found.text_TD[:, 0].tolist() if x < -0.5}) == 1  # equal to the bit


def test_folders_called_by_wordnet_ids_get_the_names_of_their_classes() -> None:
    assert imagenet_names(["n01440764", "n01443537", "sky_blue"]) == ["tench", "goldfish", "sky blue"]
    with pytest.raises(UserError, match=r"n00000001.*none of ImageNet's 1,000 classes"):
        imagenet_names(["n01440764", "n00000001"])
    assert imagenet_names(["n1", "cup"]) == ["n1", "cup"]
