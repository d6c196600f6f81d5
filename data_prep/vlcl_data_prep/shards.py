"""Writing shards: the one way in which every builder of this package makes a data set.

A shard is a plain tar in the WebDataset layout, by webdataset's writer: the members of one sample follow each other
and share the name up to the first dot. Owner, mode and times are constants, so the same samples give the same bytes on
every machine.

A data set is built in a temporary folder beside its place and moved there whole (`replacing`): an interrupted build
leaves neither half a data set nor a damaged older one. Misuse: writing into the final folder directly loses that
guarantee.
"""

import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vlcl import files
from vlcl.errors import UserError, reason

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

OUR_FILES = {
    "manifest.json",
    "verify.tsv",
    "ATTRIBUTION.txt",
    "skipped.tsv",
}  # beside *.tar: all that a data set of ours holds
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


def write_shards(
    out_dir: Path, samples: Iterable[tuple[str, dict[str, bytes]]], samples_per_shard: int, prefix: str = ""
) -> list[Path]:
    """Write `samples` in order to `out_dir`/PREFIX00000.tar, 00001.tar ... and return the paths.

    A sample is (key, {extension: content}); keys hold no dot and are unique. Samples are taken one at a time, never
    all in memory. Each shard has a temporary name until it is complete. Raises UserError if `out_dir` already holds
    shards.
    """
    from webdataset.writer import TarWriter  # imports torch, which nothing else here needs

    out_dir.mkdir(parents=True, exist_ok=True)
    if any(out_dir.glob("*.tar")):
        raise UserError(f"{out_dir} already holds shards; choose another folder")
    paths: list[Path] = []
    rest = iter(samples)
    for first in rest:
        path = out_dir / f"{prefix}{len(paths):05d}.tar"
        with (
            files.replacing_file(path) as unfinished,
            open(unfinished, "wb") as file,  # opened here: to webdataset a name with a colon is a url
            TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar,
        ):
            for key, members in chain([first], islice(rest, samples_per_shard - 1)):
                assert "." not in key, f"a key with a dot would be cut there by every reader: {key}"
                for extension, content in members.items():  # one by one: the writer would sort them, text before webp
                    tar.write({"__key__": key, extension: content})
        paths.append(path)
    return paths


@contextmanager
def replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes the place of `out` when the block ends well.

    `out` may be absent or empty or, with `overwrite`, a data set made by this package; it keeps its old content
    until the new one is complete, and for good if the block raises. Raises UserError if `out` holds anything else.
    """
    with replacing_all([out], overwrite) as (folder,):
        yield folder


@contextmanager
def replacing_all(outs: Sequence[Path], overwrite: bool) -> Iterator[list[Path]]:
    """`replacing` for several data sets that belong together: all are replaced when the block ends well, none if it
    raises. (One after another: a disk that fails between two of them leaves old beside new.)"""
    try:
        with files.replacing(outs, lambda target: _check_replaceable(target, overwrite)) as folders:
            yield folders
    except OSError as error:
        raise UserError(
            f"cannot write to {' and '.join(map(str, outs))}: {reason(error)}; nothing there has changed. Make room, "
            "or give another folder"
        ) from error


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if file := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"{file} is a file; give a folder for the shards")
    if not out.exists():
        return
    if out.is_mount():
        raise UserError(
            f"{out} is a mount point, which cannot be replaced whole; give a folder below it, as {out}/pairs"
        )
    files = [path for path in out.rglob("*") if not path.is_dir()]
    foreign = [path for path in files if path.suffix != ".tar" and path.name not in OUR_FILES]
    if foreign:
        raise UserError(
            f"{out} holds files that are not of a data set ({foreign[0].relative_to(out)}, {len(foreign)} in all) "
            "and are left alone; give a new or empty folder"
        )
    if files and not overwrite:
        raise UserError(f"{out} already holds a data set; add --overwrite to replace it, or give another folder")


def even_shards(num_samples: int, most: int, at_least: int = 8) -> int:
    """Samples per shard so that `num_samples` fill equal shards of `most` at the most, and `at_least` shards if
    they can.

    Several shards, even for a small data set, so that ranks and data workers have one each.
    """
    num_shards = max(at_least, -(-num_samples // most))
    return max(1, -(-num_samples // num_shards))


def png_bytes(image: "Image.Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` and show how many went by: a live bar on a terminal, a line every 10 seconds otherwise, on
    stderr."""
    if sys.stderr.isatty():
        yield from _track_bar(items, description, total)
        return
    of_total = f"/{total}" if total is not None else ""
    count, last_line = 0, time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            print(f"{description}: {count}{of_total}", file=sys.stderr, flush=True)
            last_line = time.monotonic()
    print(f"{description}: {count}{of_total}", file=sys.stderr, flush=True)


def _track_bar(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            bar.advance(task)
