"""`vlcl data verify`: decode every sample of WebDataset shards and list the bad ones. Nothing in the shards is changed.

What is wrong with a single sample is judged by the rules of the training loader (`vlcl.data.decode` and `captions`):
what is listed with one of those reasons is left out of training, a sample or, where it has others, a caption. Tiny
images and duplicate keys are listed here only: training uses them.
"""

import csv
import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, fields
from functools import partial
from typing import Annotated

import typer

from vlcl.data.archive import local_path
from vlcl.data.captions import captions_from
from vlcl.data.decode import (
    DEFAULT_KEYS,
    DEFAULT_LIMITS,
    IMAGE_KEY,
    NO_CAPTION,
    TEXT_KEY,
    BadSample,
    Keys,
    Limits,
    decode_image,
    image_bytes_from,
    parse_limits,
    wanted_files,
)
from vlcl.data.manifest import common_folder, expand_shards
from vlcl.data.shard import ShardError, read_samples, scan_keys
from vlcl.data.urls import without_secrets
from vlcl.errors import UserError, counted, reason
from vlcl.files import replacing_file
from vlcl_data_prep.engine import LOCAL, EngineOption, WorkersOption, map_shards
from vlcl_data_prep.index import LimitOption, ShardsArgument, check_writable, named_sources
from vlcl_data_prep.results import Form, Parts, kept_results

TextKeyOption = Annotated[
    list[str] | None,
    typer.Option(help="Suffix of the captions: data.text_key; for a list, again for each.", show_default=TEXT_KEY),
]
JsonTextKeyOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Take captions from this key of the sample's .json: data.json_text_key; for a list, again for each."
    ),
]
TextLinesOption = Annotated[
    bool, typer.Option("--text-lines/--no-text-lines", help="Each line of the file is a caption: data.text_lines.")
]

IMAGE_TOO_SMALL = "image too small"
BROKEN_SHARD = "broken shard"
DUPLICATE_KEY = "duplicate key"
MOST_SORTED = 1 << 22  # hashes at once: 32 MiB
SCATTERED_KEY = "files of one key not adjacent"


@dataclass(frozen=True)
class Problem:
    """One finding. A sample can have several: its image and its caption are judged separately."""

    shard: str
    position: int  # of the sample in the shard; its row is the shard's offset plus this
    key: str  # empty for a broken shard
    reason: str
    detail: str


@dataclass(frozen=True)
class Rules:
    """What counts as a bad sample."""

    min_side: int = 16  # pixels
    keys: Keys = DEFAULT_KEYS
    limits: Limits = DEFAULT_LIMITS


def verify(
    shards: ShardsArgument,
    output: Annotated[
        str | None,
        typer.Option(metavar="TSV", help="The table to write. Default: verify.tsv in the shards' folder."),
    ] = None,
    workers: WorkersOption = None,
    engine: EngineOption = LOCAL,
    min_side: Annotated[int, typer.Option(min=1, help="Images with a side below this many pixels are listed.")] = 16,
    limit: LimitOption = None,
    image_key: Annotated[
        str, typer.Option(help="Suffixes of the image, first that is there: data.image_key.")
    ] = IMAGE_KEY,
    text_key: TextKeyOption = None,
    json_text_key: JsonTextKeyOption = None,
    text_lines: TextLinesOption = True,
) -> None:
    """Decode every sample of WebDataset shards and list the bad ones in a table.

    Finds images that are missing, empty, broken, no images at all (HTML
    pages), too large or tiny; captions that are missing, empty, too long or
    not UTF-8; keys that occur twice; shards that are truncated. Training skips bad
    samples by itself and counts them: this tells you beforehand how many, and
    which. Exit code 1 if there is any, 0 if there is none. Interrupted, the
    same command goes on from the shards that were finished.
    """
    urls = expand_sources(shards)
    table = output or default_table(urls)
    keys = Keys(image_key, tuple(text_key or [TEXT_KEY]), tuple(json_text_key or []), text_lines)
    rules = Rules(min_side, keys, parse_limits(limit or []))
    problems = verify_shards(urls, workers, rules, table, engine=engine)
    _print_summary(problems, len(urls), table)
    if problems:
        raise typer.Exit(1)


def verify_shards(
    pattern: str | Sequence[str],
    workers: int | None = None,
    rules: Rules | None = None,
    output: str | None = None,
    progress: bool = True,
    engine: str = LOCAL,
) -> list[Problem]:
    """All findings in the shards of a pattern, in the order of the shards, duplicate keys last.

    `workers` = shards at a time (default: one a core), `engine`: see `map_shards`. With `output` the findings are
    written there too, as a table with tabs, and those of finished shards are kept beside it until it is whole.
    """
    urls = expand_shards(pattern, "run")
    if output is not None:
        check_writable(output, "--output TSV")
    check = partial(_check_shard, rules=rules or Rules())
    problems: list[Problem] = []
    key_hashes: list[array] = []
    with nullcontext() if output is None else kept_results(output, FORM, f"verify {check.keywords}") as kept:
        for found, hashes in map_shards(check, urls, workers, "verify" if progress else None, engine, kept):
            problems += found
            key_hashes.append(hashes)
        problems += _repeated_keys(urls, key_hashes)
        if output is not None:
            _write_table(output, problems)
    return problems


def expand_sources(shards: Sequence[str]) -> list[str]:
    """The shards of a command's arguments, "A::B" being two sources."""
    return expand_shards([pattern for source in named_sources(shards) for pattern in _as_list(source)], "run")


def default_table(urls: Sequence[str]) -> str:
    """verify.tsv in the common folder of the shards, or in the current folder if one of them is remote."""
    folder = common_folder(urls) if all(local_path(url) for url in urls) else ""
    return os.path.join(folder, "verify.tsv")


def _as_list(pattern: str | Sequence[str]) -> Sequence[str]:
    return [pattern] if isinstance(pattern, str) else pattern


def _check_shard(url: str, rules: Rules) -> tuple[list[Problem], array]:
    """The findings in a shard, and a 64-bit hash of each key: all the keys of a large set would not fit in memory."""
    problems: list[Problem] = []
    hashes, shown = array("Q"), without_secrets(url)
    try:
        for position, sample in enumerate(read_samples(url, wanted=wanted_files(rules.keys, rules.limits))):
            hashes.append(_key_hash(sample.key))
            for bad in _bad_parts(sample.files, rules):
                problems.append(Problem(shown, position, sample.key, bad.reason, bad.detail))
    except ShardError as error:
        problems.append(Problem(shown, error.position, "", BROKEN_SHARD, without_secrets(error.reason)))
    return problems, hashes


def _parts_of(result: tuple[list[Problem], array]) -> Parts | None:
    problems, hashes = result
    if any(problem.reason == BROKEN_SHARD for problem in problems):
        return None
    return [astuple(problem) for problem in problems], {"keys": hashes}


FORM = Form(_parts_of, lambda facts, arrays: ([Problem(*fact) for fact in facts], arrays["keys"]))


def _bad_parts(files: Mapping[str, bytes], rules: Rules) -> Iterator[BadSample]:
    try:
        image = decode_image(image_bytes_from(files, rules.keys), rules.limits)
        if min(image.size) < rules.min_side:
            yield BadSample(IMAGE_TOO_SMALL, f"{image.width} x {image.height} pixels")
    except BadSample as bad:
        yield bad
    try:
        yield from captions_from(files, rules.keys, rules.limits).left_out
    except BadSample as bad:
        yield bad


def _key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _repeated_keys(urls: Sequence[str], key_hashes: Sequence[array]) -> Iterator[Problem]:
    """A finding for every sample whose key an earlier sample has. Reads the headers of the shards concerned again."""
    repeated = _repeated(key_hashes)
    if not repeated:
        return
    first: dict[str, tuple[str, int]] = {}
    for url, hashes in zip(urls, key_hashes):
        if repeated.isdisjoint(hashes):
            continue
        suffixes: dict[str, set[str]] = {}  # of the repeated keys in this shard
        for position, key, names in _keys_with_suffixes(url, len(hashes)):
            if hashes[position] not in repeated:
                continue
            if key in first:
                scattered = key in suffixes and suffixes[key].isdisjoint(names)
                where = f"{', '.join(sorted(names))} here; also in {without_secrets(first[key][0])} at {first[key][1]}"
                yield Problem(without_secrets(url), position, key, SCATTERED_KEY if scattered else DUPLICATE_KEY, where)
            first.setdefault(key, (url, position))
            suffixes.setdefault(key, set()).update(names)


def _repeated(key_hashes: Sequence[array]) -> set[int]:
    """The hashes that occur more than once. Of many a sixteenth is sorted at a time: all at once would take their
    memory three times."""
    import numpy as np

    shares = [np.frombuffer(hashes, np.uint64) for hashes in key_hashes]
    found: set[int] = set()
    for part in range(16) if sum(map(len, shares)) > MOST_SORTED else (None,):
        chosen = shares if part is None else [hashes[hashes >> 60 == part] for hashes in shares]
        values = np.concatenate(chosen)
        values.sort()
        found.update(values[1:][values[1:] == values[:-1]].tolist())
    return found


def _keys_with_suffixes(url: str, samples: int) -> Iterator[tuple[int, str, set[str]]]:
    """(position, key, suffixes) of the first `samples` samples: those that a damaged shard could give."""
    current, current_key, names = 0, "", set()
    try:
        for position, key, suffix in scan_keys(url):
            if position != current:
                yield current, current_key, names
                current, names = position, set()
            if position == samples:
                return
            current_key = key
            names.add(suffix)
    except ShardError:
        return
    if names:
        yield current, current_key, names


def _write_table(path: str, problems: Sequence[Problem]) -> None:
    try:
        with (
            replacing_file(path) as temporary,
            open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
        ):
            table = csv.writer(file, delimiter="\t", lineterminator="\n")
            table.writerow(field.name for field in fields(Problem))
            for problem in problems:
                table.writerow(" ".join(str(cell).split()) for cell in astuple(problem))
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; give --output TSV") from None


def _print_summary(problems: Sequence[Problem], num_shards: int, table: str) -> None:
    from rich.console import Console
    from rich.table import Table

    if problems:
        examples = {problem.reason: problem for problem in reversed(problems)}
        summary = Table("reason", "count", "first in", box=None, pad_edge=False)
        summary.columns[1].justify = "right"
        for reason, count in Counter(problem.reason for problem in problems).most_common():
            shard, position = examples[reason].shard, examples[reason].position
            summary.add_row(reason, f"{count:,}", f"{os.path.basename(shard)} at {position}")
        Console().print(summary)
        if NO_CAPTION in examples and re.match(r"has .*\bjson\b.*; looked", examples[NO_CAPTION].detail):
            print("captions in a .json are read with --json-text-key KEY, or again for each: data.json_text_key")
    print(f"{counted(num_shards, 'shard')}, {counted(len(problems), 'problem')}; table: {table}")
