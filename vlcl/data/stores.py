"""Object stores through fsspec: s3, gs, az, hf. Credentials are the libraries' own (environment, profiles).

No filesystem is kept here: fsspec has one for each process, and forgets a parent's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from threading import Lock
from typing import Any

from vlcl.data import remote
from vlcl.data.remote import Final, Missing, Part, RemoteFile
from vlcl.data.urls import STORES, check_url, scheme_of, without_secrets
from vlcl.errors import UserError, first_line

VERSION = ("ETag", "etag", "generation", "blob_id", "md5Hash", "LastModified", "last_modified", "created")
MAGIC = "*?["
logger = logging.getLogger(__name__)
_MEMORY = Lock()  # fsspec's file in memory is one object, with one position, for all who open it


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a url, and the path there. UserError where the scheme is none of `STORES`."""
    check_url(url)
    if scheme_of(url) not in STORES:
        raise UserError(f"{without_secrets(url)}: a web server lists no folders and takes no files")
    import fsspec.config
    import fsspec.core

    options: dict[str, Any] = {}
    if STORES[scheme_of(url)][0] == "s3fs":  # a stalled read ends after TIMEOUT, and is tried again here alone
        ours = {"read_timeout": remote.TIMEOUT, "connect_timeout": remote.TIMEOUT, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = ours | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    scheme, _, rest = url.partition("://")
    filesystem, path = fsspec.core.url_to_fs(f"{scheme.lower()}://{rest}", **options)
    if "config_kwargs" in options:
        filesystem.retries = 1
    return filesystem, path


class StoreFile:
    """An `Origin`. Each read is a request, of one version of the file where the store can say so (s3, gs)."""

    chunk = 1 << 22
    window = 1 << 13

    def __init__(self, url: str) -> None:
        self.url = url
        self._file: Any = None
        self._version: str | None = None

    def open(self, start: int, stop: int | None) -> Part:
        with told():
            if self._file is None:
                there, path = filesystem(self.url)
                file = there.open(path, "rb", cache_type="none")
                self._file, self._version = file, version_of(getattr(file, "details", None) or there.info(path))
            file, position = self._file, start

        def read(size: int) -> bytes:
            nonlocal position
            size = max(0, min(size, (file.size if stop is None else min(stop, file.size)) - position))
            with told(), _MEMORY if isinstance(file, BytesIO) else Lock():
                file.seek(position)
                data = file.read(size) if size else b""
            position += len(data)
            return data

        return Part(start, None if stop is None else min(stop, file.size), file.size, self._version, read, lambda: None)

    def forget(self) -> None:
        self._file = None
        with told():
            there, path = filesystem(self.url)
            there.invalidate_cache(there._parent(path))


def version_of(info: dict[str, Any]) -> str | None:
    return next((str(info[key]) for key in VERSION if info.get(key)), None)


@contextmanager
def told() -> Iterator[None]:
    """What the libraries raise, as OSError: `Final` where asking again is in vain."""
    try:
        yield
    except Final:
        raise
    except FileNotFoundError as error:
        raise Missing(f"it is not there ({first_line(error)})") from None
    except PermissionError as error:
        raise Final(f"access is denied ({first_line(error)})") from None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise Final(first_line(error)) from None
    except OSError:
        raise
    except UserError as error:
        raise Final(str(error)) from None
    except Exception as error:
        in_vain = isinstance(error, ImportError | ValueError | TypeError) or "Credential" in type(error).__name__
        raise (Final if in_vain else OSError)(f"{type(error).__name__}: {first_line(error)}") from None


def find_shards(url: str, plain: str, packed: Sequence[str]) -> list[str]:
    """The shards that a url names: itself, what a glob matches, or a folder's files that end in `plain`, or else in one
    of `packed`; sorted. Raises OSError where the store does not say."""
    is_glob = any(char in url for char in MAGIC)
    if not is_glob and url.endswith((plain, *packed)):
        return [url]
    with told():
        there, path = filesystem(url)
        url, path = url.rstrip("/"), path.rstrip("/")
        if is_glob:
            found = list(there.glob(path, detail=True).values())
            first = min(path.find(char) for char in MAGIC if char in path)
            tail = len(path) - path.rfind("/", 0, first)
            url, path = url[:-tail], path[:-tail]
        else:
            found = there.ls(path, detail=True)
    names = sorted(info["name"] for info in found if info["type"] == "file")
    if names == [path]:
        return [url]
    if not is_glob:
        names = [x for x in names if x.endswith(plain)] or [x for x in names if x.endswith(tuple(packed))]
    inside = (name for name in names if name.startswith(f"{path}/") and ".." not in name.split("/"))
    return [url + name[len(path) :] for name in inside]


def listed_sizes(urls: Sequence[str]) -> dict[str, int | None]:
    """Bytes of each file as its folder lists it, None where the folder does not have it; without the files of folders
    that cannot be listed, and of the web."""
    sizes: dict[str, int | None] = {}
    folders: dict[str, dict[str, int]] = {}
    for url in urls:
        if scheme_of(url) not in STORES:
            continue
        there, path = filesystem(url)
        folder = there._parent(path)
        if folder not in folders:
            try:
                with told():
                    folders[folder] = {info["name"]: info["size"] for info in there.ls(folder, detail=True)}
            except OSError as error:
                folders[folder] = {}
                logger.info("%s cannot be listed: %s", without_secrets(url.rpartition("/")[0]), error)
        if folders[folder]:
            sizes[url] = folders[folder].get(path)
    return sizes


def read_text(url: str, most: int) -> str:
    """A file as UTF-8. Raises OSError (FileNotFoundError where it is not there), ValueError where it has more bytes."""
    with RemoteFile(url) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data.decode("utf-8")


def write_text(url: str, text: str) -> None:
    """Replace a file, in UTF-8. Raises OSError."""
    with told():
        there, path = filesystem(url)
        there.pipe_file(path, text.encode("utf-8"))


def put_file(path: str | os.PathLike[str], url: str) -> None:
    """Copy a file of this machine to a url, whole or not at all. Raises OSError."""
    with told():
        there, place = filesystem(url)
        there.put_file(os.fspath(path), place)


def names_in(url: str) -> list[str]:
    """What is in a folder of a store; [] where there is none. Raises UserError."""
    there, path = filesystem(url)
    try:
        with told():
            there.invalidate_cache()
            return sorted(info["name"] for info in there.ls(path, detail=True))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{without_secrets(url)} cannot be listed: {error}") from None
