"""The order of samples: complete, even over slices, and a function of (seed, epoch) alone."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcl.data import order as order_module
from vlcl.data.order import Layout, Run, ShuffleBuffer, cut_line, source_probabilities

layouts = st.builds(
    lambda counts, slots, slices, streams, seed: Layout(
        tuple(counts), slots * slices, streams=streams, seed=seed, slices=slices
    ),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 3),
)


def places(runs: list[Run]) -> list[tuple[int, int]]:
    return [(run.shard, position) for run in runs for position in range(run.start, run.stop)]


@settings(max_examples=80, deadline=None)
@given(layouts, st.integers(0, 5))
def test_an_epoch_gives_every_slice_its_batches_and_no_sample_twice(layout: Layout, epoch: int) -> None:
    steps, owed = layout.steps_per_epoch, layout.batches_of_stream(epoch)
    assert sum(owed) == steps
    seen: Counter[tuple[int, int]] = Counter()
    for stream in range(layout.slices * layout.streams):
        segment = places(layout.segment(epoch, stream))
        assert len(segment) >= owed[stream % layout.streams] * layout.slice_size  # of its own, with none bad
        seen.update(segment)
    assert not seen or max(seen.values()) == 1
    if steps:
        assert len(seen) == sum(layout.counts)


@settings(max_examples=40, deadline=None)
@given(layouts, st.integers(0, 2))
def test_a_stream_that_runs_dry_goes_round_the_whole_line(layout: Layout, epoch: int) -> None:
    for stream in range(layout.slices * layout.streams if layout.steps_per_epoch else 0):
        first, second, third = [places(list(runs)) for runs, _ in islice(layout.passes(epoch, stream), 3)]
        assert second[: len(first)] == first
        assert second == third
        assert Counter(second) == Counter(places([Run(n, 0, size) for n, size in enumerate(layout.counts)]))


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 30), st.integers(0, 30))
def test_cut_line_cuts(counts: list[int], a: int, b: int) -> None:
    whole = [(s, p) for s, n in enumerate(counts) for p in range(n)]
    assert places(cut_line(range(len(counts)), counts, min(a, b), max(a, b))) == whole[min(a, b) : max(a, b)]


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(1, 20), st.integers(0, 120), st.sampled_from([3, 1024]))
def test_the_buffer_permutes_and_can_be_put_down_anywhere(lengths: list[int], size: int, skip: int, drawn: int) -> None:
    runs, total, rng = [Run(0, 5, 5 + length) for length in lengths], sum(lengths), Layout((1,), 1).rng
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "DRAWN", drawn)  # few: several draws in one skip
        order = list(ShuffleBuffer(runs, size, rng(7)))
        assert sorted(order) == [(n, 5 + p) for n, length in enumerate(lengths) for p in range(length)]
        walked, skipped = ShuffleBuffer(runs, size, rng(7)), ShuffleBuffer(runs, size, rng(7))
        assert list(islice(walked, skip)) == order[:skip]
        skipped.skip(skip)
        assert walked.taken == skipped.taken == (min(total, skip + size - 1) if skip else 0)
        assert walked.places == skipped.places
        assert list(walked) == list(skipped) == order[skip:]


def test_an_endless_line_is_skipped_too() -> None:
    layout = Layout((20, 7, 30), 4, seed=3, shard_probabilities=(0.2, 0.5, 0.3))
    walked, skipped = (ShuffleBuffer(layout.drawn_runs(0, 0), 64, layout.rng(1)) for _ in range(2))
    before = list(islice(walked, 5000))
    skipped.skip(5000)
    assert list(islice(walked, 3000)) == list(islice(skipped, 3000))
    assert len(before) == 5000


def epoch_order(seed: int, epoch: int) -> list[tuple[int, int]]:
    layout = Layout((20,) * 6, 4, 0, 1, 2, seed)
    return [
        (segment[n].shard, position)
        for stream in range(2)
        for segment in [layout.segment(epoch, stream)]
        for n, position in ShuffleBuffer(segment, 16, layout.rng(epoch, 2, 0, stream, 0))
    ]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    orders = {(s, e): epoch_order(s, e) for s in (0, 1) for e in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert epoch_order(1, 1) == orders[1, 1]
    shards = [[run.shard for run in Layout((20,) * 6, 4, seed=0).segment(e, 0)] for e in (0, 1)]
    assert shards[0] != shards[1]  # shards are shuffled too, not samples alone


def test_drawing_with_replacement_gives_each_source_its_share() -> None:
    counts = [[10, 10], [100, 50, 50]]
    chances = source_probabilities(counts, [3, 1])
    flat = [n for source in counts for n in source]
    layout = Layout(tuple(flat), 5, shard_probabilities=tuple(chances))
    samples = Counter()
    for run in islice(layout.drawn_runs(0, 0), 20_000):
        samples[run.shard < 2] += len(run)
    assert abs(samples[True] / samples.total() - 0.75) < 0.02
    assert list(islice(layout.drawn_runs(0, 0), 9)) != list(islice(layout.drawn_runs(1, 0), 9))
