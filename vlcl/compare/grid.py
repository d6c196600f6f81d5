"""The cells of `vlcl compare`: from what was asked for to a Config a cell. All that a user can get wrong is said here,
before anything is trained, and most of it before torch is imported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Literal, TypeVar, get_args

from vlcl.config import Config, load_config
from vlcl.errors import UserError
from vlcl.metrics import headline, is_test, on_val, produced

Number = TypeVar("Number", int, float)
ScaleLR = Literal["none", "sqrt", "linear"]

LOSS_SECTIONS = ("loss.", "model.", "optim.")  # what a loss may bring of its own, e.g. the temperature it starts from

# Settings that a comparison sets itself, and what to do instead of overriding them.
OWN_SETTINGS = {
    "loss": "give losses with their settings in --loss, e.g. --loss em,em:gamma=0.5",
    "train.seed": "give seeds in --seeds",
    "train.output": "give the folder in --output",
    "train.overwrite": "to run a cell anew, delete its folder",
    "resume": "unfinished cells go on by themselves",
    "checkpoint.remote": "cells are folders here: copy --output when it is done (aws s3 sync, gcloud storage rsync)",
    "eval.every": "a cell is evaluated once, at its end",
}


@dataclass(frozen=True)
class Grid:
    """What was asked for; the fields are those of `vlcl.compare.command.compare`, seeds being a list."""

    config: str
    losses: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    metric: str | None
    output: str | None
    overrides: tuple[str, ...]
    select_on: str | None = None
    scale_lr: str = "none"
    tune: bool = False
    widen: int = 2
    results: str | None = None
    discard: bool = False
    jobs: int = 1

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/compare-{Path(self.config).stem}")

    @property
    def command(self) -> str:
        """The command line that asks for the same."""
        first = len(self.seeds) > 1 and self.seeds == tuple(range(len(self.seeds)))
        seeds = str(len(self.seeds)) if first else ",".join(map(str, self.seeds)) + "," * (len(self.seeds) == 1)
        options = {
            "--loss": ",".join(self.losses),
            "--batch-size": ",".join(map(str, self.batch_sizes)),
            "--seeds": seeds,
            "--lr": ",".join(map(str, self.lrs)),
            "--scale-lr": self.scale_lr if self.scale_lr != "none" else None,
            "--widen": str(self.widen) if self.tune and self.widen != 2 else None,
            "--metric": self.metric,
            "--select-on": self.select_on,
            "--output": self.output,
            "--results": self.results,
            "--jobs": str(self.jobs) if self.jobs > 1 else None,
        }
        given = [word for option, text in options.items() if text for word in (option, text)]
        given += ["--tune"] * self.tune + ["--discard"] * self.discard
        return shlex.join(["vlcl", "compare", self.config, *given, *self.overrides])


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `loss` is the item of --loss that it is labelled with; beyond: how many steps its learning
    rate is above the given ones (below: negative), which is for --tune to ask for."""

    name: str
    loss: str
    batch_size: int
    lr: float
    seed: int
    config: Config
    beyond: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.config.train.output)

    @property
    def steps(self) -> int:
        return self.config.train.steps or 0

    @property
    def samples(self) -> int:
        return self.steps * self.batch_size


@dataclass(frozen=True)
class Data:
    """`samples`: how many a cell is to see, repetitions included; a cell sees this up to half a batch. digests: of the
    manifests of train, val and test; None where there is none."""

    pairs: int
    val_pairs: int
    samples: int
    test_pairs: int = 0
    digests: dict[str, str | None] = field(default_factory=dict)


def parse_losses(text: str) -> list[str]:
    """The items of --loss: `em,infonce,em:gamma=0.5:order=before`."""
    return [item.strip() for item in text.split(",")]


def parse_numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of an option, separated by commas."""
    try:
        return [kind(item) for item in text.split(",")]
    except ValueError:
        kinds = "whole numbers, e.g. 16,64,256" if kind is int else "numbers, e.g. 5e-4,1e-3"
        raise UserError(f"{option} {text}: allowed are {kinds}") from None


def check_grid(grid: Grid) -> None:
    """UserError with every mistake that shows without reading the config."""
    options = {"--loss": grid.losses, "--batch-size": grid.batch_sizes, "--seeds": grid.seeds, "--lr": grid.lrs}
    problems = [f"{option}: give at least one" for option, items in options.items() if not items and option != "--lr"]
    for option, items in options.items():
        twice = [item for item, count in Counter(items).items() if count > 1]
        problems += [f"{option}: {item} is given twice" for item in twice]
    problems += [f"--batch-size {size}: allowed are whole numbers >= 2" for size in grid.batch_sizes if size < 2]
    problems += _check_options(grid)
    for override in grid.overrides:
        key = override.partition("=")[0].strip()
        own = next((own for own in OWN_SETTINGS if key == own or key.startswith(f"{own}.")), None)
        if own:
            problems.append(f"{override}: vlcl compare sets {key} itself; {OWN_SETTINGS[own]}")
    for loss in grid.losses:
        keys = [setting.partition("=")[0] for setting in _split_loss(loss)[1]]
        foreign = [key for key in keys if not key.startswith(LOSS_SECTIONS) or key in ("optim.lr", "optim.warmup")]
        problems += [f"--loss {loss}: {key} is the same for every loss of a comparison" for key in foreign]
    if problems:
        count = f"{len(problems)} mistakes:\n  " if len(problems) > 1 else ""
        raise UserError(count + "\n  ".join(problems))


def _check_options(grid: Grid) -> list[str]:
    """What is wrong with the options that say how the grid is run."""
    return [
        text
        for wrong, text in (
            (grid.scale_lr not in get_args(ScaleLR),
             f"--scale-lr {grid.scale_lr}: allowed are {', '.join(get_args(ScaleLR))}"),
            (grid.tune and len(grid.lrs) < 2,
             "--tune needs two learning rates or more to go on from, e.g. --lr 5e-4,1e-3,2e-3"),
            (grid.widen < 0, f"--widen {grid.widen}: allowed are whole numbers >= 0"),
            (grid.jobs < 1, f"--jobs {grid.jobs}: allowed are whole numbers >= 1"),
            (grid.discard and grid.results is None,
             "--discard deletes the folders of finished cells: give --results FILE.jsonl to keep what they found"),
            (grid.results is not None and Path(grid.results).is_dir(),
             f"--results {grid.results} is a folder; give a file, e.g. {grid.results}/results.jsonl"),
        )
        if wrong
    ]  # fmt: skip


def _split_loss(loss: str) -> tuple[str, list[str]]:
    """Name and settings of an item of --loss: `siglip:model.logit_scale_init=10`, `em:gamma=0.5` (loss.gamma)."""
    name, *settings = loss.split(":")
    return name, [text if "." in text.partition("=")[0] else f"loss.{text}" for text in settings]


def metric_names(config: Config, metric: str | None, option: str = "--metric") -> tuple[str, ...]:
    """The held-out metrics whose mean is compared: `metric`, or else R@1 both ways, of data.test where there is one.
    UserError, with those there are, where the runs lack them."""
    known = produced(config, test=True)
    if not known:
        raise UserError("nothing is held out, so there is nothing to compare: set data.val=SHARDS or eval.zeroshot=DIR")
    names = (metric,) if metric is not None else tuple(made.name for made in headline(config))
    if not set(names) <= set(known):
        near = get_close_matches(names[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near and metric else ""
        wrong = f"{option} {metric}: the runs do not produce it" if metric else "give --metric, as data.val is not set"
        raise UserError(f"{wrong}; they produce {', '.join(known)}{hint}")
    return names


def selecting_names(config: Config, grid: Grid, metric: Sequence[str]) -> tuple[str, ...]:
    """The held-out metrics whose mean chooses the learning rate: --select-on, or else those shown, on data.val.
    UserError where the runs lack them, or they are of data.test and there is something to choose."""
    if grid.select_on is not None:
        names = metric_names(config, grid.select_on, "--select-on")
    else:
        names = tuple(map(on_val, metric)) if config.data.val else tuple(metric)
    if is_test(names[0]) and (grid.select_on or len(grid.lrs) > 1):
        given = f"--select-on {grid.select_on}: " if grid.select_on else ""
        raise UserError(
            f"{given}nothing is chosen on data.test, whose numbers would look too good then; set data.val=SHARDS, on "
            "which learning rates are chosen"
        )
    return names


def make_cells(grid: Grid, base: Config) -> list[Cell]:
    """The cells, of the length of `base` as yet. UserError with every mistake in their settings.

    Seeds vary slowest: a comparison that was interrupted has fewer seeds of everything rather than fewer losses.
    """
    cells, problems = [], {}
    lrs, own_size = grid.lrs or (base.optim.lr,), base.train.batch_size
    places = [
        (size, lr, beyond)
        for size in grid.batch_sizes
        for lr, beyond in rates_of(lrs, size, own_size, grid.scale_lr, grid.tune, grid.widen)
    ]
    for seed, loss, (size, lr, beyond) in product(grid.seeds, grid.losses, places):
        label = re.sub(r"[^\w.+=-]", "_", loss)  # `:` and `/` are no letters of a folder's name
        name = f"{label}-b{size}-lr{lr:g}-s{seed}"
        loss_name, settings = _split_loss(loss)
        own = [
            *settings, f"loss.name={loss_name}", f"train.batch_size={size}", f"optim.lr={lr}", f"train.seed={seed}",
            "train.overwrite=false", "resume=null", "eval.every=null", "checkpoint.remote=null",
            f"train.output={json.dumps(str(grid.folder / name), ensure_ascii=False)}",  # quoted: `7` is a folder, too
        ]  # fmt: skip
        try:
            cells.append(Cell(name, loss, size, lr, seed, load_config(grid.config, [*grid.overrides, *own]), beyond))
        except UserError as error:
            problems.setdefault(str(error), name)
    if problems:
        raise UserError("\n".join(f"cell {name}: {text}" for text, name in problems.items()))
    if twice := [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]:
        raise UserError(f"two cells would have the folder {grid.folder / twice[0]}; give one of them")
    return cells


def rates_of(
    lrs: Sequence[float], batch_size: int, config_batch_size: int, scale: str, tune: bool, widen: int
) -> list[tuple[float, int]]:
    """The learning rates of one batch size, with how many steps each is beyond the given ones (below: negative).

    lrs: for `config_batch_size`. scale: "none", "sqrt" or "linear" in the batch size. tune: in ascending order, `widen`
    more at each end, in the ratio of the neighbours there. Rates that were computed have 6 significant digits, so that
    the name of a cell says its rate exactly.
    """
    growth = batch_size / config_batch_size
    factor = {"none": 1.0, "sqrt": math.sqrt(growth), "linear": growth}[scale]
    rates = [lr if factor == 1 else _rounded(lr * factor) for lr in lrs]
    if not tune:
        return [(lr, 0) for lr in rates]
    rates.sort()
    down, up = rates[0] / rates[1], rates[-1] / rates[-2]
    below = [(_rounded(rates[0] * down**steps), -steps) for steps in range(widen, 0, -1)]
    above = [(_rounded(rates[-1] * up**steps), steps) for steps in range(1, widen + 1)]
    return [*below, *((lr, 0) for lr in rates), *above]


def _rounded(lr: float) -> float:
    return float(f"{lr:.6g}")


def open_data(base: Config, cells: Sequence[Cell]) -> Data:
    """Sizes of the data, and the samples a cell is to see: those of `base`. UserError where a batch does not fit."""
    from vlcl.from_config import make_layout, num_steps, open_splits

    sources, val, test = open_splits(base.data)
    for cell in {cell.batch_size: cell for cell in cells}.values():
        make_layout(cell.config, sources)
    steps = num_steps(base, make_layout(base, sources).steps_per_epoch)
    samples = steps * base.train.batch_size
    digests = {"train": sources.digest, "val": val and val.digest, "test": test and test.digest}
    counts = [held_out.num_samples if held_out else 0 for held_out in (val, test)]
    return Data(sources.num_samples, counts[0], samples, counts[1], digests)


def with_length(cell: Cell, base: Config, samples: int) -> Cell:
    """The cell with the steps that see `samples`, and with a warm-up of as many samples as that of `base`."""
    config, scale = cell.config, base.train.batch_size / cell.batch_size
    warmup = max(round(base.optim.warmup * scale), min(base.optim.warmup, 1))
    train = config.train.model_copy(update={"steps": max(round(samples / cell.batch_size), 1), "epochs": None})
    optim = config.optim.model_copy(update={"warmup": warmup})
    return dataclasses.replace(cell, config=config.model_copy(update={"train": train, "optim": optim}))
