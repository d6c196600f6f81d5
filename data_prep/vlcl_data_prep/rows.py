"""Rows of image and caption from the lists that users have: CSV, TSV, JSON lines, Parquet, a folder of images.

A source is opened (its kind and columns are checked) and then streamed, a row at a time. A row that the source
cannot read is handed on with its problem, never dropped: the place of a row in its source is its number.
"""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

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
    """Text, or a list of texts, if the row is good; of several `columns` a record of them."""
    problem: str | None = None
    """Why the source itself could not read the row."""
    is_file: bool = False
    """Whether the caption is the content of a .txt, as in a shard."""
    columns: tuple[str, ...] = ()
    """Of the captions, where there are several."""


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


def open_source(src: Path, image_key: str | None, caption_keys: Sequence[str], separator: str | None) -> Source:
    """Look at the kind and the columns of `src`. Raises UserError."""
    if src.is_dir():
        parts = sorted(src.glob("*.parquet"))
        if parts:
            return _open_parquet(parts, image_key, caption_keys)
        return Source(_folder_rows(src), src, "images and the .txt beside each")
    if not src.exists():
        raise UserError(
            f"{src} does not exist; give a file ({', '.join(TABLES)}) or a folder of images with a .txt each"
        )
    kind = kind_of(src)
    if kind not in TABLES:
        raise UserError(
            f"{src}: unknown kind {kind!r}; allowed are {', '.join(TABLES)}, with .gz after it or not, folders of "
            "pictures, and folders of Parquet files"
        )
    if kind == ".parquet":
        return _open_parquet([src], image_key, caption_keys)
    read = _read_json_lines if kind in (".jsonl", ".ndjson") else _csv_reader(src, separator)
    first = next((record for record in read(src) if isinstance(record, dict)), None)
    if first is None:
        raise UserError(f"{src} has no rows that can be read")
    image, captions, taken = choose_columns(src, list(first), image_key, caption_keys)
    return Source(_table_rows(read(src), image, captions), src.parent, taken, None, captions[:-1] and captions)


def kind_of(src: Path) -> str:
    """The suffix that tells how to read a list: `.csv` of a.csv and of a.CSV.gz."""
    name = src.name.lower().removesuffix(".gz")
    return Path(name).suffix


def choose_columns(
    src: Path, columns: list[str], image_key: str | None, caption_keys: Sequence[str]
) -> tuple[str, tuple[str, ...], str]:
    """The image column, those of captions, and all in words. Raises UserError that lists the columns."""
    chosen = []
    wanted = [("--caption-key", key, CAPTION_KEYS) for key in caption_keys or [None]]
    for option, given, usual in [("--image-key", image_key, IMAGE_KEYS), *wanted]:
        found = [given] if given in columns else [] if given else [key for key in usual if key in columns]
        if not found:
            problem = f"has no column {given!r}" if given else f"has none of the usual columns {', '.join(usual)}"
            hint = ", or the separator with --separator" if len(columns) == 1 else ""
            raise UserError(f"{src} {problem}; it has: {', '.join(columns)}. Name one with {option}{hint}")
        chosen.append(found[0])
    image, *captions = chosen
    return image, tuple(captions), f"image from {image!r}, caption from {', '.join(map(repr, captions))}"


def _table_rows(records: Iterable[dict | str], image: str, captions: tuple[str, ...]) -> Iterator[Row]:
    for record in records:
        if isinstance(record, str):
            yield Row(None, None, record)
        elif image not in record or not any(name in record for name in captions):
            yield Row(record.get(image), None, "column missing in this row")
        elif len(captions) == 1:
            yield Row(record[image], record[captions[0]])
        else:
            yield Row(record[image], {name: record.get(name) for name in captions}, columns=captions)


def _csv_reader(src: Path, separator: str | None) -> Callable[[Path], Iterator[dict | str]]:
    delimiter = separator.replace("\\t", "\t") if separator else _delimiter_of(src)
    if len(delimiter) != 1:
        raise UserError(f"--separator {separator!r}: give one character, or \\t for a tab")
    csv.field_size_limit(1 << 30)  # captions may be longer than the default of 128 KiB
    read = _read_csv if delimiter != "\t" or _is_quoted(src, delimiter) else _read_unquoted
    return lambda path: read(path, delimiter)


def _delimiter_of(src: Path) -> str:
    """That of the kind; another where the first line has the other and not that one."""
    usual = DELIMITERS[kind_of(src)]
    with _told(src), _open_text(src) as lines:
        head = lines.readline()
    others = [other for other in (",", "\t", ";", "|") if other in head]
    return usual if usual in head or not others else others[0]


def _open_text(src: Path) -> TextIO:
    """Bytes that are not UTF-8 become surrogates, which the row's caption is then refused for, not the whole file."""
    opener: Any = gzip.open if src.name.lower().endswith(".gz") else open
    return opener(src, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_csv(src: Path, delimiter: str) -> Iterator[dict | str]:
    """Records, or what is wrong with a row."""
    with _told(src), _open_text(src) as lines:
        reader = csv.reader(lines, delimiter=delimiter)
        columns = next(reader, [])
        for values in reader:
            if len(values) == len(columns):
                yield dict(zip(columns, values))
            elif values:
                yield "wrong number of fields"


def _is_quoted(src: Path, delimiter: str) -> bool:
    """Whether quotes are of the table: tables with tabs are written either way, and one stray quote tells."""
    try:
        with _told(src), _open_text(src) as lines:
            return all(True for _ in csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        return False


def _read_unquoted(src: Path, delimiter: str) -> Iterator[dict | str]:
    """Records of a table in which quotes are text, or what is wrong with a row."""
    with _told(src), _open_text(src) as lines:
        columns: list[str] = []
        for line in lines:
            values = line.rstrip("\r\n").split(delimiter)
            if not columns:
                columns = values
            elif len(values) == len(columns):
                yield dict(zip(columns, values))
            elif values != [""]:
                yield "wrong number of fields"


@contextmanager
def _told(src: Path) -> Iterator[None]:
    """What a damaged .gz raises, as a UserError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{src} is damaged; nothing was written: {error}") from None


def _read_json_lines(src: Path) -> Iterator[dict | str]:
    """Records, or what is wrong with a row."""
    opener: Any = gzip.open if src.name.lower().endswith(".gz") else open
    with _told(src), opener(src, "rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            yield record if isinstance(record, dict) else "not a JSON object"


def _open_parquet(files: Sequence[Path], image_key: str | None, caption_keys: Sequence[str]) -> Source:
    """The rows of one file, or of the parts of a table, one after another."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow; type: pip install 'vlcl[parquet]'") from error

    @contextmanager
    def opened(src: Path) -> Iterator[Any]:
        """Open one at a time: a table may have thousands of parts."""
        try:
            file = pyarrow.parquet.ParquetFile(src)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{src} is not a Parquet file: {error}") from error
        with file:
            yield file

    with opened(files[0]) as first:
        image, captions, taken = choose_columns(files[0], first.schema_arrow.names, image_key, caption_keys)
    columns = [image, *captions]
    total = 0
    for src in files:
        with opened(src) as table:
            total += table.metadata.num_rows
            if missing := set(columns) - set(table.schema_arrow.names):
                raise UserError(
                    f"{src} has no column {min(missing)!r}, which {files[0].name} has; pack them one by one"
                )

    def rows() -> Iterator[Row]:
        for src in files:
            try:
                with opened(src) as table:
                    for batch in table.iter_batches(batch_size=PARQUET_BATCH, columns=columns):
                        yield from _table_rows(batch.to_pylist(), image, captions)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{src} is damaged; nothing was written: {error}") from error

    return Source(rows(), files[0].parent, taken, total, captions[:-1] and captions)


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
        text = path.with_suffix(".txt").read_bytes().decode(errors="surrogateescape").rstrip("\r\n")
        return Row(image, text, is_file=True)
    except FileNotFoundError:
        return Row(image, None, "no .txt beside the image")
