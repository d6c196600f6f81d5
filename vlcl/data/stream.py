"""Shards + manifest -> batches. Each sample has its row id before any shuffle or filter: offset of its shard + position
in the tar, so that a broken image drops a sample and never renumbers the others.

What is read when is decided by vlcl/data/order.py; here the bytes are read, decoded, augmented and tokenized, in the
DataLoader's workers. Augmentation of a sample and its caption depend on (seed, epoch, row) alone. The loader must not
go through `accelerator.prepare` (it would dispatch or shard it a second time).
"""

from __future__ import annotations

import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count, tee
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlcl.batch import Batch
from vlcl.data.decode import CAPTION_NOT_TEXT, BadSample
from vlcl.data.order import Layout, Run, ShuffleBuffer, cut_line
from vlcl.data.preprocess import own_generators, seed_generators
from vlcl.data.reader import Reader, Sources
from vlcl.errors import UserError


@dataclass
class Position:
    """Where a rank's batches stand: the number of the next one, counted over all epochs, and for each stream (see
    vlcl/data/order.py) the epoch and the samples it has consumed there."""

    batch: int = 0
    cursors: dict[int, tuple[int, int]] = field(default_factory=dict)

    def after(self, batch: Batch) -> Position:
        moved = {stream: (batch.epoch, consumed) for stream, consumed in batch.consumed.items()}
        return Position(self.batch + 1, self.cursors | moved)


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


class Share(NamedTuple):
    """What a stream gives to a batch, by place: samples and their rows; which places have a repeated sample; the bad
    samples before each. `consumed`: samples used in this epoch, up to here."""

    samples: list[tuple[Any, int]]
    repeated: set[int]
    skipped: dict[int, Counter[str]]
    consumed: int


class TrainStream(IterableDataset[Batch | Failure]):
    """Endless training batches of one rank, from `start`. Iterated by DataLoader workers or, with 0 of them, in place;
    the sequence is the same. `layout.streams` must be a multiple of the workers. shuffle: samples in the buffers of all
    streams, whatever rank they are on."""

    def __init__(self, sources: Sources, layout: Layout, reader: Reader, shuffle: int, start: Position) -> None:
        super().__init__()
        self.offsets, self.layout, self.reader, self.start = sources.offsets, layout, reader, start
        self.buffer_size = max(shuffle // (layout.slices * layout.streams), 1)
        slices = {own: n for n, own in enumerate(layout.own_slices)}
        pairs = (divmod(slot, layout.slice_size) for slot in layout.slots.tolist())
        self.places = [(slices[own], place) for own, place in pairs]  # of the rank's slots in the shares of its streams

    def __iter__(self) -> Iterator[Batch | Failure]:
        worker = get_worker_info()
        first, stride = (self.start.batch + worker.id, worker.num_workers) if worker else (self.start.batch, 1)
        open_streams: dict[int, tuple[int, Iterator[Share]]] = {}
        for number in count(first, stride):
            epoch, streams = number // self.layout.steps_per_epoch, self.layout.streams_of(number)
            for stream in streams:
                if open_streams.get(stream, (None,))[0] != epoch:
                    old_epoch, consumed = self.start.cursors.get(stream, (epoch, 0))
                    skip = consumed if old_epoch == epoch else 0
                    open_streams[stream] = (epoch, self._shares(epoch, stream, skip))
            try:
                with own_generators() if self.reader.random else nullcontext():
                    shares = [next(open_streams[stream][1]) for stream in streams]
                yield self._batch(epoch, streams, shares)
            except UserError as error:
                yield Failure(str(error))
                return

    def _batch(self, epoch: int, streams: list[int], shares: list[Share]) -> Batch:
        """This rank's slots of what its streams give."""
        good = [shares[own].samples[place] for own, place in self.places]
        repeated, skipped = 0, Counter()
        for own in {own for own, share in enumerate(shares) if share.repeated or share.skipped}:
            mine = [place for other, place in self.places if other == own]
            repeated += len(shares[own].repeated.intersection(mine))
            for place in shares[own].skipped.keys() & mine:
                skipped.update(shares[own].skipped[place])
        consumed = {stream: share.consumed for stream, share in zip(streams, shares)}
        return _stack(self.reader, good, skipped=dict(skipped), epoch=epoch, consumed=consumed, repeated=repeated)

    def _samples(self, epoch: int, stream: int, skip: int) -> Iterator[tuple[int, int, Any | BadSample]]:
        """(number of the pass, row, sample) without end."""
        for again, (runs, rng) in enumerate(self.layout.passes(epoch, stream)):
            size = sum(map(len, runs)) if isinstance(runs, list) else None
            if size is not None and skip >= size:
                skip -= size
                continue
            for shard, position, sample in shuffled_samples(runs, self.reader, self.buffer_size, rng, skip):
                yield again, self.offsets[shard] + position, sample
            skip = 0

    def _shares(self, epoch: int, stream: int, consumed: int) -> Iterator[Share]:
        samples, size, seed = self._samples(epoch, stream, consumed), self.layout.slice_size, self.layout.seed
        while True:
            good: list[tuple[Any, int]] = []
            repeated: set[int] = set()
            skipped: dict[int, Counter[str]] = {}
            bad_samples = 0
            while len(good) < size:
                again, row, sample = next(samples)
                consumed += 1
                try:
                    if isinstance(sample, BadSample):
                        raise sample
                    if self.reader.random:
                        seed_generators(seed, epoch, row, again)
                    good.append((self.reader.prepare(sample, epoch, row), row))
                    if again:
                        repeated.add(len(good) - 1)
                except BadSample as bad:
                    skipped.setdefault(len(good), Counter())[bad.reason] += 1
                    bad_samples += 1
                    if bad_samples > 1000 + 20 * self.layout.global_batch:
                        reasons = sum(skipped.values(), Counter())
                        raise UserError(bad_share_message(reasons, bad_samples + len(good), None)) from None
            yield Share(good, repeated, skipped, consumed)


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


def make_loader(stream: IterableDataset[Any], workers: int, device: torch.device) -> DataLoader[Any]:
    """Batches as `stream` makes them, in its order. Leaves torch's own generator alone, which a resumed run needs."""
    options: dict[str, Any] = {"prefetch_factor": 2, "worker_init_fn": _quiet_worker} if workers else {}
    pin = device.type == "cuda"
    return DataLoader(
        stream, batch_size=None, num_workers=workers, pin_memory=pin, generator=torch.Generator(), **options
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


def bad_share_message(skipped: Mapping[str, int], tried: int, limit: float | None) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(skipped).most_common())
    bound = f" (data.max_bad_share={limit:g})" if limit is not None else ""
    hint = (
        " Where the caption is not text, data.json_text_key names numbers or objects; verify's table says which keys "
        "of the .json hold texts."
    ) * (CAPTION_NOT_TEXT in skipped)
    return (
        f"{sum(skipped.values())} of {tried} samples are bad{bound}: {reasons}. See which with "
        "`vlcl data verify SHARDS`; check data.image_key, data.text_key and data.json_text_key; or raise "
        f"data.max_bad_share.{hint}"
    )
