"""`vlcl data icons`: named drawings of about a hundred icon sets, the sets of val and test held out.

A thing has the same caption in every set and another drawing, so a held-out set asks whether the names were learned:
val and test have the pictures whose captions training has seen, drawn by another hand. The drawings are SVGs of the
npm packages @iconify-json/SET at fixed versions (icon_sets.py): everybody's numbers are for the same pairs. Misuse:
choosing settings by test; that is what val is for.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vlcl_data_prep.icon_sets import LICENCES, SPLITS
from vlcl_data_prep.index import index_shards
from vlcl_data_prep.npm import fetch_packages, read_package
from vlcl_data_prep.shards import even_shards, replacing_all, track, write_shards
from vlcl_data_prep.svg import RENDERER, check_size, check_workers, draw_svgs, require

SAMPLES_PER_SHARD = 2000
ORDER_SEED = 0  # of the pairs in a split: a set's own order is alphabetical
STYLES = {
    "alerted", "alt", "badged", "duotone", "filled", "linear", "outline", "outlined", "regular", "rounded", "sharp",
    "solid", "twotone", "variant",
}  # fmt: skip
MAYBE_STYLES = {"bold", "broken", "f", "fill", "light", "line", "o", "remix", "stroke", "thin"}
NUMBER = re.compile(r"\d+(px)?")
NUMBERED = {
    "battery", "beaufort", "clock", "dice", "forward", "h", "heading", "hour", "hours", "letter", "number", "replay",
    "rewind", "signal", "time", "timer",
}  # fmt: skip


@dataclass(frozen=True)
class Icon:
    set: str
    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Naming:
    """What the words of a set's names say beside what is drawn."""

    styles: Set[str] = frozenset(STYLES)
    """Words at the end that say how it is drawn."""
    sizes: Set[str] = frozenset()
    """Numbers at the end that are sides in pixels."""
    prefixes: Set[str] = frozenset()
    """Words at the beginning that say how it is drawn."""


@dataclass(frozen=True)
class SetSummary:
    name: str
    title: str
    version: str
    author: str
    spdx: str
    url: str
    """Of the drawings; where the package has none, of the licence."""
    pairs: int


@dataclass(frozen=True)
class IconsSummary:
    splits: dict[str, list[SetSummary]]
    """The sets of train, val and test with their pairs."""
    undrawable: int
    """Drawings left out because the renderer refused them or they show nothing."""
    unseen: int
    """Drawings of held-out sets left out because no training set has their caption."""

    def pairs(self, split: str) -> int:
        return sum(one.pairs for one in self.splits[split])


def build_icons(
    out: str | Path,
    size: int = 64,
    cache: str | Path | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> IconsSummary:
    """Write OUT/train, OUT/val and OUT/test: shards of `size` x `size` RGB PNGs on white with captions, and manifests.

    The npm packages stay in `cache` (default: OUT/.packages) and are not fetched twice. `workers` processes draw
    (default: one a core). All three are replaced when all are complete, or stay as they were. Raises UserError for a
    value out of range, a missing renderer, a failed download, a folder that is not free.
    """
    check_size(size)
    check_workers(workers)
    require(RENDERER)
    out = Path(out)
    cache = out / ".packages" if cache is None else Path(cache)
    with replacing_all([out / split for split in SPLITS], overwrite) as folders:
        packages = _read_packages(cache)
        return _write(dict(zip(SPLITS, folders)), packages, size, workers)


def _read_packages(cache: Path) -> dict[str, dict]:
    """What icons.json, info.json and metadata.json of each set say, by its name."""
    sets = {name: version for split in SPLITS.values() for name, version in split.items()}
    wanted = [(f"@iconify-json/{name}", version) for name, version in sets.items()]
    archives = list(track(fetch_packages(wanted, cache), "fetching", len(wanted)))
    packages = {}
    for name, archive in zip(sets, archives):
        members = read_package(archive, r"(icons|info|metadata)\.json", ("icons.json", "info.json"))
        packages[name] = {member.removesuffix(".json"): json.loads(content) for member, content in members.items()}
        spdx = packages[name]["info"]["license"]["spdx"]
        assert spdx in LICENCES, f"{name} is under {spdx}"
    return packages


def _write(folders: dict[str, Path], packages: dict[str, dict], size: int, workers: int | None) -> IconsSummary:
    seen: set[str] = set()
    splits, undrawable, unseen = {}, 0, 0
    for split, sets in SPLITS.items():
        icons = [icon for name in sets for icon in list_icons(name, packages[name])]
        if split != "train":
            unseen += sum(icon.caption not in seen for icon in icons)
            icons = [icon for icon in icons if icon.caption in seen]
        random.Random(ORDER_SEED).shuffle(icons)
        written: list[Icon] = []
        samples = _draw(icons, size, workers, split, written)
        write_shards(folders[split], samples, even_shards(len(icons), SAMPLES_PER_SHARD))
        index_shards(str(folders[split]), progress=False)
        if split == "train":
            seen = {icon.caption for icon in written}
        undrawable += len(icons) - len(written)
        counts = Counter(icon.set for icon in written)
        splits[split] = [_summary(name, version, packages[name], counts[name]) for name, version in sets.items()]
        (folders[split] / "ATTRIBUTION.txt").write_text(_attribution(splits[split]), encoding="utf-8")
    return IconsSummary(splits, undrawable, unseen)


def _draw(
    icons: list[Icon], size: int, workers: int | None, split: str, written: list[Icon]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of the icons that can be drawn, which are added to `written`."""
    pictures = draw_svgs([icon.svg for icon in icons], size, workers)
    for number, (icon, picture) in enumerate(track(zip(icons, pictures), split, len(icons))):
        if picture is not None:
            written.append(icon)
            about = json.dumps({"set": icon.set, "name": icon.name}).encode()
            yield f"{number:06d}", {"png": picture, "txt": icon.caption.encode(), "json": about}


def list_icons(name: str, package: dict) -> list[Icon]:
    """One drawing a caption of the set, in the order of captions.

    Of several with one caption it is the one with the plainest name, which lost the fewest words; of equals the last
    in the alphabet: 24-regular, not 16-filled. No aliases, none that the set has given up, no animations.
    """
    collection = package["icons"]
    icons = {
        icon: data
        for icon, data in collection["icons"].items()
        if not data.get("hidden") and "<animate" not in data["body"]
    }
    naming = naming_of(icons, package.get("metadata", {}))
    plainest: dict[str, tuple[int, str]] = {}
    for icon in sorted(icons, reverse=True):
        caption = caption_of(icon, naming)
        lost = len(icon.split("-")) - len(caption.split())
        if caption not in plainest or lost < plainest[caption][0]:
            plainest[caption] = lost, icon
    return [
        Icon(name, icon, caption, svg_of(icons[icon], collection)) for caption, (_, icon) in sorted(plainest.items())
    ]


def naming_of(names: Iterable[str], metadata: dict) -> Naming:
    """The naming of a set with these names, of whose prefixes and suffixes its package tells in `metadata`.

    STYLES are styles in every set, those of MAYBE_STYLES (traffic-light, heart-broken) where the suffixes have them, or
    one name of 25 ends with them, numbers aside.
    """
    ends = [[word for word in name.split("-") if not NUMBER.fullmatch(word)][-1:] for name in names]
    counts = Counter(end[0] for end in ends if end)
    listed = {word for suffix in metadata.get("suffixes") or {} for word in suffix.split("-")}
    styles = {word for word in MAYBE_STYLES if word in listed or counts[word] >= len(ends) / 25}
    sizes = {word for word in listed if NUMBER.fullmatch(word)}
    return Naming(STYLES | styles, sizes, {prefix for prefix in metadata.get("prefixes") or {} if prefix})


def caption_of(name: str, naming: Naming) -> str:
    """heart-rounded-24-outline -> heart; arrow-left-2 -> arrow left; brand-github, github-logo -> github.

    Hyphens become spaces. Dropped are, while another word is left: a prefix, the words brand and logo, and at the end
    styles and numbers, which are sizes and counts of alternatives. After one of NUMBERED a number stays that is not the
    size: dice 6; battery-10-24 -> battery 10.
    """
    words = name.split("-")
    if words[0] in naming.prefixes and len(words) > 1:
        words = words[1:]
    words = [word for word in words if word not in ("brand", "logo")] or words
    sizes = set(naming.sizes)
    while len(words) > 1:
        is_size = words[-1] in sizes
        is_number = NUMBER.fullmatch(words[-1]) and words[-2] not in NUMBERED
        if not (is_size or is_number or words[-1] in naming.styles):
            break
        if is_size:
            sizes = set()  # a name has one
        words.pop()
    return " ".join(words)


def svg_of(icon: dict, collection: dict) -> str:
    """The icon as an SVG file, black where it takes the colour of its page, centred in a square."""
    left, top = (icon.get(key, collection.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, collection.get(key, 16)) for key in ("width", "height"))
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = f'viewBox="{left} {top} {width} {height}" width="64" height="64" color="black"'
    return f"<svg {namespaces} {box}>{icon['body']}</svg>"


def _summary(name: str, version: str, package: dict, pairs: int) -> SetSummary:
    info = package["info"]
    author, licence = info["author"], info["license"]
    url = author.get("url") or licence.get("url", "")
    return SetSummary(name, info["name"], version, author["name"], licence["spdx"], url, pairs)


def _attribution(sets: list[SetSummary]) -> str:
    lines = [
        "Drawings of these icon sets, each under its own licence, drawn as pixels, black on white where a set has no",
        "colours of its own; captions made of the icons' names. Tab-separated: set, its npm package, pictures, author,",
        "licence (SPDX), where it is from.",
        "",
    ]
    for one in sets:
        package = f"@iconify-json/{one.name} {one.version}"
        lines.append("\t".join((one.title, package, str(one.pairs), one.author, one.spdx, one.url)))
    return "\n".join(lines) + "\n"


def icons(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the data sets: OUT/train, OUT/val, OUT/test.")],
    size: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 64,
    cache: Annotated[Path | None, typer.Option(help="Folder for the npm packages; default: OUT/.packages.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that draw; default: one a core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the data sets in OUT.")] = False,
) -> None:
    """Make image-text pairs from about a hundred icon sets; val and test are other sets, drawn by other hands.

    Fetches npm packages (25 MB) once; needs npm on PATH and the extra "demo" of vlcl.
    """
    summary = build_icons(out, size, cache, workers, overwrite)
    for split, sets in summary.splits.items():
        names = f"{len(sets)} sets" if split == "train" else ", ".join(one.name for one in sets)
        print(f"{split + ':':6} {summary.pairs(split)} pairs of {names} in {out / split}")
    print(f"left out: {summary.unseen} of val and test whose caption is not in train, {summary.undrawable} blank")
    licences = Counter(one.spdx for sets in summary.splits.values() for one in sets)
    print("licences: " + ", ".join(f"{spdx} {count}" for spdx, count in licences.most_common()))
    print("authors and licences of each set are in ATTRIBUTION.txt beside the shards")
    print(f"next: vlcl train CONFIG data.train={out / 'train'} data.val={out / 'val'}")
