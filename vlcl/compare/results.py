"""The file of --results: a line of JSON a finished cell, which holds all that is to be kept of it.

A line has its settings and the digests of its data, so that it says itself what it is of: cells of other comparisons
may stand in the same file, and a comparison on another machine goes on from it without the run folders. No torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlcl import __version__
from vlcl.compare.cell import FREE as FREE_OF_FOLDER
from vlcl.compare.cell import Ran, settings_of, training
from vlcl.compare.comparison import Result, result_from
from vlcl.compare.grid import Cell
from vlcl.config import Config
from vlcl.environment import ENVIRONMENT_FILE
from vlcl.errors import UserError, reason

# Settings that a finished run does not depend on. Of the data the digests count, wherever the shards lie.
FREE = frozenset(FREE_OF_FOLDER) | {
    *(f"data.{split}" for split in ("train", "val", "test", "manifest", "val_manifest", "test_manifest")),
    "data.allow_pipe", "data.read_ahead", "data.remote_cache", "data.remote_cache_bytes", "eval.examples",
    "checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "checkpoint.keep_best", "checkpoint.async_save",
    "checkpoint.remote", "log.trackers", "train.profile", "train.timeout",
}  # fmt: skip
NEEDED = {"fingerprint": str, "settings": dict, "data": dict, "metrics": dict}  # of a line, to be of use


def that_count(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of all settings of a cell those that its numbers depend on. A part that the cell does not have is left out, so
    that other defaults of it, later, make no other cell of this one."""
    absent = ["views."] * (settings.get("model.kind") != "views")
    absent += ["eval.templates"] * (settings.get("eval.zeroshot") is None)
    return {key: value for key, value in settings.items() if key not in FREE and not key.startswith(tuple(absent))}


def fingerprint_of(settings: Mapping[str, Any], digests: Mapping[str, str | None]) -> str:
    """16 hex digits of settings and data."""
    text = json.dumps([dict(settings), dict(digests)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ResultsFile:
    """Reads the file, and appends to it. `precision`: what train.precision=null comes to here, for a run in fp32 is
    none in bf16. UserError where the file cannot be read."""

    def __init__(self, path: Path, cells: Sequence[Cell], digests: Mapping[str, str | None], precision: str) -> None:
        self.path, self.digests, self.precision = path, dict(digests), precision
        self.problems: list[str] = []
        self._places = {cell.name: fingerprint_of(self._settings(cell.config), digests) for cell in cells}
        defaults = {cell.config.loss.name: defaults_of(cell.config) for cell in cells}
        self._lines: dict[str, dict[str, Any]] = {}
        for line in self._read():
            known = defaults.get(line["settings"].get("loss.name"))
            if known is not None:  # a setting that is newer than the line had its default then
                self._lines.setdefault(fingerprint_of(that_count({**known, **line["settings"]}), line["data"]), line)

    def result(self, cell: Cell, metric: Sequence[str], select: Sequence[str]) -> Result:
        """What the file has of the cell; a result without a value where it has nothing."""
        line = self._lines.get(self._places[cell.name])
        return Result(cell) if line is None else result_from(cell, line["metrics"], metric, select)

    def append(self, result: Result, ran: Ran | None) -> None:
        """Write a finished cell, whose folder is there. `ran`: None where that was earlier.

        One write of a whole line: a process that is killed leaves it, or nothing. UserError where there is no room.
        """
        line = self._line(result, ran)
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                size = os.fstat(file).st_size
                torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # by a machine that lost its power, say
                data = (b"\n" if torn else b"") + text.encode()
                if os.write(file, data) != len(data):
                    raise OSError("no room for a whole line")
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(
                f"--results {self.path} could not be written: {reason(error)}. Make room and give the same command: "
                "the run folders have all that is not in the file"
            ) from None
        self._lines.setdefault(line["fingerprint"], line)

    def _line(self, result: Result, ran: Ran | None) -> dict[str, Any]:
        cell, environment = result.cell, _environment(result.cell.folder)
        cost = dataclasses.asdict(ran or Ran())
        packages = environment.get("packages") or {}
        return {
            "cell": cell.name, "label": cell.loss, "loss": cell.config.loss.name, "batch_size": cell.batch_size,
            "lr": cell.lr, "seed": cell.seed, "samples": cell.samples, "steps": cell.steps, "metrics": result.metrics,
            "training": training(cell), "seconds": cost["seconds"], "cpu_seconds": cost["cpu_seconds"],
            "resumed_from": cost["resumed_from"], "threads": cost["threads"], "device": cost["device"],
            "vlcl": __version__, "commit": environment.get("git_commit"),
            "torch": cost["torch"] or packages.get("torch"),
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "fingerprint": self._places[cell.name],
            "data": self.digests,
            "settings": self._settings(cell.config),
        }  # fmt: skip

    def _settings(self, config: Config) -> dict[str, Any]:
        """Those that count, with what comes of a null."""
        precision = config.train.precision or self.precision
        chosen = {"train.precision": precision, "optim.logit_scale_ratio": config.logit_scale_ratio}
        chosen |= {f"loss.{key}": value for key, value in config.loss_choices.items()}
        return that_count(settings_of(config) | chosen)

    def _read(self) -> Iterator[dict[str, Any]]:
        """The whole lines; the others are told in `problems`."""
        try:
            text = self.path.read_bytes().decode("utf-8", errors="replace") if self.path.exists() else ""
        except OSError as error:
            raise UserError(f"--results {self.path} cannot be read: {error}") from None
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                if (record := _record(line)) is not None:
                    yield record
                else:
                    self.problems.append(f"{self.path}, line {number}: no whole line of a cell, left out")


def _record(line: str) -> dict[str, Any] | None:
    """The line, if it is whole and was not changed since it was written."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(record, dict) or any(not isinstance(record.get(name), kind) for name, kind in NEEDED.items()):
        return None
    return record if fingerprint_of(record["settings"], record["data"]) == record["fingerprint"] else None


def defaults_of(config: Config) -> dict[str, Any]:
    """The defaults of all settings that have one, by key; of the loss those of this config's."""
    return {
        f"{section}.{name}": field.get_default(call_default_factory=True)
        for section, settings in config
        if hasattr(settings, "model_fields")
        for name, field in type(settings).model_fields.items()
        if not field.is_required()
    }


def _environment(folder: Path) -> dict[str, Any]:
    """What the run recorded of its machine; nothing where that cannot be read."""
    try:
        content = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
