"""The same global batches, whoever reads them: any number of ranks, changed in mid-epoch; checkpoints of before."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import pytest
import torch

from vlcl.batch import Batch
from vlcl.data.decode import BadSample
from vlcl.data.order import Layout, default_slices
from vlcl.data.reader import Sources, Stacked
from vlcl.data.resume import find_place
from vlcl.data.stream import Position, TrainStream

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
    expected, found, step = joined(run.ranks(1, 13)), [], 0
    record: dict[str, Any] = {"world": 2, "slices": run.slices, "streams": run.streams}
    starts = [Position() for _ in range(2)]
    for world, following, count in ((2, 3, 2), (3, 1, 1), (1, 4, 3), (4, 12, 2), (12, 2, 5)):
        batches = run.ranks(world, count, starts)
        found += joined(batches)
        ends = []
        for start, of_rank in zip(starts, batches):
            for batch in of_rank:
                start = start.after(batch)
            ends.append(start)
        step += count
        meta = {"batch": step, "layout": record | {"world": world}}
        placed = [
            find_place("step-1", meta, meta["layout"], run.layout(rank, following), lambda rank: ends[rank].cursors)
            for rank in range(following)
        ]
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
            given += cast(Rows, stream.reader).given
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
    position = Position()
    for batch in batches[:9]:
        position = position.after(batch)
    again = take(stream_of(layout, rows, shuffle=4, start=position), 4)
    assert [batch.row_B.tolist() for batch in again] == [batch.row_B.tolist() for batch in batches[9:13]]


def test_slices_that_nobody_asked_for() -> None:
    assert [default_slices(pairs, 8) for pairs in (1024, 12, 10, 7, 22, 2, 1)] == [8, 6, 5, 7, 2, 2, 1]
    assert default_slices(1024, 1) == 1  # one stream is one: no slices, either
