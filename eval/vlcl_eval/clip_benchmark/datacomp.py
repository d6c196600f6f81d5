"""`vlcl eval datacomp`: the 38 data sets of DataComp's evaluation, with its metric for each and its averages.

Facts are those of DataComp's tasklist.yml, eval_utils and aggregate_scores.py; datacomp.json is the table. Data sets
are the `wds_*` folders (also `wds_*_test`, as DataComp's download calls them) under one root; each that is missing is
named. Of WinoGAViL there is no such folder, and it is not measured: an average over all data sets needs all.

    acc1, mean_per_class_recall   as `vlcl eval zeroshot`
    F1-macro_all                  iWildCam: mean over the classes that occur of their F1
    acc_worst_region, acc_wg      FMoW, GeoDE: the accuracy of the group of pictures where it is lowest
    acc_top5_wg                   Dollar Street: the same of top-5, groups being incomes
    mean_recall@1                 of both ways of retrieval

Groups are a column of the metadata, the .npy of each sample. Misuse: a comparison of averages over other data sets.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_f1_score

from vlcl import distributed
from vlcl.data.shard import locate_files
from vlcl.errors import UserError
from vlcl.files import replace_text
from vlcl_eval.clip_benchmark.retrieval import evaluate_retrieval
from vlcl_eval.clip_benchmark.zeroshot import aligned, evaluate_wds
from vlcl_eval.datasets.folders import wds_shards

FILE = "datacomp.json"
GROUPS = ("ImageNet", "ImageNet dist. shifts", "VTAB", "Retrieval")
RETRIEVAL = "mean_recall@1"
Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """name: DataComp's. folder: None where the data set has no wds form. size: images that DataComp states. column: of
    the metadata, where the metric is that of the worst group."""

    name: str
    folder: str | None
    metric: str
    size: int
    group: str | None = None
    column: int | None = None
    other: tuple[str, ...] = ()

    def find(self, root: Path) -> Path | None:
        names = [name for folder in (self.folder, *self.other) if folder for name in (f"{folder}_test", folder)]
        return next((root / name for name in names if (root / name).is_dir()), None)


def tasks() -> list[Task]:
    """The 38, in DataComp's order."""
    text = (resources.files("vlcl_eval.clip_benchmark") / "datacomp.json").read_text(encoding="utf-8")
    return [Task(**row | {"other": tuple(row.get("other", ()))}) for row in json.loads(text)]


def evaluate_datacomp(
    model: str, root: str | Path, *, output: str | Path, cache: str | Path, averaged: bool = False,
    say: Callable[[str], None] = print, **extraction: Any,
) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """Measure what is under `root`, and write OUTPUT/datacomp.json (a collective).

    Returns its content, and what went wrong, by data set. UserError where nothing is there.
    """
    distributed.start()
    say_once = say if distributed.rank() == 0 else lambda text: None
    there = {task.name: folder for task in tasks() if (folder := task.find(Path(root))) is not None}
    if not there:
        raise UserError(
            f"none of DataComp's data sets is under --data-root {root}; looked for folders such as wds_imagenet1k, "
            "wds_vtab-cifar100_test"
        )
    found: dict[str, tuple[float, int]] = {}
    problems: dict[str, str] = {}
    common = {"output": output, "averaged": averaged, "say": lambda text: None, **extraction}
    for task in tasks():
        if task.name not in there:
            continue
        try:
            found[task.name] = _measure(model, task, there[task.name], Path(cache), common)
            say_once(f"{task.name}: {task.metric} {100 * found[task.name][0]:.2f}")
        except UserError as error:
            problems[task.name] = str(error)
            say_once(f"{task.name}: error: {error}")
    scores = {name: score for name, (score, _) in found.items()}
    sizes = {name: size for name, (_, size) in found.items()}
    metrics = {task.name: task.metric for task in tasks() if task.name in scores}
    summary = {
        "model": model, "scores": scores, "metrics": metrics,
        "averages": averages(scores), "missing": missing(scores), "sizes": sizes,
    }  # fmt: skip
    distributed.on_first(lambda: replace_text(Path(output) / FILE, json.dumps(summary, indent=2) + "\n"))
    say_once(as_table(scores, sizes))
    return summary, problems


def _measure(model: str, task: Task, folder: Path, cache: Path, common: Mapping[str, Any]) -> tuple[float, int]:
    """Score, and number of images."""
    if task.metric == RETRIEVAL:
        record = evaluate_retrieval(model, str(folder), **common)
        both = (record["metrics"][f"{way}_retrieval_recall@1"] for way in ("text", "image"))
        return sum(both) / 2, record["sizes"]["images"]
    more = {} if task.metric in ("acc1", "mean_per_class_recall") else {task.metric: partial(_special, task, folder)}
    records, problems = evaluate_wds(model, [folder], cache=cache, more=more, **common)
    if problems:
        raise UserError(next(iter(problems.values())))
    return records[0]["metrics"][task.metric], records[0]["sizes"]["images"]


def _special(task: Task, folder: Path, logit_NC: Tensor, target_N: Tensor, rows: Sequence[int]) -> float:
    """The metrics that are not CLIP_benchmark's; `rows`: of the test split, those that logits are of."""
    if task.metric == "F1-macro_all":
        return f1_macro(logit_NC.argmax(dim=1), target_N)
    assert task.column is not None
    group_N = torch.from_numpy(metadata(folder)[:, task.column])[list(rows)]
    k = 5 if "top5" in task.metric else 1
    hit_N = (logit_NC.topk(min(k, logit_NC.shape[1]), dim=1).indices == target_N[:, None]).any(dim=1)
    return worst_group(hit_N, group_N)


def f1_macro(predicted_N: Tensor, target_N: Tensor) -> float:
    """Mean of F1 = 2 hits / (predictions + images) over the classes that have images."""
    num_classes = int(max(predicted_N.max(), target_N.max())) + 1
    of_classes_C = multiclass_f1_score(predicted_N, target_N, num_classes, average="none")
    return float(of_classes_C[target_N.unique()].double().mean())


def worst_group(hit_N: Tensor, group_N: Tensor) -> float:
    return min(float(hit_N[group_N == group].double().mean()) for group in group_N.unique())


def metadata(folder: Path, split: str = "test") -> np.ndarray:
    """[N, M] the .npy of each sample, in the order of the shards. UserError where a sample has none."""
    rows: list[np.ndarray] = []
    for shard in wds_shards(folder, split):
        number = 0
        with open(shard, "rb") as file:
            for position, key, suffix, offset, size in locate_files(str(shard)):
                number = max(number, position + 1)
                if suffix != "npy":
                    continue
                try:
                    rows.append(np.atleast_1d(np.load(io.BytesIO(os.pread(file.fileno(), size, offset)))))
                except ValueError as error:
                    raise UserError(f"{shard}: the metadata of sample {key} cannot be read: {error}") from None
        if len(rows) < number:
            raise UserError(f"{shard}: a sample has no metadata (.npy), which this metric needs; fetch the shard again")
    return np.stack(rows)


def averages(scores: Scores) -> dict[str, float]:
    """DataComp's, of the groups that are there in full."""
    members = {group: [task.name for task in tasks() if task.group == group] for group in GROUPS}
    members["Average"] = [task.name for task in tasks()]
    return {
        group: sum(scores[name] for name in names) / len(names)
        for group, names in members.items()
        if all(name in scores for name in names)
    }


def missing(scores: Scores) -> dict[str, str]:
    """Each data set that has no score, and what was looked for."""
    return {
        task.name: task.folder or "no wds form; DataComp reads it from the Hugging Face hub"
        for task in tasks()
        if task.name not in scores
    }


def as_table(scores: Scores, sizes: Mapping[str, int]) -> str:
    rows = [["in percent", "metric", "images", "score"]]
    short = False
    for task in tasks():
        if task.name in scores:
            mark = " †" if sizes[task.name] != task.size else ""
            short = short or bool(mark)
            rows.append([f"{task.name}{mark}", task.metric, f"{sizes[task.name]:,}", f"{100 * scores[task.name]:.2f}"])
    rows += [[f"= {name}", "", "", f"{100 * value:.2f}"] for name, value in averages(scores).items()]
    lines = [aligned(rows)]
    if short:
        lines.append("† not the number of images that DataComp states: not comparable with published figures")
    if lacking := missing(scores):
        mean = sum(scores.values()) / max(len(scores), 1)
        lines.append(f"mean over the {len(scores)} of 38 that are there (not DataComp's average): {100 * mean:.2f}")
        lines.append(f"missing ({len(lacking)}): " + ", ".join(f"{name} ({why})" for name, why in lacking.items()))
    return "\n".join(lines)
