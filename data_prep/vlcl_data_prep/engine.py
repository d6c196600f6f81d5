"""One function over many shards: in processes of this machine, or on a Ray cluster. The results come in shard order.

A worker that is killed costs the shards that it had, which are tried again; a shard whose worker is killed each time
ends the command, by its name. What is finished is kept on the disk where a command asks for it (results.py).
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from importlib.util import find_spec
from itertools import islice
from typing import Annotated, Any, TypeVar

import typer

from vlcl.data.urls import without_secrets
from vlcl.errors import UserError, counted
from vlcl_data_prep.results import Results

TRIES = 3  # of a shard whose worker is killed
MOST_OF_A_CHUNK = 32  # shards that a process is given at once: headers of a small one are read in a millisecond
SECONDS_A_LINE = 10  # between two lines of progress where there is no terminal
LOCAL, RAY = "local", "ray"

Item = TypeVar("Item")
Result = TypeVar("Result")
Numbered = tuple[int, Item]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", "--jobs", min=1, help="Shards at a time. Default: one a core.")
]
EngineOption = Annotated[
    str, typer.Option(metavar="ENGINE", help="local: processes here; ray or ray:HOST:PORT: a Ray cluster.")
]


def map_shards(
    function: Callable[[Item], Result], items: Sequence[Item] | Iterable[Item], workers: int | None = None,
    label: str | None = None, engine: str = LOCAL, kept: Results | None = None, total: int | None = None,
) -> Iterator[Result]:  # fmt: skip
    """`function` of every item, in order. An item is a shard's path or url, or whatever names itself as `str`.

    `workers`: items at a time (default: one a core, of the machine or of the cluster). With a label, shows progress.
    `engine`: local, ray or ray:ADDRESS. `kept`: has results of an earlier try, and takes those of this one. `total`: of
    items, where they have no length. Raises UserError at once for an engine that is none.
    """
    address, before = check_engine(engine), 0
    if isinstance(items, Sequence):
        total = len(items)
        before = sum(item in kept for item in items) if kept else 0
    if label is not None and before:
        print(f"{label}: {before:,} of {counted(total or 0, 'shard')} done before", file=sys.stderr, flush=True)
    return _in_order(function, items, workers, label, engine, address, kept, before, total)


def check_engine(engine: str) -> str | None:
    """The address of the Ray cluster; None: of `local`, and where Ray finds or starts one. Raises UserError."""
    name, _, address = engine.partition(":")
    if name not in (LOCAL, RAY) or (name == LOCAL and engine != LOCAL):
        raise UserError(f"--engine {engine!r}: allowed are local, ray, and ray:HOST:PORT of a cluster's head")
    if name == RAY and find_spec("ray") is None:
        raise UserError(f"--engine {engine} needs Ray, which is not installed: pip install 'vlcl[ray]'")
    return address or None


def _in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None, label: str | None, engine: str,
    address: str | None, kept: Results | None, before: int, total: int | None,
) -> Iterator[Result]:  # fmt: skip
    waiting: dict[int, Item] = {}  # for their turn
    early: dict[int, Result] = {}  # finished before it, and not kept on the disk
    number = 0

    def missing() -> Iterator[Numbered]:
        for place, item in enumerate(items):
            waiting[place] = item
            if kept is None or item not in kept:
                yield place, item

    def finished() -> Iterator[Result]:
        """Those whose turn it is."""
        nonlocal number
        while number in early or (number in waiting and kept is not None and waiting[number] in kept):
            item = waiting.pop(number)
            yield early.pop(number) if number in early else _loaded(kept, item, function)
            number += 1

    if engine == LOCAL:
        results = _in_processes(function, missing(), workers, total)
    else:
        from vlcl_data_prep.ray_engine import on_ray

        results = on_ray(function, missing(), address, workers, label, TRIES)
    for place, result in _shown(results, before, total, label):
        if kept is None or not kept.save(waiting[place], result):
            early[place] = result
        yield from finished()
    yield from finished()
    assert not waiting


def _loaded(kept: Results | None, item: Item, function: Callable[[Item], Result]) -> Result:
    """What is on the disk; where that is damaged, once more."""
    found = kept.load(item) if kept else None
    return function(item) if found is None else found


def _in_processes(
    function: Callable[[Item], Result], items: Iterator[Numbered], workers: int | None, total: int | None
) -> Iterator[tuple[int, Result]]:
    """Processes, not threads: walking headers and decoding images both hold the interpreter's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, cores if total is None else max(total, 1))
    if workers == 1:
        return ((number, function(item)) for number, item in items)
    chunk = max(1, min(MOST_OF_A_CHUNK, (total or 1) // (8 * workers)))
    pool = ProcessPoolExecutor(workers)
    pool.submit(int)  # starts the processes before the display's thread
    return _in_pool(function, iter(lambda: list(islice(items, chunk)), []), workers, pool)


def _in_pool(
    function: Callable[[Item], Result], chunks: Iterator[list[Numbered]], workers: int, pool: ProcessPoolExecutor
) -> Iterator[tuple[int, Result]]:
    running: dict[Future[list[Result]], list[Numbered]] = {}
    try:
        while True:
            for chunk in islice(chunks, 2 * workers - len(running)):
                running[pool.submit(_each, function, [item for _, item in chunk])] = chunk
            if not running:
                break
            done = wait(running, return_when=FIRST_COMPLETED).done
            if any(isinstance(future.exception(), BrokenExecutor) for future in done):
                done = wait(running).done  # a worker was killed, and with it the pool
                pool = ProcessPoolExecutor(workers)
            for future in done:
                chunk = running.pop(future)
                lost = isinstance(future.exception(), BrokenExecutor)
                results = [_alone(function, item) for _, item in chunk] if lost else future.result()
                yield from ((number, result) for (number, _), result in zip(chunk, results))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _alone(function: Callable[[Item], Result], item: Item) -> Result:
    """In a process of its own: whoever kills it is found out, and takes no others with it."""
    for _ in range(TRIES - 1):
        with ProcessPoolExecutor(1) as pool:
            try:
                return pool.submit(function, item).result()
            except BrokenExecutor:
                continue
    raise worker_killed(item)


def worker_killed(item: Any) -> UserError:
    return UserError(
        f"{without_secrets(str(item))}: the process that worked on it was killed, {TRIES} times. There may be too "
        "little memory for it: fewer --workers, or leave it out"
    )


def _shown(
    results: Iterator[tuple[int, Result]], before: int, total: int | None, label: str | None
) -> Iterator[tuple[int, Result]]:
    """Pass results on: with a bar on a terminal, else with a line now and then. before: how many were there already."""
    if label is None:
        yield from results
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(results, description=label, total=total, completed=before, console=Console(stderr=True))
        return
    last = time.monotonic()
    for count, result in enumerate(results, before + 1):
        yield result
        if time.monotonic() - last > SECONDS_A_LINE:
            print(f"{label}: {count:,}{f' of {total:,}' if total else ''} shards", file=sys.stderr, flush=True)
            last = time.monotonic()
