"""WebDataset tar shards: which members make a sample, and how samples are counted and read.

The row id of a pair is offset[shard] + position of its sample in the tar, so counting (`scan_shard`) and reading
(`read_samples`) share one walk over the members and one grouping rule, `_grouped`:

- only regular files count; the name is split at the first dot of its last part into key (with folder) and suffix
  (lower case); names without such a dot, hidden files and webdataset's meta members (`__x__`) are skipped;
- a new sample starts when the key changes, or when a suffix of the current sample comes again.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

from vlcl.data.archive import BROKEN, READ_WINDOW, SCAN_WINDOW, LocalTar, Member, StreamTar, open_archive
from vlcl.data.remote import AS_DEFAULT, Fetching
from vlcl.data.urls import without_secrets

MARKED = 64  # a place of so many samples is remembered
MOST_MARKED = 256  # shards
MOST_KEYS = 1 << 20  # of a shard that are remembered to find keys that come again

_META = re.compile(r"__[^/]*__($|/)")


class ShardError(Exception):
    """A shard that cannot be read to its end. `position` = number of whole samples before the damage."""

    def __init__(self, url: str, position: int, reason: str):
        super().__init__(url, position, reason)  # args as given: the exception crosses process borders by pickle
        self.url, self.position, self.reason = url, position, reason

    def __str__(self) -> str:
        return without_secrets(f"{self.url}: {self.reason} (after {self.position} whole samples)")


class Unread(bytes):
    """Stands for the content of a file that was not read, as nobody asked for it or it is too large: no bytes."""

    size: int

    def __new__(cls, size: int) -> "Unread":
        unread = super().__new__(cls)
        unread.size = size
        return unread

    def __reduce__(self) -> tuple[type["Unread"], tuple[int]]:
        return Unread, (self.size,)


@dataclass(frozen=True)
class Wanted:
    """The files that are read: of these suffixes, and no larger than `max_bytes`; None: whatever they are."""

    suffixes: frozenset[str] | None = None
    max_bytes: int | None = None

    def takes(self, suffix: str, size: int) -> bool:
        asked_for = self.suffixes is None or suffix in self.suffixes
        return asked_for and (self.max_bytes is None or size <= self.max_bytes)


EVERYTHING = Wanted()


@dataclass(frozen=True)
class RawSample:
    """One sample, undecoded: `files` maps the suffix (lower case, e.g. "jpg", "seg.png") to the bytes, or to Unread."""

    key: str
    files: dict[str, bytes]
    url: str = field(default="", compare=False)


@dataclass(frozen=True)
class ShardScan:
    """What the headers of a shard tell."""

    samples: int
    bytes: int | None  # size of the tar file; None where a server or command does not tell
    mtime_ns: int | None  # modification time of the tar file; None for a remote shard
    checksum: str  # hash over names and sizes of the sample files: the identity and order of the rows
    suffixes: dict[str, int]  # every suffix that occurs, sorted, with the number of its files
    odd: "Oddities"
    fetched: int = field(default=0, compare=False)  # bytes that came over the network for it


@dataclass(frozen=True)
class Oddities:
    """What in a shard may not be what its owner thinks it is; `vlcl data index` warns of it."""

    most_files: int = 0
    """of a sample"""
    most_key: str = ""
    """its key"""
    apart: int = 0
    """samples whose key an earlier one has, with others between them"""
    apart_key: str = ""
    """of the first of them"""
    leftover: bool = False
    """whether more than zeros comes after the end of the archive"""


def scan_shard(url: str, window: int = 0) -> ShardScan:
    """Count the samples of a shard from its headers. Raises ShardError if the shard is truncated or no tar.

    window: bytes of each range request for a remote shard; 0: 8 KiB, and 1 MiB from the web.
    """
    suffixes: Counter[str] = Counter()
    names_and_sizes = hashlib.sha256()
    samples, watch = 0, _Watch()
    with closing(_opened(url, SCAN_WINDOW, window=window)) as archive:
        for position, key, suffix, member in _grouped(archive):
            if position == samples:
                watch.begin(key)
            watch.files += 1
            samples = position + 1
            suffixes[suffix] += 1
            names_and_sizes.update(f"{key}.{suffix}\0{member[1]}\n".encode("utf-8", "surrogateescape"))
        checksum, odd = names_and_sizes.hexdigest()[:32], watch.found(archive.leftover())
        found = dict(sorted(suffixes.items()))
        return ShardScan(samples, archive.bytes, archive.mtime_ns, checksum, found, odd, archive.fetched)


class _Watch:
    """Oddities of the samples that pass by."""

    def __init__(self) -> None:
        self.files, self.key = 0, ""  # of the sample in progress
        self.most_files, self.most_key = 0, ""
        self.apart, self.apart_key = 0, ""
        self.seen: set[int] = set()  # hashes of keys

    def begin(self, key: str) -> None:
        """The next sample."""
        self._end()
        name = hash(key)
        if name in self.seen and key != self.key:
            self.apart, self.apart_key = self.apart + 1, self.apart_key or key
        elif len(self.seen) < MOST_KEYS:
            self.seen.add(name)
        self.files, self.key = 0, key

    def _end(self) -> None:
        if self.files > self.most_files:
            self.most_files, self.most_key = self.files, self.key

    def found(self, leftover: bool) -> Oddities:
        self._end()
        return Oddities(self.most_files, self.most_key, self.apart, self.apart_key, leftover)


def scan_keys(url: str) -> Iterator[tuple[int, str, str]]:
    """(position, key, suffix) of every sample file in a shard, in order, from the headers alone. Raises ShardError."""
    with closing(_opened(url, SCAN_WINDOW, window=0)) as archive:
        for position, key, suffix, _ in _grouped(archive):
            yield position, key, suffix


def locate_files(url: str) -> Iterator[tuple[int, str, str, int, int]]:
    """(position, key, suffix, offset, size) of every sample file of a plain local shard, for random access to its data.

    Raises ShardError, also where the data has no such place: in compressed and remote shards, and in sparse members.
    """
    with closing(_opened(url, SCAN_WINDOW)) as archive:
        for position, key, suffix, (name, size, where) in _grouped(archive):
            if not isinstance(where, int):
                raise ShardError(url, position, f"{name} cannot be read at random: unpack the shard, or tar it plainly")
            yield position, key, suffix, where, size


def read_samples(
    url: str, start: int = 0, wanted: Wanted = EVERYTHING, fetching: Fetching = AS_DEFAULT
) -> Iterator[RawSample]:
    """The samples of a shard from position `start` on, in order; of their files the `wanted` ones.

    Raises ShardError where a truncated or corrupt shard stops, after the whole samples before that. The sample in
    progress there is not given: which of its files are missing is unknown.
    """
    with closing(_opened(url, SCAN_WINDOW, fetching)) as archive:
        current, key, files = -1, "", {}
        for position, member_key, suffix, member in _grouped(archive, start, _marks_of(archive)):
            if position != current:
                if files:
                    yield RawSample(key, files, url)
                current, key, files = position, member_key, {}
            if position >= start:
                archive.ahead = READ_WINDOW
                taken = wanted.takes(suffix, member[1])
                files[suffix] = _guarded_read(archive, member, position) if taken else Unread(member[1])
        if files:
            yield RawSample(key, files, url)


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member's name, or None if the member belongs to no sample."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base or (name.startswith("__") and _META.match(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


_marks: dict[tuple[str, int, int], dict[int, int]] = {}


def _marks_of(archive: LocalTar | StreamTar) -> dict[int, int] | None:
    """Where samples of a plain local shard begin, {position: offset}, as this process has seen it so far and is to go
    on: the streams of an epoch begin in the middle of shards, and need not walk to there a time each."""
    if not isinstance(archive, LocalTar):
        return None
    shard = (archive.url, archive.bytes, archive.mtime_ns)
    found = _marks.pop(shard, {0: 0})
    while len(_marks) >= MOST_MARKED:
        _marks.pop(next(iter(_marks)))
    return _marks.setdefault(shard, found)


def _grouped(
    archive: LocalTar | StreamTar, start: int = 0, marks: dict[int, int] | None = None
) -> Iterator[tuple[int, str, str, Member]]:
    """Number the samples: (position, key, suffix, member) for every member that belongs to one, from `start` at the
    latest, on from the last of the `marks` before it. Raises ShardError."""
    first = max(x for x in marks if x <= start) if marks else 0
    position, current, seen = first - 1, None, set()
    try:
        members = archive.members(marks[first]) if marks and isinstance(archive, LocalTar) else archive.members()
        for member in members:
            parts = split_name(member[0])
            if parts is None:
                continue
            key, suffix = parts
            if key != current or suffix in seen:
                position, current, seen = position + 1, key, {suffix}
                if marks and position % MARKED == 0 and archive.header is not None:
                    marks[position] = archive.header
            else:
                seen.add(suffix)
            yield position, key, suffix, member
    except BROKEN as error:  # the sample in progress does not count as whole
        raise ShardError(archive.url, max(position, 0), archive.explain(error)) from error


def _guarded_read(archive: LocalTar | StreamTar, member: Member, position: int) -> bytes:
    try:
        return archive.read(member)
    except BROKEN as error:
        raise ShardError(archive.url, position, archive.explain(error)) from error


def _opened(url: str, ahead: int, fetching: Fetching = AS_DEFAULT, window: int | None = None) -> LocalTar | StreamTar:
    try:
        return open_archive(url, ahead, fetching, window)
    except BROKEN as error:
        raise ShardError(url, 0, f"cannot be opened: {error}") from error
