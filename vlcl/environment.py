"""environment.json of a run folder: on which machine, with which versions and by which command it was made."""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from vlcl.files import replace_text

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "vlcl", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "accelerate", "webdataset",
    "torchmetrics", "pydantic", "safetensors", "numpy", "pillow",
)  # fmt: skip


def let_threads_sleep() -> None:
    """For a command, before torch is imported: OpenMP's threads sleep while they wait for each other, unless the user
    has set how they wait. On a busy machine threads that spin keep the very ones from running that they wait for."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def uncollected() -> Iterator[None]:
    """For the imports of a command: without the garbage collector, which would go through all that is there again and
    again as it grows, a fifth of the time. What is there afterwards stays, and is never gone through again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def write_environment(run_dir: Path, extra: dict[str, Any]) -> None:
    """Write environment.json: versions, machine, GPUs, commit of vlcl's checkout, command line, and `extra`.

    The report shows these keys of `extra` in its header where they are there: `pairs` (training pairs), `val_pairs`
    and `test_pairs` (held-out pairs, the candidates of R@k), `parameters` (of the model), `world_size` (ranks),
    `zeroshot_classes` (their number in each set). A run on pictures alone has `val_pictures` and `test_pictures`
    instead. The model card shows `start_note`, on the start weights.
    Environment variables are left out on purpose: they hold secrets.
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


def is_environment(path: Path) -> bool:
    """Whether `write_environment` wrote this file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    packages = record.get("packages") if isinstance(record, dict) else None
    return isinstance(packages, dict) and "vlcl" in packages


def memory_used(device: str) -> float:
    """GiB, the most so far: of the GPU's memory, as torch has reserved it for `cuda`; else of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_reserved() / (1 << 30)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 30 if sys.platform == "darwin" else 1 << 20)  # bytes there, KiB elsewhere


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
