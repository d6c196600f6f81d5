"""The tar behind a url: a stream that is read ahead, a copy in the cache, or its headers alone by range requests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

from vlcl.data.archive import COMPRESSED, LocalTar, Member, StreamTar, archive_of
from vlcl.data.read_ahead import ReadAhead
from vlcl.data.remote import Fetching, RemoteFile
from vlcl.data.shard_cache import cached

PADDED = 20 * 512 + 2 * 512  # bytes of zeros that tar and its like write after the last member, at most


class RangedTar(LocalTar):
    """A plain tar elsewhere, for its headers: a range request for each piece of `ahead` bytes that has some."""

    def __init__(self, url: str, remote: RemoteFile, ahead: int) -> None:
        assert remote.size is not None
        # tarfile reads a block at a time
        self.url, self.remote, self.file, self.ahead = url, remote, io.BufferedReader(remote, ahead), ahead
        self.bytes, self.mtime_ns = remote.size, None
        self._buffer, self._buffer_offset = b"", 0
        self._end = 0
        self._tarfile: tarfile.TarFile | None = None
        self.header = None

    @property
    def fetched(self) -> int:
        return self.remote.fetched

    def members(self, begin: int = 0) -> Iterator[Member]:
        yield from super().members(begin)
        if self.bytes and len(self._read(self.bytes - 1, 1)) != 1:
            raise tarfile.ReadError(f"it should have {self.bytes:,} bytes, and does not")

    def leftover(self) -> bool:
        if self.bytes - self._end <= PADDED:  # no request for the zeros at the end
            return False
        try:
            return super().leftover()
        except OSError:
            return True

    def explain(self, error: Exception) -> str:
        if isinstance(error, OSError):
            return f"cannot be read to its end: {error}"
        try:
            return super().explain(error)
        except OSError:
            return f"truncated or corrupt tar file: {error}"

    def starts_with(self, magics: tuple[bytes, ...]) -> bool:
        return self._read(0, 6).startswith(magics)

    def _fetch(self, offset: int, size: int) -> bytes:
        return self.remote.read_at(offset, min(size, self.bytes - offset)) if offset < self.bytes else b""


def open_remote(url: str, ahead: int, fetching: Fetching, window: int | None) -> LocalTar | StreamTar:
    """As `open_archive`, of what is no path."""
    if url[:5].lower() == "pipe:":
        from webdataset.gopen import gopen  # imports torch: for commands alone

        return StreamTar(url, cast(IO[bytes], gopen(url, mode="rb")))
    if window is not None:
        if (archive := _by_ranges(url, window)) is not None:
            return archive
    elif fetching.cache is not None and (file := cached(url, fetching)) is not None:
        return archive_of(url, file, ahead)
    remote = RemoteFile(url)
    most = fetching.read_ahead
    stream: Any = ReadAhead(remote, most) if most else io.BufferedReader(remote, remote.chunk)
    return StreamTar(url, stream, remote.size, remote=remote)


def _by_ranges(url: str, window: int) -> RangedTar | None:
    """None where the server sends whole files alone, or the tar is compressed."""
    remote = RemoteFile(url, ranged=True)
    if remote.has_ranges() and remote.size is not None:
        archive = RangedTar(url, remote, window or remote.origin.window)
        if not archive.starts_with(tuple(COMPRESSED)):
            return archive
    remote.close()
    return None
