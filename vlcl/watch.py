"""A run that stands still ends, with a word on who stands where: a launcher can start anew what has ended, not what
hangs.

Ranks that wait for another look the same from outside. So each that stands for half the time writes where it does into
RUN/standing/, with its stacks; the one that the others wait for has written something else, or, where its process or
its machine is stopped, nothing.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from vlcl import distributed

STANDING = "standing"  # the folder in RUN
Item = TypeVar("Item")


class Watch:
    """Within it, a rank that says nothing by `at` for `timeout` seconds (null: ever) ends with exit code 1, after
    `rescue`, which has another `timeout`."""

    def __init__(self, timeout: float | None, folder: Path, rescue: Callable[[], object] = lambda: None) -> None:
        self.timeout, self.folder, self.rescue = timeout, Path(folder) / STANDING, rescue
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self._doing, self._since = "starting", time.monotonic()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._done.clear()
        self._clear()
        self.at("starting")
        if self.timeout is not None:
            self._thread = threading.Thread(target=self._look, args=(self.timeout,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(1.0)  # it may be writing
        self._clear()

    def at(self, doing: str) -> None:
        """This rank goes on, with this."""
        self._doing, self._since = doing, time.monotonic()

    def each(self, items: Iterable[Item], doing: str) -> Iterator[Item]:
        """The items; asking for each is a sign of life."""
        self.at(doing)
        for item in items:
            self.at(doing)
            yield item

    def _look(self, timeout: float) -> None:
        told, pause, looked = False, min(timeout / 20, 5.0), time.monotonic()
        while not self._done.wait(pause):
            now = time.monotonic()
            if now - looked > pause + timeout / 4:  # this process itself was stopped, as by Ctrl-Z: it may go on
                self._since = now
            stood, looked = now - self._since, now
            if stood < timeout / 2 and told:
                self._clear()
                told = False
            elif stood >= timeout / 2 and not told:
                self._tell()
                told = True
            if stood >= timeout:
                print(self._last_words(timeout), file=sys.stderr, flush=True)
                for child in multiprocessing.active_children():  # a stopped data worker would not see its parent go
                    child.kill()
                last = threading.Thread(target=self.rescue, daemon=True)
                last.start()
                last.join(timeout)
                os._exit(1)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.txt"

    def _tell(self) -> None:
        """Where this rank stands; nothing where that cannot be written: this is no reason to stop a run."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._path(self.rank).open("w", encoding="utf-8") as file:
                file.write(f"{self._doing}\nprocess {os.getpid()} on {socket.gethostname()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)

    def _clear(self) -> None:
        with suppress(OSError):
            self._path(self.rank).unlink()
            self.folder.rmdir()  # OSError where another rank's is in it

    def _where(self, rank: int) -> str:
        try:
            return self._path(rank).read_text(encoding="utf-8").split("\n", 1)[0]
        except OSError:
            return "has said nothing: its process or its machine is stopped, or gone"

    def _last_words(self, timeout: float) -> str:
        places: dict[str, list[int]] = {}
        for rank in range(self.world):
            places.setdefault(self._where(rank), []).append(rank)
        lines = [f"  rank {', '.join(map(str, ranks))}: {place}" for place, ranks in places.items()]
        return "\n".join((
            f"error: rank {self.rank} has stood still for {timeout:g} s (train.timeout): {self._doing}", *lines,
            f"Stacks of those that stand: {self.folder}. Go on from the last checkpoint with resume=latest; where "
            "steps or evaluations take that long, set train.timeout=SECONDS, or null",
        ))  # fmt: skip
