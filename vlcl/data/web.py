"""A file behind http or https. A request is answered once: vlcl/data/remote.py asks again.

fsspec's own http reads by ranges alone, does not see that a file was replaced, and takes up nothing that breaks off.
"""

from __future__ import annotations

import base64
import http.client
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from vlcl.data import remote
from vlcl.data.remote import Final, Missing, Part

FOR_THE_MOMENT = frozenset({408, 425, 429, 500, 502, 503, 504})
GONE = frozenset({404, 410})


class WebFile:
    """An `Origin`. Each answer is a connection of its own, so headers are fetched in large pieces."""

    chunk = 1 << 18  # of one system call, at most
    window = 1 << 20

    def __init__(self, url: str) -> None:
        self.url = url

    def open(self, start: int, stop: int | None) -> Part:
        request = urllib.request.Request(_without_user(self.url), headers={"Accept-Encoding": "identity"})
        if login := _login(self.url):
            request.add_unredirected_header("Authorization", login)  # not for where it may be sent on to
        if start or stop is not None:
            request.add_header("Range", f"bytes={start}-{'' if stop is None else stop - 1}")
        answer = _answer(request)
        first, length, end = 0, answer.headers.get("Content-Length"), None
        size = int(length) if length and length.isdigit() else None
        if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
            first, end, size = _content_range(answer.headers.get("Content-Range", ""))
            end = None if stop is None else end
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")

        def read(size: int) -> bytes:
            with _told():
                return answer.read1(size)

        return Part(first, end, size, version, read, answer.close)

    def forget(self) -> None:
        pass


def _answer(request: urllib.request.Request) -> http.client.HTTPResponse:
    with _told():
        return urllib.request.urlopen(request, timeout=remote.TIMEOUT)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        said = f"the server answers {error.code} {error.reason}"
        kind = Missing if error.code in GONE else OSError if error.code in FOR_THE_MOMENT else Final
        raise kind(said) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise Final(str(error.reason)) from None
        raise (error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason))) from None
    except OSError:
        raise
    except http.client.InvalidURL as error:
        raise Final(str(error)) from None
    except http.client.HTTPException as error:
        raise OSError(str(error) or type(error).__name__) from None


def _content_range(text: str) -> tuple[int, int, int | None]:
    """(first byte, byte after the last, size of the whole) of "bytes 100-199/1000"."""
    places, _, whole = text.removeprefix("bytes ").partition("/")
    first, _, last = places.partition("-")
    if not (first.isdigit() and last.isdigit()):
        raise Final(f"the server's Content-Range is {text!r}")
    return int(first), int(last) + 1, int(whole) if whole.isdigit() else None


def _without_user(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _login(url: str) -> str:
    """What "https://user:password@host/..." says who is asking, as a header."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is None:
        return ""
    words = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(words.encode()).decode()}"
