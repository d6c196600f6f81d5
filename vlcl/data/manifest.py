"""The manifest: shard names, sample counts and row offsets. It says which pair has which row id.

row id = offsets[shard] + position of the sample in the tar, fixed before any shuffle or filter. Per-pair state (the
pair table of a run) is addressed by it, so training refuses shards that the manifest does not list or that changed.

`vlcl data index SHARDS` writes `manifest.json` beside the shards. Nothing here imports torch.
"""

import glob
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

from vlcl.data.archive import as_path, local_path
from vlcl.data.shard import ShardError, scan_shard
from vlcl.errors import UserError, reason
from vlcl.files import replace_text

FORMAT = "vlcl-manifest"
VERSION = 1
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")  # shards of a folder without plain ones
MOST_ROWS = 1 << 53  # of a shard: sums of them must fit 64 bits
MOST_NAMED = 5  # problems written out in one message; the rest are counted

# How far a pattern may go: to files of this machine; to what is fetched, too (https:, s3:); to commands, too (pipe:).
# What a file of another's says stays here, a config may fetch, and only what a user typed or allowed runs a command.
Reach = Literal["here", "fetch", "run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One tar file as it was indexed."""

    name: str  # path relative to the manifest's folder, with "/"; the url itself for a remote shard
    samples: int
    bytes: int | None  # size of the tar file; None for a remote shard
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
    shards = ",\n".join("  " + json.dumps(asdict(shard)) for shard in manifest.shards)
    text = json.dumps(head)[:-1] + ', "shards": [\n' + shards + "\n]}\n"
    try:
        replace_text(path, text)
    except OSError as error:
        raise UserError(
            f"cannot write the manifest {path}: {reason(error)}. Put it elsewhere: "
            "vlcl data index SHARDS --output PATH, and train with data.manifest=PATH"
        ) from None


def read_manifest(path: str, pattern: str = "SHARDS") -> Manifest:
    """Read what `write_manifest` wrote. Raises UserError; `pattern` is the shards to name in its next command."""
    index = f"run: vlcl data index {pattern}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no manifest {path}: the shards are not indexed yet; {index}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the manifest {path} cannot be read ({error}); {index}") from None
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


def split_sources(pattern: str | Sequence[str]) -> list[str | Sequence[str]]:
    """The sources in a pattern, "a/{000..009}.tar::b" being two. A list of patterns is one source."""
    if not isinstance(pattern, str):
        return [pattern]
    sources = pattern.split("::")
    if not all(sources):
        raise UserError(f"data pattern {pattern!r} has an empty source: write SHARDS or SHARDS::SHARDS")
    return list(sources)


def expand_shards(pattern: str | Sequence[str], reach: Reach = "fetch") -> list[str]:
    """The shards that a pattern names, in row order.

    A pattern is a folder (its *.tar, or else *.tar.gz and the like, sorted), a tar file, a glob, any of these with
    braces ("{0000..0099}.tar"), a url (pipe:, https://, ...; braces only), or a list of patterns. What is there as a
    file is a file, whatever its name. Raises UserError for local shards that do not exist, for a pattern without a
    match, for a shard that is named twice, and for a url that `reach` does not allow.
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    shards = [shard for one in patterns for shard in _expand_one(one, reach)]
    if not shards:
        raise UserError(f"no shards in {pattern!r}: name a folder, a glob, or NAME-{{0000..0099}}.tar")
    seen: set[str] = set()
    for shard in shards:
        path = local_path(shard)
        place = os.path.realpath(path) if path else shard
        if place in seen:
            raise UserError(
                f"shard {shard} is named twice in {show_pattern(pattern)}: each pair has one row; name it once"
            )
        seen.add(place)
    return shards


def manifest_path(urls: Sequence[str]) -> str:
    """Where the manifest of local shards lies by default: manifest.json in their common folder."""
    return os.path.join(common_folder(urls), "manifest.json")


def common_folder(urls: Sequence[str]) -> str:
    """The folder that holds all of these local shards. Raises UserError for remote ones."""
    paths = [local_path(url) for url in urls]
    remote = [url for url, path in zip(urls, paths) if path is None]
    if remote:
        raise UserError(
            f"{remote[0]} is remote, so there is no folder to look for its manifest in: set data.manifest=PATH "
            "(written by: vlcl data index SHARDS --output PATH)"
        )
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths if path])


def shard_name(url: str, manifest: str) -> str:
    """The name of a shard in the manifest at that path: a moved folder of shards and manifest stays valid."""
    path = local_path(url)
    if path is None:
        return url
    return Path(os.path.relpath(path, os.path.dirname(os.path.abspath(manifest)))).as_posix()


def open_source(pattern: str | Sequence[str], manifest: str | None = None, reach: Reach = "fetch") -> Source:
    """The shards of a pattern with their manifest entries, checked against the files.

    A shard passes if its size is the same and either its modification time or, recomputed, its header checksum is. A
    part of the manifest's shards may be named; rows are then dense over that part. Raises UserError with all problems.
    """
    shown = show_pattern(pattern)
    urls = expand_shards(pattern, reach)
    path = os.path.expanduser(manifest) if manifest else manifest_path(urls)
    entries = {shard.name: shard for shard in read_manifest(path, shown).shards}
    chosen: list[Shard] = []
    problems: list[str] = []
    touched: list[tuple[str, Shard]] = []
    for url in urls:
        entry = entries.get(shard_name(url, path))
        if entry is None:
            problems.append(f"{url} is not in the manifest")
            continue
        chosen.append(entry)
        file = local_path(url)
        if file is None:
            continue
        stat = os.stat(file)
        if stat.st_size != entry.bytes:
            problems.append(f"{url} has changed: {stat.st_size:,} bytes, the manifest says {entry.bytes or 0:,}")
        elif stat.st_mtime_ns != entry.mtime_ns:
            touched.append((url, entry))
    problems += _changed_contents(touched, shown)
    if problems:
        what = f"{len(problems)} of {len(urls)} shards do not fit the manifest {path} ({len(entries)} shards)"
        raise UserError(f"{what}:\n{list_some(problems)}\nIndex them (again): vlcl data index {shown}")
    return Source(tuple(urls), Manifest(tuple(chosen)))


def list_some(problems: Sequence[str]) -> str:
    """The first few problems, one a line, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:MOST_NAMED]]
    if len(problems) > MOST_NAMED:
        lines.append(f"  and {len(problems) - MOST_NAMED} more")
    return "\n".join(lines)


def show_pattern(pattern: str | Sequence[str]) -> str:
    """A pattern as one would type it; a long list is cut."""
    if isinstance(pattern, str):
        return f"'{pattern}'" if any(char in pattern for char in "{*?[ ") else pattern
    shown = " ".join(show_pattern(one) for one in pattern[:3])
    return shown if len(pattern) <= 3 else f"{shown} ... ({len(pattern)} in all)"


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


def _expand_one(pattern: str, reach: Reach) -> list[str]:
    from braceexpand import braceexpand  # comes with webdataset

    folder = _folder_there(pattern)
    if not folder and not os.path.exists(pattern):
        pattern = os.path.expanduser(pattern)
        folder = _folder_there(pattern)
    try:
        rest = [] if os.path.exists(pattern) else braceexpand(pattern.removeprefix(folder))
        pieces = [folder + piece for piece in rest] or [pattern]
    except ValueError:
        raise UserError(f"unbalanced braces in the shard pattern {pattern!r}: write NAME-{{0000..0099}}.tar") from None
    found: list[str] = []
    missing: list[str] = []
    for piece in pieces:
        path = piece if folder or os.path.exists(piece) else local_path(piece)
        if path is None:
            found.append(_allowed(piece, reach))
            continue
        matches = _local_shards(path, folder)
        found += map(as_path, matches)
        if not matches:
            missing.append(piece)
    if missing:
        what = f"no shards match {pattern!r}"
        if len(pieces) > 1:
            what = f"{len(missing)} of the {len(pieces)} shards in {pattern!r} do not exist:\n{list_some(missing)}"
        raise UserError(
            f"{what}\n{_what_is_there(missing[0])}\n"
            "Name a folder with .tar files, a glob, or NAME-{0000..0099}.tar; to make shards: vlcl data pack SRC OUT"
        )
    return found


def _allowed(url: str, reach: Reach) -> str:
    """The url; UserError where `reach` does not go so far."""
    if reach == "here":
        raise UserError(f"{url!r} is not on this machine, and what a file says is neither fetched nor run")
    if reach == "fetch" and url.partition(":")[0].lower() == "pipe":
        raise UserError(f"{url!r} runs a command: if it is your own, allow it with data.allow_pipe=true")
    return url


def _folder_there(pattern: str) -> str:
    """The longest beginning of a pattern that is a folder of this machine, whatever signs are in its name; ""."""
    if "://" in pattern:
        return ""
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _local_shards(path: str, folder: str) -> list[str]:
    """The shards of a folder, a file, or what a glob matches; the signs of `folder`, its beginning, mean themselves."""
    if os.path.isdir(path):
        found = [glob.glob(os.path.join(glob.escape(path), f"*{suffix}")) for suffix in COMPRESSED]
        return sorted(
            glob.glob(os.path.join(glob.escape(path), "*.tar")) or [shard for some in found for shard in some]
        )
    if os.path.exists(path):
        return [path]
    return sorted(match for match in glob.glob(glob.escape(folder) + path[len(folder) :]) if os.path.isfile(match))


def _what_is_there(path: str) -> str:
    """What a user who mistyped a path wants to know: what the folder does hold."""
    folder = Path(local_path(path) or path)
    if not folder.is_dir():
        folder = folder.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return f"the folder {folder} is empty"
    return f"{folder} has {', '.join(names[:MOST_NAMED])}" + (
        f" and {len(names) - MOST_NAMED} more" if names[5:] else ""
    )
