"""What runs in processes of its own: a command of vlcl, on one rank or two, and the faults that it meets within.

All are forked from one server that has imported torch (tests/ranks.py). The figures of reports are not drawn: they take
longer than these runs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from ranks import apart

# As of a program in the foreground: nohup and a shell's background jobs have some of them ignored.
USUAL = {
    signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL, signal.SIGQUIT: signal.SIG_DFL,
}  # fmt: skip
NEVER = 1 << 30
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")


@dataclass(frozen=True)
class Fault:
    """What happens to a rank: a signal after a line of metrics.jsonl (and `pause` seconds), or at the n-th thing that
    the save of `save_step` does, or a limit of bytes for each file that is written."""

    rank: int = 0
    number: int = signal.SIGKILL
    log: Path | None = None
    line: int = NEVER
    pause: float = 0.0
    save_step: int = 0
    event: int = NEVER
    count_into: Path | None = None
    most_bytes: int = 0
    patches: dict[str, Any] = field(default_factory=dict)


def lines_in(path: Path) -> int:
    """Whole lines so far; 0 where there is no such file."""
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _strike_when_logged(fault: Fault) -> None:
    assert fault.log is not None
    while lines_in(fault.log) < fault.line:
        time.sleep(0.002)
    time.sleep(fault.pause)
    os.kill(os.getpid(), fault.number)


class Countdown:
    """Counts what a save does: names that are opened, made, renamed and deleted (an old checkpoint's, too), files that
    are synced, weights that are half written; and strikes at the one that is asked for."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.seen, self.saving = fault, 0, False
        self.lock = threading.RLock()  # a save goes on in a thread, beside the loop

    def start(self) -> None:
        import torch

        import vlcl.saving
        import vlcl.train

        sys.addaudithook(self._heard)
        fsync, save, save_file = os.fsync, torch.save, vlcl.saving.save_file
        begin, end = vlcl.train.save, vlcl.saving.Saver.finish

        def saving(run: Any) -> None:
            """Deletes an old checkpoint and begins a new one, which is done when `ended` is."""
            self.saving = run.state.step == self.fault.save_step
            begin(run)

        def ended(saver: Any) -> None:
            job = saver._job  # maybe that of the save before, which the start of this one waits for
            end(saver)
            if job is not None and job.step == self.fault.save_step:
                self.saving = False

        def synced(handle: int) -> None:
            fsync(handle)
            self.tick()

        def saved(real: Callable[..., None]) -> Callable[..., None]:
            def write(content: Any, path: Any) -> None:
                real(content, path)
                self.tick(lambda: os.truncate(path, os.stat(path).st_size // 2))

            return write

        os.fsync, torch.save, vlcl.saving.save_file = synced, saved(save), saved(save_file)
        vlcl.train.save = saving
        vlcl.saving.Saver.finish = ended  # pyright: ignore[reportAttributeAccessIssue]

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and any("step-" in str(x) for x in arguments[:2] if isinstance(x, (str, bytes, Path))):
            self.tick()

    def tick(self, before: Callable[[], None] = lambda: None) -> None:
        if not self.saving:
            return
        with self.lock:
            self.seen += 1
            if self.fault.count_into is not None:
                with open(self.fault.count_into, "w") as file:
                    file.write(str(self.seen))
            if self.seen == self.fault.event:
                before()
                os.kill(os.getpid(), self.fault.number)


@contextmanager
def _small_files(most: int) -> Iterator[None]:
    """No file may have more bytes. What this process says goes through a pipe, or the limit would cut it."""
    import resource

    log = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert log.stdin is not None
    for stream in (1, 2):
        os.dup2(log.stdin.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for stream in (1, 2):
            os.close(stream)
        log.communicate()


def _arm(fault: Fault) -> None:
    if fault.line < NEVER:
        threading.Thread(target=_strike_when_logged, args=(fault,), daemon=True).start()
    if fault.save_step:
        Countdown(fault).start()


def _rank(rank: int, world: int, meeting: Path, arguments: list[str], fault: Fault) -> None:
    import torch.distributed as dist

    import vlcl.cli
    import vlcl.report.page

    for number, handler in USUAL.items():
        signal.signal(number, handler)
    vlcl.report.page.draw = lambda *_: ""  # pyright: ignore[reportAttributeAccessIssue]
    for name, value in fault.patches.items():
        module, _, attribute = name.rpartition(".")
        setattr(sys.modules.get(module) or __import__(module, fromlist=["x"]), attribute, value)
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                       "LOCAL_WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        dist.barrier()
    if fault.rank == rank:
        _arm(fault)
    sys.argv = ["vlcl", *arguments]
    with _small_files(fault.most_bytes) if fault.rank == rank and fault.most_bytes else nullcontext():
        vlcl.cli.main()


@dataclass
class Ended:
    """How a command ended: exit codes of its ranks (-9: killed; None: it had to be ended after the limit), and what
    they said."""

    codes: list[int | None]
    said: str

    @property
    def hang(self) -> bool:
        return None in self.codes

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.said


def start(folder: Path, world: int, arguments: list[str], fault: Fault | None = None) -> list[BaseProcess]:
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{random.SystemRandom().getrandbits(40)}"
    given = (world, meeting, arguments, fault or Fault(rank=-1))
    return [apart(folder / f"said-{rank}", _rank, rank, *given) for rank in range(world)]


def wait(folder: Path, processes: list[BaseProcess], limit: float, all_die: bool = False) -> Ended:
    """Until all have ended, at most `limit` seconds. `all_die`: as soon as one is killed the others are, as by a
    launcher or a machine that goes down."""
    end = time.monotonic() + limit
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if all_die and any((process.exitcode or 0) < 0 for process in processes):
            _kill(processes)
        time.sleep(0.01)
    codes = [process.exitcode for process in processes]
    _kill(processes)
    said = "".join((folder / f"said-{rank}").read_text(errors="replace") for rank in range(len(processes))
                   if (folder / f"said-{rank}").exists())  # fmt: skip
    return Ended(codes, said)


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive() and process.pid:
            with suppress(psutil.Error):
                for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    with suppress(psutil.Error):
                        one.kill()
        process.join(10)


def command(folder: Path, arguments: list[str], world: int = 1, fault: Fault | None = None, limit: float = 60.0,
            all_die: bool = False) -> Ended:  # fmt: skip
    """A command of vlcl, from start to end."""
    return wait(folder, start(folder, world, arguments, fault), limit, all_die)
