"""The data sets of the ELEVATER image classification benchmark: sizes, metric, and the files that hold them.

`benchmarks()` are the 20 whose mean is the benchmark's score, in its order; data/benchmarks.json is the table. A user's
own data set comes from a registry in the same format as the benchmark's (`read_registry`). No file of a data set is
opened here, and torch is not imported.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from vlcl.errors import UserError

SPLITS = ("train", "val", "test")
TYPES = ("classification_multiclass", "classification_multilabel")
FORMATS = ("iris", "coco")


@dataclass(frozen=True)
class SplitFiles:
    index: str
    """The index file, relative to the root folder: text lines (iris) or JSON (coco)."""
    zips: tuple[str, ...]
    """The archives that the index names."""
    num_images: int


@dataclass(frozen=True)
class WdsFolder:
    """The same data set as CLIP_benchmark packs it in webdataset shards."""

    folder: str
    num_test: int | None
    """Images of its test split; None where that is not known."""
    note: str | None
    """How its test split differs; None where it has the benchmark's size."""


@dataclass(frozen=True)
class Benchmark:
    name: str
    num_classes: int
    metric: str
    """accuracy, mean_per_class, roc_auc or 11point_map."""
    multilabel: bool
    format: str
    """iris or coco."""
    root_folder: str
    """Relative to the folder of all data sets."""
    labels: str | None
    """The file of class names in the root folder, one a line; None where the coco index holds them."""
    splits: Mapping[str, SplitFiles] = field(hash=False)
    """Of train, val, test those that there are; test is always one. Without train: zero-shot only."""
    center_crop: bool = True
    """False: the image is squashed to a square instead."""
    aliases: tuple[str, ...] = ()
    wds: tuple[WdsFolder, ...] = ()
    in_average: bool = False
    """One of the 20."""


def benchmarks() -> tuple[Benchmark, ...]:
    """The 20 of the benchmark, in its order."""
    return tuple(benchmark for benchmark in _known().values() if benchmark.in_average)


def find_benchmark(name: str) -> Benchmark:
    """One of the 20 or imagenet-1k, by name or alias; case and punctuation are ignored. Raises UserError."""
    by_key = {_key(known): b for b in _known().values() for known in (b.name, *b.aliases)}
    if found := by_key.get(_key(name)):
        return found
    near = difflib.get_close_matches(_key(name), by_key, n=1, cutoff=0.5)
    hint = f"; did you mean {by_key[near[0]].name}?" if near else ""
    raise UserError(f"{name!r} is not a data set of the benchmark{hint}\nIt has: {', '.join(_known())}")


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


@cache
def _known() -> dict[str, Benchmark]:
    """The 20 and, as the last, imagenet-1k."""
    table = json.loads((resources.files("vlcl_eval.datasets") / "benchmarks.json").read_text(encoding="utf-8"))
    known = {}
    for row in table:  # its keys are the fields of Benchmark
        splits = {
            split: SplitFiles(files["index"], tuple(files["zips"]), files["num_images"])
            for split, files in row.pop("splits").items()
        }
        aliases, wds = tuple(row.pop("aliases")), tuple(WdsFolder(**folder) for folder in row.pop("wds"))
        known[row["name"]] = Benchmark(**row, splits=splits, aliases=aliases, wds=wds)
    return known


def registered(root: Path) -> dict[str, Benchmark]:
    """The data sets of ROOT/vision_datasets.json, if there is one. UserError where `root` is no folder."""
    if not root.is_dir():
        raise UserError(f"--data-root {root} is not a folder; it should hold the data sets (docs/eval.md lists forms)")
    own = root / "vision_datasets.json"
    return read_registry(own) if own.is_file() else {}


def read_registry(path: str | Path) -> dict[str, Benchmark]:
    """The image classification data sets of a registry in the format of vision-datasets, by name.

    A JSON list; of entries with the same name the one with the highest version counts. A name that the benchmark knows
    keeps the benchmark's metric and preprocessing; for others the metric is accuracy, with type
    classification_multilabel 11point_map. Entries of other tasks (detection, captions) and splits of 0 images are left
    out. Raises UserError if the file cannot be read, or an entry lacks something.
    """
    newest: dict[str, tuple[int, str, dict[str, Any]]] = {}
    for number, entry in enumerate(_entries(Path(path)), start=1):
        where = f"{path}, entry {number}"
        name = _value(entry, "name", str, where)
        where += f" ({name})"
        version = _value({"version": 1, **entry}, "version", int, where)
        if name in newest and newest[name][0] == version:
            raise UserError(f"{where}: an earlier entry has the same name and version {version}; remove one of them")
        if name not in newest or newest[name][0] < version:
            newest[name] = (version, where, entry)
    return {
        name: _benchmark(entry, name, where)
        for name, (_, where, entry) in newest.items()
        if _is_image_classification(entry, where)
    }


def _is_image_classification(entry: dict[str, Any], where: str) -> bool:
    kind = entry.get("type")
    if isinstance(kind, dict) or (isinstance(kind, str) and not kind.startswith("classification")):
        return False
    if kind not in TYPES:
        raise UserError(f"{where}: type is {kind!r}; allowed are {' and '.join(TYPES)}")
    return True


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"the registry {path} cannot be read: {error.strerror}; give a vision_datasets.json") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the registry {path} is not JSON: {error}; correct it, or give another file") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"the registry {path} must be a JSON list of objects, one a data set: [{{...}}, {{...}}]")
    return entries


def _benchmark(entry: dict[str, Any], name: str, where: str) -> Benchmark:
    if re.search(r"[/\\,]|^\.", name):
        raise UserError(f"{where}: name is {name!r}; files and --datasets name it, so leave out / \\ , and a leading .")
    known = _known().get(name)
    multilabel = entry["type"] == "classification_multilabel"
    style = entry.get("format", "iris")
    if style not in FORMATS:
        raise UserError(
            f"{where}: format is {style!r}; allowed are {' and '.join(FORMATS)} (iris where it is left out)"
        )
    # the benchmark's own registry has no num_classes for imagenet-1k
    num_classes = _value({"num_classes": known.num_classes if known else None, **entry}, "num_classes", int, where)
    splits = {split: _split(entry, split, where) for split in SPLITS if split in entry}
    own = Benchmark(
        name=name,
        num_classes=num_classes,
        metric="11point_map" if multilabel else "accuracy",
        multilabel=multilabel,
        format=style,
        root_folder=_value(entry, "root_folder", str, where),
        labels=_value(entry, "labelmap", str, where) if style == "iris" else None,
        splits={split: files for split, files in splits.items() if files.num_images},
    )
    if "test" not in own.splits:
        raise UserError(f"{where}: there is no test split with images; add test: index_path, num_images")
    if known is None:
        return own
    if (own.num_classes, own.multilabel) != (known.num_classes, known.multilabel):
        raise UserError(
            f"{where}: {num_classes} classes, {'multi-label' if multilabel else 'one label an image'}; the benchmark's "
            f"{name} has {known.num_classes}, {'multi-label' if known.multilabel else 'one label an image'}. "
            "Give your data set a name of its own"
        )
    return replace(known, format=own.format, root_folder=own.root_folder, labels=own.labels, splits=own.splits)


def _split(entry: dict[str, Any], split: str, where: str) -> SplitFiles:
    files = entry[split]
    where = f"{where}, {split}"
    if not isinstance(files, dict):
        raise UserError(f"{where} is {files!r}; it must be an object with index_path and num_images")
    zips = files.get("files_for_local_usage", [])
    if not isinstance(zips, list) or not all(isinstance(name, str) for name in zips):
        raise UserError(f"{where}: files_for_local_usage is {zips!r}; it must be a list of file names")
    return SplitFiles(_value(files, "index_path", str, where), tuple(zips), _value(files, "num_images", int, where))


def _value(entry: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = entry.get(key)
    if value is None:
        raise UserError(f"{where}: {key} is missing; add it")
    if kind is str and not (isinstance(value, str) and value):
        raise UserError(f"{where}: {key} is {value!r}; it must be a text")
    if kind is str and not _may_be_a_name(value):
        raise UserError(f"{where}: {key} is {value!r}; no file can have such a name")
    if kind is int and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise UserError(f"{where}: {key} is {value!r}; it must be a whole number from 0")
    return value


def _may_be_a_name(text: str) -> bool:
    """Whether a file may be asked for by it; of others, that is an error of its own."""
    try:
        name = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return b"\0" not in name and len(name) < 3000 and max(map(len, name.split(b"/"))) < 256
