"""Faults of a training run: kills, signals, damage, ranks and workers that stand still, two trainers at once."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from shards import make_shards, tiny_model

from chaos.victims import Ended, Fault, command, lines_in, start, wait

STEPS, EVERY = 12, 3
DIE = (signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT, signal.SIGUSR2, signal.SIGALRM, signal.SIGSEGV, signal.SIGBUS)
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass
class Found:
    """Of one try. `lost`: what was good before and is not there or is not the same after; "" where nothing."""

    outcome: str
    lost: str = ""
    hang: bool = False
    traceback: bool = False


class Place:
    """Data, a model and undisturbed runs, made once; and a folder for each try."""

    def __init__(self, root: Path) -> None:
        self.root, self.shards, self.model = root, root / "shards", root / "model"
        self.config = root / "empty.yaml"
        if not self.config.exists():
            make_shards(self.shards, (30, 30))
            tiny_model(self.model)
            self.config.write_text("{}")

    def arguments(self, output: Path, *more: str) -> list[str]:
        return ["train", str(self.config),
            f"data.train={self.shards}", f"model.name=local-dir:{self.model}", f"train.output={output}",
            f"train.steps={STEPS}", "train.batch_size=10", "train.log_every=1", "optim.warmup=2", "optim.lr=1e-3",
            f"checkpoint.every={EVERY}", "checkpoint.keep=2", "data.workers=0", "data.streams=2", "data.shuffle=16",
            "log.trackers=[]", "train.precision=fp32", "train.ema=0.9", "eval.examples=0", *more,
        ]  # fmt: skip

    @cache  # noqa: B019 - there is one place
    def whole(self, world: int) -> Path:
        """A run of so many ranks that nothing disturbed."""
        folder = self.root / f"whole-{world}"
        if not (folder / "run" / "report.html").exists():
            shutil.rmtree(folder, ignore_errors=True)
            ended = command(folder, self.arguments(folder / "run", "checkpoint.keep=9"), world)
            assert ended.codes == [0] * world, ended.said
        return folder / "run"

    @cache  # noqa: B019
    def events(self, world: int, rank: int) -> int:
        """How many things the last save does on a rank."""
        folder = self.root / f"events-{world}-{rank}"
        fault = Fault(rank, save_step=STEPS, count_into=folder / "count")
        command(folder, self.arguments(folder / "run"), world, fault)
        return int((folder / "count").read_text())


def steps_of(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("step-*") if (path / "meta.json").is_file())


def _result(run: Path) -> tuple[dict[str, Any], list[Any]]:
    """Sums of all files of the last checkpoint (weights, average, optimizer, table, random states), and the losses."""
    folder = run / f"step-{STEPS:08d}"
    sums = json.loads((folder / "meta.json").read_text())["files"] if (folder / "meta.json").is_file() else {}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sums, [(line["step"], line.get("train/loss")) for line in lines]


def differs(run: Path, whole: Path) -> str:
    (got, losses), (expected, wanted) = _result(run), _result(whole)
    files = sorted(name for name in expected if got.get(name) != expected[name])
    return f"other bits in {', '.join(files)}" if files else "other losses" if losses != wanted else ""


def gone_on(place: Place, folder: Path, world: int, first: Ended, outcome: str, clear: bool) -> Found:
    """Go on with resume=auto after what has ended the run; then everything must be as if nothing had. `clear`: the
    first end must be one without a traceback."""
    run = folder / "run"
    before = steps_of(run)
    second = command(folder / "again", place.arguments(run, "resume=auto"), world)
    if second.hang or first.hang:
        return Found(outcome, hang=True)
    if second.codes != [0] * world:
        return Found(f"cannot go on: {second.said[-300:]}", "the run", traceback=second.traceback)
    lost = differs(run, place.whole(world))
    if before and f"going on from {before[-1]}" not in second.said:
        lost = lost or f"the checkpoint {before[-1].name}"
    return Found(outcome, lost, traceback=second.traceback or (clear and first.traceback))


def at_random(folder: Path, rng: random.Random, rank: int, number: int, lines: int = 11) -> Fault:
    """A signal some milliseconds after one of the first lines of metrics.jsonl."""
    return Fault(rank, number, folder / "run" / "metrics.jsonl", rng.randrange(1, lines), rng.uniform(0, 0.04))


def judged(found: Found, ended: list[Ended], lost: str) -> Found:
    """With what several processes did."""
    return replace(found, lost=lost, hang=any(one.hang for one in ended), traceback=any(one.traceback for one in ended))


def kill_anywhere(place: Place, folder: Path, rng: random.Random, try_: int, world: int) -> Found:
    """The whole run, at a random moment."""
    fault = at_random(folder, rng, try_ % world, signal.SIGKILL)
    first = command(folder, place.arguments(folder / "run"), world, fault, all_die=True)
    if -signal.SIGKILL not in first.codes:
        return Found("too late", hang=first.hang)
    return gone_on(place, folder, world, first, "killed; resumed to the same bits", clear=False)


def kill_one_of_two(place: Place, folder: Path, rng: random.Random, try_: int) -> Found:
    """One rank; the other is left to notice."""
    fault = at_random(folder, rng, try_ % 2, signal.SIGKILL)
    first = command(folder, place.arguments(folder / "run", "train.timeout=10"), 2, fault)
    if -signal.SIGKILL not in first.codes:
        return Found("too late", hang=first.hang)
    return gone_on(place, folder, 2, first, "the other rank ends; resumed to the same bits", clear=True)


def kill_one_at_start(place: Place, folder: Path, rng: random.Random, try_: int) -> Found:
    """One rank of two, while it builds its model, mostly."""
    fault = Fault(try_ % 2, log=folder / "none", line=0, pause=rng.uniform(0, 0.6))
    first = command(folder, place.arguments(folder / "run", "train.timeout=10"), 2, fault)
    if -signal.SIGKILL not in first.codes:
        return Found("too late", hang=first.hang)
    return gone_on(place, folder, 2, first, "the other rank ends; begun anew or resumed to the same bits", clear=True)


def kill_in_save(place: Place, folder: Path, rng: random.Random, try_: int, world: int, tries: int) -> Found:
    """At a thing that the last save does, which deletes an old checkpoint as well; spread over all of them."""
    rank = try_ % world
    events = place.events(world, rank)
    event = 1 + (try_ * events) // tries
    first = command(
        folder, place.arguments(folder / "run"), world, Fault(rank, save_step=STEPS, event=event), all_die=True
    )
    if -signal.SIGKILL not in first.codes:
        return Found("too late", hang=first.hang)
    # the one before may still be under way when the last begins, and then the one before that is there
    if not {STEPS - 2 * EVERY, STEPS - EVERY, STEPS} & {int(path.name[5:]) for path in steps_of(folder / "run")}:
        return Found("killed", "the checkpoint before it")
    return gone_on(place, folder, world, first, "killed; resumed to the same bits", clear=False)


def stop_signal(place: Place, folder: Path, rng: random.Random, try_: int, world: int) -> Found:
    """To a rank of one or two, at a random moment: the run ends after its step, and saves."""
    number = STOP[try_ % len(STOP)]
    fault = at_random(folder, rng, try_ // len(STOP) % world, number, lines=9)
    first = command(folder, place.arguments(folder / "run"), world, fault)
    wanted = [0] * world
    wanted[fault.rank] = 130 if number == signal.SIGINT else 0
    if first.codes == [0] * world and "stopped by" not in first.said:
        return Found("too late")
    if first.codes != wanted or not re.search(r"stopped by .* after step \d+ of", first.said):
        said = f"{number.name}: codes {first.codes}: {first.said[-300:]}"
        return Found(said, "its order", first.hang, first.traceback)
    return gone_on(place, folder, world, first, "saved after its step; resumed to the same bits", clear=True)


def fatal_signal(place: Place, folder: Path, rng: random.Random, try_: int, world: int) -> Found:
    """Others, which end a process at once."""
    number = DIE[try_ % len(DIE)]
    fault = at_random(folder, rng, try_ % world, number)
    first = command(folder, place.arguments(folder / "run"), world, fault, all_die=True)
    if -number not in first.codes:
        return Found("too late", hang=first.hang)
    return gone_on(place, folder, world, first, "ended at once; resumed to the same bits", clear=False)


DAMAGE = {
    "cut short": lambda data: data[: len(data) // 2],
    "a bit flipped": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
    "empty": lambda data: b"",
    "missing": None,
}


class Damage:
    """Each file of the newest checkpoint, in each way."""

    def __init__(self, place: Place, world: int) -> None:
        self.place, self.world = place, world

    @cached_property
    def cases(self) -> list[tuple[Path, str]]:
        newest = steps_of(self.place.whole(self.world))[-1]
        files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
        return [(file, way) for file in files for way in DAMAGE]

    def __call__(self, place: Place, folder: Path, rng: random.Random, try_: int) -> Found:
        file, way = self.cases[try_]
        run = folder / "run"
        shutil.copytree(place.whole(self.world), run)
        path = steps_of(run)[-1] / file
        change = DAMAGE[way]
        data = path.read_bytes()
        path.unlink() if change is None else path.write_bytes(change(data))
        ended = command(folder / "again", place.arguments(run, "resume=latest"), self.world)
        if ended.hang or ended.codes != [0] * self.world:
            return Found(f"{file} {way}: {ended.said[-300:]}", "the run", ended.hang, ended.traceback)
        noticed = "is passed over" in ended.said or (file.name == "meta.json" and way == "missing")
        lost = differs(run, place.whole(self.world)) if noticed else f"{file} {way} was not noticed"
        return Found("passed over; the one before gave the same bits", lost, traceback=ended.traceback)


def stopped_rank(place: Place, folder: Path, rng: random.Random, try_: int) -> Found:
    """SIGSTOP to one rank of two."""
    fault = at_random(folder, rng, try_ % 2, signal.SIGSTOP, lines=9)
    processes = start(folder, 2, place.arguments(folder / "run", "train.timeout=3"), fault)
    other = processes[1 - try_ % 2]
    other.join(40)
    hang = other.is_alive()
    first = wait(folder, processes, 0.1)
    first.codes = [1, 1]  # the stopped one is killed, as a launcher does
    if hang or "has stood still for" not in first.said:
        return Found(f"it was not told: {first.said[-300:]}", hang=hang)
    return gone_on(place, folder, 2, first, "named and ended after train.timeout; resumed to the same bits", clear=True)


def stopped_worker(place: Place, folder: Path, rng: random.Random, try_: int) -> Found:
    """SIGSTOP to the data worker."""
    import psutil

    output = folder / "run"
    more = ["data.workers=1", "train.timeout=3", "train.steps=2000", "checkpoint.every=3"]
    processes = start(folder, 1, place.arguments(output, *more))
    end = time.monotonic() + 30
    while lines_in(output / "metrics.jsonl") < 5 and time.monotonic() < end:
        time.sleep(0.05)
    assert processes[0].pid
    workers = psutil.Process(processes[0].pid).children(recursive=True)
    for worker in workers:
        worker.suspend()
    first = wait(folder, processes, 60)
    for worker in workers:
        if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            worker.kill()
            return Found("a stopped worker was left behind", hang=first.hang)
    told = first.codes == [1] and "stood still for 3 s" in first.said and bool(workers)
    return Found("named and ended after train.timeout" if told else f"not told: {first.said[-300:]}", hang=first.hang,
                 lost="" if steps_of(output) else "its checkpoints", traceback=first.traceback)  # fmt: skip


def two_trainers(place: Place, folder: Path, rng: random.Random, try_: int) -> Found:
    """The same command twice: one trains, the other is refused."""
    more = () if try_ % 2 else ("resume=auto",)
    both = [start(folder / name, 1, place.arguments(folder / "run", *more)) for name in "ab"]
    ended = [wait(folder / name, processes, 60) for name, processes in zip("ab", both)]
    codes = sorted(str(one.codes[0]) for one in ended)
    outcome = "one trains, the other is refused"
    if codes == ["0", "0"] and more:
        outcome = "one after the other"
    elif codes != ["0", "2"]:
        outcome = f"exit codes {codes}: {[one.said[-200:] for one in ended]}"
    return judged(Found(outcome), ended, differs(folder / "run", place.whole(1)) if "0" in codes else "the run")
