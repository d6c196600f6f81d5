"""`vlcl data show`: one page of pictures with all their captions, as training decodes and reads them. No torch."""

import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any

import typer

from vlcl.config.samples import keys_of, limits_of
from vlcl.data.captions import captions_from
from vlcl.data.decode import BadSample, Keys, Limits, decode_image, image_bytes_from, suffixes, wanted_files
from vlcl.data.shard import RawSample, Unread
from vlcl.errors import UserError, counted
from vlcl.files import replace_text
from vlcl_data_prep.index import LimitOption
from vlcl_data_prep.pages import header, in_bytes, page, thumbnail
from vlcl_data_prep.samples import (
    ImageKeyOption,
    JsonTextKeyOption,
    Rows,
    Samples,
    SetOption,
    SplitOption,
    TextKeyOption,
    TextLinesOption,
    look_at,
    open_samples,
    output_path,
)

MOST_ROWS = 5000  # on a page: about 100 MB
_ROWS = re.compile(r"\d[\d,-]*")


def show(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS|RUN [ROWS]",
            help="Shards as for data.train, a run folder or a config; rows: 0-63, 5,17, or a .json with rows.",
        ),
    ],
    count: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="Without ROWS: how many, drawn at random.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of that draw.")] = 0,
    output: Annotated[
        str | None, typer.Option(metavar="HTML", help="Default: show.html in the folder of the shards or the run.")
    ] = None,
    split: SplitOption = "train",
    image_key: ImageKeyOption = None,
    text_key: TextKeyOption = None,
    json_text_key: JsonTextKeyOption = None,
    text_lines: TextLinesOption = None,
    limit: LimitOption = None,
    settings: SetOption = None,
) -> None:
    """Make one page of pictures with their captions, as training sees them.

    Pictures go through training's decoder: turned upright, RGB, transparent
    parts on data.background. Samples that training leaves out are shown with
    the reason. The page loads nothing: it can be sent as it is. Rows are those
    of the manifest (vlcl data index SHARDS).

    \b
    Examples:
      vlcl data show shards/cc3m
      vlcl data show runs/cc3m 0-63
      vlcl data show runs/cc3m runs/cc3m/anomalies/step-00001200.json
    """
    what, asked = split_arguments(what)
    samples = open_samples(
        what, split, image_key=image_key, text_key=text_key, json_text_key=json_text_key, text_lines=text_lines,
        limit=limit, settings=settings,
    )  # fmt: skip
    path = output_path(output, samples, "show.html")
    rows = samples.indexed()
    chosen = parse_rows(asked, len(rows)) if asked else draw_rows(len(rows), count, seed)
    how = asked or f"{len(chosen):,} at random (--seed {seed})"
    bad = write_page(path, samples, rows, chosen, how)
    print(f"{len(chosen):,} of {counted(len(rows), 'sample')}, {bad:,} that training leaves out\npage: {path}")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], str]:
    """What is to be shown, and its rows; "" without any. What is there as a folder or a tar is no list of rows."""
    *what, last = arguments
    is_rows = _ROWS.fullmatch(last) and not Path(last).exists()
    if what and (is_rows or last.endswith(".json")):
        return what, last
    return [*arguments], ""


def draw_rows(total: int, count: int, seed: int) -> list[int]:
    """`count` different rows of `total`, sorted."""
    return sorted(random.Random(seed).sample(range(total), min(count, total)))


def parse_rows(text: str, total: int) -> list[int]:
    """The rows that `0-63`, `5,17` or a .json names, in its order, each once. Raises UserError."""
    if text.endswith(".json"):
        rows = _rows_of_file(Path(text))
    else:
        rows = []
        for part in text.strip(",").split(","):
            first, dash, last = part.partition("-")
            if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
                raise UserError(f"rows {text!r}: {part!r} is no row and no range; write 0-63 or 5,17")
            if dash and int(last) - int(first) >= MOST_ROWS:
                raise UserError(f"rows {text!r}: a page shows at most {MOST_ROWS:,}; name fewer")
            rows += range(int(first), int(last if dash else first) + 1)
    rows = list(dict.fromkeys(rows))
    if outside := [row for row in rows if not 0 <= row < total]:
        raise UserError(f"row {outside[0]} of {text!r} is not there: rows are 0 to {total - 1}")
    if len(rows) > MOST_ROWS:
        raise UserError(f"{text} names {len(rows):,} rows; a page shows at most {MOST_ROWS:,}: name fewer")
    return rows


def _rows_of_file(path: Path) -> list[int]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"rows: {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"rows: {path} is not JSON ({error})") from None
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows or not all(type(row) is int for row in rows):
        raise UserError(f'rows: {path} has no list of rows; it must look like {{"rows": [5, 17]}}')
    return rows


def write_page(path: str, samples: Samples, rows: Rows, chosen: Sequence[int], how: str) -> int:
    """Write the page of the chosen rows; returns how many of them training leaves out."""
    data = samples.config.data
    keys, limits = keys_of(data), limits_of(data)
    cards: dict[int, str] = {}
    bad = 0
    for row, sample in _with_progress(rows.read(sorted(chosen), wanted_files(keys, limits)), len(chosen)):
        place = f"{Path(rows.urls[rows.shard_of(row)]).name} at {row - rows.offsets[rows.shard_of(row)]}"
        cards[row], is_bad = card(row, sample, place, keys, limits, data.background)
        bad += is_bad
    facts = {
        "Samples": f"{len(rows):,} in {counted(len(rows.urls), 'shard')}",
        "Shown": how,
        "Left out by training": f"{bad:,} of these {len(chosen):,}",
        "Image": keys.image,
        "Captions": ", ".join(keys.places) + (" of .json" if keys.json_text else ""),
        "Background": data.background,
    }
    body = [
        header("vlcl data show", samples.name, facts),
        f'<section class="samples">{"".join(cards[row] for row in chosen)}</section>',
    ]
    replace_text(path, page(samples.name, body))
    return bad


def card(
    row: int, sample: RawSample | BadSample, place: str, keys: Keys, limits: Limits, background: str
) -> tuple[str, bool]:
    """A sample as HTML, and whether training leaves it out."""
    if isinstance(sample, BadSample):
        return _card(row, "", f'<div class="shown bad">{escape(str(sample))}</div>', [place], []), True
    texts: list[str] = []
    is_bad = False
    try:
        found = captions_from(sample.files, keys, limits)
        texts = [f"<li>{escape(text)}</li>" for text in found.texts]
        texts += [f'<li class="bad">left out: {escape(str(bad))}</li>' for bad in found.left_out]
    except BadSample as bad:
        texts, is_bad = [f'<li class="bad">{escape(str(bad))}</li>'], True
    lines: list[str] = []
    try:
        image = decode_image(image_bytes_from(sample.files, keys), limits, background)
        shown = f'<div class="shown">{thumbnail(image, sample.key)}</div>'
        lines.append(f"{image.width:,} × {image.height:,}")
    except BadSample as bad:
        shown, is_bad = f'<div class="shown bad">{escape(str(bad))}</div>', True
    lines += _about_file(sample.files, keys, background)
    return _card(row, sample.key, shown, [*lines, place], texts), is_bad


def _about_file(files: Mapping[str, bytes], keys: Keys, background: str) -> list[str]:
    """Format, mode and size of the picture's file, what the decoder changed, and the other files."""
    lines = []
    suffix = next((suffix for suffix in suffixes(keys.image) if suffix in files), None)
    if suffix is not None and not isinstance(files[suffix], Unread):
        size = in_bytes(len(files[suffix]))
        if found := look_at(files[suffix], background):
            lines += [f"{found.format}, {found.mode}, {size}", *found.changes]
        else:
            lines.append(f".{suffix}, {size}")
    others = [f".{name}" for name in sorted(files) if name != suffix]
    return [*lines, f"with {', '.join(others)}"] if others else lines


def _card(row: int, key: str, shown: str, lines: Sequence[str], texts: Sequence[str]) -> str:
    about = " · ".join(escape(line) for line in lines)
    captions = f"<ul>{''.join(texts)}</ul>" if texts else ""
    return (
        f'<article class="sample">{shown}<h3>row {row} <span>{escape(key)}</span></h3>'
        f'<p class="small">{about}</p>{captions}</article>'
    )


def _with_progress(
    found: Iterator[tuple[int, RawSample | BadSample]], total: int
) -> Iterator[tuple[int, RawSample | BadSample]]:
    if not sys.stderr.isatty() or total < 200:
        yield from found
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(found, description="show", total=total, console=Console(stderr=True))
