"""A copy of the run folder in a store (`checkpoint.remote`), for machines whose disks go when they do.

Training writes to its own disk, as without. After each checkpoint a thread of rank 0 sends it, and the small files of
the run; meta.json last, so that a checkpoint in the store is whole or not there. What could not be sent is told, and
sent with the next one. A run whose folder lacks the newest checkpoint fetches it, and compares its sums.

Of several runs that are given one address the last to start has it; the others notice, and leave it alone.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from vlcl import distributed
from vlcl.checkpoint import STEP_FOLDER, complete_steps, step_of, superfluous
from vlcl.data.stores import (
    fetch_files,
    files_below,
    move_folder,
    names_in,
    put_files,
    read_text,
    remove,
    write_bytes,
    write_text,
)
from vlcl.data.urls import check_writable, without_secrets
from vlcl.errors import UserError, first_line, reason
from vlcl.sealed import META, Damaged, check_file, read_meta, sync

# What goes along with the checkpoints. wandb's own folder is sent by wandb.
FILES = (
    "config.yaml", "data.json", "metrics.jsonl", "environment.json", "report.html", "retrieval.png", "tensorboard",
    "examples", "wandb_id", "anomalies", "profile",
)  # fmt: skip
WRITER = ".writer"  # who sends to the address
MOST_META, MOST_WRITER = 1 << 28, 1 << 16  # bytes
SOON = 1.0  # seconds that the end of a run waits without a word


class Mirror:
    """Keeps a copy of `run` at the address `url`; with None, and on all ranks but the first, it does nothing. `rule`:
    which checkpoints are kept, as `prune` has it."""

    def __init__(self, run: Path, url: str | None, **rule: Any) -> None:
        self.run, self.rule = Path(run), rule
        self.url = url.rstrip("/") if url and distributed.rank() == 0 else ""
        self.sending: Path | None = None
        """the checkpoint that is being read, which must not go just now"""
        self.shown = without_secrets(self.url)
        self._name = f"checkpoint.remote={self.shown!r}"
        self._own = ""  # what is in WRITER
        self._there: dict[int, str | None] = {}  # the meta.json of each step there; None where it is not whole
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of the small files that were sent
        self._wishes: SimpleQueue[tuple[bool, int | None]] = SimpleQueue()  # the last one?, back to which step
        self._news: SimpleQueue[str] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._problem = ""

    def open(self, resume: str | None, overwrite: bool) -> None:
        """Look at what is there and take the address over (rank 0). UserError where it cannot be read or written, or
        holds a run that this one does not go on with."""
        if not self.url:
            return
        with self._told("cannot be used"):
            check_writable(self.url)
            names = self._names()
            steps = [step_of(Path(name)) for name in names if STEP_FOLDER.fullmatch(name)]
            self._there = {step: self._meta_of(_name_of(step)) for step in steps if _name_of(step) in names}
        old = any(name.startswith("old-step-") for name in names)
        goes_on = resume in ("latest", "auto") or (resume and Path(resume).resolve().parent == self.run.resolve())
        if not (goes_on or overwrite) and (steps or old or "metrics.jsonl" in names):
            raise UserError(
                f"{self._name} holds a run already. Go on with resume=latest, give another address, or delete what it "
                "holds with train.overwrite=true"
            )
        who = {"host": socket.gethostname(), "process": os.getpid(), "run": str(self.run.absolute()),
               "since": datetime.now(UTC).isoformat(timespec="seconds"), "id": uuid.uuid4().hex}  # fmt: skip
        self._own = json.dumps(who)
        with self._told("cannot be written"):
            write_text(f"{self.url}/{WRITER}", self._own)

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that are whole there."""
        return [step for step, meta in self._there.items() if meta is not None]

    def fetch(self, step: int) -> str | None:
        """Put a checkpoint of the store, and the run's small files, in their places (rank 0). Returns what is wrong
        with it where it is not as it was written; UserError where it cannot be had just now."""
        folder = self.run / _name_of(step)
        url, temporary = f"{self.url}/{folder.name}", self.run / f".{folder.name}.tmp"
        try:
            with self._told("cannot be fetched"):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                (temporary / META).write_text(self._there[step] or "", encoding="utf-8")
                files = read_meta(temporary)["files"]  # names within the folder, or Damaged
                sizes = {name: record["bytes"] for name, record in files.items()}
                self._check_room(sum(sizes.values()))
                try:
                    fetch_files(url, sizes, temporary)
                except (FileNotFoundError, ValueError) as error:
                    raise Damaged(first_line(error)) from None
                for name in files:
                    check_file(temporary, name, files)
                self._fetch_small()
                if folder.exists():  # damaged, or it would not have been fetched
                    old = folder.with_name(f"old-{folder.name}")
                    shutil.rmtree(old, ignore_errors=True)
                    folder.rename(old)
                temporary.rename(folder)
                sync(self.run)
        except Damaged as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return f"{without_secrets(url)} is passed over: {str(error).replace(str(temporary), folder.name)}"
        return None

    def clear(self) -> None:
        """Delete the run that is there (rank 0)."""
        if self.url:
            with self._told("cannot be cleared"):
                for name in self._names():
                    if name in FILES or STEP_FOLDER.fullmatch(name.removeprefix("old-")):
                        self._remove(name)
                self._there = {}

    def set_aside_after(self, step: int) -> None:
        """As of the run folder's own checkpoints: later ones are of a branch that is left (rank 0)."""
        if self.url:
            with self._told("cannot be written"):
                self._set_aside_after(step)

    @contextmanager
    def at_work(self, say: Callable[[str], None]) -> Iterator[None]:
        """Within it the copy is kept; at its end the last of it is sent (a collective). UserError, on all ranks, where
        that fails."""
        if self.url:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()
            say(f"a copy of {self.run} is kept at {self.shown}")
            self.send()
        try:
            yield
        except KeyboardInterrupt:
            self._wishes.put((True, None))
            raise
        except BaseException:  # of this rank alone, maybe
            with suppress(UserError):
                self._finish(say)
            raise
        distributed.on_first(lambda: self._finish(say))

    def send(self) -> None:
        """Bring the copy up to date; returns at once."""
        if self.url:
            self._wishes.put((False, None))

    def go_back(self, step: int) -> None:
        """The run has gone back to this step; returns at once."""
        if self.url:
            self._wishes.put((False, step))

    def news(self) -> Iterator[str]:
        """What a user should know, once."""
        while not self._news.empty():
            yield self._news.get()

    def _finish(self, say: Callable[[str], None]) -> None:
        if self._thread is None:
            return
        self._wishes.put((True, None))
        self._thread.join(SOON)
        if self._thread.is_alive():
            say(f"waiting for the last files to reach {self.shown}")
        while self._thread.is_alive():
            self._thread.join(SOON)
        self._thread = None
        for text in self.news():
            say(text)
        if self._problem:
            raise UserError(
                f"{self.run} is not copied in full to {self._name}: {without_secrets(self._problem)}. To send the "
                f"rest: the same command with resume=latest"
            )
        say(f"copied to {self.shown}")

    def _work(self) -> None:
        last, back = False, None
        while not last:
            wishes = [self._wishes.get()]
            while not self._wishes.empty():
                wishes.append(self._wishes.get())
            last = any(wish for wish, _ in wishes)
            back = min((step for step in (back, *(x for _, x in wishes)) if step is not None), default=None)
            before = self._problem
            try:
                self._send_all(back)
                back, self._problem = None, ""
            except Exception as error:  # whatever it is: training goes on
                self._problem = first_line(error) if isinstance(error, OSError | UserError) else repr(error)
            if self._problem and self._problem != before and not last:
                self._news.put(
                    f"note: {self._name} is not up to date: {without_secrets(self._problem)}. Training goes on; it is "
                    "tried again with the next checkpoint"
                )
            elif before and not self._problem:
                self._news.put(f"note: {self._name} is up to date again")

    def _send_all(self, back: int | None) -> None:
        """What is here and not there, the newest first; then what is not here any more, and the rule does not keep."""
        self._check_writer()
        if back is not None:
            self._set_aside_after(back)
        self._send_small()
        while missing := [folder for folder in complete_steps(self.run) if not self._has(folder)]:
            self._send_step(missing[-1])  # another may have come while this one was sent
        here = {step_of(folder) for folder in complete_steps(self.run)}
        gone = {*superfluous(self.run, [*{*here, *self.steps}], **self.rule)} - here
        for step in [step for step, meta in self._there.items() if step in gone or meta is None]:
            self._remove(_name_of(step))
            del self._there[step]

    def _has(self, folder: Path) -> bool:
        """Whether this checkpoint is there, and not one of the same step of another branch."""
        with suppress(FileNotFoundError):  # deleted just now
            return self._there.get(step_of(folder)) == (folder / META).read_text(encoding="utf-8")
        return True

    def _send_step(self, folder: Path) -> None:
        step, url = step_of(folder), f"{self.url}/{folder.name}"
        self.sending = folder
        try:
            meta = (folder / META).read_text(encoding="utf-8")
            if step in self._there:
                self._remove(folder.name)
            self._there[step] = None
            put_files(folder, read_meta(folder)["files"], url)
            write_text(f"{url}/{META}", meta)
            self._there[step] = meta
        except (OSError, Damaged):
            if (folder / META).is_file():  # else it was set aside meanwhile
                raise
        finally:
            self.sending = None

    def _send_small(self) -> None:
        for name in FILES:
            top = self.run / name
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                if path.name.startswith(".") or not path.is_file():
                    continue
                with suppress(FileNotFoundError):  # replaced just now
                    state = path.stat()
                    seen = (state.st_size, state.st_mtime_ns)
                    place = path.relative_to(self.run).as_posix()
                    if self._sent.get(place) != seen:
                        write_bytes(f"{self.url}/{place}", path.read_bytes())  # at one moment: lines are added to it
                        self._sent[place] = seen

    def _fetch_small(self) -> None:
        for name in {*self._names()} & {*FILES}:
            inside = files_below(f"{self.url}/{name}")
            names = [f"{name}/{path}".rstrip("/") for path in inside]  # "" for a file
            fetch_files(self.url, dict.fromkeys(names), self.run)

    def _set_aside_after(self, step: int) -> None:
        for newer in [x for x in self.steps if x > step]:
            name = _name_of(newer)
            move_folder(f"{self.url}/{name}", f"{self.url}/old-{name}")
            del self._there[newer]

    def _remove(self, name: str) -> None:
        """A file, or a folder of a checkpoint, which is not whole from the first moment on."""
        if STEP_FOLDER.fullmatch(name):
            remove(f"{self.url}/{name}/{META}")
        remove(f"{self.url}/{name}")

    def _names(self) -> list[str]:
        return [name.rpartition("/")[2] for name in names_in(self.url)]

    def _meta_of(self, name: str) -> str | None:
        try:
            return read_text(f"{self.url}/{name}/{META}", MOST_META)
        except FileNotFoundError:
            return None
        except ValueError:
            return ""  # damaged, as is seen when it is fetched

    def _check_writer(self) -> None:
        url = f"{self.url}/{WRITER}"
        try:
            now = read_text(url, MOST_WRITER)
        except FileNotFoundError:
            return write_text(url, self._own)
        if now != self._own:
            raise UserError(f"another run sends its files there ({now[:200]}); nothing more of this one is sent")

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.run).free
        if free < needed:
            raise UserError(
                f"{self.run} has room for {free / 1e9:.1f} GB, and the checkpoint there has {needed / 1e9:.1f} GB. "
                "Make room, or choose another train.output=FOLDER"
            )

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """What a store or the disk refuses, as a UserError that names the setting."""
        try:
            yield
        except Damaged:
            raise
        except (OSError, UserError, ValueError) as error:
            raise UserError(
                f"{self._name} {what}: {without_secrets(reason(error))}. Credentials and endpoints are those of the "
                "store's own library (docs/data.md, Remote shards); to train without a copy: checkpoint.remote=null"
            ) from None


def _name_of(step: int) -> str:
    return f"step-{step:08d}"
