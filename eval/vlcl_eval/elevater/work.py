"""What is measured of one data set, and the records that come of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlcl import distributed
from vlcl.errors import UserError
from vlcl_eval import results
from vlcl_eval.datasets.records import DataSet, Split
from vlcl_eval.elevater.search import Setting
from vlcl_eval.elevater.tasks import Shots
from vlcl_eval.features import BadImages, Extractor
from vlcl_eval.models import EvalModel, check_finite
from vlcl_eval.text import Knowledge, class_weights, cut_matters, read_knowledge

Record = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """What is measured, beside the data set. `setting`: learning rate and weight decay in place of a search."""

    shots: tuple[Shots, ...] = (0, 5)
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ("linear_probe",)
    modes: tuple[str, ...] = ("elevater", "strict")
    init: str = "language"
    merge: bool = False
    setting: Setting | None = None
    knowledge: Knowledge | None = None
    labels: str = "by-name"

    def record(self, extractor: Extractor, method: str, knowledge: dict[str, Any] | None) -> dict[str, Any]:
        """What belongs to the identity of a result."""
        own: dict[str, Any] = {
            "preprocess": extractor.crop,
            "precision": extractor.precision,
            "knowledge": knowledge,
            "labels": self.labels,
        }
        if method in ("linear_probe", "finetune"):
            own |= {"init": self.init, "merge": self.merge}
            own |= {"lr": self.setting.lr, "weight_decay": self.setting.weight_decay} if self.setting else {}
        return own


@dataclass
class Work:
    """One data set being measured. `test_rows`: all of them, but for bad images in strict mode."""

    data: DataSet
    model: EvalModel
    extractor: Extractor
    protocol: Protocol
    output: Path
    say: Callable[[str], None]
    known: dict[str, Record]

    def __post_init__(self) -> None:
        self.test = self.data.test
        self.test_rows = list(range(len(self.test)))
        self.bad: dict[str, dict[int, str]] = {"train": {}, "test": {}}
        self._identities: dict[str, str] = {}
        self.class_DC: dict[str, Tensor] = {}
        knowledge = self.protocol.knowledge
        self.added = read_knowledge(knowledge, self.data.name, self.data.classes) if knowledge else None
        self.knowledge = knowledge.record(self.added) if knowledge and self.added is not None else None

    def blank(self, method: str, shots: Shots, seed: int, mode: str) -> Record:
        """The part of a record that says what was measured."""
        names = ["test"] if method == "zeroshot" else ["test", "train"]
        for name in names:
            if name not in self._identities:
                self._identities[name] = self.data.identity(self.test if name == "test" else self.data.train)
        fingerprints = {name: self._identities[name] for name in names}
        return {
            "model": self.model.label, "weights": self.model.weights, "dataset": self.data.name, "method": method,
            "shots": shots, "seed": seed, "mode": mode, "metric": self.data.metric,
            "protocol": self.protocol.record(self.extractor, method, self.knowledge), "fingerprints": fingerprints,
        }  # fmt: skip

    def missing_modes(self, method: str, shots: Shots, seed: int) -> list[str]:
        """The modes that are not recorded, or were without bad images, which may have been mended."""
        modes = ["strict"] if method == "logistic" else self.protocol.modes
        known = {mode: self.known.get(results.key(self.blank(method, shots, seed, mode))) for mode in modes}
        return [mode for mode, record in known.items() if record is None or record["bad_images"]]

    def finish(self, record: Record, score: float, started: float, **more: Any) -> Record:
        """`record` with its score, in percent. `short`: of each split that has not the benchmark's size, the two."""
        num_bad = {split: len(bad) for split, bad in self.bad.items() if bad}
        splits = [self.test] if record["method"] == "zeroshot" else [self.test, self.data.train]
        short = {split.name: [len(split), self.data.expected[split.name]] for split in splits
                 if not self.data.complete(split)}  # fmt: skip
        return record | more | {
            "score": round(score, 4), "complete": not short and not num_bad, "short": short,
            "form": self.data.form, "bad_images": num_bad, **results.stamp(started),
        }  # fmt: skip

    def target(self) -> Tensor:
        return self.data.targets(self.test)[self.test_rows]

    def class_weights(self, mode: str) -> Tensor:
        """[D, C] of unit text embeddings; the ELEVATER toolkit cuts long texts without restoring their end."""
        if not self.model.has_text:  # heads start at random, and only the shape counts
            return torch.zeros(self.model.width(), len(self.data.classes))
        texts = (self.data.classes, self.data.templates, self.added)
        if mode not in self.class_DC:
            for other in self.class_DC.values():
                if not cut_matters(self.model, *texts):
                    self.class_DC[mode] = other
                    return other
            self.class_DC[mode] = class_weights(self.model, *texts, cut=mode == "elevater").cpu()
            check_finite(self.model, self.class_DC[mode])
        return self.class_DC[mode]

    def extract(
        self, kind: str, split: Split, rows: Sequence[int], variant: str = ""
    ) -> tuple[dict[int, int], Tensor, list[int]]:
        """(place of each row, values, rows computed now). Bad images are left out, in strict mode alone."""
        extractor = replace(self.extractor, variant=variant)
        get = extractor.features if kind == "features" else extractor.pixels
        try:
            values, computed = get(self.data, split, rows)
        except BadImages as bad:
            if "elevater" in self.protocol.modes:
                raise
            self.bad[split.name] |= bad.reasons
            self.say(f"{self.data.name}: {len(bad.reasons)} bad {split.name} images are left out")
            rows = [row for row in rows if row not in self.bad[split.name]]
            if not rows:
                raise UserError(f"{self.data.name}: none of the {split.name} images can be read") from None
            values, computed = get(self.data, split, rows)
        if kind == "features":
            check_finite(self.model, values)
        if split is self.test:
            self.test_rows = list(rows)
        return {row: place for place, row in enumerate(rows)}, values, computed


def images(forwards: int, cached: int, reference: int | None) -> dict[str, int | None]:
    return {"forwards": forwards, "cached": cached, "reference": reference}


def params(work: Work, head: int, method: str = "") -> dict[str, int]:
    model = work.model
    trainable = head + (model.num_visual if method == "finetune" else 0)
    return {
        "trainable": trainable, "total": model.num_backbone, "visual": model.num_visual, "backbone": model.num_backbone
    }  # fmt: skip


def predictions(work: Work, record: Record, probability_NC: Tensor, target: Tensor) -> str | None:
    """What a submission is made of; the benchmark's mode alone."""
    if record["mode"] != "elevater":
        return None
    digest = hashlib.sha256(results.key(record).encode()).hexdigest()[:12]
    name = f"{record['dataset']}-{record['method']}-{record['shots']}-seed{record['seed']}-{digest}"
    return results.save_predictions(work.output, name, probability_NC.numpy(), target.numpy())


def append(work: Work, records: Sequence[Record]) -> None:
    """Rank 0 writes them (a collective)."""
    distributed.on_first(lambda: results.append(work.output, records))
    for line in lines(records):
        work.say(line)


def lines(records: Sequence[Record]) -> list[str]:
    """A line for each measurement, its modes side by side."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for record in records:
        found.setdefault((record["dataset"], record["method"], record["shots"], record["seed"]), []).append(
            f"{record['mode']} {record['score']:.2f}"
        )
    words = {"linear_probe": "linear probe", "finetune": "fine-tune", "logistic": "L-BFGS probe (not ELEVATER)"}
    out = []
    for (name, method, shots, seed), scores in found.items():
        what = "zero-shot" if method == "zeroshot" else f"{words[method]}, {shots}-shot, seed {seed}"
        out.append(f"{name}, {what}: {', '.join(scores)}")
    return out
