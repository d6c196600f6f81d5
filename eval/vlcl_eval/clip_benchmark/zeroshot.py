"""`vlcl eval zeroshot`: zero-shot classification on CLIP_benchmark's `wds_*` folders, with CLIP_benchmark's numbers,
and on folders with a folder of pictures for each class.

    t_c   = normalize(mean over templates of normalize(encode_text(template with the name of class c)))
    logit = 100 * normalize(encode_image(x)) . t_c

Class names and templates are the folder's own, the preprocessing is the model's own. Metrics are shares of 1: acc1,
acc5 (None with fewer than 5 classes) and mean_per_class_recall (over the classes that occur); where an image has
several labels, mean_average_precision (not interpolated; a class without an image counts as 0). Misuse: a comparison
with `vlcl eval elevater`, whose prompts, resizing and metrics are its own.

Records are appended to OUTPUT/zeroshot.jsonl, one a folder, and what is recorded is not measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from vlcl import distributed
from vlcl.data.class_folders import TEST, VAL
from vlcl.errors import UserError
from vlcl_eval.alone import alone
from vlcl_eval.datasets.folders import as_it_is, dataset_type, open_wds
from vlcl_eval.datasets.records import DataSet
from vlcl_eval.features import BadImages, Extractor
from vlcl_eval.models import check_finite, load
from vlcl_eval.results import append, make_folder, read_records, stamp
from vlcl_eval.row_store import check_cache
from vlcl_eval.text import SCALE, class_weights

FILE = "zeroshot.jsonl"
KEY = ("weights", "dataset", "split", "fingerprint", "preprocess", "precision")  # what makes records the same
FIELDS: dict[str, Any] = dict.fromkeys(KEY, str) | {"metrics": dict, "sizes": dict}
Record = dict[str, Any]
Metrics = dict[str, float | None]
MoreMetric = Callable[[Tensor, Tensor, Sequence[int]], float]
NONE: Mapping[str, MoreMetric] = {}

# Letters: N images, C classes, D width.


def evaluate_wds(
    model: str, folders: Sequence[str | Path], split: str = "test", *, output: str | Path, cache: str | Path,
    averaged: bool = False, say: Callable[[str], None] = print, more: Mapping[str, MoreMetric] = NONE,
    **extraction: Any,
) -> tuple[list[Record], dict[str, str]]:  # fmt: skip
    """Zero-shot scores of `model` on each folder, measured or from OUTPUT/zeroshot.jsonl (a collective).

    `more`: other metrics by their names, functions of logits, labels and the rows that these are of. `extraction`:
    precision, batch_size and workers of features.Extractor. Returns the records, and what went wrong, by
    folder: one that fails does not stop the others. UserError for what concerns all of them.
    """
    device = distributed.start()
    loaded = load(model, averaged).to(device)
    make_folder(Path(output), FILE)
    check_cache(Path(cache))
    say_once = say if distributed.rank() == 0 else lambda text: None
    extractor = Extractor(loaded, Path(cache), device, crop="model", say=say_once, **extraction)
    path = Path(output) / FILE
    records: list[Record] = []
    problems: dict[str, str] = {}
    for folder in folders:
        try:
            with alone(path.parent, loaded.weights, f"{folder} {split}"):
                known = distributed.broadcast(list(read_records(path, FIELDS)))
                records.append(_evaluate_folder(extractor, Path(folder), split, path, known, more))
        except UserError as error:
            problems[str(folder)] = str(error)
            say_once(f"{folder}: error: {error}")
    if records:
        say_once(as_table(records))
    return records, problems


def _evaluate_folder(
    extractor: Extractor, folder: Path, split: str, path: Path, known: Sequence[Record], more: Mapping[str, MoreMetric]
) -> Record:
    started, model = time.perf_counter(), extractor.model
    data = open_folder(folder, split, extractor.say)
    (split,) = data.split_names if data.form == "class folders" else (split,)
    images = data.read(split)
    if not len(images):
        raise UserError(f"{folder}: the shards of {split} hold no images; fetch them again")
    record: Record = {
        "task": "zeroshot", "model": model.label, "weights": model.weights, "dataset": data.name, "split": split,
        "fingerprint": data.identity(images),
        "preprocess": repr(model.preprocess), "precision": extractor.precision,
    }  # fmt: skip
    for earlier in reversed(known):
        if all(earlier[name] == record[name] for name in KEY) and more.keys() <= earlier["metrics"].keys():
            extractor.say(f"{folder}: measured before, see {path}")
            return earlier
    rows = list(range(len(images)))
    bad: dict[int, str] = {}
    try:
        image_ND, _ = extractor.features(data, images, rows)
    except BadImages as error:
        bad = error.reasons
        places = [f"{images.refs[row]}: {bad[row]}" for row in sorted(bad)]
        extractor.say(left_out(f"{folder}: images that cannot be decoded are left out", places))
        rows = [row for row in rows if row not in bad]
        if not rows:
            raise UserError(f"{folder}: none of the {len(images)} images of {split} can be decoded") from None
        image_ND, _ = extractor.features(data, images, rows)
    class_DC = class_weights(model, data.classes, data.templates, None, cut=False).cpu()
    check_finite(model, image_ND, class_DC)
    logit_NC = SCALE * F.normalize(image_ND, dim=1) @ class_DC  # multiplied in CLIP_benchmark's order
    target = data.targets(images)[rows]
    record["metrics"] = scores(logit_NC, target, data.multilabel) | {
        name: metric(logit_NC, target, rows) for name, metric in more.items()
    }
    record["sizes"] = {"images": len(rows), "classes": len(data.classes), "templates": len(data.templates)}
    return save(path, record | {"bad_images": len(bad)}, started)


def open_folder(folder: Path, split: str, say: Callable[[str], None] = print) -> DataSet:
    """A wds folder as CLIP_benchmark reads it: names and templates without outer spaces; or a folder of classes, called
    as training's eval.zeroshot calls them, of which `test` may be `val`. UserError where it is neither."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one of CLIP_benchmark's form, with classnames.txt and test/*.tar")
    if dataset_type(folder) == "retrieval":
        raise UserError(
            f"{folder} holds captions, not classes (see dataset_type.txt): vlcl eval retrieval MODEL {folder}"
        )
    wds = any((folder / name / "nshards.txt").is_file() for name in ("test", "train"))
    splits = TEST + VAL if split == "test" else (split,)
    if not wds and (own := as_it_is(folder, splits)) is not None:
        data, classes = own
        if classes.note:
            say(f"note: {folder}: {classes.note}")
        return replace(data, split_names=(classes.split or split,), read=lambda name: data.test)
    if not (folder / "classnames.txt").is_file():
        below = sorted(str(path) for path in folder.glob("wds_*"))
        hint = (
            f"below it: {', '.join(below[:3])}"
            if below
            else f"if it holds captions: vlcl eval retrieval MODEL {folder}"
        )
        raise UserError(
            f"{folder} is no wds folder, as it has no classnames.txt, and has no folder of pictures a class; {hint}"
        )
    data = open_wds(folder)
    if not (folder / split / "nshards.txt").is_file():
        raise UserError(f"--split {split!r}: {folder} has no {split}/nshards.txt; it has {', '.join(data.split_names)}")
    names, templates = ([line.strip() for line in lines] for lines in (data.classes, data.templates))
    if len(names) < 2:
        raise UserError(f"{folder / 'classnames.txt'} names {len(names)} classes; at least two are needed, one a line")
    if not templates:
        raise UserError(f"{folder / 'zeroshot_classification_templates.txt'} is empty; write e.g. a photo of a {{c}}.")
    return replace(data, classes=names, templates=templates)


def scores(logit_NC: Tensor, target: Tensor, multilabel: bool) -> Metrics:
    """CLIP_benchmark's metrics. `target`: int64 class indices [N], or with `multilabel` 0 and 1 [N, C]."""
    if multilabel:
        return {"mean_average_precision": mean_average_precision(logit_NC, target)}
    num_classes = logit_NC.shape[1]
    top = logit_NC.topk(5 if num_classes >= 5 else 1, dim=1).indices
    hit_NK = top == target[:, None]
    right_N = logit_NC.argmax(dim=1) == target
    images_C, right_C = (torch.bincount(x, minlength=num_classes).double() for x in (target, target[right_N]))
    return {
        "acc1": float(hit_NK[:, 0].double().mean()),
        "acc5": float(hit_NK.any(dim=1).double().mean()) if num_classes >= 5 else None,
        "mean_per_class_recall": float((right_C / images_C)[images_C > 0].mean()),
    }


def mean_average_precision(logit_NC: Tensor, target_NC: Tensor) -> float:
    """Equal scores are taken together; CLIP_benchmark leaves their order to the sort."""
    # torchmetrics sends what is outside 0..1 through a sigmoid, where scores of 100 would tie.
    share_NC = (logit_NC.double() + 128) / 256
    positive = [c for c in range(share_NC.shape[1]) if bool(target_NC[:, c].any())]
    return sum(float(binary_average_precision(share_NC[:, c], target_NC[:, c])) for c in positive) / share_NC.shape[1]


def save(path: Path, record: Record, started: float) -> Record:
    """Complete a record, and append it on rank 0 (a collective)."""
    record |= stamp(started)
    distributed.on_first(lambda: append(path.parent, [record], path.name))
    return record


def left_out(what: str, places: Sequence[str], most: int = 5) -> str:
    """`what`, how many there are, and the first few of `places`, one a line."""
    more = [f"  and {len(places) - most:,} more"] if len(places) > most else []
    return "\n".join([f"{what} ({len(places):,}):", *(f"  {place}" for place in places[:most]), *more])


def as_table(records: Sequence[Record]) -> str:
    """A line a record, a column a metric, in percent."""
    names = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    rows = [["in percent", "images", "chance", *names]]
    for record in records:
        chance = 1 / record["sizes"]["classes"] if "acc1" in record["metrics"] else None  # of acc1
        values = [chance, *(record["metrics"].get(name) for name in names)]
        cells = ["-" if value is None else f"{100 * value:.2f}" for value in values]
        rows.append([f"{record['dataset']} {record['split']}", f"{record['sizes']['images']:,}", *cells])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, all but the first to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
