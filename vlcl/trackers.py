"""Where the metrics of a run go besides metrics.jsonl: tensorboard, wandb, trackio (`log.trackers`).

A tracker's package is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlcl.errors import UserError
from vlcl.files import replace_text

TRACKERS = ("tensorboard", "wandb", "trackio")


class Tracker(Protocol):
    """`module`: what `import_tracker` gave. `log` takes the values of one step, `picture` a PNG file of that step,
    `close` ends the tracker's run."""

    def __init__(self, module: Any, run_dir: Path, config: dict[str, Any], resume_step: int) -> None: ...
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, path: Path) -> None: ...
    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, module: Any, run_dir: Path, config: dict[str, Any], resume_step: int) -> None:
        # purge_step hides what an interrupted run logged after the step that this one goes on from
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
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
        self._module = module
        self._run = module.init(
            project="vlcl", name=run_dir.resolve().name, id=run_id, resume="allow", dir=str(run_dir), config=config
        )
        # our own step column: wandb's counter refuses to go back, which a resumed run does
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._module.Image(str(path)), "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, module: Any, run_dir: Path, config: dict[str, Any], resume_step: int) -> None:
        self._module = module
        resume = "allow" if resume_step else "never"
        module.init(project="vlcl", name=run_dir.resolve().name, config=config, resume=resume)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._module.log({name: self._module.Image(str(path))}, step=step)

    def close(self, failed: bool) -> None:
        self._module.finish()


_TRACKER_CLASSES: dict[str, type[Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def import_tracker(name: str) -> Any:
    """The module of a tracker. UserError where the name is unknown or its package is not installed."""
    if name not in TRACKERS:
        raise UserError(f"log.trackers: '{name}' is unknown; choose among {', '.join(TRACKERS)}")
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise UserError(
            f"log.trackers: '{name}' needs a package that is not installed ({error}). "
            f"Type: pip install {name}, or take '{name}' out of log.trackers"
        ) from error


def start_tracker(name: str, module: Any, run_dir: Path, config: dict[str, Any], resume_step: int) -> Tracker:
    return _TRACKER_CLASSES[name](module, run_dir, config, resume_step)
