"""Cached features: once for each image, whole after interruptions, the same on any number of ranks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_data import samples, write_model, write_native
from ranks import on_ranks

from vlcl import distributed
from vlcl.errors import UserError
from vlcl_eval.datasets.find import find_data_set
from vlcl_eval.datasets.images import read_image
from vlcl_eval.datasets.records import DataSet
from vlcl_eval.features import BadImages, Extractor
from vlcl_eval.models import load
from vlcl_eval.row_store import RowStore

CPU = torch.device("cpu")


def make(folder: Path, bad: tuple[int, ...] = ()) -> tuple[DataSet, Extractor]:
    images = samples(10, 30, 0)
    for place in bad:
        images[place] = (b"no image", images[place][1])
    write_native(folder / "data", "mnist", train=samples(10, 3, 1), test=images)
    model = load(write_model(folder / "model"))
    return find_data_set(folder / "data", "mnist"), Extractor(model, folder / "cache", CPU, say=lambda text: None)


def test_features_are_the_towers_and_come_from_the_cache(tmp_path: Path) -> None:
    data, extractor = make(tmp_path)
    rows = [7, 3, 299, 150]
    features, computed = extractor.features(data, data.test, rows)
    assert computed == rows
    transform = extractor.model.transform(center_crop=True)
    images = torch.stack([transform(read_image(data.test.refs[row])) for row in rows])
    torch.testing.assert_close(features, extractor.model.image(images))
    again, computed = extractor.features(data, data.test, [299, 8, 7])
    assert computed == [8]
    assert torch.equal(again[[0, 2]], features[[2, 0]])
    other, computed = extractor.features(data, data.train, [7])
    assert computed == [7]
    assert not torch.equal(other[0], features[0])


def test_another_model_or_preprocessing_never_shares_a_cache(tmp_path: Path) -> None:
    data, extractor = make(tmp_path)
    first, _ = extractor.features(data, data.test, [0, 1])
    stranger = replace(extractor, model=load(write_model(tmp_path / "stranger", seed=1)))
    second, computed = stranger.features(data, data.test, [0, 1])
    assert computed == [0, 1]
    assert not torch.allclose(first, second)
    assert extractor.features(data, data.test, [0, 1])[1] == []
    assert replace(extractor, precision="bf16").features(data, data.test, [0])[1] == [0]
    squashed, computed = extractor.features(replace(data, center_crop=False), data.test, [0])
    assert computed == [0]
    assert not torch.allclose(squashed[0], first[0])


def chunks(extractor: Extractor) -> list[Path]:
    return sorted(extractor.cache.rglob("*.safetensors"))


def test_a_damaged_chunk_is_computed_again(tmp_path: Path) -> None:
    data, extractor = make(tmp_path)
    said: list[str] = []
    extractor = replace(extractor, say=said.append)
    whole, _ = extractor.features(data, data.test, range(20))
    extractor.features(data, data.test, range(20, 30))
    damaged = chunks(extractor)[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    again, computed = extractor.features(data, data.test, range(30))
    assert computed == list(range(20))
    assert torch.equal(again[:20], whole)
    assert len(said) == 1
    assert damaged.name in said[0]
    (damaged.parent / "00000099-1.tmp").write_bytes(b"half a chunk")  # of a run that was killed
    assert extractor.features(data, data.test, range(30))[1] == []


def test_a_chunk_of_another_model_is_not_believed(tmp_path: Path) -> None:
    data, extractor = make(tmp_path)
    right, _ = extractor.features(data, data.test, [0, 1, 2])
    stranger = replace(extractor, model=load(write_model(tmp_path / "stranger", seed=1)), cache=tmp_path / "other")
    stranger.features(data, data.test, [0, 1, 2])
    chunks(extractor)[0].write_bytes(chunks(stranger)[0].read_bytes())
    again, computed = extractor.features(data, data.test, [0, 1, 2])
    assert computed == [0, 1, 2]
    assert torch.equal(again, right)


def test_interrupted_extraction_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, extractor = make(tmp_path)
    monkeypatch.setattr("vlcl_eval.features.CHUNK", 64)
    forwards: list[int] = []
    hook = extractor.model.image.register_forward_hook(lambda module, args, out: forwards.append(len(args[0])))
    save = RowStore.save

    def save_twice_then_stop(store: RowStore, *args: Any) -> None:
        if len(chunks(extractor)) == 2:
            raise KeyboardInterrupt
        save(store, *args)

    monkeypatch.setattr(RowStore, "save", save_twice_then_stop)
    with pytest.raises(KeyboardInterrupt):
        extractor.features(data, data.test, range(300))
    monkeypatch.setattr(RowStore, "save", save)
    forwards.clear()
    features, computed = extractor.features(data, data.test, range(300))
    hook.remove()
    assert len(computed) == sum(forwards) == 300 - 2 * 64
    fresh, _ = replace(extractor, cache=tmp_path / "fresh").features(data, data.test, range(300))
    torch.testing.assert_close(features, fresh)


def test_bad_images_are_named_and_counted(tmp_path: Path) -> None:
    data, extractor = make(tmp_path, bad=(4, 70))
    for _ in range(3):  # bad images are tried again and leave nothing behind
        with pytest.raises(
            BadImages, match=r"2 of the test images.*test 0004\.png.*not an image.*--mode strict"
        ) as caught:
            extractor.features(data, data.test, range(300))
        assert set(caught.value.reasons) == {4, 70}
        assert len(chunks(extractor)) == 1
        assert isinstance(caught.value, UserError)
    features, computed = extractor.features(data, data.test, [row for row in range(300) if row not in (4, 70)])
    assert len(features) == 298
    assert computed == []


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, extractor = make(tmp_path)

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("vlcl_eval.row_store.save_file", full)
    with pytest.raises(UserError, match="cannot be written: disk full: no space left; make room"):
        extractor.features(data, data.test, [0])
    assert not list(extractor.cache.rglob("*.tmp"))


def test_pixels_are_what_the_tower_sees(tmp_path: Path) -> None:
    data, extractor = make(tmp_path)
    pixels, computed = extractor.pixels(data, data.test, [5, 2])
    assert (pixels.dtype, pixels.shape, computed) == (torch.uint8, (2, 3, 32, 32), [5, 2])
    cfg = extractor.model.preprocess
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (cfg.mean, cfg.std))
    transform = extractor.model.transform(center_crop=True)
    expected = torch.stack([transform(read_image(data.test.refs[row])) for row in (5, 2)])
    torch.testing.assert_close((pixels.float() / 255 - mean) / std, expected, atol=1e-5, rtol=1e-5)


def _with_own_cache(folder: str, cached: int) -> list[str]:
    """What each rank is told where the ranks' caches are not one folder: of an extraction, then of one by itself."""
    own = Path(folder) / f"cache of {distributed.rank()}"
    data = find_data_set(Path(folder) / "data", "mnist")
    extractor = Extractor(load(str(Path(folder) / "model")), own, CPU, say=lambda text: None)
    if distributed.rank() == 0:
        shutil.copytree(Path(folder) / "cache", own)
    told = []
    for rows in (range(cached), range(cached + 9)):
        with pytest.raises(UserError) as caught:
            extractor.features(data, data.test, rows)
        told.append(str(caught.value))
    return told


def test_ranks_that_do_not_share_a_cache_all_stop(tmp_path: Path) -> None:
    """With all of it cached on rank 0 alone, and with a part."""
    data, extractor = make(tmp_path)
    extractor.features(data, data.test, range(40))
    for told in on_ranks(2, _with_own_cache, str(tmp_path), 40):
        assert all("--cache must be a folder that all ranks see" in text for text in told)


def _meets_bad_images(folder: str) -> tuple[str, list[int]]:
    data = find_data_set(Path(folder) / "data", "mnist")
    extractor = Extractor(load(str(Path(folder) / "model")), Path(folder) / "cache", CPU, say=lambda text: None)
    with pytest.raises(BadImages) as caught:
        extractor.features(data, data.test, range(20))
    return str(caught.value), sorted(caught.value.reasons)


def test_bad_images_are_bad_images_on_all_ranks(tmp_path: Path) -> None:
    make(tmp_path, bad=(4, 6, 7))
    first, second = on_ranks(2, _meets_bad_images, str(tmp_path))
    assert first == second
    assert first[1] == [4, 6, 7]


def _on_rank(folder: str) -> tuple[torch.Tensor, list[int], int]:
    extractor_data = find_data_set(Path(folder) / "data", "mnist")
    extractor = Extractor(load(str(Path(folder) / "model")), Path(folder) / "cache", CPU, say=lambda text: None)
    forwards: list[int] = []
    extractor.model.image.register_forward_hook(lambda module, args, out: forwards.append(len(args[0])))
    features, computed = extractor.features(extractor_data, extractor_data.test, range(101))
    return features, computed, sum(forwards)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work(tmp_path: Path, world: int) -> None:
    data, extractor = make(tmp_path)
    alone, _ = replace(extractor, cache=tmp_path / "alone").features(data, data.test, range(101))
    results = on_ranks(world, _on_rank, str(tmp_path))
    for features, computed, _ in results:
        torch.testing.assert_close(features, alone)
        assert computed == list(range(101))
    counts = [forwards for _, _, forwards in results]
    assert sum(counts) == 101
    assert max(counts) - min(counts) <= 1
    assert extractor.features(data, data.test, range(101))[1] == []  # one rank reads what several wrote
