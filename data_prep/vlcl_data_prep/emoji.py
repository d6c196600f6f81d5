"""`vlcl data emoji`: the emoji of four vendors, about 3,780 pictures each, one source a vendor.

The same emoji has the same caption with each vendor and another picture, so that a vendor can be held out: a model
trained on three of them is asked to read the fourth. The pictures come from the npm packages
emoji-datasource-VENDOR, at a fixed version: everybody's numbers are for the same pairs. Misuse: mixing vendors into
one random split tells little, for most captions of the held-out pairs are then in the training set with nearly the
same picture.
"""

import io
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vlcl.errors import UserError
from vlcl_data_prep.index import index_shards
from vlcl_data_prep.shards import even_shards, on_white, png_bytes, replacing, track, write_shards

VENDORS = ("google", "twitter", "apple", "facebook")
VERSION = "16.0.0"  # of the npm packages; all four have it
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
    vendor is complete or untouched. Raises UserError for an unknown vendor, a failed download, a folder that is not
    free.
    """
    unknown = [vendor for vendor in vendors if vendor not in VENDORS]
    if unknown or not vendors:
        raise UserError(f"--vendors {','.join(vendors)}: allowed are {','.join(VENDORS)}, one or more")
    out = Path(out)
    cache = out / ".packages" if cache is None else Path(cache)
    summaries = []
    for vendor in dict.fromkeys(vendors):
        with replacing(out / vendor, overwrite) as folder:
            package = read_package(fetch_package(vendor, cache), vendor)
            summaries.append(_write_vendor(folder, vendor, package))
    return summaries


def fetch_package(vendor: str, cache: Path) -> Path:
    """The vendor's .tgz in `cache`, fetched with `npm pack` if it is not there."""
    name = f"emoji-datasource-{vendor}"
    archive = cache / f"{name}-{VERSION}.tgz"
    if archive.exists():
        return archive
    if shutil.which("npm") is None:
        raise UserError(f"npm is not on PATH and {archive} is absent; install npm, or put the package there by hand")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        command = ["npm", "pack", f"{name}@{VERSION}", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(folder) / archive.name
        if done.returncode != 0 or not fetched.exists():
            last = done.stderr.strip().splitlines()[-3:]
            raise UserError(f"`{' '.join(command[:3])}` failed, try it by hand in {cache}: {' '.join(last)}")
        fetched.replace(archive)
    return archive


def read_package(archive: Path, vendor: str) -> dict[str, bytes]:
    """The members of the .tgz that we use, by path below the package's folder. In memory: about 20 MB."""
    wanted = re.compile(rf"(emoji\.json|package\.json|README\.md|LICENSE|img/{vendor}/64/[^/]+\.png)")
    members = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.partition("/")[2]
                if member.isfile() and wanted.fullmatch(name):
                    content = tar.extractfile(member)
                    assert content is not None
                    members[name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(
            f"{archive} is not a whole npm package ({error}); delete it and run the command again"
        ) from error
    if "emoji.json" not in members:
        raise UserError(f"{archive} has no emoji.json; delete it and run the command again")
    return members


def list_pictures(entries: list[dict], vendor: str) -> list[Picture]:
    """Every picture that the vendor drew itself, skin tones included, with its caption."""
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
            if look[f"has_img_{vendor}"]
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


def _write_vendor(folder: Path, vendor: str, package: dict[str, bytes]) -> VendorSummary:
    pictures = [
        picture
        for picture in list_pictures(json.loads(package["emoji.json"]), vendor)
        if f"img/{vendor}/64/{picture.file}" in package
    ]
    random.Random(ORDER_SEED).shuffle(pictures)
    samples = track(_samples(pictures, vendor, package), vendor, len(pictures))
    write_shards(folder, samples, even_shards(len(pictures), SAMPLES_PER_SHARD))
    licence = licence_of(vendor, package.get("README.md", b"").decode())
    (folder / "ATTRIBUTION.txt").write_text(_attribution(vendor, licence, package), encoding="utf-8")
    index_shards(str(folder), progress=False)
    captions = Counter(picture.caption for picture in pictures)
    duplicates = sum(count for count in captions.values() if count > 1)
    return VendorSummary(vendor, len(pictures), duplicates, licence)


def _samples(pictures: list[Picture], vendor: str, package: dict[str, bytes]) -> Iterator[tuple[str, dict[str, bytes]]]:
    from PIL import Image

    for picture in pictures:
        image = Image.open(io.BytesIO(package[f"img/{vendor}/64/{picture.file}"]))
        about = {
            "unified": picture.unified,
            "category": picture.category,
            "subcategory": picture.subcategory,
            "vendor": vendor,
        }
        members = {
            "png": png_bytes(on_white(image)),
            "txt": picture.caption.encode(),
            "json": json.dumps(about).encode(),
        }
        yield picture.unified.lower(), members


def licence_of(vendor: str, readme: str) -> str:
    """What the package's README states on the vendor's images: its one list item that begins with the vendor's name."""
    for line in readme.splitlines():
        if re.match(rf"\* (Android/)?{vendor}\b.* images", line, re.IGNORECASE):
            return line.removeprefix("* ")
    return "the package states no licence for these images"


def _attribution(vendor: str, licence: str, package: dict[str, bytes]) -> str:
    return (
        f"Pictures: npm package emoji-datasource-{vendor} {VERSION}, composited on white. The package states:\n"
        f"{licence}\n\n"
        "Names and codepoints: emoji.json of the same package, under this licence:\n\n"
        f"{package.get('LICENSE', b'(the package holds no LICENSE file)').decode()}"
    )


def emoji(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the data sets: OUT/google, OUT/twitter, ...")],
    vendors: Annotated[str, typer.Option(help="Comma-separated; a data set each.")] = ",".join(VENDORS),
    cache: Annotated[Path | None, typer.Option(help="Folder for the npm packages; default: OUT/.packages.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the vendors' data sets in OUT.")] = False,
) -> None:
    """Make about 3,780 image-text pairs from each of four vendors' emoji, so that a vendor can be held out.

    Fetches npm packages (60 to 100 MB a vendor) once; needs npm on PATH. Look at the licences it prints.
    """
    chosen = tuple(vendors.split(","))
    for one in build_emoji(out, chosen, cache, overwrite):
        print(f"{one.vendor}: {one.pairs} pairs in {out / one.vendor}, {one.duplicates} share a caption")
        print(f"  {one.licence}")
    train = "::".join(str(out / vendor) for vendor in chosen[:-1] or chosen)
    held_out = f" data.val={out / chosen[-1]}" if len(chosen) > 1 else ""
    print(f"next: vlcl train CONFIG data.train={train}{held_out}")
