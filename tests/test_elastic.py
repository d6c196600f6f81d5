"""The same global batches, whoever reads them: any number of ranks, changed in mid-epoch; checkpoints of before."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ranks import on_ranks
from shards import make_shards, tiny_model

from vlcl import distributed
from vlcl.batch import Batch
from vlcl.config import load_config
from vlcl.data.decode import BadSample
from vlcl.data.order import Layout, default_slices
from vlcl.data.reader import Sources, Stacked
from vlcl.data.resume import find_place
from vlcl.data.stream import Position, TrainStream
from vlcl.errors import UserError
from vlcl.from_config import make_layout, open_sources
from vlcl.run import first_words

COUNTS = (7, 20, 3, 13, 40, 9, 11, 1)


class Rows:
    """A `Reader` whose samples are their rows, some of them bad."""

    random, at_hand = False, True

    def __init__(self, counts: Sequence[int], bad: Sequence[int] = ()) -> None:
        self.offsets, self.bad = tuple(sum(counts[:n]) for n in range(len(counts))), set(bad)
        self.given: Counter[int] = Counter()

    def read(self, shard: int, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        for position in range(start, stop):
            row = self.offsets[shard] + position
            self.given[row] += 1
            yield position, BadSample("bad") if row in self.bad else row

    def with_all_files(self) -> Rows:
        return self

    def prepare(self, sample: int, epoch: int, row: int) -> int:
        assert sample == row
        return row

    def stack(self, prepared: Sequence[int]) -> Stacked:
        return Stacked(torch.tensor(prepared), torch.tensor(prepared), None, 0)


def stream_of(layout: Layout, bad: Sequence[int] = (), shuffle: int = 16, start: Position | None = None) -> TrainStream:
    reader = Rows(layout.counts, bad)
    return TrainStream(cast(Sources, reader), layout, reader, shuffle, start or Position())


def take(stream: TrainStream, count: int) -> list[Batch]:
    return [cast(Batch, batch) for batch in islice(stream, count)]


def digest_of(batches: Sequence[Batch]) -> str:
    about = [(batch.epoch, batch.row_B.tolist(), batch.repeated, batch.skipped) for batch in batches]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


CHANCES = tuple(n / sum(COUNTS) for n in COUNTS)


# Computed before there were slices. The first five are the order of one stream of one rank.
@pytest.mark.parametrize(
    ("expected", "bad", "resampled", "batch", "shuffle", "streams"),
    [
        ("ca2cf407df2d5870", (), False, 8, 16, 1),
        ("120b0cfe2728dae1", (), False, 8, 1000, 1),
        ("6ad21db7df5429e9", range(0, 104, 3), False, 8, 16, 1),
        ("8df2fa849c47f026", range(50), False, 33, 16, 1),  # the epoch's good samples are used up
        ("998d1375288e344d", (5, 50), True, 8, 16, 1),
        ("2a3ca8326efe5438", (), False, 8, 16, 8),
    ],
)
def test_one_rank_with_one_slice_has_the_order_of_published_runs(
    expected: str, bad: Sequence[int], resampled: bool, batch: int, shuffle: int, streams: int
) -> None:
    layout = Layout(COUNTS, batch, streams=streams, seed=5, shard_probabilities=CHANCES if resampled else None)
    assert digest_of(take(stream_of(layout, bad, shuffle), 40)) == expected


@pytest.mark.parametrize(
    ("expected", "chances"),
    [(["68457555a1900860", "97b3c80e5eb5140d"], None), (["8fc79b706c3ab56f", "43a7b6aaf07ed4a1"], CHANCES)],
)
def test_as_many_slices_as_ranks_is_the_order_that_ranks_had(expected: list[str], chances: tuple[float, ...]) -> None:
    for rank, digest in enumerate(expected):
        layout = Layout(COUNTS, 4, rank, 2, 3, 5, chances, slices=2)
        assert digest_of(take(stream_of(layout, shuffle=2 * 16), 40)) == digest


@dataclass(frozen=True)
class Run:
    """A global batch of 24, as ranks share it."""

    slices: int
    streams: int = 3
    bad: Sequence[int] = ()
    chances: tuple[float, ...] | None = None
    chunks: int = 1

    def layout(self, rank: int, world: int) -> Layout:
        return Layout(
            COUNTS, 24 // world, rank, world, self.streams, 5, self.chances, self.slices, self.chunks
        )  # fmt: skip

    def ranks(self, world: int, count: int, starts: Sequence[Position] = ()) -> list[list[Batch]]:
        streams = [
            stream_of(self.layout(rank, world), self.bad, start=starts[rank] if starts else None)
            for rank in range(world)
        ]
        return [take(stream, count) for stream in streams]


def end_of(start: Position, batches: Sequence[Batch]) -> Position:
    return reduce(Position.after, batches, start)


def joined(ranks: Sequence[Sequence[Batch]]) -> list[dict[str, Any]]:
    """What each step has, over all ranks."""
    return [
        {
            "rows": [row for batch in step for row in batch.row_B.tolist()],
            "repeated": sum(batch.repeated for batch in step),
            "skipped": sum((Counter(batch.skipped) for batch in step), Counter()),
            "consumed": sorted({item for batch in step for item in batch.consumed.items()}),
            "epochs": {batch.epoch for batch in step},
        }
        for step in zip(*ranks)
    ]


RUNS = [
    Run(slices=6),
    Run(slices=1, streams=2),
    Run(slices=8, bad=range(3, 104, 4)),
    Run(slices=4, bad=range(30, 90)),  # most streams run dry, some have nothing good at all
    Run(slices=6, bad=(1, 2, 50), chances=CHANCES),
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_any_number_of_ranks_has_the_same_rows_in_the_same_slots(run: Run) -> None:
    expected = joined(run.ranks(1, 13))  # several epochs
    for world in (2, 3, 4, 6, 12):
        assert joined(run.ranks(world, 13)) == expected, world
    assert all(len(step["rows"]) == 24 for step in expected)
    if run.bad:
        assert sum(step["skipped"]["bad"] for step in expected) > 5
    steps = run.layout(0, 1).steps_per_epoch
    for epoch in range(3 if run.chances is None else 0):
        rows = [row for step in expected[epoch * steps : (epoch + 1) * steps] for row in step["rows"]]
        repeated = sum(step["repeated"] for step in expected[epoch * steps : (epoch + 1) * steps])
        assert len(rows) - len(set(rows)) <= repeated
        assert repeated == 0 or run.bad


@pytest.mark.parametrize("run", [RUNS[0], RUNS[2], RUNS[4]], ids=str)
def test_ranks_that_come_and_go_in_mid_epoch_lose_and_repeat_nothing(run: Run) -> None:
    """Through 2, 3, 1, 4 and 12 ranks, the place of each kept as a checkpoint does: by the ranks that there were."""
    expected, found, step = joined(run.ranks(1, 19)), [], 0
    starts = [Position() for _ in range(2)]
    for world, following, count in ((2, 3, 4), (3, 1, 5), (1, 4, 3), (4, 12, 2), (12, 2, 5)):
        batches = run.ranks(world, count, starts)
        found += joined(batches)
        step += count
        record = {"world": world, "slices": run.slices, "streams": run.streams}
        cursors = [end_of(start, of_rank).cursors for start, of_rank in zip(starts, batches)]
        layouts = [run.layout(rank, following) for rank in range(following)]
        meta = {"batch": step, "layout": record}
        placed = [find_place("step-1", meta, record, layout, cursors.__getitem__) for layout in layouts]
        starts = [position for position, _ in placed]
        assert f"step-1 is of {world} ranks, these are {following}: the same global batches" in placed[0][1]
    assert found == expected
    if run.bad == ():
        epoch = [row for step in found[:4] for row in step["rows"]]
        assert len(epoch) == len(set(epoch)) == 96


def test_ranks_that_divide_the_slices_read_each_sample_once() -> None:
    def read(world: int, slices: int) -> Counter[int]:
        given: Counter[int] = Counter()
        for rank in range(world):
            stream = stream_of(Run(slices).layout(rank, world), shuffle=1)  # no more than it gives
            assert len(take(stream, 4)) == 4
            given += cast(Rows, stream.made_of[2]).given
        return given

    for world in (1, 2, 3, 6):
        assert set(read(world, 6).values()) == {1}
    for world, slices, times in ((4, 6, 8 / 6), (2, 1, 2.0), (12, 6, 2.0)):
        assert Run(slices).layout(0, world).times_read == pytest.approx(times)
        assert read(world, slices).total() == pytest.approx(times * read(1, slices).total(), rel=0.05)


def test_chunks_with_negatives_of_their_own_are_the_same_pairs() -> None:
    """train.negatives=chunk: what a pair is set against does not depend on the ranks either."""
    run = Run(slices=4, chunks=3, bad=(7, 70))

    def chunks(world: int) -> list[list[int]]:
        pieces = [[piece for batch in of_rank for piece in batch.chunk(3)] for of_rank in run.ranks(world, 8)]
        return [[row for piece in step for row in piece.row_B.tolist()] for step in zip(*pieces)]

    assert len(chunks(1)) == 24
    assert chunks(2) == chunks(4) == chunks(8) == chunks(1)
    plain = [set(chunk.tolist()) for batch in replace(run, chunks=1).ranks(1, 8)[0] for chunk in batch.row_B.chunk(3)]
    assert plain != [set(chunk) for chunk in chunks(1)]
    slots = [run.layout(rank, 2).slots.tolist() for rank in range(2)]
    slow: list[list[int]] = [[], []]
    for chunk in range(3):
        of_chunk = [number * 6 + chunk * 2 + place for number in range(4) for place in range(2)]
        for rank in range(2):
            slow[rank] += of_chunk[rank * 4 : (rank + 1) * 4]
    assert slots == slow


def test_a_stream_without_a_good_sample_takes_those_of_others() -> None:
    """A shard that cannot be read, say. Before, such a stream ended the run."""
    layout = Layout((30, 30, 30, 30), 8, streams=4, slices=4)
    first = [run for stream in range(3) for run in layout.segment(0, stream)]
    rows = [30 * run.shard + position for run in first for position in range(run.start, run.stop)]
    batches = take(stream_of(layout, rows, shuffle=4), layout.steps_per_epoch)
    assert all(len(batch) == 8 for batch in batches)
    assert sum(batch.repeated for batch in batches) >= 6
    again = take(stream_of(layout, rows, shuffle=4, start=end_of(Position(), batches[:9])), 4)
    assert [batch.row_B.tolist() for batch in again] == [batch.row_B.tolist() for batch in batches[9:13]]


def test_slices_that_nobody_asked_for() -> None:
    assert [default_slices(pairs, 8) for pairs in (1024, 12, 10, 7, 22, 2, 1)] == [8, 4, 2, 1, 2, 2, 1]
    assert default_slices(1024, 1) == 1  # one stream is one: no slices, either


def test_a_checkpoint_of_before_goes_on_with_its_own_batches() -> None:
    """Then a rank had streams and a buffer of its own: 2 ranks, 3 streams, data.shuffle=16 are 2 slices and 32."""
    layouts = [Layout(COUNTS, 4, rank, 2, 3, 5, slices=2) for rank in range(2)]
    whole = joined([take(stream_of(layout, shuffle=32), 20) for layout in layouts])
    ends = [end_of(Position(), take(stream_of(layout, shuffle=32), 8)) for layout in layouts]
    saved = [{stream % 3: place for stream, place in end.cursors.items()} for end in ends]
    facts = {"global_batch": 8, "epoch_pairs": 104}
    meta = {"batch": 8, "layout": {"world": 2, "streams": 3, "shuffle": 16, **facts}}
    now = {"world": 1, "slices": 2, "streams": 3, "shuffle": 32, **facts}
    one = Layout(COUNTS, 8, 0, 1, 3, 5, slices=2)
    position, told = find_place("step-8", meta, now, one, saved.__getitem__)
    assert "step-8 is of 2 ranks, these are 1: the same global batches go on" in told
    assert joined([take(stream_of(one, shuffle=32, start=position), 12)]) == whole[8:]
    assert find_place("step-8", meta, now | {"world": 2}, layouts[1], saved.__getitem__) == (ends[1], "")

    other = replace(one, slices=4)
    position, told = find_place("step-8", meta, now | {"slices": 4, "shuffle": 16}, other, saved.__getitem__)
    assert told.startswith("shuffle, slices changed since step-8: the data goes on at the same place of the epoch")
    assert told.endswith("With data.shuffle=32 data.slices=2 the same batches would go on")
    (batch, *_) = take(stream_of(other, start=position), 1)
    assert position.batch == 8
    assert all(4 <= consumed <= 8 for consumed in batch.consumed.values())  # 8 of 13 steps into 8 to 10, and a share


def config_of(folder: Path, *more: str) -> Any:
    return load_config(None, [
        f"data.train={folder / 'shards'}", f"model.name={tiny_model(folder / 'model')}", "train.steps=8",
        "train.batch_size=12", "data.slices=6", "train.log_every=1", "optim.warmup=0", "optim.schedule=constant",
        "optim.lr=1e-4",
        "checkpoint.every=50", "data.workers=0", "data.streams=2", "data.shuffle=24", "data.max_bad_share=0.5",
        "log.trackers=[]", "train.precision=fp32", "train.accumulate=2", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("elastic")
    make_shards(place / "shards", (20, 9, 23), lambda i, files: files.update(png=b"x") if i % 9 == 4 else None)
    return place


def steps_of(folder: Path, *more: str) -> list[tuple[list[int], float, torch.Tensor]]:
    """Train, as one of the ranks: the rows of each global batch in their slots, its loss, and its gradient."""
    import vlcl.train

    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"],
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    found, real = [], vlcl.train.em_step

    def step(run: Any, batch: Batch) -> Any:
        out = real(run, batch)
        gradient = torch.cat([x.grad.flatten() for x in run.towers.parameters if x.grad is not None])
        rows, loss = distributed.gather(batch.row_B).tolist(), float(distributed.all_mean(out.loss))
        found.append((rows, loss, gradient))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlcl.train, "em_step", step)
        vlcl.train.train(config_of(folder, *more))
    return found


def test_training_is_the_same_on_1_2_and_3_ranks_and_from_one_to_the_other(folder: Path) -> None:
    """Rows of every slot alike, losses and gradients to rounding: with a table, bad samples, and chunks. 2 ranks begin,
    3 go on in the first epoch, 1 ends it."""
    (expected,) = on_ranks(1, steps_of, folder, f"train.output={folder / 'one'}")
    found = []
    for world, end, resume in ((2, 2, "null"), (3, 5, "latest"), (1, 8, "latest")):
        more = (f"train.output={folder / 'many'}", f"train.steps={end}", f"resume={resume}")
        found += on_ranks(world, steps_of, folder, *more)[0]
    assert [rows for rows, _, _ in found] == [rows for rows, _, _ in expected]
    for (_, loss, gradient), (_, other, of_one) in zip(found, expected):
        assert loss == pytest.approx(other, rel=1e-5)
        assert float((gradient - of_one).norm() / of_one.norm()) < 1e-4
    seen = [json.loads((folder / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("one", "many")]
    for counted in ("epoch", "data/skipped", "data/repeated"):
        assert seen[0][counted] == seen[1][counted] > 1


def test_ranks_that_share_no_slices_are_told_what_they_can_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = open_sources(str(folder / "shards"))
    null = ("train.accumulate=1", "data.slices=null")
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert make_layout(config_of(folder, *null), sources).own_slices == [0]
    with pytest.raises(UserError, match=r"4 ranks do not divide the 1 slices .*, which 1 ranks do.*slices=4.*slices=1"):
        make_layout(config_of(folder, *null, "data.streams=1"), sources)
    monkeypatch.setattr(distributed, "world_size", lambda: 6)
    with pytest.raises(UserError, match=r"6 ranks do not divide the 4 .* 1, 2 or 4 ranks do.*slices=12.*slices=4"):
        make_layout(config_of(folder, *null), sources)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    asked = config_of(folder, "train.accumulate=1")  # 6, by name
    words = first_words(asked, torch.nn.Identity(), sources, make_layout(asked, sources), 8, 0, torch.device("cpu"))
    assert "each sample is read and decoded 1.3 times" in words[1]
    with pytest.raises(UserError, match=r"train.batch_size=12 must be a multiple of data.slices=5"):
        config_of(folder, "data.slices=5")
    chunks = ("train.negatives=chunk", "loss.name=em", "loss.order=before")
    with pytest.raises(UserError, match=r"a multiple of data.slices=12 x train.accumulate=2, whose chunks are batches"):
        config_of(folder, "data.slices=12", *chunks)
    config_of(folder, "data.slices=6", *chunks)
