"""Streaming on real tars: rows, order, workers, resume, bad samples, several ranks."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shards import colour_of, make_shards, picture
from torch import Tensor

from vlcl import distributed
from vlcl.batch import Batch
from vlcl.config import Config, DataConfig, TrainConfig
from vlcl.data.decode import Keys
from vlcl.data.manifest import open_source
from vlcl.data.order import Layout, source_probabilities
from vlcl.data.reader import Decoder, ShardReader, Sources, samples_at
from vlcl.data.stream import EvalStream, Failure, Position, TrainStream, make_loader, pick_workers
from vlcl.errors import UserError
from vlcl.from_config import make_layout, open_sources
from vlcl_data_prep.index import index_shards

COUNTS = (7, 20, 3, 13)  # uneven on purpose
CPU = torch.device("cpu")


def pixel(image: Image.Image, x: int, y: int) -> tuple[float, ...]:
    found = image.getpixel((x, y))
    assert isinstance(found, tuple)  # one number a channel
    return found


def to_tensor(image: Image.Image) -> Tensor:
    """The colour, with random noise in the third channel: an augmentation."""
    return torch.tensor([*pixel(image, 0, 0)[:2], 0.0]) + torch.tensor([0.0, 0.0, 1.0]) * torch.rand(3)


def tokenize(texts: Sequence[str]) -> Tensor:
    return torch.tensor([[int(text.split()[-1])] for text in texts])


DECODER = Decoder(to_tensor, tokenize)


def sources_of(*folders: Path) -> Sources:
    return Sources(tuple(open_source(str(folder)) for folder in folders))


def stream_of(
    sources: Sources, rank: int = 0, world: int = 1, streams: int = 4, batch: int = 4, **kwargs
) -> TrainStream:
    layout = Layout(sources.counts, batch, rank, world, streams, seed=kwargs.pop("seed", 0), **kwargs.pop("layout", {}))
    reader = kwargs.pop("reader", None) or ShardReader(sources, DECODER)
    return TrainStream(sources, layout, reader, kwargs.pop("shuffle", 16), kwargs.pop("start", Position()))


def take(stream: TrainStream, count: int, workers: int = 0) -> list[Batch]:
    batches = list(islice(make_loader(stream, workers, CPU), count))
    assert all(isinstance(batch, Batch) for batch in batches), batches
    return batches


def rows(batches: list[Batch]) -> list[list[int]]:
    return [batch.row_B.tolist() for batch in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return [value for one in lists for value in one]


def assert_same_batches(got: list[Batch], expected: list[Batch]) -> None:
    assert rows(got) == rows(expected)
    for a, b in zip(got, expected):
        assert torch.equal(a.images_BCHW, b.images_BCHW)  # the augmentation's noise too
        assert torch.equal(a.tokens_BL, b.tokens_BL)


def test_rows_name_the_pairs(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS))
    for batch in take(stream_of(sources), 25):
        for image, token, row in zip(batch.images_BCHW, batch.tokens_BL, batch.row_B):
            assert tuple(image[:2].tolist()) == colour_of(int(row))[:2]
            assert int(token) == int(row)


def test_an_epoch_has_each_pair_once_and_epochs_differ(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS))
    stream = stream_of(sources)
    steps = stream.layout.steps_per_epoch
    batches = take(stream, 2 * steps)
    first, second = rows(batches[:steps]), rows(batches[steps:])
    for epoch in (first, second):
        once = flat(epoch)
        assert len(once) == len(set(once)) == steps * 4
    assert first != second
    assert {batch.epoch for batch in batches[steps:]} == {1}
    assert rows(take(stream_of(sources, seed=1), steps)) != first


def test_workers_do_not_change_the_sequence(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS))
    for slices, counts in ((1, (1, 2)), (2, (4,))):
        expected = take(stream_of(sources, layout={"slices": slices}), 24)
        for workers in counts:
            assert_same_batches(take(stream_of(sources, layout={"slices": slices}), 24, workers), expected)


@pytest.mark.parametrize("resample", [False, True])
def test_any_position_goes_on_with_the_same_batches(tmp_path: Path, resample: bool) -> None:
    def damage(i: int, files: dict[str, bytes]) -> None:
        if i % 5 == 0:
            files["png"] = b"broken"

    sources = sources_of(make_shards(tmp_path, COUNTS, damage))
    extra: dict[str, Any] = (
        {"layout": {"shard_probabilities": tuple(n / sum(COUNTS) for n in COUNTS)}} if resample else {}
    )
    expected = take(stream_of(sources, **extra), 26)
    position = Position()
    for stop, batch in enumerate(expected[:23], start=1):
        position = position.after(batch)
        if stop in (1, 4, 10, 11, 17, 23):
            assert_same_batches(take(stream_of(sources, start=position, **extra), 3), expected[stop : stop + 3])


def test_resume_reads_no_shard_that_it_needs_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = sources_of(make_shards(tmp_path, (10,) * 12))
    batches = take(stream_of(sources, streams=1, shuffle=4), 20)
    position = Position()
    for batch in batches:
        position = position.after(batch)
    opened = []
    import vlcl.data.reader

    real = vlcl.data.reader.read_samples
    monkeypatch.setattr(vlcl.data.reader, "read_samples", lambda url, *more: opened.append(url) or real(url, *more))
    take(stream_of(sources, streams=1, shuffle=4, start=position), 1)
    assert 1 <= len(set(opened)) <= 4  # of 12; 80 of 120 samples were consumed


def test_ranks_share_an_epoch_evenly_whatever_the_shards(tmp_path: Path) -> None:
    """As many batches for each rank, no pair on two of them; with more ranks than shards, too."""
    sources = sources_of(make_shards(tmp_path, (1, 30, 2)))
    for world in (2, 3, 4):
        streams = [stream_of(sources, rank, world, streams=2, batch=2) for rank in range(world)]
        steps = streams[0].layout.steps_per_epoch
        seen = [row for stream in streams for row in flat(rows(take(stream, steps)))]
        assert len(seen) == len(set(seen)) == steps * 2 * world


def test_bad_samples_are_counted_by_reason_and_renumber_nothing(tmp_path: Path) -> None:
    bad = {
        2: ("png", b"<html>not found</html>", "not an image"),
        9: ("png", b"", "empty image"),
        11: ("txt", b"\xff\xfe", "caption not UTF-8"),
        12: ("txt", b"  \n", "empty caption"),
        20: ("png", picture(20)[:60], "broken image"),
        30: ("txt", None, "no caption"),
    }

    def damage(i: int, files: dict[str, bytes]) -> None:
        if i in bad:
            suffix, data, _ = bad[i]
            files.pop(suffix) if data is None else files.update({suffix: data})

    sources = sources_of(make_shards(tmp_path, COUNTS, damage))
    skipped: Counter[str] = Counter()
    seen: Counter[int] = Counter()
    for batch in islice(make_loader(stream_of(sources, streams=1, batch=37), 0, CPU), 1):  # all good ones of the epoch
        skipped.update(batch.skipped)
        seen.update(batch.row_B.tolist())
        assert torch.equal(batch.tokens_BL[:, 0], batch.row_B)
    assert skipped == Counter(reason for _, _, reason in bad.values())
    assert set(seen) == set(range(43)) - set(bad)


def test_a_batch_that_bad_samples_leave_short_is_filled_by_repeating(tmp_path: Path) -> None:
    def damage(i: int, files: dict[str, bytes]) -> None:
        if i < 10:
            files["png"] = b"broken"

    sources = sources_of(make_shards(tmp_path, COUNTS, damage))
    batches = take(stream_of(sources, batch=43 // 4, streams=1), 4)
    assert all(len(batch) == 10 for batch in batches)
    assert sum(batch.repeated for batch in batches) == 7


def test_only_bad_samples_end_in_one_clear_message(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS, lambda i, files: files.update(png=b"")))
    for workers in (0, 1):
        (item,) = list(make_loader(stream_of(sources), workers, CPU))
        assert isinstance(item, Failure)
        assert "empty image" in item.message
        assert "vlcl data verify" in item.message


def test_a_shard_that_is_truncated_after_indexing_costs_its_rest_only(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS))
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])  # the manifest was read before: as with a remote shard
    (batch,) = take(stream_of(sources, streams=1, batch=20), 1)
    left = sum(batch.skipped.values())
    assert set(batch.skipped) == {"unreadable shard"}
    assert left > 0
    assert torch.equal(batch.tokens_BL[:, 0], batch.row_B)


def test_sources_are_drawn_by_their_weights(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path / "a", (6, 6)), make_shards(tmp_path / "b", (20, 20, 20)))
    chances = source_probabilities([[6, 6], [20, 20, 20]], [1, 1])
    batches = take(stream_of(sources, batch=8, streams=2, layout={"shard_probabilities": tuple(chances)}), 9 * 60)
    share = torch.cat([batch.row_B < 12 for batch in batches]).float().mean()
    assert 0.4 < share < 0.6


def test_captions_from_json_and_upright_rgb_pictures(tmp_path: Path) -> None:
    def change(i: int, files: dict[str, bytes]) -> None:
        del files["txt"], files["png"]
        files["json"] = json.dumps({"text": f"picture {i}"}).encode()
        image = Image.new("L", (40, 20))
        image.paste(255, (0, 0, 20, 20))  # left half white; orientation 6 turns it a quarter clockwise
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", exif=exif)
        files["jpg"] = buffer.getvalue()

    sources = sources_of(make_shards(tmp_path, (4,), change))
    ((image, caption),) = samples_at(sources, [2], Decoder(to_tensor, tokenize, Keys(json_text="text")))
    assert caption == "picture 2"
    assert (image.mode, image.size) == ("RGB", (20, 40))
    assert pixel(image, 10, 5)[0] > 200 > 50 > pixel(image, 10, 35)[0]


def test_evaluation_counts_bad_samples_where_nothing_is_good(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, (9,), lambda i, files: files.update(png=b"x") if i != 8 else None))
    for world in (1, 3):
        streams = [EvalStream(sources, 4, ShardReader(sources, DECODER), rank, world) for rank in range(world)]
        batches = [batch for stream in streams for batch in stream]
        assert sum(sum(batch.skipped.values()) for batch in batches) == 8
        assert sum(len(batch) for batch in batches) == 1


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_reads_each_pair_once_in_order(tmp_path: Path, world: int) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS, lambda i, files: files.update(png=b"x") if i == 8 else None))
    for workers in (0, 2):
        streams = [EvalStream(sources, 5, ShardReader(sources, DECODER), rank, world) for rank in range(world)]
        loaders = [make_loader(stream, workers, CPU) for stream in streams]
        batches = [batch for loader in loaders for batch in loader]
        assert sorted(flat(rows(batches))) == [i for i in range(43) if i != 8]
        assert sum(sum(batch.skipped.values()) for batch in batches) == 1


def test_remote_shards_for_fewer_than_the_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [f"pipe:cat {tmp_path}/0000{n}.tar" for n in range(2)]
    make_shards(tmp_path, (20, 20))
    index_shards(urls, output=str(tmp_path / "remote.json"), progress=False)
    sources = open_sources(urls, str(tmp_path / "remote.json"), "run")
    config = Config(data=DataConfig(train=urls), train=TrainConfig(batch_size=12))
    assert (
        len(
            take(TrainStream(sources, make_layout(config, sources), ShardReader(sources, DECODER), 16, Position()), 2)[
                0
            ]
        )
        == 12
    )
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(UserError, match=r"3 ranks share 2 shards, not all local .*data.resample=true"):
        make_layout(config, sources)


def test_workers_picked_divide_the_streams() -> None:
    for streams in (1, 4, 6, 8):
        for ranks in (1, 2, 8):
            workers = pick_workers(streams, ranks)
            assert workers >= 1
            assert streams % workers == 0


def test_augmentation_leaves_the_process_generators_alone(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    take(stream_of(sources), 3)
    assert torch.equal(torch.rand(3), expected)
