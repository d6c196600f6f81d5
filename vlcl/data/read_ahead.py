"""A stream that is read ahead: a thread fetches while the samples before are decoded. No torch."""

from __future__ import annotations

import io
import threading
from collections import deque

from vlcl.data.remote import RemoteFile


class ReadAhead(io.RawIOBase):
    """The bytes of `file` in order. The thread holds at most `most` bytes that nobody has read, and what it fails with
    is raised when all before that has been read. It ends with the stream, once its last request is answered."""

    def __init__(self, file: RemoteFile, most: int) -> None:
        super().__init__()
        self._file, self._most = file, most
        self._held: deque[bytes] = deque()
        self._bytes = 0  # of them all
        self._first: memoryview = memoryview(b"")  # what is left of the piece that is being read
        self._ended, self._error = False, None
        self._change = threading.Condition()
        threading.Thread(target=self._fetch, name="read ahead", daemon=True).start()

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        """`size` bytes, or all; fewer at the end alone."""
        parts, left = [], None if size is None or size < 0 else size
        while left != 0 and (self._first or self._next()):
            part = self._first[:left]
            self._first = self._first[len(part) :]
            parts.append(part)
            left = None if left is None else left - len(part)
        return b"".join(parts)

    def close(self) -> None:
        if not self.closed:
            with self._change:
                self._ended = True
                self._held.clear()
                self._change.notify_all()
        super().close()

    def _next(self) -> bool:
        """Take the next piece; False at the end."""
        with self._change:
            self._change.wait_for(lambda: self._held or self._ended)
            if not self._held:
                if self._error is not None:
                    raise self._error
                return False
            piece = self._held.popleft()
            self._bytes -= len(piece)
            self._change.notify_all()
        self._first = memoryview(piece)
        return True

    def _fetch(self) -> None:
        size = min(self._file.chunk, self._most)
        error = None
        try:
            while piece := self._file.read1(size):
                with self._change:
                    self._held.append(piece)
                    self._bytes += len(piece)
                    self._change.notify_all()
                    self._change.wait_for(lambda: self._ended or self._bytes + size <= self._most)
                    if self._ended:
                        break
        except Exception as failed:
            error = failed
        finally:
            self._file.close()
            with self._change:
                self._ended, self._error = True, error
                self._change.notify_all()
