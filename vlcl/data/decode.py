"""From the files of a sample to an image and a caption, and the short names of what can be wrong with them.

`vlcl data verify` and the streaming loader share these rules: what the one reports is what the other skips. No torch.
"""

import functools
import io
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_KEY = "jpg;jpeg;png;webp"  # suffixes, best first
TEXT_KEY = "txt"
MAX_PIXELS = 89_478_485  # width times height; from twice this on Pillow itself refuses a file as a decompression bomb

NO_IMAGE = "no image"
NO_CAPTION = "no caption"
EMPTY_IMAGE = "empty image"
NOT_AN_IMAGE = "not an image"
BROKEN_IMAGE = "broken image"
IMAGE_TOO_LARGE = "image too large"
EMPTY_CAPTION = "empty caption"
CAPTION_NOT_UTF8 = "caption not UTF-8"
BAD_JSON = "bad json"

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8")  # of formats that Pillow may refuse when cut short


class BadSample(Exception):
    """A sample that cannot be used. `reason` is one of this module's constants, `detail` is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def image_bytes_from(files: Mapping[str, bytes], image_key: str = IMAGE_KEY) -> bytes:
    """The first file that a `;`-separated list of suffixes finds. Raises BadSample."""
    for suffix in image_key.split(";"):
        if suffix in files:
            return files[suffix]
    raise BadSample(NO_IMAGE, f"has {_listed(files)}; looked for {image_key}")


def caption_from(files: Mapping[str, bytes], text_key: str = TEXT_KEY, json_text_key: str | None = None) -> str:
    """The caption: the file with the suffix `text_key`, or with `json_text_key` that key of the sample's .json.

    Both take `;`-separated alternatives. Raises BadSample.
    """
    if json_text_key is not None:
        return _caption_from_json(files, json_text_key)
    for suffix in text_key.split(";"):
        if suffix in files:
            return decode_caption(files[suffix])
    raise BadSample(NO_CAPTION, f"has {_listed(files)}; looked for {text_key}")


def decode_caption(data: bytes) -> str:
    """UTF-8 text without a byte order mark and outer white space. Raises BadSample."""
    try:
        return _not_empty(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample(CAPTION_NOT_UTF8, str(error)) from None


def decode_image(data: bytes, max_pixels: int | None = MAX_PIXELS) -> "Image":
    """A fully loaded RGB image, turned as its EXIF orientation says. Raises BadSample.

    `max_pixels` (width times height; None: no limit) is compared with the header, before anything is decoded.
    """
    if not data:
        raise BadSample(EMPTY_IMAGE)
    Image, ImageOps = _pillow()
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadSample(IMAGE_TOO_LARGE, str(error)) from None
    except Exception as error:  # Pillow's plugins raise nearly any type on damaged files
        reason = BROKEN_IMAGE if data.startswith(_SIGNATURES) else NOT_AN_IMAGE
        raise BadSample(reason, f"starts with {data[:24]!r}") from error
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise BadSample(IMAGE_TOO_LARGE, f"{width} x {height} > {max_pixels:,} pixels")
    try:
        image.load()
        turned = _turned(image, ImageOps)
        if turned.mode == "P" and "transparency" in turned.info:
            turned = turned.convert("RGBA")  # straight to RGB makes Pillow warn
        return turned.convert("RGB")
    except Exception as error:
        raise BadSample(BROKEN_IMAGE, f"{type(error).__name__}: {error}") from error


def _turned(image: "Image", ImageOps: Any) -> "Image":
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data does not make the picture bad
        return image


@functools.cache
def _pillow() -> tuple[Any, Any]:
    """Pillow's modules. Its size warning is off: `max_pixels` is the limit here."""
    from PIL import Image, ImageOps

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image, ImageOps


def _caption_from_json(files: Mapping[str, bytes], json_text_key: str) -> str:
    if "json" not in files:
        raise BadSample(NO_CAPTION, f"has {_listed(files)}; looked for json")
    try:
        content = json.loads(files["json"])
    except ValueError as error:  # not JSON, or not UTF-8
        raise BadSample(BAD_JSON, str(error)) from None
    if not isinstance(content, dict):
        raise BadSample(BAD_JSON, f"an object is needed, not {type(content).__name__}")
    for key in json_text_key.split(";"):
        if isinstance(content.get(key), str):
            return _not_empty(content[key])
    raise BadSample(NO_CAPTION, f"json has {_listed(content)}; looked for {json_text_key}")


def _not_empty(caption: str) -> str:
    caption = caption.strip()
    if not caption:
        raise BadSample(EMPTY_CAPTION)
    return caption


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)[:8]) or "nothing"
