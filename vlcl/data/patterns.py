"""Which shards a pattern names, in row order: paths, folders, globs, braces, urls. No torch."""

import glob
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from vlcl.data.archive import as_path, local_path
from vlcl.data.urls import STORES, check_url, scheme_of, without_secrets
from vlcl.errors import UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")  # shards of a folder without plain ones
MOST_NAMED = 5  # problems written out in one message; the rest are counted

# How far a pattern may go: to files of this machine; to what is fetched, too (https:, s3:); to commands, too (pipe:).
# What a file of another's says stays here, a config may fetch, and only what a user typed or allowed runs a command.
Reach = Literal["here", "fetch", "run"]


def expand_shards(pattern: str | Sequence[str], reach: Reach = "fetch") -> list[str]:
    """The shards that a pattern names, in row order.

    A pattern is a folder (its *.tar, or else *.tar.gz and the like, sorted), a tar file, a glob, any of these with
    braces ("{0000..0099}.tar"), a url of these (s3://, gs://, hf://; of https:// and pipe: braces only), or a list of
    patterns. What is there as a file is a file, whatever its name. Raises UserError for local shards that do not exist,
    for a pattern without a match, for a shard that is named twice, and for a url that is not read or that `reach` does
    not allow.
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    shards = [shard for one in patterns for shard in _expand_one(one, reach)]
    if not shards:
        raise UserError(f"no shards in {show_pattern(pattern)}: name a folder, a glob, or NAME-{{0000..0099}}.tar")
    seen: set[str] = set()
    for shard in shards:
        path = local_path(shard)
        place = _real(path) if path else shard
        if place in seen:
            raise UserError(
                f"shard {without_secrets(shard)} is named twice in {show_pattern(pattern)}: each pair has one row; "
                "name it once"
            )
        seen.add(place)
    return shards


def _real(path: str) -> str:
    """As os.path.realpath, which would ask for each folder on the way again and again."""
    folder, name = os.path.split(path)
    if name in ("", ".", "..") or os.path.islink(path):
        return os.path.realpath(path)
    return os.path.join(_real_folder(os.path.join(os.getcwd(), folder)), name)


@lru_cache(maxsize=64)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def list_some(problems: Sequence[str]) -> str:
    """The first few problems, one a line, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:MOST_NAMED]]
    if len(problems) > MOST_NAMED:
        lines.append(f"  and {len(problems) - MOST_NAMED} more")
    return "\n".join(lines)


def show_pattern(pattern: str | Sequence[str]) -> str:
    """A pattern as one would type it; a long list is cut."""
    if isinstance(pattern, str):
        pattern = without_secrets(pattern)
        return f"'{pattern}'" if any(char in pattern for char in "{*?[ ") else pattern
    shown = " ".join(show_pattern(one) for one in pattern[:3])
    return shown if len(pattern) <= 3 else f"{shown} ... ({len(pattern)} in all)"


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
        shown = show_pattern(pattern)
        raise UserError(f"unbalanced braces in the shard pattern {shown}: write NAME-{{0000..0099}}.tar") from None
    found: list[str] = []
    missing: list[str] = []
    for piece in pieces:
        path = piece if folder or os.path.exists(piece) else local_path(piece)
        if path is None:
            found += _remote_shards(allowed(piece, reach), missing)
            continue
        matches = _local_shards(path, folder)
        found += map(as_path, matches)
        if not matches:
            missing.append(piece)
    if missing:
        what = f"no shards match {pattern!r}"
        if len(pieces) > 1:
            what = f"{len(missing)} of the {len(pieces)} shards in {pattern!r} do not exist:\n{list_some(missing)}"
        there = f"\n{_what_is_there(missing[0])}" if local_path(missing[0]) else ""
        raise UserError(
            f"{without_secrets(what)}{there}\n"
            "Name a folder with .tar files, a glob, or NAME-{0000..0099}.tar; to make shards: vlcl data pack SRC OUT"
        )
    return found


def allowed(url: str, reach: Reach) -> str:
    """The url; UserError where nothing reads it, or `reach` does not go so far."""
    if reach == "here":
        shown = without_secrets(url)
        raise UserError(f"{shown!r} is not on this machine, and what a file says is neither fetched nor run")
    if scheme_of(url) != "pipe":
        check_url(url)
    elif reach == "fetch":
        raise UserError(f"{url!r} runs a command: if it is your own, allow it with data.allow_pipe=true")
    return url


def _remote_shards(url: str, missing: list[str]) -> list[str]:
    """What a url names, where its folder can be listed; `missing` is told where that is nothing."""
    if scheme_of(url) not in STORES:
        return [url]
    from vlcl.data.stores import find_shards

    try:
        found = find_shards(url, ".tar", COMPRESSED)
    except FileNotFoundError:
        found = []
    except OSError as error:
        raise UserError(f"{url} cannot be listed: {error}. Name its shards: {url}/{{00000..00331}}.tar") from None
    if not found:
        missing.append(url)
    return found


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
