"""Emoji as labelled pictures, for the study `views`: python benchmarks/evidence/label_emoji.py

Of the shards of `vlcl data emoji data/emoji` it writes data/emoji_labelled/VENDOR: each picture with its emoji's number
(.cls), the same for every vendor. So a classifier that has seen three vendors' drawings is asked which emoji a fourth's
is.
"""

from pathlib import Path

from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from vlcl_data_prep.index import index_shards

SOURCE, TARGET = Path("data/emoji"), Path("data/emoji_labelled")
VENDORS = ("google", "twitter", "apple", "openmoji", "facebook")


def main() -> None:
    pictures: dict[str, dict[str, bytes]] = {vendor: {} for vendor in VENDORS}
    for vendor in VENDORS:
        urls = [str(path) for path in sorted((SOURCE / vendor).glob("*.tar"))]
        for sample in WebDataset(urls, shardshuffle=False):
            pictures[vendor][sample["__key__"]] = sample["png"]
    number = {key: n for n, key in enumerate(sorted(set().union(*pictures.values())))}
    for vendor, found in pictures.items():
        folder = TARGET / vendor
        folder.mkdir(parents=True, exist_ok=True)
        with TarWriter(str(folder / "00000.tar")) as tar:
            for key in found:
                tar.write({"__key__": key, "png": found[key], "cls": str(number[key]).encode()})
        index_shards(str(folder), progress=False)
        print(f"{folder}: {len(found):,} pictures of {len(number):,} emoji")


if __name__ == "__main__":
    main()
