"""`vlcl data index`: count the samples of WebDataset shards and write their manifest. Nothing in the shards is changed.

Only tar headers are read (`vlcl.data.shard.scan_shard`). One broken shard means no manifest, and an older one stays.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from vlcl.data.archive import local_path
from vlcl.data.manifest import (
    Manifest,
    Shard,
    expand_shards,
    list_some,
    manifest_path,
    shard_name,
    show_pattern,
    split_sources,
    write_manifest,
)
from vlcl.data.shard import ShardError, ShardScan, scan_shard
from vlcl.data.urls import STORES, check_url, scheme_of, without_secrets
from vlcl.errors import UserError, counted
from vlcl_data_prep.doubts import doubts
from vlcl_data_prep.engine import WorkersOption, map_shards

FROM_STORES = 16  # shards at a time that lie elsewhere: most of the time their answers are waited for

logger = logging.getLogger(__name__)
ShardsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS", help="Folder, tar files, glob, 'NAME-{0000..0099}.tar'; s3://, gs://, hf://, https://."
    ),
]
LimitOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Of a sample, as data.max_*: max_pixels=1000000.")
]


def index(
    shards: ShardsArgument,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="The manifest to write, a url too. Default: manifest.json in the shards' folder on this machine.",
        ),
    ] = None,
    workers: WorkersOption = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=512,
            help="Bytes of a range request for remote shards; more: fewer requests. Default: 8192; 1 MiB from the web.",
        ),
    ] = None,
) -> None:
    """Count the samples of WebDataset shards and write manifest.json beside them.

    Training needs the manifest: it gives every pair its row id. Shards are
    used as they are (img2dataset's output, for one), only their headers are
    read, and nothing in them is changed. Index again after adding or changing
    shards. Several sources, A::B, get a manifest each.
    """
    sources = named_sources(shards)
    if output is not None and len(sources) > 1:
        raise UserError(
            f"--output {output} names one manifest, but there are {len(sources)} sources: index them one by one"
        )
    for source in sources:
        begin = time.monotonic()
        manifest, path, fetched = _index(source, output, workers, window or 0, progress=True)
        seconds = time.monotonic() - begin
        mean = manifest.num_samples / len(manifest.shards)
        whole = sum(shard.bytes or 0 for shard in manifest.shards)
        came = f", {fetched:,} of {whole:,} bytes fetched" if fetched else ""
        print(
            f"{counted(len(manifest.shards), 'shard')}, N = {counted(manifest.num_samples, 'sample')} "
            f"({mean:,.1f} a shard), {seconds:.1f} s{came}\nmanifest: {without_secrets(path)}"
        )


def index_shards(
    pattern: str | Sequence[str], output: str | None = None, workers: int | None = None, progress: bool = True,
    warn: bool = True,
) -> Manifest:  # fmt: skip
    """Index one source and write its manifest to `output` (default: manifest.json in the shards' common folder).

    `workers` = processes (default: one a core; for remote shards, which must have an `output`, 16). Raises UserError
    with all broken shards, before anything is written. `warn`: log what looks as if something else was meant.
    """
    return _index(pattern, output, workers, 0, progress, warn)[0]


def _index(
    pattern: str | Sequence[str],
    output: str | None,
    workers: int | None,
    window: int,
    progress: bool,
    warn: bool = True,
) -> tuple[Manifest, str, int]:
    """The manifest, where it was written, and how many bytes came over the network for it."""
    urls = expand_shards(pattern, "run")
    path = _place(urls, output, show_pattern(pattern))
    if workers is None and any(local_path(url) is None for url in urls):
        workers = FROM_STORES
    scans: list[ShardScan] = []
    broken: list[str] = []
    for scan in map_shards(partial(_scan_or_error, window=window), urls, workers, "index" if progress else None):
        if isinstance(scan, ShardScan):
            scans.append(scan)
        else:
            broken.append(str(scan))
    if broken:
        raise UserError(
            f"broken: {len(broken)} of {counted(len(urls), 'shard')}, so no manifest was written:\n"
            f"{list_some(broken)}\nDownload them again or move them away, then: vlcl data index {show_pattern(pattern)}"
        )
    if not any(scan.samples for scan in scans):
        raise UserError(
            f"no samples in {counted(len(urls), 'shard')} of {show_pattern(pattern)}: files must be named KEY.SUFFIX, "
            f"such as 0001.jpg and 0001.txt; look with: tar tf {without_secrets(urls[0])}"
        )
    for url, scan in zip(urls, scans):
        _compare_with_stats(url, scan)
    for warning in doubts(urls, scans) if warn else ():
        logger.warning("%s", warning)
    manifest = Manifest(
        tuple(
            Shard(shard_name(url, path), scan.samples, scan.bytes, scan.mtime_ns, scan.checksum)
            for url, scan in zip(urls, scans)
        )
    )
    write_manifest(path, manifest)
    return manifest, path, sum(scan.fetched for scan in scans)


def _place(urls: Sequence[str], output: str | None, shown: str) -> str:
    """Where the manifest goes. UserError where it cannot, before the long work."""
    if output is None and local_path(urls[0]) is None:
        folder = without_secrets(urls[0]).rpartition("/")[0]
        beside = f", or --output {folder}/manifest.json, beside the shards, where training looks for it"
        raise UserError(
            f"{shown} is remote; say where its manifest goes: --output PATH on this machine, and train with "
            f"data.manifest=PATH{beside if scheme_of(urls[0]) in STORES else ''}"
        )
    path = output or manifest_path(urls)
    if local_path(path) is not None:
        check_writable(path, "--output PATH")
    elif scheme_of(path) in STORES:
        check_url(path)
    else:
        raise UserError(f"--output {without_secrets(path)}: a manifest is written to a path, or to s3:, gs:, az:, hf:")
    return path


def check_writable(path: str, option: str) -> None:
    """Raise UserError now, before the long work, if `path` cannot be written."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is no folder you may write in; give {option}")


def named_sources(shards: Sequence[str]) -> list[str | Sequence[str]]:
    """A command's arguments as sources. Without "::" they are one, for a shell expands a glob to many arguments."""
    if any("::" in shard for shard in shards):
        return [source for shard in shards for source in split_sources(shard)]
    return [shards[0] if len(shards) == 1 else shards]


def _scan_or_error(url: str, window: int) -> ShardScan | ShardError:
    try:
        return scan_shard(url, window)
    except ShardError as error:
        return error


def _compare_with_stats(url: str, scan: ShardScan) -> None:
    """img2dataset writes 00000_stats.json beside 00000.tar."""
    path = local_path(url)
    stats = Path(path.removesuffix(".tar") + "_stats.json") if path else None
    if stats is None or not stats.is_file():
        return
    try:
        successes = json.loads(stats.read_text(encoding="utf-8"))["successes"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # the file is no part of the data set
    if successes != scan.samples:
        logger.warning("%s has %d samples, but %s says %s successes", url, scan.samples, stats.name, successes)
