"""Rows of image and caption from what users have: lists of pictures (tables.py), several of them, or a folder of
pictures with a text beside each.

A source is opened (its kind and columns are checked) and then streamed, a row at a time, in order: of several lists the
rows of one after those of another.
"""

import glob
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcl.errors import UserError
from vlcl_data_prep.tables import HUB, TABLES, TEXTS, Reading, Records, Table, kind_of, open_dataset, open_table

IMAGE_KEYS = ("filepath", "image", "image_path", "path", "file_name", "filename", "file", "img")  # open_clip's first
CAPTION_KEYS = ("title", "caption", "text", "sentence", "description")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
OBJECTS = (".json", ".jsonl", ".ndjson")
DATASET_FILES = ("dataset_dict.json", "state.json")  # of a folder that `save_to_disk` of datasets has written
ALLOWED = (
    f"{', '.join(TABLES)}, with .gz after it or not, folders and globs of them, folders of pictures with a .txt each, "
    "and hf:NAME"
)
_ADDRESS = re.compile(r"(https?|s3|gs)://", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    image: Any
    """A path (str), bytes, or a {"bytes", "path"} record."""
    caption: Any
    """Text, or a list of texts, if the row is good; of several `columns` a record of them."""
    problem: str | None = None
    """Why the source itself could not read the row."""
    is_file: bool = False
    """Whether the caption is the content of a .txt, as in a shard."""
    columns: tuple[str, ...] = ()
    """Of the captions, where there are several."""
    folder: Path | None = None
    """What a relative image path is relative to; None: to that of the source."""


@dataclass(frozen=True)
class Source:
    rows: Iterator[Row]
    folder: Path
    """What relative image paths are relative to."""
    taken: str
    """Which columns were taken, in words."""
    total: int | None = None
    """Number of rows, where the source tells."""
    columns: tuple[str, ...] = ()
    """Of the captions, where there are several."""
    is_text: bool = False
    """Whether it is a list that may be in another encoding."""


def open_source(
    srcs: Sequence[str], image_key: str | None, caption_keys: Sequence[str], how: Reading | None = None
) -> Source:
    """Look at the kind and the columns of all `srcs`. Raises UserError."""
    how = how or Reading()
    if len(srcs) == 1 and os.path.isdir(srcs[0]) and not _lists_in(Path(srcs[0])):
        return Source(_folder_rows(Path(srcs[0])), Path(srcs[0]), "images and the .txt beside each")
    names = [name for src in srcs for name in _expanded(src)]
    tables = [open_dataset(name, how) if _is_dataset(name) else open_table(Path(name), how) for name in names]
    tables = [table for table in tables if table.columns] or tables[:1]
    if not tables[0].columns:
        raise UserError(f"{tables[0].name} has no rows that can be read")
    image, captions, taken = choose_columns(tables[0], image_key, caption_keys)
    columns = (image, *captions)
    for table in tables[1:]:
        missing = set(columns) - set(table.columns)
        if missing and kind_of(Path(table.name)) not in OBJECTS:  # there each row has its own
            first = Path(tables[0].name).name
            raise UserError(f"{table.name} has no column {min(missing)!r}, which {first} has; pack them one by one")
    rows = (row for table in tables for row in _table_rows(table.read(columns), image, captions, table.folder))
    totals = [table.total for table in tables]
    total = None if None in totals else sum(filter(None, totals))
    if len(tables) > 1:
        taken += f", of {len(tables)} lists"
    is_text = any(kind_of(Path(name)) in TEXTS for name in names)
    return Source(rows, tables[0].folder, taken, total, captions[:-1] and captions, is_text)


def _is_dataset(name: str) -> bool:
    return name.startswith(HUB) or any((Path(name) / file).is_file() for file in DATASET_FILES)


def _expanded(src: str) -> list[str]:
    """The lists that a name stands for, sorted. Raises UserError where there are none."""
    if src.startswith(HUB) and not os.path.exists(src):
        return [src]
    path = Path(src).expanduser()
    if path.is_dir():
        if lists := _lists_in(path):
            return lists
        raise UserError(f"{src} is a folder without lists; a folder of pictures with a .txt each is packed alone")
    if not path.exists() and glob.has_magic(src):
        found = [name for match in sorted(glob.glob(str(path), recursive=True)) for name in _expanded(match)]
        if found:
            return found
        raise UserError(f"nothing matches {src!r}; give {ALLOWED}")
    if not path.exists():
        raise UserError(f"{src} does not exist; give {ALLOWED}")
    if kind_of(path) not in TABLES:
        raise UserError(f"{src}: unknown kind {kind_of(path)!r}; allowed are {ALLOWED}")
    return [str(path)]


def _lists_in(folder: Path) -> list[str]:
    """What is packed of a folder: a data set, Parquet parts, or the lists of one kind, below it too where it has no
    picture with a text. Empty: its pictures."""
    if _is_dataset(str(folder)):
        return [str(folder)]
    if parts := sorted(folder.glob("*.parquet")):
        return list(map(str, parts))
    has_pictures = False
    for row in _folder_rows(folder, look=True):
        has_pictures = True
        if row.problem is None:
            return []
    files = sorted(path for path in folder.rglob("*") if kind_of(path) in TABLES and path.is_file())
    for kind in (
        ".parquet",
        *(kind for kind in TEXTS if kind != ".json" or not has_pictures),
    ):  # one beside each picture
        if found := [str(path) for path in files if kind_of(path) == kind]:
            return found
    return []


def choose_columns(
    table: Table, image_key: str | None, caption_keys: Sequence[str]
) -> tuple[str, tuple[str, ...], str]:
    """The image column, those of captions, and all in words. Raises UserError that lists the columns, or says how
    pictures are fetched."""
    _refuse_without_header(table)
    chosen = []
    wanted = [("--caption-key", key, CAPTION_KEYS) for key in caption_keys or [None]]
    for option, given, usual in [("--image-key", image_key, IMAGE_KEYS), *wanted]:
        found = [given] if given in table.columns else [] if given else [k for k in usual if k in table.columns]
        if not found:
            if option == "--image-key":
                _refuse_addresses(table, image_key, caption_keys)
            problem = f"has no column {given!r}" if given else f"has none of the usual columns {', '.join(usual)}"
            hint = ", or the separator with --separator" if len(table.columns) == 1 and table.separator else ""
            raise UserError(f"{table.name} {problem}; it has: {', '.join(table.columns)}. Name one with {option}{hint}")
        chosen.append(found[0])
    image, *captions = chosen
    if _is_address(table.first.get(image)):
        _refuse_addresses(table, image, captions)
    return image, tuple(captions), f"image from {image!r}, caption from {', '.join(map(repr, captions))}"


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and _ADDRESS.match(value) is not None


def _refuse_without_header(table: Table) -> None:
    """A list whose first line is a row already, as CC3M's: said with what to put above it."""
    if table.separator is None:
        return
    kinds = ["url" if _is_address(name) else "filepath" if name.lower().endswith(IMAGE_SUFFIXES) else ""
             for name in table.columns]  # fmt: skip
    if not any(kinds):
        return
    rest = iter(("caption", *(f"column{number}" for number in range(2, 99))))
    names = [kind or next(rest) for kind in kinds]
    separator = "\\t" if table.separator == "\t" else table.separator
    path = Path(table.name)
    headed = path.with_name(f"headed-{path.name.removesuffix('.gz')}")
    cat = "zcat" if path.suffix == ".gz" else "cat"
    header = shlex.quote(separator.join(names) + "\\n")
    words = f"(printf {header}; {cat} {shlex.quote(str(path))}) > {shlex.quote(str(headed))}"
    then = (
        _img2dataset(headed, "url", "caption") if "url" in kinds else f"vlcl data pack {shlex.quote(str(headed))} OUT"
    )
    raise UserError(
        f"{path} has no line with the names of its columns. Put one above it, and go on:\n  {words}\n  {then}"
    )


def _refuse_addresses(table: Table, image_key: str | None, caption_keys: Sequence[str]) -> None:
    """A list of addresses: said with the command that fetches the pictures."""
    addresses = [name for name, value in table.first.items() if _is_address(value) and image_key in (None, name)]
    if not addresses:
        return
    captions = [*caption_keys, *(key for key in table.columns if key.lower() in CAPTION_KEYS), "CAPTION_COLUMN"]
    command = _img2dataset(Path(table.name), addresses[0], captions[0])
    raise UserError(
        f"{table.name} has addresses of pictures ({addresses[0]!r}), which pack does not fetch. img2dataset (pip "
        f"install img2dataset) does, into shards that need no packing:\n  {command}"
    )


def _img2dataset(path: Path, url: str, caption: str) -> str:
    kind = {".ndjson": "jsonl", "": "parquet"}.get(kind_of(path), kind_of(path)[1:])
    kind += ".gz" * path.name.lower().endswith(".gz")
    return (
        f"img2dataset --url_list {shlex.quote(str(path))} --input_format {kind} "
        f"--url_col {shlex.quote(url)} --caption_col {shlex.quote(caption)} --output_format webdataset "
        "--output_folder SHARDS --image_size 256 --processes_count 8 && vlcl data index SHARDS"
    )


def _table_rows(records: Records | Iterable, image: str, captions: tuple[str, ...], folder: Path) -> Iterator[Row]:
    for record in records:
        if isinstance(record, str):
            yield Row(None, None, record)
        elif image not in record or not any(name in record for name in captions):
            yield Row(record.get(image), None, "column missing in this row")
        elif len(captions) == 1:
            yield Row(record[image], record[captions[0]], folder=folder)
        else:
            yield Row(record[image], {name: record.get(name) for name in captions}, columns=captions, folder=folder)


def _folder_rows(src: Path, look: bool = False) -> Iterator[Row]:
    """Every image below `src`, in the order of names; the caption is the text beside it without the newline at its end:
    0.txt or 0.jpg.txt of 0.jpg, in any case. look: without the text."""
    for parent, folders, files in os.walk(src):
        folders.sort()
        texts = {name.lower(): name for name in sorted(files, reverse=True) if name.lower().endswith(".txt")}
        for name in sorted(files):
            path = Path(parent) / name
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            image = str(path.relative_to(src))
            exact = path.with_suffix(".txt").name
            beside = exact if exact in files else texts.get(exact.lower()) or texts.get(f"{name.lower()}.txt")
            if beside is None:
                yield Row(image, None, "no .txt beside the image")
            elif look:
                yield Row(image, None)
            else:
                text = (path.parent / beside).read_bytes().decode(errors="surrogateescape").rstrip("\r\n")
                yield Row(image, text, is_file=True)
