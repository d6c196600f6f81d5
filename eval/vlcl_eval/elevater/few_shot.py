"""Few- and full-shot measurements of one data set: images once for all of them, then a task a rank at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlcl import distributed
from vlcl.errors import UserError
from vlcl_eval.elevater.head import head_start, merged
from vlcl_eval.elevater.logistic import fit, search_strength
from vlcl_eval.elevater.metrics import metric_of
from vlcl_eval.elevater.probe import Task
from vlcl_eval.elevater.tasks import (
    Outcome,
    Shots,
    Subset,
    draw_subset,
    final_score,
    probe_trainer,
    reference_forwards,
    small_classes,
    tower_trainer,
)
from vlcl_eval.elevater.work import Record, Work, append, images, params, predictions


def few_shot(work: Work, method: str) -> list[Record]:
    """The tasks of one method: images once for all of them, then every rank its share."""
    data = work.data
    if "train" not in data.split_names and any(work.protocol.shots):
        if "train" in data.expected:
            raise UserError(f"{data.name}: {data.folder} has no training split; add it, or zero-shot alone: --shots 0")
        work.say(f"{data.name} has no training split: zero-shot only")
        return []
    tasks = [
        (shots, seed)
        for shots in work.protocol.shots
        if shots != 0
        for seed in (work.protocol.seeds if shots != "full" else (0,))
        if work.missing_modes(method, shots, seed)
    ]
    if not tasks:
        return []
    with merged(work.model, work.protocol.merge) as projection:
        records = _measure_tasks(work, method, tasks, projection)
    return records


def _measure_tasks(work: Work, method: str, tasks: list[tuple[Shots, int]], projection: Tensor | None) -> list[Record]:
    kind = "pixels" if method == "finetune" else "features"
    subsets = {task: draw_subset(work.data, work.data.train, *task) for task in tasks}
    wanted = list(dict.fromkeys(row for subset in subsets.values() for row in subset.rows))
    variant = "" if projection is None else "without its projection"
    train_place, train, fresh = work.extract(kind, work.data.train, wanted, variant)
    _, test, new_test = work.extract(kind, work.test, work.test_rows, variant)
    if method == "finetune":  # it would train a tower whose features are no numbers without noticing
        work.extract("features", work.test, work.test_rows, variant)
    for shots, few in {shots: small_classes(work.data, work.data.train, shots) for shots, _ in tasks}.items():
        if few:
            of = f"{few} of {len(work.data.classes)} classes"
            work.say(f"{work.data.name}, {shots}-shot: {of} have fewer training images, of which all are taken")
    unseen = set(fresh)
    records: list[Record] = []
    for first in range(0, len(tasks), distributed.world_size()):
        runs: list[Run] = []
        for number, task in enumerate(tasks[first : first + distributed.world_size()]):
            new = len(unseen.intersection(subsets[task].rows)) + (len(new_test) if first + number == 0 else 0)
            unseen -= set(subsets[task].rows)  # an image is counted for the first task that needed it
            runs.append(Run(work, method, *task, subsets[task], train_place, train, test, projection, new))
        mine = runs[distributed.rank() : distributed.rank() + 1]
        parts = distributed.together(lambda mine=mine: [record for run in mine for record in run.measure()])
        found = [record for part in parts for record in part]
        append(work, found)
        records += found
    return records


@dataclass
class Run:
    """One (shots, seed) of one method, by one rank. `train_place`: where in `train` a row of the split is."""

    work: Work
    method: str
    shots: Shots
    seed: int
    subset: Subset
    train_place: dict[int, int]
    train: Tensor
    test: Tensor
    projection: Tensor | None
    forwards: int

    def __post_init__(self) -> None:
        # Bad images, which only strict mode leaves out, are in no list of rows.
        self.subset = Subset(*([row for row in rows if row in self.train_place] for rows in self.subset.parts))
        self.targets = self.work.data.targets(self.work.data.train)
        self.test_target = self.work.target()

    def measure(self) -> list[Record]:
        modes = self.work.missing_modes(self.method, self.shots, self.seed)
        if self.method == "logistic":
            return [self.logistic()]
        groups: list[list[str]] = []  # modes whose heads start alike share a training
        for mode in modes:
            heads = [self.work.class_weights(group[0]) for group in groups]
            alike = next((i for i, head in enumerate(heads) if torch.equal(head, self.work.class_weights(mode))), None)
            if alike is None:
                groups.append([mode])
            else:
                groups[alike].append(mode)
        return [record for group in groups for record in self.train_group(group)]

    def rows(self, rows: list[int]) -> Tensor:
        return self.train[[self.train_place[row] for row in rows]]

    def train_group(self, modes: list[str]) -> list[Record]:
        work, started = self.work, time.perf_counter()
        start = head_start(work.protocol.init, work.class_weights(modes[0]), self.projection)
        score = metric_of(work.data.metric, "elevater")
        test = (self.test, self.test_target)
        if self.method == "linear_probe":
            device = work.extractor.device
            trainer = probe_trainer(self.rows, self.targets, self.subset, test, start, score, device)
        else:
            precision = work.extractor.precision
            trainer = tower_trainer(
                work.model, self.train, self.train_place, self.targets, self.subset, test, start, score, precision
            )
        outcome = trainer.measure(work.protocol.setting)
        head = start.weight_CD.numel() + start.bias_C.numel()
        records = []
        for mode in modes:
            record = work.blank(self.method, self.shots, self.seed, mode)
            epoch = outcome.best_epoch if mode == "elevater" else outcome.epochs
            settings = {"lr": outcome.setting.lr, "weight_decay": outcome.setting.weight_decay, "epoch": epoch,
                        "epochs": outcome.epochs, "diverged": outcome.final_diverged}  # fmt: skip
            probability_NC = outcome.best_NC if mode == "elevater" else outcome.last_NC
            records.append(
                work.finish(
                    record, final_score(work.data, mode, outcome, self.test_target), started,
                    settings=settings, search=_search(outcome), sizes=self.sizes(), images=self.images(outcome),
                    params=params(work, head, self.method),
                    predictions=predictions(work, record, probability_NC.cpu(), self.test_target),
                )
            )  # fmt: skip
        return records

    def logistic(self) -> Record:
        """The fast probe. Its penalty is chosen on the same validation images."""
        work, started = self.work, time.perf_counter()
        num_classes, score = len(work.data.classes), metric_of(work.data.metric, "strict")
        train, val, final = self.subset.parts
        task = Task(self.rows(train), self.targets[train], self.rows(val), self.targets[val], score)
        strength, val_score, fits = search_strength(task, num_classes)
        probability_NC = fit(self.rows(final), self.targets[final], self.test, num_classes, strength)
        return work.finish(
            work.blank(self.method, self.shots, self.seed, "strict"),
            100 * score(probability_NC, self.test_target), started, settings={"weight_decay": strength},
            search={"val_score": round(100 * val_score, 4), "runs": fits, "diverged": 0, "failed": []},
            sizes=self.sizes(), images=images(self.forwards, len(final) + len(self.test) - self.forwards, None),
            params=params(work, (self.train.shape[1] + 1) * num_classes, self.method), predictions=None,
        )  # fmt: skip

    def sizes(self) -> dict[str, int]:
        """`small_classes`: those with fewer training images than were asked for."""
        small = small_classes(self.work.data, self.work.data.train, self.shots)
        return {
            "classes": len(self.work.data.classes), "train": len(self.subset.final), "test": len(self.test),
            "small_classes": small,
        }  # fmt: skip

    def images(self, outcome: Outcome) -> dict[str, int | None]:
        runs = len(outcome.choice.scores) if outcome.choice else 0
        reference = reference_forwards(runs, self.subset, len(self.test))
        if self.method == "finetune":  # the tower trains: every image goes through it in every epoch, here as there
            return images(reference, 0, reference)
        return images(self.forwards, len(self.subset.rows) + len(self.test) - self.forwards, reference)


def _search(outcome: Outcome) -> dict[str, Any] | None:
    if outcome.choice is None:
        return None
    return {
        "val_score": round(100 * outcome.choice.score, 4), "runs": len(outcome.choice.scores),
        "diverged": outcome.diverged, "failed": outcome.failed,
    }  # fmt: skip
