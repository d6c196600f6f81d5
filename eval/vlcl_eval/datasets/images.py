"""Where an image lies, and how it is read: a file, an entry of a zip, a stretch of a tar.

Images are turned as their EXIF data says and made RGB. Pillow is told to fill up truncated files, as the ELEVATER
toolkit does; what it cannot decode even so is a bad image, which has a reason and never stops a run by itself.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import Dataset

from vlcl.data.decode import DEFAULT_LIMITS, FILE_TOO_LARGE, BadSample, decode_image


class ImageRef(NamedTuple):
    """`container` is a zip, a tar or (with an empty `entry`) the image file itself; `size` 0: all of it."""

    container: str
    entry: str = ""
    offset: int = 0
    size: int = 0

    def __str__(self) -> str:
        return f"{self.container}@{self.entry}" if self.entry else self.container


@lru_cache(maxsize=32)
def _open_zip(path: str, process: int, mtime_ns: int) -> zipfile.ZipFile:
    """One handle a process, as workers that share a file position would read each other's bytes; and a new one for a
    file that was replaced."""
    return zipfile.ZipFile(path)


@lru_cache(maxsize=32)
def _open_file(path: str, process: int, mtime_ns: int) -> int:
    return os.open(path, os.O_RDONLY)


def _now(ref: ImageRef) -> tuple[int, int]:
    return os.getpid(), os.stat(ref.container).st_mtime_ns


def read_bytes(ref: ImageRef) -> bytes:
    """Raises BadSample where the bytes are not to be had, or too many."""
    try:
        if (size := _size_of(ref)) > DEFAULT_LIMITS.max_bytes:
            raise BadSample(FILE_TOO_LARGE, f"{size:,} bytes")
        if ref.size:
            data = os.pread(_open_file(ref.container, *_now(ref)), ref.size, ref.offset)
            if len(data) < ref.size:
                raise BadSample("truncated", f"{len(data):,} of {ref.size:,} bytes")
            return data
        if ref.entry:
            return _open_zip(ref.container, *_now(ref)).read(ref.entry)
        return Path(ref.container).read_bytes()
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise BadSample("unreadable", f"{type(error).__name__}: {error}") from None


def _size_of(ref: ImageRef) -> int:
    if ref.size or not ref.entry:
        return ref.size or os.stat(ref.container).st_size
    return _open_zip(ref.container, *_now(ref)).getinfo(ref.entry).file_size


def read_image(ref: ImageRef) -> Image.Image:
    """The image in RGB. Raises BadSample."""
    data = read_bytes(ref)
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        return decode_image(data)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


class ImageRows(Dataset):
    """(row, tensor [3, H, W], reason) of the images at `rows`; a bad image is zeros, with the reason it is bad."""

    def __init__(
        self, refs: Sequence[ImageRef], rows: Sequence[int], transform: Callable[[Image.Image], Tensor], size: int
    ) -> None:
        self.refs, self.rows, self.transform, self.size = refs, rows, transform, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[int, Tensor, str]:
        row = self.rows[place]
        try:
            return row, self.transform(read_image(self.refs[row])), ""
        except BadSample as bad:
            blank = self.transform(Image.new("RGB", (self.size, self.size)))
            return row, torch.zeros_like(blank), str(bad)
