"""Results of evaluations: OUTPUT/results.jsonl, a record a line, appended; and the predictions beside it.

A record is one model, data set, method, shots, seed and mode; what it holds is listed in docs/eval.md. Records of a
finished part are found again by `key`, so the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vlcl.errors import UserError, reason
from vlcl.files import replacing_file

FILE = "results.jsonl"
ELEVATER = "vlcl eval elevater MODEL --data-root DIR"
KEY = ("weights", "dataset", "method", "shots", "seed", "mode", "protocol", "fingerprints")
FIELDS: dict[str, Any] = {  # what every record has, and of what type
    **dict.fromkeys(("model", "weights", "dataset", "method", "mode", "metric", "form"), str),
    **dict.fromkeys(("protocol", "fingerprints", "settings", "sizes", "images", "params", "short", "bad_images"), dict),
    "shots": int | str, "seed": int, "score": int | float, "complete": bool, "search": dict | None,
    "predictions": str | None,
}  # fmt: skip
_noted: set[tuple[Path, int]] = set()  # lines that a note was printed of


def key(record: dict[str, Any]) -> str:
    """What makes two records the same measurement."""
    return json.dumps({name: record[name] for name in KEY}, sort_keys=True)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder; the last one wins where a measurement was repeated. UserError where there are none."""
    if not (folder / FILE).is_file():
        raise UserError(_no_results(folder))
    records = done(folder)
    if not records:
        raise UserError(f"{folder / FILE} holds no results yet; make some: {ELEVATER} --output {folder}")
    return list(records.values())


def _no_results(folder: Path) -> str:
    """What the folder is instead, and where results are or how to make some."""
    if folder.is_file():
        return f"{folder} is a file; give the folder that holds {FILE}"
    if not folder.is_dir():
        return f"there is no folder {folder}; give one that holds {FILE}"
    if (folder / "eval" / FILE).is_file():
        return f"{folder / FILE} does not exist; give the folder of that run's results: {folder / 'eval'}"
    if (folder / "config.yaml").is_file():
        return f"{folder / FILE} does not exist: the run is not evaluated; vlcl eval elevater {folder} --data-root DIR"
    others = [path.name for path in sorted(folder.glob("*.jsonl"))]
    beside = f", only {', '.join(others)}, whose tables their own commands print" if others else ""
    return f"{folder / FILE} does not exist{beside}; make results: {ELEVATER} --output {folder}"


def make_folder(folder: Path, file: str = FILE) -> None:
    """Before anything is measured: UserError where results could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).open("a").close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {reason(error)}; choose another folder with --output") from None


def done(folder: Path) -> dict[str, dict[str, Any]]:
    """The records that are there, by key."""
    return {key(record): record for record in read_records(folder / FILE, FIELDS)}


def read_records(path: Path, fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a file, the oldest first. A line without one of `fields`, or of another type, is left out with a
    note: a run that was killed while it wrote leaves such a line, and that part is measured again."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give another folder") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # bytes that are not UTF-8 as well
            record = None
        if isinstance(record, dict) and all(
            name in record and isinstance(record[name], kind) for name, kind in fields.items()
        ):
            yield record
        elif (path, number) not in _noted:
            _noted.add((path, number))
            print(f"note: {path}, line {number} is no whole record and is left out")


def stamp(started: float) -> dict[str, Any]:
    """The part of a record on the run: versions, seconds since `started`, now."""
    return {
        "versions": {name: version(name) for name in ("vlcl", "torch", "open_clip_torch")},
        "seconds": round(time.perf_counter() - started, 2),
        "time": datetime.now().isoformat(timespec="seconds"),
    }


def append(folder: Path, records: Iterable[dict[str, Any]], file: str = FILE) -> None:
    """Append, through to the disk. A line that a killed run left half-written is closed first."""
    path = folder / file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record) + "\n" for record in records)
        if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            text = "\n" + text
        with open(path, "a", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {reason(error)}; make room, or choose another folder with --output"
        ) from None


def why_incomplete(records: Iterable[Mapping[str, Any]]) -> str:
    """What the records lack of the benchmark's images: "1,000 of 10,000 test images, 2 bad train images left out"."""
    short, bad = {}, {}
    for record in records:
        short |= record["short"]
        bad |= record["bad_images"]
    return ", ".join([
        *(f"{found:,} of {whole:,} {split} images" for split, (found, whole) in short.items()),
        *(f"{count:,} bad {split} images left out" for split, count in bad.items()),
    ])  # fmt: skip


def save_predictions(folder: Path, name: str, probabilities: np.ndarray, labels: np.ndarray) -> str:
    """Write OUTPUT/predictions/NAME.npz under a temporary name first; returns the path relative to OUTPUT."""
    path = folder / "predictions" / f"{name}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, probabilities=probabilities.astype(np.float32), labels=labels)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}; make room, or choose another --output") from None
    return str(path.relative_to(folder))
