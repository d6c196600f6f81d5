"""Cells in parallel: worker processes that live as long as there is work, as each needs seconds to import torch.

A worker that dies takes its cell with it and nothing else. Ctrl-C is the parent's to answer: it asks the workers to
stop (SIGTERM), and a run that is stopped so saves, and goes on from there. A worker whose parent is gone ends at once.
No torch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from vlcl.compare.cell import Ran
from vlcl.compare.grid import Cell

Work = Callable[[Cell], Ran]
SECONDS_TO_STOP = 20  # for a worker that was asked to; a report may have to be written


@dataclass
class Worker:
    """A process, this end of its pipe, and the cell that it is at."""

    process: SpawnProcess
    connection: Connection
    cell: Cell | None = None


def run_in_pool(
    waiting: Callable[[], Sequence[Cell]], jobs: int, work: Work, environments: Sequence[Mapping[str, str]]
) -> Generator[tuple[Cell, Ran], None, None]:
    """Yield every cell with what became of it, as they end, until none is waiting or at work.

    waiting: the cells without a result, in order, asked again after each; it may name those at work. work: a function
    at a module's top level, called in the workers. environments: the variables that worker 0, 1, ... starts with.
    """
    workers: list[Worker | None] = [None] * jobs
    try:
        while True:
            _hand_out(workers, waiting(), work, environments)
            busy = {worker.connection: worker for worker in workers if worker and worker.cell}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index] # wait() gives back what it was given
                cell, worker.cell = worker.cell, None
                assert cell is not None
                try:
                    ran = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    workers[workers.index(worker)] = None
                    ran = Ran(error=_last_words(worker))
                yield cell, ran
    finally:
        _stop([worker for worker in workers if worker])


def environments_of(jobs: int, cores: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """What the environment of each of `jobs` workers says: its share of the cores, and a GPU where there are several.

    OMP_NUM_THREADS that is set already stays where it asks for fewer.
    """
    share = max(1, cores // jobs)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(share, int(asked)) if asked.isdigit() and int(asked) > 0 else share
    return [
        {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} if len(gpus) > 1 else {})
        for n in range(jobs)
    ]


def visible_gpus(count: int) -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES may have of the `count` GPUs that this process sees."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if len(named) >= count else [str(n) for n in range(count)]


def _hand_out(
    workers: list[Worker | None], waiting: Sequence[Cell], work: Work, environments: Sequence[Mapping[str, str]]
) -> None:
    """Give each idle worker a cell, and start those that there is work for."""
    at_work = {worker.cell.name for worker in workers if worker and worker.cell}
    todo = [cell for cell in waiting if cell.name not in at_work]
    for place, worker in enumerate(workers):
        if not todo or (worker and worker.cell):
            continue
        worker = workers[place] = worker or _start(work, environments[place])
        worker.cell = todo.pop(0)
        with suppress(OSError):  # it died while it was idle: its end is read as that of any other
            worker.connection.send(worker.cell)


def _start(work: Work, environment: Mapping[str, str]) -> Worker:
    context = multiprocessing.get_context("spawn")  # not fork: torch and CUDA do not survive it
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work))  # no daemon, as it has data workers of its own
    with _variables(environment), _no_ctrl_c():
        process.start()
    theirs.close()
    return Worker(process, ours)


@contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    """The environment of this process with these: a child inherits it, and reads some before its first line runs."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Children inherit that they do not hear Ctrl-C, which a terminal sends to all, from their first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _last_words(worker: Worker) -> str:
    worker.process.join()
    worker.connection.close()
    code = worker.process.exitcode or 0
    if code >= 0:
        return f"the process that ran it ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    why = " (there may have been too little memory: try fewer --jobs)" if -code == signal.SIGKILL else ""
    return f"the process that ran it was ended by {name}{why}"


def _stop(workers: Sequence[Worker]) -> None:
    """End all, those at work as well; a second Ctrl-C does not wait for them."""
    try:
        for worker in workers:
            worker.connection.close()  # an idle one ends by this
            if worker.cell is not None:
                worker.process.terminate()
        for worker in workers:
            worker.process.join(SECONDS_TO_STOP)
    finally:
        for worker in workers:
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()


def _serve(connection: Connection, work: Work) -> None:
    """A worker: run what comes through the pipe until it is closed."""
    # a spawned process would spawn its data workers as well, each of which would import torch anew
    multiprocessing.set_start_method(None, force=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run takes it over where nobody else has: vlcl.stop
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    while True:
        try:
            cell = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            ran = work(cell)
        except Exception as error:  # of vlcl: the other cells go on
            traceback.print_exc()
            ran = Ran(error=f"{type(error).__name__}: {error}")
        try:
            connection.send(ran)
        except OSError:
            return


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
