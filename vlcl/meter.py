"""Means of a run's metrics between two log lines, and how fast it went meanwhile.

The sums so far are the same on every rank and part of a checkpoint: a run that was stopped between two log lines goes
on to log what it would have logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlcl import distributed

PARTS = ("collectives", "loss", "checkpoint")  # of the time


class Meter:
    """`add` the metrics of each step, `flush` for a log line."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count the time from now on: what was between two steps, an evaluation, is no training."""
        self._pairs, self._waited, self._started = 0, 0.0, time.perf_counter()
        self._spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in PARTS}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens within as `speed/NAME`, one of PARTS; a trace of the profiler shows it by this name. A
        GPU's time is taken by its own clock, without a wait for it."""
        begin = _now()
        with torch.profiler.record_function(name):
            yield
        self._spans[name].append((begin, _now()))

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Scalars of one step: means over the ranks."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def passed(self, pairs: int, waited: float) -> None:
        """A step of this rank's `pairs` is over, for whose batch it waited so many seconds."""
        self._pairs, self._waited = self._pairs + pairs, self._waited + waited

    def flush(self) -> dict[str, float]:
        """The values of a log line; the next ones begin at nothing."""
        names = sorted(self.sums)
        means = (torch.stack([self.sums[name] for name in names]) / self.steps).tolist() if names else []
        seconds = time.perf_counter() - self._started
        values = {f"train/{name}": mean for name, mean in zip(names, means)}
        values["speed/samples_per_second_per_device"] = self._pairs / seconds
        values["speed/samples_per_second"] = self._pairs * distributed.world_size() / seconds
        values["speed/data_wait"] = self._waited / seconds
        for name, spans in self._spans.items():
            values[f"speed/{name}"] = sum(_seconds(*span) for span in spans) / seconds
        self.__init__()
        return values

    def saved(self) -> dict[str, Any]:
        """The sums, for a checkpoint (JSON; null is no finite number)."""
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"steps": self.steps, "sums": {name: x if math.isfinite(x) else None for name, x in sums.items()}}

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `saved` gave. ValueError where it is no such record."""
        self.__init__()
        steps, sums = saved["steps"], saved["sums"]
        if type(steps) is not int or steps < 0 or not all(x is None or type(x) is float for x in sums.values()):
            raise ValueError("sums of metrics must be numbers")
        self.steps = steps
        self.sums = {name: torch.tensor(math.nan if x is None else x, device=device) for name, x in sums.items()}


def _now() -> Any:
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000
