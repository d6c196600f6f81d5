"""One writer a run folder: RUN/.lock says which process of which machine holds it, and since when."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from vlcl.errors import UserError

LOCK = ".lock"
BEAT = 20.0  # seconds between two signs of life, which a holder on another machine is judged by
PATIENCE = 5.0  # seconds for a holder that is just ending
SILENT = 300.0  # seconds without one: that machine, or its view of the folder, is gone


class FolderLock:
    """Held from `acquire` to `release`, and no longer than its process lives."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / LOCK
        self._own = ""
        self._done = threading.Event()

    def acquire(self) -> None:
        """UserError, with the holder's name, where another process is at work in the folder."""
        own, until = json.dumps(_me()), time.monotonic() + PATIENCE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._made(own):
                if (holder := self._holder()) is not None:
                    if time.monotonic() < until:
                        time.sleep(0.1)
                        continue
                    raise UserError(
                        f"{self.path.parent} is another process's: {holder} works in it. Wait for its end, stop it, or "
                        f"choose another train.output=FOLDER. If it is gone for certain: rm {self.path}"
                    )
        except OSError as error:
            raise UserError(f"{self.path.parent} cannot be written: {error}") from None
        self._own = own
        self._done.clear()
        threading.Thread(target=self._beat, daemon=True).start()

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
        with open(handle, "w", encoding="utf-8") as file:
            file.write(own)
        return True

    def _holder(self) -> str | None:
        """Who holds it; None where nobody does any more: what a dead one left is moved away."""
        try:
            text, silent = self.path.read_text(encoding="utf-8"), time.time() - self.path.stat().st_mtime
            try:
                holder = json.loads(text)
                here = holder["host"] == socket.gethostname()
                name = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
                if not (_gone(holder) if here else silent > SILENT):
                    return name
            except (ValueError, KeyError, TypeError):  # being written, or torn by a crash
                if silent < BEAT:
                    return "a process that has just begun"
            # By its name: of two that find it dead, one moves it away; the other looks again.
            dead = self.path.with_name(f"{LOCK}.{os.getpid()}.dead")
            self.path.rename(dead)
            if dead.read_text(encoding="utf-8") != text:  # it was a new one by then
                dead.rename(self.path)
                return "a process that has just begun"
            dead.unlink()
        except FileNotFoundError:
            pass
        return None

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)


def _me() -> dict[str, Any]:
    process = psutil.Process()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "process": process.pid, "started": process.create_time(), "since": now}


def _gone(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended: its number may be another's by now, with another start. What this
    very process left counts as ended."""
    if holder["process"] == os.getpid():
        return True
    try:
        process = psutil.Process(holder["process"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - holder["started"]) > 1
    except psutil.Error:
        return True
