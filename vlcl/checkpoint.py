"""The run folder: checkpoints that are whole or not there, resume, and load_model, the one way in for eval and export.

    RUN/step-00001000/   model.safetensors + open_clip_config.json (open_clip loads the folder as local-dir:),
                         ema.safetensors, optimizer.pt, table/ (any number of ranks loads it), rank-00000.pt (position
                         in the data, random generators), meta.json
    of sharded towers    model/, ema/ and optimizer/ instead of the files of these names, with a file of each rank's
                         pieces (vlcl/pieces.py), and optimizer/groups.json
vlcl/saving.py writes them.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import AveragedModel

from vlcl import distributed
from vlcl.accumulate import set_random_state
from vlcl.anomalies import Anomalies
from vlcl.data.order import Layout
from vlcl.data.resume import find_place
from vlcl.data.stream import Position
from vlcl.errors import UserError, first_line
from vlcl.hf.weights import is_hf_folder
from vlcl.logs import METRICS_FILE, read_metrics
from vlcl.loss_state import LossState
from vlcl.meter import Meter
from vlcl.metrics import metric_of
from vlcl.model import Built, DualEncoder, build_model
from vlcl.optim import load_optimizer
from vlcl.paths import check_model
from vlcl.pieces import folder_of, opened, stored
from vlcl.sealed import META, check_file, read_meta
from vlcl.sharding import is_sharded, piece_of
from vlcl.start_weights import WEIGHT_FILES, weights_in
from vlcl.views.build import load_views

STEP_FOLDER = re.compile(r"step-(\d{8,})")
WEIGHTS, AVERAGED, OPTIMIZER, TABLE, CONFIG = (
    "model.safetensors", "ema.safetensors", "optimizer.pt", "table", "open_clip_config.json",
)  # fmt: skip
GROUPS = "groups.json"  # in optimizer/: settings of the optimizer's parameter groups
# What reading files raises whose sums are right, as another program or version wrote them.
_NOT_OF_OURS = (
    OSError, EOFError, LookupError, ValueError, RuntimeError, TypeError, AttributeError, ArithmeticError,
    SafetensorError, pickle.UnpicklingError,
)  # fmt: skip


@dataclass
class TrainState:
    """Everything that a run is, at one step. `layout` (json) is what the position in the data depends on, `memory` what
    the loss remembers."""

    built: Built
    averaged: AveragedModel | None
    optimizer: torch.optim.Optimizer
    memory: LossState
    accelerator: Accelerator
    order: Layout
    layout: dict[str, Any]
    step: int = 0
    position: Position = dataclasses.field(default_factory=Position)
    counters: dict[str, int] = dataclasses.field(default_factory=dict)
    meter: Meter = dataclasses.field(default_factory=Meter)
    anomalies: Anomalies = dataclasses.field(default_factory=Anomalies)

    @property
    def encoder_to_judge(self) -> DualEncoder:
        """The averaged weights where there are some: what evaluation and export are about."""
        return self.built.encoder if self.averaged is None else cast(DualEncoder, self.averaged.module)


def complete_steps(run: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    folders = [path for path in run.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and (path / META).is_file()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else -1


def latest_step(run: Path) -> Path:
    """The newest whole checkpoint; UserError where there is none."""
    if folders := complete_steps(run):
        return folders[-1]
    there = "it does not exist" if not run.exists() else "it has no complete step-*/ folder"
    raise UserError(
        f"no checkpoint to go on from in {run}: {there}. Start anew without resume=, with train.overwrite=true if the "
        "folder's logs may go"
    )


def prune(
    run: Path, keep: int, keep_every: int | None, keep_best: str | None = None, spare: Path | None = None
) -> None:
    """Delete all checkpoints but the newest `keep`, those at multiples of `keep_every` steps, the best by
    `keep_best`, a metric, and `spare` (rank 0)."""
    if distributed.rank() == 0:
        folders = {step_of(folder): folder for folder in complete_steps(run)}
        for step in superfluous(run, list(folders), keep, keep_every, keep_best):
            if folders[step] != spare:
                shutil.rmtree(folders[step], ignore_errors=True)


def superfluous(
    run: Path, steps: Sequence[int], keep: int, keep_every: int | None, keep_best: str | None = None
) -> list[int]:
    """Of checkpoints of a run at these steps, here or in a store, those that the rule of `prune` does not keep."""
    best = best_of(run, steps, keep_best)
    return [x for x in sorted(steps)[:-keep] if (not keep_every or x % keep_every) and x != best]


def best_step(run: Path, name: str | None) -> Path | None:
    """The checkpoint whose evaluation has the best value of a metric, the newest of equals; None where none has one."""
    folders = {step_of(folder): folder for folder in complete_steps(run)}
    best = best_of(run, list(folders), name)
    return None if best is None else folders[best]


def best_of(run: Path, steps: Sequence[int], name: str | None) -> int | None:
    """Of these steps of a run, as `best_step`."""
    if name is None or (metric := metric_of(name)) is None or not (run / METRICS_FILE).is_file():
        return None
    values = {record["step"]: record[name] for record in read_metrics(run) if record.get(name) is not None}
    return max((x for x in steps if x in values), key=lambda x: (metric.merit(values[x]), x), default=None)


def load_checkpoint(folder: Path, state: TrainState) -> list[str]:
    """Put `state` where `folder` left it (a collective). Returns what a user should know, a line each.

    UserError where the checkpoint is of other data or cannot be read.
    """
    try:
        meta = read_meta(folder)
        if any(type(meta[key]) is not int or meta[key] < 0 for key in ("step", "batch")):
            raise ValueError("step and batch must be whole numbers")
        _check_data(folder, meta["layout"], state.layout)
        weights, averaged = stored(folder, WEIGHTS), stored(folder, AVERAGED)
        load_weights(state.built.encoder.clip, weights)
        if state.averaged is not None:
            load_weights(cast(DualEncoder, state.averaged.module).clip, averaged if averaged.exists() else weights)
            state.averaged.n_averaged.fill_(meta["step"])
        _load_optimizer(stored(folder, OPTIMIZER), state)
        state.memory.load(folder / TABLE)
        state.step = meta["step"]
        state.meter.restore(meta["window"], state.accelerator.device)
        state.anomalies = Anomalies.restored(meta["anomalies"])
        return _load_position(folder, meta, state)
    except _NOT_OF_OURS as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise UserError(f"cannot go on from {folder}: {text}. Name an older step folder with resume=FOLDER") from None


def load_weights(clip: nn.Module, path: Path) -> None:
    """The weights of a file, or of a folder of pieces; a rank with sharded ones reads its own rows alone."""
    now = clip.state_dict()
    with opened(path) as tensors:
        clip.load_state_dict({name: piece_of(x, now.get(name)) for name, x in tensors.items()})


def _load_optimizer(path: Path, state: TrainState) -> None:
    if not path.is_dir():
        mapped = is_sharded(state.built.encoder)  # read as it is needed: each rank keeps its pieces alone
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        load_optimizer(state.optimizer, saved["optimizer"])
        if state.accelerator.scaler is not None and saved["scaler"] is not None:
            state.accelerator.scaler.load_state_dict(saved["scaler"])
        return
    moments: dict[int, dict[str, Any]] = {}
    with opened(path) as tensors:
        for name, x in tensors.items():
            number, _, moment = name.partition("/")
            moments.setdefault(int(number), {})[moment] = x if x.shape else x.whole().clone()
        groups = json.loads((path / GROUPS).read_text(encoding="utf-8"))
        load_optimizer(state.optimizer, {"state": moments, "param_groups": groups})


def _check_data(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    kinds = {
        "digest": "on other shards (rows would name other pairs)",
        "loss": "with another loss",
        "rows": "with other settings of the loss (what it remembers would mean something else)",
    }
    for key, what in kinds.items():
        if saved[key] != now[key]:
            raise UserError(
                f"cannot go on from {folder}: it was trained {what}: {key} {saved[key]!r}, now {now[key]!r}. "
                "Start a new run with model.pretrained=FOLDER to keep the weights only"
            )


def _load_position(folder: Path, meta: dict[str, Any], state: TrainState) -> list[str]:
    def of_rank(rank: int) -> dict[str, Any]:
        return torch.load(folder / f"rank-{rank:05d}.pt", map_location="cpu", weights_only=True)

    def cursors_of(rank: int) -> dict[int, tuple[int, int]]:
        return of_rank(rank)["cursors"]

    state.position, told = find_place(folder.name, meta, state.layout, state.order, cursors_of)
    if told:  # not for these ranks: their own states
        state.counters = meta["counters"] if distributed.rank() == 0 else {}
        return [told]
    own = of_rank(distributed.rank())
    state.counters = own["counters"]
    set_random_state(own["torch"], state.accelerator.device)
    np.random.set_state(json.loads(own["numpy"]))
    random.setstate(own["python"])
    return []


def find_model(spec: str) -> Path | None:
    """The folder that holds the weights of a run (its newest checkpoint), a checkpoint or an export; None for a name.

    UserError for a path that is none of these, with what it could be.
    """
    folder = Path(spec.removeprefix("local-dir:"))
    if (folder / CONFIG).is_file():
        return folder
    if folder.is_dir() and complete_steps(folder):
        return latest_step(folder)
    if folder.is_dir():
        raise UserError(
            f"{spec} is no model: it has no {CONFIG} and no step-*/ folder"
            + (" (its config.json is of transformers, which this command does not read)" * is_hf_folder(folder))
            + ". For weights that open_clip's trainer wrote: ARCHITECTURE:FILE.pt"
        )
    if folder.is_file() and (folder.parent / CONFIG).is_file():
        raise UserError(f"{spec} is a file of a model; give its folder: {folder.parent}")
    if folder.is_file():
        raise UserError(f"{spec} is a file; give the architecture of its weights too: ViT-B-32:{spec}")
    check_model(spec)
    return None


def load_model(path: str, averaged: bool = False) -> Built:
    """A run folder, a step folder, an exported folder, or an open_clip name (`ViT-B-32`, `ViT-B-32:openai`).

    `averaged`: the moving average of the weights, where the run kept one. In eval mode, on the CPU.
    """
    folder = find_model(path)
    if folder is None:
        if averaged:
            raise UserError(f"{path} is no run, and has no moving average of its weights")
        name, _, tag = path.partition(":")
        built = build_model(name, pretrained=tag or None)
    else:
        if weights_in(folder) is None:  # open_clip would go on with random ones
            raise UserError(f"{folder} has no weights; looked for {', '.join(WEIGHT_FILES)}")
        if (folder / META).is_file() and stored(folder, OPTIMIZER).exists():  # a checkpoint, not another's meta.json
            files = read_meta(folder)["files"]
            average = _files_of(folder, AVERAGED, files) if averaged else []
            for name in (CONFIG, *(average or _files_of(folder, WEIGHTS, files) or [WEIGHTS])):
                check_file(folder, name, files)
        built = load_views(folder) or build_model(f"local-dir:{folder}")
        if averaged:
            if not (weights := stored(folder, AVERAGED)).exists():
                raise UserError(f"{folder} has no {AVERAGED}: the run kept no average (train.ema=0)")
            try:
                load_weights(built.encoder.clip, weights)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise UserError(f"{weights} cannot be read: {first_line(error)}") from None
    built.encoder.eval()
    return built


def _files_of(folder: Path, name: str, files: Mapping[str, Any]) -> list[str]:
    """`name`, or the files of its pieces: those that are there and those that should be."""
    pieces = folder_of(name)
    there = [path for path in (folder / name, *(folder / pieces).glob("*")) if path.is_file()]
    named = {file for file in files if file == name or file.startswith(f"{pieces}/")}
    return sorted(named | {path.relative_to(folder).as_posix() for path in there})
