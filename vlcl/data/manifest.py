"""The manifest: shard names, sample counts and row offsets. It says which pair has which row id.

row id = offsets[shard] + position of the sample in the tar, fixed before any shuffle or filter. Per-pair state (the
pair table of a run) is addressed by it, so training refuses shards that the manifest does not list or that changed.

`vlcl data index SHARDS` writes `manifest.json` beside the shards. Names in it are compared with those of shards that a
pattern names, and never opened. Nothing here imports torch.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import accumulate, takewhile
from pathlib import Path

from vlcl.data.archive import local_path
from vlcl.data.patterns import Reach, allowed, expand_shards, list_some, show_pattern
from vlcl.data.shard import ShardError, scan_shard
from vlcl.data.urls import STORES, lasting, scheme_of, without_secrets
from vlcl.errors import UserError, counted, reason
from vlcl.files import replace_text

FORMAT = "vlcl-manifest"
VERSION = 1
MOST_ROWS = 1 << 53  # of a shard: sums of them must fit 64 bits
MOST_REMOTE = 1 << 30  # bytes of a manifest that is fetched

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)  # half a million of them, in each process of a large run
class Shard:
    """One tar file as it was indexed."""

    name: str  # path relative to the manifest's folder, with "/"; or the url of a shard that lies elsewhere
    samples: int
    bytes: int | None  # size of the tar file; None where a server or command did not tell
    mtime_ns: int | None  # modification time, nanoseconds; None for a remote shard
    checksum: str  # over names and sizes of the sample files (`vlcl.data.shard.ShardScan`)


@dataclass(frozen=True)
class Manifest:
    """Shards in row order."""

    shards: tuple[Shard, ...]

    @cached_property
    def num_samples(self) -> int:
        """N: the number of pairs, good or bad. Rows run from 0 to N - 1."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The row of each shard's first sample."""
        return tuple(accumulate((shard.samples for shard in self.shards[:-1]), initial=0)) if self.shards else ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what row ids depend on: names, counts and checksums, in order."""
        rows = "".join(f"{shard.name}\0{shard.samples}\0{shard.checksum}\n" for shard in self.shards)
        return hashlib.sha256(rows.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class Source:
    """Shards to read and their entries of the manifest, in the same order: rows are dense over these shards."""

    urls: tuple[str, ...]
    manifest: Manifest


def write_manifest(path: str, manifest: Manifest) -> None:
    """Write JSON with one shard a line. An existing manifest is replaced whole or not at all."""
    head = {"format": FORMAT, "version": VERSION, "samples": manifest.num_samples, "digest": manifest.digest}
    names = [field.name for field in fields(Shard)]
    shards = ",\n".join("  " + json.dumps({name: getattr(shard, name) for name in names}) for shard in manifest.shards)
    text = json.dumps(head)[:-1] + ', "shards": [\n' + shards + "\n]}\n"
    try:
        if local_path(path) is None:
            from vlcl.data.stores import write_text

            write_text(path, text)
        else:
            replace_text(path, text)
    except OSError as error:
        raise UserError(
            f"cannot write the manifest {without_secrets(path)}: {reason(error)}. Put it elsewhere: "
            "vlcl data index SHARDS --output PATH, and train with data.manifest=PATH"
        ) from None


def read_manifest(path: str, pattern: str = "SHARDS") -> Manifest:
    """Read what `write_manifest` wrote. Raises UserError; `pattern` is the shards to name in its next command."""
    index = f"run: vlcl data index {pattern}"
    if local_path(path) is None:
        index += " --output PATH, and set data.manifest=PATH"
    try:
        content = json.loads(_text_of(path))
        path = without_secrets(path)
    except FileNotFoundError:
        shown = without_secrets(path)
        raise UserError(f"there is no manifest {shown}: the shards are not indexed yet; {index}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the manifest {without_secrets(path)} cannot be read ({error}); {index}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f'{path} is no vlcl manifest (its "format" is not "{FORMAT}"); {index}')
    if content.get("version") != VERSION:
        raise UserError(
            f"the manifest {path} has format version {content.get('version')!r}, this vlcl reads {VERSION}: "
            f"update vlcl, or {index}"
        )
    try:
        manifest = Manifest(tuple(_checked_shard(entry) for entry in content["shards"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the manifest {path} has a bad shard entry ({error}); {index}") from None
    if content.get("digest") != manifest.digest:
        raise UserError(f"the manifest {path} was edited by hand or damaged: its digest does not fit; {index}")
    return manifest


def _text_of(path: str) -> str:
    if local_path(path) is not None:
        return Path(path).read_text(encoding="utf-8")
    from vlcl.data.stores import read_text

    return read_text(path, MOST_REMOTE)


def split_sources(pattern: str | Sequence[str]) -> list[str | Sequence[str]]:
    """The sources in a pattern, "a/{000..009}.tar::b" being two. A list of patterns is one source."""
    if not isinstance(pattern, str):
        return [pattern]
    sources = pattern.split("::")
    if not all(sources):
        raise UserError(f"data pattern {show_pattern(pattern)} has an empty source: write SHARDS or SHARDS::SHARDS")
    return list(sources)


def manifest_path(urls: Sequence[str]) -> str:
    """Where the manifest of shards lies by default: manifest.json in their common folder."""
    folder = common_folder(urls)
    return os.path.join(folder, "manifest.json") if local_path(folder) else f"{folder}/manifest.json"


def common_folder(urls: Sequence[str]) -> str:
    """The folder that holds all of these shards, on this machine or elsewhere. Raises UserError where there is none."""
    paths = [path for url in urls if (path := local_path(url))]
    if len(paths) == len(urls):
        return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    parts = [url.partition("?")[0].split("/")[:-1] for url in urls]
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*parts))]
    if paths or len(common) < 3 or scheme_of(urls[0]) == "pipe":
        raise UserError(
            f"{without_secrets(urls[0])} and the others have no folder in common where their manifest could lie: set "
            "data.manifest=PATH (written by: vlcl data index SHARDS --output PATH)"
        )
    return "/".join(common)


def shard_name(url: str, manifest: str) -> str:
    """The name of a shard in the manifest at that path: a moved folder of shards and manifest stays valid."""
    path, manifest_file = local_path(url), local_path(manifest)
    if path is not None and manifest_file is not None:
        beside, path = _folder_of(manifest_file, os.getcwd()), os.path.abspath(path)
        name = path[len(beside) :] if path.startswith(beside) else os.path.relpath(path, beside)
        return name.replace(os.sep, "/")
    folder = lasting(manifest).rpartition("/")[0]
    return lasting(url).removeprefix(f"{folder}/") if manifest_file is None else lasting(url)


@lru_cache(maxsize=8)  # asked for each of many shards
def _folder_of(path: str, here: str) -> str:
    return os.path.join(os.path.dirname(os.path.join(here, os.path.normpath(path))), "")


def open_source(pattern: str | Sequence[str], manifest: str | None = None, reach: Reach = "fetch") -> Source:
    """The shards of a pattern with their manifest entries, checked against the files.

    A shard passes if its size is the same and either its modification time or, recomputed, its header checksum is. A
    part of the manifest's shards may be named; rows are then dense over that part. Raises UserError with all problems.
    """
    shown = show_pattern(pattern)
    urls = expand_shards(pattern, reach)
    path = manifest or manifest_path(urls)
    path = os.path.expanduser(path) if local_path(path) else path
    if local_path(path) is None:
        allowed(path, "here" if reach == "here" else "fetch")
    entries = {shard.name: shard for shard in read_manifest(path, shown).shards}
    chosen: list[Shard] = []
    problems: list[str] = []
    touched: list[tuple[str, Shard]] = []
    elsewhere: list[tuple[str, Shard]] = []
    for url in urls:
        entry = entries.get(shard_name(url, path)) or entries.get(url)
        if entry is None:
            problems.append(f"{without_secrets(url)} is not in the manifest")
            continue
        chosen.append(entry)
        file = local_path(url)
        if file is None:
            elsewhere.append((url, entry))
            continue
        stat = os.stat(file)
        if stat.st_size != entry.bytes:
            problems.append(f"{url} has changed: {stat.st_size:,} bytes, the manifest says {entry.bytes or 0:,}")
        elif stat.st_mtime_ns != entry.mtime_ns:
            touched.append((url, entry))
    problems += _changed_sizes(elsewhere)
    problems += _changed_contents(touched, shown)
    if problems:
        place = without_secrets(path)
        has = f"which has {counted(len(entries), 'shard')}"
        what = f"{counted(len(problems), 'problem')} with the manifest {place}, {has}"
        raise UserError(f"{what}:\n{list_some(problems)}\nIndex them (again): vlcl data index {shown}")
    return Source(tuple(urls), Manifest(tuple(chosen)))


def _changed_sizes(elsewhere: list[tuple[str, Shard]]) -> list[str]:
    """Problems among shards in stores, as far as their folders can be listed."""
    known = {url: shard.bytes for url, shard in elsewhere if shard.bytes is not None and scheme_of(url) in STORES}
    if not known:
        return []
    from vlcl.data.stores import listed_sizes

    return [
        f"{url} {'is not there' if size is None else f'has changed: {size:,} bytes, the manifest says {known[url]:,}'}"
        for url, size in listed_sizes(list(known)).items()
        if size != known[url]
    ]


def _changed_contents(touched: list[tuple[str, Shard]], shown: str) -> list[str]:
    """Problems among shards of the right size with another modification time: copied, or written anew?"""
    problems = []
    begin = time.monotonic()
    for url, entry in touched:
        try:
            if scan_shard(url).checksum != entry.checksum:
                problems.append(f"{url} has changed: other samples than the manifest says")
        except ShardError as error:
            problems.append(str(error))
    if touched and not problems and (seconds := time.monotonic() - begin) > 5:
        logger.warning(
            "%d shards have another modification time than when they were indexed; comparing headers took %.0f s. "
            "To save that time: vlcl data index %s",
            *(len(touched), seconds, shown),
        )
    return problems


def _checked_shard(entry: dict) -> Shard:
    shard = Shard(**entry)
    if not (isinstance(shard.name, str) and isinstance(shard.checksum, str)):
        raise ValueError(f"name and checksum must be strings in {entry}")
    (shard.name + shard.checksum).encode("utf-8", "surrogateescape")  # ValueError: JSON can name what no file is called
    if type(shard.samples) is not int or not 0 <= shard.samples < MOST_ROWS:
        raise ValueError(f"samples must be a whole number >= 0 in {entry}")
    for value in (shard.bytes, shard.mtime_ns):
        if value is not None and type(value) is not int:
            raise ValueError(f"bytes and mtime_ns must be whole numbers, or null for a remote shard, in {entry}")
    return shard
