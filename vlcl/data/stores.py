"""Object stores through fsspec: s3, gs, az, hf. Credentials are the libraries' own (environment, profiles).

No filesystem is kept here: fsspec has one for each process, and forgets a parent's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from threading import Event, Lock
from typing import Any

from vlcl.data import remote
from vlcl.data.remote import Final, Missing, Part, RemoteFile
from vlcl.data.urls import MAGIC, STORES, check_url, scheme_of, without_secrets
from vlcl.errors import UserError, first_line

VERSION = ("ETag", "etag", "generation", "blob_id", "md5Hash", "LastModified", "last_modified", "created")
WRITE_TRIES = 5  # by the library, request by request: to send a large file anew for one of them would never end
AT_ONCE = 4  # files that are sent or fetched; s3fs sends 10 parts of 50 MiB of each
PIECE = 1 << 25  # bytes of a request for a file that is fetched whole
logger = logging.getLogger(__name__)
_MEMORY = Lock()  # fsspec's file in memory is one object, with one position, for all who open it


def filesystem(url: str, tries: int = 1) -> tuple[Any, str]:
    """fsspec's filesystem of a url, and the path there. `tries`: of s3, for each request. UserError where the scheme is
    none of `STORES`."""
    check_url(url)
    if scheme_of(url) not in STORES:
        raise UserError(f"{without_secrets(url)}: a web server lists no folders and takes no files")
    import fsspec.config
    import fsspec.core

    options: dict[str, Any] = {}
    if STORES[scheme_of(url)][0] == "s3fs":  # a stalled read ends after TIMEOUT, and is tried again by RemoteFile alone
        ours = {
            "read_timeout": remote.TIMEOUT, "connect_timeout": remote.TIMEOUT, "retries": {"total_max_attempts": tries},
        }  # fmt: skip
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


@contextmanager
def _changing(url: str) -> Iterator[tuple[Any, str]]:
    """The filesystem that sends, and the path there; the one that reads forgets what it has listed. Raises OSError."""
    with told():
        try:
            yield filesystem(url, WRITE_TRIES)
        finally:
            filesystem(url)[0].invalidate_cache()


def write_text(url: str, text: str) -> None:
    """Replace a file, in UTF-8. Raises OSError."""
    write_bytes(url, text.encode("utf-8"))


def write_bytes(url: str, data: bytes) -> None:
    """Replace a file. Raises OSError."""
    with _changing(url) as (there, path):
        there.pipe_file(path, data)


def put_file(path: str | os.PathLike[str], url: str) -> None:
    """Copy a file of this machine to a url, whole or not at all. Raises OSError."""
    with _changing(url) as (there, place):
        there.put_file(os.fspath(path), place)


def put_files(folder: Path, names: Iterable[str], url: str) -> None:
    """Copy files of a folder of this machine to the same names below a url, several at once: each whole or not at all,
    in any order. Raises OSError."""
    names = list(names)
    with _changing(url) as (there, place):
        sources, targets = [str(folder / name) for name in names], [f"{place}/{name}" for name in names]
        there.put(sources, targets, batch_size=AT_ONCE)


def fetch_files(url: str, sizes: Mapping[str, int | None], folder: Path) -> None:
    """Copy files below a url to the same names in a folder of this machine. `sizes`: their bytes, as far as they are
    known. Raises OSError, of the store or of the disk: FileNotFoundError where one is not there; ValueError where it
    has more or fewer."""
    given_up = Event()  # a Ctrl-C, or another file that failed

    def fetch(name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            there = RemoteFile(f"{url}/{name}")
        except FileNotFoundError:
            raise FileNotFoundError(f"{name} is missing") from None
        with there, open(folder / name, "wb") as file:
            if sizes[name] not in (None, there.size):
                raise ValueError(f"{name} has {there.size:,} bytes, {sizes[name]:,} were written")
            there.chunk = PIECE
            while not given_up.is_set() and (piece := there.read(PIECE)):
                file.write(piece)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for done in [pool.submit(fetch, name) for name in sizes]:
                done.result()
        except BaseException:
            given_up.set()
            pool.shutdown(cancel_futures=True)
            raise


def files_below(url: str) -> dict[str, int | None]:
    """Bytes of each file in a folder of a store, those of folders in it too, by its path there; of a file itself, "".
    Raises OSError."""
    with told():
        there, path = filesystem(url, WRITE_TRIES)
        there.invalidate_cache()
        try:
            found = there.find(path, detail=True)
        except FileNotFoundError:
            return {}
    path = path.rstrip("/")
    files = {name: info.get("size") for name, info in found.items() if info["type"] == "file"}
    return {name[len(path) + 1 :]: size for name, size in files.items() if name == path or _is_below(name, path)}


def _is_below(name: str, path: str) -> bool:
    """Whether what a store lists is in the folder that was asked for, whatever it says."""
    return name.startswith(f"{path}/") and not {"", ".", ".."} & {*name[len(path) + 1 :].split("/")}


def remove(url: str) -> None:
    """Delete a file, or a folder with all that is in it, if it is there. Raises OSError."""
    assert not any(char in url for char in MAGIC), url  # fsspec would delete all that it matches
    with _changing(url) as (there, path):
        there.invalidate_cache()
        with suppress(FileNotFoundError):
            there.rm(path, recursive=True)


def move_folder(url: str, to: str) -> None:
    """Move the files of a folder of a store to another, which they make up then; the old one goes when the new one is
    whole. Raises OSError."""
    remove(to)
    with _changing(url) as (there, path):
        _, target = filesystem(to, WRITE_TRIES)
        for name in files_below(url):
            there.cp_file(f"{path}/{name}", f"{target}/{name}")
    remove(url)


def names_in(url: str) -> list[str]:
    """What is in a folder of a store; [] where there is none. Raises UserError."""
    there, path = filesystem(url, WRITE_TRIES)
    try:
        with told():
            there.invalidate_cache()
            return sorted(info["name"] for info in there.ls(path, detail=True))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{without_secrets(url)} cannot be listed: {error}") from None
