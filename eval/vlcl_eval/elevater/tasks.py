"""One few- or full-shot measurement: subset, search, final training, scores. What a rank does by itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlcl.errors import UserError
from vlcl_eval.datasets.records import DataSet, Labels, Split
from vlcl_eval.elevater.finetune import Images, ImageTask, train_tower
from vlcl_eval.elevater.metrics import metric_of
from vlcl_eval.elevater.probe import HeadStart, Task, Trained, train_heads
from vlcl_eval.elevater.sampling import few_shot_subset, train_val_split
from vlcl_eval.elevater.search import Choice, Setting, search
from vlcl_eval.models import EvalModel

SEARCH_EPOCHS, FINAL_EPOCHS = 10, 50
PCAM, PCAM_SEARCH_SHOTS = "patch-camelyon", 10_000  # so large that the benchmark searches on a subset
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

Shots = int | str  # a number, or "full"


@dataclass(frozen=True)
class Subset:
    """Rows of the training split: of the search (`train` and `val`), and of the final training (`final`)."""

    train: list[int]
    val: list[int]
    final: list[int]

    @property
    def parts(self) -> tuple[list[int], list[int], list[int]]:
        return self.train, self.val, self.final

    @property
    def rows(self) -> list[int]:
        return list(dict.fromkeys([*self.final, *self.train, *self.val]))


def draw_subset(data: DataSet, split: Split, shots: Shots, seed: int) -> Subset:
    """As the benchmark draws it. With 1 shot a second image a class is drawn for validation alone."""
    num_classes, labels = len(data.classes), split.labels
    full = list(range(len(split)))
    if shots == "full" and not (data.name == PCAM and len(split) > 2 * PCAM_SEARCH_SHOTS):
        rows = full
    else:
        number = PCAM_SEARCH_SHOTS if shots == "full" else max(int(shots), 2)
        rows = few_shot_subset(labels, num_classes, number, seed)
    own: Labels = [labels[row] for row in rows]
    train, val = train_val_split(own, num_classes, data.multilabel)
    train, val = [rows[i] for i in train], [rows[i] for i in val]
    if len(train) < 2:
        raise UserError(
            f"{data.name}, {shots}-shot: of {len(rows)} training images {len(val)} are for validation and {len(train)} "
            "for training; a batch needs two. Take more shots, or mend the training split"
        )
    return Subset(train, val, train if shots == 1 else full if shots == "full" else rows)


def small_classes(data: DataSet, split: Split, shots: Shots) -> int:
    """How many classes have fewer than `shots` images."""
    counts = Counter(label for labels in split.labels for label in set(labels))
    return 0 if isinstance(shots, str) else sum(counts[c] < shots for c in range(len(data.classes)))


@dataclass
class Outcome:
    """Of one search and final training. Scores in percent; `best` and `last`: probabilities at those epochs.
    `failed`, `diverged`: settings of the search that did."""

    choice: Choice | None
    setting: Setting
    best_score: float
    best_epoch: int
    best_NC: Tensor
    last_NC: Tensor
    epochs: int
    final_diverged: bool
    failed: list[dict[str, Any]] = field(default_factory=list)
    diverged: int = 0


# (settings, training and scored rows, epochs) -> what came of it. For the probe, all settings at once.
Train = Callable[[Sequence[Setting], str, int], Trained]


@dataclass
class Trainer:
    """Trains on the parts of a subset: "search" (train, scored on val) and "final" (scored on test)."""

    train: Train
    failed: list[dict[str, Any]] = field(default_factory=list)
    diverged: int = 0

    def scores(self, settings: Sequence[Setting]) -> list[float]:
        """Best score of each setting over the epochs of the search. Too many at a time for the memory: halves; a
        single one that does not fit is recorded in `failed`, and scores NaN."""
        try:
            trained = self.train(settings, "search", SEARCH_EPOCHS)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
                raise
            if len(settings) > 1:
                middle = len(settings) // 2
                return self.scores(settings[:middle]) + self.scores(settings[middle:])
            self.failed.append({"lr": settings[0].lr, "weight_decay": settings[0].weight_decay, "why": "out of memory"})
            return [math.nan]
        self.diverged += sum(trained.diverged_K)
        return [max(values) for values in zip(*trained.scores)]

    def measure(self, setting: Setting | None) -> Outcome:
        """Search, unless `setting` is given, then the final training."""
        choice = None
        if setting is None:
            choice = search(self.scores)
            setting = choice.best
        trained = self.train([setting], "final", FINAL_EPOCHS)
        values = [100 * epoch[0] for epoch in trained.scores]
        best = max(range(len(values)), key=values.__getitem__)
        return Outcome(
            choice, setting, values[best], best + 1, trained.best_NC, trained.last_NC, FINAL_EPOCHS,
            trained.diverged_K[0], self.failed, self.diverged,
        )  # fmt: skip


def probe_trainer(
    features: Callable[[list[int]], Tensor], targets: Tensor, subset: Subset, test: tuple[Tensor, Tensor],
    start: HeadStart, score: Callable[[Tensor, Tensor], float], device: torch.device,
) -> Trainer:  # fmt: skip
    """`features(rows)` of the training split, `targets` of all of it; `test`: features and targets."""
    held = HeadStart(start.weight_CD.to(device), start.bias_C.to(device))

    def task(part: str) -> Task:
        rows = subset.train if part == "search" else subset.final
        scored = (features(subset.val), targets[subset.val]) if part == "search" else test
        own = (features(rows), targets[rows])
        return Task(own[0].to(device), own[1].to(device), scored[0].to(device), scored[1].to(device), score)

    tasks: dict[str, Task] = {}

    def train(settings: Sequence[Setting], part: str, epochs: int) -> Trained:
        if part not in tasks:
            tasks.clear()
            tasks[part] = task(part)
        return train_heads(tasks[part], held, settings, epochs)

    return Trainer(train)


def tower_trainer(
    model: EvalModel, pixels: Tensor, place: dict[int, int], targets: Tensor, subset: Subset,
    test: tuple[Tensor, Tensor], start: HeadStart, score: Callable[[Tensor, Tensor], float], precision: str,
) -> Trainer:  # fmt: skip
    """As probe_trainer, for images as uint8 and the whole tower; one setting after the other. `place`: where in
    `pixels` a row of the training split is; they are not copied."""

    def chosen(rows: list[int]) -> Images:
        return Images(pixels, torch.tensor([place[row] for row in rows]), targets[rows])

    def train(settings: Sequence[Setting], part: str, epochs: int) -> Trained:
        own = chosen(subset.train if part == "search" else subset.final)
        scored = chosen(subset.val) if part == "search" else Images(test[0], torch.arange(len(test[0])), test[1])
        task = ImageTask(own, scored, score)
        runs = [train_tower(model, task, start, setting, epochs, precision) for setting in settings]
        scores = [[value for run in runs for value in run.scores[epoch]] for epoch in range(epochs)]
        return Trained(scores, runs[0].best_NC, runs[0].last_NC, [run.diverged_K[0] for run in runs])

    return Trainer(train)


def final_score(data: DataSet, mode: str, outcome: Outcome, target: Tensor) -> float:
    """Percent: the best epoch on the test split ("elevater"), or the last one by the strict metric ("strict")."""
    if mode == "elevater":
        return outcome.best_score
    return 100 * metric_of(data.metric, "strict")(outcome.last_NC.to(target.device), target)


def reference_forwards(runs: int, subset: Subset, num_test: int) -> int:
    """Images that the reference protocol sends through the tower for the same measurement."""
    return runs * SEARCH_EPOCHS * (len(subset.train) + len(subset.val)) + FINAL_EPOCHS * (len(subset.final) + num_test)
