"""`vlcl train`: build, loop, train_step. Pretrains a dual encoder on image-text shards; one process or many.

vlcl train configs/emoji.yaml optim.lr=1e-3                      one process
accelerate launch -m vlcl.train configs/emoji.yaml               all GPUs of this machine, or of several
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":  # as soon as it is imported torch reads it
    from vlcl.environment import let_threads_sleep

    let_threads_sleep()

import torch
from torch import Tensor

from vlcl import distributed
from vlcl.batch import Batch
from vlcl.checkpoint import TrainState, best_step, check_weights, prune, save_checkpoint
from vlcl.config import Config, load_config
from vlcl.data.stream import Failure, TrainStream, bad_share_message, make_loader
from vlcl.errors import UserError, first_line
from vlcl.evaluation import evaluate, evaluated
from vlcl.logs import RunLog, is_news
from vlcl.losses import LossOutput
from vlcl.optim import rate_factor, set_learning_rate
from vlcl.report.page import write_report
from vlcl.run import Run, build
from vlcl.stop import Stopped


def em_step(run: Run, batch: Batch) -> LossOutput:
    """E-step, and the gradient of the M-step, on this rank's B of the G pairs."""
    memory = run.state.memory
    features = run.towers.forward(batch)
    peers = distributed.gather_peers(features, batch.row_B)  # all ranks' pairs, as constants
    aux = memory.read(peers.row_G)
    out = run.loss(features, peers, aux, run.state.step)  # log-normalizers, then the surrogate that they weight
    run.towers.backward(out.loss)
    memory.write(peers.row_G, out.aux)
    return out


def train_step(run: Run, batch: Batch) -> tuple[list[LossOutput], Tensor | None]:
    """One step of stochastic EM. Returns the loss (of each chunk that has negatives of its own) and the gradient's
    norm."""
    state, optim = run.state, run.config.optim
    outs = [em_step(run, part) for part in run.towers.parts(batch)]  # one part, but for train.negatives=chunk
    norm = run.accelerator.clip_grad_norm_(run.towers.parameters, optim.clip_norm or math.inf)
    set_learning_rate(state.optimizer, rate_factor(state.step, run.total_steps, optim))
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.built.encoder.clamp_logit_scale(run.config.model.logit_scale_max)
    if state.averaged is not None:
        state.averaged.update_parameters(state.built.encoder)
    return outs, norm


class Meter:
    """Means of the metrics since the last log line, over steps and ranks; time, and the share of it spent waiting."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.pairs, self.waited, self.started = 0, 0, 0.0, time.perf_counter()

    def add(self, metrics: dict[str, Tensor], pairs: int, waited: float) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps, self.pairs, self.waited = self.steps + 1, self.pairs + pairs, self.waited + waited

    def flush(self) -> dict[str, float]:
        names = sorted(self.sums)
        means = distributed.all_mean(torch.stack([self.sums[name].float() for name in names]) / self.steps).tolist()
        seconds = time.perf_counter() - self.started
        values = {f"train/{name}": mean for name, mean in zip(names, means)}
        values["speed/samples_per_second"] = self.pairs * distributed.world_size() / seconds
        values["speed/data_wait"] = self.waited / seconds
        self.__init__()
        return values


@distributed.lost_ranks_told()
def train(config: Config) -> dict[str, float]:
    """Run `config` to its end (a collective). Returns the last evaluation's metrics. Raises UserError, and Stopped
    where SIGTERM, SIGUSR1 or Ctrl-C ended the run before: its last step is saved then."""
    run = build(config)
    first, start = distributed.rank() == 0, time.monotonic()
    try:
        log = RunLog(run.folder, config.log.trackers, config.model_dump(), run.total_steps, first, run.state.step)
        with log, run.stop:
            for text in run.messages:
                log.message(text)
            try:
                with run.watch:
                    results = loop(run, log)
            except OSError as error:
                raise UserError(f"{run.folder} could not be written: {error}. Make room, then resume=latest") from None
            finally:  # an interrupted run has a report, too, unless it has nothing to tell or no room
                report = last_report(run.folder) if first else ""
            if first and (best := best_step(run.folder, config.checkpoint.keep_best)):
                log.message(f"best by {config.checkpoint.keep_best}: {best}")
            log.message(f"{how_it_ended(run)}, {(time.monotonic() - start) / 60:.1f} minutes; {report}")
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
        return f"done: {run.total_steps} steps"
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
    """Steps from where `run.state` stands to the end, with its log lines, evaluations and checkpoints."""
    config, state = run.config, run.state
    meter, previous, results = Meter(), None, {}
    if state.step == 0:
        fill_rows(run, log)
    batches = batches_of(run)
    # where it was stopped before an evaluation had ended
    if is_due(config.eval.every, state.step) and not evaluated(run, last=False):
        results = evaluate(run, log, last=False)
    while state.step < run.total_steps:
        asked = time.perf_counter()
        run.watch.at(f"step {state.step + 1}: waiting for a batch")
        batch = next(batches)
        waited = time.perf_counter() - asked
        run.watch.at(f"step {state.step + 1}: computing it with the other ranks")
        check_finite(run, previous)  # one step late: its loss is at hand without stopping the device
        if previous is not None and bool(previous[1][1]):  # a rank was asked to stop
            return stopped(run)
        count(state, batch)
        outs, norm = train_step(run, batch.to(run.accelerator.device))
        loss = torch.stack([out.loss.detach() for out in outs]).mean()
        wish = loss.new_full((), float(run.stop.asked is not None))  # filled on the device: no wait for it
        previous = (state.step + 1, distributed.all_mean(torch.stack([loss, wish])), batch)
        metrics = {name: torch.stack([out.metrics[name] for out in outs]).mean() for name in outs[0].metrics}
        meter.add(metrics if norm is None else metrics | {"grad_norm": norm}, len(batch), waited)
        state.step, state.position = state.step + 1, state.position.after(batch)
        last = state.step == run.total_steps
        if state.step % config.train.log_every == 0 or last:
            check_finite(run, previous)
            log.metrics(state.step, meter.flush() | status(run))
        if is_due(config.checkpoint.every, state.step) or last:
            check_finite(run, previous)
            save(run)
        if is_due(config.eval.every, state.step) and not last:
            results = evaluate(run, log, last=False)
            meter = Meter()
    if not evaluated(run, last=True):
        results = evaluate(run, log, last=True)
    delete_old(run)
    return results


def stopped(run: Run) -> dict[str, float]:
    """Save the last step, so that nothing is lost; no results."""
    if run.saved != run.state.step:
        save(run)
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
            peers = distributed.gather_peers(features, part.row_B)
            memory.write(peers.row_G, run.loss(features, peers, memory.read(peers.row_G), run.total_steps).aux)
    encoder.train()
    written = 0 if memory.table is None else memory.table.rows_written
    minutes = (time.monotonic() - started) / 60
    log.message(f"loss.warm={passes}: {written:,} of {run.sources.num_samples:,} rows written, {minutes:.1f} minutes")


def is_due(every: int | None, step: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


def save(run: Run) -> None:
    """A checkpoint, if its weights are numbers. Those it replaces go when the next one is due: by then the losses since
    have shown that it is good."""
    state = run.state
    run.watch.at(f"step {state.step}: saving it")
    if not check_weights(state):
        raise UserError(
            f"the weights of step {state.step} are not finite: no checkpoint is written. Try a lower optim.lr or "
            "optim.clip_norm, then go on from the last good step with resume=latest"
        )
    delete_old(run)
    save_checkpoint(run.folder, state)
    run.saved = state.step


def delete_old(run: Run) -> None:
    """The checkpoints that nothing keeps, if the folder is still this run's."""
    distributed.on_first(run.lock.check)
    prune(run.folder, **run.config.checkpoint.model_dump(exclude={"every"}))


def worker_has_gone(error: Exception) -> UserError:
    why = first_line(error).rstrip(". ")
    return UserError(
        f"a data worker has gone: {why}. The system ends processes where memory is short: try fewer data.workers or a "
        "smaller data.shuffle, then go on with resume=latest"
    )


def batches_of(run: Run) -> Iterator[Batch]:
    stream = TrainStream(run.sources, run.layout, run.readers["train"], run.config.data.shuffle, run.state.position)
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
    state, total = run.state, Counter()
    for counters in distributed.gather_objects(state.counters):
        total.update(counters)
    skipped = {name.removeprefix("skipped/"): n for name, n in total.items() if name.startswith("skipped/")}
    bad, limit = sum(skipped.values()), run.config.data.max_bad_share
    if bad > limit * (total["seen"] + bad) and bad >= 10:  # a handful at the start is no share yet
        raise UserError(bad_share_message(skipped, total["seen"] + bad, limit))
    return {
        "epoch": state.position.batch / run.layout.steps_per_epoch,
        "train/lr": state.optimizer.param_groups[0]["lr"],
        "train/logit_scale": float(state.built.encoder.clip.logit_scale.detach().exp()),
        "data/skipped": bad,
        "data/repeated": total["repeated"],
        "data/truncated": total["truncated"],
        **{f"data/skipped/{reason}": n for reason, n in skipped.items()},
    }


def check_finite(run: Run, previous: tuple[int, Tensor, Batch] | None) -> None:
    """Stop at a loss that is no number, on every rank alike, before anything of it is saved."""
    if previous is None or math.isfinite(float(previous[1][0])):
        return
    step, _, batch = previous
    folder = run.folder / f"nonfinite-step-{step:08d}"
    folder.mkdir(exist_ok=True)
    torch.save(dataclasses.asdict(batch), folder / f"rank-{distributed.rank():05d}.pt")
    suspect = run.folder / f"step-{step - 1:08d}"  # written by the very update that led here
    if distributed.rank() == 0 and suspect.exists():
        suspect.rename(folder / suspect.name)
    distributed.barrier()
    raise UserError(
        f"the loss of step {step} is not finite. Rows {batch.row_B[:8].tolist()}... and the whole batch of each "
        f"rank are in {folder}. No checkpoint was written since. Try a lower optim.lr, a longer "
        "optim.warmup, optim.clip_norm, train.precision=bf16 or fp32, then go on from the last good step with "
        "resume=latest"
    )


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

    def __call__(self, config: Config) -> dict[str, float]:
        return train(config)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    from vlcl.cli import app

    app(["train", *sys.argv[1:]], prog_name="vlcl")
