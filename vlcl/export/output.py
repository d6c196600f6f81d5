"""Where an export goes: which folder may become one, and an address of a store as OUT.

For an address the export is made and checked in a folder of this machine, and sent when it is whole. A store renames
nothing. So the configs that every reader looks for first are sent last, and until they are there UNFINISHED says that
what is there is nobody's model: the same command makes it whole.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlcl.data.stores import files_below, put_file, put_files, read_text, remove, write_text
from vlcl.data.urls import check_writable, without_secrets
from vlcl.errors import UserError, first_line
from vlcl.export.card import CURVE, README
from vlcl.export.formats import FORMATS
from vlcl.export.open_clip import CONFIG, MARK
from vlcl.export.views import FILES as VIEW_FILES

# All that an export writes: what --overwrite may replace.
EXPORT_FILES = {README, CURVE}.union(VIEW_FILES, *(x.files for x in FORMATS))
FIRST_READ = (CONFIG, "config.json")  # by open_clip and vlcl; by transformers, and timm of an image tower alone
UNFINISHED = ".unfinished"
MOST_CONFIG = 1 << 24  # bytes


def check_output(output: Path, model: Path | None, overwrite: bool) -> None:
    """UserError where `output` cannot become the folder of an export of `model`."""
    folder = output.absolute()
    if folder.is_symlink():
        raise UserError(f"OUT {output} is a link; give the folder that it stands for: {folder.resolve()}")
    if model is not None and folder.resolve() in (model.resolve(), *model.resolve().parents):
        raise UserError(f"OUT {output} holds the model to export itself; give another folder")
    if inside := [parent for parent in folder.parents if (parent / CONFIG).is_file()]:
        raise UserError(f"OUT {output} is inside the model folder {inside[0]}; give another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"OUT {output} exists already, and is no export that --overwrite could replace (it is a file); give "
            "another folder"
        )
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    if names or (folder.exists() and any(folder.iterdir())):
        _check_replaced(str(output), names, lambda name: (folder / name).read_text("utf-8"), overwrite, "folder")


def _check_replaced(shown: str, names: Iterable[str], read: Callable[[str], str], overwrite: bool, place: str) -> None:
    """UserError where files that are in OUT may not be replaced. `read`: gives the text of one, or raises OSError."""
    if problem := _no_export(names, read):
        raise UserError(
            f"OUT {shown} exists already, and is no export that --overwrite could replace ({problem}); give another "
            f"{place}"
        )
    if not overwrite:
        raise UserError(f"OUT {shown} exists already; give another {place}, or --overwrite to replace it")


def _no_export(names: Iterable[str], read: Callable[[str], str]) -> str | None:
    """Why these files are not what an export wrote, and nothing else; None where they are."""
    if strange := sorted({*names} - EXPORT_FILES):
        return f"it holds {', '.join(strange[:3])}"
    for name in FIRST_READ:
        try:
            config = json.loads(read(name))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and MARK in config:
            return None
    return "this vlcl did not write it"


@contextmanager
def in_store(url: str, overwrite: bool) -> Iterator[Path]:
    """Yield the name of a folder for an export, whose files go to `url` when the block ends well. UserError where it
    may not be replaced or cannot be written, which is found at once; a block that raises leaves it as it was."""
    url, shown, begun = url.rstrip("/"), without_secrets(url), False
    check_writable(url)
    as_before = "it is as it was before"
    with _told(shown, as_before):
        _files_there(url, overwrite)
        write_text(f"{url}/{UNFINISHED}", "vlcl export is at work here, or was ended: its command makes it whole\n")
    try:
        with tempfile.TemporaryDirectory(prefix="vlcl-export-") as temporary:
            folder = Path(temporary, url.rpartition("/")[2])
            yield folder
            with _told(shown, as_before):
                old = _files_there(url, overwrite)
            begun = True
            with _told(shown, "it is not whole, and no model to any reader: repeat the command"):
                _send(folder, url, old)
    finally:
        if not begun:
            with suppress(OSError):
                remove(f"{url}/{UNFINISHED}")


def _files_there(url: str, overwrite: bool) -> set[str]:
    """The files of a store that an export replaces; UserError where it may not."""
    there = {*files_below(url)}
    was_half = UNFINISHED in there and there.isdisjoint(FIRST_READ) and there <= {UNFINISHED, *EXPORT_FILES}
    there.discard(UNFINISHED)
    if there and not was_half:
        shown = without_secrets(url)
        _check_replaced(shown, there, lambda name: read_text(f"{url}/{name}", MOST_CONFIG), overwrite, "address")
    return there


def _send(folder: Path, url: str, old: set[str]) -> None:
    new = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(old, key=lambda name: name not in FIRST_READ):
        remove(f"{url}/{name}")
    put_files(folder, sorted(new - {*FIRST_READ}), url)
    for name in FIRST_READ:
        if name in new:
            put_file(folder / name, f"{url}/{name}")
    remove(f"{url}/{UNFINISHED}")


@contextmanager
def _told(shown: str, state: str) -> Iterator[None]:
    """What a store refuses, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"OUT {shown} could not be written: {without_secrets(first_line(error))}; {state}. Credentials and "
            "endpoints are those of the store's own library (docs/data.md, Remote shards)"
        ) from None
