"""Retrieval on shards: CLIP_benchmark's numbers, a slow oracle with ties, any number of ranks, never N x T scores."""

from __future__ import annotations

import json
import tarfile
from itertools import permutations
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_retrieval
from eval_data import picture, write_model
from ranks import on_ranks
from shards import add, make_shards
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from vlcl.cli import app
from vlcl.errors import UserError
from vlcl_eval.retrieval import KS, Keys, evaluate_retrieval, recall_of_sets, recalls, shares

ANIMALS = ["cat", "dog", "horse", "cow", "hen", "owl", "bee", "ant", "fox", "pig"]


def captions_of(i: int) -> list[str]:
    """One to three captions, all of them different."""
    animal = ANIMALS[i % 10]
    return [f"{word} {animal} number {i}" for word in ("a", "one more", "photo of")][: 1 + i % 3]


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, data in files.items():
                add(tar, f"{key}.{suffix}", data)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a retrieval folder of CLIP_benchmark's form with 75 images in 3 shards."""
    folder = tmp_path_factory.mktemp("retrieval")
    write_model(folder / "model")
    wds = folder / "wds_animals"
    for shard in range(3):
        numbers = range(25 * shard, 25 * shard + 25)
        files = {f"s{i:07d}": {"png": picture((i,), i), "txt": "\n".join(captions_of(i)).encode()} for i in numbers}
        write_shard(wds / "test" / f"{shard}.tar", files)
    (wds / "test" / "nshards.txt").write_text("3")
    (wds / "dataset_type.txt").write_text("retrieval")
    return folder


def measure(root: Path, shards: Path | str, output: Path, **more: Any) -> dict[str, Any]:
    return evaluate_retrieval(str(root / "model"), str(shards), output=output, batch_size=16, **more)


def test_same_numbers_as_clip_benchmark(root: Path, tmp_path: Path) -> None:
    """The captions differ, so no two of them tie; several an image."""
    record = measure(root, root / "wds_animals", tmp_path)
    spec = f"local-dir:{root / 'model'}"
    model, _, transform = open_clip.create_model_and_transforms(spec)
    data = build_dataset(
        "wds/wds_animals", root=str(root / "wds_animals"), transform=transform, split="test", task="zeroshot_retrieval"
    )
    batches: list[Any] = []
    for image, texts in data:
        batches.append((image[None], [texts]))
    images, texts = torch.cat([x for x, _ in batches]), [t for _, own in batches for t in own]
    assert [len(t) for t in texts] == [1 + i % 3 for i in range(75)]
    loader = [(images[i : i + 25], texts[i : i + 25]) for i in range(0, 75, 25)]
    expected = zeroshot_retrieval.evaluate(
        model.eval(), loader, open_clip.get_tokenizer(spec), "cpu", amp=False, recall_k_list=list(KS)
    )
    assert record["metrics"] == pytest.approx(expected, abs=1e-6)
    assert len(set(expected.values())) > 3
    assert record["sizes"] == {"images": 75, "captions": 150, "shards": 3}


def by_all_orders(score_QC: Tensor, own: list[set[int]], k: int) -> float:
    """Share of queries with an own candidate among the first k, averaged over every order of the candidates."""
    total = 0.0
    for row, mine in zip(score_QC.double().tolist(), own):
        hits = [bool(mine & set(sorted(order, key=lambda c: -row[c])[:k])) for order in permutations(range(len(row)))]
        total += sum(hits) / len(hits)
    return total / len(own)


@pytest.mark.parametrize("seed", range(4))
def test_ties_count_as_the_mean_over_all_orders(seed: int) -> None:
    """Scores of few values, up to three own candidates a query, 6 candidates: 720 orders."""
    generator = torch.Generator().manual_seed(seed)
    query, candidate = (torch.randint(0, 2, (n, 3), generator=generator).double() for n in (5, 6))
    own = [set(torch.randperm(6, generator=generator)[: 1 + i % 3].tolist()) for i in range(5)]
    own_NM = torch.tensor([[*sorted(places), -1, -1][:3] for places in own])
    found = recall_of_sets(query, candidate, own_NM, ks=(1, 2, 3, 5))
    score = query @ candidate.T
    assert len(score.unique()) < 5
    assert found == pytest.approx([by_all_orders(score, own, k) for k in (1, 2, 3, 5)], abs=1e-12)


def test_a_model_that_scores_all_alike_gets_chance() -> None:
    own = torch.arange(40)[:, None]
    assert recall_of_sets(torch.ones(40, 2), torch.ones(40, 2), own) == pytest.approx([k / 40 for k in KS])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_scores_are_made_in_chunks_and_forgotten() -> None:
    from vlcl_eval.retrieval import Pairs

    generator = torch.Generator().manual_seed(0)
    count_N = torch.randint(1, 4, (600,), generator=generator)
    image, text = (torch.randn(n, 8, generator=generator) for n in (600, int(count_N.sum())))
    pairs = Pairs(image, text, count_N, [], "")
    whole = recalls(pairs, chunk=10_000)
    with Largest() as largest:
        small = recalls(pairs, chunk=32)
    assert small == pytest.approx(whole, abs=1e-12)
    assert largest.numel <= 32 * len(text)
    with Largest() as largest:
        recalls(pairs, chunk=10_000)
    assert largest.numel == 600 * len(text)  # the mode does see such a matrix


def _on_rank(root: str, output: str, workers: int) -> dict[str, Any]:
    return measure(Path(root), Path(root) / "wds_animals", Path(output), workers=workers)


@pytest.mark.parametrize(("world", "workers"), [(3, 0), (2, 2)])
def test_ranks_and_workers_share_the_work(root: Path, tmp_path: Path, world: int, workers: int) -> None:
    """Two workers on each of two ranks are more readers than shards: the readers of a shard share its samples."""
    alone = measure(root, root / "wds_animals", tmp_path / "1")
    for record in on_ranks(world, _on_rank, str(root), str(tmp_path / "n"), workers):
        assert record["metrics"] == pytest.approx(alone["metrics"], abs=1e-9)
        assert record["fingerprint"] == alone["fingerprint"]
        assert record["sizes"] == alone["sizes"]
    assert len((tmp_path / "n" / "retrieval.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("num_shards", range(1, 8))
@pytest.mark.parametrize("num_readers", range(1, 8))
def test_readers_read_each_sample_once(num_shards: int, num_readers: int) -> None:
    read = []
    for reader in range(num_readers):
        for shard, part, parts in shares(num_shards, reader, num_readers):
            read += [(shard, position) for position in range(12) if position % parts == part]
    assert sorted(read) == [(shard, position) for shard in range(num_shards) for position in range(12)]


def test_bad_samples_are_named_counted_and_left_out(root: Path, tmp_path: Path) -> None:
    good = {f"{i:03d}": {"png": picture((i,), i), "txt": f"a {ANIMALS[i]}".encode()} for i in range(8)}
    bad = {
        "100": {"png": b"no image", "txt": b"a cat"},
        "101": {"png": picture((1,), 1), "txt": b"\n  \n"},
        "102": {"txt": b"a dog"},
        "103": {"png": picture((1,), 1), "txt": b"\xff\xfe\xfa"},
        "104": {"png": picture((3,), 3), "txt": b"a hen\n\nan owl"},
    }
    write_shard(tmp_path / "whole" / "0.tar", good | {"104": {"png": bad["104"]["png"], "txt": b"a hen\nan owl"}})
    write_shard(tmp_path / "bad" / "0.tar", good | bad)
    said: list[str] = []
    whole = measure(root, tmp_path / "whole" / "0.tar", tmp_path / "out")
    record = measure(root, tmp_path / "bad" / "0.tar", tmp_path / "out", say=said.append)
    assert record["metrics"] == pytest.approx(whole["metrics"])
    assert record["sizes"]["images"] == 9
    assert sum(record["left_out"].values()) == 1 + 2 + 1 + 1 + 1  # two empty lines of 101, one of 104
    for word in ("not an image", "empty caption", "no image", "caption not UTF-8", "sample 100"):
        assert word in said[0]


def test_captions_in_json(root: Path, tmp_path: Path) -> None:
    def files(i: int) -> dict[str, bytes]:
        captions: Any = captions_of(i) if i % 2 else captions_of(i)[0]
        return {"png": picture((i,), i), "json": json.dumps({"captions": captions}).encode()}

    write_shard(tmp_path / "0.tar", {f"{i:03d}": files(i) for i in range(12)})
    record = measure(root, tmp_path / "0.tar", tmp_path / "out", keys=Keys(json_text="caption;captions"))
    assert record["sizes"]["captions"] == sum(len(captions_of(i)) if i % 2 else 1 for i in range(12))
    with pytest.raises(UserError, match="no sample has both an image and a caption"):
        measure(root, tmp_path / "0.tar", tmp_path / "out")


def test_training_shards_and_the_command(root: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", [10, 7])
    result = CliRunner().invoke(
        app,
        ["eval", "retrieval", str(root / "model"), str(shards), "--output", str(tmp_path / "out"), "--workers", "0"],
    )
    assert result.exit_code == 0, result.output
    assert "17 images, 17 captions" in result.output
    assert "R@10" in result.output
    record = json.loads((tmp_path / "out" / "retrieval.jsonl").read_text())
    assert record["sizes"] == {"images": 17, "captions": 17, "shards": 2}


def test_mistakes(root: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", [10, 7])
    damaged = shards / "00001.tar"
    damaged.write_bytes(damaged.read_bytes()[:3000])

    def error(*arguments: str) -> str:
        result = CliRunner().invoke(
            app, ["eval", "retrieval", str(root / "model"), *arguments, "--output", str(tmp_path)]
        )
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        return result.output

    assert "00001.tar" in error(str(shards))
    assert "nowhere" in error(str(tmp_path / "nowhere"))
    assert "--split 'val'" in error(str(root / "wds_animals"), "--split", "val")
    classes = tmp_path / "wds_classes"
    (classes / "test").mkdir(parents=True)
    (classes / "test" / "nshards.txt").write_text("0")
    assert "vlcl eval zeroshot" in error(str(classes))
