"""The bytes of a file that lies elsewhere, over a network and servers that fail now and then.

A read that stalls, breaks off or is refused for the moment is taken up again from the byte where it broke, after a
pause that doubles each time. What comes to an end before the length that was announced has broken off. Where the bytes
come from is an `Origin`: vlcl/data/web.py (http) or vlcl/data/stores.py (s3, gs, hf ... through fsspec). No torch.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from vlcl.data.urls import WEB, scheme_of, without_secrets

TIMEOUT = 60.0  # seconds without a byte
TRIES = 6  # in a row, without a byte
PAUSE = 1.0  # seconds before the second of them; then 2, 4, 8, 16
READ_AHEAD = 1 << 24  # bytes
CACHE_BYTES = 10**11

Value = TypeVar("Value")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetching:
    """How remote shards are read. read_ahead: bytes of each that is open; cache: a folder, of at most cache_bytes."""

    read_ahead: int = READ_AHEAD
    cache: str | None = None
    cache_bytes: int = CACHE_BYTES


AS_DEFAULT = Fetching()


@dataclass(frozen=True)
class Part:
    """An answer: bytes of a version of a file, from `first` on to `stop` (None: to its end)."""

    first: int
    stop: int | None
    size: int | None  # of the whole file, where it is known
    version: str | None  # of the file, as the server names it
    read: Callable[[int], bytes]  # at most so many bytes, as they come; b"" at the end, and where it broke off
    close: Callable[[], None]


class Origin(Protocol):
    """Where a file lies. Asks once; to ask again is the caller's part."""

    chunk: int
    """bytes of one read, at most"""
    window: int
    """bytes that are fetched for a header in one request, by default"""

    def open(self, start: int, stop: int | None) -> Part:
        """Ask for the bytes from `start` to `stop`; the answer may have more: from an earlier byte, to the end. Raises
        OSError, and so do the answer's functions: `Final` where asking again is in vain."""
        ...

    def forget(self) -> None:
        """What was kept of earlier answers, which have failed."""
        ...


class Final(OSError):
    """Trying again would not help."""


class Missing(Final, FileNotFoundError):
    """There is no such file."""


class RemoteFile(io.RawIOBase):
    """A file, readable from anywhere. In order it is one answer; `ranged`: a request for each read, of so many bytes.

    Raises OSError, with the server's answer, where it cannot be opened, ends for good, or is another file when it is
    taken up again; FileNotFoundError where it is not there.
    """

    def __init__(self, url: str, ranged: bool = False) -> None:
        super().__init__()
        self.url, self.ranged, self.origin = url, ranged, _origin(url)
        self.size: int | None = None  # in bytes, where the server tells
        self.version: str | None = None  # of the file, as the server names it
        self.fetched = 0  # bytes
        self.chunk = self.origin.chunk
        self._cursor = self._position = 0  # of the one who reads; of the answer
        self._known, self._part = False, None
        if not ranged:
            self._retried(partial(self._open, None))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET or self.size is not None
        self._cursor = offset + (0, self._cursor, self.size or 0)[whence]
        return self._cursor

    def tell(self) -> int:
        return self._cursor

    def read(self, size: int | None = -1) -> bytes:
        """`size` bytes, or all; fewer at the end alone."""
        data = self.read_at(self._cursor, sys.maxsize if size is None or size < 0 else size)
        self._cursor += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read1(len(view))
        view[: len(data)] = data
        return len(data)

    def read1(self, size: int) -> bytes:
        """At least one byte, but at the end; what is there already: a break then costs none of it."""
        self._go_to(self._cursor)
        stop = self._cursor + size if self.ranged else None
        data = self._some(size, stop) if self._position != self.size else b""
        self._cursor += len(data)
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer at the end alone."""
        self._go_to(offset)
        stop = offset + size if self.ranged else None
        parts, left = [], size
        while left and self._position != self.size and (part := self._some(left, stop)):
            parts.append(part)
            left -= len(part)
        if self._part is not None and self._part.stop is not None:
            self._drop()
        return b"".join(parts)

    def _go_to(self, offset: int) -> None:
        if self._part is not None and self._part.stop is None and offset >= self._position:
            while self._position < offset and self._some(offset - self._position, None):  # the server has no ranges
                pass
        if offset != self._position:
            self._drop()
            self._position = offset

    def has_ranges(self) -> bool:
        """Whether a part can be had without what stands before it; asks for the first `origin.window` bytes."""
        self._position = 0
        self._retried(partial(self._open, self.origin.window))
        return self._part is not None and self._part.stop is not None

    def close(self) -> None:
        self._drop()
        super().close()

    def _some(self, size: int, stop: int | None) -> bytes:
        return self._retried(partial(self._read, min(size, self.chunk), stop))

    def _read(self, size: int, stop: int | None) -> bytes:
        if self._part is None or self._position == self._part.stop:
            self._drop()
            self._open(stop)
        assert self._part is not None
        data = self._part.read(size)
        self._position += len(data)
        self.fetched += len(data)
        if not data and (self._part.stop or self.size) is not None:
            raise OSError(f"it broke off at byte {self._position:,} of {self._part.stop or self.size:,}")
        return data

    def _open(self, stop: int | None) -> None:
        """The answer from the position on, of the file that the first answer was of."""
        self._part = part = self.origin.open(self._position, stop)
        if not self._known:
            self._known, self.version, self.size = True, part.version, part.size
        elif part.version != self.version or (part.size is not None and self.size not in (None, part.size)):
            raise Final("it is another file than it was at first")
        if part.first > self._position:
            raise Final(f"asked for byte {self._position:,}, the server sent from {part.first:,} on")
        first = part.first
        while first < self._position:  # a server without ranges begins anew
            passed = len(part.read(min(self._position - first, self.chunk)))
            if not passed:
                raise OSError(f"it broke off at byte {first:,}")
            first += passed
            self.fetched += passed

    def _retried(self, part: Callable[[], Value]) -> Value:
        tried = 0
        while True:
            tried += 1
            try:
                return part()
            except OSError as error:
                self._drop()
                self.origin.forget()
                why = without_secrets(_reason(error))
                if tried == TRIES or isinstance(error, Final):
                    kind = FileNotFoundError if isinstance(error, Missing) else OSError
                    raise kind(f"{why}{f' ({tried} tries)' if tried > 1 else ''}") from None
                pause = PAUSE * 2 ** (tried - 1)
                logger.warning("%s: %s; again in %g s", without_secrets(self.url), why, pause)
                time.sleep(pause)

    def _drop(self) -> None:
        part, self._part = self._part, None
        if part is not None:
            with suppress(OSError):
                part.close()


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came for {TIMEOUT:g} s"
    return str(error) or type(error).__name__


def _origin(url: str) -> Origin:
    if scheme_of(url) in WEB:
        from vlcl.data.web import WebFile

        return WebFile(url)
    from vlcl.data.stores import StoreFile

    return StoreFile(url)
