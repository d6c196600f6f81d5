"""Starting a run folder: refuse one that exists, go on in it, or begin it anew."""

from __future__ import annotations

import json
import shutil
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
from vlcl.paths import check_resume
from vlcl.sealed import META, Damaged, check

# All that a run leaves in its folder: what train.overwrite may delete.
RUN_FILES = (
    "config.yaml", "data.json", "metrics.jsonl", "environment.json", "report.html", "retrieval.png", "tensorboard",
    "examples", "wandb", "wandb_id", "step-*", "old-step-*", ".step-*.tmp", "anomalies", "profile",
)  # fmt: skip


def resume_folder(resume: str | None, output: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` names, None for a new run, and what a user should know (a collective).

    `latest` and `auto` take the newest that is as it was written; `auto` begins a new run where there is none.
    UserError where the checkpoint that is named is not whole, and for `latest` where none is.
    """
    # as rank 0 sees the folder: another machine may see it a moment later
    folders = distributed.together(lambda: _candidates(resume, Path(output)) if distributed.rank() == 0 else [])[0]
    folder, passed_over = first_whole(folders)
    if folders and folder is None:
        raise UserError("\n".join(["no checkpoint to go on from is as it was written:", *passed_over]))
    return folder, passed_over


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


def _candidates(resume: str | None, run: Path) -> list[Path]:
    """Checkpoints to try, the best first; none for a new run."""
    if resume is None or (resume == "auto" and not complete_steps(run)):
        return []
    if resume in ("latest", "auto"):
        latest_step(run)
        return complete_steps(run)[::-1]
    check_resume(resume)
    if not (Path(resume) / META).is_file():
        raise UserError(f"resume={resume!r} is no complete checkpoint; give latest, auto or a run's step-*/ folder")
    return [Path(resume)]


def begin(
    run: Path, config: Config, splits: Mapping[str, Sources | None], extra: dict[str, Any], resume: Path | None
) -> None:
    """Make or reuse the run folder, and write into it what the run is (a collective; rank 0 writes). `splits`: train,
    val and test."""

    def write() -> None:
        try:
            _prepare(run, config, resume)
            write_environment(run, extra)  # first: by it a start that is killed in here is known for one
            replace_text(run / "data.json", json.dumps(_record(splits), indent=2) + "\n")
            replace_text(run / "config.yaml", dump_config(config))
        except OSError as error:
            raise UserError(f"{run} cannot be written: {reason(error)}") from None

    distributed.on_first(write)


def _prepare(run: Path, config: Config, resume: Path | None) -> None:
    run.mkdir(parents=True, exist_ok=True)
    there = [path for pattern in RUN_FILES for path in run.glob(pattern)]
    if resume is not None and resume.parent.resolve() == run.resolve():
        for unfinished in run.glob(".step-*.tmp"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        set_aside_after(run, step_of(resume))
        return
    if config.train.overwrite:
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
