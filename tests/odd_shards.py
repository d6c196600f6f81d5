"""Shards with samples of every kind, good and bad, for the commands that look at data."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw
from shards import add

from vlcl_data_prep.index import index_shards

NASTY = '<script>alert("x")</script> & a cat'
LONG = " ".join(f"word{n}" for n in range(120))


def picture(width: int, height: int, mode: str = "RGB", kind: str = "PNG", **settings: object) -> bytes:
    """A gradient with a disc."""
    ground = Image.linear_gradient("L").resize((width, height))
    image = Image.merge("RGB", (ground, ground.transpose(Image.Transpose.FLIP_TOP_BOTTOM), ground)).convert(mode)
    fill: object = {"RGB": (200, 30, 60), "RGBA": (200, 30, 60, 255), "CMYK": (10, 200, 90, 0)}.get(mode, 40)
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    ImageDraw.Draw(image).ellipse(box, fill=fill)  # pyright: ignore[reportArgumentType]
    if mode == "RGBA":
        image.putalpha(ground)
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(200, 100, kind="JPEG", exif=exif)


def odd_samples() -> Iterator[dict[str, bytes]]:
    """15 samples: 11 good ones, then four bad ones."""
    photo = picture(640, 480, kind="JPEG")
    yield {"jpg": photo, "txt": b"a disc on a gradient"}  # 0
    yield {"jpg": photo, "txt": b"a disc on a gradient"}  # 1: picture and caption again
    yield {"png": picture(300, 300, "RGBA"), "txt": NASTY.encode()}
    yield {"jpg": picture(320, 200, "CMYK", "JPEG"), "txt": "ein Bild für den Druck".encode()}
    yield {"jpg": turned(), "txt": b"turned\nstanding upright\na third caption"}  # 4
    yield {"png": picture(120, 60, "L"), "txt": LONG.encode()}  # 5: cut to any context
    yield {"webp": picture(900, 300, kind="WEBP"), "txt": b"a long one, three to one"}
    yield {"png": picture(48, 48), "txt": b"a small one", "seg.png": b"mask"}
    yield {"png": picture(96, 96, "P"), "txt": ("x" * 30_000 + "\nthe caption that is left").encode()}  # 8
    yield {"png": picture(256, 256), "txt": b"W" * 150}  # 9: no place to break the line
    yield {"png": picture(31, 512), "txt": "圆盘 在 渐变 上".encode()}
    yield {"jpg": photo[:900], "txt": b"cut short"}  # 11
    yield {"jpg": b"<html>404</html>", "txt": b"a page"}
    yield {"jpg": photo, "json": json.dumps({"caption": "elsewhere"}).encode()}
    yield {"txt": b"a caption alone"}


def make_odd(folder: Path) -> Path:
    """Two indexed shards of `odd_samples`: 8 and 7."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = list(odd_samples())
    for number, part in enumerate((range(8), range(8, 15))):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row in part:
                for suffix, data in samples[row].items():
                    add(tar, f"{row:04d}.{suffix}", data)
    index_shards(str(folder), workers=1, progress=False)
    return folder
