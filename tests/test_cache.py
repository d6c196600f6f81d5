"""data.cache: the same batches to the bit as without it, from memory or from a folder that processes share."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from shards import left_by_killed, make_shards, tiny_model
from test_data import CPU, assert_same_batches, sources_of, take, tokenize

import vlcl.data.reader
import vlcl.data.room
from vlcl.config import load_config
from vlcl.data.cache import CacheReader, open_cache
from vlcl.data.captions import Choice
from vlcl.data.decode import Limits
from vlcl.data.order import Layout
from vlcl.data.preprocess import in_two_parts, own_generators, seed_generators
from vlcl.data.reader import Decoder, ShardReader, Sources
from vlcl.data.stream import EvalStream, Position, TrainStream, make_loader
from vlcl.errors import UserError
from vlcl.from_config import make_reader
from vlcl.model import build_model

COUNTS = (7, 20, 3, 13)


def noise(index: int) -> Image.Image:
    rng = np.random.default_rng(index)
    return Image.fromarray(rng.integers(0, 256, (*rng.integers(24, 60, 2), 3), np.uint8))


def change(i: int, files: dict[str, bytes]) -> None:
    """Pictures of many sizes in which every pixel tells, and some bad samples."""
    buffer = io.BytesIO()
    noise(i).save(buffer, "PNG")
    files["png"] = buffer.getvalue()
    if i % 9 == 4:
        files["png"] = b"<html>"
    if i % 11 == 3:
        files["txt"] = b" "


def preprocess(train: bool, **settings: Any) -> Callable[[Image.Image], torch.Tensor]:
    found: Any = image_transform_v2(PreprocessCfg(size=(32, 32), **settings), is_train=train)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("shards")
    return make_shards(base / "a", COUNTS, change), make_shards(base / "b", (9, 9), change)


def cached(
    place: Path | str, sources: Sources, decoder: Decoder, finished: bool, choice: Choice | None = None, **more: Any
) -> CacheReader:
    settings = {"about": {}, "key": "data.train", "say": lambda text: None} | more
    cache = open_cache(str(place), sources, decoder, finished=finished, **settings)
    return CacheReader(cache, sources, decoder.preprocess, choice)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_the_two_parts_have_the_bits_of_the_whole(train: bool, mode: str) -> None:
    whole = preprocess(train, resize_mode=mode)
    parts = in_two_parts(whole)
    images = [noise(i) for i in range(5)]
    with own_generators():
        seed_generators(1)
        expected = torch.stack([whole(image) for image in images])
        seed_generators(1)
        pictures = torch.stack([parts.picture(image) for image in images])
    assert pictures.dtype == torch.uint8
    assert torch.equal(parts.finish(pictures), expected)


def test_generators_are_as_they_were_after_the_block() -> None:
    expected = torch.get_rng_state()
    with own_generators():
        seed_generators(1, 2)
        first = torch.rand(3)
        seed_generators(1, 2)
        assert torch.equal(torch.rand(3), first)
        seed_generators(1, 3)
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("resample", [False, True])
def test_batches_are_those_of_the_shards(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crop: bool, place: str, resample: bool
) -> None:
    """Rows, pictures, tokens, what was skipped and the cursor, over epochs, sources, ranks, workers and resumption."""
    sources = sources_of(*folders)
    decoder = Decoder(preprocess(crop), tokenize)
    chances = tuple(n / sources.num_samples for n in sources.counts) if resample else None
    layouts = [Layout(sources.counts, 4, rank, 2, 4, seed=3, shard_probabilities=chances) for rank in range(2)]

    def batches(reader: Any, layout: Layout, count: int, workers: int = 0, start: Position | None = None) -> list[Any]:
        return take(TrainStream(sources, layout, reader, 16, start or Position()), count, workers)

    expected = [batches(ShardReader(sources, decoder, Choice()), layout, 20) for layout in layouts]
    reader = cached("memory" if place == "memory" else tmp_path / "cache", sources, decoder, not crop, Choice())
    monkeypatch.setattr(vlcl.data.reader, "read_samples", None)  # no shard is opened again
    for layout, of_rank in zip(layouts, expected):
        for got in (batches(reader, layout, 20), batches(reader, layout, 20, workers=2)):
            assert_same_batches(got, of_rank)
            assert [vars(x) | {"images_BCHW": 0, "tokens_BL": 0, "row_B": 0} for x in got] == [
                vars(x) | {"images_BCHW": 0, "tokens_BL": 0, "row_B": 0} for x in of_rank
            ]
        position = Position()
        for batch in of_rank[:11]:
            position = position.after(batch)
        assert_same_batches(batches(reader, layout, 5, start=position), of_rank[11:16])
    reasons = {reason for of_rank in expected for batch in of_rank for reason in batch.skipped}
    assert reasons == {"not an image", "empty caption"}


def test_evaluation_is_that_of_the_shards(folders: tuple[Path, Path], tmp_path: Path) -> None:
    sources = sources_of(*folders)
    decoder = Decoder(preprocess(train=False), tokenize)
    readers = [ShardReader(sources, decoder), cached(tmp_path, sources, decoder, finished=True)]
    found = [
        [batch for rank in range(3) for batch in make_loader(EvalStream(sources, 5, reader, rank, 3), 0, CPU)]
        for reader in readers
    ]
    assert_same_batches(found[1], found[0])
    assert [batch.skipped for batch in found[1]] == [batch.skipped for batch in found[0]]
    assert sum(len(batch) for batch in found[0]) + sum(sum(batch.skipped.values()) for batch in found[0]) == 61


def test_a_folder_is_written_once_and_anew_where_anything_differs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []
    shards = make_shards(tmp_path / "shards", (5,), change)

    def entries(size: int = 32, about: str = "", finished: bool = True) -> int:
        decoder = Decoder(preprocess(train=False), tokenize, limits=Limits(max_pixels=10**6 + size))
        said.clear()
        cached(tmp_path / "c", sources_of(shards), decoder, finished, about={"tokens": about}, say=said.append)
        return len(list((tmp_path / "c").glob("[!.]*")))

    assert entries() == 1
    assert "not kept yet; decoding 5 pairs" in said[0]
    assert entries() == 1
    assert said == []
    assert entries(size=33) == 2
    assert entries(about="another tokenizer") == 3
    assert entries(finished=False) == 4
    make_shards(shards, (5,), lambda i, files: change(5 - i, files))
    assert entries() == 5
    # Other contents of the same names and sizes, which no manifest can tell: the file is younger.
    later = os.stat(shards / "00000.tar").st_mtime_ns + 10**9
    os.utime(shards / "00000.tar", ns=(later, later))
    assert entries() == 6


def test_what_a_kill_or_a_fault_left_is_made_anew(folders: tuple[Path, Path], tmp_path: Path) -> None:
    sources, decoder = sources_of(folders[0]), Decoder(preprocess(train=False), tokenize)
    said: list[str] = []
    cached(tmp_path, sources, decoder, finished=True)
    (entry,) = tmp_path.glob("[!.]*")
    half = left_by_killed(entry, "building")
    entry.rename(half)
    (half / "pixels.bin").write_bytes(b"half")
    reader = cached(tmp_path, sources, decoder, finished=True)
    assert not half.exists()
    (tmp_path / "short").write_bytes(bytes(100))
    (tmp_path / "short").rename(entry / "pixels.bin")  # in its place: the old one is still mapped
    again = cached(tmp_path, sources, decoder, finished=True, say=said.append)
    assert "is damaged (pixels.bin has 100 bytes, not " in said[0]
    assert torch.equal(again.cache.pixels, reader.cache.pixels)


def _open_and_sum(shards: Path, place: Path, barrier: Any, answers: Any) -> None:
    said: list[str] = []
    barrier.wait()
    reader = cached(place, sources_of(shards), Decoder(preprocess(train=False), tokenize), True, say=said.append)
    answers.put((len(said), int(reader.cache.pixels.sum())))


def test_processes_that_ask_at_once_share_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_open_and_sum, args=(folders[0], tmp_path, barrier, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(said for said, _ in found) == [0, 0, 2]  # one of them wrote it
    assert len({total for _, total in found}) == 1
    assert len(list(tmp_path.glob("[!.]*"))) == 1


def test_what_could_not_be_read_is_not_kept(tmp_path: Path) -> None:
    """A passing failure would be believed by every later run."""
    folder = make_shards(tmp_path / "shards", COUNTS)
    sources, decoder = sources_of(folder), Decoder(preprocess(train=False), tokenize)
    shard = sorted(folder.glob("*.tar"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"data.val has samples that could not be read \(.*shard\).*vlcl data verify"):
        cached(tmp_path / "kept", sources, decoder, True, key="data.val")
    assert list((tmp_path / "kept").glob("[!.]*")) == []
    shard.write_bytes(whole)
    assert int((cached(tmp_path / "kept", sources, decoder, True).cache.reason_N > 0).sum()) == 0


@pytest.mark.parametrize("damage", ["cache.json is no object", "an empty array", "a short array", "sizes of others"])
def test_a_damaged_entry_is_made_again(folders: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    sources, decoder = sources_of(folders[0]), Decoder(preprocess(train=False), tokenize)
    expected = cached(tmp_path, sources, decoder, True).cache
    (entry,) = tmp_path.glob("[!.]*")
    if damage == "cache.json is no object":
        (entry / "cache.json").write_text("[]")
    elif damage == "an empty array":
        (entry / "tokens_TL.npy").write_bytes(b"")
    elif damage == "a short array":
        np.save(entry / "reason_N.npy", expected.reason_N.numpy()[:-1])
    else:
        np.save(entry / "size_N2.npy", expected.size_N2.numpy() + 1)
    said: list[str] = []
    again = cached(tmp_path, sources, decoder, True, say=said.append).cache
    assert "is damaged" in said[0]
    assert torch.equal(again.pixels, expected.pixels)


def test_an_entry_is_read_without_its_lock(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """As in a folder that one may not write to."""
    sources, decoder = sources_of(folders[0]), Decoder(preprocess(train=False), tokenize)
    cached(tmp_path, sources, decoder, True)
    for lock in tmp_path.glob(".*.lock"):
        lock.unlink()
    cached(tmp_path, sources, decoder, True)
    assert list(tmp_path.glob(".*.lock")) == []


def test_a_set_that_does_not_fit_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, decoder = sources_of(folders[0]), Decoder(preprocess(train=False), tokenize)
    monkeypatch.setattr(vlcl.data.room, "free_memory", lambda: 220_000)
    need = r"data.cache=memory: the 43 pairs of data.val need about 1\d\d kB, and may take 55 kB "
    with pytest.raises(UserError, match=need + r"\(50% .* 2 ranks of.*data.cache=FOLDER"):
        cached("memory", sources, decoder, True, key="data.val", ranks=2)
    cached("memory", sources, decoder, True, ranks=1)  # 34 good ones, 3 kB each
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache=.*file.*Take another folder, or data.cache=memory"):
        cached(tmp_path / "file", sources, decoder, True)


def test_a_large_set_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = sources_of(make_shards(tmp_path, (200,)))
    decoded: list[int] = []
    decoder = Decoder(preprocess(train=False), lambda texts: decoded.append(1) or tokenize(texts))
    monkeypatch.setattr(vlcl.data.room, "free_memory", lambda: 3 * 32 * 32 * 300)
    with pytest.raises(UserError, match=r"200 pairs .* need about 61\d kB"):
        cached("memory", sources, decoder, True)
    assert len(decoded) == 64


def test_processes_that_are_no_forks_get_the_name_of_the_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    reader = cached(tmp_path, sources_of(folders[0]), Decoder(preprocess(train=False), tokenize), finished=True)
    sent = pickle.dumps(reader.cache)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).pixels, reader.cache.pixels)


@pytest.mark.parametrize("cache", ["null", "memory"])
def test_training_pictures_are_cropped_or_as_in_evaluation(
    folders: tuple[Path, Path], tmp_path: Path, cache: str
) -> None:
    built: Any = build_model(tiny_model(tmp_path / "model"))
    for augment, key, crops in (("crop", "data.train", 1), ("none", "data.train", 0), ("crop", "data.val", 0)):
        config = load_config(None, ["data.train=x", f"data.augment={augment}", f"data.cache={cache}"])
        reader: Any = make_reader(key, config, sources_of(folders[0]), built)
        assert (reader.parts.picture.steps[0] is built.preprocess_train.transforms[0]) == crops
        assert reader.at_hand == (cache == "memory" and not crops)


def test_an_image_is_kept_as_it_was_decoded(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS, change))
    reader = cached("memory", sources, Decoder(preprocess(train=True), tokenize), finished=False)
    for row in (0, 1, 17, 42):
        assert reader.cache.image(row) == noise(row)
