"""The members of a tar, wherever it lies: names, sizes and data, one after another, in bounded memory.

A local, uncompressed tar is walked by its 512-byte headers with seeks over the data. Whatever is unusual there (GNU
long names, sparse files, global pax headers, base-256 sizes, a wrong header checksum) is left to Python's `tarfile`,
from that member on. Compressed and remote tars are streams: `tarfile` reads them from start to end. For its headers
alone a remote one is walked as a local one is, by range requests.
"""

import bz2
import gzip
import lzma
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from stat import S_ISREG
from typing import IO, Any, cast

from vlcl.data.remote import AS_DEFAULT, Fetching, RemoteFile

BLOCK = 512
SCAN_WINDOW = 8192  # bytes: the headers and the small members (caption, json) between two images in one system call
MOST_ZEROS = 1 << 26  # bytes after the end of a tar that are looked through for another one
READ_WINDOW = 1 << 18  # bytes: whole samples are wanted, so read on
MAX_SPARSE = 1 << 30  # bytes of a sparse member, whose holes cost a tar nothing
MAX_HEADER = 1 << 20  # bytes of a long name or of pax records, which are read whole; paths have 4096 at most
BROKEN = (  # what tarfile and the decompressors raise on damaged files
    tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, LookupError, OverflowError,
    RecursionError, struct.error,
)  # fmt: skip

# Readers that decompress no more than is asked for at a time, as tarfile's own do not.
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_HEADER = struct.Struct("100s 24x 12s 12x 8s c 100x 5s 83x 155s 12x")  # name, size, checksum, type, magic, prefix
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")
_PAX_WORD = re.compile(rb" (path|size|hdrcharset|GNU\.sparse)")  # what changes how a member is read

# (name, size in bytes, where the data is: an offset in the file, or tarfile's own member)
Member = tuple[str, int, "int | tarfile.TarInfo"]


def local_path(url: str) -> str | None:
    """The path that a shard's url names on this machine, or None for pipe:, http:, s3: and the like."""
    if url.startswith("file:"):
        return re.sub(r"^file:(//)?", "", url)
    return None if _SCHEME.match(url) else url


def as_path(path: str) -> str:
    """A path on this machine, written so that nothing takes it for a url, whatever its name: "./pipe:x.tar"."""
    return path if local_path(path) == path else os.path.join(".", path)


_READ_WHOLE = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip


_HEADER_ERROR, _READ_ERROR = tarfile.HeaderError, tarfile.ReadError
_PROPER_END: Any = (  # a block of zeros, nothing more
    tarfile.EOFHeaderError, tarfile.EmptyHeaderError  # pyright: ignore[reportAttributeAccessIssue]
)  # fmt: skip


class _StrictTarInfo(tarfile.TarInfo):
    """Python's tarfile ends without a word at a corrupt header in mid-archive, and reads a long name of any length.
    Here these are errors. By the methods that all Pythons come through: newer ones go past `frombuf`."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tarfile)
        except _PROPER_END:
            raise
        except _HEADER_ERROR as error:
            raise _READ_ERROR(str(error)) from None

    def _proc_member(self, tarfile: tarfile.TarFile) -> tarfile.TarInfo:
        """What reads the data of a header that is about the next one."""
        if self.type in _READ_WHOLE and self.size > MAX_HEADER:
            raise _READ_ERROR(f"a header of {self.size:,} bytes")
        return super()._proc_member(tarfile)  # pyright: ignore[reportAttributeAccessIssue]


def _tarfile_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := archive.next()) is not None:
        if info.isreg():
            yield info
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # else every header stays in memory


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    if info.issparse() and info.size > MAX_SPARSE:
        raise tarfile.ReadError(f"{info.name} is sparse, with {info.size:,} bytes")
    stream = archive.extractfile(info)
    return stream.read() if stream else b""


class LocalTar:
    """A plain tar on disk. One buffer serves headers and data, so small members cost no system call of their own."""

    def __init__(self, url: str, file: IO[bytes], ahead: int):
        stat = os.fstat(file.fileno())
        self.url, self.file, self.ahead = url, file, ahead
        self.bytes, self.mtime_ns = stat.st_size, stat.st_mtime_ns
        self._buffer, self._buffer_offset = b"", 0
        self._end = 0  # of the archive: its first block of zeros
        self._tarfile: tarfile.TarFile | None = None
        self.header: int | None = None

    @property
    def fetched(self) -> int:
        """Bytes that came over the network."""
        return 0

    def close(self) -> None:
        self.file.close()

    def members(self, begin: int = 0) -> Iterator[Member]:
        """Those from the header at byte `begin` on. `header` is where that of the last one begins, or None where a
        header before it counts as well."""
        unusual = yield from self._plain_members(begin)
        if unusual is None:
            return
        self.header = None
        self.file.seek(unusual)
        self._tarfile = tarfile.TarFile(fileobj=self.file, tarinfo=_StrictTarInfo, encoding="utf-8")
        for info in _tarfile_members(self._tarfile):
            yield info.name, info.size, info if info.issparse() else info.offset_data
        self._end = self._tarfile.offset  # pyright: ignore[reportAttributeAccessIssue]

    def leftover(self) -> bool:
        """When all members have been given: whether more than zeros comes behind them, as in `cat a.tar b.tar`."""
        stop = min(self.bytes, self._end + MOST_ZEROS)
        return any(self._fetch(at, READ_WINDOW).strip(b"\0") for at in range(self._end, stop, READ_WINDOW))

    def read(self, member: Member) -> bytes:
        name, size, where = member
        if isinstance(where, int):
            data = self._read(where, size) if where + size <= self.bytes else b""  # nor is as much memory asked for
            if len(data) < size:
                raise tarfile.ReadError(f"the file ends in the middle of {name}")
            return data
        assert self._tarfile is not None  # sparse members come from tarfile alone
        return _content(self._tarfile, where)

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
            self._buffer = self._fetch(offset, max(size, self.ahead))
            self._buffer_offset, start = offset, 0
        return self._buffer[start : start + size]

    def _fetch(self, offset: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, offset)

    def _plain_members(self, offset: int) -> Generator[Member, None, int | None]:
        """The regular files up to the end (returns None) or to the first unusual header (returns its offset)."""
        while offset < self.bytes:
            start = offset
            blocks = self._read(offset, 3 * BLOCK)  # a pax header, its records, and the header proper
            header = blocks[:BLOCK]
            pax_name = None
            try:
                name, size, checksum, kind, magic, prefix = _HEADER.unpack(header)
                if kind == b"x" and magic == b"ustar":
                    length = int(size.rstrip(b"\0 "), 8)
                    if not 0 < length == len(blocks[BLOCK : 2 * BLOCK].rstrip(b"\0")):
                        return start  # longer than a block; or a length that lies: tarfile reads the block
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
                self._end = start
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
            self.header = start
            yield name, length, data  # before the check: its name shows that the sample before it is whole
            if offset > self.bytes:
                raise tarfile.ReadError(f"{name} should end at byte {offset:,}, the file ends at {self.bytes:,}")
        self._end = offset
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


class _Peeked:
    """A stream, with its first bytes at hand."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.head = stream, stream.read(6)
        self._again = self.head

    def read(self, size: int = -1) -> bytes:
        if not self._again:
            return self.stream.read(size)
        first, self._again = (self._again, b"") if size < 0 else (self._again[:size], self._again[size:])
        return first


class _Ending:
    """A stream whose end is told: tarfile's seek reads on there for as many blocks as a damaged size says."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.ended = stream, 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.ended = 0 if data else self.ended + 1
        if self.ended > 2:  # a tar may end without its blocks of zeros
            raise EOFError("the data ends in the middle of a member")
        return data


class StreamTar:
    """A remote or compressed tar, read once from start to end."""

    header = None  # as of LocalTar

    def __init__(
        self, url: str, stream: IO[bytes], size: int | None = None, mtime_ns: int | None = None,
        remote: RemoteFile | None = None,
    ):  # fmt: skip
        self.url, self.stream, self.ahead, self.remote = url, stream, 0, remote
        self.bytes, self.mtime_ns = size, mtime_ns
        self._archive: tarfile.TarFile | None = None
        self._leftover = False

    @property
    def fetched(self) -> int:
        return self.remote.fetched if self.remote else 0

    def close(self) -> None:
        with suppress(Exception):  # a command that is stopped early complains of its broken pipe
            self.stream.close()

    def members(self) -> Iterator[Member]:
        stream: Any = _Peeked(self.stream)
        for magic, opened in COMPRESSED.items():
            stream = opened(stream, "rb") if isinstance(stream, _Peeked) and stream.head.startswith(magic) else stream
        # it holds nothing but `stream`, which close() closes
        stream = cast(IO[bytes], _Ending(stream))
        archive = tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo, encoding="utf-8")  # noqa: SIM115
        self._archive = archive
        for info in _tarfile_members(archive):
            yield info.name, info.size, info
        self._leftover = _more_than_zeros(archive.fileobj)
        while self.stream.read(READ_WINDOW):  # let a command come to its end, so that its exit status can be trusted
            pass
        self.stream.close()  # raises OSError if the command failed

    def leftover(self) -> bool:
        """As of LocalTar."""
        return self._leftover

    def read(self, member: Member) -> bytes:
        assert self._archive is not None
        assert isinstance(member[2], tarfile.TarInfo)
        return _content(self._archive, member[2])

    def explain(self, error: Exception) -> str:
        return f"cannot be read as a tar file to its end: {error}"


def _more_than_zeros(stream: Any) -> bool:
    """Of a stream whose tar has ended."""
    try:
        blocks = iter(partial(stream.read, READ_WINDOW), b"")
        return any(block.strip(b"\0") for block in islice(blocks, MOST_ZEROS // READ_WINDOW))
    except BROKEN:
        return True


def open_archive(
    url: str, ahead: int, fetching: Fetching = AS_DEFAULT, window: int | None = None
) -> LocalTar | StreamTar:
    """The tar at a path or url. Raises one of BROKEN where it cannot be opened.

    fetching: how a remote one is read; window: it is asked for its headers alone, in pieces of so many bytes (0: as
    suits where it lies).
    """
    path = local_path(url)
    if path is None:
        from vlcl.data.remote_archive import open_remote

        return open_remote(url, ahead, fetching, window)
    if not S_ISREG(os.stat(path).st_mode):
        raise OSError("it is no regular file")  # to open a FIFO would wait for its writer
    return archive_of(url, open(path, "rb", buffering=0), ahead)


def archive_of(url: str, file: IO[bytes], ahead: int) -> LocalTar | StreamTar:
    """The tar in a file of this machine that is open already, whatever it is called."""
    if os.pread(file.fileno(), 6, 0).startswith(tuple(COMPRESSED)):
        stat = os.fstat(file.fileno())
        return StreamTar(url, file, stat.st_size, stat.st_mtime_ns)
    return LocalTar(url, file, ahead)
