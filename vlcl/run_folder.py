"""Starting a run folder: refuse one that exists, go on in it, or begin it anew."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlcl import distributed
from vlcl.checkpoint import complete_steps, latest_step, step_of
from vlcl.config import Config, dump_config
from vlcl.data.reader import Sources
from vlcl.data.urls import without_secrets
from vlcl.environment import ENVIRONMENT_FILE, is_environment, write_environment
from vlcl.errors import UserError, reason
from vlcl.files import replace_text
from vlcl.logs import METRICS_FILE, parse_metrics
from vlcl.mirror import FILES, Mirror
from vlcl.paths import check_resume
from vlcl.sealed import META, Damaged, check

# All that a run leaves in its folder: what train.overwrite may delete.
RUN_FILES = (*FILES, "wandb", "step-*", "old-step-*", ".step-*.tmp")
PATIENCE = 90.0  # seconds until another machine sees a folder that is new: network file systems keep what they saw


def resume_folder(resume: str | None, output: str, mirror: Mirror) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` names, None for a new run, and what a user should know (a collective).

    `latest` and `auto` take the newest that is as it was written, which is fetched where the copy of the run has it
    alone; `auto` begins a new run where there is none. UserError where the checkpoint that is named is not whole, and
    for `latest` where none is.
    """
    told: list[str] = []
    # as rank 0 sees the folder: another machine may see it a moment later
    first = distributed.rank() == 0
    found = distributed.together(lambda: _candidates(resume, Path(output), mirror) if first else [])[0]
    for folder, elsewhere in found:
        if elsewhere:
            problem = distributed.together(lambda: mirror.fetch(step_of(folder)) if first else None)[0]  # noqa: B023
            told.append(problem or f"{folder.name} was fetched from {elsewhere}")
            if problem:
                continue
            distributed.together(lambda: _wait_for(folder))  # noqa: B023
        whole, passed_over = first_whole([folder])
        told += passed_over
        if whole is not None:
            return whole, told
    if found:
        raise UserError("\n".join(["no checkpoint to go on from is as it was written:", *told]))
    return None, told


def _wait_for(folder: Path) -> None:
    """UserError where this rank does not see a checkpoint that rank 0 has just put there."""
    until = time.monotonic() + PATIENCE
    while not (folder / META).is_file():
        if time.monotonic() > until:
            raise UserError(
                f"rank {distributed.rank()} on {socket.gethostname()} does not see {folder}, which rank 0 has fetched: "
                "all ranks work in one run folder. Give a train.output=FOLDER on a file system that all machines share"
            )
        time.sleep(0.2)


def first_whole(folders: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """The first checkpoint that is as it was written, if any, and what there is to say of those before it (a
    collective)."""
    passed_over = []
    for folder in folders:
        try:
            check(folder)
            return folder, passed_over
        except Damaged as error:
            passed_over.append(f"{folder.name} is passed over: {error}")
    return None, passed_over


def _candidates(resume: str | None, run: Path, mirror: Mirror) -> list[tuple[Path, str]]:
    """Checkpoints to try, the best first; none for a new run. Each with where it is to be fetched from: "" for the run
    folder's own, which comes before its copy."""
    if resume is None or (resume == "auto" and not complete_steps(run) and not mirror.steps):
        return []
    if resume in ("latest", "auto"):
        if not mirror.steps:
            latest_step(run)
        here = [(step_of(folder), 1, folder, "") for folder in complete_steps(run)]
        there = [(step, 0, run / f"step-{step:08d}", mirror.shown) for step in mirror.steps]
        return [(folder, elsewhere) for *_, folder, elsewhere in sorted((*here, *there), reverse=True)]
    check_resume(resume)
    if not (Path(resume) / META).is_file():
        raise UserError(f"resume={resume!r} is no complete checkpoint; give latest, auto or a run's step-*/ folder")
    return [(Path(resume), "")]


def begin(
    run: Path, config: Config, splits: Mapping[str, Sources | None], extra: dict[str, Any], resume: Path | None,
    mirror: Mirror,
) -> None:  # fmt: skip
    """Make or reuse the run folder, and write into it what the run is (a collective; rank 0 writes). `splits`: train,
    val and test."""

    def write() -> None:
        try:
            _prepare(run, config, resume, mirror)
            write_environment(run, extra)  # first: by it a start that is killed in here is known for one
            replace_text(run / "data.json", json.dumps(_record(splits), indent=2) + "\n")
            replace_text(run / "config.yaml", dump_config(config))
        except OSError as error:
            raise UserError(f"{run} cannot be written: {reason(error)}") from None

    distributed.on_first(write)


def _prepare(run: Path, config: Config, resume: Path | None, mirror: Mirror) -> None:
    run.mkdir(parents=True, exist_ok=True)
    there = [path for pattern in RUN_FILES for path in run.glob(pattern)]
    if resume is not None and resume.parent.resolve() == run.resolve():
        for unfinished in run.glob(".step-*.tmp"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        set_aside_after(run, step_of(resume))
        mirror.set_aside_after(step_of(resume))
        return
    if config.train.overwrite:
        mirror.clear()
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    steps = complete_steps(run)
    if there and (steps or not _may_begin(run, config.resume)):  # what may begin deletes nothing
        go_on = "Go on with resume=latest, choose" if steps else "It has no complete checkpoint to go on from: choose"
        raise UserError(
            f"train.output={str(run)!r} holds a run already. {go_on} another train.output=FOLDER, or delete what it "
            "holds with train.overwrite=true"
        )


def set_aside_after(run: Path, step: int) -> None:
    """Rename the checkpoints of later steps: of a branch that is left, they must not be taken for the latest, nor be
    lost."""
    for newer in complete_steps(run):
        if step_of(newer) > step:
            shutil.rmtree(run / f"old-{newer.name}", ignore_errors=True)
            newer.rename(run / f"old-{newer.name}")


def _may_begin(run: Path, resume: str | None) -> bool:
    """Whether a run may begin here all the same: what is there was left by a start that failed or, for resume=auto, by
    a run that ended before its first checkpoint."""
    checkpoints = any(next(run.glob(kind), None) for kind in ("step-*", "old-step-*"))
    if checkpoints or not is_environment(run / ENVIRONMENT_FILE):
        return False
    path = run / METRICS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return resume == "auto" or not parse_metrics(lines)


def _record(splits: Mapping[str, Sources | None]) -> dict[str, Any]:
    """Reference and hash of the data: which shards gave which rows, and the hashes of what is held out."""
    sources = splits["train"]
    assert sources is not None
    parts = [
        {"first_shard": without_secrets(part.urls[0]), "shards": len(part.urls), "pairs": part.manifest.num_samples,
         "digest": part.manifest.digest} for part in sources.parts
    ]  # fmt: skip
    held_out = {name: x and x.digest for name, x in splits.items() if name != "train"}
    return {"digest": sources.digest, "pairs": sources.num_samples, "sources": parts, "held_out": held_out}
