"""Retrieval examples as pictures: the records, their folder, one PNG grid, and a text version for the terminal.

`save_examples` keeps thumbnails (at most 128 px) in RUN/examples/, so that the report can be written again from the
folder alone. A rank is 1 for "right on top"; scores are cosine similarities.
"""

from __future__ import annotations

import hashlib
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlcl.data.decode import to_rgb
from vlcl.files import replace_text, replacing_file
from vlcl.report.style import GOOD, INK, MUTED, RULE

THUMBNAIL = 128  # px, longer side
GRID_FILE = "retrieval.png"


@dataclass(frozen=True)
class Hit:
    """A picture retrieved for a caption; `caption` is the picture's own."""

    image: Image.Image
    caption: str
    score: float
    is_true: bool


@dataclass(frozen=True)
class RetrievalExample:
    """A query caption and its best pictures, best first; `true_rank` is the place of its own picture (1 = right).
    `query`: the picture that was asked with; then the caption is what it shows, and right are others like it."""

    caption: str
    true_rank: int
    true_image: Image.Image | None
    hits: list[Hit]
    query: Image.Image | None = None


@dataclass(frozen=True)
class ImageExample:
    """A query picture and its best captions, best first, as (caption, score, is it the picture's own)."""

    image: Image.Image
    true_caption: str
    hits: list[tuple[str, float, bool]]


def save_examples(
    run_dir: Path, text_examples: Sequence[RetrievalExample], image_examples: Sequence[ImageExample]
) -> None:
    """Write RUN/examples/ (thumbnails and examples.json, replacing those of before) and RUN/retrieval.png."""
    folder = run_dir / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "text_examples": [
            {
                "caption": example.caption,
                "true_rank": example.true_rank,
                "true_image": _save_thumbnail(folder, example.true_image) if example.true_image else None,
                "query": _save_thumbnail(folder, example.query) if example.query else None,
                "hits": [
                    {
                        "image": _save_thumbnail(folder, hit.image),
                        "caption": hit.caption,
                        "score": hit.score,
                        "is_true": hit.is_true,
                    }
                    for hit in example.hits
                ],
            }
            for example in text_examples
        ],
        "image_examples": [
            {
                "image": _save_thumbnail(folder, example.image),
                "true_caption": example.true_caption,
                "hits": [list(hit) for hit in example.hits],
            }
            for example in image_examples
        ],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    replace_text(folder / "examples.json", text)
    for path in folder.glob("*.png"):  # those of an earlier evaluation
        if path.name not in text:
            path.unlink()
    if text_examples:
        asked = "pictures next to a picture" if text_examples[0].query else "held-out pictures for a caption"
        retrieval_grid(text_examples, run_dir / GRID_FILE, f"{run_dir.resolve().name}: {asked}")


def load_examples(run_dir: Path) -> tuple[list[RetrievalExample], list[ImageExample]]:
    """What `save_examples` wrote; two empty lists where it wrote nothing."""
    folder = run_dir / "examples"
    if not (folder / "examples.json").is_file():
        return [], []
    record = json.loads((folder / "examples.json").read_text(encoding="utf-8"))

    def image(name: str) -> Image.Image:
        with Image.open(folder / name, formats=["PNG"]) as opened:
            return opened.convert("RGB")

    text_examples = [
        RetrievalExample(
            caption=example["caption"],
            true_rank=example["true_rank"],
            true_image=image(example["true_image"]) if example["true_image"] else None,
            hits=[Hit(image(h["image"]), h["caption"], h["score"], h["is_true"]) for h in example["hits"]],
            query=image(example["query"]) if example.get("query") else None,
        )
        for example in record["text_examples"]
    ]
    image_examples = [
        ImageExample(image(example["image"]), example["true_caption"], [(c, s, t) for c, s, t in example["hits"]])
        for example in record["image_examples"]
    ]
    return text_examples, image_examples


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG thumbnail on white."""
    thumbnail = to_rgb(image)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    thumbnail.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _save_thumbnail(folder: Path, image: Image.Image) -> str:
    data = png_bytes(image)
    name = hashlib.sha256(data).hexdigest()[:16] + ".png"  # named by content: a picture shown twice is stored once
    (folder / name).write_bytes(data)
    return name


def examples_as_text(text_examples: Sequence[RetrievalExample], image_examples: Sequence[ImageExample]) -> str:
    """The examples for a terminal, one query a line; "" where there are none."""
    lines = []
    if text_examples:
        lines.append("Caption -> held-out pictures, named by their own captions:")
    for example in text_examples:
        hits = [(hit.caption, hit.score, hit.is_true) for hit in example.hits]
        away = "" if any(hit.is_true for hit in example.hits) else f"  (right one: rank {example.true_rank})"
        lines.append(f'  "{one_line(example.caption)}"  ->  {_hits_as_text(hits)}{away}')
    if image_examples:
        lines.append("Picture -> held-out captions:")
    for example in image_examples:
        lines.append(f"  [{one_line(example.true_caption)}]  ->  {_hits_as_text(example.hits)}")
    return "\n".join(lines)


def _hits_as_text(hits: Sequence[tuple[str, float, bool]]) -> str:
    return "  ".join(
        f"{place}. {one_line(caption)} {score:.2f}{' [right]' if is_true else ''}"
        for place, (caption, score, is_true) in enumerate(hits, 1)
    )


def one_line(caption: str, width: int = 48) -> str:
    """A caption as one short line without control characters, which could steer a terminal."""
    clean = "".join(letter if letter.isprintable() else " " for letter in caption)
    return textwrap.shorten(clean, width, placeholder="…") or clean.strip()[: width - 1] + "…"


# The grid is drawn at twice the size at which it is meant to be seen, so that its letters stay sharp.
_CELL, _GAP, _MARGIN, _CAPTION_WIDTH, _HEAD = 192, 24, 48, 400, 128
_ROW = _CELL + 72  # the picture, its score below, air


def retrieval_grid(examples: Sequence[RetrievalExample], path: Path, title: str) -> None:
    """Draw one row a query caption: its rank, its best pictures with the right one framed green, scores below.

    A last column shows the right picture of the rows that miss it. Icons and photos of any shape are fitted into
    square cells, never cropped.
    """
    columns = max(len(example.hits) for example in examples)
    misses = any(_missing_picture(example) for example in examples)
    width = 2 * _MARGIN + _CAPTION_WIDTH + (columns + misses) * (_CELL + _GAP) + misses * _GAP
    grid = Image.new("RGB", (width, _MARGIN + _HEAD + len(examples) * _ROW), "white")
    draw = ImageDraw.Draw(grid)
    draw.text((_MARGIN, _MARGIN), title, fill=INK, font=_font(34, bold=True), anchor="lt")
    first = _MARGIN + _CAPTION_WIDTH
    heads = [f"{place}" for place in range(1, columns + 1)]
    for column, head in enumerate(heads):
        center = first + column * (_CELL + _GAP) + _CELL // 2
        draw.text((center, _MARGIN + _HEAD - 40), head, fill=MUTED, font=_font(24), anchor="ms")
    last = first + columns * (_CELL + _GAP) + _GAP
    if misses:
        draw.text((last + _CELL // 2, _MARGIN + _HEAD - 40), "right one", fill=GOOD, font=_font(24), anchor="ms")
    for row, example in enumerate(examples):
        top = _MARGIN + _HEAD + row * _ROW
        draw.line((_MARGIN, top - 22, width - _MARGIN, top - 22), fill=RULE, width=2)
        _draw_query(grid, draw, example, top)
        for column, hit in enumerate(example.hits):
            left = first + column * (_CELL + _GAP)
            _draw_picture(grid, hit.image, left, top, framed=hit.is_true)
            color = GOOD if hit.is_true else MUTED
            font = _font(22, bold=hit.is_true)
            draw.text((left + _CELL // 2, top + _CELL + 18), f"{hit.score:.2f}", fill=color, font=font, anchor="mt")
        if missing := _missing_picture(example):
            _draw_picture(grid, missing, last, top, framed=True)
    with replacing_file(path) as temporary:
        grid.save(temporary, "PNG", optimize=True)


def _missing_picture(example: RetrievalExample) -> Image.Image | None:
    """The right picture, where it is not among the hits."""
    return None if any(hit.is_true for hit in example.hits) else example.true_image


def _draw_query(grid: Image.Image, draw: ImageDraw.ImageDraw, example: RetrievalExample, top: int) -> None:
    if example.query:
        _draw_picture(grid, example.query, _MARGIN, top, framed=False)
        draw.text((_MARGIN + _CELL + _GAP, top + 8), example.caption, fill=INK, font=_font(24), anchor="lt")
        return
    font, width = _font(28), _CAPTION_WIDTH - 2 * _GAP
    lines = _wrap(draw, one_line(example.caption, 200), font, width, most=4)
    height = 38 * len(lines) + 34
    y = top + max(0, (_CELL - height) // 2)
    for line in lines:
        draw.text((_MARGIN, y), line, fill=INK, font=font, anchor="lt")
        y += 38
    right = example.true_rank == 1
    draw.text(
        (_MARGIN, y + 6),
        f"rank {example.true_rank:,}",
        fill=GOOD if right else MUTED,
        font=_font(24, bold=right),
        anchor="lt",
    )


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines of at most `width` px; what does not fit into `most` lines ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + "…"]
    return [_shorten(draw, line, font, width) for line in lines]


def _shorten(draw: ImageDraw.ImageDraw, line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(line, font) <= width:
        return line
    while line and draw.textlength(line + "…", font) > width:
        line = line[:-1]
    return line + "…"


def _draw_picture(grid: Image.Image, image: Image.Image, left: int, top: int, framed: bool) -> None:
    draw = ImageDraw.Draw(grid)
    picture = to_rgb(image)
    scale = min(_CELL / picture.width, _CELL / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    grid.paste(picture, (left + (_CELL - size[0]) // 2, top + (_CELL - size[1]) // 2))
    box = (left - 8, top - 8, left + _CELL + 7, top + _CELL + 7)
    draw.rounded_rectangle(box, radius=14, outline=GOOD if framed else RULE, width=7 if framed else 2)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # brings a font with Latin, Greek and Cyrillic letters, the same on every machine

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
