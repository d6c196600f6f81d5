"""In which order samples come, and which rank gives which: pure arithmetic on (shard, position), no bytes, no torch.

The order depends on (seed, epoch), the global batch G, the number of `slices` and of `streams`, and on nothing else:
not on how many ranks or workers there are, the clock, or the process. So any number of ranks sees the same global
batches, and a run may go on with another number at any step.

    slot of the global batch   0 ... G/S-1 | G/S ... 2G/S-1 | ...         S slices, each of G/S slots
    filled in batch b from     (0, b % P)  | (1, b % P)     | ...         P streams a slice, in turn a batch each
    given by                   rank 0            ...          rank W-1    each G/W slots, in order

An epoch permutes the shards, lays their samples end to end, and cuts that line into S * P segments, one for each stream
(number slice * P + phase), in proportion to the batches that it owes. So all slices get equal numbers of samples
however uneven the shards are, a shard on a cut is read by both neighbours, each its own part, and less than one global
batch of samples is left out of an epoch (other ones each time). Within its segment a stream shuffles with a buffer. A
bad sample is replaced by the next of its stream, which no other stream can tell; a stream that has used its segment up
goes through it again, and then on to the segments behind.

Where W divides S, a rank owns whole streams and a sample is read by one rank. Elsewhere the streams of a slice that
ranks share are read by each of them, and each gives its own slots: the same batches, more reading. A rank's workers
take its batches in turn, so with n workers, n dividing P, each stream belongs to one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, count, islice

import numpy as np

DRAWN = 1024  # random numbers at a time
MOST_SLICES = 8  # of an order that nobody asked for


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
    """The order of samples, and this rank's place in it. `rank` and `world` say who gives a sample, never which it is.

    `slices` * `chunks` and `world` * `chunks` must divide the global batch.
    """

    counts: tuple[int, ...]  # samples of each shard
    batch_size: int  # pairs a rank takes a step
    rank: int = 0
    world: int = 1
    streams: int = 1  # of a slice
    seed: int = 0
    # Drawing with replacement: the probability of each shard to be drawn next; None: each sample once an epoch.
    shard_probabilities: tuple[float, ...] | None = None
    slices: int = 1
    chunks: int = 1  # of a batch, where each has negatives of its own

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world

    @cached_property
    def num_samples(self) -> int:
        return sum(self.counts)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    @property
    def slice_size(self) -> int:
        """Slots of a slice."""
        return self.global_batch // self.slices

    @cached_property
    def slots(self) -> np.ndarray:
        """[batch_size] the slots of the global batch that this rank gives, in its own order: those that follow on each
        other, of each chunk. A chunk has equal parts of all slices, and so the same pairs on any number of ranks."""
        slots = np.arange(self.global_batch).reshape(self.slices, self.chunks, -1).swapaxes(0, 1)
        return slots.reshape(self.chunks, self.world, -1)[:, self.rank].ravel()

    @cached_property
    def own_slices(self) -> list[int]:
        """Those that this rank has slots of."""
        return np.unique(self.slots // self.slice_size).tolist()

    @property
    def times_read(self) -> float:
        """How often a sample is read, on average over all: 1 where the ranks divide the slices."""
        return (self.slices + self.world - math.gcd(self.slices, self.world)) / self.slices

    def rng(self, *key: int) -> np.random.Generator:
        return generator(self.seed, *key)

    def streams_of(self, batch: int) -> list[int]:
        """Whose samples this rank reads for a batch, by its number over all epochs."""
        return [own * self.streams + batch % self.streams for own in self.own_slices]

    def batches_of_stream(self, epoch: int) -> list[int]:
        """How many of the epoch's batches each stream of a slice owes (the same in every slice)."""
        first, steps = epoch * self.steps_per_epoch, self.steps_per_epoch
        return [len(range((v - first) % self.streams, steps, self.streams)) for v in range(self.streams)]

    def segment(self, epoch: int, stream: int) -> list[Run]:
        """What a stream reads in an epoch, as runs over shards."""
        start, stop = self._cuts(epoch, stream)
        return cut_line(self._line(epoch), self._sizes, start, stop)

    def drawn_runs(self, epoch: int, stream: int) -> Iterator[Run]:
        """Whole shards drawn with replacement, without end."""
        rng = self.rng(epoch, 1, *divmod(stream, self.streams))
        while True:
            for shard in rng.choice(len(self.counts), size=256, p=self.shard_probabilities):
                yield Run(int(shard), 0, self.counts[shard])

    def passes(self, epoch: int, stream: int) -> Iterator[tuple[Iterable[Run], np.random.Generator]]:
        """The reading of one stream in one epoch: its segment, and where bad samples use it up before the stream has
        filled its batches, the whole line from there on, round and round, each time with a new shuffle. Only the first
        pass repeats nothing."""
        key = (epoch, 2, *divmod(stream, self.streams))
        if self.shard_probabilities is not None:
            yield self.drawn_runs(epoch, stream), self.rng(*key, 0)
            return
        yield self.segment(epoch, stream), self.rng(*key, 0)
        line, (start, _), total = self._line(epoch), self._cuts(epoch, stream), self.num_samples
        runs = cut_line(line, self._sizes, start, total) + cut_line(line, self._sizes, 0, start)
        for again in count(1) if runs else ():
            yield runs, self.rng(*key, again)

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.array(self.counts, dtype=np.int64)

    def _line(self, epoch: int) -> np.ndarray:
        return shard_order(self.seed, epoch, len(self.counts))

    def _cuts(self, epoch: int, stream: int) -> tuple[int, int]:
        """Where a stream's segment of the line begins and ends."""
        owed = np.tile(self.batches_of_stream(epoch), self.slices)
        cuts = np.concatenate([[0], np.cumsum(owed)]) * self.num_samples // max(int(owed.sum()), 1)
        return int(cuts[stream]), int(cuts[stream + 1])


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


@lru_cache(maxsize=2)  # for all streams of an epoch
def shard_order(seed: int, epoch: int, shards: int) -> np.ndarray:
    return generator(seed, epoch, 0).permutation(shards)


def default_slices(pairs: int, streams: int) -> int:
    """Of data.slices=null, for chunks of `pairs`: 8, 4, 2 or 1, the most that divides them; one stream is one."""
    return 1 if streams == 1 else math.gcd(pairs, MOST_SLICES)


def cut_line(
    shards: Sequence[int] | np.ndarray, counts: Sequence[int] | np.ndarray, start: int, stop: int
) -> list[Run]:
    """The part `start` .. `stop` of the shards' samples laid end to end."""
    order = np.asarray(shards, dtype=np.int64)
    ends = np.cumsum(np.asarray(counts, dtype=np.int64)[order])
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
    runs, begin = [], int(ends[first - 1]) if first else 0
    for shard, end in zip(order[first : last + 1].tolist(), ends[first : last + 1].tolist()):
        run = Run(shard, max(start - begin, 0), min(stop, end) - begin)
        if run.start < run.stop:
            runs.append(run)
        begin = end
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
