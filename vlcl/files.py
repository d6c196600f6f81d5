"""Files and folders that are whole or not there: made beside their place under a hidden name, renamed when complete.

The hidden names say which process of which machine writes: several may write the same at once, and what a killed one
left is found by the next. No torch.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

BUILDING, OLD = "building", "old"  # folders
WRITING = "tmp"  # a file


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, in UTF-8, so that a reader sees the old file or the new one, never half of either.

    Raises OSError, which names `path` where writing itself fails.
    """
    with replacing_file(path) as temporary:
        try:
            temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(path)) from None


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file to, of any kind; the file takes the place of `path` when the block ends well.

    A block that raises or is interrupted leaves `path` as it was, and nothing beside it.
    """
    with suppress(OSError):
        _clean_up(Path(path))
    temporary = _hidden(path, WRITING)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            temporary.unlink()
        raise


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


def _hidden(target: str | Path, kind: str) -> Path:
    folder, name = os.path.split(target)  # of "no_such_folder/" too, where nothing can be written
    return Path(folder, f".{name}.{socket.gethostname()}-{os.getpid()}.{kind}")


def _clean_up(target: Path) -> None:
    """What killed processes of this machine left: the half-made goes, an old folder that was set aside comes back."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.{glob.escape(socket.gethostname())}-*"):
        pid, _, kind = path.name.rpartition("-")[2].partition(".")
        if not pid.isdigit() or kind not in (BUILDING, OLD, WRITING) or _runs(int(pid)):
            continue
        if kind == OLD and not target.exists():
            path.rename(target)
        elif kind == WRITING:
            path.unlink(missing_ok=True)
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
