"""A part of a list -> a shard: what `vlcl data pack` does with so many rows, here or on another machine, and where the
shards are written.

To a folder they are built beside it, and moved there whole. To a store each is written when it is complete, and the
manifest last: without it nothing trains on a half.
"""

import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlcl.data.archive import local_path
from vlcl.data.captions import captions_from
from vlcl.data.decode import (
    BROKEN_IMAGE,
    CAPTION_NOT_TEXT,
    FILE_TOO_LARGE,
    BadSample,
    Keys,
    Limits,
    open_image,
    to_rgb,
)
from vlcl.data.manifest import Manifest, Shard, write_manifest
from vlcl.data.shard import scan_shard
from vlcl.data.urls import without_secrets
from vlcl.errors import UserError, first_line
from vlcl_data_prep.index import index_shards
from vlcl_data_prep.results import Form, Parts, Results, kept_results
from vlcl_data_prep.rows import Row
from vlcl_data_prep.shards import png_bytes, replacing, write_shards

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


@dataclass(frozen=True)
class Part:
    """Rows `first` ... of the source, the `number`-th shard. folder: what relative image paths are relative to."""

    number: int
    first: int
    rows: Iterable[Row]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.number:05d}.tar"

    def __str__(self) -> str:
        return f"shard {self.name}, from row {self.first} on"


@dataclass
class Packed:
    """What became of a part. pairs: 0 where all rows are bad, and there is no shard."""

    name: str
    pairs: int = 0
    captions: int = 0
    skipped: list[tuple[int, str, str]] = field(default_factory=list)
    """row, reason, image"""
    bytes: int = 0
    checksum: str = ""


def pack_part(part: Part, out: str, resize: int | None, limits: Limits) -> Packed:
    """Write the shard of a part to the folder or url `out`. Raises UserError where this machine does not see the
    pictures' folder."""
    packed = Packed(part.name)
    samples = _samples(part, resize, limits, packed)
    first = next(samples, None)
    if first is None:
        return packed
    with tempfile.TemporaryDirectory(dir=local_path(out), prefix=".part-") as folder:
        [path] = write_shards(Path(folder), chain([first], samples), len(packed.skipped) + 1_000_000_000)
        scan = scan_shard(str(path))
        packed.bytes, packed.checksum = scan.bytes or 0, scan.checksum
        if (here := local_path(out)) is not None:
            os.replace(path, Path(here, part.name))
        else:
            _put(path, f"{out}/{part.name}")
    return packed


def _samples(part: Part, resize: int | None, limits: Limits, packed: Packed) -> Iterator[tuple[str, dict[str, bytes]]]:
    def prepare(row: Row) -> dict[str, bytes] | BadRow:
        folder = row.folder or part.folder
        try:
            return _members(row, folder, resize, limits)
        except BadRow as reason:
            if not folder.is_dir():
                raise UserError(f"{os.uname().nodename} has no folder {folder}, which the pictures are in") from None
            return reason

    rows, keys = iter(part.rows), count(part.first)
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            for row, members in zip(chunk, pool.map(prepare, chunk)):
                key = next(keys)
                if isinstance(members, BadRow):
                    packed.skipped.append((key, str(members), row.image if isinstance(row.image, str) else ""))
                else:
                    packed.pairs += 1
                    packed.captions += len(captions_from(members, _keys_of(row), limits).texts)
                    yield f"{key:09d}", members


def _put(path: Path, url: str) -> None:
    from vlcl.data.stores import put_file

    try:
        put_file(path, url)
    except OSError as error:
        raise UserError(f"cannot write {without_secrets(url)}: {first_line(error)}") from None


def _parts_of(packed: Packed) -> Parts | None:
    return asdict(packed), {}


def _result_of(facts: Any, arrays: Mapping[str, Any]) -> Packed:
    return Packed(**{**facts, "skipped": [(row, reason, image) for row, reason, image in facts["skipped"]]})


FORM = Form(_parts_of, _result_of)


@dataclass
class Output:
    """building: the folder or url that shards are written to. listing: of skipped rows, on this machine."""

    out: str
    building: str
    listing: Path
    kept: Results | None
    folder: Path | None
    """what takes the place of OUT, where that is a folder"""
    found: list[Packed] = field(default_factory=list)

    def finish(self, skipped: bool) -> None:
        """Index the shards, with the list of skipped rows beside them."""
        shards = [packed for packed in self.found if packed.pairs]
        if self.folder is not None:
            for path in Path(self.building).glob("*.safetensors"):
                path.unlink()  # from here on the shards are not there
            for number, packed in enumerate(shards):
                os.replace(Path(self.building, packed.name), self.folder / f"{number:05d}.tar")
            if skipped:
                shutil.move(self.listing, self.folder / "skipped.tsv")
            else:
                self.listing.unlink()
            index_shards(str(self.folder), progress=False, warn=False)
            return
        if skipped:
            _put(self.listing, f"{self.out}/skipped.tsv")
        entries = (Shard(packed.name, packed.pairs, packed.bytes, None, packed.checksum) for packed in shards)
        write_manifest(f"{self.out}/manifest.json", Manifest(tuple(entries)))


@contextmanager
def ready_output(out: str, overwrite: bool, keeps: bool) -> Iterator[Output]:
    """Where a data set is written. keeps: finished shards outlive an interruption, beside OUT or, for a url, here.
    Raises UserError where something is there that may not be replaced."""
    if local_path(out) is not None:
        with replacing(Path(out), overwrite) as folder:
            if not keeps:
                yield Output(out, str(folder), folder / "skipped.tsv", None, folder)
                return
            with kept_results(out, FORM, "pack") as kept:
                yield Output(out, str(kept.folder), kept.folder / "skipped.tsv", kept, folder)
        return
    from vlcl.data.stores import names_in

    out = out.rstrip("/")
    with kept_results(out.rpartition("/")[2], FORM, f"pack {out}") as kept:
        there = names_in(out)
        if overwrite or (there and not kept.finished):
            raise UserError(
                f"{without_secrets(out)} holds {len(there)} files, and nothing is deleted in a store: give an address "
                "with nothing there, and no --overwrite"
            )
        yield Output(out, out, kept.folder / "skipped.tsv", kept, None)


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
