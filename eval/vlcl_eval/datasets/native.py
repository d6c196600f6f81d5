"""ELEVATER's own format: an IRIS or COCO index, zips of images, a file of class names.

IRIS, a line an image: `train.zip@some dir/0001.jpg 3`, several labels joined by commas, none for a negative image of
a multilabel set. COCO: `images` with file_name "train.zip@0001.jpg" (or zip_file and file_name), `annotations`,
`categories`; the class of a category is the rank of its id, images come by ascending id.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from vlcl.errors import UserError
from vlcl_eval.datasets.class_names import templates
from vlcl_eval.datasets.images import ImageRef
from vlcl_eval.datasets.records import DataSet, Labels, Split, check_labels, file_identity, fingerprint, match_classes
from vlcl_eval.datasets.registry import Benchmark


def find(root: Path, benchmark: Benchmark, labels: str) -> DataSet | None:
    """`benchmark` under `root` in the native format; None where its index files are not there."""
    short = Path(benchmark.root_folder).name
    for folder in (root / benchmark.root_folder, root / short):
        there = tuple(name for name, files in benchmark.splits.items() if (folder / files.index).is_file())
        if "test" in there or "train" in there:
            return open_native(folder, benchmark, labels, there)
    return None


def open_native(folder: Path, benchmark: Benchmark, labels: str, there: tuple[str, ...]) -> DataSet:
    file = str(_labels_file(folder, benchmark))
    names, place, order = match_classes(benchmark, _label_names(folder, benchmark), labels, file, file)

    def read(name: str) -> Split:
        return read_split(folder, benchmark, name, place)

    return DataSet(
        benchmark.name, "native", folder, names, templates(benchmark.name), benchmark.metric, benchmark.multilabel,
        benchmark.center_crop, {name: files.num_images for name, files in benchmark.splits.items() if files.num_images},
        there, order, read=read,
    )  # fmt: skip


def _labels_file(folder: Path, benchmark: Benchmark) -> Path:
    split = next(name for name in ("test", "train") if (folder / benchmark.splits[name].index).is_file())
    return folder / (benchmark.splits[split].index if benchmark.format == "coco" else benchmark.labels or "labels.txt")


def _label_names(folder: Path, benchmark: Benchmark) -> list[str]:
    """The folder's own class names, in the order of its labels."""
    path = _labels_file(folder, benchmark)
    if benchmark.format == "coco":
        return _names(path, _coco(path))
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{benchmark.name}: class names cannot be read: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def read_split(folder: Path, benchmark: Benchmark, name: str, place: list[int]) -> Split:
    """The split in the order of its index. `place[label]` is the class of a label. UserError for all that is amiss."""
    files = benchmark.splits.get(name)
    if files is None or not (folder / files.index).is_file():
        index = files.index if files else f"{name}.txt"
        raise UserError(f"{benchmark.name}: {folder / index} does not exist, so there is no {name} split")
    index = folder / files.index
    if benchmark.format == "coco":
        refs, labels, where = _read_coco(index, folder)
        first = _labels_file(folder, benchmark)
        names, own = (_names(path, _coco(path)) for path in (first, index))
        if names != own:
            raise UserError(f"{index} and {first} have other categories, or in another order: {own[:5]}, {names[:5]}")
    else:
        refs, labels, where = _read_iris(index, folder, benchmark.multilabel)
    if not refs:
        raise UserError(f"{index} lists no image")
    check_labels(labels, len(place), benchmark.multilabel, lambda i: f"{index}, {where[i]}")
    labels = [tuple(place[value] for value in label) for label in labels]
    return Split(name, refs, labels, check_containers(refs, index, folder))


def _read_iris(index: Path, folder: Path, multilabel: bool) -> tuple[list[ImageRef], Labels, list[str]]:
    refs, labels, where = [], [], []
    try:
        lines = index.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{index} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        path, _, tail = line.strip().rpartition(" ")
        try:
            label = tuple(int(value) for value in tail.split(","))
        except ValueError:
            if not multilabel:
                raise UserError(
                    f"{index}, line {number} has no label: {line.strip()[:120]!r}; a line is PATH LABEL"
                ) from None
            path, label = line.strip(), ()
        if not path:
            raise UserError(f"{index}, line {number} has no image: {line.strip()[:120]!r}; a line is PATH LABEL")
        refs.append(image_ref(path, folder))
        labels.append(label)
        where.append(f"line {number}")
    return refs, labels, where


def image_ref(path: str, folder: Path) -> ImageRef:
    """`train.zip@a/b.jpg` or `a/b.jpg`, relative to the data set's folder."""
    container, at, entry = path.partition("@")
    return ImageRef(str(folder / container), entry if at else "")


def _coco(index: Path) -> dict[str, Any]:
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{index} is not JSON: {error}") from None
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise UserError(f"{index} is no COCO index: it needs images, annotations and categories")
    return content


def _categories(index: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return sorted(content["categories"], key=lambda category: category["id"])
    except (KeyError, TypeError):
        raise UserError(f"{index}: each category needs an id and a name") from None


def _names(index: Path, content: dict[str, Any]) -> list[str]:
    return [str(category.get("name", "")) for category in _categories(index, content)]


def _read_coco(index: Path, folder: Path) -> tuple[list[ImageRef], Labels, list[str]]:
    content = _coco(index)
    try:
        rank = {category["id"]: i for i, category in enumerate(_categories(index, content))}
        images = sorted(content["images"], key=lambda image: image["id"])
        by_image: dict[Any, list[int]] = {image["id"]: [] for image in images}
        for annotation in content["annotations"]:
            label = rank.get(annotation["category_id"], -1)
            if label not in by_image[annotation["image_id"]]:
                by_image[annotation["image_id"]].append(label)
        paths = [
            f"{image['zip_file']}@{image['file_name']}" if image.get("zip_file") else image["file_name"]
            for image in images
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{index}: an image or annotation lacks or misnames {error}") from None
    if len(by_image) < len(images):
        raise UserError(f"{index} lists {len(images) - len(by_image)} image ids more than once; an image has one entry")
    if not all(isinstance(path, str) for path in paths):
        raise UserError(f"{index}: a file_name is no text; it should name an image, e.g. train_images.zip@0001.jpg")
    refs = [image_ref(path, folder) for path in paths]
    return refs, [tuple(by_image[image["id"]]) for image in images], [f"image id {image['id']}" for image in images]


def check_containers(refs: list[ImageRef], index: Path, folder: Path) -> str:
    """Fingerprint of the images in this order: checksums of zip entries, paths, sizes and times of files. UserError
    where one of them, or a zip, is missing."""
    checksums: dict[tuple[str, str], int] = {}
    zips: dict[str, set[str]] = {}
    for ref in refs:
        if ref.entry:
            zips.setdefault(ref.container, set()).add(ref.entry)
    for container, entries in zips.items():
        try:
            with zipfile.ZipFile(container) as archive:
                there = {info.filename: info.CRC for info in archive.infolist()}
                missing = sorted(entries - there.keys())
                checksums |= {(container, entry): there[entry] for entry in entries & there.keys()}
        except FileNotFoundError:
            raise UserError(f"{index} names images in {container}, which does not exist") from None
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:  # ValueError: no name of a file
            raise UserError(f"{container!r} cannot be read: {error}; fetch it again") from None
        if missing:
            raise UserError(
                f"{container} lacks {len(missing):,} of the {len(entries):,} images in {index}: {missing[:3]}"
            )
    loose = [ref.container for ref in refs if not ref.entry]
    missing = [path for path in loose if not os.path.isfile(path)]  # Path raises for names that are too long
    if missing:
        raise UserError(f"{len(missing):,} of the {len(loose):,} image files in {index} do not exist: {missing[:3]}")
    lines = [
        f"{Path(ref.container).name}@{ref.entry} {checksums[ref.container, ref.entry]}"
        if ref.entry
        else file_identity(ref.container, folder)
        for ref in refs
    ]
    return fingerprint(["\n".join(lines).encode("utf-8", "surrogateescape")])
