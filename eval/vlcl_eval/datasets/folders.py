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
from torchvision.datasets.folder import IMG_EXTENSIONS

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
    names = _class_names(folder / "classnames.txt")
    own = [line.replace("{c}", "{}") for line in _lines(folder / "zeroshot_classification_templates.txt")]
    multilabel = dataset_type(folder) == "multilabel"
    there = tuple(split for split in ("train", "test") if (folder / split / "nshards.txt").is_file())
    if not there:
        raise UserError(f"{folder} has neither train/nshards.txt nor test/nshards.txt: it is no wds folder with shards")

    def read(name: str) -> Split:
        return read_wds(folder, name, len(names), multilabel)

    metric = "11point_map" if multilabel else "accuracy"
    return DataSet(folder.name, "wds", folder, names, own, metric, multilabel, True, {}, there, read=read)


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
    names, place, order = match_classes(benchmark, found.classes, labels, str(found.folder))

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


def _class_names(path: Path) -> list[str]:
    """A line a class: a blank one would move the labels after it."""
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if "" in names:
        raise UserError(f"{path}, line {names.index('') + 1} is blank: label {names.index('')} would have no name")
    return names


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


def class_folder(folder: Path, split: str) -> Path | None:
    """FOLDER/SPLIT or FOLDER, whichever has folders with pictures in them; None where neither has."""
    for root in (folder / split, folder):
        below = (path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ()
        if any(path.suffix.lower() in IMG_EXTENSIONS for one in below for path in one.iterdir()):
            return root
    return None


def open_class_folders(folder: Path, splits: dict[str, Path]) -> DataSet:
    classes = sorted(path.name for path in next(iter(splits.values())).iterdir() if path.is_dir())
    listed = next((folder / name for name in LABEL_LISTS if (folder / name).is_file()), None)
    names = _class_names(listed) if listed else classes
    if listed and sorted(int(name) if name.isdigit() else -1 for name in classes) != list(range(len(names))):
        raise UserError(
            f"{listed} has {len(names)} names; the folders of {folder} should be numbered 0..{len(names) - 1}"
        )

    def read(name: str) -> Split:
        if name not in splits:
            raise UserError(f"{folder} has no {name} folder")
        return _read_class_folders(splits[name], name, classes, numbered=listed is not None)

    return DataSet(
        folder.name,
        "class folders",
        folder,
        names,
        ["a photo of a {}"],
        "accuracy",
        False,
        True,
        {},
        tuple(splits),
        read=read,
    )


def _read_class_folders(folder: Path, name: str, classes: Sequence[str], numbered: bool) -> Split:
    extra = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in classes)
    if extra:
        raise UserError(f"{folder} has folders that are no class of the other split: {extra[:5]}")
    refs: list[ImageRef] = []
    labels: Labels = []
    for place, class_name in enumerate(classes):
        for path in sorted((folder / class_name).rglob("*")):
            if path.suffix.lower() in IMG_EXTENSIONS:
                refs.append(ImageRef(str(path)))
                labels.append((int(class_name) if numbered else place,))
    if not refs:
        raise UserError(f"{folder} holds no image")
    listing = "\n".join(file_identity(ref.container, folder) for ref in refs)
    return Split(name, refs, labels, fingerprint([listing.encode("utf-8", "surrogateescape")]))
