"""What a training run says and writes: metrics.jsonl, trackers, the progress bar or plain lines, environment.json.

Rank 0 only: every other rank passes `enabled=False` and gets an object that does nothing and touches no file.
`metrics.jsonl` holds one JSON object a line: `step`, `time` (ISO 8601, UTC), `total_steps`, then the metrics of
that moment. It is always valid JSON: a value that is not finite is written as null. No torch is imported here
before it is needed.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from vlcl.errors import UserError
from vlcl.files import replace_text

METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
TRACKERS = ("tensorboard", "wandb", "trackio")
PACKAGES = (
    "vlcl", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "accelerate", "webdataset",
    "torchmetrics", "pydantic", "safetensors", "numpy", "pillow",
)  # fmt: skip


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


# What a plain line shows, in this order, when the metric is among the values of the line.
_LINE = (
    ("epoch", lambda v: f"epoch {v:.2f}"),
    ("train/loss", lambda v: f"loss {v:.3f}"),
    ("train/infonce", lambda v: f"infonce {v:.3f}"),
    ("train/logit_scale", lambda v: f"scale {v:.1f}"),
    ("speed/samples_per_second", lambda v: f"{_amount(v)} samples/s"),
    ("speed/data_wait", lambda v: f"data wait {v:.0%}"),
    ("data/skipped", lambda v: f"skipped {v:.0f}"),
    ("val/image_to_text_R@1", lambda v: f"image-to-text R@1 {v:.1%}"),
    ("val/text_to_image_R@1", lambda v: f"text-to-image R@1 {v:.1%}"),
    ("val/zeroshot_top1", lambda v: f"zero-shot top-1 {v:.1%}"),
)


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
        modules = {name: _import_tracker(name) for name in trackers}
        self._run_dir.mkdir(parents=True, exist_ok=True)
        _drop_lines_after(self._run_dir / METRICS_FILE, resume_step)
        self._trackers: list[_Tracker] = [
            _TRACKER_CLASSES[name](module, self._run_dir, config, resume_step) for name, module in modules.items()
        ]

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

    def message(self, text: str) -> None:
        """Say one thing: above the bar on a terminal, as a plain line elsewhere."""
        if not self.enabled:
            return
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False)
        else:  # not through rich, which would wrap the line at 80 columns
            print(text, file=self._console.file, flush=True)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        parts = [text(values[name]) for name, text in _LINE if name in values]
        line = "  ".join([f"step {step}/{self._total_steps}", *parts])
        if not self._progress:
            eta = self._eta(step)
            self.message(f"{line}  eta {eta}" if eta and "train/loss" in values else line)
            return
        if any(name.startswith("val/") for name in values):
            self.message(line)
        self._progress.update(self._task, completed=step, status=self._bar_status(step), refresh=True)

    def _bar_status(self, step: int) -> str:
        recalls = [self._latest.get(f"val/{way}_R@1") for way in ("image_to_text", "text_to_image")]
        known = [f"{100 * recall:.1f}" for recall in recalls if recall is not None]
        fields = (
            ("train/loss", lambda v: f"loss {v:.3f}"),
            ("speed/samples_per_second", lambda v: f"{_amount(v)}/s"),
            ("speed/data_wait", lambda v: f"wait {v:.0%}"),
        )
        parts = [text(self._latest[name]) for name, text in fields if name in self._latest]
        if known:
            parts.append(f"R@1 {'/'.join(known)}%")
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
    return [record for record in parse_records(lines) if isinstance(record.get("step"), int)]


def parse_records(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The lines that are JSON objects. A line torn by a crash is not JSON, and is left out."""
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
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


class _Tracker(Protocol):
    def __init__(self, module: Any, run_dir: Path, config: dict[str, Any], resume_step: int) -> None: ...
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, module: Any, run_dir: Path, config: dict[str, Any], resume_step: int) -> None:
        # purge_step hides what an interrupted run logged after the step that this one goes on from
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """The run's id is kept in the run folder, so that a resumed run goes on in the same page."""

    def __init__(self, module: Any, run_dir: Path, config: dict[str, Any], resume_step: int) -> None:
        id_file = run_dir / "wandb_id"
        if resume_step == 0 or not id_file.is_file():
            replace_text(id_file, secrets.token_hex(4))
        run_id = id_file.read_text(encoding="utf-8")
        self._run = module.init(
            project="vlcl", name=run_dir.resolve().name, id=run_id, resume="allow", dir=str(run_dir), config=config
        )
        # our own step column: wandb's counter refuses to go back, which a resumed run does
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, module: Any, run_dir: Path, config: dict[str, Any], resume_step: int) -> None:
        self._module = module
        resume = "allow" if resume_step else "never"
        module.init(project="vlcl", name=run_dir.resolve().name, config=config, resume=resume)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._module.finish()


_TRACKER_CLASSES: dict[str, type[_Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def _import_tracker(name: str) -> Any:
    if name not in TRACKERS:
        raise UserError(f"log.trackers: '{name}' is unknown; choose among {', '.join(TRACKERS)}")
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise UserError(
            f"log.trackers: '{name}' needs a package that is not installed ({error}). "
            f"Type: pip install {name}, or take '{name}' out of log.trackers"
        ) from error


def write_environment(run_dir: Path, extra: dict[str, Any]) -> None:
    """Write environment.json: versions, machine, GPUs, commit of vlcl's checkout, command line, and `extra`.

    The report shows these keys of `extra` in its header where they are there: `pairs` (training pairs), `val_pairs`
    (held-out pairs, the candidates of R@k), `parameters` (of the model), `world_size` (ranks). Environment
    variables are left out on purpose: they hold secrets.
    """
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    record = {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "git_commit": _git_commit(),
        "packages": {name: _version(name) for name in PACKAGES},
        **extra,
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / ENVIRONMENT_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout that vlcl runs from, with "+changes" where files differ; None when it is installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # site-packages may lie inside somebody else's checkout
        return None
    try:
        commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
