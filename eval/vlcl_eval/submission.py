"""`vlcl eval submission`: all_predictions.zip in the benchmark's format, and a check of any such file.

The zip holds all_predictions.json, {"data": [entry, ...]}, an entry a data set, the seeds of its runs in one. Arrays
are written and read a data set at a time: all 20 take some hundred megabytes of JSON. Only results in the benchmark's
own mode carry predictions, those of the epoch that is best on the test set. Misuse: handing in results of a sample of
a test split; they are refused.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from vlcl.errors import UserError
from vlcl_eval.registry import Benchmark, benchmarks
from vlcl_eval.results import read_results

NAME = "all_predictions"
TRACKS = ("zeroshot", "linear_probe", "finetune")
SEEDS = {0: [0], 5: [0, 1, 2], -1: [0]}  # by n_shot: zero-shot, the few-shot track, all training images
ROWS_AT_ONCE = 2000
KEYS = {
    "model_name": str, "dataset_name": str, "num_trainable_params": (int, float), "num_params": (int, float),
    "num_visual_params": (int, float), "num_backbone_params": (int, float), "n_shot": int, "rnd_seeds": list,
    "predictions": list,
}  # fmt: skip

Record = Mapping[str, Any]  # a line of results.jsonl


def write_submission(
    folder: Path,
    track: Literal["zeroshot", "linear_probe", "finetune"],
    shots: int | str,
    output: Path,
    allow_incomplete: bool = False,
    model: str | None = None,
) -> Path:
    """Write the predictions of one track in `folder` to a zip, and return its path: `output`, or a file in it.

    `shots`: 0 for zero-shot, else 5 or "full". `model`: the label or the first letters of the weights' fingerprint,
    where `folder` holds results of several. `allow_incomplete` takes samples of test splits as well, for trying out:
    `validate_submission` then finds the number of images wrong. Raises UserError, with all problems at once, before
    anything is written; data sets of the 20 without results are named on stderr.
    """
    folder, output = Path(folder), Path(output)
    n_shot = _n_shot(track, shots)
    groups = _by_dataset(folder, track, shots, SEEDS[n_shot], model)
    problems = []
    for name, records in groups.items():
        problems += _problems_of_records(folder, name, records, n_shot, allow_incomplete)
    if problems:
        raise UserError("these results cannot be handed in:\n  " + "\n  ".join(problems))
    path = output if output.suffix == ".zip" else output / f"{NAME}.zip"
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open(f"{NAME}.json", "w", force_zip64=True) as file:
                _write_entries(file, folder, groups, track, n_shot)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; give another --output, or make room") from None
    finally:
        temporary.unlink(missing_ok=True)
    _warn_of_missing(list(groups))
    return path


def _n_shot(track: str, shots: int | str) -> int:
    if track not in TRACKS:
        raise UserError(f"--track {track}: the benchmark has {', '.join(TRACKS)}")
    allowed = {"zeroshot": {0: 0}}.get(track, {5: 5, "full": -1})
    if shots not in allowed:
        raise UserError(f"--shots {shots}: the benchmark's {track} track takes {' or '.join(map(str, allowed))}")
    return allowed[shots]


def _by_dataset(
    folder: Path, track: str, shots: int | str, seeds: Sequence[int], model: str | None
) -> dict[str, list[Record]]:
    """The records to hand in, those of the 20 in the benchmark's order, each with its seeds in order."""
    records = [
        record for record in read_results(folder)
        if (record["method"], record["shots"], record["mode"]) == (track, shots, "elevater") and record["seed"] in seeds
        and (model is None or record["model"] == model or record["weights"].startswith(model))
    ]  # fmt: skip
    found: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["seed"]):
        found[record["dataset"]].append(record)
    groups = {benchmark.name: found[benchmark.name] for benchmark in benchmarks() if benchmark.name in found}
    if not groups:
        raise UserError(
            f"{folder} holds no results of the benchmark's data sets for --track {track} --shots {shots} in mode "
            f"elevater{f' of --model {model}' if model else ''}; make some: vlcl eval elevater MODEL --output {folder}"
        )
    models = sorted({f"{record['model']} ({record['weights']})" for record in records})
    if len(models) > 1:
        raise UserError(f"{folder} holds results of several models: {', '.join(models)}; choose one with --model")
    return groups
