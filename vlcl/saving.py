"""How a checkpoint is written: under a name of its own, which is changed once all ranks have written all of it, so that
a full disk or a kill leaves the last good one as it was.

With `checkpoint.async_save` the step loop waits for a copy of the state alone: a thread of each rank writes the copy,
sees it on the disk and sums it up, while training goes on. The threads meet no other rank: that all of them are done
is told by the numbers of a step (vlcl/recovery.py), and then, between two steps, the folder gets its name.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlcl import __version__, distributed
from vlcl.accumulate import random_state
from vlcl.checkpoint import AVERAGED, CONFIG, GROUPS, OPTIMIZER, TABLE, WEIGHTS, TrainState, complete_steps
from vlcl.errors import UserError, reason
from vlcl.model import DualEncoder
from vlcl.pieces import Piece, file_name, folder_of, save_pieces
from vlcl.sealed import records, seal, sync
from vlcl.sharding import in_pieces, is_sharded, local, own_rows, piece_to_write

Writer = Callable[[Path], object]
TOKENIZER = "tokenizer"  # no file, but several


@dataclass
class _Job:
    """A checkpoint under way. parts: what writes each file of this rank. finite: what must be numbers, or nothing is
    written. files: once they are written, their sums."""

    step: int
    temporary: Path
    meta: dict[str, Any]
    parts: dict[str, Writer] = field(default_factory=dict)
    finite: list[Tensor] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    problem: BaseException | None = None
    thread: threading.Thread | None = None

    def write(self) -> None:
        """Write this rank's files; what goes wrong is kept for `result`."""
        try:
            if not all(bool(torch.linalg.vector_norm(x.float(), torch.inf).isfinite()) for x in self.finite):
                raise UserError(
                    f"the weights of step {self.step} are not finite. Try a lower optim.lr or optim.clip_norm"
                )
            with _told(self.temporary.parent):
                for name, part in self.parts.items():
                    (self.temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    part(self.temporary / name)
            names = {*self.parts} - {TOKENIZER}
            if distributed.rank() == 0:  # a tokenizer has files of names of its own
                names |= {path.name for path in self.temporary.iterdir() if path.is_file() and path.suffix != ".pt"}
            self.files = records(self.temporary, names)
        except BaseException as error:
            self.problem = error

    def result(self) -> dict[str, Any]:
        if self.thread is not None:
            self.thread.join()
        if self.problem is not None:
            raise self.problem
        return self.files


class Saver:
    """Writes the checkpoints of a run, one at a time. `check`: raises UserError where the folder is not ours any more.
    `placed`: called on rank 0 when one has its name.

    Memory: with `asynchronous`, a copy of what this rank writes (weights, average, optimizer state, table) on the host,
    kept for the next one.
    """

    def __init__(
        self, run: Path, asynchronous: bool, check: Callable[[], None] = lambda: None,
        placed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.run, self.asynchronous, self._check, self._placed = Path(run), asynchronous, check, placed
        self._job: _Job | None = None
        self._copies: dict[str, Tensor] = {}

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is on its way, which `finish` ends (the same answer on every rank)."""
        return self._job is not None

    @property
    def written(self) -> bool:
        """Whether this rank has nothing more to write: `finish` would not wait for it."""
        return self._job is None or self._job.thread is None or not self._job.thread.is_alive()

    def start(self, state: TrainState) -> None:
        """Begin RUN/step-N (a collective), after the end of the one before. UserError where one cannot be written."""
        self.finish()
        temporary = self.run / f".step-{state.step:08d}.tmp"
        totals = sum((Counter(counters) for counters in distributed.gather_objects(state.counters)), Counter())
        meta = {
            "step": state.step, "batch": state.position.batch, "layout": state.layout, "vlcl": __version__,
            "counters": dict(totals), "window": state.meter.saved(), "anomalies": asdict(state.anomalies),
        }  # fmt: skip

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            with _told(self.run):
                temporary.mkdir(parents=True)

        job = _Job(state.step, temporary, meta)
        try:
            distributed.on_first(begin)
        except UserError as error:
            raise self._failed(job, error) from None
        job.parts, job.finite = _parts(state, self._copied if self.asynchronous else _as_it_is)
        if state.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # the copies
        self._job = job
        if self.asynchronous:
            job.thread = threading.Thread(target=job.write, name="checkpoint", daemon=True)
            job.thread.start()
        else:
            job.write()
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is on its way, if any, and put it in its place (a collective). UserError where
        it cannot be written; then nothing has changed."""
        job, self._job = self._job, None
        if job is None:
            return
        folder = self.run / f"step-{job.step:08d}"

        def put_in_place() -> None:
            self._check()
            with _told(self.run):
                shutil.rmtree(folder, ignore_errors=True)
                job.temporary.rename(folder)
                sync(self.run)
            self._placed()

        try:
            parts = distributed.together(job.result)
            files = {name: record for part in parts for name, record in part.items()}
            distributed.on_first(lambda: seal(job.temporary, job.meta, files))
        except UserError as error:
            raise self._failed(job, error) from None
        try:
            distributed.on_first(put_in_place)
        except UserError as error:
            raise UserError(f"the checkpoint of step {job.step} could not be renamed to {folder}: {error}") from None

    def rescue(self) -> None:
        """As a run fails, maybe on this rank alone: put in its place what is on its way, where that needs no other
        rank."""
        if distributed.world_size() == 1:
            with suppress(UserError):
                self.finish()
        elif self._job is not None and self._job.thread is not None:
            self._job.thread.join()

    def _failed(self, job: _Job, error: UserError) -> UserError:
        if distributed.rank() == 0:
            shutil.rmtree(job.temporary, ignore_errors=True)
        kept = complete_steps(self.run)
        return UserError(
            f"the checkpoint of step {job.step} could not be written to {self.run}: {error}, then go on with "
            f"resume=latest. {f'The last good one is {kept[-1]}' if kept else 'There is none before it'}"
        )

    def _copied(self, name: str, x: Tensor) -> Tensor:
        """On the host, in memory that is kept: new pages cost as much as the copy, and from pinned ones a GPU need not
        wait for each tensor."""
        there = self._copies.get(name)
        if there is None or there.shape != x.shape or there.dtype != x.dtype:
            there = self._copies[name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return there.copy_(x.detach(), non_blocking=True)


Copy = Callable[[str, Tensor], Tensor]


def _as_it_is(name: str, x: Tensor) -> Tensor:
    del name
    return x.detach().cpu().contiguous()


def _parts(state: TrainState, copied: Copy) -> tuple[dict[str, Writer], list[Tensor]]:
    """What this rank writes, by the names of the files, and tensors of it that must be finite. Rank 0 has all that is
    the same on every rank; of sharded weights each rank has its own pieces. No collective."""
    own = {
        "counters": dict(state.counters),
        "cursors": dict(state.position.cursors),
        "torch": random_state(state.accelerator.device),
        "numpy": json.dumps(np.random.get_state(legacy=False), default=np.ndarray.tolist),
        "python": random.getstate(),
    }
    parts: dict[str, Writer] = {f"rank-{distributed.rank():05d}.pt": lambda path: torch.save(own, path)}
    for name, tensors in state.memory.files().items():
        parts[f"{TABLE}/{name}"] = partial(_save, _copy_all(tensors, f"{TABLE}/{name}", copied))
    finite = (_add_pieces if is_sharded(state.built.encoder) else _add_whole)(parts, state, copied)
    if distributed.rank() == 0:
        config, tokenize = state.built.config, state.built.tokenize
        parts[CONFIG] = lambda path: path.write_text(json.dumps(config, indent=2) + "\n")
        if isinstance(tokenize, HFTokenizer):
            parts[TOKENIZER] = lambda path: tokenize.save_pretrained(path.parent)  # open_clip looks for it beside them
    return parts, finite


def _add_whole(parts: dict[str, Writer], state: TrainState, copied: Copy) -> list[Tensor]:
    """Weights, average and optimizer state, on rank 0."""
    if distributed.rank() != 0:
        return []
    kept = {name: _copy_all(tensors, name, copied) for name, tensors in _weights(state).items()}
    parts |= {name: partial(_save, tensors) for name, tensors in kept.items()}
    scaler = state.accelerator.scaler.state_dict() if state.accelerator.scaler is not None else None
    optimizer = _copy_all({"optimizer": state.optimizer.state_dict(), "scaler": scaler}, OPTIMIZER, copied)
    parts[OPTIMIZER] = lambda path: torch.save(optimizer, path)
    moments = [x for values in optimizer["optimizer"]["state"].values() for x in values.values()]
    return [x for x in (*kept[WEIGHTS].values(), *moments) if isinstance(x, Tensor) and x.numel()]


def _add_pieces(parts: dict[str, Writer], state: TrainState, copied: Copy) -> list[Tensor]:
    """This rank's pieces of weights, average and moments."""
    if (place := piece_to_write(state.built.encoder)) is None:
        return []
    optimizer = state.optimizer.state_dict()
    moments = {f"{i}/{name}": x for i, values in optimizer["state"].items() for name, x in values.items()}
    kept = {name: _cut(tensors, name, copied) for name, tensors in (_weights(state) | {OPTIMIZER: moments}).items()}
    parts |= {f"{folder_of(name)}/{file_name(*place)}": partial(save_pieces, x) for name, x in kept.items()}
    if distributed.rank() == 0:
        groups = json.dumps(optimizer["param_groups"], indent=2) + "\n"
        parts[f"{folder_of(OPTIMIZER)}/{GROUPS}"] = lambda path: path.write_text(groups)
    return [x.rows for name in (WEIGHTS, OPTIMIZER) for x in kept[name].values() if x.rows.numel()]


def _cut(tensors: dict[str, Tensor], name: str, copied: Copy) -> dict[str, Piece]:
    """What this rank writes of the tensors. The first file has them all by name, and what is not in pieces."""
    found = {}
    for key, x in tensors.items():
        rows = own_rows(x) if in_pieces(x) else range(0)
        if rows or distributed.rank() == 0:
            found[key] = Piece(copied(f"{name}/{key}", local(x)), rows.start, tuple(x.shape))
    return found


def _weights(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """By the names of files: the weights, and their average where there is one."""
    found = {WEIGHTS: dict(state.built.encoder.clip.state_dict())}
    if state.averaged is not None:
        found[AVERAGED] = dict(cast(DualEncoder, state.averaged.module).clip.state_dict())
    return found


def _copy_all(value: Any, name: str, copied: Copy) -> Any:
    """Nested records with their tensors copied; nothing in it changes with the next step."""
    if isinstance(value, Tensor):
        return copied(name, value)
    if isinstance(value, dict):
        return {key: _copy_all(x, f"{name}/{key}", copied) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy_all(x, f"{name}/{i}", copied) for i, x in enumerate(value))
    return copy.deepcopy(value)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What a write may raise, as a UserError of one line. torch.save raises RuntimeError on a full disk."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{reason(error, folder)}. Make room") from None
