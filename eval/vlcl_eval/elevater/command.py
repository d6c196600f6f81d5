"""`vlcl eval elevater`: zero-, few- and full-shot scores of one model on the benchmark's data sets.

For each data set: images through the tower once, kept in the cache; class names through the text encoder once; then
every (shots, seed) is a task of its own, dealt out to the ranks. Records are appended as they come, and what is
recorded is not measured again. Two modes from one training:

    elevater   as the benchmark does it: the best of the 50 final epochs by the TEST score
    strict     the last of the 50 epochs; texts keep their end token; 11-point mAP without its quirk
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlcl import distributed
from vlcl.errors import UserError
from vlcl_eval import results
from vlcl_eval.alone import alone
from vlcl_eval.datasets.find import NotThere, find_data_set, open_as_it_is
from vlcl_eval.datasets.registry import benchmarks, find_benchmark, registered
from vlcl_eval.elevater.few_shot import few_shot
from vlcl_eval.elevater.metrics import metric_of
from vlcl_eval.elevater.work import Protocol, Record, Work, append, images, params, predictions
from vlcl_eval.features import Extractor
from vlcl_eval.models import load
from vlcl_eval.row_store import check_cache
from vlcl_eval.text import zeroshot_probabilities


def evaluate(
    model: str, data_root: str | Path | None, datasets: Sequence[str] | None = None, protocol: Protocol | None = None,
    *, folder: str | Path | None = None,
    output: str | Path, cache: str | Path, averaged: bool = False, say: Callable[[str], None] = print,
    **extraction: Any,
) -> tuple[list[Record], dict[str, str]]:  # fmt: skip
    """Measure what OUTPUT/results.jsonl does not hold yet (a collective). `datasets`: names, or None for all that are
    under `data_root`; or `folder`, a folder of class folders, as it is.
    `extraction`: crop, precision, batch_size and workers of features.Extractor.

    Returns all records of these data sets and this model, and what went wrong, by data set: one that fails does not
    stop the others. UserError for what concerns all of them.
    """
    device = distributed.start()
    protocol = protocol or Protocol()
    root, output = Path(data_root or folder or "."), Path(output)
    names = chosen_names(root, datasets) if folder is None else [Path(folder).name]
    loaded = load(model, averaged).to(device)
    if not loaded.has_text:
        check_without_text(loaded.label, protocol)
    results.make_folder(output)
    check_cache(Path(cache))
    say_once = say if distributed.rank() == 0 else lambda text: None
    extractor = Extractor(loaded, Path(cache), device, say=say_once, **extraction)
    problems: dict[str, str] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            data = find_data_set(root, name, protocol.labels) if folder is None else open_as_it_is(root, say_once)
            with alone(output, loaded.weights, name):
                known = distributed.broadcast(results.done(output))
                evaluate_data_set(Work(data, loaded, extractor, protocol, output, say_once, known))
        except NotThere as error:
            absent[name] = str(error)
        except UserError as error:
            problems[name] = str(error).removeprefix(f"{name}: ")
            say_once(f"{name}: error: {problems[name]}")
    if len(absent) == len(names):
        text = next(iter(absent.values())) if len(names) == 1 else f"none of {', '.join(names)} is under {root}"
        raise UserError(text if "vlcl data" in text else f"{text}. What is there: vlcl data elevater {root}")
    for name, text in absent.items() if datasets is not None else ():
        problems[name] = text
        say_once(f"error: {text}")
    found = distributed.broadcast(results.done(output))
    records = [r for r in found.values() if r["weights"] == loaded.weights and r["dataset"] in names]
    return records, problems


def check_without_text(label: str, protocol: Protocol) -> None:
    """UserError for what needs a text tower, where there is none."""
    shots = [shot for shot in protocol.shots if shot != 0]
    wrong = [
        ("--shots 0 (zero-shot)", 0 in protocol.shots),
        ("--init language", protocol.init == "language" and set(protocol.methods) != {"logistic"}),
        ("--knowledge", protocol.knowledge is not None),
        ("--merge", protocol.merge),
    ]
    if asked := [name for name, is_asked in wrong if is_asked]:
        raise UserError(
            f"{label} was trained on pictures alone: it has no text tower, which {' and '.join(asked)} "
            f"{'needs' if len(asked) == 1 else 'need'}. Few-shot with a random head: "
            f"--init random --shots {','.join(map(str, shots or (5, 20, 50, 'full')))}"
        )


def chosen_names(root: Path, datasets: Sequence[str] | None) -> list[str]:
    """The benchmark's own spelling of each name; with None the 20, and those that the root's registry adds.

    UserError with a suggestion for an unknown one.
    """
    own = registered(root)
    if datasets is None:
        return list(dict.fromkeys([*(benchmark.name for benchmark in benchmarks()), *own]))
    return list(dict.fromkeys(name if name in own else find_benchmark(name).name for name in datasets))


def evaluate_data_set(work: Work) -> list[Record]:
    """All that is missing of one data set, appended to the results by rank 0 (a collective)."""
    if work.data.metric == "roc_auc" and len(work.target().unique()) < 2:
        raise UserError(f"{work.data.name}: all test images are of one class, so there is no ROC-AUC; mend the index")
    records = zero_shot(work) if 0 in work.protocol.shots else []
    for method in work.protocol.methods:
        records += few_shot(work, method)
    return records


def zero_shot(work: Work) -> list[Record]:
    modes, started = work.missing_modes("zeroshot", 0, 0), time.perf_counter()
    if not modes:
        return []
    _, image_ND, computed = work.extract("features", work.test, work.test_rows)
    target = work.target()

    def measure(mode: str) -> Record:
        probability_NC = zeroshot_probabilities(image_ND, work.class_weights(mode))
        record = work.blank("zeroshot", 0, 0, mode)
        return work.finish(
            record, 100 * metric_of(work.data.metric, mode)(probability_NC, target), started, settings={}, search=None,
            sizes={"classes": len(work.data.classes), "train": 0, "test": len(target)},
            images=images(len(computed), len(target) - len(computed), len(target)),
            params=params(work, 0), predictions=predictions(work, record, probability_NC, target),
        )  # fmt: skip

    mine = modes if distributed.rank() == 0 else []
    records = [record for part in distributed.together(lambda: list(map(measure, mine))) for record in part]
    append(work, records)
    return records
