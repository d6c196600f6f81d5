"""What `vlcl data stats` counts of a shard, and how counts of shards add up. Memory does not grow with the samples, but
for the hashes that find repetitions, of which a bounded number is kept.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlcl.data.captions import captions_from
from vlcl.data.decode import BadSample, Keys, Limits, decode_image, image_bytes_from, wanted_files
from vlcl.data.shard import RawSample, ShardError, read_samples
from vlcl_data_prep.results import Form, Parts
from vlcl_data_prep.samples import look_at
from vlcl_data_prep.tokens import Model, count_tokens

MOST_HASHES = 1 << 22  # of captions, and as many of pictures: 64 MiB each
TEXTS_AT_ONCE = 512  # for the tokenizer


@dataclass(frozen=True)
class How:
    """How the samples of a shard are read."""

    keys: Keys
    limits: Limits
    background: str
    model: Model | None  # whose tokens are counted; None: no tokens are


@dataclass
class Tally:
    """Counts of samples. Everything but `samples`, `dropped` and `examples` is of those that training uses."""

    samples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """samples that training leaves out, by reason"""
    left_out: Counter[str] = field(default_factory=Counter)
    """captions that it leaves out, of samples that it uses"""
    examples: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    """the first of each reason: row, key, detail"""
    broken: list[str] = field(default_factory=list)
    """shards that cannot be read to their end"""
    short: Counter[int] = field(default_factory=Counter)
    """shorter side of the upright picture, pixels"""
    long: Counter[int] = field(default_factory=Counter)
    aspect: Counter[int] = field(default_factory=Counter)
    """width over height, hundredths"""
    kibibytes: Counter[int] = field(default_factory=Counter)
    """of the picture's file, rounded up"""
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    """what the decoder did to pictures"""
    captions: Counter[int] = field(default_factory=Counter)
    """captions of a sample"""
    characters: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    truncated: int = 0
    """captions that training cuts"""

    @property
    def used(self) -> int:
        return self.samples - self.dropped.total()

    def add(self, other: "Tally") -> None:
        """The counts of the next shard; its rows follow those of this one."""
        for reason, (row, key, detail) in other.examples.items():
            self.examples.setdefault(reason, (row + self.samples, key, detail))
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
        self.samples += other.samples
        self.truncated += other.truncated
        self.broken += other.broken

    def note(self, bad: BadSample, row: int, key: str) -> None:
        self.examples.setdefault(bad.reason, (row, key, bad.detail))


@dataclass
class Hashes:
    """64-bit hashes in the order of reading, and the row in its shard that each is of."""

    values: array = field(default_factory=lambda: array("Q"))
    rows: array = field(default_factory=lambda: array("Q"))

    def add(self, data: bytes, row: int) -> None:
        self.values.append(hash_of(data))
        self.rows.append(row)


def hash_of(data: bytes) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def tally_shard(url: str, how: How) -> tuple[Tally, Hashes, Hashes]:
    """The counts of a shard, the hashes of its pictures' files, and those of its captions."""
    tally, pictures, captions = Tally(), Hashes(), Hashes()
    waiting: list[str] = []
    try:
        for row, sample in enumerate(read_samples(url, wanted=wanted_files(how.keys, how.limits))):
            tally.samples += 1
            try:
                texts = _count_sample(tally, sample, row, how)
            except BadSample as bad:
                tally.dropped[bad.reason] += 1
                tally.note(bad, row, sample.key)
                continue
            pictures.add(image_bytes_from(sample.files, how.keys), row)
            for text in texts:
                captions.add(text.encode(), row)
            waiting += texts
            if len(waiting) >= TEXTS_AT_ONCE:
                _count_tokens(tally, waiting, how.model)
                waiting = []
    except ShardError as error:
        tally.broken.append(str(error))
    _count_tokens(tally, waiting, how.model)
    return tally, pictures, captions


def _parts_of(result: tuple[Tally, Hashes, Hashes]) -> Parts | None:
    tally, *hashes = result
    if tally.broken:
        return None
    facts = {name: list(value.items()) if isinstance(value, dict) else value for name, value in vars(tally).items()}
    names = ("pictures", "picture_rows", "captions", "caption_rows")
    return facts, dict(zip(names, [x for found in hashes for x in (found.values, found.rows)]))


def _result_of(facts: Any, arrays: Mapping[str, array]) -> tuple[Tally, Hashes, Hashes]:
    tally = Tally()
    for name, empty in list(vars(tally).items()):
        setattr(tally, name, Counter(dict(facts[name])) if isinstance(empty, Counter) else facts[name])
    tally.examples = {reason: (row, key, detail) for reason, (row, key, detail) in facts["examples"]}
    pictures, captions = (Hashes(arrays[name], arrays[f"{name[:-1]}_rows"]) for name in ("pictures", "captions"))
    return tally, pictures, captions


FORM = Form(_parts_of, _result_of)


def _count_sample(tally: Tally, sample: RawSample, row: int, how: How) -> Sequence[str]:
    """Count a sample that training uses, and return its captions. In the order of training's decoder: BadSample is
    raised for what it finds first."""
    found = captions_from(sample.files, how.keys, how.limits)
    data = image_bytes_from(sample.files, how.keys)
    image = decode_image(data, how.limits, how.background)
    for bad in found.left_out:
        tally.left_out[bad.reason] += 1
        tally.note(bad, row, sample.key)
    if header := look_at(data, how.background):
        tally.formats[header.format] += 1
        tally.modes[header.mode] += 1
        tally.changes.update(header.changes)
    tally.short[min(image.size)] += 1
    tally.long[max(image.size)] += 1
    tally.aspect[round(100 * image.width / image.height)] += 1
    tally.kibibytes[-(-len(data) // 1024)] += 1
    tally.captions[len(found.texts)] += 1
    tally.characters.update(map(len, found.texts))
    return found.texts


def _count_tokens(tally: Tally, texts: Sequence[str], model: Model | None) -> None:
    if model is None or not texts:
        return
    lengths, cut = count_tokens(model, texts)
    tally.tokens.update(lengths)
    tally.truncated += cut


class Repeats:
    """Finds what occurs more than once: different hashes with their counts. Of more than `most` different ones a share
    is kept, chosen by the hash, so that what is kept of one thing is all of it: counts of things are estimates then.
    """

    def __init__(self, most: int = MOST_HASHES) -> None:
        import numpy as np

        self.most, self.bits = most, 0
        self.table = np.empty((4, 0), np.uint64)  # hash, count, first row, last row; sorted by hash
        self.parts = [self.table]

    def add(self, hashes: Hashes, offset: int) -> None:
        """`offset`: the first row of the shard."""
        import numpy as np

        values, rows = np.frombuffer(hashes.values, np.uint64), np.frombuffer(hashes.rows, np.uint64)
        rows = rows + np.uint64(offset)
        self.parts.append(self._kept(np.stack([values, np.ones_like(values), rows, rows])))
        if sum(part.shape[1] for part in self.parts) > self.most // 4:
            self._merge()

    def _kept(self, table: Any) -> Any:
        import numpy as np

        return table[:, (table[0] & np.uint64((1 << self.bits) - 1)) == 0]

    def _merge(self) -> None:
        import numpy as np

        every = np.concatenate([self.table, *self.parts], axis=1)
        every = every[:, np.argsort(every[0], kind="stable")]
        starts = np.flatnonzero(np.diff(every[0], prepend=~every[0][:1]))
        if len(starts):
            ufuncs = (np.minimum, np.add, np.minimum, np.maximum)
            every = np.stack([ufunc.reduceat(row, starts) for ufunc, row in zip(ufuncs, every)])
        self.table, self.parts = every, []
        while self.table.shape[1] > self.most:
            self.bits += 1
            self.table = self._kept(self.table)

    def found(self, groups: int) -> "Repeated":
        """And the `groups` that occur most often."""
        import numpy as np

        self._merge()
        of, counts = 1 << self.bits, self.table[1].astype(np.int64)
        often = [n for n in np.argsort(-counts, kind="stable")[:groups] if counts[n] > 1]
        most = [Group(*(int(value) for value in self.table[:, n])) for n in often]
        again = counts[counts > 1]
        return Repeated(of * len(counts), of * int((again - 1).sum()), of * int(again.sum()), of, most)


@dataclass(frozen=True)
class Group:
    """Things that are the same."""

    value: int
    """their hash"""
    count: int
    first: int
    """row"""
    last: int


@dataclass(frozen=True)
class Repeated:
    """distinct: different things; extra: what is there beside the first of each; involved: those that are not alone.
    of: 1, or the counts are estimates from one in so many."""

    distinct: int
    extra: int
    involved: int
    of: int
    most: list[Group]


def percentile(counts: Counter[int], share: float) -> int:
    """The smallest value that at least `share` of what was counted does not exceed; 0 where nothing was."""
    wanted, seen = share * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return 0


def counted(counts: Counter[int], holds: Callable[[int], bool]) -> int:
    """How many values there are that `holds` is true of."""
    return sum(number for value, number in counts.items() if holds(value))
