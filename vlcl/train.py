"""`vlcl train`: build, loop, train_step. Pretrains a dual encoder on image-text shards; one process or many.

vlcl train configs/emoji.yaml optim.lr=1e-3                      one process
accelerate launch -m vlcl.train configs/emoji.yaml               all GPUs of this machine, or of several
"""

from __future__ import annotations

import logging
import math
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":  # as soon as it is imported torch reads it
    import gc

    from vlcl.environment import let_threads_sleep

    let_threads_sleep()
    gc.disable()  # until the command has imported the rest (vlcl.environment.uncollected)

import torch

from vlcl import distributed
from vlcl.batch import Batch
from vlcl.checkpoint import TrainState, best_step, prune
from vlcl.config import Config, load_config
from vlcl.data.stages import DROPPED, StageFunction, bad_share_message
from vlcl.data.stream import Failure, make_loader
from vlcl.environment import memory_used
from vlcl.errors import UserError, first_line, reason
from vlcl.evaluation import evaluate, evaluated
from vlcl.from_config import make_stream
from vlcl.logs import RunLog, is_news
from vlcl.losses import LossOutput
from vlcl.optim import rate_factor, set_learning_rate
from vlcl.recovery import Outcome, Rewind, Undo, go_back, outcome_of, recall, settle, takes_no_step
from vlcl.report.page import write_report
from vlcl.run import Run, build
from vlcl.stop import Stopped
from vlcl.trace import Trace


def em_step(run: Run, batch: Batch) -> LossOutput:
    """E-step, and the gradient of the M-step, on this rank's B of the G pairs."""
    memory, part = run.state.memory, run.state.meter.part
    features = run.towers.forward(batch)
    with part("collectives"):
        peers = distributed.gather_peers(features, batch.row_B, caption_B=batch.caption_B)  # all ranks', as constants
        aux = memory.read(peers.row_G)
    with part("loss"):
        out = run.loss(features, peers, aux, run.state.step)  # log-normalizers, then the surrogate that they weight
    run.towers.backward(out.loss)
    memory.write(peers.row_G, out.aux)
    return out


def train_step(run: Run, batch: Batch) -> Outcome:
    """One step of stochastic EM. Returns its numbers; with train.on_anomaly=skip, a step whose numbers are no good has
    changed nothing."""
    state, optim = run.state, run.config.optim
    undo = Undo(state) if run.config.train.on_anomaly == "skip" else None
    outs = [em_step(run, part) for part in run.towers.parts(batch)]  # one part, but for train.negatives=chunk
    norm = run.accelerator.clip_grad_norm_(run.towers.parameters, optim.clip_norm or math.inf)
    outcome = None
    if undo is not None:
        outcome = outcome_of(run, batch, outs, norm)
        if takes_no_step(run, outcome):
            undo()
            return outcome
    set_learning_rate(state.optimizer, rate_factor(state.step, run.total_steps, optim))
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.built.encoder.clamp_logit_scale(run.config.model.logit_scale_max)
    if state.averaged is not None:
        state.averaged.update_parameters(state.built.encoder)
    return outcome or outcome_of(run, batch, outs, norm)


@distributed.lost_ranks_told()
def train(config: Config, stages: Sequence[StageFunction] = ()) -> dict[str, float]:
    """Run `config` to its end (a collective). Returns the last evaluation's metrics. Raises UserError, and Stopped
    where SIGTERM, SIGUSR1 or Ctrl-C ended the run before: its last step is saved then. `stages`: of training
    samples, after those of data.stages."""
    run = build(config, stages)
    first, start = distributed.rank() == 0, time.monotonic()
    try:
        log = RunLog(run.folder, config.log.trackers, config.shareable(), run.total_steps, first, run.state.step)
        with log, run.stop, run.mirror.at_work(log.message):
            for text in run.messages:
                log.message(text)
            if config.train.on_anomaly == "rewind" and run.state.step:
                recall(run)
            try:
                with run.watch:
                    results = loop(run, log)
            except UserError:
                run.saver.rescue()
                raise
            except OSError as error:
                run.saver.rescue()
                raise UserError(
                    f"{run.folder} could not be written: {reason(error)}. Make room, then resume=latest"
                ) from None
            finally:  # an interrupted run has a report, too, unless it has nothing to tell or no room
                report = last_report(run.folder) if first else ""
            if first and (best := best_step(run.folder, config.checkpoint.keep_best)):
                log.message(f"best by {config.checkpoint.keep_best}: {best}")
            log.message(f"{how_it_ended(run)}, {(time.monotonic() - start) / 60:.1f} minutes; {report}")
            if first and run.state.step >= run.total_steps:
                log.message(f"next: vlcl export {shlex.quote(str(run.folder))} OUT")
        distributed.barrier()
    except RuntimeError as error:  # raised by torch's handler of SIGCHLD, wherever this process is
        if "DataLoader worker" not in str(error):
            raise
        raise worker_has_gone(error) from None
    finally:
        run.lock.release()
    if run.state.step < run.total_steps:
        raise Stopped(run.stop.asked or signal.SIGTERM)  # of another rank
    return results


def how_it_ended(run: Run) -> str:
    step, asked = run.state.step, run.stop.asked
    if step >= run.total_steps:
        return f"done: {step} steps"
    by = asked.name if asked else "another rank"
    go_on = "the same command with resume=latest" if step else "the same command; no step was taken"
    return f"stopped by {by} after step {step} of {run.total_steps}; to go on: {go_on}"


def last_report(folder: Path) -> str:
    """Write the report of a run that ends. Returns what the run says of it: a report that could not be written is no
    reason to fail."""
    try:
        return f"report: {write_report(folder)}"
    except (UserError, OSError) as error:
        return f"the report could not be written: {error}. To try again: resume=latest"


def loop(run: Run, log: RunLog) -> dict[str, float]:
    """Steps to the end of the run, from an earlier one where train.on_anomaly=rewind asks for it."""
    if run.state.step == 0:
        fill_rows(run, log)
    while True:
        try:
            return steps(run, log)
        except Rewind as back:
            go_back(run, log, back.steps)


def steps(run: Run, log: RunLog) -> dict[str, float]:
    """Steps from where `run.state` stands to the end, with its log lines, evaluations and checkpoints."""
    config, state, results = run.config, run.state, {}
    batches = batches_of(run)
    trace = Trace(run.folder, config.train.profile if log.enabled else None, log.message)
    # where it was stopped before an evaluation had ended
    if is_due(config.eval.every, state.step) and not evaluated(run, last=False):
        results = evaluate(run, log, last=False)
    state.meter.restart_clock()
    while state.step < run.total_steps:
        asked = time.perf_counter()
        run.watch.at(f"step {state.step + 1}: waiting for a batch")
        batch = next(batches)
        waited = time.perf_counter() - asked
        run.watch.at(f"step {state.step + 1}: computing it with the other ranks")
        settle(run, log)  # one step late: its numbers are at hand without stopping the device
        if run.told_to_stop:
            trace.finish()
            return stopped(run)
        count(state, batch)
        trace.before(state.step + 1)
        if state.step + 1 not in run.left_out:
            run.outcome = train_step(run, batch.to(run.accelerator.device))
            if not run.outcome.left_out:
                state.meter.add(run.outcome.metrics)
        state.meter.passed(len(batch), waited)
        state.step, state.position = state.step + 1, state.position.after(batch)
        last = state.step == run.total_steps
        if state.step % config.train.log_every == 0 or last:
            settle(run, log)
            values = state.meter.flush()
            log.metrics(state.step, values | run.arithmetic.speeds(values) | status(run))
        if is_due(config.checkpoint.every, state.step) or last:
            settle(run, log)
            save(run)
        if is_due(config.eval.every, state.step) and not last:
            finish_save(run)
            results = evaluate(run, log, last=False)
            state.meter.restart_clock()
    trace.finish()
    finish_save(run)
    if not evaluated(run, last=True):
        results = evaluate(run, log, last=True)
    delete_old(run)
    return results


def stopped(run: Run) -> dict[str, float]:
    """Save the last step, so that nothing is lost; no results."""
    if run.saved != run.state.step:
        save(run)
    finish_save(run)
    return {}


@torch.no_grad()
def fill_rows(run: Run, log: RunLog) -> None:
    """`loss.warm` passes over the data with frozen weights, so that the first update finds every row written. At the
    rate that a schedule ends with, so that several passes are averaged."""
    passes, memory, encoder = run.config.loss.warm_passes, run.state.memory, run.state.built.encoder
    if not passes:
        return
    encoder.eval()
    started, batches = time.monotonic(), batches_of(run)
    for _ in range(passes * run.layout.steps_per_epoch):
        run.watch.at("loss.warm: waiting for a batch")
        batch = next(batches).to(run.accelerator.device)
        for part in run.towers.parts(batch):
            features = run.towers.forward(part)
            peers = distributed.gather_peers(features, part.row_B, caption_B=part.caption_B)
            memory.write(peers.row_G, run.loss(features, peers, memory.read(peers.row_G), run.total_steps).aux)
    encoder.train()
    written = 0 if memory.table is None else memory.table.rows_written
    minutes = (time.monotonic() - started) / 60
    log.message(f"loss.warm={passes}: {written:,} of {run.sources.num_samples:,} rows written, {minutes:.1f} minutes")


def is_due(every: int | None, step: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


def save(run: Run) -> None:
    """Begin a checkpoint. Those it replaces go when the next one is due: by then the losses since have shown that it is
    good."""
    finish_save(run)
    run.watch.at(f"step {run.state.step}: saving it")
    delete_old(run)
    with run.state.meter.part("checkpoint"):
        run.saver.start(run.state)
    run.saved = run.state.step


def finish_save(run: Run) -> None:
    """Wait for the end of the checkpoint that was begun last."""
    run.watch.at(f"step {run.state.step}: waiting for the checkpoint of step {run.saved} to be written")
    with run.state.meter.part("checkpoint"):
        run.saver.finish()


def delete_old(run: Run) -> None:
    """The checkpoints that nothing keeps, if the folder is still this run's."""
    distributed.on_first(run.lock.check)
    rule = run.config.checkpoint.model_dump(include={"keep", "keep_every", "keep_best"})
    prune(run.folder, **rule, spare=run.mirror.sending)


def worker_has_gone(error: Exception) -> UserError:
    why = first_line(error).rstrip(". ")
    return UserError(
        f"a data worker has gone: {why}. The system ends processes where memory is short: try fewer data.workers or a "
        "smaller data.shuffle, then go on with resume=latest"
    )


def batches_of(run: Run) -> Iterator[Batch]:
    reader, start = run.readers["train"], run.state.position
    stream = make_stream(run.config, run.sources, run.layout, reader, start, run.stages)
    loader = iter(make_loader(stream, run.workers, run.accelerator.device))
    while True:
        try:
            item = next(loader)
        except (ConnectionError, EOFError) as error:  # what it sent last cannot be fetched any more
            raise worker_has_gone(error) from None
        if isinstance(item, Failure):
            raise UserError(item.message)
        yield item


def count(state: TrainState, batch: Batch) -> None:
    """Add a batch to this rank's account of samples."""
    counters = Counter(state.counters)
    counters.update({"seen": len(batch), "repeated": batch.repeated, "truncated": batch.truncated})
    counters.update({f"skipped/{reason}": number for reason, number in batch.skipped.items()})
    state.counters = dict(counters)


def status(run: Run) -> dict[str, float]:
    """The numbers of a log line that are no means (a collective); stops the run where too many samples are bad."""
    state, total, memory = run.state, Counter(), 0.0
    for counters, held in distributed.gather_objects((state.counters, memory_used(run.accelerator.device.type))):
        total.update(counters)
        memory = max(memory, held)
    skipped = {name.removeprefix("skipped/"): n for name, n in total.items() if name.startswith("skipped/")}
    bad = sum(n for reason, n in skipped.items() if not reason.startswith(DROPPED))  # what a stage drops is not bad
    limit = run.config.data.max_bad_share
    if bad > limit * (total["seen"] + bad) and bad >= 10:  # a handful at the start is no share yet
        run.saver.finish()
        raise UserError(bad_share_message(skipped, total["seen"] + sum(skipped.values()), limit))
    return {
        "epoch": state.position.batch / run.layout.steps_per_epoch,
        "train/lr": state.optimizer.param_groups[0]["lr"],
        "train/logit_scale": float(state.built.encoder.clip.logit_scale.detach().exp()),
        "speed/memory": memory,
        "data/skipped": sum(skipped.values()),
        "data/repeated": total["repeated"],
        "data/truncated": total["truncated"],
        "train/anomalies": sum(state.anomalies.counts.values()),
        **{f"train/anomalies/{kind}": n for kind, n in state.anomalies.counts.items()},
        **{f"data/skipped/{reason}": n for reason, n in skipped.items()},
    }


def main(config_path: str, overrides: Sequence[str] = ()) -> None:
    """The command: load the config, train, leave the process group. What a signal has stopped went well: exit code 0;
    for Ctrl-C it is 130."""
    logging.getLogger().addFilter(is_news)
    try:
        train(load_config(config_path, overrides))
    except Stopped as stopped:
        if stopped.number == signal.SIGINT:
            raise KeyboardInterrupt from None
    finally:
        distributed.shutdown()


class _Callable(ModuleType):
    """`vlcl.train` is this module as soon as it is imported, and the public function: so it can be called as it."""

    def __call__(self, config: Config, stages: Sequence[StageFunction] = ()) -> dict[str, float]:
        return train(config, stages)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    from vlcl.cli import app

    app(["train", *sys.argv[1:]], prog_name="vlcl")
