"""What in the headers of shards looks as if something else was meant: the warnings of `vlcl data index`."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from vlcl.data.decode import IMAGE_KEY, TEXT_KEY, suffixes
from vlcl.data.shard import ShardScan

MANY_FILES = 20  # of a sample: more than a picture, captions, boxes and embeddings have
PICTURES = frozenset(suffixes(IMAGE_KEY))
TEXTS = frozenset((*suffixes(TEXT_KEY), "json"))


def doubts(urls: Sequence[str], scans: Sequence[ShardScan]) -> Iterator[str]:
    """A text each; `scans` are of `urls`."""
    counts: Counter[str] = Counter()
    for scan in scans:
        counts.update(scan.suffixes)
    names = _names_and_neighbours(urls, scans, counts)
    found = list(names)
    yield from found
    yield from _archives(urls, scans)
    if not found:  # which would explain this
        yield from _what_is_missing(scans, counts)


def _names_and_neighbours(urls: Sequence[str], scans: Sequence[ShardScan], counts: Counter[str]) -> Iterator[str]:
    """Samples that are other ones than their names seem to say."""
    samples = sum(scan.samples for scan in scans)
    beside = {
        kinds: {name.rpartition(".")[0] for name in counts if "." in name and name.rpartition(".")[2] in kinds}
        for kinds in (PICTURES, TEXTS)
    }
    dotted = sorted(beside[PICTURES] & beside[TEXTS])
    if dotted:
        yield (
            f"some names have dots: X.{dotted[0]}.jpg is the file {dotted[0]}.jpg of the sample X, as a name of a "
            "sample ends at the first dot. If other samples are meant, rename the files (a dot to an underscore) and "
            "tar them again"
        )
    url, largest = max(zip(urls, (scan.odd for scan in scans)), key=lambda pair: pair[1].most_files)
    if largest.most_files > MANY_FILES and not dotted:
        yield (
            f"sample {largest.most_key} of {url} has {largest.most_files:,} files: all that is called "
            f"{os.path.basename(largest.most_key)}.SOMETHING is one sample. If several are meant, give them names "
            "that differ before the first dot"
        )
    with_picture, with_text = (sum(counts[name] for name in kinds) for kinds in (PICTURES, TEXTS))
    apart = sum(scan.odd.apart for scan in scans)
    if with_picture and with_text and with_picture + with_text <= samples:
        yield (
            f"no sample has both a picture and a text: {with_picture:,} pictures and {with_text:,} texts make "
            f"{samples:,} samples. Files of one sample must stand next to each other: tar them sorted by name, as tar "
            "--sort=name does"
        )
    elif apart:
        url, odd = next((url, scan.odd) for url, scan in zip(urls, scans) if scan.odd.apart)
        yield (
            f"{apart:,} of {samples:,} samples are called as an earlier one of their shard with others between them "
            f"({odd.apart_key} in {url}), and count as samples of their own. If they are files of one sample, tar them "
            "sorted by name, as tar --sort=name does; vlcl data verify lists them"
        )


def _archives(urls: Sequence[str], scans: Sequence[ShardScan]) -> Iterator[str]:
    joined = [url for url, scan in zip(urls, scans) if scan.odd.leftover]
    if joined:
        more = f" and {len(joined) - 1:,} other shards" if len(joined) > 1 else ""
        yield (
            f"{joined[0]}{more}: there is more behind the end of the archive, and nothing reads it. If tars were "
            "joined by cat, use the tars themselves as shards (a folder of them), or join them with tar --concatenate"
        )


def _what_is_missing(scans: Sequence[ShardScan], counts: Counter[str]) -> Iterator[str]:
    """Most samples lack what training takes by default."""
    samples = sum(scan.samples for scan in scans)
    others = [name for name, _ in counts.most_common(6)]
    for kinds, what, keys in (
        (PICTURES, f"no image ({IMAGE_KEY})", "data.image_key=SUFFIX says what the image is"),
        (TEXTS, f"no caption ({TEXT_KEY}, json)", "data.text_key=SUFFIX says what the caption is"),
    ):
        there = min(sum(counts[name] for name in kinds), samples)
        if 2 * there < samples:
            yield (
                f"{samples - there:,} of {samples:,} samples have {what}. Files are: {', '.join(others)}. "
                f"Training leaves such samples out; {keys}"
            )
    if 2 * counts[TEXT_KEY] < samples <= 2 * counts["json"]:
        yield (
            "most samples have captions in .json alone, if at all: training needs data.json_text_key=KEY, as caption; "
            "look with: vlcl data show SHARDS --json-text-key KEY"
        )
