"""WebDataset tar shards: which members make a sample, and how samples are counted and read.

The row id of a pair is offset[shard] + position of its sample in the tar, so counting (`scan_shard`) and reading
(`read_samples`) share one walk over the members and one grouping rule, `_grouped`:

- only regular files count; the name is split at the first dot of its last part into key (with folder) and suffix
  (lower case); names without such a dot, hidden files and webdataset's meta members (`__x__`) are skipped;
- a new sample starts when the key changes, or when a suffix of the current sample comes again.

A local, uncompressed tar is walked by its 512-byte headers with seeks over the data. Whatever is unusual there (GNU
long names, sparse files, global pax headers, base-256 sizes, a wrong header checksum) is left to Python's `tarfile`,
from that member on. Compressed and remote shards are streams: `tarfile` reads them from start to end.
"""

import hashlib
import lzma
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import IO, Any

BLOCK = 512
SCAN_WINDOW = 8192  # bytes: the headers and the small members (caption, json) between two images in one system call
READ_WINDOW = 1 << 18  # bytes: whole samples are wanted, so read on

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
_META = re.compile(r"__[^/]*__($|/)")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_HEADER = struct.Struct("100s 24x 12s 12x 8s c 100x 5s 83x 155s 12x")  # name, size, checksum, type, magic, prefix
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")
_PAX_WORD = re.compile(rb" (path|size|hdrcharset|GNU\.sparse)")  # what changes how a member is read

# (name, size in bytes, where the data is: an offset in the file, or tarfile's own member)
_Member = tuple[str, int, "int | tarfile.TarInfo"]


class ShardError(Exception):
    """A shard that cannot be read to its end. `position` = number of whole samples before the damage."""

    def __init__(self, url: str, position: int, reason: str):
        super().__init__(url, position, reason)  # args as given: the exception crosses process borders by pickle
        self.url, self.position, self.reason = url, position, reason

    def __str__(self) -> str:
        return f"{self.url}: {self.reason} (after {self.position} whole samples)"


@dataclass(frozen=True)
class RawSample:
    """One sample, undecoded: `files` maps the suffix (lower case, e.g. "jpg", "seg.png") to the bytes."""

    key: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class ShardScan:
    """What the headers of a shard tell."""

    samples: int
    bytes: int | None  # size of the tar file; None for a remote shard
    mtime_ns: int | None  # modification time of the tar file; None for a remote shard
    checksum: str  # hash over names and sizes of the sample files: the identity and order of the rows
    suffixes: tuple[str, ...]  # every suffix that occurs, sorted


def local_path(url: str) -> str | None:
    """The path that a shard's url names on this machine, or None for pipe:, http:, s3: and the like."""
    if url.startswith("file:"):
        return re.sub(r"^file:(//)?", "", url)
    return None if _SCHEME.match(url) else url


def as_path(path: str) -> str:
    """A path on this machine, written so that nothing takes it for a url, whatever its name: "./pipe:x.tar"."""
    return path if local_path(path) == path else os.path.join(".", path)


def scan_shard(url: str) -> ShardScan:
    """Count the samples of a shard from its headers. Raises ShardError if the shard is truncated or no tar."""
    suffixes: set[str] = set()
    lines: list[str] = []
    samples = 0
    with closing(_open_archive(url, SCAN_WINDOW)) as archive:
        for position, key, suffix, member in _grouped(archive):
            samples = position + 1
            suffixes.add(suffix)
            lines.append(f"{key}.{suffix}\0{member[1]}\n")
        checksum = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return ShardScan(samples, archive.bytes, archive.mtime_ns, checksum, tuple(sorted(suffixes)))


def scan_keys(url: str) -> Iterator[tuple[int, str, str]]:
    """(position, key, suffix) of every sample file in a shard, in order, from the headers alone. Raises ShardError."""
    with closing(_open_archive(url, SCAN_WINDOW)) as archive:
        for position, key, suffix, _ in _grouped(archive):
            yield position, key, suffix


def locate_files(url: str) -> Iterator[tuple[int, str, str, int, int]]:
    """(position, key, suffix, offset, size) of every sample file of a plain local shard, for random access to its data.

    Raises ShardError, also where the data has no such place: in compressed and remote shards, and in sparse members.
    """
    with closing(_open_archive(url, SCAN_WINDOW)) as archive:
        for position, key, suffix, (name, size, where) in _grouped(archive):
            if not isinstance(where, int):
                raise ShardError(url, position, f"{name} cannot be read at random: unpack the shard, or tar it plainly")
            yield position, key, suffix, where, size


def read_samples(url: str, start: int = 0) -> Iterator[RawSample]:
    """The samples of a shard from position `start` on, in order.

    Raises ShardError where a truncated or corrupt shard stops, after the whole samples before that. The sample in
    progress there is not given: which of its files are missing is unknown.
    """
    with closing(_open_archive(url, SCAN_WINDOW)) as archive:
        current, key, files = -1, "", {}
        for position, member_key, suffix, member in _grouped(archive):
            if position != current:
                if files:
                    yield RawSample(key, files)
                current, key, files = position, member_key, {}
            if position >= start:
                archive.ahead = READ_WINDOW
                files[suffix] = _guarded_read(archive, member, position)
        if files:
            yield RawSample(key, files)


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member's name, or None if the member belongs to no sample."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base or (name.startswith("__") and _META.match(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


def _grouped(archive: "_LocalTar | _StreamTar") -> Iterator[tuple[int, str, str, _Member]]:
    """Number the samples: (position, key, suffix, member) for every member that belongs to one. Raises ShardError."""
    position, current, seen = -1, None, set()
    try:
        for member in archive.members():
            parts = split_name(member[0])
            if parts is None:
                continue
            key, suffix = parts
            if key != current or suffix in seen:
                position, current, seen = position + 1, key, {suffix}
            else:
                seen.add(suffix)
            yield position, key, suffix, member
    except _BROKEN as error:  # the sample in progress does not count as whole
        raise ShardError(archive.url, max(position, 0), archive.explain(error)) from error


def _guarded_read(archive: "_LocalTar | _StreamTar", member: _Member, position: int) -> bytes:
    try:
        return archive.read(member)
    except _BROKEN as error:
        raise ShardError(archive.url, position, archive.explain(error)) from error


class _StrictTarInfo(tarfile.TarInfo):
    """Python's tarfile ends without a word at a corrupt header in mid-archive. Here that is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictTarInfo":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf or (len(buf) == BLOCK and not any(buf)):  # the proper end: nothing more, or a block of zeros
                raise
            raise tarfile.ReadError(str(error)) from None


def _tarfile_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := archive.next()) is not None:
        if info.isreg():
            yield info
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else every header stays in memory


class _LocalTar:
    """A plain tar on disk. One buffer serves headers and data, so small members cost no system call of their own."""

    def __init__(self, url: str, file: IO[bytes], ahead: int):
        stat = os.fstat(file.fileno())
        self.url, self.file, self.ahead = url, file, ahead
        self.bytes, self.mtime_ns = stat.st_size, stat.st_mtime_ns
        self._buffer, self._buffer_offset = b"", 0
        self._tarfile: tarfile.TarFile | None = None

    def close(self) -> None:
        self.file.close()

    def members(self) -> Iterator[_Member]:
        unusual = yield from self._plain_members()
        if unusual is None:
            return
        self.file.seek(unusual)
        self._tarfile = tarfile.TarFile(fileobj=self.file, tarinfo=_StrictTarInfo, encoding="utf-8")
        for info in _tarfile_members(self._tarfile):
            yield info.name, info.size, info if info.issparse() else info.offset_data

    def read(self, member: _Member) -> bytes:
        name, size, where = member
        if isinstance(where, int):
            data = self._read(where, size)
            if len(data) < size:
                raise tarfile.ReadError(f"the file ends in the middle of {name}")
            return data
        assert self._tarfile is not None  # sparse members come from tarfile alone
        stream = self._tarfile.extractfile(where)
        return stream.read() if stream else b""

    def explain(self, error: Exception) -> str:
        if self.bytes == 0:
            return "empty file"
        head = self._read(0, BLOCK).lstrip()
        if head[:1] == b"<":
            return f"an HTML or XML page, not a tar file: it starts with {head[:40].decode('utf-8', 'replace')!r}"
        return f"truncated or corrupt tar file: {error}"

    def _read(self, offset: int, size: int) -> bytes:
        start = offset - self._buffer_offset
        if start < 0 or start + size > len(self._buffer):
            self._buffer = os.pread(self.file.fileno(), max(size, self.ahead), offset)
            self._buffer_offset, start = offset, 0
        return self._buffer[start : start + size]

    def _plain_members(self) -> Generator[_Member, None, int | None]:
        """The regular files up to the end (returns None) or to the first unusual header (returns its offset)."""
        offset = 0
        while offset < self.bytes:
            start = offset
            blocks = self._read(offset, 3 * BLOCK)  # a pax header, its records, and the header proper
            header = blocks[:BLOCK]
            pax_name = None
            try:
                name, size, checksum, kind, magic, prefix = _HEADER.unpack(header)
                if kind == b"x" and magic == b"ustar":
                    length = int(size.rstrip(b"\0 "), 8)
                    if not 0 < length <= BLOCK:
                        return start
                    pax_name = _pax_name(blocks[BLOCK : BLOCK + length])
                    offset += 2 * BLOCK
                    header = blocks[2 * BLOCK :]
                    name, size, checksum, kind, magic, prefix = _HEADER.unpack(header)
                # Adler-32's low half is 1 + the sum of the bytes modulo 65521: tar's header checksum at the speed of
                # C. The checksum's own field counts as eight spaces.
                total = (zlib.adler32(header) & 0xFFFF) - (zlib.adler32(checksum) & 0xFFFF) + 8 * 32
                if (total - int(checksum.rstrip(b"\0 "), 8)) % 65521:
                    return start
                length = int(size.rstrip(b"\0 ") or b"0", 8)
            except (ValueError, struct.error):
                return start if any(blocks[:BLOCK]) else None  # a block of zeros is the end
            name = name.split(b"\0", 1)[0]
            offset += BLOCK
            if kind == b"5" or (kind == b"\0" and name.endswith(b"/")):
                continue  # a folder
            if kind not in b"0\0" or length < 0:
                return start
            data, offset = offset, offset + -(-length // BLOCK) * BLOCK
            if prefix[0]:
                name = prefix.split(b"\0", 1)[0] + b"/" + name
            name = pax_name or name.decode("utf-8", "surrogateescape")
            yield name, length, data  # before the check: its name shows that the sample before it is whole
            if offset > self.bytes:
                raise tarfile.ReadError(f"{name} should end at byte {offset:,}, the file ends at {self.bytes:,}")
        return None if self.bytes else 0


def _pax_name(records: bytes) -> str | None:
    """The name in a member's pax header. Most have none: webdataset's writer makes one for each fractional mtime."""
    if not _PAX_WORD.search(records):
        return None
    name, offset = None, 0
    while match := _PAX_RECORD.match(records, offset):
        length, word = int(match[1]), match[2]
        if length == 0 or word in (b"size", b"hdrcharset") or word.startswith(b"GNU.sparse"):
            raise ValueError("pax records for tarfile")
        if word == b"path":
            name = records[match.end() : offset + length - 1].decode("utf-8").rstrip("/")
        offset += length
    return name


class _StreamTar:
    """A remote or compressed tar, read once from start to end."""

    def __init__(self, url: str, stream: IO[bytes], stat: os.stat_result | None):
        self.url, self.stream, self.ahead = url, stream, 0
        self.bytes = stat.st_size if stat else None
        self.mtime_ns = stat.st_mtime_ns if stat else None
        self._archive: tarfile.TarFile | None = None

    def close(self) -> None:
        with suppress(Exception):  # a command that is stopped early complains of its broken pipe
            self.stream.close()

    def members(self) -> Iterator[_Member]:
        self._archive = tarfile.open(  # noqa: SIM115 - it holds nothing but `stream`, which close() closes
            fileobj=self.stream, mode="r|*", tarinfo=_StrictTarInfo, encoding="utf-8"
        )
        for info in _tarfile_members(self._archive):
            yield info.name, info.size, info
        while self.stream.read(READ_WINDOW):  # let a command come to its end, so that its exit status can be trusted
            pass
        self.stream.close()  # raises OSError if the command failed

    def read(self, member: _Member) -> bytes:
        assert self._archive is not None
        assert isinstance(member[2], tarfile.TarInfo)
        stream = self._archive.extractfile(member[2])
        return stream.read() if stream else b""

    def explain(self, error: Exception) -> str:
        return f"cannot be read as a tar file to its end: {error}"


def _open_archive(url: str, ahead: int) -> "_LocalTar | _StreamTar":
    path = local_path(url)
    try:
        if path is None:
            from webdataset.gopen import gopen  # imports torch: for remote shards alone

            stream: Any = gopen(url, mode="rb")
            return _StreamTar(url, stream, None)
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - the archive closes it
        if os.pread(file.fileno(), 6, 0).startswith(_COMPRESSED):
            return _StreamTar(url, file, os.fstat(file.fileno()))
        return _LocalTar(url, file, ahead)
    except _BROKEN as error:
        raise ShardError(url, 0, f"cannot be opened: {error}") from error
