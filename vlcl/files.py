"""Folders that are whole or not there: built beside their place under a hidden name, renamed when complete. No torch.

Used by every command that makes a folder (`vlcl data ...`, `vlcl export`). The hidden names say which process of which
machine builds: several may build at once, and what a killed one left is found by the next.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BUILDING, OLD = "building", "old"


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never half of either."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def replacing(targets: Sequence[Path], check: Callable[[Path], None]) -> Iterator[list[Path]]:
    """Yield an empty folder for each target; they take the targets' places when the block ends well.

    `check(target)` raises where a target must stay as it is: asked at once, and again when the block has ended, since
    that may have taken a while. A block that raises or is interrupted leaves the targets as they were.
    """
    targets = [target.resolve() for target in targets]
    for target in targets:
        _clean_up(target)
        check(target)
    building = [_hidden(target, BUILDING) for target in targets]
    try:
        for folder in building:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        yield building
        for target in targets:
            check(target)
        for target, folder in zip(targets, building):
            _put_in_place(folder, target)
    finally:
        for folder in building:
            shutil.rmtree(folder, ignore_errors=True)


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.{kind}")


def _clean_up(target: Path) -> None:
    """What killed processes of this machine left: half-built folders go, an old one that was set aside comes back."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.{glob.escape(socket.gethostname())}-*"):
        pid, _, kind = path.name.rpartition("-")[2].partition(".")
        if not pid.isdigit() or kind not in (BUILDING, OLD) or _runs(int(pid)):
            continue
        if kind == OLD and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _put_in_place(folder: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        folder.rename(target)  # fails where something has come to be there
        return
    old = _hidden(target, OLD)
    try:
        target.rename(old)
        folder.rename(target)
    except BaseException:  # Ctrl-C too
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
