"""`vlcl data pack`: images with captions in whatever list a user has -> shards + manifest.

Sources: lists (CSV, TSV, JSON, JSON lines, Parquet, Hugging Face data sets), or a folder of images with a .txt beside
each. Rows stream through: memory
does not grow with the data set. JPEG, PNG and WebP bytes are stored as they are unless --resize is given; GIF, BMP
and TIFF, which training does not read, become PNG. Captions are stored as they are, a line each: a row may have a list
of them, and a line break within one becomes a space. Those of several columns are stored in a .json. The key of a
sample is its row number in the source, counted from 0 with the skipped rows, so that a sample is found again there.
Misuse: only the head of an image is read here (it tells the format); `vlcl data verify` decodes them.
"""

import csv
import itertools
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import typer

from vlcl.data.archive import local_path
from vlcl.data.decode import CAPTION_NOT_TEXT, DEFAULT_LIMITS, Limits, parse_limits
from vlcl.errors import UserError, counted
from vlcl_data_prep.engine import LOCAL, EngineOption, map_shards
from vlcl_data_prep.index import LimitOption
from vlcl_data_prep.pack_part import NOT_UTF8, Packed, Part, pack_part, ready_output
from vlcl_data_prep.rows import Source, open_source
from vlcl_data_prep.shards import track
from vlcl_data_prep.tables import Reading


@dataclass
class PackSummary:
    taken: str
    pairs: int = 0
    captions: int = 0
    json_keys: tuple[str, ...] = ()
    """Of the .json, where captions are kept there."""
    shards: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of rows left out, by reason."""
    is_text: bool = False
    """Whether the source is text, in some encoding."""

    @property
    def hint(self) -> str:
        """What to type where captions are in another encoding; "" where none is."""
        if not (self.is_text and NOT_UTF8 in self.skipped):
            return ""
        return "If the list is not UTF-8 but a Windows or Latin encoding, name it: --encoding cp1252"


def pack_shards(
    src: str | Path | Sequence[str | Path],
    out: str | Path,
    image_key: str | None = None,
    caption_key: str | Sequence[str] | None = None,
    resize: int | None = None,
    samples_per_shard: int = 10000,
    overwrite: bool = False,
    separator: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    encoding: str | None = None,
    split: str | None = None,
    engine: str = LOCAL,
    workers: int | None = None,
) -> PackSummary:
    """Write the pairs of `src`, of several one after another, to shards in `out`, with their manifest and skipped.tsv
    (row, reason, image).

    `resize`: images whose shorter side is longer than so many pixels are shrunk to it and encoded anew, PNG as PNG, all
    others as JPEG of quality 95; smaller ones stay as they are. `separator` is that of CSV (default: as its
    name and first line say), `encoding` that of text (default: UTF-8, or UTF-16 where it shows), `split` that of a
    Hugging Face data set.
    A row that asks for more than `limits` is skipped, as training would skip it. Several columns `caption_key` are kept
    apart, as the keys of a .json. `out` may be a url of a store that has nothing there yet. `engine`, `workers`: see
    `map_shards`; without them one process does it all.
    Raises UserError, and writes nothing, if `src` cannot be read, a column is not found, or over half the rows are bad.
    """
    srcs = [str(one) for one in ([src] if isinstance(src, str | Path) else src)]
    if resize is not None and resize < 1:
        raise UserError(f"--resize {resize}: give the shorter side in pixels, from 1")
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard}: give a number from 1")
    caption_keys = [caption_key] if isinstance(caption_key, str) else caption_key or []
    source = open_source(srcs, image_key, caption_keys, Reading(separator, encoding, split))
    summary = PackSummary(source.taken, json_keys=source.columns, is_text=source.is_text)
    workers = workers or (1 if engine == LOCAL else None)
    listed = workers != 1 or local_path(str(out)) is None
    with ready_output(str(out), overwrite, listed) as place:
        work = partial(pack_part, out=place.building, resize=resize, limits=limits)
        parts = _parts(source, samples_per_shard, listed)
        label = "packing" if engine != LOCAL else None
        with open(place.listing, "w", encoding="utf-8", errors="backslashreplace", newline="") as listing:
            skipped = csv.writer(listing, delimiter="\t", lineterminator="\n")
            skipped.writerow(("row", "reason", "image"))
            for packed in map_shards(work, parts, workers, label, engine, place.kept):
                _add(summary, packed, skipped)
                place.found.append(packed)
        _refuse_if_mostly_bad(" ".join(srcs), summary, place.listing)
        place.finish(bool(summary.skipped))
    return summary


def _parts(source: Source, samples_per_shard: int, listed: bool) -> Iterator[Part]:
    """The rows of each shard: as a stream, or, to be sent or found again, as a list with absolute folders."""
    rows = iter(track(source.rows, "packing", source.total))
    for number, first in enumerate(rows):
        part = chain([first], islice(rows, samples_per_shard - 1))
        folder = source.folder
        if listed:
            folder = folder.absolute()
            part = [replace(row, folder=row.folder and row.folder.absolute()) for row in part]
            if any(isinstance(row.image, bytes | dict) for row in part):
                raise UserError(
                    "the pictures are in the list itself: such a one is packed by one worker, on this machine, to a "
                    "folder (no --engine, no --workers); copy that to where it should go"
                )
        yield Part(number, number * samples_per_shard, part, folder)


def _add(summary: PackSummary, packed: Packed, skipped: Any) -> None:
    summary.pairs += packed.pairs
    summary.captions += packed.captions
    summary.shards += packed.pairs > 0
    summary.skipped.update(reason for _, reason, _ in packed.skipped)
    skipped.writerows(packed.skipped)


def _refuse_if_mostly_bad(src: str, summary: PackSummary, listing: Path) -> None:
    bad = sum(summary.skipped.values())
    if summary.pairs and bad <= summary.pairs:
        return
    if not bad:
        raise UserError(f"{src} has no rows; nothing was written")
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.skipped.most_common())
    with open(listing, encoding="utf-8") as lines:
        examples = "".join(f"\n  row {line.rstrip()}" for line in itertools.islice(lines, 1, 4))
    hint = " Name a column of texts, or of lists of texts: --caption-key COLUMN." * (
        CAPTION_NOT_TEXT in summary.skipped
    )
    raise UserError(
        f"{bad} of {bad + summary.pairs} rows of {src} are bad ({reasons}); nothing was written. "
        f"Columns: {summary.taken}.{hint} {summary.hint} The first ones:{examples}".replace("  ", " ")
    )


def pack(
    src: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="CSV, TSV, JSON, JSONL or Parquet files, folders or globs of them, hf:NAME; or a folder of images "
            "with a .txt each.",
        ),
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder for the shards and their manifest; s3://, gs://, az://.")
    ],
    image_key: Annotated[str | None, typer.Option(help="Column of image paths or bytes.")] = None,
    caption_key: Annotated[
        list[str] | None, typer.Option(help="Column of captions; again for each of several.")
    ] = None,
    resize: Annotated[int | None, typer.Option(help="Shrink to this shorter side, in pixels.")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Rows of SRC a shard.")] = 10000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is in OUT.")] = False,
    separator: Annotated[str | None, typer.Option(help="Of a CSV file; default: comma, in .tsv a tab.")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of a text file, as cp1252; default: UTF-8, or UTF-16 where it shows.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a Hugging Face data set; default: train, or the only one.")
    ] = None,
    limit: LimitOption = None,
    engine: EngineOption = LOCAL,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Shards at a time. Default: one; on Ray as many as there are CPUs.")
    ] = None,
) -> None:
    """Pack images with captions into shards with a manifest, ready to train on.

    Relative image paths are relative to the file that lists them. Bad rows are skipped, counted and listed in
    OUT/skipped.tsv.
    """
    summary = pack_shards(
        src, out, image_key, caption_key, resize, samples_per_shard, overwrite, separator, parse_limits(limit or []),
        encoding, split, engine, workers,
    )  # fmt: skip
    print(f"taken: {summary.taken}")
    several = f" with {counted(summary.captions, 'caption')}" if summary.captions > summary.pairs else ""
    print(f"packed: {counted(summary.pairs, 'pair')}{several} in {counted(summary.shards, 'shard')} in {out}")
    for reason, count in summary.skipped.most_common():
        print(f"skipped: {count} {reason}")
    if summary.skipped:
        print(f"listed in {out.rstrip('/')}/skipped.tsv" + (f". {summary.hint}" if summary.hint else ""))
    keys = shlex.quote(f"data.json_text_key=[{','.join(summary.json_keys)}]") if summary.json_keys else ""
    options = "".join(f" --json-text-key {shlex.quote(key)}" for key in summary.json_keys)
    print(f"look: vlcl data show {out}{options}")
    print(f"next: vlcl train CONFIG data.train={out} {keys}".rstrip())
