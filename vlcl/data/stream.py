"""Shards + manifest -> batches. Each sample has its row id before any shuffle or filter: offset of its shard + position
in the tar, so that a broken image drops a sample and never renumbers the others.

What is read when is decided by vlcl/data/order.py; here the bytes are read, decoded, augmented and tokenized, in the
DataLoader's workers. Augmentation of a sample and its caption depend on (seed, epoch, row) alone. The training stream
is a webdataset.DataPipeline, with room for stages of the user's own (vlcl/data/stages.py). The loader must not go
through `accelerator.prepare` (it would dispatch or shard it a second time).
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import tee
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.pipeline import DataPipeline

from vlcl.batch import Batch
from vlcl.data.decode import BadSample
from vlcl.data.order import Layout, Run, ShuffleBuffer, cut_line
from vlcl.data.preprocess import own_generators, seed_generators
from vlcl.data.reader import Reader, Sources
from vlcl.data.stages import Filling, Item, Key, Stage, StageFunction, as_stage
from vlcl.errors import UserError


@dataclass
class Position:
    """Where a rank's stream of batches stands: the number of the next batch, counted over all epochs, and for each
    stream the epoch and the samples it has consumed there."""

    batch: int = 0
    cursors: dict[int, tuple[int, int]] = field(default_factory=dict)

    def after(self, batch: Batch) -> Position:
        return Position(self.batch + 1, self.cursors | {batch.stream: (batch.epoch, batch.consumed)})


@dataclass(frozen=True)
class Failure:
    """A UserError that happened in a worker: sent as a value, since the DataLoader would wrap it in a traceback."""

    message: str


def shuffled_samples(
    runs: Iterable[Run], reader: Reader, buffer_size: int, rng: np.random.Generator, skip: int = 0
) -> Iterator[tuple[int, int, Any | BadSample]]:
    """(shard, position, sample) in the order of a ShuffleBuffer, its first `skip` left out.

    Reads no more than it must: nothing of a skipped shard unless one of its samples is still in the buffer.
    """
    order_runs, read_runs = tee(runs)
    order = ShuffleBuffer(order_runs, buffer_size, rng)
    order.skip(skip)
    places = _read_places(read_runs, reader, order.taken, set(order.places))
    held: dict[tuple[int, int], tuple[int, int, Any | BadSample]] = {}
    for place in order:
        while place not in held:
            arrived, sample = next(places)
            held[arrived] = sample
        yield held.pop(place)


def _read_places(
    runs: Iterable[Run], reader: Reader, passed: int, pending: set[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], tuple[int, int, Any | BadSample]]]:
    """Samples by place, in reading order; of the first `passed` places those in `pending` only."""
    begin, pending_of = 0, defaultdict(set)
    for number, position in pending:
        pending_of[number].add(position)
    for number, run in enumerate(runs):
        fresh = run.start + min(max(passed - begin, 0), len(run))
        begin += len(run)
        waiting = {position for position in pending_of.pop(number, ()) if position < fresh}
        start = min(waiting, default=fresh)
        stop = run.stop if fresh < run.stop else max(waiting, default=start - 1) + 1
        if start < stop:
            for position, sample in reader.read(run.shard, start, stop):
                if position >= fresh or position in waiting:
                    yield (number, position), (run.shard, position, sample)


@dataclass(frozen=True)
class Samples:
    """First stage of a training stream: the samples of one rank with their row ids, without end, from `start` on. For
    DataLoader workers each its share of the batches. Those that cannot be read are counted, not given."""

    offsets: Sequence[int]
    layout: Layout
    reader: Reader
    buffer_size: int
    start: Position

    def __call__(self) -> Iterator[Item]:
        worker, layout = get_worker_info(), self.layout
        number, stride = (self.start.batch + worker.id, worker.num_workers) if worker else (self.start.batch, 1)
        open_streams: dict[int, tuple[int, int, Iterator[tuple[Key, Any | BadSample]]]] = {}
        while True:
            epoch, stream = number // layout.steps_per_epoch, number % layout.streams
            if open_streams.get(stream, (None,))[0] != epoch:
                old_epoch, consumed = self.start.cursors.get(stream, (epoch, 0))
                skip = consumed if old_epoch == epoch else 0
                open_streams[stream] = (epoch, skip, self._of(epoch, stream, skip))
            _, consumed, samples = open_streams[stream]
            filling = Filling(stream, layout.batch_size, consumed, consumed)
            while not filling.full:
                key, sample = next(samples)
                filling.consumed += 1
                if isinstance(sample, BadSample):
                    filling.skip(sample.reason)
                else:
                    yield filling, key, sample
            open_streams[stream] = (epoch, filling.consumed, samples)
            number += stride

    def _of(self, epoch: int, stream: int, skip: int) -> Iterator[tuple[Key, Any | BadSample]]:
        """Of a stream in an epoch, without end."""
        seed, offsets = self.layout.seed, self.offsets
        for again, (runs, rng) in enumerate(self.layout.passes(epoch, stream)):
            size = sum(map(len, runs)) if isinstance(runs, list) else None
            if size is not None and skip >= size:
                skip -= size
                continue
            for shard, position, sample in shuffled_samples(runs, self.reader, self.buffer_size, rng, skip):
                yield (seed, epoch, offsets[shard] + position, again), sample
            skip = 0


@dataclass(frozen=True)
class Prepare:
    """Stage: each sample decoded, augmented, tokenized; one that is bad is counted and dropped."""

    reader: Reader

    def __call__(self, items: Iterable[Item]) -> Iterator[Item]:
        random, prepare = self.reader.random, self.reader.prepare
        for filling, key, sample in items:
            try:
                if random:
                    seed_generators(*key)
                prepared = prepare(sample, key[1], key[2])
            except BadSample as bad:
                filling.skip(bad.reason)
                continue
            yield filling, key, prepared


@dataclass(frozen=True)
class Batched:
    """Last stage: as many samples as a batch has. The first stage goes on with the next batch, of another stream, when
    it is asked for it. hashed: with `caption_B`."""

    reader: Reader
    hashed: bool = False

    def __call__(self, items: Iterable[Item]) -> Iterator[Batch]:
        good: list[tuple[Any, int]] = []
        repeated = 0
        for filling, (_, epoch, row, again), prepared in items:
            good.append((prepared, row))
            repeated += again > 0
            if len(good) == filling.size:
                filling.full = True
                cursor = {"epoch": epoch, "stream": filling.stream, "consumed": filling.consumed, "repeated": repeated}
                batch = _stack(self.reader, good, skipped=dict(filling.skipped), **cursor)
                yield replace(batch, caption_B=hash_captions(batch.tokens_BL)) if self.hashed else batch
                good, repeated = [], 0


class TrainStream(DataPipeline):
    """Endless training batches of one rank, from `start`: a pipeline of samples with row ids, `stages` of the user's
    own, decoding, batches. Iterated by DataLoader workers or, with 0 of them, in place; the sequence is the same.
    `layout.streams` must be a multiple of the workers. What a user can mend comes as a Failure, and ends it."""

    def __init__(
        self, sources: Sources, layout: Layout, reader: Reader, shuffle: int, start: Position,
        stages: Sequence[Stage] = (), hashed: bool = False,
    ) -> None:  # fmt: skip
        self.made_of, self.stages, self.hashed = (sources, layout, reader, shuffle, start), tuple(stages), hashed
        self.layout = layout
        reader = reader.with_all_files() if stages else reader
        first = Samples(sources.offsets, layout, reader, max(shuffle // layout.streams, 1), start)
        super().__init__(first, *stages, Prepare(reader), Batched(reader, hashed))
        self.random = reader.random or bool(stages)

    def compose(self, *stages: StageFunction) -> TrainStream:
        """A copy with further stages on samples, after those that there are and before decoding. Raises UserError where
        samples have no files (data.cache)."""
        return TrainStream(*self.made_of, (*self.stages, *map(as_stage, stages)), self.hashed)

    def __iter__(self) -> Iterator[Batch | Failure]:
        batches = super().__iter__()
        while True:
            try:
                with own_generators() if self.random else nullcontext():
                    batch = next(batches)
            except UserError as error:
                yield Failure(str(error))
                return
            yield batch


class EvalStream(IterableDataset[Batch]):
    """Each sample once, in row order, in batches of at most `batch_size`; this rank's equal share."""

    def __init__(self, sources: Sources, batch_size: int, reader: Reader, rank: int, world: int) -> None:
        super().__init__()
        self.sources, self.batch_size, self.reader, self.rank, self.world = sources, batch_size, reader, rank, world

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        part, parts = self.rank, self.world
        if worker:
            part, parts = part * worker.num_workers + worker.id, parts * worker.num_workers
        counts, offsets, total = self.sources.counts, self.sources.offsets, self.sources.num_samples
        runs = cut_line(range(len(counts)), counts, total * part // parts, total * (part + 1) // parts)
        samples = (
            (offsets[run.shard] + p, s) for run in runs for p, s in self.reader.read(run.shard, run.start, run.stop)
        )
        good: list[tuple[Any, int]] = []
        skipped: Counter[str] = Counter()
        for row, sample in samples:
            try:
                if isinstance(sample, BadSample):
                    raise sample
                good.append((self.reader.prepare(sample, 0, row), row))
            except BadSample as bad:
                skipped[bad.reason] += 1
            if len(good) == self.batch_size:
                yield _stack(self.reader, good, skipped=dict(skipped))
                good, skipped = [], Counter()
        if good or skipped:
            yield _stack(self.reader, good, skipped=dict(skipped))


def hash_captions(tokens_BL: torch.Tensor) -> torch.Tensor:
    """[B] int64, the same for the same tokens."""
    hashes = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in tokens_BL.long().numpy())
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in hashes])


def _stack(reader: Reader, samples: list[tuple[Any, int]], **cursor: Any) -> Batch:
    """A batch of prepared samples; one of none where only its account of bad samples is left to tell."""
    if not samples:
        return Batch(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.long), **cursor)
    prepared, rows = zip(*samples)
    return Batch(row_B=torch.tensor(rows), **reader.stack(prepared)._asdict(), **cursor)


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_workers(streams: int, ranks_on_machine: int = 1) -> int:
    """Worker processes a rank when the user names none: its share of the cores less one for the training process, at
    most 8, at least 1, and a divisor of `streams`."""
    most = max(1, min(8, cpu_cores() // ranks_on_machine - 1))
    return max(n for n in range(1, most + 1) if streams % n == 0)


def make_loader(stream: IterableDataset[Any] | TrainStream, workers: int, device: torch.device) -> DataLoader[Any]:
    """Batches as `stream` makes them, in its order. Leaves torch's own generator alone, which a resumed run needs."""
    options: dict[str, Any] = {"prefetch_factor": 2, "worker_init_fn": _quiet_worker} if workers else {}
    pin, batches = device.type == "cuda", cast(IterableDataset[Any], stream)
    return DataLoader(
        batches, batch_size=None, num_workers=workers, pin_memory=pin, generator=torch.Generator(), **options
    )


def _quiet_worker(_: int) -> None:
    """Signals are the main process's to answer, which may want the batches that are under way. The second SIGTERM is
    the loader's own, when it ends."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    told: list[int] = []

    def leave(number: int, _: object) -> None:
        told.append(number)
        if len(told) > 1 or os.getppid() != parent:
            os._exit(0)

    parent = os.getppid()
    signal.signal(signal.SIGTERM, leave)
    torch.set_num_threads(1)
