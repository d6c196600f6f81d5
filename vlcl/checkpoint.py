"""The run folder: checkpoints that are whole or not there, resume, and load_model, the one way in for eval and export.

    RUN/step-00001000/   model.safetensors + open_clip_config.json (open_clip loads the folder as local-dir:),
                         ema.safetensors, optimizer.pt, table/ (any number of ranks loads it), rank-00000.pt (position
                         in the data, random generators), meta.json
A checkpoint is written under a name of its own and renamed once all ranks have written all of it: a full disk or a kill
leaves the last good one as it was.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pickle
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from vlcl import __version__, distributed
from vlcl.accumulate import random_state, set_random_state
from vlcl.data.order import Layout
from vlcl.data.stream import Position
from vlcl.errors import UserError, first_line
from vlcl.hf.weights import is_hf_folder
from vlcl.logs import METRICS_FILE, read_metrics
from vlcl.loss_state import LossState
from vlcl.metrics import metric_of
from vlcl.model import WEIGHT_FILES, Built, DualEncoder, build_model
from vlcl.sealed import META, check_file, read_meta, seal, sync
from vlcl.views.build import load_views

STEP_FOLDER = re.compile(r"step-(\d{8,})")
WEIGHTS, AVERAGED, OPTIMIZER, TABLE, CONFIG = (
    "model.safetensors", "ema.safetensors", "optimizer.pt", "table", "open_clip_config.json",
)  # fmt: skip
_HUB = "hf-hub:"
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


def save_checkpoint(run: Path, state: TrainState) -> Path:
    """Write RUN/step-N on all ranks (a collective). UserError where it cannot be written; then nothing has changed."""
    folder, temporary = run / f"step-{state.step:08d}", run / f".step-{state.step:08d}.tmp"
    totals = sum((Counter(counters) for counters in distributed.gather_objects(state.counters)), Counter())

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        with _told():
            temporary.mkdir(parents=True)

    def write() -> None:
        with _told():
            state.memory.save(temporary / TABLE)
            _write_own(temporary, state)

    def put_in_place() -> None:
        with _told():
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            sync(run)

    meta = {"step": state.step, "batch": state.position.batch, "layout": state.layout, "vlcl": __version__}
    try:
        distributed.on_first(begin)
        distributed.together(write)
        seal(temporary, meta | {"counters": dict(totals)})
    except UserError as error:
        if distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = complete_steps(run)
        raise UserError(
            f"the checkpoint of step {state.step} could not be written to {run}: {error}. "
            + (f"The last good one is {kept[-1]}. " if kept else "There is none before it. ")
            + "Make room, then go on with resume=latest"
        ) from None
    try:
        distributed.on_first(put_in_place)
    except UserError as error:
        raise UserError(f"the checkpoint of step {state.step} could not be renamed to {folder}: {error}") from None
    return folder


@contextmanager
def _told() -> Iterator[None]:
    """What a write may raise, as a UserError of one line. torch.save raises RuntimeError on a full disk."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(first_line(error)) from None


def check_weights(state: TrainState) -> bool:
    """Whether weights and optimizer state are finite numbers on all ranks (a collective)."""
    moments = [x for values in state.optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    tensors = [*state.built.encoder.parameters(), *moments]
    broken = sum(int(not bool(torch.isfinite(x).all())) for x in tensors)
    return not any(distributed.gather_objects(broken))


def _write_own(folder: Path, state: TrainState) -> None:
    """What this rank writes: rank 0 all that is the same on every rank."""
    accelerator = state.accelerator
    own = {
        "counters": state.counters,
        "cursors": state.position.cursors,
        "torch": random_state(accelerator.device),
        "numpy": json.dumps(np.random.get_state(legacy=False), default=np.ndarray.tolist),
        "python": random.getstate(),
    }
    torch.save(own, folder / f"rank-{distributed.rank():05d}.pt")
    if distributed.rank() > 0:
        return
    save_weights(state.built.encoder, folder / WEIGHTS)
    if state.averaged is not None:
        save_weights(cast(DualEncoder, state.averaged.module), folder / AVERAGED)
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    torch.save({"optimizer": state.optimizer.state_dict(), "scaler": scaler}, folder / OPTIMIZER)
    (folder / CONFIG).write_text(json.dumps(state.built.config, indent=2) + "\n")
    if isinstance(state.built.tokenize, HFTokenizer):
        state.built.tokenize.save_pretrained(folder)  # open_clip looks for it in the folder


def save_weights(encoder: DualEncoder, path: Path) -> None:
    """open_clip's own names, as float tensors on the CPU."""
    save_file({name: x.detach().cpu().contiguous() for name, x in encoder.clip.state_dict().items()}, path)


def prune(run: Path, keep: int, keep_every: int | None, keep_best: str | None = None) -> None:
    """Delete all checkpoints but the newest `keep`, those at multiples of `keep_every` steps, and the best by
    `keep_best`, a metric (rank 0)."""
    if distributed.rank() == 0:
        best = best_step(run, keep_best)
        for folder in complete_steps(run)[:-keep]:
            if (not keep_every or step_of(folder) % keep_every) and folder != best:
                shutil.rmtree(folder, ignore_errors=True)


def best_step(run: Path, name: str | None) -> Path | None:
    """The checkpoint whose evaluation has the best value of a metric, the newest of equals; None where none has one."""
    if name is None or (metric := metric_of(name)) is None or not (run / METRICS_FILE).is_file():
        return None
    values = {record["step"]: record[name] for record in read_metrics(run) if record.get(name) is not None}
    scored = [folder for folder in complete_steps(run) if step_of(folder) in values]
    return max(scored, key=lambda folder: (metric.merit(values[step_of(folder)]), folder), default=None)


def load_checkpoint(folder: Path, state: TrainState) -> list[str]:
    """Put `state` where `folder` left it (a collective). Returns what a user should know, a line each.

    UserError where the checkpoint is of other data or cannot be read.
    """
    try:
        meta = read_meta(folder)
        if any(type(meta[key]) is not int or meta[key] < 0 for key in ("step", "batch")):
            raise ValueError("step and batch must be whole numbers")
        _check_data(folder, meta["layout"], state.layout)
        state.built.encoder.clip.load_state_dict(load_file(folder / WEIGHTS))
        if state.averaged is not None:
            averaged = folder / (AVERAGED if (folder / AVERAGED).is_file() else WEIGHTS)
            cast(DualEncoder, state.averaged.module).clip.load_state_dict(load_file(averaged))
            state.averaged.n_averaged.fill_(meta["step"])
        saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        state.optimizer.load_state_dict(saved["optimizer"])
        if state.accelerator.scaler is not None and saved["scaler"] is not None:
            state.accelerator.scaler.load_state_dict(saved["scaler"])
        state.memory.load(folder / TABLE)
        state.step = meta["step"]
        return _load_position(folder, meta, state)
    except _NOT_OF_OURS as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise UserError(f"cannot go on from {folder}: {text}. Name an older step folder with resume=FOLDER") from None


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
    changed = [key for key, value in meta["layout"].items() if state.layout[key] != value]
    if not changed:
        own = torch.load(folder / f"rank-{distributed.rank():05d}.pt", map_location="cpu", weights_only=True)
        state.position, state.counters = Position(meta["batch"], own["cursors"]), own["counters"]
        set_random_state(own["torch"], state.accelerator.device)
        np.random.set_state(json.loads(own["numpy"]))
        random.setstate(own["python"])
        return []
    state.counters = meta["counters"] if distributed.rank() == 0 else {}
    old, order = meta["layout"], state.order
    epoch, pairs = divmod(meta["batch"] * old["global_batch"], old["epoch_pairs"])
    done = pairs / old["epoch_pairs"]
    cursors = {}
    if order.shard_probabilities is None:
        lengths = [sum(map(len, order.segment(epoch, stream))) for stream in range(order.streams)]
        cursors = {stream: (epoch, int(length * done)) for stream, length in enumerate(lengths)}
    state.position = Position(int((epoch + done) * order.steps_per_epoch), cursors)
    return [
        f"{', '.join(changed)} changed since {folder.name}: the data goes on at the same place of epoch {epoch}, dealt "
        "anew; some pairs of this epoch may come twice and some not at all"
    ]


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
    if "/" in spec.partition(":")[0] or spec.startswith(_HUB):
        raise UserError(_not_there(spec.removeprefix(_HUB), may_be_hub=spec.startswith(_HUB)))
    return None


def _not_there(name: str, may_be_hub: bool) -> str:
    """What to do about a path, or a name on the Hugging Face hub, that is no folder."""
    folder = Path(name)
    if not may_be_hub and folder.parent.is_dir():
        folders = sorted(path for path in folder.parent.iterdir() if path.is_dir())
        models = [path for path in folders if (path / CONFIG).is_file() or complete_steps(path)]
        there = [path.name for path in models or folders]
        near = difflib.get_close_matches(folder.name, there, n=1, cutoff=0.5)
        hint = f"did you mean {folder.parent / near[0]}?" if near else f"{folder.parent} has {', '.join(there[:5])}"
        return f"there is no folder {folder}; {hint}"
    return (
        f"there is no folder {folder}, and models of the Hugging Face hub are not fetched. If it is one: "
        f"hf download {name} --local-dir {folder.name}, then give {folder.name}"
    )


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
        if not any((folder / name).is_file() for name in WEIGHT_FILES):  # open_clip would go on with random ones
            raise UserError(f"{folder} has no weights; looked for {', '.join(WEIGHT_FILES)}")
        if (folder / META).is_file() and (folder / OPTIMIZER).is_file():  # a checkpoint, and not another's meta.json
            files = read_meta(folder)["files"]
            for name in (CONFIG, AVERAGED if averaged and AVERAGED in files else WEIGHTS):
                check_file(folder, name, files)
        built = load_views(folder) or build_model(f"local-dir:{folder}")
        if averaged:
            if not (folder / AVERAGED).is_file():
                raise UserError(f"{folder} has no {AVERAGED}: the run kept no average (train.ema=0)")
            try:
                built.encoder.clip.load_state_dict(load_file(folder / AVERAGED))
            except (OSError, RuntimeError, SafetensorError) as error:
                raise UserError(f"{folder / AVERAGED} cannot be read: {str(error).splitlines()[0]}") from None
    built.encoder.eval()
    return built
