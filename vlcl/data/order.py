"""In which order a rank meets its samples: pure arithmetic on (shard, position), no bytes, no torch.

The order of an epoch depends on (seed, epoch), the world size, the number of streams and the batch size, and on nothing
else: not on the clock, the process, or how many workers do the reading.

An epoch permutes the shards, lays their samples end to end, and cuts that line into W * `streams` segments, one for
each stream of each rank, in proportion to the batches that the stream owes. So ranks get equal numbers of batches
however uneven the shards are, a shard on a cut is read by both neighbours, each its own part, and at most one global
batch of samples is left out of an epoch (other ones each time). Within its segment a stream shuffles with a buffer.
Batch number b (counted over all epochs) comes from stream b % streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice

import numpy as np

DRAWN = 1024  # random numbers at a time


@dataclass(frozen=True)
class Run:
    """Samples `start` .. `stop` of a shard, read in order."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Who reads: everything that, with (seed, epoch), fixes the order."""

    counts: tuple[int, ...]  # samples of each shard
    batch_size: int  # pairs a rank takes a step
    rank: int = 0
    world: int = 1
    streams: int = 1
    seed: int = 0
    # Drawing with replacement: the probability of each shard to be drawn next; None: each sample once an epoch.
    shard_probabilities: tuple[float, ...] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.counts) // (self.batch_size * self.world)

    def rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def batches_of_stream(self, epoch: int) -> list[int]:
        """How many of the epoch's batches each stream owes (the same on every rank)."""
        first, steps = epoch * self.steps_per_epoch, self.steps_per_epoch
        return [len(range((v - first) % self.streams, steps, self.streams)) for v in range(self.streams)]

    def segment(self, epoch: int, stream: int) -> list[Run]:
        """What a stream of this rank reads in an epoch, as runs over shards."""
        owed = np.tile(self.batches_of_stream(epoch), self.world)
        cuts = np.concatenate([[0], np.cumsum(owed)]) * sum(self.counts) // max(int(owed.sum()), 1)
        place = self.rank * self.streams + stream
        return cut_line(self.rng(epoch, 0).permutation(len(self.counts)), self.counts, cuts[place], cuts[place + 1])

    def drawn_runs(self, epoch: int, stream: int) -> Iterator[Run]:
        """Whole shards drawn with replacement, without end."""
        rng = self.rng(epoch, 1, self.rank, stream)
        while True:
            for shard in rng.choice(len(self.counts), size=256, p=self.shard_probabilities):
                yield Run(int(shard), 0, self.counts[shard])

    def passes(self, epoch: int, stream: int) -> Iterator[tuple[Iterable[Run], np.random.Generator]]:
        """The reading of one stream in one epoch: its segment, and again from the start (a new shuffle) where bad
        samples use it up before the stream has filled its batches. Only the first pass repeats nothing."""
        if self.shard_probabilities is not None:
            yield self.drawn_runs(epoch, stream), self.rng(epoch, 2, self.rank, stream, 0)
            return
        runs = self.segment(epoch, stream)
        for again in count() if runs else ():
            yield runs, self.rng(epoch, 2, self.rank, stream, again)


def cut_line(shards: Sequence[int] | np.ndarray, counts: Sequence[int], start: int, stop: int) -> list[Run]:
    """The part `start` .. `stop` of the shards' samples laid end to end."""
    runs, offset = [], 0
    for shard in shards:
        size = counts[shard]
        low, high = max(int(start) - offset, 0), min(int(stop) - offset, size)
        if low < high:
            runs.append(Run(int(shard), low, high))
        offset += size
    return runs


class ShuffleBuffer:
    """Shuffles places instead of samples: `next()` gives the next (run number, position) to emit.

    A place enters once the buffer has room and leaves at random. `taken` counts the places that have entered, and
    `places` are those inside, so that a reader can be put down anywhere without reading what came before.
    """

    def __init__(self, runs: Iterable[Run], size: int, rng: np.random.Generator) -> None:
        self._runs = enumerate(runs)
        self._incoming = ((n, position) for n, run in self._runs for position in range(run.start, run.stop))
        self._size, self._rng = max(size, 1), rng
        self._random: list[float] = []
        self.places: list[tuple[int, int]] = []
        self.taken = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self

    def __next__(self) -> tuple[int, int]:
        while len(self.places) < self._size and (place := next(self._incoming, None)) is not None:
            self.places.append(place)
            self.taken += 1
        if not self.places:
            raise StopIteration
        if not self._random:  # drawn by the thousand: a call a sample would cost more than the rest
            self._random = self._rng.random(DRAWN).tolist()
        chosen = int(self._random.pop() * len(self.places))
        self.places[chosen], self.places[-1] = self.places[-1], self.places[chosen]
        return self.places.pop()

    def skip(self, number: int) -> None:
        """As `number` calls of `next`, from the start, in a few operations on arrays.

        Call t (from 0) finds the places 0 .. size - 1 + t entered, the newest in the last slot, and puts it into the
        slot that it empties. So a slot holds what the last call that chose it has put there.
        """
        assert self.taken == 0, "a buffer skips before it is read"
        runs, ends = self._begun(self._size + number)
        full = max(min(number, (ends[-1] if ends else 0) - self._size + 1), 0)  # calls with a full buffer
        slots, passed = np.arange(self._size), 0
        while passed < full:
            drawn = self._rng.random(DRAWN * min(DRAWN, -(-(full - passed) // DRAWN)))
            drawn = drawn.reshape(-1, DRAWN)[:, ::-1].ravel()  # as a list of DRAWN is popped, from its end
            chosen = (drawn[: full - passed] * self._size).astype(np.int64)
            slots[chosen] = self._size - 1 + passed + np.arange(len(chosen))  # of a slot chosen twice, the later
            self._random = drawn[len(chosen) :][::-1].tolist()
            passed += len(chosen)
        self.taken = taken = self._size - 1 + full if full else 0
        first = np.array([0, *ends])
        inside = slots[:-1] if full else slots[:0]
        numbers = np.searchsorted(first, inside, side="right") - 1
        positions = inside - first[numbers] + np.array([run.start for _, run in runs] or [0])[numbers]
        self.places = list(zip(numbers.tolist(), positions.tolist()))
        rest = ((n, position) for (n, run), end in zip(runs, ends)
                for position in range(max(run.start, run.stop - max(end - taken, 0)), run.stop))  # fmt: skip
        self._incoming = chain(rest, self._incoming)
        for _ in islice(self, number - full):
            pass

    def _begun(self, places: int) -> tuple[list[tuple[int, Run]], list[int]]:
        """The first runs that have so many places together, or all, with their numbers, and where each ends."""
        runs, ends = [], []
        while (ends[-1] if ends else 0) < places and (item := next(self._runs, None)) is not None:
            runs.append(item)
            ends.append((ends[-1] if ends else 0) + len(item[1]))
        return runs, ends


def source_probabilities(counts: Sequence[Sequence[int]], weights: Sequence[float]) -> list[float]:
    """For sources of shards with `counts` samples: the chance of each shard (sources in order) to be drawn, so that
    source k gives the share weights[k] / sum(weights) of the samples. Shards of one source are equally likely."""
    rates = [weight / sum(source) for source, weight in zip(counts, weights)]
    chances = [rate for rate, source in zip(rates, counts) for _ in source]
    return [chance / sum(chances) for chance in chances]
