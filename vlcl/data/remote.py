"""The bytes behind an http(s) url from start to end, over a network and servers that fail now and then.

A read that stalls, breaks off or is refused for the moment is taken up again from the byte where it broke, with a range
request, after a pause that doubles each time. What comes to an end before the length that was announced has broken off.
No torch.
"""

from __future__ import annotations

import base64
import http.client
import io
import logging
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

TIMEOUT = 60.0  # seconds without a byte
TRIES = 6  # in a row, without a byte
PAUSE = 1.0  # seconds before the second of them; then 2, 4, 8, 16
CHUNK = 1 << 18  # bytes of one system call, at most
FOR_THE_MOMENT = frozenset({408, 425, 429, 500, 502, 503, 504})

Value = TypeVar("Value")
logger = logging.getLogger(__name__)


class HttpStream(io.RawIOBase):
    """A readable stream. OSError, with the server's answer, where it cannot be opened, ends for good, or is another
    file when it is taken up again."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.position = url, 0
        self.size: int | None = None  # in bytes, where the server tells
        self._version: str | None = None  # of the file, as the server names it
        self._known = False
        self._answer: http.client.HTTPResponse | None = None
        self._retried(self._open)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, or all; fewer at the end alone."""
        parts, left = [], sys.maxsize if size < 0 else size
        while left and self.position != self.size and (part := self._retried(partial(self._read, min(left, CHUNK)))):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        if self._answer is None:
            self._open()
            assert self._answer is not None
        data = self._answer.read1(size)  # what is there already: a break then costs none of it
        self.position += len(data)
        if not data and self.size is not None:
            raise OSError(f"it broke off at byte {self.position:,} of {self.size:,}")
        return data

    def _open(self) -> None:
        """The answer from `position` on, of the file that the first answer was of."""
        request = urllib.request.Request(_without_user(self.url), headers={"Accept-Encoding": "identity"})
        if login := _login(self.url):
            request.add_unredirected_header("Authorization", login)  # not for where it may be sent on to
        if self.position:
            request.add_header("Range", f"bytes={self.position}-")
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
        self._answer = answer
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        start, length = 0, answer.headers.get("Content-Length")
        size = int(length) if length and length.isdigit() else None
        if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
            start, size = _content_range(answer.headers.get("Content-Range", ""))
        if not self._known:
            self._known, self._version, self.size = True, version, size
        elif version != self._version or (size is not None and self.size is not None and size != self.size):
            raise _Final("it is another file than it was at first")
        if start > self.position:
            raise _Final(f"asked for byte {self.position:,}, the server sent from {start:,} on")
        while start < self.position:  # a server without ranges begins anew
            passed = answer.read(min(self.position - start, CHUNK))
            if not passed:
                raise OSError(f"it broke off at byte {start:,}")
            start += len(passed)

    def _retried(self, part: Callable[[], Value]) -> Value:
        tried = 0
        while True:
            tried += 1
            try:
                return part()
            except (OSError, http.client.HTTPException) as error:  # HTTPError, URLError and timeouts are OSErrors
                self._drop()
                if tried == TRIES or _is_final(error):
                    raise OSError(f"{_reason(error)}{f' ({tried} tries)' if tried > 1 else ''}") from None
                pause = PAUSE * 2 ** (tried - 1)
                logger.warning("%s: %s; again in %g s", _without_secrets(self.url), _reason(error), pause)
                time.sleep(pause)

    def _drop(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            with suppress(OSError, http.client.HTTPException):
                answer.close()


class _Final(OSError):
    """Trying again would not help."""


def _is_final(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code not in FOR_THE_MOMENT
    if isinstance(error, urllib.error.URLError):
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    return isinstance(error, _Final | http.client.InvalidURL)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return _reason(error.reason) if isinstance(error.reason, Exception) else str(error.reason)
    if isinstance(error, TimeoutError):
        return f"nothing came for {TIMEOUT:g} s"
    return str(error) or type(error).__name__


def _content_range(text: str) -> tuple[int, int | None]:
    """(first byte, size of the whole) of "bytes 100-199/1000"."""
    places, _, whole = text.removeprefix("bytes ").partition("/")
    first = places.partition("-")[0]
    if not first.isdigit():
        raise _Final(f"the server's Content-Range is {text!r}")
    return int(first), int(whole) if whole.isdigit() else None


def _without_user(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _without_secrets(url: str) -> str:
    """For a log: a query may be a signature."""
    return _without_user(url).partition("?")[0]


def _login(url: str) -> str:
    """What "https://user:password@host/..." says who is asking, as a header."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is None:
        return ""
    words = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(words.encode()).decode()}"
