"""What a run is made of: from a Config to a Run, with all that a user can get wrong checked before the run folder is
touched. vlcl/train.py runs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel

from vlcl import distributed
from vlcl.accumulate import Towers
from vlcl.anomalies import Limits
from vlcl.checkpoint import TrainState, load_checkpoint
from vlcl.config import Config
from vlcl.data.order import Layout
from vlcl.data.reader import Reader, Sources
from vlcl.data.stages import Stage, StageFunction
from vlcl.data.stream import cpu_cores, pick_workers
from vlcl.errors import counted
from vlcl.flops import Arithmetic, arithmetic_of
from vlcl.from_config import (
    layout_record,
    make_layout,
    make_loss,
    make_model,
    make_reader,
    make_stages,
    num_steps,
    open_splits,
    ranks_here,
    zeroshot_sets,
)
from vlcl.frozen import keep_features, why_not
from vlcl.labelled import LabelledPictures, open_bank
from vlcl.launcher import make_accelerator, sharding_asked_for
from vlcl.lock import FolderLock
from vlcl.logs import METRICS_FILE, read_metrics
from vlcl.loss_state import LossState
from vlcl.losses import Loss
from vlcl.mirror import Mirror
from vlcl.model import Built, DualEncoder
from vlcl.optim import OF_THE_STEP, averaged_copy, build_optimizer, rate_factor
from vlcl.probe import Labelled
from vlcl.run_folder import begin, resume_folder
from vlcl.saving import Saver
from vlcl.sharding import Sharding, in_words, shard
from vlcl.stop import Stop
from vlcl.views.norm import over_ranks
from vlcl.views.towers import Momentum, ViewEncoder
from vlcl.watch import Watch
from vlcl.zeroshot import open_classes


@dataclass
class Run:
    """What the loop works on; `state` is the part that a checkpoint holds."""

    config: Config
    folder: Path
    accelerator: Accelerator
    sources: Sources
    val: Sources | None
    test: Sources | None
    layout: Layout
    total_steps: int
    towers: Towers
    loss: Loss
    state: TrainState
    readers: dict[str, Reader]  # train, and val and test where there are such pairs
    workers: int
    lock: FolderLock
    mirror: Mirror
    watch: Watch
    saver: Saver
    limits: Limits
    stages: list[Stage] = field(default_factory=list)
    bank: LabelledPictures | None = None
    """pictures with labels that the kNN classifier asks (model.kind=views)"""
    features: dict[tuple[str, int], Labelled] = field(default_factory=dict)
    """of labelled pictures, by name and step: what two evaluations of a step share"""
    messages: list[str] = field(default_factory=list)
    stop: Stop = field(default_factory=Stop)
    saved: int = 0
    """the step of the newest checkpoint that this process knows of, or has begun"""
    outcome: Any = None
    """vlcl/recovery.py's, of the last step, until it is judged"""
    told_to_stop: bool = False
    """whether a rank was asked to stop, as all ranks know"""
    left_out: frozenset[int] = frozenset()
    """steps whose batches are passed over"""
    arithmetic: Arithmetic = field(default_factory=Arithmetic)


def build(config: Config, stages: Sequence[StageFunction] = ()) -> Run:
    """Everything of a run, at its first step or where `config.resume` left it (a collective). `stages`: after those of
    data.stages. Raises UserError."""
    accelerator = make_accelerator(config.train.precision)
    lock, keep = FolderLock(Path(config.train.output)), config.checkpoint
    mirror = Mirror(lock.path.parent, keep.remote, keep=keep.keep, keep_every=keep.keep_every, keep_best=keep.keep_best)
    distributed.on_first(lock.acquire)
    try:
        distributed.on_first(lambda: mirror.open(config.resume, config.train.overwrite))
        return _build(config, accelerator, lock, mirror, make_stages(config, stages))
    except BaseException:
        lock.release()
        raise


def _build(config: Config, accelerator: Accelerator, lock: FolderLock, mirror: Mirror, stages: list[Stage]) -> Run:
    resume, passed_over = resume_folder(config.resume, config.train.output, mirror)
    sources, val, test = open_splits(config.data)
    bank = open_bank(config, sources)
    classes = {name: open_classes(folder) for name, folder in zeroshot_sets(config.eval.zeroshot).items()}
    layout = make_layout(config, sources)
    total_steps = num_steps(config, layout.steps_per_epoch)
    set_seed(config.train.seed)  # the same weights on every rank
    built = make_model(config)
    splits = {"train": sources, "val": val, "test": test}
    readers = {name: make_reader(f"data.{name}", config, pairs, built) for name, pairs in splits.items() if pairs}
    loss = make_loss(config, sources.num_samples, total_steps, layout.steps_per_epoch)
    memory = LossState(loss, sources.num_samples, built.config["model_cfg"]["embed_dim"], accelerator.device)
    twice = config.model.grad_checkpointing
    sharding = sharding_asked_for(config, accelerator, built.encoder)
    obstacle = why_not(config, built.encoder, sharding is not None)
    arithmetic = arithmetic_of(
        built.encoder, built.config, accelerator.device, accelerator.mixed_precision, twice, obstacle is None
    )
    model, optimizer, averaged = make_trainable(config, accelerator, built, sharding)
    record = layout_record(config, sources, layout, loss, stages)
    state = TrainState(built, averaged, optimizer, memory, accelerator, layout, record)
    if isinstance(built.encoder, ViewEncoder):
        momentum = Momentum(config.views.momentum, config.views.momentum_end, total_steps)
        built.encoder.follow(getattr(optimizer, "optimizer", optimizer), lambda: momentum.at(state.step + 1))
    workers = config.data.workers
    if workers is None:
        workers = 0 if readers["train"].at_hand else pick_workers(layout.streams, ranks_here())
    set_seed(config.train.seed, device_specific=True)  # other dropout masks on every rank
    messages = first_words(config, built.encoder, sources, layout, total_steps, workers, accelerator.device)
    messages += [f"note: {built.note}"] if built.note else []
    messages += in_words(built.encoder)
    if config.loss.scale_init is not None and config.model.kind == "clip" and resume is None:
        clip: Any = built.encoder.clip
        messages.append(
            f"note: loss.name={config.loss.name} starts at logit scale {clip.logit_scale.exp().item():.4g} and bias "
            f"{clip.logit_bias.item():.4g} (model.logit_scale_init, model.logit_bias_init)"
        )
    messages += [f"note: eval.zeroshot, {name}: {found.note}" for name, found in classes.items() if found.note]
    if resume is not None:
        messages += [*passed_over, f"going on from {resume}", *load_checkpoint(resume, state)]
        messages += schedule_words(config, resume, state, total_steps)
    if obstacle is None:
        readers = keep_features(
            config, readers, built, accelerator.device, ranks_here(), accelerator.autocast, messages.append
        )
    elif obstacle:
        messages.append(f"note: data.cache keeps pictures, and not what the locked image tower gives: {obstacle}")
    of = "pictures" if config.model.kind == "views" else "pairs"
    about = {
        "pairs": sources.num_samples, f"val_{of}": val.num_samples if val else None,
        f"test_{of}": test.num_samples if test else None, "world_size": layout.world,
        "parameters": sum(p.numel() for p in built.encoder.parameters()), "start_note": built.note,
        "zeroshot_classes": {name: len(found.names) for name, found in classes.items()},
    }  # fmt: skip
    folder = Path(config.train.output)
    begin(folder, config, splits, about, resume, mirror)
    alone = config.train.negatives == "chunk"
    no_sync = accelerator.no_sync if sharding is None else nullcontext  # gradients that wait would be whole
    towers = Towers(model, config.train.accumulate, accelerator.backward, no_sync, alone)
    saver = Saver(folder, config.checkpoint.async_save, lock.check, mirror.send)
    return Run(
        config, folder, accelerator, sources, val, test, layout, total_steps, towers, loss, state, readers, workers,
        lock, mirror, Watch(config.train.timeout, folder, saver.rescue), saver,
        limits_of_run(config, built.encoder, accelerator), stages, bank, messages=messages, saved=state.step,
        arithmetic=arithmetic,
    )  # fmt: skip


def limits_of_run(config: Config, encoder: DualEncoder, accelerator: Accelerator) -> Limits:
    """What is an anomaly in this run."""
    train, learned = config.train, encoder.clip.logit_scale.requires_grad
    return Limits(
        config.optim.clip_norm, train.loss_spike, (1.0, config.model.logit_scale_max) if learned else None,
        accelerator.scaler is not None, train.on_anomaly != "stop",
    )  # fmt: skip


def make_trainable(
    config: Config, accelerator: Accelerator, built: Built, sharding: Sharding | None
) -> tuple[nn.Module, torch.optim.Optimizer, AveragedModel | None]:
    """The towers as the launcher wraps them, their optimizer, their average. The data loader is not accelerate's."""
    cuda = accelerator.device.type == "cuda"
    if cuda or config.model.kind == "views":  # of two towers, ResNets alone have any
        built.encoder.clip = over_ranks(built.encoder.clip, cuda)
    built.encoder.learn_bias(config.loss.learns_bias)
    built.encoder.train()
    settings: dict[str, Any] = config.optim.model_dump(exclude=OF_THE_STEP) | {
        "logit_scale_ratio": config.logit_scale_ratio
    }
    if sharding is not None:
        averaged = averaged_copy(built.encoder, config.train.ema)
        for encoder in (built.encoder, averaged and averaged.module):
            if encoder is not None:
                shard(encoder, sharding, accelerator.device)
        return built.encoder, build_optimizer(built.encoder, **settings), averaged
    built.encoder.to(accelerator.device)
    optimizer = build_optimizer(built.encoder, **settings)
    averaged = averaged_copy(built.encoder, config.train.ema)
    if config.train.compile:
        built.encoder.compile(dynamic=False)  # a batch of training always has the same shape
    model, optimizer = accelerator.prepare(built.encoder, optimizer)
    return model, optimizer, averaged


def first_words(
    config: Config, encoder: nn.Module, sources: Sources, layout: Layout, total_steps: int, workers: int,
    device: torch.device,
) -> list[str]:  # fmt: skip
    lines = [
        f"{counted(sources.num_samples, 'pair')} in {counted(len(sources.urls), 'shard')}, "
        f"{counted(layout.steps_per_epoch, 'step')} an epoch, {counted(total_steps, 'step')}; "
        f"{counted(layout.world, 'rank')} on {device}, {counted(workers, 'data worker')} each"
    ]
    if config.optim.warmup >= total_steps:
        lines.append(f"note: optim.warmup={config.optim.warmup} is not below {total_steps} steps: no step has optim.lr")
    if layout.times_read > 1:
        lines.append(
            f"note: {layout.world} ranks do not divide data.slices={layout.slices}: for the same batches as on any "
            f"other number of ranks, each sample is read and decoded {layout.times_read:.2g} times"
        )
    if config.train.accumulate > 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules()):
        lines.append(
            "note: this model has BatchNorm, which sees one chunk at a time: train.accumulate is not exact for it"
        )
    if device.type == "cpu" and ranks_here() == 1 and torch.get_num_threads() == 1 < cpu_cores():
        lines.append(
            f"note: 1 thread on {cpu_cores()} cores (`accelerate launch` sets that on CPUs): pass it "
            f"--num_cpu_threads_per_process {cpu_cores()}, or use `vlcl train`"
        )
    return lines


def schedule_words(config: Config, resume: Path, state: TrainState, total_steps: int) -> list[str]:
    """What becomes of the schedules of a run that goes on with another length, or another rate, than it had."""
    step, now = state.step, f"{total_steps:,} steps"
    if step > total_steps:
        return [
            f"note: {step:,} steps are done, and this run is of {now}: nothing is left to train. To train on: "
            f"train.steps=NUMBER above {step}; to go back: resume={resume.parent}/step-N"
        ]
    lines = read_metrics(resume.parent) if (resume.parent / METRICS_FILE).is_file() else []
    before = next((line["total_steps"] for line in reversed(lines) if line.get("total_steps")), total_steps)
    group = state.optimizer.param_groups[0]
    was, rate = group["lr"], group["peak_lr"] * rate_factor(step, total_steps, config.optim)
    old = group["peak_lr"] * rate_factor(step - 1, before, config.optim)
    if step == total_steps or (before == total_steps and math.isclose(old, was, rel_tol=1e-3)):
        return []
    what = (
        f"the run was of {before:,} steps, now it is of {now}" if before != total_steps else "the rate is another one"
    )
    jump = f". To go on without a jump: optim.schedule=constant optim.warmup=0 optim.lr={was:.2e}"
    return [
        f"note: {what}: schedules go by the new settings, and the learning rate goes on at {rate:.2e}, where step "
        f"{step:,} had {was:.2e}" + jump * (not math.isclose(rate, was, rel_tol=0.05))
    ]
