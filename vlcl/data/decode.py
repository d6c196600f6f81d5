"""From the files of a sample to an image and its captions, and the short names of what can be wrong with them.

All readers share these rules: training, `vlcl bias`, `vlcl export`, `vlcl data verify`, `vlcl eval retrieval`. What
verify reports is what training skips. No torch.

A caption is UTF-8 text, with or without a byte order mark; outer white space does not count, and one of nothing else is
empty. It is in the first file that `Keys.text` finds or, with `Keys.json_text`, under the first key of the sample's
.json, an object, that holds a text. Readers differ in one thing: for training (`caption_from`) a file or a text is one
caption, whatever it holds; for retrieval (`captions_from`) every line of a file is one, and a key of the .json may hold
a list of texts.
"""

import functools
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_KEY = "jpg;jpeg;png;webp"  # suffixes, best first
TEXT_KEY = "txt"
MAX_PIXELS = 89_478_485  # width times height; from twice this on Pillow itself refuses a file as a decompression bomb

# The picture formats that are read, in Pillow's words; JPEG takes in MPO, a JPEG with more inside. Some of the others
# (EPS) start programs, whatever the file is called.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

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


@dataclass(frozen=True)
class Keys:
    """What the files of a sample mean. Each is one name or `;`-separated alternatives, best first."""

    image: str = IMAGE_KEY
    """Suffixes of the image."""
    text: str = TEXT_KEY
    """Suffixes of the file with the caption."""
    json_text: str | None = None
    """Keys of the .json that hold the caption in place of a file of its own."""


DEFAULT_KEYS = Keys()


class BadSample(Exception):
    """A sample that cannot be used. `reason` is one of this module's constants, `detail` is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def image_bytes_from(files: Mapping[str, bytes], keys: Keys = DEFAULT_KEYS) -> bytes:
    """The content of the image's file. Raises BadSample."""
    for suffix in keys.image.split(";"):
        if suffix in files:
            return files[suffix]
    raise BadSample(NO_IMAGE, f"has {_listed(files)}; looked for {keys.image}")


def caption_from(files: Mapping[str, bytes], keys: Keys = DEFAULT_KEYS) -> str:
    """The one caption that training takes, line breaks included. Raises BadSample, for an empty one as well."""
    (caption,) = _texts_from(files, keys, several=False)
    caption = caption.strip()
    if not caption:
        raise BadSample(EMPTY_CAPTION)
    return caption


def captions_from(files: Mapping[str, bytes], keys: Keys = DEFAULT_KEYS) -> list[str]:
    """All captions: the lines of the file, as str.splitlines has them, or the text or texts of the .json's key.

    Empty ones are "", for the caller to count; there may be none at all. Raises BadSample.
    """
    return [text.strip() for text in _texts_from(files, keys, several=True)]


def decode_image(data: bytes, max_pixels: int | None = MAX_PIXELS) -> "Image":
    """A fully loaded RGB image, turned as its EXIF orientation says. Raises BadSample.

    `max_pixels` (width times height; None: no limit) is compared with the header, before anything is decoded.
    """
    if not data:
        raise BadSample(EMPTY_IMAGE)
    Image, ImageOps = _pillow()
    try:
        image = Image.open(io.BytesIO(data), formats=readable_formats())
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
def readable_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow has (AVIF: not before 11.3)."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def _pillow() -> tuple[Any, Any]:
    """Pillow's modules. Its size warning is off: `max_pixels` is the limit here."""
    from PIL import Image, ImageOps

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image, ImageOps


def _texts_from(files: Mapping[str, bytes], keys: Keys, several: bool) -> list[str]:
    """The texts of a sample as they are, exactly one unless `several` may be found."""
    if keys.json_text is not None:
        return _texts_from_json(files, keys.json_text, several)
    for suffix in keys.text.split(";"):
        if suffix in files:
            try:
                text = files[suffix].decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise BadSample(CAPTION_NOT_UTF8, str(error)) from None
            return text.splitlines() if several else [text]
    raise BadSample(NO_CAPTION, f"has {_listed(files, several)}; looked for {keys.text}")


def _texts_from_json(files: Mapping[str, bytes], names: str, several: bool) -> list[str]:
    if "json" not in files:
        raise BadSample(NO_CAPTION, f"has {_listed(files, several)}; looked for json")
    try:
        content = json.loads(files["json"])
    except ValueError as error:  # not JSON, or not UTF-8
        raise BadSample(BAD_JSON, str(error)) from None
    if not isinstance(content, dict):
        raise BadSample(BAD_JSON, f"an object is needed, not {type(content).__name__}")
    for name in names.split(";"):
        value = content.get(name)
        if isinstance(value, str):
            return [value]
        if several and isinstance(value, list) and all(isinstance(text, str) for text in value):
            return value
    wanted = f"a text or texts in {names}" if several else names
    raise BadSample(NO_CAPTION, f"json has {_listed(content, several)}; looked for {wanted}")


def _listed(names: Mapping[str, object], all_of_them: bool = False) -> str:
    return ", ".join(sorted(names)) if all_of_them else ", ".join(sorted(names)[:8]) or "nothing"
