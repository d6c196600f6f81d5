"""What a training run says and writes while it goes: metrics.jsonl, trackers, the progress bar or plain lines.

Rank 0 only: every other rank passes `enabled=False` and gets an object that does nothing and touches no file.
`metrics.jsonl` holds one JSON object a line: `step`, `time` (ISO 8601, UTC), `total_steps`, then the metrics of
that moment. It is always valid JSON: a value that is not finite is written as null.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from vlcl.errors import UserError
from vlcl.files import replace_text
from vlcl.metrics import HEADLINE, LOSS, METRICS, PER_DEVICE, SAMPLES_PER_SECOND, is_held_out
from vlcl.trackers import Tracker, import_tracker, start_tracker

METRICS_FILE = "metrics.jsonl"
RANDOM_WEIGHTS = ("No pretrained weights loaded", "no CLIP weights found")  # open_clip's warnings of every new run


def is_news(record: logging.LogRecord) -> bool:
    """A filter of Python's root logger: weights that start at random are no news to who trains them."""
    return not any(text in record.getMessage() for text in RANDOM_WEIGHTS)


class RunLog:
    """The voice of one run. Use it as a context manager; call `metrics` at every logged step and at the last step.

    `trackers` names any of tensorboard, wandb and trackio; a name that is unknown or whose package is missing
    raises UserError here, before anything is written. `resume_step` is the step that training goes on from: later
    lines of an existing metrics.jsonl are dropped, so that each step is there once (at 0, all of them are).
    """

    def __init__(
        self,
        run_dir: Path,
        trackers: Sequence[str],
        config: dict[str, Any],
        total_steps: int,
        enabled: bool,
        resume_step: int = 0,
        console: Console | None = None,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._run_dir = Path(run_dir)
        self._total_steps = total_steps
        self._resume_step = resume_step
        self._latest: dict[str, float] = {}
        self._console = console or Console()
        self._progress = _make_bar(self._console) if self._console.is_terminal else None
        modules = {name: import_tracker(name) for name in trackers}
        self._run_dir.mkdir(parents=True, exist_ok=True)
        _drop_lines_after(self._run_dir / METRICS_FILE, resume_step)
        self._start = lambda step: [
            start_tracker(name, module, self._run_dir, config, step) for name, module in modules.items()
        ]
        self._trackers: list[Tracker] = self._start(resume_step)

    def __enter__(self) -> RunLog:
        self._started = time.monotonic()
        if self.enabled and self._progress:
            self._progress.start()
            self._task = self._progress.add_task(
                "train", total=self._total_steps, completed=self._resume_step, status=""
            )
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if not self.enabled:
            return
        if self._progress:
            self._progress.stop()
        for tracker in self._trackers:
            tracker.close(failed=error_type is not None)

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step: what was recorded after it is dropped, as in a resumed run."""
        if not self.enabled:
            return
        _drop_lines_after(self._run_dir / METRICS_FILE, step)
        for tracker in self._trackers:
            tracker.close(failed=False)
        self._trackers = self._start(step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` (floats, or anything float() takes) as those of optimizer step `step`, and show them."""
        if not self.enabled:
            return
        floats = {name: float(value) for name, value in values.items()}
        line = {
            "step": step,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "total_steps": self._total_steps,
            **{name: value if math.isfinite(value) else None for name, value in floats.items()},
        }
        with open(self._run_dir / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for tracker in self._trackers:
            tracker.log(step, floats)
        self._latest.update(floats)
        self._show(step, floats)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Give the trackers a PNG file, where it is there, as that of optimizer step `step`."""
        if self.enabled and path.is_file():
            for tracker in self._trackers:
                tracker.picture(step, name, path)

    def message(self, text: str) -> None:
        """Say one thing: above the bar on a terminal, as a plain line elsewhere."""
        if not self.enabled:
            return
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False)
        else:  # not through rich, which would wrap the line at 80 columns
            print(text, file=self._console.file, flush=True)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        shown = dict(values)
        if values.get(PER_DEVICE.name) == values.get(SAMPLES_PER_SECOND.name):  # of one device
            shown.pop(PER_DEVICE.name, None)
        parts = [metric.line(shown[metric.name]) for metric in METRICS if metric.line and metric.name in shown]
        line = "  ".join([f"step {step}/{self._total_steps}", *parts])
        if not self._progress:
            eta = self._eta(step)
            self.message(f"{line}  eta {eta}" if eta and LOSS.name in values else line)
            return
        if any(is_held_out(name) for name in values):
            self.message(line)
        self._progress.update(self._task, completed=step, status=self._bar_status(step), refresh=True)

    def _bar_status(self, step: int) -> str:
        latest = self._latest
        parts = [metric.bar(latest[metric.name]) for metric in METRICS if metric.bar and metric.name in latest]
        known = [f"{100 * latest[metric.name]:.1f}" for metric in HEADLINE if metric.name in latest]
        if known:
            parts.append(f"{HEADLINE[0].label} {'/'.join(known)}%")
        if eta := self._eta(step):
            parts.append(f"eta {eta}")
        return "  ".join(parts)

    def _eta(self, step: int) -> str:
        """Time left as h:mm:ss at this run's mean pace so far, evaluations included; "" when there is no pace yet."""
        done, left = step - self._resume_step, self._total_steps - step
        if done <= 0 or left <= 0:
            return ""
        seconds = round((time.monotonic() - self._started) / done * left)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _make_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
        expand=True,
        auto_refresh=False,  # drawn when there is news: no thread beside the data workers' forks
    )


def parse_metrics(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The lines that are whole records of a step."""
    return [record for record in parse_records(lines) if type(record.get("step")) is int and record["step"] >= 0]


def parse_records(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The lines that are JSON objects. A line torn by a crash is not JSON, and is left out."""
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a number of 5,000 digits is a ValueError, too
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run folder's metrics.jsonl, in order of writing. UserError where there is no such file."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise UserError(
            f"{path} does not exist, so {run_dir} is not the folder of a run that logged a step. "
            "Give a run folder (one with config.yaml and metrics.jsonl), or start one: vlcl train CONFIG.yaml"
        )
    return parse_metrics(path.read_text(encoding="utf-8", errors="replace").splitlines())


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    records = read_metrics(path.parent) if step > 0 else []
    kept = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
    replace_text(path, "".join(kept))
