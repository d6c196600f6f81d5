"""One decoder with stated rules: a test for each row of the table in docs/data.md."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features
from shards import make_shards

from vlcl.config import load_config
from vlcl.data.captions import captions_from
from vlcl.data.decode import (
    IMAGE_VALUES,
    BadSample,
    Keys,
    decode_image,
    image_bytes_from,
    suffixes,
    to_rgb,
)
from vlcl.data.reader import samples_at
from vlcl.errors import UserError
from vlcl.from_config import make_decoder, open_sources
from vlcl_data_prep.pack import pack_shards
from vlcl_data_prep.verify import Rules, verify_shards
from vlcl_eval.datasets.images import ImageRef, read_image

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (32, 1))  # grey, left to right


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def seen(data: bytes, **options: Any) -> np.ndarray:
    """What the model gets: [H, W, 3], 0 to 255."""
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None].astype(int), 3, axis=2)


def reason_of(data: bytes) -> str:
    with pytest.raises(BadSample) as raised:
        decode_image(data)
    return raised.value.reason


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_by_its_range(kind: str) -> None:
    values = RAMP.astype(np.uint16) * 257
    assert abs(seen(encoded(Image.fromarray(values), kind)) - grey(RAMP)).max() == 0
    assert abs(seen(encoded(Image.fromarray(np.full((4, 4), 32768, np.uint16)), kind)) - 127.5).max() <= 0.5


def test_big_endian_and_32_bit_grey() -> None:
    image = Image.frombytes("I;16B", (64, 32), (RAMP.astype(">u2") * 257).tobytes())
    assert abs(np.asarray(to_rgb(image)).astype(int) - grey(RAMP)).max() == 0
    within = Image.fromarray(RAMP.astype(np.int32) * 257)
    assert abs(seen(encoded(within, "TIFF")) - grey(RAMP)).max() == 0
    for beyond in (70_000, -1):
        assert reason_of(encoded(Image.fromarray(np.full((4, 4), beyond, np.int32)), "TIFF")) == IMAGE_VALUES


def test_16_bit_colour() -> None:
    """Pillow cannot write it: the header of an 8-bit PNG changed, and twice the bytes."""
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixel = struct.pack(">HHH", 0xFFFF, 0x8080, 0x0000)
    rows = b"".join(b"\0" + pixel * 4 for _ in range(4))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert (seen(png) == [255, 128, 0]).all()


def test_floats_of_0_to_1_and_no_others() -> None:
    values = RAMP.astype(np.float32) / 255
    assert abs(seen(encoded(Image.fromarray(values), "TIFF")) - grey(RAMP)).max() <= 1
    for wrong in (values * 255, values - 0.1, np.full((4, 4), np.nan, np.float32)):
        assert reason_of(encoded(Image.fromarray(wrong), "TIFF")) == IMAGE_VALUES


def logo(mode: str) -> Image.Image:
    """A black square on nothing."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 8, 24, 24))
    return image if mode == "RGBA" else image.convert(mode)


def palette_logo() -> bytes:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([0, 0, 0, 0, 0, 0])
    image.paste(1, (8, 8, 24, 24))
    return encoded(image, transparency=0)


def rgb_logo() -> bytes:
    """The colour that stands for nothing is named beside the picture."""
    image = Image.new("RGB", (32, 32), (1, 2, 3))
    image.paste((0, 0, 0), (8, 8, 24, 24))
    return encoded(image, transparency=(1, 2, 3))


TRANSPARENT = {
    "RGBA": lambda: encoded(logo("RGBA")),
    "LA": lambda: encoded(logo("LA")),
    "palette": palette_logo,
    "RGB with a colour for nothing": rgb_logo,
    "WebP": lambda: encoded(logo("RGBA"), "WEBP", lossless=True),
    "GIF": lambda: encoded(logo("RGBA"), "GIF"),
    "TIFF": lambda: encoded(logo("RGBA"), "TIFF"),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_shows_the_background(kind: str) -> None:
    for background, colour in (("white", [255] * 3), ("black", [0] * 3), ("#ff8000", [255, 128, 0])):
        picture = seen(TRANSPARENT[kind](), background=background)
        assert (picture[0, 0] == colour).all()
        assert (picture[16, 16] == 0).all()


def test_16_bit_grey_with_a_value_for_nothing() -> None:
    values = np.full((8, 8), 30_000, np.uint16)
    values[0, 0] = 7
    picture = seen(encoded(Image.fromarray(values), transparency=7))
    assert (picture[0, 0] == 255).all()
    assert (picture[4, 4] == 117).all()


def test_half_transparent_is_half_of_each() -> None:
    assert abs(seen(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))) - 127).max() <= 1


def test_all_readers_agree_on_transparency(tmp_path: Path) -> None:
    """Training, evaluation of ELEVATER, pack with and without --resize: black on white."""
    data = TRANSPARENT["RGBA"]()
    shards = make_shards(tmp_path / "shards", (1,), lambda i, files: files.update(png=data))
    for background, colour in (("white", 255), ("black", 0)):
        config = load_config(None, [f"data.train={shards}", f"data.background={background}"])
        decoder = make_decoder(config, lambda image: image, lambda texts: texts)  # pyright: ignore[reportArgumentType]
        ((picture, _),) = samples_at(open_sources(str(shards)), [0], decoder)
        assert picture.getpixel((0, 0)) == (colour,) * 3
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(data)
    (tmp_path / "a" / "0.txt").write_text("a square")
    assert read_image(ImageRef(str(tmp_path / "a" / "0.png"))).getpixel((0, 0)) == (255, 255, 255)
    for resize in (None, 16):
        pack_shards(tmp_path / "a", tmp_path / f"out{resize}", resize=resize)
        decoder = make_decoder(config, lambda image: image, lambda texts: texts)  # pyright: ignore[reportArgumentType]
        ((picture, _),) = samples_at(open_sources(str(tmp_path / f"out{resize}")), [0], decoder)
        assert picture.getpixel((0, 0)) == (0, 0, 0)  # of data.background=black: the alpha was kept
    with pytest.raises(UserError, match="white, black, grey, or #rrggbb"):
        load_config(None, ["data.train=x", "data.background=puce"])


def test_pack_turns_16_bit_tiff_into_what_training_would_see(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "a" / "0.tif")
    (tmp_path / "a" / "0.txt").write_text("a ramp")
    pack_shards(tmp_path / "a", tmp_path / "out")
    config = load_config(None, [f"data.train={tmp_path / 'out'}"])
    decoder = make_decoder(config, lambda image: image, lambda texts: texts)  # pyright: ignore[reportArgumentType]
    ((picture, _),) = samples_at(open_sources(str(tmp_path / "out")), [0], decoder)
    assert abs(np.asarray(picture).astype(int) - grey(RAMP)).max() <= 1


def test_cmyk_and_inverted_cmyk() -> None:
    """Adobe writes CMYK JPEGs with inverted values and a marker that says so; Pillow heeds it."""
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for data in (encoded(image, "JPEG", quality=95), encoded(image, "TIFF")):
        assert abs(seen(data) - [255, 0, 0]).max() <= 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_pictures(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # pyright: ignore[reportAttributeAccessIssue]
    assert (seen(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 16, 8))
    undo = {2: 0, 3: 1 + 2, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that EXIF would turn back
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    picture = seen(encoded(stored, kind, exif=exif, **options))
    assert picture.shape == (16, 32, 3)
    assert abs(picture[3, 6] - [255, 0, 0]).max() < 12
    assert abs(picture[12, 28] - 255).max() < 12


def test_icc_profiles_are_not_applied() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.new("RGB", (8, 8), (10, 200, 30))
    assert (seen(encoded(image, icc_profile=profile)) == [10, 200, 30]).all()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif() -> None:
    assert abs(seen(encoded(Image.new("RGB", (16, 16), (200, 30, 30)), "AVIF")) - [200, 30, 30]).max() < 12


def test_the_content_decides_and_not_the_name() -> None:
    """A PNG called .jpg, a JPEG called .png."""
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"):
        assert decode_image(encoded(Image.new("RGB", (16, 16), "red"), kind)).size == (16, 16)


@pytest.mark.parametrize("text", ["jpg;png", ".jpg; .png", "JPG,PNG", " .JPG , .Png "])
def test_suffixes_are_taken_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert suffixes(text) == ("jpg", "png")
    assert image_bytes_from({"png": b"p", "jpg": b"j"}, Keys(text)) == b"j"
    assert captions_from({"txt": b"a"}, Keys(text=f"{text}; .TXT")).texts == ("a",)
    shards = make_shards(tmp_path, (3,))
    assert verify_shards(str(shards), 1, Rules(keys=Keys(text, ".TXT")), progress=False) == []


def test_upper_case_suffixes_in_a_shard(tmp_path: Path) -> None:
    def change(i: int, files: dict[str, bytes]) -> None:
        files["PNG"], files["TXT"] = files.pop("png"), files.pop("txt")

    assert verify_shards(str(make_shards(tmp_path, (3,), change)), 1, progress=False) == []


def test_every_row_of_the_table_has_a_test() -> None:
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    table = text.split("## What is seen of a picture")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "|---" not in line][1:]
    named = [line.rsplit("|", 2)[1].strip(" `") for line in rows]
    tests: dict[str, Callable[..., None]] = {name: x for name, x in globals().items() if name.startswith("test_")}
    assert named
    assert [name for name in named if name not in tests] == []
