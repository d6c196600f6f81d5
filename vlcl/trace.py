"""`train.profile=START:STOP`: what the operations of these steps take, as torch's profiler sees it on rank 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from vlcl.errors import UserError, reason

FOLDER = "profile"  # in RUN


class Trace:
    """Of the steps after START to STOP, or of none. `before(step)` each step, `finish` after the last; the name of the
    file is said."""

    def __init__(self, run: Path, steps: str | None, say: Callable[[str], None]) -> None:
        self._first, self._last = map(int, (steps or "0:0").split(":"))
        self._folder, self._say, self._profiler = Path(run) / FOLDER, say, None

    def before(self, step: int) -> None:
        """Begin or end with the step `step`, from 1, which comes next."""
        if step > self._last:
            self.finish()
        elif step > self._first and self._profiler is None:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def finish(self) -> None:
        """Write what is there, if anything. UserError where it cannot be written."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        path = self._folder / f"steps-{self._first}-{self._last}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"train.profile: {path} could not be written: {reason(error)}") from None
        self._say(f"train.profile: {path} (to look at it: https://ui.perfetto.dev)")
