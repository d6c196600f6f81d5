"""Shards on a Ray cluster: a task each. Ray starts the task of a killed worker, or of a lost node, again.

The nodes need vlcl in the same version, and see the shards under the same paths as this machine, or by their urls.
Nothing else of this package imports Ray.
"""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from vlcl import __version__
from vlcl.data.archive import local_path
from vlcl.errors import UserError, counted, first_line
from vlcl_data_prep.engine import worker_killed

AT_LEAST = 16  # tasks that wait or run: a cluster that grows by what waits needs some to see

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_ray(
    function: Callable[[Item], Result], items: Iterator[tuple[int, Item]], address: str | None, workers: int | None,
    label: str | None, tries: int,
) -> Iterator[tuple[int, Result]]:  # fmt: skip
    """(number, result) as they come. `workers`: tasks at a time (default: twice the CPUs of the cluster)."""
    with _connected(address, label) as ray:
        at_node: Any = ray.remote(_at_node)
        task = at_node.options(num_cpus=1, max_retries=tries - 1, scheduling_strategy="SPREAD")
        sent = ray.put(function)
        running: dict[Any, tuple[int, Item]] = {}
        try:
            while True:
                room = workers or max(AT_LEAST, 2 * int(ray.cluster_resources().get("CPU", 0)))
                for number, item in islice(items, max(room - len(running), 0)):
                    running[task.remote(sent, item, os.getcwd(), __version__)] = number, item
                if not running:
                    return
                for done in ray.wait(list(running))[0]:
                    number, item = running.pop(done)
                    yield number, _result_of(ray, done, item)
        finally:
            for unfinished in running:
                ray.cancel(unfinished, force=True)


@contextmanager
def _connected(address: str | None, label: str | None) -> Iterator[Any]:
    """To the cluster of the address, or of RAY_ADDRESS, or of this machine, or to one that starts here for now."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody because vlcl was used
    import ray

    ours = not ray.is_initialized()
    if ours:
        try:
            _knock(address)
            ray.init(address=address, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"no Ray cluster at {address or 'RAY_ADDRESS'}: {first_line(error)}. On its head: ray start --head; "
                "on the other nodes: ray start --address HEAD:6379; then here: --engine ray:HEAD:6379"
            ) from None
    try:
        if label is not None:
            alive = [node for node in ray.nodes() if node["Alive"]]
            cpus = int(ray.cluster_resources().get("CPU", 0))
            print(
                f"{label}: on Ray, {counted(len(alive), 'node')} with {counted(cpus, 'CPU')}",
                file=sys.stderr,
                flush=True,
            )
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _knock(address: str | None) -> None:
    """OSError where nobody answers at HOST:PORT: Ray would try for a quarter of an hour."""
    host, _, port = (address or "").rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _result_of(ray: Any, done: Any, item: Any) -> Any:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if "failed to import" in str(error):
            raise UserError(
                f"a Ray node has no vlcl {__version__}: install it on all nodes ({first_line(error)})"
            ) from None
        raise error.cause if isinstance(error.cause, UserError) else error from None
    except ray.exceptions.RayError:  # of the worker or its node
        raise worker_killed(item) from None


def _at_node(function: Callable[[Item], Result], item: Item, folder: str, version: str) -> Result:
    """On a worker. UserError where the node is not as the machine that asks."""
    node = socket.gethostname()
    if version != __version__:
        raise UserError(f"the Ray node {node} has vlcl {__version__}, this machine {version}: install the same on both")
    path = local_path(item) if isinstance(item, str) else None
    if path is not None:
        if not os.path.isabs(path) and os.path.isdir(folder):
            os.chdir(folder)
        if not os.path.exists(path):
            raise UserError(
                f"the Ray node {node} has no {os.path.join(folder, path)}: put the shards on a file system that all "
                "nodes see under the same path, or name them by urls (s3://, gs://, https://)"
            )
    return function(item)
