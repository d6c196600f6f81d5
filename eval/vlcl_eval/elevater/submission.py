"""`vlcl eval submission`: all_predictions.zip in the benchmark's format, and a check of any such file.

The zip holds all_predictions.json, {"data": [entry, ...]}, an entry a data set, the seeds of its runs in one. Arrays
are written and read a data set at a time: all 20 take some hundred megabytes of JSON. Only results in the benchmark's
own mode carry predictions, those of the epoch that is best on the test set. Misuse: handing in results of a sample, or
of files in another order than the benchmark's; they are refused.
"""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import IO, Any

import numpy as np
import torch

from vlcl.errors import UserError, reason
from vlcl.files import replacing_file
from vlcl_eval.datasets.registry import Benchmark, benchmarks, find_benchmark
from vlcl_eval.elevater.metrics import metric_of
from vlcl_eval.results import FILE, read_results, why_incomplete

JSON = "all_predictions.json"
TRACKS = ("zeroshot", "linear_probe", "finetune")
SEEDS = {0: [0], 5: [0, 1, 2], -1: [0]}  # by n_shot: zero-shot, the few-shot track, all training images
SUM_TOLERANCE = 1e-3  # relative, the benchmark's own
ROWS_AT_ONCE = 2000
CHARACTERS_AT_ONCE = 1 << 20
TOKENS = re.compile(r'\\.|["{}]', re.DOTALL)
KEYS = {
    "model_name": str, "dataset_name": str, "num_trainable_params": (int, float), "num_params": (int, float),
    "num_visual_params": (int, float), "num_backbone_params": (int, float), "n_shot": int, "rnd_seeds": list,
    "predictions": list,
}  # fmt: skip

Record = Mapping[str, Any]  # a line of results.jsonl


def write_submission(
    folder: Path,
    track: str,
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
    problems = [problem for records in groups.values() for problem in _check(folder, records, n_shot, allow_incomplete)]
    if problems:
        raise UserError("\n  ".join(["nothing is written, as these results cannot be handed in:", *problems]))
    path = output if output.suffix == ".zip" else output / "all_predictions.zip"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing_file(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open(JSON, "w", force_zip64=True) as file,
        ):
            _write_json(file, folder, groups, n_shot)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}; give another --output, or make room") from None
    _warn_of_missing(groups)
    return path


def _n_shot(track: str, shots: int | str) -> int:
    if track not in TRACKS:
        raise UserError(f"--track {track}: the benchmark has {', '.join(TRACKS)}")
    allowed: dict[int | str, int] = {0: 0} if track == "zeroshot" else {5: 5, "full": -1}
    if shots not in allowed:
        raise UserError(f"--shots {shots}: the benchmark's {track} track takes {' or '.join(map(str, allowed))}")
    return allowed[shots]


def _by_dataset(
    folder: Path, track: str, shots: int | str, seeds: Sequence[int], model: str | None
) -> dict[str, list[Record]]:
    """The records to hand in, those of the 20 in the benchmark's order, each with its seeds in order."""
    records = [
        record
        for record in read_results(folder)
        if (record["method"], record["shots"], record["mode"]) == (track, shots, "elevater")
        and record["seed"] in seeds
        and (model is None or record["model"] == model or record["weights"].startswith(model))
    ]
    found: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["seed"]):
        found[record["dataset"]].append(record)
    groups = {benchmark.name: found[benchmark.name] for benchmark in benchmarks() if benchmark.name in found}
    if not groups:
        raise UserError(
            f"{folder} holds no results for --track {track} --shots {shots}{f' --model {model}' if model else ''} in "
            f"mode elevater; make some: vlcl eval elevater MODEL --output {folder}"
        )
    models = sorted({f"{record['model']} ({record['weights']})" for record in records})
    if len(models) > 1:
        raise UserError(f"{folder} holds results of several models: {', '.join(models)}; choose one with --model")
    # a sample gives way to the whole, another form to the benchmark's own
    whole = {
        name: [record for record in group if record["complete"] and record["form"] == "native"]
        for name, group in groups.items()
    }
    return {name: whole[name] or group for name, group in groups.items()}


def _check(folder: Path, records: Sequence[Record], n_shot: int, allow_incomplete: bool) -> list[str]:
    """What keeps the records of one data set from being handed in."""
    benchmark = find_benchmark(records[0]["dataset"])
    name, num_images = benchmark.name, benchmark.splits["test"].num_images
    seeds = [record["seed"] for record in records]
    if len(set(seeds)) < len(seeds):
        protocols = {json.dumps(record["protocol"], sort_keys=True) for record in records}
        return [
            f"{name}: more than one result for a seed, of different protocol or test images: "
            f"{'; '.join(sorted(protocols))}; evaluate each into a folder of its own"
        ]
    if seeds != SEEDS[n_shot]:
        return [f"{name}: results of seed {_list(seeds)}, needed are {_list(SEEDS[n_shot])}; evaluate with those seeds"]
    if forms := sorted({record["form"] for record in records} - {"native"}):
        return [f"{name}: read from {_list(forms)}, in another order of images; evaluate on ELEVATER's own files"]
    if not records[0]["complete"] and not allow_incomplete:
        return [
            f"{name}: a sample: {why_incomplete(records)}; evaluate on all (--allow-incomplete writes it to try out)"
        ]
    problems = []
    for key in ("protocol", "fingerprints"):
        values = [{k: v for k, v in record[key].items() if k != "train"} for record in records]
        if any(value != values[0] for value in values):
            problems.append(f"{name}: the {key} of its seeds are not the same; evaluate anew")
    if any(_entry_head(record, n_shot) != _entry_head(records[0], n_shot) for record in records):
        problems.append(f"{name}: the numbers of parameters of its seeds are not the same; evaluate anew")
    for record in records:
        size = record["sizes"]["test"] if allow_incomplete else num_images
        problems += [f"{name}, seed {record['seed']}: {why}" for why in _check_file(folder, record, benchmark, size)]
    return problems


def _check_file(folder: Path, record: Record, benchmark: Benchmark, num_images: int) -> list[str]:
    again = f"; delete this line of {folder / FILE} and evaluate again"
    if record["predictions"] is None:
        return [f"it has no predictions{again}"]
    try:
        probability_NC, labels = _load(folder, record)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return [f"{folder / record['predictions']} cannot be read ({error}){again}"]
    problems = _check_probabilities(_rounded(probability_NC), benchmark.num_classes, num_images)
    if len(labels) != len(probability_NC):
        problems.append(f"probabilities of {len(probability_NC):,} images with labels of {len(labels):,}")
    if not problems:
        score = 100 * metric_of(record["metric"], "elevater")(torch.tensor(probability_NC), torch.tensor(labels))
        if abs(score - record["score"]) > 0.01:
            problems = [f"its predictions score {score:.2f}, but its record says {record['score']:.2f}"]
    return [f"{folder / record['predictions']}: {problem}{again}" for problem in problems]


def _load(folder: Path, record: Record) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / record["predictions"]) as arrays:
        return arrays["probabilities"], arrays["labels"]


def _rounded(probability_NC: np.ndarray) -> np.ndarray:
    return np.round(probability_NC.astype(np.float64), 6)


def _check_probabilities(probability_NC: np.ndarray, num_classes: int, num_images: int) -> list[str]:
    """Problems of one seed's probabilities, those of a multilabel data set included: they are a softmax as well."""
    if probability_NC.ndim != 2 or probability_NC.shape[1] != num_classes:
        return [f"probabilities of shape {list(probability_NC.shape)}; the data set has {num_classes} classes"]
    problems = []
    if len(probability_NC) != num_images:
        problems.append(f"probabilities of {len(probability_NC):,} images; the test split has {num_images:,}")
    outside = ~((probability_NC >= 0) & (probability_NC <= 1)).all(axis=1)  # NaN as well
    if outside.any():
        problems.append(
            f"{outside.sum():,} rows with a probability outside 0 to 1, the first is row {outside.argmax()}"
        )
    sums = probability_NC.sum(axis=1)
    wrong = ~np.isclose(sums, 1, rtol=SUM_TOLERANCE, atol=0) & ~outside
    if wrong.any():
        row = int(wrong.argmax())
        problems.append(f"{wrong.sum():,} rows do not add up to 1, the first is row {row}: {sums[row]:.4f}")
    return problems


def _entry_head(record: Record, n_shot: int) -> dict[str, Any]:
    """An entry but for its seeds, trainable parameters and predictions.

    `num_params` is the whole model with the head of this data set, of which the toolkit's code and its text speak
    differently. The head is what is trained beside the image tower; zero-shot has none.
    """
    params, zeroshot = record["params"], record["method"] == "zeroshot"
    head = params["trainable"] - (params["visual"] if record["method"] == "finetune" else 0)
    return {
        "model_name": f"CLIP-{record['model']}" if zeroshot else record["model"],
        "dataset_name": record["dataset"],
        "num_params": params["total"] + head,
        "num_visual_params": params["visual"],
        "num_backbone_params": params["backbone"],
        "n_shot": n_shot,
    }


def _write_json(file: IO[bytes], folder: Path, groups: Mapping[str, Sequence[Record]], n_shot: int) -> None:
    """{"data": [...]}, a few rows at a time."""
    for number, records in enumerate(groups.values()):
        head = _entry_head(records[0], n_shot) | {
            "num_trainable_params": mean(float(record["params"]["trainable"]) for record in records),
            "rnd_seeds": [record["seed"] for record in records],
        }
        file.write(b", " if number else b'{"data": [')
        file.write(json.dumps(head)[:-1].encode() + b', "predictions": [')
        for place, record in enumerate(records):
            file.write(b", [" if place else b"[")
            probability_NC = _rounded(_load(folder, record)[0])
            for start in range(0, len(probability_NC), ROWS_AT_ONCE):
                rows = json.dumps(probability_NC[start : start + ROWS_AT_ONCE].tolist())[1:-1]
                file.write((", " if start else "").encode() + rows.encode())
            file.write(b"]")
        file.write(b"]}")
    file.write(b"]}")


def _warn_of_missing(names: Collection[str]) -> None:
    missing = [benchmark.name for benchmark in benchmarks() if benchmark.name not in names]
    if missing:
        print(
            f"warning: {len(missing)} of the {len(benchmarks())} data sets are missing, so the benchmark gives no "
            f"average score: {', '.join(missing)}",
            file=sys.stderr,
        )


def validate_submission(path: Path) -> list[str]:
    """The problems of a submission, made by whatever tool; none if it is valid.

    Data sets of the 20 that are missing are no problem, but are named on stderr. Raises UserError if there is no file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; write a submission first: vlcl eval submission OUTPUT")
    problems: list[str] = []
    found: list[tuple[str, Any]] = []
    try:
        with zipfile.ZipFile(path) as archive, archive.open(JSON) as file:
            for text in _entries(file):
                problems += _check_entry(json.loads(text), found)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError) as error:
        return [*problems, f'{path} cannot be read: {error}; it should be a zip of {JSON}, {{"data": [...]}}']
    names, shots = [name for name, _ in found], {n_shot for _, n_shot in found}
    problems += [f"{name}: more than one entry" for name, count in Counter(names).items() if count > 1]
    if not found:
        problems.append("no data set of the benchmark in it")
    elif len(shots) > 1:
        problems.append(f"n_shot is not the same in all entries: {_list(sorted(map(str, shots)))}")
    _warn_of_missing(names)
    return problems


def _check_entry(entry: dict[str, Any], found: list[tuple[str, Any]]) -> list[str]:
    """The problems of one entry; its data set and n_shot are added to `found`."""
    known = {benchmark.name: benchmark for benchmark in benchmarks()}
    name = entry.get("dataset_name")
    if name not in known:
        return [f"dataset_name {name!r} is not one of the benchmark's: {', '.join(known)}"]
    found.append((name, entry.get("n_shot")))
    wrong = [key for key, kind in KEYS.items() if not isinstance(entry.get(key), kind)]
    if wrong:
        return [f"{name}: {key} is missing or of a wrong type: {type(entry.get(key)).__name__}" for key in wrong]
    seeds, n_shot = entry["rnd_seeds"], entry["n_shot"]
    if n_shot not in SEEDS:
        return [f"{name}: n_shot is {n_shot}; allowed are {_list(SEEDS)} (-1: all training images)"]
    problems = []
    if seeds != SEEDS[n_shot]:
        problems.append(f"{name}: rnd_seeds is {seeds}; with n_shot {n_shot} it is {SEEDS[n_shot]}")
    if len(entry["predictions"]) != len(seeds):
        problems.append(f"{name}: predictions of {len(entry['predictions'])} seeds, but rnd_seeds is {seeds}")
    num_images, num_classes = known[name].splits["test"].num_images, known[name].num_classes
    for place, rows in enumerate(entry["predictions"]):
        where = f"{name}, predictions[{place}]"
        try:
            probability_NC = np.asarray(rows, dtype=np.float64)
        except (ValueError, TypeError):
            problems.append(f"{where}: not a table of numbers with rows of one length")
            continue
        problems += [f"{where}: {why}" for why in _check_probabilities(probability_NC, num_classes, num_images)]
    return problems


def _entries(file: IO[bytes]) -> Iterator[str]:
    """The text of each object in the list of {"data": [...]}, one at a time: all of them are too much at once.

    Raises ValueError, at the end, if what is around the objects is anything else.
    """
    reader = io.TextIOWrapper(file, encoding="utf-8")
    frame, entry = io.StringIO(), io.StringIO()
    depth, in_string, count = 0, False, 0
    while chunk := reader.read(CHARACTERS_AT_ONCE):
        while chunk.endswith("\\") and (more := reader.read(1)):  # what it escapes may be a quotation mark
            chunk += more
        mark = 0
        for token in TOKENS.finditer(chunk):
            if token[0] == '"':
                in_string = not in_string
            elif in_string or token[0] not in "{}":
                continue
            elif token[0] == "{":
                depth += 1
                if depth == 2:
                    frame.write(chunk[mark : token.start()] + "0")
                    mark, entry = token.start(), io.StringIO()
            else:
                depth -= 1
                if depth == 1:
                    entry.write(chunk[mark : token.end()])
                    mark, count = token.end(), count + 1
                    yield entry.getvalue()
        (entry if depth > 1 else frame).write(chunk[mark:])
    if json.loads(frame.getvalue()) != {"data": [0] * count}:
        raise ValueError("it is not one list of data sets")


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
