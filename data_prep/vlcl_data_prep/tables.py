"""One list of pictures as a table: CSV, TSV, JSON, JSON lines, Parquet, or a data set of the `datasets` package.

A table is looked at (its columns, its separator and encoding) and then read, a record at a time. A row that cannot be
read is handed on as what is wrong with it, never dropped: the place of a row is its number.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from vlcl.errors import UserError, first_line

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TEXTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
TABLES = (*TEXTS, ".parquet")
BATCH = 64  # rows of Parquet; the images of a batch are in memory together
HUB = "hf:"
Records = Iterator[dict[str, Any] | str]


@dataclass(frozen=True)
class Reading:
    """How tables are to be read where they do not say it themselves: see the options of `vlcl data pack`."""

    separator: str | None = None
    encoding: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Table:
    """name: for messages. first: a record of it. read: the records, of these columns at least, or what is wrong with a
    row. folder: what relative paths are relative to. separator: of the columns, where the kind has one."""

    name: str
    columns: tuple[str, ...]
    first: dict[str, Any]
    read: Callable[[Sequence[str]], Records]
    folder: Path
    total: int | None = None
    separator: str | None = None


def kind_of(src: Path) -> str:
    """The suffix that tells how to read a list: `.csv` of a.csv and of a.CSV.gz."""
    name = src.name.lower().removesuffix(".gz")
    return Path(name).suffix


def open_table(src: Path, how: Reading) -> Table:
    """Look at a file. Raises UserError."""
    kind = kind_of(src)
    if kind == ".parquet":
        return _parquet(src)
    separator = None
    if kind in DELIMITERS:
        separator = how.separator.replace("\\t", "\t") if how.separator else _delimiter_of(src, how)
        if len(separator) != 1:
            raise UserError(f"--separator {how.separator!r}: give one character, or \\t for a tab")
        csv.field_size_limit(1 << 30)  # captions may be longer than the default of 128 KiB
        read = partial(_read_table, src, separator, how)
    else:
        read = partial(_read_json, src, how)
    first = next((record for record in read() if isinstance(record, dict)), None)
    columns = () if first is None else tuple(first)
    return Table(str(src), columns, first or {}, lambda _: read(), src.parent, None, separator)


def _delimiter_of(src: Path, how: Reading) -> str:
    """That of the kind; another where the first line has the other and not that one."""
    usual = DELIMITERS[kind_of(src)]
    with _told(src), _open_text(src, how) as lines:
        head = lines.readline()
    others = [other for other in (",", "\t", ";", "|") if other in head]
    return usual if usual in head or not others else others[0]


def _open_bytes(src: Path) -> Any:
    opener: Any = gzip.open if src.name.lower().endswith(".gz") else open
    return opener(src, "rb")


def _open_text(src: Path, how: Reading) -> TextIO:
    """Bytes that are not UTF-8 become surrogates, which the row's caption is then refused for, not the whole file."""
    encoding = how.encoding or _encoding_of(src)
    file = _open_bytes(src)
    if encoding is None:
        return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise UserError(
            f"--encoding {encoding!r} is none that Python knows; give utf-16, cp1252, latin-1 ..."
        ) from None
    return io.TextIOWrapper(file, encoding, newline="")


def _encoding_of(src: Path) -> str | None:
    """UTF-16, which shows in its first bytes; None: UTF-8, as far as these tell."""
    with _told(src), _open_bytes(src) as file:
        head = file.read(64)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    zeros = [head[first::2].count(0) for first in (0, 1)]
    return {(True, False): "utf-16-be", (False, True): "utf-16-le"}.get((zeros[0] > 8, zeros[1] > 8))


@contextmanager
def _told(src: Path) -> Iterator[None]:
    """What a damaged .gz, or another encoding, raises, as a UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{src} is not {error.encoding}: {error.reason}; name another with --encoding") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeError) as error:
        raise UserError(f"{src} is damaged; nothing was written: {error}") from None


def _read_table(src: Path, delimiter: str, how: Reading) -> Records:
    quoted = delimiter != "\t" or _is_quoted(src, delimiter, how)
    with _told(src), _open_text(src, how) as lines:
        rows: Iterable[list[str]]
        if quoted:
            rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=_blank_after(src, delimiter, how))
        else:
            rows = (line.rstrip("\r\n").split(delimiter) for line in lines)
        columns: list[str] = []
        for values in rows:
            if not columns:
                columns = values
            elif len(values) == len(columns):
                yield dict(zip(columns, values))
            elif values and values != [""]:
                yield "wrong number of fields"


def _is_quoted(src: Path, delimiter: str, how: Reading) -> bool:
    """Whether quotes are of the table: tables with tabs are written either way, and one stray quote tells."""
    try:
        with _told(src), _open_text(src, how) as lines:
            return all(True for _ in csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        return False


def _blank_after(src: Path, delimiter: str, how: Reading) -> bool:
    """Whether each separator of the first line has a blank after it, which belongs to no field."""
    with _told(src), _open_text(src, how) as lines:
        names = lines.readline().split(delimiter)[1:]
    return bool(names) and all(name.startswith(" ") for name in names)


def _read_json(src: Path, how: Reading) -> Records:
    """Lines of objects, or one list of them, which is read whole."""
    with _told(src), _open_text(src, how) as file:
        head = file.readline()
        while head.isspace():
            head = file.readline()
        if head.lstrip().startswith("[") and kind_of(src) == ".json":
            try:
                records = json.loads(head + file.read())
            except (ValueError, RecursionError) as error:
                raise UserError(f"{src} is not JSON: {first_line(error)}") from None
            yield from (record if isinstance(record, dict) else "not a JSON object" for record in records)
            return
        for line in chain([head], file):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                yield record if isinstance(record, dict) else "not a JSON object"


def _parquet(src: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow; type: pip install 'vlcl[parquet]'") from error

    @contextmanager
    def opened() -> Iterator[Any]:
        """Open while it is read: a table may have thousands of parts."""
        try:
            file = pyarrow.parquet.ParquetFile(src)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{src} is not a Parquet file: {error}") from error
        with file:
            yield file

    def read(columns: Sequence[str]) -> Records:
        try:
            with opened() as table:
                for batch in table.iter_batches(batch_size=BATCH, columns=list(columns)):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{src} is damaged; nothing was written: {error}") from error

    with opened() as table:
        columns, total = tuple(table.schema_arrow.names), table.metadata.num_rows
        texts = [name for name, kind in zip(columns, table.schema_arrow.types) if str(kind).endswith("string")]
    first = next(read(texts), {}) if texts else {}
    return Table(str(src), columns, first if isinstance(first, dict) else {}, read, src.parent, total)


def open_dataset(name: str, how: Reading) -> Table:
    """A data set of the `datasets` package: `hf:NAME` of the Hugging Face hub, `hf:NAME:CONFIG`, or a folder that
    `save_to_disk` has written. Raises UserError."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} needs the package datasets; type: pip install 'vlcl[hf]'") from error
    try:
        if name.startswith(HUB):
            path, _, config = name.removeprefix(HUB).partition(":")
            found: Any = datasets.load_dataset(path, config or None)
        else:
            found = datasets.load_from_disk(name)
    except Exception as error:  # of the network, the hub, or the files: of many types
        raise UserError(f"{name} cannot be opened: {type(error).__name__}: {first_line(error)}") from error
    if isinstance(found, dict):
        split = how.split or (next(iter(found)) if len(found) == 1 else "train")
        if split not in found:
            raise UserError(f"{name} has no split {split!r}; it has: {', '.join(found)}. Name one with --split")
        found = found[split]
    for column, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))

    def read(columns: Sequence[str]) -> Records:
        yield from found.select_columns(list(columns))

    texts = [column for column, feature in found.features.items() if getattr(feature, "dtype", "") == "string"]
    first = next(read(texts), {}) if texts else {}
    assert isinstance(first, dict)
    return Table(name, tuple(found.column_names), first, read, Path(), len(found))
