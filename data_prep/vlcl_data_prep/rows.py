"""Rows of image and caption from the lists that users have: CSV, TSV, JSON lines, Parquet, a folder of images.

A source is opened (its kind and columns are checked) and then streamed, a row at a time. A row that the source
cannot read is handed on with its problem, never dropped: the place of a row in its source is its number.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcl.errors import UserError

IMAGE_KEYS = ("filepath", "image", "image_path", "path", "file_name", "filename", "file", "img")  # open_clip's first
CAPTION_KEYS = ("title", "caption", "text", "sentence", "description")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PARQUET_BATCH = 64  # rows; the images of a batch are in memory together


@dataclass(frozen=True)
class Row:
    image: Any
    """A path (str), bytes, or a {"bytes", "path"} record."""
    caption: Any
    """Text, if the row is good."""
    problem: str | None = None
    """Why the source itself could not read the row."""


@dataclass(frozen=True)
class Source:
    rows: Iterator[Row]
    folder: Path
    """What relative image paths are relative to."""
    taken: str
    """Which columns were taken, in words."""
    total: int | None = None
    """Number of rows, where the source tells."""


def open_source(src: Path, image_key: str | None, caption_key: str | None, separator: str | None) -> Source:
    """Look at the kind and the columns of `src`. Raises UserError."""
    if src.is_dir():
        return Source(_folder_rows(src), src, "images and the .txt beside each")
    if not src.exists():
        raise UserError(
            f"{src} does not exist; give a file ({', '.join(TABLES)}) or a folder of images with a .txt each"
        )
    if src.suffix.lower() not in TABLES:
        raise UserError(f"{src}: unknown kind {src.suffix!r}; allowed are {', '.join(TABLES)} and folders")
    if src.suffix.lower() == ".parquet":
        return _open_parquet(src, image_key, caption_key)
    read = _read_json_lines if src.suffix.lower() in (".jsonl", ".ndjson") else _csv_reader(src, separator)
    first = next((record for record in read(src) if isinstance(record, dict)), None)
    if first is None:
        raise UserError(f"{src} has no rows that can be read")
    image, caption, taken = choose_columns(src, list(first), image_key, caption_key)
    return Source(_table_rows(read(src), image, caption), src.parent, taken)


def choose_columns(
    src: Path, columns: list[str], image_key: str | None, caption_key: str | None
) -> tuple[str, str, str]:
    """The image column, the caption column, and both in words. Raises UserError that lists the columns."""
    chosen = []
    for option, given, usual in (("--image-key", image_key, IMAGE_KEYS), ("--caption-key", caption_key, CAPTION_KEYS)):
        found = [given] if given in columns else [] if given else [key for key in usual if key in columns]
        if not found:
            problem = f"has no column {given!r}" if given else f"has none of the usual columns {', '.join(usual)}"
            hint = ", or the separator with --separator '\\t'" if len(columns) == 1 and "\t" in columns[0] else ""
            raise UserError(f"{src} {problem}; it has: {', '.join(columns)}. Name one with {option}{hint}")
        chosen.append(found[0])
    return chosen[0], chosen[1], f"image from {chosen[0]!r}, caption from {chosen[1]!r}"


def _table_rows(records: Iterable[dict | str], image: str, caption: str) -> Iterator[Row]:
    for record in records:
        if isinstance(record, str):
            yield Row(None, None, record)
        elif image not in record or caption not in record:
            yield Row(record.get(image), None, "column missing in this row")
        else:
            yield Row(record[image], record[caption])


def _csv_reader(src: Path, separator: str | None) -> Callable[[Path], Iterator[dict | str]]:
    delimiter = (separator or DELIMITERS[src.suffix.lower()]).replace("\\t", "\t")
    if len(delimiter) != 1:
        raise UserError(f"--separator {separator!r}: give one character, or \\t for a tab")
    return lambda path: _read_csv(path, delimiter)


def _read_csv(src: Path, delimiter: str) -> Iterator[dict | str]:
    """Records, or what is wrong with a row."""
    csv.field_size_limit(1 << 30)  # captions may be longer than the default of 128 KiB
    # Bytes that are not UTF-8 become surrogates, which the row's caption is then refused for, not the whole file
    with open(src, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter)
        columns = next(reader, [])
        for values in reader:
            if len(values) == len(columns):
                yield dict(zip(columns, values))
            elif values:
                yield "wrong number of fields"


def _read_json_lines(src: Path) -> Iterator[dict | str]:
    """Records, or what is wrong with a row."""
    with open(src, "rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            yield record if isinstance(record, dict) else "not a JSON object"


def _open_parquet(src: Path, image_key: str | None, caption_key: str | None) -> Source:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow; type: pip install 'vlcl[parquet]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(src)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{src} is not a Parquet file: {error}") from error
    image, caption, taken = choose_columns(src, table.schema_arrow.names, image_key, caption_key)

    def rows() -> Iterator[Row]:
        try:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH, columns=[image, caption]):
                yield from (Row(record[image], record[caption]) for record in batch.to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{src} is damaged; nothing was written: {error}") from error

    return Source(rows(), src.parent, taken, table.metadata.num_rows)


def _folder_rows(src: Path) -> Iterator[Row]:
    """Every image below `src`, in the order of names; the caption is the .txt without the newline at its end."""
    for parent, folders, files in os.walk(src):
        folders.sort()
        for name in sorted(files):
            path = Path(parent) / name
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield _row_with_text_file(path, src)


def _row_with_text_file(path: Path, src: Path) -> Row:
    image = str(path.relative_to(src))
    try:
        return Row(image, path.with_suffix(".txt").read_bytes().decode(errors="surrogateescape").rstrip("\r\n"))
    except FileNotFoundError:
        return Row(image, None, "no .txt beside the image")
