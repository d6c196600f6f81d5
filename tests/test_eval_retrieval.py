"""Retrieval on shards: the numbers of CLIP_benchmark's code and of a slow count, streamed, on any number of ranks."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_data import write_model
from PIL import Image
from ranks import on_ranks
from shards import add, make_shards
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import vlcl.zeroshot
from vlcl.cli import app
from vlcl.data.captions import captions_from
from vlcl.data.decode import BadSample, Keys
from vlcl.errors import UserError
from vlcl.zeroshot import recall_at_k, recall_of_sets
from vlcl_eval.clip_benchmark.retrieval import (
    FILE,
    Pairs,
    evaluate_retrieval,
    recalls,
    shares,
)

WORDS = ["red", "blue", "tall", "small", "house", "river", "dog", "cat", "tree", "snow", "boat", "night", "road"]


def noise(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((40, 32)).save(out, "PNG")
    return out.getvalue()


def captions_of(index: int) -> list[str]:
    """1 to 4 captions, all different."""
    rng = np.random.default_rng(index)
    return [" ".join([*rng.choice(WORDS, 3), str(index)]) for _ in range(1 + index % 4)]


def write_retrieval(folder: Path, num: int, shards: int = 2) -> Path:
    """A wds folder as CLIP_benchmark's converter writes it."""
    (folder / "test").mkdir(parents=True)
    for number in range(shards):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as tar:
            for i in range(number * num // shards, (number + 1) * num // shards):
                add(tar, f"s{i:07d}.png", noise(i))
                add(tar, f"s{i:07d}.txt", "\n".join(captions_of(i)).encode())
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def evaluate(model: str, shards: Path | str, tmp: Path, **more: Any) -> dict[str, Any]:
    return evaluate_retrieval(model, str(shards), output=tmp / "out", say=lambda text: None, **more)


def test_same_numbers_as_clip_benchmark(tmp_path: Path) -> None:
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_retrieval
    from clip_benchmark.models.open_clip import load_open_clip
    from torch.utils.data import DataLoader

    folder, model = write_retrieval(tmp_path / "wds_pairs", 90), write_model(tmp_path / "model")
    clip, transform, tokenizer = load_open_clip(f"local-dir:{model}", pretrained="")
    data = build_dataset("wds/pairs", root=str(folder), transform=transform, split="test", task="zeroshot_retrieval")
    loader: Any = DataLoader(data.batched(16), batch_size=None)
    expected = zeroshot_retrieval.evaluate(clip.eval(), loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    found = evaluate(model, folder, tmp_path)
    assert found["sizes"] == {"images": 90, "captions": sum(len(captions_of(i)) for i in range(90)), "shards": 2}
    assert found["metrics"] == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["image_retrieval_recall@10"] < expected["text_retrieval_recall@10"] < 0.9
    assert (found["split"], found["left_out"]) == ("test", {})


def random_pairs(images: int, captions: int, width: int = 8) -> Pairs:
    """Several captions an image, near it."""
    g = torch.Generator().manual_seed(0)
    owner_T = torch.cat([torch.arange(images), torch.randint(images, (captions - images,), generator=g)]).sort().values
    image_ND = F.normalize(torch.randn(images, width, generator=g), dim=1)
    text_TD = F.normalize(image_ND[owner_T] + 0.7 * torch.randn(captions, width, generator=g), dim=1)
    return Pairs(image_ND, text_TD, owner_T.bincount(minlength=images), [], "")


def slow_recalls(pairs: Pairs, k: int) -> tuple[float, float]:
    """In float64, a query at a time, by sorting."""
    image, text = pairs.image_ND.double().numpy(), pairs.text_TD.double().numpy()
    owner = np.repeat(np.arange(len(image)), pairs.count_N.numpy())
    by_text = [owner[t] in np.argsort(-(image @ text[t]))[:k] for t in range(len(text))]
    by_image = [i in owner[np.argsort(-(text @ image[i]))[:k]] for i in range(len(image))]
    return float(np.mean(by_text)), float(np.mean(by_image))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_recalls_are_the_slow_count(chunk: int) -> None:
    pairs = random_pairs(101, 263)
    found = recalls(pairs, chunk=chunk)
    for k in (1, 5, 10):
        by_text, by_image = slow_recalls(pairs, k)
        assert 0.1 < by_text != by_image < 1
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(by_text)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(by_image)


def test_one_caption_an_image_is_the_recall_of_training() -> None:
    pairs = random_pairs(60, 60)
    found = list(recalls(pairs).values())
    assert found[:3] == pytest.approx(recall_at_k(pairs.text_TD, pairs.image_ND))
    assert found[3:] == pytest.approx(recall_at_k(pairs.image_ND, pairs.text_TD))


def orders(score: Sequence[float], own: Sequence[int], k: int) -> float:
    """Share of the orders of equal candidates that put one of `own` among the first k."""
    hits = [
        any(c in own for c in sorted(order, key=lambda c: -score[c])[:k])  # sorted() keeps the order of equal ones
        for order in itertools.permutations(range(len(score)))
    ]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_equal_scores_count_as_in_a_random_order(k: int) -> None:
    rng = np.random.default_rng(k)
    query = torch.tensor(rng.integers(0, 2, (12, 2)), dtype=torch.float32)
    candidate = torch.tensor(rng.integers(0, 2, (6, 2)), dtype=torch.float32)
    own = [sorted(rng.choice(6, 1 + i % 3, replace=False).tolist()) for i in range(12)]
    own_NM = torch.tensor([[*places, *[-1] * (3 - len(places))] for places in own])
    expected = [orders((candidate @ q).tolist(), places, k) for q, places in zip(query, own)]
    assert k == 6 or len(set(expected)) > 3
    assert recall_of_sets(query, candidate, own_NM.__getitem__, [k], chunk=5) == pytest.approx([np.mean(expected)])


def same_text(index: int, files: dict[str, bytes]) -> None:
    files["txt"] = b"a picture"


def test_equal_captions_tie_exactly(tmp_path: Path) -> None:
    """Captions that are the same text cannot be told apart: k of N for each image, whatever was encoded when."""
    folder, model = make_shards(tmp_path / "shards", [13, 8], same_text), write_model(tmp_path / "model")
    found = evaluate(model, folder, tmp_path, batch_size=5)["metrics"]
    for k in (1, 5, 10):
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(k / 21)
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(k / 21)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made within has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return out


def test_scores_of_all_with_all_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(2000, 5000)
    with Largest() as largest:
        whole = recalls(pairs, chunk=64)
    assert largest.numbers == 64 * 5000  # of 10,000,000
    monkeypatch.setattr(vlcl.zeroshot, "MOST_SCORES", 10 * 5000)
    with Largest() as largest:
        assert recalls(pairs) == pytest.approx(whole)
    assert largest.numbers <= 10 * 5000


def damage(index: int, files: dict[str, bytes]) -> None:
    files["png"], files["txt"] = noise(index), "\n".join(captions_of(index)).encode()
    if index in (3, 9, 10):
        files["png"] = b"\x89PNG and no more"
    if index == 8:
        files["txt"] += b"\n \n\n"
    if index == 14:
        files["txt"] = b" "
    if index == 20:
        files["txt"] = b"\xff\xfe"
    if index == 21:
        del files["txt"]
    if index == 22:
        del files["png"]


def damaged_shards(folder: Path) -> Path:
    return make_shards(folder, [11, 19], damage)


LEFT_OUT = {"broken image": 3, "empty caption": 1, "caption not UTF-8": 1, "no caption": 1, "no image": 1}


def test_what_cannot_be_used_is_named_counted_and_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    model = write_model(tmp_path / "model")
    found = evaluate_retrieval(model, str(damaged_shards(tmp_path / "bad")), output=tmp_path / "out", say=said.append)
    assert found["left_out"] == LEFT_OUT
    assert found["sizes"]["images"] == 30 - 7
    assert "00000.tar, sample 000003" in said[0]
    assert "and 2 more" in said[0]
    clean = tmp_path / "clean"
    clean.mkdir()
    with tarfile.open(clean / "0.tar", "w") as tar:
        for i in set(range(30)) - {3, 9, 10, 14, 20, 21, 22}:
            add(tar, f"{i}.png", noise(i))
            add(tar, f"{i}.txt", "\r\n".join(captions_of(i)).encode())
    good = evaluate(model, clean, tmp_path)
    assert good["left_out"] == {}
    assert (good["metrics"], good["fingerprint"]) == (pytest.approx(found["metrics"]), found["fingerprint"])


def test_the_same_on_any_number_of_ranks_and_readers(tmp_path: Path) -> None:
    """With more ranks than shards, who then share a shard; a rank may be left without a sample."""
    folder, model = damaged_shards(tmp_path / "shards"), write_model(tmp_path / "model")
    expected = evaluate(model, folder, tmp_path)
    parts = [expected, evaluate(model, folder, tmp_path, batch_size=4, workers=3)]
    for world in (2, 3):
        run = partial(evaluate_retrieval, output=tmp_path / f"of {world}", batch_size=7)
        parts += on_ranks(world, run, model, str(folder))
        assert len((tmp_path / f"of {world}" / FILE).read_text().splitlines()) == 1
    for found in parts:
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-9)
        assert all(found[name] == expected[name] for name in ("fingerprint", "sizes", "weights"))
        assert found["left_out"] == LEFT_OUT


@pytest.mark.parametrize("num_shards", range(1, 8))
@pytest.mark.parametrize("num_readers", range(1, 8))
def test_readers_share_each_shard_once(num_shards: int, num_readers: int) -> None:
    found = [share for reader in range(num_readers) for share in shares(num_shards, reader, num_readers)]
    for shard in range(num_shards):
        parts = [(part, parts) for number, part, parts in found if number == shard]
        assert sorted(parts) == [(part, len(parts)) for part in range(len(parts))]
    assert {shard for shard, _, _ in found} == set(range(num_shards))


def test_a_damaged_shard_stops_all_ranks_with_its_name(tmp_path: Path) -> None:
    folder, model = damaged_shards(tmp_path / "shards"), write_model(tmp_path / "model")
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"00001.tar.*whole samples\)\nFetch them again"):
        evaluate(model, folder, tmp_path, workers=2)
    assert (tmp_path / "out" / FILE).read_text() == ""


def test_compressed_shards_and_several_sources(tmp_path: Path) -> None:
    folder, model = damaged_shards(tmp_path / "shards"), write_model(tmp_path / "model")
    expected = evaluate(model, folder, tmp_path)
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress((folder / "00001.tar").read_bytes()))
    found = evaluate(model, f"{folder}/0000{{0..0}}.tar::{packed}", tmp_path)
    assert (found["metrics"], found["fingerprint"]) == (pytest.approx(expected["metrics"]), expected["fingerprint"])


def as_json(index: int, files: dict[str, bytes]) -> None:
    del files["txt"]
    files["png"] = noise(index)
    files["json"] = json.dumps({"id": index, "texts": captions_of(index), "one": captions_of(index)[0]}).encode()


def test_captions_of_a_json_key(tmp_path: Path) -> None:
    folder, model = make_shards(tmp_path / "shards", [20], as_json), write_model(tmp_path / "model")
    several = evaluate(model, folder, tmp_path, keys=Keys(json_text="none;texts"))
    assert several["sizes"]["captions"] == 50
    assert several["metrics"] == pytest.approx(
        evaluate(model, write_retrieval(tmp_path / "wds_pairs", 20), tmp_path)["metrics"]
    )
    assert evaluate(model, folder, tmp_path, keys=Keys(json_text="one"))["sizes"]["captions"] == 20
    with pytest.raises(UserError, match=r"no sample has both an image and a caption.*--text-key"):
        evaluate(model, folder, tmp_path)


def test_captions_of_a_sample() -> None:
    files = {"txt": "\ufeffone\r\ntwo\u2028three".encode(), "json": b'{"a": "one\\ntwo", "b": ["x", 1]}'}
    assert captions_from(files, Keys()).texts == ("one", "two", "three")  # str.splitlines, as in CLIP_benchmark
    assert captions_from(files, Keys(text="cap;txt")).texts == ("one", "two", "three")
    assert captions_from(files, Keys(json_text="a")).texts == ("one\ntwo",)
    for keys, reason in ((Keys(json_text="c"), "no caption"), (Keys(text="cap"), "no caption")):
        with pytest.raises(BadSample, match=reason):
            captions_from(files, keys)
    for content in (b"[1]", b"{"):
        with pytest.raises(BadSample, match="bad json"):
            captions_from({"json": content}, Keys(json_text="a"))


def test_mistakes_are_named(tmp_path: Path) -> None:
    folder = write_retrieval(tmp_path / "wds_pairs", 4)
    cases = [
        (str(tmp_path / "none"), "test", ["no shards match", "none"]),
        (str(tmp_path / "{0..2}.tar"), "test", ["3 of the 3 shards"]),
        (str(folder), "train", ["--split 'train'", "it has test"]),
    ]
    for shards, split, words in cases:
        with pytest.raises(UserError) as caught:
            evaluate_retrieval("ViT-B-32", shards, split, output=tmp_path)  # found before the model is built
        assert all(word in str(caught.value) for word in words), caught.value
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(UserError, match=r"says 2 shards.*1\.tar"):
        evaluate("ViT-B-32", folder, tmp_path)
    (folder / "test" / "nshards.txt").write_text("0")
    with pytest.raises(UserError, match=r"nshards\.txt says 0"):
        evaluate("ViT-B-32", folder, tmp_path)
    (folder / "dataset_type.txt").unlink()
    with pytest.raises(UserError, match="vlcl eval zeroshot MODEL"):
        evaluate("ViT-B-32", folder, tmp_path)


def test_command(tmp_path: Path) -> None:
    folder, model = write_retrieval(tmp_path / "wds_pairs", 12), write_model(tmp_path / "model")
    output = tmp_path / "out"
    command = ["eval", "retrieval", model, str(folder), "--output", str(output), "--workers", "0"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "12 images, 30 captions" in done.output
    record = json.loads((output / FILE).read_text())
    value = f"{100 * record['metrics']['text_retrieval_recall@5']:.2f}"
    assert value in next(line for line in done.output.splitlines() if "text_retrieval_recall" in line)
    assert CliRunner().invoke(app, [*command, "--text-key", "caption"]).exit_code == 2
