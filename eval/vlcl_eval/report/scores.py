"""The records of results.jsonl as a report shows them: by model, data set and column.

Records that follow different protocols are never averaged: a model whose records of one method differ in a setting of
the protocol becomes one model a value of it. Scores are percent throughout.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from vlcl_eval.datasets.registry import benchmarks

Record = Mapping[str, Any]  # a line of results.jsonl

FAST_PROBE = "L-BFGS probe (not ELEVATER)"
METHODS = {"zeroshot": "zero-shot", "linear_probe": "linear probe", "finetune": "fine-tune", "logistic": FAST_PROBE}
METRICS = {
    "accuracy": "accuracy", "mean_per_class": "mean per class", "roc_auc": "ROC AUC", "11point_map": "11-point mAP",
}  # fmt: skip
UNSET = "unset"  # a setting of the protocol that other records of the method have


@dataclass(frozen=True)
class Column:
    """What is measured of a data set."""

    method: str
    shots: int | str
    mode: str

    @property
    def title(self) -> str:
        return METHODS[self.method] if self.method == "zeroshot" else f"{METHODS[self.method]} {self.shots}"

    @property
    def place(self) -> tuple[int, float, str]:
        return list(METHODS).index(self.method), in_shots_order(self.shots), self.mode


def in_shots_order(shots: int | str) -> float:
    """Sorts "full" behind all numbers."""
    return math.inf if isinstance(shots, str) else shots


@dataclass(frozen=True)
class Score:
    """A mean in percent, and the values by seed that its deviation is taken of."""

    mean: float
    by_seed: Mapping[int, float]

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds, n - 1 in the denominator; None with less than two."""
        return stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    def minus(self, other: Score) -> Score:
        """The difference, seed by seed where both have the same seeds, else that of the means alone."""
        same = set(self.by_seed) == set(other.by_seed)
        by_seed = {seed: value - other.by_seed[seed] for seed, value in self.by_seed.items()} if same else {}
        return Score(self.mean - other.mean, by_seed)


@dataclass(frozen=True)
class Cell:
    """One model, data set and column: its records by seed."""

    records: Mapping[int, Record]

    @property
    def score(self) -> Score:
        scores = {seed: record["score"] for seed, record in sorted(self.records.items())}
        return Score(mean(scores.values()), scores)

    @property
    def metric(self) -> str:
        """Its name for readers."""
        name = str(next(iter(self.records.values()))["metric"])
        return METRICS.get(name, name)

    @property
    def chance(self) -> float | None:
        """What guesses would score, in percent; None where that depends on the labels."""
        record = next(iter(self.records.values()))
        if record["metric"] in ("accuracy", "mean_per_class"):
            return 100 / record["sizes"]["classes"]
        return 50.0 if record["metric"] == "roc_auc" else None

    @property
    def sample(self) -> Record | None:
        """A record whose test split is a sample of the benchmark's, if there is one."""
        return next((record for record in self.records.values() if not record["complete"]), None)


@dataclass(frozen=True)
class Model:
    """One model under one protocol."""

    label: str
    cells: Mapping[tuple[str, Column], Cell]

    @property
    def records(self) -> list[Record]:
        return [record for cell in self.cells.values() for record in cell.records.values()]

    @property
    def columns(self) -> list[Column]:
        return sorted({column for _, column in self.cells}, key=lambda column: column.place)

    def of_column(self, column: Column) -> dict[str, Cell]:
        return {dataset: cell for (dataset, found), cell in self.cells.items() if found == column}


def average(cells: Iterable[Cell]) -> Score:
    """The mean of the cells' means; by seed the means of those seeds that every cell has."""
    scores = [cell.score for cell in cells]
    seeds = sorted(set.intersection(*(set(score.by_seed) for score in scores)))
    return Score(
        mean(score.mean for score in scores), {seed: mean(score.by_seed[seed] for score in scores) for seed in seeds}
    )


def averaged(datasets: Iterable[str]) -> list[str]:
    """Those that count in an average: of the 20 the ones that are there; all where none of the 20 is."""
    found, ours = list(datasets), {benchmark.name for benchmark in benchmarks()}
    return [name for name in found if name in ours] or found


def in_order(datasets: Iterable[str]) -> list[str]:
    """The 20 in the benchmark's order, then others as they come."""
    found, order = list(dict.fromkeys(datasets)), [benchmark.name for benchmark in benchmarks()]
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def models_of(records: Sequence[Record]) -> list[Model]:
    """The models of `records`, each with a label of its own; of records for the same seed and column the last counts.

    Records without a finite score are left out, and so is a model that has no other.
    """
    scored = [record for record in records if has_score(record)]
    weights: dict[str, list[str]] = defaultdict(list)
    for record in scored:
        if record["weights"] not in weights[record["model"]]:
            weights[record["model"]].append(record["weights"])
    models = []
    for name, fingerprints in weights.items():
        digits = 8 if len({found[:8] for found in fingerprints}) == len(fingerprints) else None
        for found in fingerprints:
            own = [record for record in scored if (record["model"], record["weights"]) == (name, found)]
            label = name if len(fingerprints) == 1 else f"{name} ({found[:digits]})"
            models += _by_protocol(label, own)
    return models


def has_score(record: Record) -> bool:
    return isinstance(record["score"], int | float) and math.isfinite(record["score"])


def _by_protocol(label: str, records: Sequence[Record]) -> list[Model]:
    settings: dict[str, set[str]] = defaultdict(set)
    for record in records:
        settings[record["method"]] |= set(record["protocol"])
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        for key in settings[record["method"]]:
            values[record["method"], key].add(as_text(record["protocol"].get(key, UNSET)))
    differing = sorted({key for (_, key), texts in values.items() if len(texts) > 1})

    def kept(record: Record) -> dict[str, str]:
        own = [key for key in differing if key in settings[record["method"]]]
        return {key: as_text(record["protocol"].get(key, UNSET)) for key in own}

    variants: list[dict[str, str]] = []
    for variant in map(kept, records):
        if variant not in variants:
            variants.append(variant)
    # a zero-shot record says nothing of the head: it belongs to every variant that it does not contradict
    variants = [variant for variant in variants if not any(variant.items() < other.items() for other in variants)]
    models = []
    for variant in variants:
        own = [record for record in records if kept(record).items() <= variant.items()]
        name = ", ".join([label, *(f"{key}={value}" for key, value in variant.items())])
        models.append(Model(name, _cells(own)))
    return models


def as_text(value: Any) -> str:
    """A value of a protocol for readers: none, false, elevater, {...}."""
    if isinstance(value, str):
        return value
    return "none" if value is None else json.dumps(value, sort_keys=True)


def _cells(records: Sequence[Record]) -> dict[tuple[str, Column], Cell]:
    cells: dict[tuple[str, Column], dict[int, Record]] = defaultdict(dict)
    for record in records:
        column = Column(record["method"], record["shots"], record["mode"])
        cells[record["dataset"], column][record["seed"]] = record
    return {key: Cell(by_seed) for key, by_seed in cells.items()}


def mode_title(models: Iterable[Model], columns: Sequence[Column]) -> str:
    """The mode of `columns`, with what it means for the epoch where there are epochs to choose from."""
    mode = columns[0].mode
    cells = [cell for model in models for column in columns for cell in model.of_column(column).values()]
    settings = [record["settings"] for cell in cells for record in cell.records.values()]
    epochs = sorted({found["epochs"] for found in settings if "epochs" in found})
    if not epochs:
        return mode
    number = " or ".join(map(str, epochs))
    return f"{mode}: " + (f"best of {number} epochs on the test set" if mode == "elevater" else "last epoch")
