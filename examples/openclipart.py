"""Lists of Open Clip Art's pictures with their titles and keywords, for `vlcl data pack`; from Debian's two packages.

    apt-get download openclipart-png openclipart-svg            # 156 MB; nothing is installed
    for package in openclipart-*.deb; do dpkg-deb -x "$package" clipart; done
    python examples/openclipart.py clipart OUT

A picture (PNG) has its words in the drawing (SVG) of the same name. Pictures of one title are in one list.
"""

import json
import sys
import xml.etree.ElementTree as ET
import zlib
from collections import Counter
from pathlib import Path

HELD_OUT = 10  # a tenth of the titles is not trained on, but searched for
SERIES = 10  # what more pictures share is the name of a collection: held out, it would find any of them
TITLE = ".//{http://purl.org/dc/elements/1.1/}title"
KEYWORDS = ".//{http://purl.org/dc/elements/1.1/}subject//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"


def words_of(svg: Path) -> dict[str, str]:
    """The title and the keywords that are in a drawing: "" where there are none."""
    try:
        root = ET.parse(svg).getroot()
    except (OSError, ET.ParseError):
        return {"title": "", "keywords": ""}
    titles, keywords = (
        [" ".join("".join(tag.itertext()).replace("_", " ").split()) for tag in root.findall(path)]
        for path in (TITLE, KEYWORDS)
    )
    return {"title": next(iter(titles), ""), "keywords": ", ".join(filter(None, keywords))}


def main(packages: Path, out: Path) -> None:
    root = packages / "usr" / "share" / "openclipart"
    pictures = [path for path in sorted((root / "png").rglob("*.png")) if not path.is_symlink()]  # links are the same
    if not pictures:
        sys.exit(f"error: no pictures below {root / 'png'}: {packages} should be what dpkg-deb -x wrote")
    out.mkdir(parents=True, exist_ok=True)
    words = {path: words_of((root / "svg" / path.relative_to(root / "png")).with_suffix(".svg")) for path in pictures}
    shared = Counter(found["title"] for found in words.values())
    rows = {"train": [], "val": []}
    for path, found in words.items():
        title = found["title"]
        held_out = title and shared[title] <= SERIES and zlib.crc32(title.encode()) % HELD_OUT == 0
        rows["val" if held_out else "train"].append({"image": str(path.resolve()), **found})
    for split, found in rows.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        print(f"{split}: {len(found):,} pictures, {len({row['title'] for row in found}):,} titles")
        columns = "--caption-key title --caption-key keywords"
        print(f"next: vlcl data pack {out / f'{split}.jsonl'} {out / split} {columns}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
