"""The one exception for mistakes that a user can fix.

Raise `UserError` with a message that names the key or file, the value, what is allowed, and the next command.
The commands print it without a traceback and exit with code 2. Anything else that escapes is a defect of vlcl.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_WRITES = (*FULL, errno.EFBIG, errno.EROFS)  # of a disk on which nothing can be written, whoever asks
NO_ROOM = 1 << 20  # bytes: with less, what a library says of a failed write means a full disk


class UserError(Exception):
    """A mistake in the user's input, or a state of the user's files, with the way out in its message."""


def first_line(error: BaseException) -> str:
    """What an error says, on one line: libraries add pages, or say nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def counted(number: int, thing: str) -> str:
    """ "1 shard", "2,000 shards"; the plural of `thing` has an s at its end."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def reason(error: BaseException, folder: str | Path | None = None) -> str:
    """Why a write failed, on one line; a full disk is called that, also where a library has other words for it.
    `folder`: what was written to, where the message around it does not say so."""
    place = f" in {folder}" if folder is not None else ""
    full = getattr(error, "errno", None) in FULL or "No space left" in str(error)
    if not full and folder is not None and not isinstance(error, OSError):
        full = Path(folder).is_dir() and shutil.disk_usage(folder).free < NO_ROOM
    return f"disk full: no space left{place}" if full else first_line(error)


def of_disk(error: OSError) -> str | None:
    """What to say of an error that no command expected, where it is the disk's and not a defect: nothing may be read
    there, or nothing written."""
    if isinstance(error, PermissionError):
        return f"{error.strerror}: {error.filename}"
    if error.errno not in NO_WRITES:
        return None
    place = f"{error.filename} cannot be written: " if error.filename else ""
    why = reason(error) if error.errno in FULL else str(error.strerror)
    return f"{place}{why}. Make room, or name another place; then type the same command again"
