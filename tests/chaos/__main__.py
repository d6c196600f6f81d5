"""`make chaos`: every fault, again and again, at random moments; docs/reliability.md has the table of what came of it.

A line a try goes to the file of results, so that what was stopped goes on, and the table is made from all of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos import files, training
from chaos.training import Found, Place

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
Try = Callable[[Place, Path, random.Random, int], Found]


def faults(place: Place, share: float) -> list[tuple[str, int, Try]]:
    """(name, tries, what to do); `share` of the tries, at least one of each."""
    some: Callable[[int], int] = lambda tries: max(1, round(tries * share))  # noqa: E731
    in_save = {1: some(24), 2: some(24)}
    damaged = training.Damage(place, 1)
    misbehaves = "stalls, resets, truncates, redirects, 503, lies"
    return [
        ("killed at a random moment, 1 rank", some(36), partial(training.kill_anywhere, world=1)),
        ("killed at a random moment, 2 ranks", some(16), partial(training.kill_anywhere, world=2)),
        ("one rank of two killed", some(16), training.kill_one_of_two),
        ("one rank of two killed at the start", some(12), training.kill_one_at_start),
        ("killed inside a save, 1 rank", in_save[1], partial(training.kill_in_save, world=1, tries=in_save[1])),
        ("killed inside a save, 2 ranks", in_save[2], partial(training.kill_in_save, world=2, tries=in_save[2])),
        ("SIGTERM, SIGUSR1, Ctrl-C; 1 rank", some(9), partial(training.stop_signal, world=1)),
        ("SIGTERM, SIGUSR1, Ctrl-C to one rank of 2", some(12), partial(training.stop_signal, world=2)),
        ("SIGHUP, QUIT, ABRT, USR2, ALRM, SEGV, BUS; 1 rank", some(7), partial(training.fatal_signal, world=1)),
        ("SIGHUP, QUIT, ABRT, USR2, ALRM, SEGV, BUS; 2 ranks", some(7), partial(training.fatal_signal, world=2)),
        ("each file of a checkpoint cut, flipped, emptied, deleted", some(len(damaged.cases)), damaged),
        ("full disk in training, at files of every size", some(12), files.full_disk_training),
        ("full disk in index, pack, export, eval, bias", some(10), files.full_disk_elsewhere),
        (
            "full disk in verify, compare, linear probe, retrieval",
            some(12),
            partial(files.full_disk_elsewhere, names=files.MORE_WRITERS),
        ),
        ("full disk in data show, data stats", some(4), partial(files.full_disk_elsewhere, names=files.PAGES)),
        (f"http server {misbehaves}: index", some(12), partial(files.http, train=False)),
        (f"http server {misbehaves}: train", some(12), partial(files.http, train=True)),
        ("SIGSTOP to one rank of 2", some(4), training.stopped_rank),
        ("SIGSTOP to the data worker", some(3), training.stopped_worker),
        ("two trainers, one folder", some(6), training.two_trainers),
        ("two evaluations, one folder", some(3), files.two_evaluations),
        ("three indexers, one manifest", some(4), files.three_indexers),
    ]


def run(place: Place, results: Path, seed: int, share: float, only: str) -> None:
    done = {(line["fault"], line["try"]) for line in read(results)}
    folder = place.root / "try"
    for name, tries, attempt in faults(place, share):
        for try_ in range(tries):
            if (name, try_) in done or only not in name:
                continue
            began = time.monotonic()
            found, repeat = Found("too late"), 0
            while found.outcome == "too late" and repeat < 8:  # the run was over before its moment: another one
                rng = random.Random(f"{seed}/{name}/{try_}/{repeat}")
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    found = attempt(place, folder, rng, try_)
                except Exception as error:  # of this program: a try that says nothing about vlcl
                    found = Found(f"the try failed: {type(error).__name__}: {error}", "unknown")
                repeat += 1
            bad = bool(found.lost or found.hang or found.traceback)
            line = {
                "fault": name,
                "try": try_,
                "seed": seed,
                "repeat": repeat - 1,
                "seconds": round(time.monotonic() - began, 1),
            }
            with results.open("a") as file:
                file.write(json.dumps(line | vars(found)) + "\n")
            print(f"{name} {try_}: {found.outcome}{' LOST: ' + found.lost if found.lost else ''}"
                  f"{' HANG' if found.hang else ''}{' TRACEBACK' if found.traceback else ''}", flush=True)  # fmt: skip
            if bad:
                kept = results.parent / f"bad-{re.sub('[^a-z0-9]+', '-', name.lower())}-{try_}"
                shutil.rmtree(kept, ignore_errors=True)
                with suppress(OSError):
                    shutil.copytree(folder, kept)


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(lines: list[dict[str, Any]], names: Iterable[str]) -> Iterator[str]:
    """A row for each fault of these names that has a try."""
    yield "| fault | tries | outcome | lost | hang | traceback |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        of = [line for line in lines if line["fault"] == name]
        if not of:
            continue
        outcomes: dict[str, int] = {}
        for line in of:
            outcomes[line["outcome"]] = outcomes.get(line["outcome"], 0) + 1
        told = "; ".join(text.replace("|", "/").replace("\n", " ")[:160] + (f" ({n})" if len(outcomes) > 1 else "")
                         for text, n in outcomes.items())  # fmt: skip
        counts = [sum(bool(line[key]) for line in of) for key in ("lost", "hang", "traceback")]
        yield f"| {name} | {len(of)} | {told} | {' | '.join(map(str, counts))} |"


def write_page(results: Path, names: Iterable[str]) -> None:
    import torch

    from vlcl import __version__

    lines = read(results)
    struck = [line["fault"] for line in lines if line["outcome"] != "too late"]
    kills = sum("killed" in fault for fault in struck)
    saves = sum("inside a save" in fault for fault in struck)
    minutes = sum(line["seconds"] for line in lines) / 60
    seeds = ", ".join(sorted({str(line["seed"]) for line in lines}))
    text = "\n".join([
        BEGIN, *table(lines, names), "",
        f"{len(lines)} tries, {kills} of them kills, {saves} of these inside a save; {minutes:.0f} minutes; "
        f"seed {seeds}; {date.today().isoformat()}; vlcl {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}; `make chaos`.", END,
    ])  # fmt: skip
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + text + page[page.index(END) + len(END) :])


def main() -> None:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/chaos"), help="folder of results and of the tries")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the tries, at least one of each fault")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults with this in their name")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    results = given.work / "results.jsonl"
    place = Place(given.work.resolve())
    run(place, results, given.seed, given.share, given.only)
    names = [name for name, _, _ in faults(place, 1.0)]
    print("\n".join(table(read(results), names)))
    if given.write:
        write_page(results, names)
    sys.exit(any(line[key] for line in read(results) for key in ("lost", "hang", "traceback")))


if __name__ == "__main__":
    main()
