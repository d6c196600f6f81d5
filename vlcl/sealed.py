"""Folders that are whole or known not to be: meta.json, written last, has size and SHA-256 of each file and of itself.

What a disk, a copy or a crash has changed is noticed when the folder is read. `sha256sum` gives the same sums.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vlcl import distributed
from vlcl.errors import UserError, reason

META = "meta.json"
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of folders, on some network file systems


class Damaged(UserError):
    """A file is missing or not as it was written. What cannot be read just now is another UserError."""


def records(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files of the folder, by name, once they are seen on the disk. UserError where that fails."""
    found = {}
    try:
        for name in sorted(names):
            sync(folder / name)
            found[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sum(folder / name)}
    except OSError as error:
        raise UserError(f"{reason(error, folder.parent)}. Make room") from None
    return found


def seal(folder: Path, meta: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write meta.json, the last file of the folder, and see it on the disk. `files`: the `records` of all others.
    UserError where that fails."""
    content = {**meta, "files": dict(sorted(files.items()))}
    try:
        text = json.dumps({**content, "sha256": _sum_of(content)}, indent=2) + "\n"
        (folder / META).write_text(text, encoding="utf-8")
        for path in (folder / META, *(path for path in folder.rglob("*") if path.is_dir()), folder):
            sync(path)
    except OSError as error:
        raise UserError(f"{reason(error, folder.parent)}. Make room") from None


def read_meta(folder: Path) -> dict[str, Any]:
    """What `seal` was given, and "files". Damaged where it is not as it was written."""
    try:
        content = json.loads((folder / META).read_text(encoding="utf-8"))
        written = content.pop("sha256")
        files = [(PurePosixPath(name), record["bytes"], record["sha256"]) for name, record in content["files"].items()]
    except FileNotFoundError:
        raise Damaged(f"{folder} has no {META}: it is no complete checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{folder / META} is damaged ({type(error).__name__}: {error})") from None
    except OSError as error:
        raise UserError(f"{folder / META} cannot be read: {error.strerror}") from None
    if written != _sum_of(content):
        raise Damaged(f"{folder / META} is damaged: it does not have the checksum that was written")
    for name, size, checksum in files:
        if name.is_absolute() or ".." in name.parts or not isinstance(size, int) or not isinstance(checksum, str):
            raise Damaged(f"{folder / META} is no list of the files beside it: {name}")
    return content


def check(folder: Path) -> None:
    """Compare all files with meta.json (a collective; each rank takes a share). UserError, on all ranks, names one that
    is not as it was written."""
    problem: UserError | None = None
    try:
        files = read_meta(folder)["files"]
        for name in _share(sorted(files)):
            check_file(folder, name, files)
    except UserError as error:
        problem = error
    for found in distributed.gather_objects(problem and (isinstance(problem, Damaged), str(problem))):
        if found:
            raise (Damaged if found[0] else UserError)(found[1])


def check_file(folder: Path, name: str, files: Mapping[str, Any]) -> None:
    """Damaged where a file of the folder is not as it was written. `files`: of its `read_meta`."""
    if name not in files:
        raise Damaged(f"{folder / name} is not of this checkpoint: {META} does not name it")
    try:
        if not (folder / name).is_file():
            raise Damaged(f"{folder / name} is missing")
        size, wanted = (folder / name).stat().st_size, files[name]
        if size != wanted["bytes"]:
            raise Damaged(f"{folder / name} is damaged: {size:,} bytes, {wanted['bytes']:,} were written")
        if _sum(folder / name) != wanted["sha256"]:
            raise Damaged(f"{folder / name} is damaged: it does not have the checksum that was written")
    except OSError as error:
        raise UserError(f"{folder / name} cannot be read: {error.strerror}") from None


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


def _share(names: Iterable[str]) -> list[str]:
    return list(names)[distributed.rank() :: distributed.world_size()]


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
