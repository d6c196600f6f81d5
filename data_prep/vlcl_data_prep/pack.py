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
import io
import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlcl.data.captions import captions_from
from vlcl.data.decode import (
    BROKEN_IMAGE,
    CAPTION_NOT_TEXT,
    DEFAULT_LIMITS,
    FILE_TOO_LARGE,
    BadSample,
    Keys,
    Limits,
    open_image,
    parse_limits,
    to_rgb,
)
from vlcl.errors import UserError, counted
from vlcl_data_prep.index import LimitOption, index_shards
from vlcl_data_prep.rows import Row, Source, open_source
from vlcl_data_prep.shards import png_bytes, replacing, track, write_shards
from vlcl_data_prep.tables import Reading

if TYPE_CHECKING:
    from PIL import Image

STORED = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # kept as they are; MPO: a JPEG with more inside. Other readable formats are turned into PNG
NOT_UTF8 = "caption is not UTF-8"
ROWS_AT_ONCE = 64  # read and resized by threads; bounds what is in memory


class BadRow(Exception):
    """A row that is skipped; the text is the reason, one of a few, so that reasons can be counted."""


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
) -> PackSummary:
    """Write the pairs of `src`, of several one after another, to shards in `out`, with their manifest and skipped.tsv
    (row, reason, image).

    `resize`: images whose shorter side is longer than so many pixels are shrunk to it and encoded anew, PNG as PNG, all
    others as JPEG of quality 95; smaller ones stay as they are. `separator` is that of CSV (default: as its
    name and first line say), `encoding` that of text (default: UTF-8, or UTF-16 where it shows), `split` that of a
    Hugging Face data set.
    A row that asks for more than `limits` is skipped, as training would skip it. Several columns `caption_key` are kept
    apart, as the keys of a .json.
    Raises UserError, and writes nothing, if `src` cannot be read, a column is not found, or over half the rows are bad.
    """
    srcs = [str(one) for one in ([src] if isinstance(src, str | Path) else src)]
    out = Path(out)
    if resize is not None and resize < 1:
        raise UserError(f"--resize {resize}: give the shorter side in pixels, from 1")
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard}: give a number from 1")
    caption_keys = [caption_key] if isinstance(caption_key, str) else caption_key or []
    source = open_source(srcs, image_key, caption_keys, Reading(separator, encoding, split))
    summary = PackSummary(source.taken, json_keys=source.columns, is_text=source.is_text)
    with replacing(out, overwrite) as folder:
        with open(folder / "skipped.tsv", "w", encoding="utf-8", errors="backslashreplace", newline="") as listing:
            skipped = csv.writer(listing, delimiter="\t", lineterminator="\n")
            skipped.writerow(("row", "reason", "image"))
            samples = _samples(source, resize, limits, summary, skipped)
            summary.shards = len(write_shards(folder, samples, samples_per_shard))
        _refuse_if_mostly_bad(" ".join(srcs), summary, folder / "skipped.tsv")
        if not summary.skipped:
            (folder / "skipped.tsv").unlink()
        index_shards(str(folder), progress=False, warn=False)
    return summary


def _samples(
    source: Source, resize: int | None, limits: Limits, summary: PackSummary, skipped: Any
) -> Iterator[tuple[str, dict]]:
    def prepare(row: Row) -> dict[str, bytes] | BadRow:
        try:
            return _members(row, row.folder or source.folder, resize, limits)
        except BadRow as reason:
            return reason

    rows = track(source.rows, "packing", source.total)
    number = itertools.count()
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
            for row, members in zip(chunk, pool.map(prepare, chunk)):
                key = next(number)
                if isinstance(members, BadRow):
                    summary.skipped[str(members)] += 1
                    skipped.writerow((key, members, row.image if isinstance(row.image, str) else ""))
                else:
                    summary.pairs += 1
                    summary.captions += len(captions_from(members, _keys_of(row), limits).texts)
                    yield f"{key:09d}", members


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


def _members(row: Row, folder: Path, resize: int | None, limits: Limits) -> dict[str, bytes]:
    """The members of a sample. Raises BadRow."""
    if row.problem is not None:
        raise BadRow(row.problem)
    captions = _caption_file(row, limits)
    extension, content = _stored_image(_image_content(row.image, folder, limits), resize, limits)
    return {extension: content, **captions}


def _keys_of(row: Row) -> Keys:
    return Keys(json_text=row.columns or None)


def _caption_file(row: Row, limits: Limits) -> dict[str, bytes]:
    """The .txt of a row, a caption a line, or the .json of several columns. Raises BadRow for what training would leave
    out of it."""
    try:
        if row.columns:
            files = {"json": json.dumps(row.caption, ensure_ascii=False).encode()}
        else:
            files = {"txt": _lines(row).encode()}
        captions = captions_from(files, _keys_of(row), limits)
    except UnicodeEncodeError:
        raise BadRow(NOT_UTF8) from None
    except TypeError:  # what JSON has no form for
        raise BadRow(CAPTION_NOT_TEXT) from None
    except BadSample as bad:
        raise BadRow(bad.reason) from None
    if captions.left_out:
        raise BadRow(captions.left_out[0].reason)
    return files


def _lines(row: Row) -> str:
    if row.is_file:
        return row.caption
    texts = [text for text in (row.caption if isinstance(row.caption, list) else [row.caption]) if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(CAPTION_NOT_TEXT)
    return "\n".join(" ".join(text.splitlines()) for text in texts if text.strip())


def _image_content(image: Any, folder: Path, limits: Limits) -> bytes:
    if isinstance(image, dict):  # how Hugging Face datasets store an image
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        if len(image) > limits.max_bytes:
            raise BadRow(FILE_TOO_LARGE)
        return image
    if not isinstance(image, str) or not image:
        raise BadRow("no image")
    try:
        if (folder / image).stat().st_size > limits.max_bytes:
            raise BadRow(FILE_TOO_LARGE)
        return (folder / image).read_bytes()
    except FileNotFoundError:
        raise BadRow("missing file") from None
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        raise BadRow("unreadable file") from None


def _stored_image(content: bytes, resize: int | None, limits: Limits) -> tuple[str, bytes]:
    try:
        with open_image(content, limits) as image:
            extension = STORED.get(image.format or "")
            if extension and (resize is None or min(image.size) <= resize):
                return extension, content
            return _encode_again(image, extension or "png", resize)
    except BadSample as bad:
        raise BadRow(bad.reason) from None
    except Exception:  # damaged images raise most of Python's exceptions, depending on the format
        raise BadRow(BROKEN_IMAGE) from None


def _encode_again(image: "Image.Image", extension: str, resize: int | None) -> tuple[str, bytes]:
    from PIL import Image, ImageOps

    scale = min(1.0, (resize or math.inf) / min(image.size))
    size = round(image.width * scale), round(image.height * scale)
    image.draft(
        None, (2 * size[0], 2 * size[1])
    )  # a large JPEG is decoded at a half or a quarter: several times faster
    upright = ImageOps.exif_transpose(image)  # the camera's turn is in the EXIF record, which is lost on the way
    if (upright.width > upright.height) != (image.width > image.height):
        size = size[1], size[0]
    if extension == "png":
        colours = upright.convert("RGBA") if upright.has_transparency_data else to_rgb(upright)
        return "png", png_bytes(colours.resize(size, Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    to_rgb(upright).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return "jpg", buffer.getvalue()


def pack(
    src: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="CSV, TSV, JSON, JSONL or Parquet files, folders or globs of them, hf:NAME; or a folder of images "
            "with a .txt each.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards and their manifest.")],
    image_key: Annotated[str | None, typer.Option(help="Column of image paths or bytes.")] = None,
    caption_key: Annotated[
        list[str] | None, typer.Option(help="Column of captions; again for each of several.")
    ] = None,
    resize: Annotated[int | None, typer.Option(help="Shrink to this shorter side, in pixels.")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Pairs a shard.")] = 10000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is in OUT.")] = False,
    separator: Annotated[str | None, typer.Option(help="Of a CSV file; default: comma, in .tsv a tab.")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of a text file, as cp1252; default: UTF-8, or UTF-16 where it shows.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a Hugging Face data set; default: train, or the only one.")
    ] = None,
    limit: LimitOption = None,
) -> None:
    """Pack images with captions into shards with a manifest, ready to train on.

    Relative image paths are relative to the file that lists them. Bad rows are skipped, counted and listed in
    OUT/skipped.tsv.
    """
    summary = pack_shards(
        src, out, image_key, caption_key, resize, samples_per_shard, overwrite, separator, parse_limits(limit or []),
        encoding, split,
    )  # fmt: skip
    print(f"taken: {summary.taken}")
    several = f" with {counted(summary.captions, 'caption')}" if summary.captions > summary.pairs else ""
    print(f"packed: {counted(summary.pairs, 'pair')}{several} in {counted(summary.shards, 'shard')} in {out}")
    for reason, count in summary.skipped.most_common():
        print(f"skipped: {count} {reason}")
    if summary.skipped:
        print(f"listed in {out / 'skipped.tsv'}" + (f". {summary.hint}" if summary.hint else ""))
    keys = shlex.quote(f"data.json_text_key=[{','.join(summary.json_keys)}]") if summary.json_keys else ""
    options = "".join(f" --json-text-key {shlex.quote(key)}" for key in summary.json_keys)
    print(f"look: vlcl data show {out}{options}")
    print(f"next: vlcl train CONFIG data.train={out} {keys}".rstrip())
