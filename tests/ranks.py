"""Run a function on several gloo processes: `results = on_ranks(2, fn, *args)` gives fn(*args)'s value of each rank.

Every call gets new processes, so that nothing of one (seeds, environment, a broken group) is left for the next. They
are forked from a server that has imported what ranks need, which starts with the first call: then it is milliseconds.
`apart(log, fn, *args)` starts one such process alone: for what a test kills, limits or lets end.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

import vlcl.cli

LIMIT = 150.0  # seconds: a rank that takes longer ends with the stacks of its threads; below the limit of a test
METHOD = "forkserver" if sys.platform == "linux" else "spawn"  # elsewhere, system libraries do not bear a fork
multiprocessing.set_forkserver_preload([
    "pytest", "torch._dynamo", "open_clip", "transformers", "sklearn.metrics",
    "vlcl.train", "vlcl_eval.commands", "vlcl_eval.elevater.command", "vlcl_eval.clip_benchmark.retrieval",
    "vlcl_eval.clip_benchmark.zeroshot", "clip_benchmark.metrics.zeroshot_classification",
])  # fmt: skip


def _as_if_started_by_a_user(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ |= environment
    multiprocessing.set_start_method(None, force=True)  # or data workers would come from a fork server, too
    torch.set_num_threads(1)


def _entry(rank: int, world: int, folder: Path, limit: float, environment: dict[str, str], fn: Callable) -> None:
    launched = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}  # as accelerate 1.2 asks
    _as_if_started_by_a_user(environment | launched)
    with (folder / f"{rank}.stacks").open("w") as stacks:
        faulthandler.dump_traceback_later(limit, exit=True, file=stacks)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        dist.barrier()  # or a rank that is done at once closes connections that another is still making
        try:
            torch.save(fn(), folder / f"{rank}.pt")
        except pytest.fail.Exception as failure:  # no Exception, which is all that is told
            raise AssertionError(str(failure)) from failure
        finally:
            dist.destroy_process_group()
            faulthandler.cancel_dump_traceback_later()


def _alone(log: Path, environment: dict[str, str], fn: Callable[[], Any]) -> None:
    os.setsid()  # as a command of its own
    _as_if_started_by_a_user(environment)
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    fn()


def apart(log: Path, fn: Callable[..., Any], *args: Any) -> BaseProcess:
    """A started process that calls `fn` of a module's top level with one thread, and prints into `log`."""
    context = multiprocessing.get_context(METHOD)
    process = context.Process(target=_alone, args=(log, dict(os.environ), partial(fn, *args)))  # type: ignore[attr-defined]
    process.start()
    return process


def on_a_full_disk(log: Path, most: int, *arguments: str) -> str:
    """What `vlcl ARGUMENTS` says where no file may have more than `most` bytes: writing fails in the middle of a real
    file, and the command ends with an error of its own."""
    process = apart(log, _command_with_small_files, most, *arguments)
    process.join()
    said = log.read_text()
    assert process.exitcode == 2, said
    assert "Traceback" not in said
    return said


def _command_with_small_files(most: int, *arguments: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    sys.argv = ["vlcl", *arguments]
    vlcl.cli.main()


def on_ranks(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`fn` must be importable (a module's top level); its value must be torch-savable. A world of 1 has a group too.

    The first rank that raises, dies or takes longer than LIMIT ends the others, and the call with what is known of it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arguments = (world, folder, LIMIT, dict(os.environ), partial(fn, *args))
        ranks = start_processes(_entry, arguments, nprocs=world, join=False, start_method=METHOD)
        assert ranks is not None  # that is for join=True
        try:
            while not ranks.join():
                pass
        except ProcessExitedException as end:
            stacks = "".join(path.read_text() for path in folder.glob(f"{end.error_index}.stacks"))
            name = getattr(fn, "__qualname__", str(fn))
            raise AssertionError(f"rank {end.error_index} of {world}, {name}: {end}\n{stacks}") from end
        finally:
            for process in filter(None, ranks.processes):
                process.kill()
                process.join()
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
