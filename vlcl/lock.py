"""One writer a run folder: RUN/.lock says which process of which machine holds it, and since when.

`vlcl eval` has such a lock in its output for each model and data set.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from vlcl.errors import UserError, reason

LOCK = ".lock"
BEAT = 20.0  # seconds between two signs of life of a holder
PATIENCE = 5.0  # seconds for a holder of this machine that is just ending
SILENCE = 3 * BEAT  # seconds that one whom this machine cannot see may be silent

logger = logging.getLogger(__name__)


class FolderLock:
    """Held from `acquire` to `release`, and no longer than its process lives.

    name: of the file in `folder`. what, instead: in messages, what is locked, and what else a user may do.
    """

    def __init__(
        self, folder: Path, name: str = LOCK, what: str = "", instead: str = "choose another train.output=FOLDER"
    ) -> None:
        self.path = Path(folder) / name
        self.what, self.instead = what or str(folder), instead
        self._own = ""
        self._done = threading.Event()

    def acquire(self) -> None:
        """UserError, with the holder's name, where another process is at work in the folder."""
        own, began = json.dumps(_me()), time.monotonic()
        seen: tuple[str, float] | None = None  # what the lock held, and its time, when it was first looked at
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._made(own):
                text, beat = self._look()
                seen = seen or (text, beat)
                waited = time.monotonic() - began
                if _is_gone(text, waited, same=(text, beat) == seen):
                    self._take_away(text)
                elif (text, beat) != seen or (waited > PATIENCE and _is_here(text)):
                    raise UserError(
                        f"{self.what} is another process's: {_name(text)} works in it. Wait for its end, stop it, or "
                        f"{self.instead}. If it is gone for certain: rm {self.path}"
                    )
                else:
                    if waited < 0.05 and not _is_here(text):
                        logger.warning("%s is locked by %s: waiting for a sign of life", self.what, _name(text))
                    time.sleep(0.1)
        except OSError as error:
            raise UserError(f"{self.path.parent} cannot be written: {reason(error)}") from None
        self._own = own
        self._done.clear()
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """UserError where another has taken the lock over, as it may after a long silence of this machine."""
        if self._own and self._text() != self._own:
            raise UserError(
                f"{self.path.parent} has been taken over by another process, as this one was silent for over "
                f"{SILENCE:.0f} s: nothing more is written"
            )

    def release(self) -> None:
        """Let go; a folder with nothing else in it goes, too."""
        self._done.set()
        with suppress(OSError):
            if self._own and self.path.read_text(encoding="utf-8") == self._own:
                self.path.unlink()
                self.path.parent.rmdir()  # OSError where there is more in it

    def _made(self, own: str) -> bool:
        """Whether the lock is ours now: of several processes one makes the file."""
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(own)
        except OSError:  # a full disk: a torn lock would keep the next one waiting
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _text(self) -> str:
        try:
            return self._look()[0]
        except OSError:  # the folder cannot be read just now
            return self._own

    def _look(self) -> tuple[str, float]:
        """The text of the lock and the time of its last sign of life; "" where there is none."""
        try:
            return self.path.read_text(encoding="utf-8"), self.path.stat().st_mtime
        except FileNotFoundError:
            return "", 0.0

    def _take_away(self, text: str) -> None:
        """Of several that find the holder gone, one moves its lock away; the others look again."""
        dead = self.path.with_name(f"{self.path.name}.{socket.gethostname()}-{os.getpid()}.dead")
        with suppress(FileNotFoundError):
            self.path.rename(dead)
            if dead.read_text(encoding="utf-8") != text:  # it was a new one by then: back, unless there is a newer
                with suppress(FileExistsError):
                    os.link(dead, self.path)
            dead.unlink()

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with suppress(OSError):
                if self._look()[0] != self._own:
                    return
                os.utime(self.path)


def _me() -> dict[str, Any]:
    process = psutil.Process()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "space": _space(), "process": process.pid, "started": process.create_time(),
            "since": now}  # fmt: skip


def _space() -> str:
    """Within which process numbers mean something: this boot of this machine, and its namespace (of a container)."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _read(text: str) -> dict[str, Any] | None:
    """None for a lock that is being written, or was torn by a crash."""
    try:
        holder = json.loads(text)
        return holder if {"host", "space", "process", "started", "since"} <= set(holder) else None
    except (ValueError, TypeError):
        return None


def _is_here(text: str) -> bool:
    """Whether this process can see whether the holder lives."""
    holder = _read(text)
    return holder is not None and holder["space"] == _space()


def _is_gone(text: str, waited: float, same: bool) -> bool:
    """Whether the holder has ended. A process number may be another's by now, with another start; of a holder that
    cannot be seen from here, a silence of `waited` seconds tells, by this machine's clock alone."""
    holder = _read(text)
    if not _is_here(text) or holder is None:
        return not text or (same and waited > SILENCE)
    if holder["process"] == os.getpid():  # left by this very process, or by one before it
        return True
    try:
        process = psutil.Process(holder["process"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - holder["started"]) > 1
    except psutil.Error:
        return True


def _name(text: str) -> str:
    holder = _read(text)
    return f"process {holder['process']} on {holder['host']}, since {holder['since']}" if holder else "a process"
