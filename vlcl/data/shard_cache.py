"""Remote shards that were fetched, in a folder of this machine: each whole or not there, of no more than so many bytes.

A shard's name here is a hash of its whole url. Beside it lies what it is a copy of: size, version as the server names
it, and the sum of its bytes. Asked for again, the server says whether it still has that version, and the sum is
compared once in each process. Several processes may use a folder: one fetches a shard while others wait for it. The one
that was used least lately goes first; who reads it just then reads on. No torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from vlcl.data.remote import Fetching, RemoteFile
from vlcl.data.urls import without_secrets
from vlcl.errors import first_line
from vlcl.files import replace_text

OURS = re.compile(r"[0-9a-f]{40}\.(shard|\d+\.part)")  # nothing else in the folder is counted or removed

logger = logging.getLogger(__name__)
_believed: set[tuple[str, int, int, int]] = set()  # files whose sum this process has compared
_told: set[str] = set()


def cached(url: str, fetching: Fetching) -> IO[bytes] | None:
    """A copy of a shard, fetched if need be, open for reading; None where it cannot be kept. Raises OSError where it
    can be had neither here nor there."""
    from filelock import FileLock

    assert fetching.cache is not None
    folder = Path(fetching.cache).expanduser()
    name = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:40]
    shard = folder / f"{name}.shard"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            try:
                with _asking(), RemoteFile(url, ranged=True) as there:
                    there.origin.forget()  # what a store said earlier
                    there.read_at(0, 1)
                    size, version = there.size, there.version
            except _Away as away:
                if (file := _open_whole(shard, None)) is None:
                    raise
                logger.warning("%s: %s; its copy in %s is read", without_secrets(url), away.error, folder)
                return file
            return _open_whole(shard, [size, version]) or _fetched(url, shard, fetching, size)
    except _Away as away:
        raise away.error from None
    except OSError as error:  # of the folder
        _tell_once(f"data.remote_cache={fetching.cache}: {first_line(error)}; shards are read without it")
        return None


class _Away(Exception):
    """What went wrong is not the folder's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


def _open_whole(shard: Path, version: list[Any] | None) -> IO[bytes] | None:
    """The copy, if it is undamaged and of this version (None: of any)."""
    about = shard.with_suffix(".json")
    try:
        file = open(shard, "rb", buffering=0)  # noqa: SIM115 - whoever reads it closes it
        kept = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    stat = os.fstat(file.fileno())
    seen = (str(shard), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    try:
        whole = stat.st_size == kept["bytes"] and version in (None, kept["version"])
        if whole and seen not in _believed:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == kept["sha256"]
            if not whole:
                logger.warning("the copy %s of %s is damaged: it is fetched anew", shard, kept["url"])
    except (KeyError, TypeError):
        whole = False
    if not whole:
        file.close()
        return None
    _believed.add(seen)
    with suppress(OSError):  # gone by now
        os.utime(about)
    file.seek(0)
    return file


def _fetched(url: str, shard: Path, fetching: Fetching, size: int | None) -> IO[bytes] | None:
    from filelock import FileLock

    room = FileLock(shard.parent / "room.lock")
    part = shard.with_name(f"{shard.stem}.{os.getpid()}.part")
    for name in (shard, shard.with_suffix(".json")):
        name.unlink(missing_ok=True)
    with room:
        if not _make_room(shard.parent, fetching.cache_bytes, size or 0):
            _tell_once(
                f"data.remote_cache_bytes={fetching.cache_bytes:,} is less than {without_secrets(url)} has "
                f"({size or 0:,}): larger shards are read without the cache"
            )
            return None
        with open(part, "wb") as out:
            out.truncate(size or 0)  # counted from now on
    try:
        digest, version, length = _copy(url, part)
        with room:
            if size is None and not _make_room(shard.parent, fetching.cache_bytes, 0):
                return None
            os.replace(part, shard)
        about = {"url": without_secrets(url), "bytes": length, "version": version, "sha256": digest}
        replace_text(shard.with_suffix(".json"), json.dumps(about))
        file = open(shard, "rb", buffering=0)  # noqa: SIM115 - whoever reads it closes it
    finally:
        part.unlink(missing_ok=True)
    stat = os.fstat(file.fileno())
    _believed.add((str(shard), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return file


def _copy(url: str, part: Path) -> tuple[str, list[Any], int]:
    """Fetch a shard into a file: its sum, its version, its bytes."""
    digest, length = hashlib.sha256(), 0
    with _asking():
        there = RemoteFile(url)
    with closing(there), open(part, "r+b") as out:
        while True:
            with _asking():
                piece = there.read(there.chunk)
            if not piece:
                break
            digest.update(piece)
            length += len(piece)
            out.write(piece)
        out.truncate(length)
    return digest.hexdigest(), [there.size, there.version], length


@contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Away(error) from None


def _make_room(folder: Path, most: int, needed: int) -> bool:
    """Remove what was used least lately until `needed` bytes more make no more than `most`; False if they never do."""
    if needed > most:
        return False
    kept: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        if OURS.fullmatch(path.name):
            with suppress(OSError):  # gone by now
                about = path.with_suffix(".json")
                used = (about if path.suffix == ".shard" and about.exists() else path).stat().st_mtime
                kept.append((used, path.stat().st_size, path))
    total = sum(size for _, size, _ in kept) + needed
    for _, size, path in sorted(kept):
        if total <= most:
            break
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        total -= size
    return total <= most


def _tell_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        logger.warning("%s", text)
