"""CLIP_benchmark's `wds_*` folders, and folders with a folder a class.

A wds folder: classnames.txt, zeroshot_classification_templates.txt (placeholder {c}), dataset_type.txt (optional:
"multilabel"), and for each split nshards.txt and {0..N-1}.tar with an image (webp, png, jpg, jpeg) and a label (cls, or
npy for multi-hot) a sample. A class folder: {train,test}/CLASS/*.jpg, with class names as the folders are
called, or numbered folders and their names in label.txt, a line a class.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from vlcl.data.class_folders import (
    TEST,
    TRAIN,
    VAL,
    Classes,
    find_classes,
    in_order,
    pictures_in,
    read_names,
    split_folders,
)
from vlcl.data.shard import ShardError, locate_files
from vlcl.errors import UserError
from vlcl_eval.datasets.class_names import templates
from vlcl_eval.datasets.images import ImageRef
from vlcl_eval.datasets.records import DataSet, Labels, Split, check_labels, file_identity, fingerprint, match_classes
from vlcl_eval.datasets.registry import Benchmark

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
LABEL_LISTS = ("labels.txt", "label.txt", "classnames.txt")


def open_wds(folder: Path) -> DataSet:
    """A wds folder by its own class names and templates. UserError where it is none."""
    names = read_names(folder / "classnames.txt")
    own = [line.replace("{c}", "{}") for line in _lines(folder / "zeroshot_classification_templates.txt")]
    multilabel = dataset_type(folder) == "multilabel"
    there = tuple(split for split in ("train", "test") if (folder / split / "nshards.txt").is_file())
    if not there:
        raise UserError(f"{folder} has neither train/nshards.txt nor test/nshards.txt: it is no wds folder with shards")

    def read(name: str) -> Split:
        return read_wds(folder, name, len(names), multilabel)

    metric, file = "11point_map" if multilabel else "accuracy", str(folder / "classnames.txt")
    return DataSet(
        folder.name, "wds", folder, names, own, metric, multilabel, True, {}, there, read=read, names_in=file
    )


def find_wds(root: Path, benchmark: Benchmark, labels: str) -> DataSet | None:
    """`benchmark` from a wds folder under `root`, its labels mapped by class name; None where there is none."""
    for folder in (root / wds.folder for wds in benchmark.wds):
        if (folder / "classnames.txt").is_file():
            found = open_wds(folder)
            if found.multilabel != benchmark.multilabel:
                needed = "several labels" if benchmark.multilabel else "one label"
                raise UserError(f"{folder}: {benchmark.name} needs {needed} an image (see dataset_type.txt)")
            return _as_benchmark(found, benchmark, labels)
    return None


def _as_benchmark(found: DataSet, benchmark: Benchmark, labels: str) -> DataSet:
    names, place, order = match_classes(benchmark, found.classes, labels, str(found.folder), found.names_in)

    def read(name: str) -> Split:
        split = found.read(name)
        return Split(
            name, split.refs, [tuple(place[value] for value in label) for label in split.labels], split.fingerprint
        )

    sizes = {name: files.num_images for name, files in benchmark.splits.items() if files.num_images}
    return replace(
        found, name=benchmark.name, classes=names, templates=templates(benchmark.name), metric=benchmark.metric,
        center_crop=benchmark.center_crop, expected=sizes, class_order=order, read=read,
    )  # fmt: skip


def dataset_type(folder: Path) -> str:
    """The word in dataset_type.txt, in lower case; "" where there is no such file."""
    path = folder / "dataset_type.txt"
    try:
        return path.read_text("utf-8-sig").strip().lower() if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; it should say multilabel or retrieval, or go") from None


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip("\n") for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def wds_shards(folder: Path, split: str) -> list[Path]:
    path = folder / split / "nshards.txt"
    try:
        count = int(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} should hold the number of shards: {error}") from None
    if count < 1:
        raise UserError(f"{path} says {count} shards: there is nothing to read; fetch the data set again")
    there = {shard.name for shard in path.parent.glob("*.tar")}
    missing = (f"{i}.tar" for i in range(count) if f"{i}.tar" not in there)
    if some := list(islice(missing, 3)):  # not all, of a count that is no count
        raise UserError(f"{path} says {count} shards; these do not exist: {', '.join(some)}{' ...' * (len(some) == 3)}")
    return [folder / split / f"{i}.tar" for i in range(count)]


def read_wds(folder: Path, split: str, num_classes: int, multilabel: bool) -> Split:
    refs: list[ImageRef] = []
    labels: Labels = []
    where: list[str] = []
    members: list[bytes] = []
    shards = wds_shards(folder, split)
    for shard in shards:
        members.append(file_identity(shard, folder).encode("utf-8", "surrogateescape"))
        samples: dict[int, tuple[str, dict[str, tuple[int, int]]]] = {}
        try:
            for position, key, suffix, offset, size in locate_files(str(shard)):
                samples.setdefault(position, (key, {}))[1][suffix] = (offset, size)
                members.append(f"{key}.{suffix} {size}".encode("utf-8", "surrogateescape"))
        except ShardError as error:
            raise UserError(f"{error}; fetch the shard again") from None
        for key, files in samples.values():
            refs.append(_image_of(shard, key, files))
            labels.append(_label_of(shard, key, files, num_classes))
            where.append(f"{shard}: sample {key}")
    if not refs:
        raise UserError(f"the shards of {folder / split} hold no samples; fetch them again")
    check_labels(labels, num_classes, multilabel, lambda i: where[i])
    return Split(split, refs, labels, fingerprint([b"\n".join(members)]))


def _image_of(shard: Path, key: str, files: dict[str, tuple[int, int]]) -> ImageRef:
    for suffix in IMAGE_SUFFIXES:
        if suffix in files:
            return ImageRef(str(shard), f"{key}.{suffix}", *files[suffix])
    raise UserError(
        f"{shard}: sample {key} has no image: {', '.join(sorted(files))}; looked for {', '.join(IMAGE_SUFFIXES)}"
    )


def _label_of(shard: Path, key: str, files: dict[str, tuple[int, int]], num_classes: int) -> tuple[int, ...]:
    suffix = "cls" if "cls" in files else "npy"
    if suffix not in files:
        raise UserError(f"{shard}: sample {key} has no label (.cls, or .npy with a 0 or 1 a class)")
    offset, size = files[suffix]
    with open(shard, "rb") as file:
        data = os.pread(file.fileno(), size, offset)
    try:
        if suffix == "cls":
            return (int(data),)
        marks = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(marks, np.ndarray) or marks.shape != (num_classes,):
            raise ValueError(f"it should be an array of {num_classes} numbers, one a class")
        return tuple(int(i) for i in np.flatnonzero(marks))
    except (ValueError, EOFError) as error:
        raise UserError(f"{shard}: the label of sample {key} cannot be read: {error}") from None


def find_class_folders(root: Path, benchmark: Benchmark, labels: str) -> DataSet | None:
    """`benchmark` from ROOT/NAME/{train,test}/CLASS/*; None where there is no such folder."""
    for name in (benchmark.name, *benchmark.aliases):
        folder = root / name
        splits = {split: folder / split for split in ("train", "test") if (folder / split).is_dir()}
        if "test" not in splits and (folder / "val").is_dir():
            raise UserError(
                f"{folder} has a val folder and no test folder; scores are of test. If val is what you score on: "
                f"mv {folder / 'val'} {folder / 'test'}"
            )
        if splits:
            if benchmark.multilabel:
                raise UserError(
                    f"{folder}: folders of classes cannot hold the several labels an image of {benchmark.name}"
                )
            return _as_benchmark(open_class_folders(folder, splits), benchmark, labels)
    return None


def as_it_is(folder: Path, splits: Sequence[str] = TEST + VAL) -> tuple[DataSet, Classes] | None:
    """A folder of class folders with its own names, scored on the first of `splits` that is there, as `test`, and its
    train split where there is one; None where it holds no class folders."""
    if (found := find_classes(folder, splits)) is None:
        return None
    roots = {"test": found.root}
    there = split_folders(folder)
    train = next((there[name] for name in TRAIN if name in there), found.root)
    if train != found.root:
        roots = {"train": train} | roots

    def read(name: str) -> Split:
        if name not in roots:
            raise UserError(f"{folder} has no {name} folder")
        return _read_class_folders(roots[name], name, found.folders, range(len(found.folders)))

    return DataSet(
        folder.name, "class folders", folder, list(found.names), list(found.templates), "accuracy", False, True, {},
        tuple(roots), read=read,
    ), found  # fmt: skip


def open_class_folders(folder: Path, splits: dict[str, Path]) -> DataSet:
    """Of a data set that is known by its name, so that folders may be called by numbers."""
    classes = in_order([path.name for path in next(iter(splits.values())).iterdir() if path.is_dir()])
    listed = next((folder / name for name in LABEL_LISTS if (folder / name).is_file()), None)
    names = read_names(listed) if listed else classes
    if listed and sorted(int(name) if name.isdigit() else -1 for name in classes) != list(range(len(names))):
        raise UserError(
            f"{listed} has {len(names)} names; the folders of {folder} should be numbered 0..{len(names) - 1}"
        )

    def read(name: str) -> Split:
        if name not in splits:
            raise UserError(f"{folder} has no {name} folder")
        places = [int(name) for name in classes] if listed else range(len(classes))
        return _read_class_folders(splits[name], name, classes, places)

    return DataSet(
        folder.name, "class folders", folder, names, ["a photo of a {}"], "accuracy", False, True, {}, tuple(splits),
        read=read, names_in=str(listed) if listed else "",
    )  # fmt: skip


def _read_class_folders(folder: Path, name: str, classes: Sequence[str], labels_of: Sequence[int]) -> Split:
    extra = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in classes)
    if extra:
        raise UserError(f"{folder} has folders that are no class of the other split: {extra[:5]}")
    refs: list[ImageRef] = []
    labels: Labels = []
    for class_name, label in zip(classes, labels_of):
        found = pictures_in(folder / class_name) if (folder / class_name).is_dir() else []
        refs += [ImageRef(str(path)) for path in found]
        labels += [(label,)] * len(found)
    if not refs:
        raise UserError(f"{folder} holds no image")
    listing = "\n".join(file_identity(ref.container, folder) for ref in refs)
    return Split(name, refs, labels, fingerprint([listing.encode("utf-8", "surrogateescape")]))
