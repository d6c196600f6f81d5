"""What a run does about an anomaly (vlcl/anomalies.py finds it): stop, leave the step out, or go back and leave out the
batches that led there. `train.on_anomaly` says which; all ranks do the same, since all have found the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlcl import anomalies, distributed
from vlcl.anomalies import FOLDER, NOT_FINITE, in_words
from vlcl.batch import Batch
from vlcl.checkpoint import TrainState, complete_steps, load_checkpoint, step_of
from vlcl.errors import UserError, reason
from vlcl.logs import RunLog
from vlcl.losses import LossOutput
from vlcl.run import Run
from vlcl.run_folder import first_whole, set_aside_after
from vlcl.sharding import whole

WISHES = ("stop", "written")  # of a rank, which travel with the numbers of a step
NO_METRICS = (*WISHES, "objective", "logit_scale")  # the last one is logged as it is at a log line


@dataclass
class Outcome:
    """The numbers of one step: value_M, means over the ranks, by name. A read waits for the device, which is why a step
    is judged while the next one waits for its batch. found: once it is judged, the anomalies. row_B, pair_loss_B: of
    this rank's pairs, the latter None where the loss has none."""

    step: int
    names: tuple[str, ...]
    value_M: Tensor
    row_B: Tensor
    pair_loss_B: Tensor | None
    found: tuple[str, ...] | None = None
    left_out: bool = False

    @property
    def metrics(self) -> dict[str, Tensor]:
        return {name: x for name, x in zip(self.names, self.value_M.unbind()) if name not in NO_METRICS}

    def read(self) -> dict[str, float]:
        return dict(zip(self.names, self.value_M.tolist()))


def outcome_of(run: Run, batch: Batch, outs: Sequence[LossOutput], norm: Tensor | None) -> Outcome:
    """Of this step (a collective): its loss (the mean of chunks that have negatives of their own), the
    loss's metrics, the gradient's norm, logit_scale; and whether a rank was asked to stop, or has written its part of a
    checkpoint."""
    values = {name: torch.stack([out.metrics[name] for out in outs]).mean() for name in outs[0].metrics}
    values["objective"] = torch.stack([out.loss.detach() for out in outs]).mean()
    if norm is not None:
        values["grad_norm"] = whole(norm)
    values["logit_scale"] = run.state.built.encoder.clip.logit_scale.detach().exp()
    for name, wish in zip(WISHES, (run.stop.asked is not None, run.saver.written)):
        values[name] = values["objective"].new_full((), float(wish))  # filled on the device: no wait for it
    names = tuple(sorted(values))
    means = distributed.all_mean(torch.stack([values[name].detach().float().reshape(()) for name in names]))
    pairs = [out.pair_loss_B for out in outs if out.pair_loss_B is not None]
    return Outcome(run.state.step + 1, names, means, batch.row_B, torch.cat(pairs) if pairs else None)


def takes_no_step(run: Run, outcome: Outcome) -> bool:
    """Whether train.on_anomaly=skip leaves this step out (the same answer on every rank). Only then, and there at the
    price of a wait for the device, is a step judged before its update."""
    if run.config.train.on_anomaly == "skip":
        past = run.state.anomalies
        outcome.found = past.judge(outcome.read(), run.limits)
        outcome.left_out = bool(past.acts_on(outcome.found, run.limits))
    return outcome.left_out


class Undo:
    """What a forward pass and an E-step have changed by the time that a step is judged: BatchNorm's statistics, what
    the loss remembers."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.buffers = [(x, x.clone()) for x in state.built.encoder.buffers()]
        state.memory.begin()

    def __call__(self) -> None:
        self.state.memory.take_back()
        for now, before in self.buffers:
            now.copy_(before)
        self.state.optimizer.zero_grad()
        if self.state.accelerator.scaler is not None:
            self.state.accelerator.scaler.update()  # or it would refuse to look at the next gradient


class Rewind(Exception):
    """The run is to go back, and to leave out the batches of these steps."""

    def __init__(self, steps: frozenset[int]) -> None:
        super().__init__(f"back before step {min(steps)}")
        self.steps = steps


def settle(run: Run, log: RunLog) -> None:
    """Look at what the last step has found (a collective): tell and count it, and stop or go back where that is asked
    for. Raises UserError, on every rank, or Rewind."""
    for text in run.mirror.news():
        log.message(text)
    outcome, run.outcome = run.outcome, None
    if outcome is None:
        return
    values, past = outcome.read(), run.state.anomalies
    run.told_to_stop |= values["stop"] > 0
    if run.saver.busy and values["written"] == 1.0:  # on all ranks
        run.saver.finish()
    if outcome.found is None:
        outcome.found = past.judge(values, run.limits)
    for kind in outcome.found:
        if kind in ("clip", "scale", "drift") and past.counts[kind] == 1:
            log.message(f"note: {in_words(kind, values, run.limits)}")
    sudden = [kind for kind in outcome.found if kind in (*NOT_FINITE, "spike")]
    if sudden:
        _act(run, log, outcome, values, sudden)
    past.in_a_row = past.in_a_row + 1 if outcome.left_out else 0


def _act(run: Run, log: RunLog, outcome: Outcome, values: dict[str, float], kinds: list[str]) -> None:
    past, most, step = run.state.anomalies, run.config.train.max_anomalies, outcome.step
    acts = bool(past.acts_on(kinds, run.limits))
    action = run.config.train.on_anomaly if acts else "none"
    # A loss is that of the weights that the step before has made: either batch may be to blame.
    steps = frozenset({step} if kinds == ["gradient"] else {step - 1, step}) - {0}
    left_out = sorted(steps) if action == "rewind" else [step] * (action == "skip")
    content = {
        "kinds": kinds, "action": action, "left_out": left_out,
        "loss": anomalies.finite(values["objective"]), "infonce": anomalies.finite(values.get("infonce", 0.0)),
        "grad_norm": anomalies.finite(values.get("grad_norm", 0.0)),
    }  # fmt: skip
    file = write_rows(run, outcome, content)
    what = f"step {step}: {_told(kinds, values, past.mean)}"
    if action == "skip" and past.in_a_row + 1 >= most:
        run.saver.finish()
        raise UserError(f"{what}; {most} steps in a row were left out (train.max_anomalies). {_advice(file)}")
    if action == "rewind" and past.rewinds >= most:
        run.saver.finish()
        raise UserError(f"{what}; the run went back {most} times before (train.max_anomalies). {_advice(file)}")
    if action == "rewind":
        log.message(f"{what}. Its rows: {file}")
        raise Rewind(steps)
    if action == "stop":
        run.saver.finish()
        if "loss" in kinds:  # a checkpoint of the step before is written by the very update that led here
            distributed.on_first(lambda: set_aside_after(run.folder, step - 2))
            run.mirror.go_back(step - 2)
        raise UserError(f"{what}. No checkpoint was written since. {_advice(file)}")
    log.message(f"note: {what}; {'the step is left out' if action == 'skip' else 'the run goes on'}. Its rows: {file}")


def _told(kinds: list[str], values: dict[str, float], mean: float) -> str:
    if "loss" in kinds:
        return "the loss is not finite"
    if "gradient" in kinds:
        return "the gradient is not finite"
    return f"the loss has a spike (in-batch InfoNCE {values['infonce']:.3f}, its mean is {mean:.3f})"


def _advice(file: Path | None) -> str:
    return (
        f"The rows of its batch are in {file} (to see them: vlcl data show). Try a lower optim.lr, a longer "
        "optim.warmup, optim.clip_norm, train.precision=bf16 or fp32, or train.on_anomaly=skip or rewind, then go on "
        "from the last good step with resume=latest"
    )


def write_rows(run: Run, outcome: Outcome, content: dict[str, object]) -> Path | None:
    """RUN/anomalies/step-N.json with the rows of the global batch, in rank order (a collective)."""
    losses = None if outcome.pair_loss_B is None else [anomalies.finite(x) for x in outcome.pair_loss_B.tolist()]
    parts = distributed.gather_objects((outcome.row_B.tolist(), losses))
    file: list[Path | None] = [None]

    def write() -> None:
        rows = [row for part, _ in parts for row in part]
        whole = content | {"rows": rows, "ranks": len(parts)}
        if losses is not None:
            whole["losses"] = [loss for _, part in parts for loss in part or ()]
        try:
            file[0] = anomalies.dump(run.folder, outcome.step, whole, bounded=content["action"] in ("none", "skip"))
        except OSError as error:
            raise UserError(f"{run.folder / FOLDER} could not be written: {reason(error)}") from None

    distributed.on_first(write)
    return distributed.broadcast(file[0])


def go_back(run: Run, log: RunLog, steps: frozenset[int]) -> None:
    """Put the run where its newest whole checkpoint before `steps` left it (a collective). UserError without one."""
    state = run.state
    run.saver.finish()
    folders = distributed.broadcast([x for x in complete_steps(run.folder)[::-1] if step_of(x) < min(steps)])
    folder, passed_over = first_whole(folders)
    if folder is None:
        raise UserError(
            f"train.on_anomaly=rewind finds no checkpoint before step {min(steps)} to go back to. "
            f"{_advice(run.folder / FOLDER / f'step-{max(steps):08d}.json')}, or set a smaller checkpoint.every"
        )
    for text in passed_over:
        log.message(text)
    distributed.on_first(lambda: set_aside_after(run.folder, step_of(folder)))
    run.mirror.go_back(step_of(folder))
    state.optimizer.zero_grad()
    load_checkpoint(folder, state)
    recall(run)
    run.outcome, run.saved = None, state.step
    log.go_back(state.step)
    names = ", ".join(map(str, sorted(run.left_out)))
    log.message(f"back to {folder}; the batches of steps {names} are left out")


def recall(run: Run) -> None:
    """What rewinds from later steps than this one have found: their batches are left out, and they count."""
    found = distributed.broadcast(anomalies.rewinds_after(run.folder, run.state.step))
    past = run.state.anomalies
    run.left_out = frozenset[int]().union(*(one.left_out for one in found))
    past.rewinds += len(found)
    for kind in (kind for one in found for kind in one.kinds):
        past.counts[kind] = past.counts.get(kind, 0) + 1
