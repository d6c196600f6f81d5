"""A data set to evaluate on: its classes, and its splits as lists of images with labels, in a fixed order."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vlcl.errors import UserError
from vlcl_eval.datasets.class_names import class_names, match_labels
from vlcl_eval.datasets.images import ImageRef
from vlcl_eval.datasets.registry import Benchmark

Labels = list[tuple[int, ...]]


@dataclass(frozen=True)
class Split:
    """`labels[i]` are the class indices of `refs[i]`: one, or (multilabel) any number."""

    name: str
    refs: Sequence[ImageRef]
    labels: Labels
    fingerprint: str  # of the images and their order: what features depend on

    def __len__(self) -> int:
        return len(self.refs)


@dataclass(frozen=True)
class DataSet:
    """`metric`: accuracy, mean_per_class, roc_auc or 11point_map. `templates` have one `{}`. `expected`: the number of
    images in each split as the benchmark has it; None where there is no such number."""

    name: str
    form: str
    folder: Path
    classes: list[str]
    templates: list[str]
    metric: str
    multilabel: bool
    center_crop: bool
    expected: dict[str, int]
    split_names: tuple[str, ...]
    class_order: str = "own order"
    names_in: str = ""
    """The file that holds the class names; "" where they are names of folders."""
    read: Callable[[str], Split] = field(repr=False, default=lambda name: Split(name, [], [], ""))

    @cached_property
    def train(self) -> Split:
        return self.read("train")

    @cached_property
    def test(self) -> Split:
        return self.read("test")

    def complete(self, split: Split) -> bool:
        """Whether a split has the size that the benchmark states (True where it states none)."""
        return self.expected.get(split.name) in (None, len(split))

    def identity(self, split: Split) -> str:
        """16 hex digits over images, labels, class names and templates: what a score depends on."""
        words = json.dumps([self.classes, self.templates, split.labels])
        return fingerprint([split.fingerprint.encode(), words.encode()])

    def targets(self, split: Split) -> Tensor:
        """int64: [N] class indices, or [N, C] of 0 and 1 (multilabel)."""
        if not self.multilabel:
            return torch.tensor([label[0] for label in split.labels], dtype=torch.long)
        target_NC = torch.zeros(len(split), len(self.classes), dtype=torch.long)
        for row, labels in enumerate(split.labels):
            target_NC[row, list(labels)] = 1
        return target_NC


def fingerprint(parts: Iterable[bytes]) -> str:
    """16 hex digits over the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def file_identity(path: str | Path, folder: Path) -> str:
    """Path below `folder`, size and time of change: without reading a file, what tells it from another one."""
    stat = os.stat(path)
    return f"{os.path.relpath(path, folder)} {stat.st_size} {stat.st_mtime_ns}"


def check_labels(labels: Labels, num_classes: int, multilabel: bool, where: Callable[[int], str]) -> None:
    """UserError for an image with no label, several labels or an unknown one; `where(i)` names image i's place."""
    for i, label in enumerate(labels):
        if not multilabel and len(label) != 1:
            count = "has no label" if not label else f"has {len(label)} labels"
            raise UserError(f"{where(i)} {count}; this data set has one class an image: mend the line")
        for value in label:
            if not 0 <= value < num_classes:
                raise UserError(
                    f"{where(i)}: label {value} is out of range: {num_classes} classes have labels 0..{num_classes - 1}"
                )


def match_classes(
    benchmark: Benchmark, found: list[str], labels: str, where: str, file: str
) -> tuple[list[str], list[int], str]:
    """The class names, which of them each label means, and that in words. `found`: the names of `where`, which stand in
    `file`, or are those of its folders (""); `labels`: see `find_data_set`."""
    expected = class_names(benchmark.name) or found
    if labels == "by-position" and len(found) == len(expected):
        place = list(range(len(expected)))
    else:
        place = match_labels(found, expected, where, file)
    if len(expected) != benchmark.num_classes:
        raise UserError(
            f"{where}: the number of class names is {len(found)}, but vision_datasets.json says num_classes "
            f"{benchmark.num_classes} for {benchmark.name}; correct the one that is wrong"
        )
    return expected, place, "same order" if place == list(range(len(place))) else "mapped by name"
