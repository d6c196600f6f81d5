"""Drawing SVGs: the one way in which every builder of this package makes pixels of them, with resvg."""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import repeat
from pathlib import Path

from vlcl.data.decode import to_rgb
from vlcl.errors import UserError
from vlcl_data_prep.shards import png_bytes

RENDERER = "resvg_py"


def draw_svgs(svgs: Sequence[str | Path], size: int, workers: int | None = None) -> Iterator[bytes | None]:
    """`draw_svg` of each, in order, by `workers` processes (default: one a core)."""
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(draw_svg, svgs, repeat(size), chunksize=16)


def draw_svg(svg: str | Path, size: int) -> bytes | None:
    """The SVG, as text or as a file's path, as a `size` x `size` RGB PNG on white.

    None if it cannot be drawn, or shows nothing but white.
    """
    import resvg_py
    from PIL import Image

    path, text = (str(svg), None) if isinstance(svg, Path) else (None, svg)
    try:
        drawn = resvg_py.svg_to_bytes(text, path, width=size, height=size, skip_system_fonts=True)
    except ValueError:
        return None
    image = to_rgb(Image.open(io.BytesIO(drawn), formats=["PNG"]))
    blank = image.getextrema() == ((255, 255),) * 3
    return None if blank else png_bytes(image)


def require(*packages: str, or_else: str = "") -> None:
    """Raise UserError unless these packages, all of the extra "demo", can be imported; `or_else` ends its text."""
    try:
        for name in packages:
            import_module(name)
    except ImportError as error:
        raise UserError(
            f"the package {error.name} is not installed; type: pip install 'vlcl[demo]'{or_else}"
        ) from error


def check_size(size: int) -> None:
    """Raise UserError for a --size that is no side of a picture in pixels."""
    if not 8 <= size <= 2048:
        raise UserError(f"--size {size}: give the side of the pictures in pixels, from 8 to 2048")


def check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: give a number of processes from 1")
