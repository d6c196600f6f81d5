"""From the files of a sample to its image (the captions: captions.py), what the files mean, what a sample may ask for,
and the short names of what can be wrong with it.

All readers share these rules: training, `vlcl bias`, `vlcl export`, `vlcl data verify`, `vlcl eval retrieval`. What
verify reports is what training skips. No torch.
"""

import functools
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from vlcl.data.shard import Unread, Wanted
from vlcl.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_KEY = "jpg;jpeg;png;webp"  # suffixes, best first
TEXT_KEY = "txt"

# The picture formats that are read, in Pillow's words; JPEG takes in MPO, a JPEG with more inside. Some of the others
# (EPS) start programs, whatever the file is called.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

NO_IMAGE = "no image"
NO_CAPTION = "no caption"
EMPTY_IMAGE = "empty image"
NOT_AN_IMAGE = "not an image"
BROKEN_IMAGE = "broken image"
IMAGE_TOO_LARGE = "image too large"
IMAGE_TOO_LONG = "image too long"
IMAGE_VALUES = "image values out of range"
NO_MEMORY = "not enough memory"  # for a picture within the limits
FILE_TOO_LARGE = "file too large"
CAPTION_TOO_LONG = "caption too long"
TOO_MANY_CAPTIONS = "too many captions"
JSON_TOO_LARGE = "json too large"
JSON_TOO_DEEP = "json too deep"
EMPTY_CAPTION = "empty caption"
CAPTION_NOT_UTF8 = "caption not UTF-8"
CAPTION_NOT_TEXT = "caption is not text"
BAD_JSON = "bad json"

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8")  # of formats that Pillow may refuse when cut short


@dataclass(frozen=True)
class Keys:
    """What the files of a sample mean. Each is one name or alternatives, best first: `jpg;png`. Suffixes may be written
    as people write them: `.JPG, .png`. Captions may be in several places at once: a tuple of such names."""

    image: str = IMAGE_KEY
    """Suffixes of the image."""
    text: str | tuple[str, ...] = TEXT_KEY
    """Suffixes of the files with captions."""
    json_text: str | tuple[str, ...] | None = None
    """Keys of the .json that hold captions in place of files of their own."""
    lines: bool = True
    """Whether each line of a file is a caption; else the file is one, line breaks and all."""

    @property
    def places(self) -> tuple[str, ...]:
        """Where captions are: names, each with its alternatives."""
        names = self.json_text or self.text
        return (names,) if isinstance(names, str) else names

    @property
    def suffixes(self) -> frozenset[str]:
        """Of the files that may be asked for."""
        texts = ["json"] if self.json_text else [suffix for place in self.places for suffix in suffixes(place)]
        return frozenset([*suffixes(self.image), *texts])


@dataclass(frozen=True)
class Limits:
    """What one sample may ask for; more is a bad sample. `data.max_*` of a config, `--limit max_*=NUMBER` of commands.

    Far above what pictures and captions are, and low enough that no sample takes memory or time that others miss.
    """

    max_pixels: int = 89_478_485
    """Width times height; from twice this on Pillow itself refuses a file as a decompression bomb."""
    max_aspect: float = 100.0
    """Long side over short side: the short one is scaled up to the model's input."""
    max_bytes: int = 1 << 26
    """Of a file of the sample: 64 MiB. A larger one is not read."""
    max_caption: int = 20_000
    """Characters of each: tokenizers take time that grows faster than the text."""
    max_captions: int = 1000
    """Of one image."""
    max_json: int = 1 << 20
    """Bytes of the .json: 1 MiB."""
    max_json_depth: int = 64
    """Lists and objects within each other."""


DEFAULT_KEYS, DEFAULT_LIMITS = Keys(), Limits()
BACKGROUND = "white"  # what transparent pictures lie on


@functools.cache
def suffixes(text: str) -> tuple[str, ...]:
    """`.JPG, png` -> jpg, png: as shards have them."""
    return tuple(part.strip().lstrip(".").lower() for part in re.split("[;,]", text) if part.strip())


def parse_limits(texts: Sequence[str]) -> Limits:
    """The limits of `--limit NAME=NUMBER` options. Raises UserError."""
    names = [field.name for field in fields(Limits)]
    found: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in names or not number.isascii() or not number.isdigit() or int(number) < 1:
            raise UserError(f"--limit {text!r}: give NAME=NUMBER, a whole number from 1; NAME is {', '.join(names)}")
        found[name] = int(number)
    return replace(DEFAULT_LIMITS, **found)


def wanted_files(keys: Keys = DEFAULT_KEYS, limits: Limits = DEFAULT_LIMITS) -> Wanted:
    """The files of a shard that are worth reading."""
    return Wanted(keys.suffixes, limits.max_bytes)


class BadSample(Exception):
    """A sample that cannot be used. `reason` is one of this module's constants, `detail` is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def image_bytes_from(files: Mapping[str, bytes], keys: Keys = DEFAULT_KEYS) -> bytes:
    """The content of the image's file. Raises BadSample."""
    for suffix in suffixes(keys.image):
        if suffix in files:
            return content_of(files, suffix)
    raise BadSample(NO_IMAGE, f"has {listed(files)}; looked for {keys.image}")


def decode_image(data: bytes, limits: Limits = DEFAULT_LIMITS, background: str = BACKGROUND) -> "Image":
    """A fully loaded RGB image, turned as its EXIF orientation says; see `to_rgb`. Raises BadSample.

    Of several pictures in a file (animations, pages) the first. The limits are compared with the header, before
    anything is decoded.
    """
    return load_image(open_image(data, limits), background)


def open_image(data: bytes, limits: Limits = DEFAULT_LIMITS) -> "Image":
    """The image with nothing but its header read, which is within the limits: for `load_image`. Raises BadSample."""
    if not data:
        raise BadSample(EMPTY_IMAGE)
    Image, _ = _pillow()
    try:
        image = Image.open(io.BytesIO(data), formats=readable_formats())
    except Image.DecompressionBombError as error:
        raise BadSample(IMAGE_TOO_LARGE, str(error)) from None
    except MemoryError as error:
        raise BadSample(NO_MEMORY, "to open it") from error
    except Exception as error:  # Pillow's plugins raise nearly any type on damaged files
        reason = BROKEN_IMAGE if data.startswith(_SIGNATURES) else NOT_AN_IMAGE
        raise BadSample(reason, f"starts with {data[:24]!r}") from error
    width, height = image.size
    check_size(width, height, limits)
    return image


def load_image(image: "Image", background: str = BACKGROUND, reduced: int = 1) -> "Image":
    """What `open_image` has opened, decoded, as `decode_image` returns it. reduced: 1, 2, 4 or 8, how many times
    smaller each side becomes, the last part of a pixel counting as one; more than 1 where `can_reduce`."""
    try:
        if reduced > 1:
            image.draft(None, (max(image.width // reduced, 1), max(image.height // reduced, 1)))  # pyright: ignore
        image.load()
        return to_rgb(_turned(image), background)
    except BadSample:
        raise
    except MemoryError as error:
        raise BadSample(NO_MEMORY, f"for {image.width} x {image.height} pixels") from error
    except Exception as error:
        raise BadSample(BROKEN_IMAGE, f"{type(error).__name__}: {error}") from error


def can_reduce(image: "Image") -> bool:
    """Whether the decoder itself can make the picture smaller, with what is left out costing no time: JPEG. Not where
    it has to be turned: the rest of a pixel at its end would then be at its beginning."""
    try:
        undecoded = bool(getattr(image, "tile", None))  # a stage of the user may have loaded it
        return image.format == "JPEG" and undecoded and _orientation(image) not in _TURNS
    except Exception:  # damaged EXIF data
        return False


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raise BadSample for a picture of more pixels, or longer and thinner, than a sample may have."""
    if width * height > limits.max_pixels:
        raise BadSample(IMAGE_TOO_LARGE, f"{width} x {height} > {limits.max_pixels:,} pixels")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise BadSample(IMAGE_TOO_LONG, f"{width} x {height}: one side is over {limits.max_aspect:g} times the other")


def to_rgb(image: "Image", background: str = BACKGROUND) -> "Image":
    """The picture that a viewer with a page of that colour shows, with 8 bits a channel.

    Transparency is composited, palettes are resolved; 16-bit values are divided by 257, floats of 0 to 1 multiplied by
    255. ICC profiles are not applied. Raises BadSample for other floats and for integers beyond 16 bits.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    Image, _ = _pillow()
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")


def on_background(image: "Image", background: str = BACKGROUND) -> "Image":
    """`to_rgb`, and an opaque RGB picture as it is, without a copy."""
    return image if image.mode == "RGB" and not image.has_transparency_data else to_rgb(image, background)


def _eight_bit(image: "Image") -> "Image":
    """Grey of 16 bits or of floats as 8-bit grey."""
    import numpy as np

    Image, _ = _pillow()
    values, (most, scale) = np.asarray(image), ((1.0, 255.0) if image.mode == "F" else (65535, 1 / 257))
    if not (values.min() >= 0 and values.max() <= most):  # NaN is neither
        raise BadSample(IMAGE_VALUES, f"{values.min():g} to {values.max():g}; 0 to {most:g} can be read")
    grey = Image.fromarray((values * scale + 0.5).astype(np.uint8))
    if isinstance(nothing := image.info.get("transparency"), int):
        return Image.merge("LA", (grey, Image.fromarray(np.where(values == nothing, 0, 255).astype(np.uint8))))
    return grey


_ORIENTATION, _TURNS = 0x0112, range(2, 9)  # of EXIF
_HAVE_EXIF = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # of Pillow's `info`


def _orientation(image: "Image") -> int:
    if _HAVE_EXIF.isdisjoint(image.info) and not hasattr(image, "tag_v2"):  # TIFF has its tags elsewhere
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _turned(image: "Image") -> "Image":
    try:
        return _pillow()[1].exif_transpose(image) if _orientation(image) in _TURNS else image  # else it copies
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


def content_of(files: Mapping[str, bytes], suffix: str) -> bytes:
    """What a file that the sample has holds. Raises BadSample for one that was too large to be read."""
    data = files[suffix]
    if isinstance(data, Unread):
        raise BadSample(FILE_TOO_LARGE, f"{suffix} of {data.size:,} bytes")
    return data


def listed(names: Iterable[str]) -> str:
    """Some of them, sorted, for people."""
    return ", ".join(sorted(names)[:8]) or "nothing"
