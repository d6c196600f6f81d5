"""Starting a run folder: refuse one that exists, go on in it, or begin it anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlcl import distributed
from vlcl.checkpoint import META, complete_steps, latest_step, step_of
from vlcl.config import Config, dump_config
from vlcl.data.stream import Sources
from vlcl.environment import write_environment
from vlcl.errors import UserError
from vlcl.files import replace_text

# All that a run leaves in its folder: what train.overwrite may delete.
RUN_FILES = (
    "config.yaml", "data.json", "metrics.jsonl", "environment.json", "report.html", "retrieval.png", "tensorboard",
    "examples", "wandb", "wandb_id", "step-*", "old-step-*", ".step-*.tmp", "nonfinite-step-*",
)  # fmt: skip


def resume_folder(resume: str | None, output: str) -> Path | None:
    """The checkpoint that `resume` names, None for a new run. UserError where it is not a whole one."""
    if resume is None:
        return None
    if resume == "latest":
        return latest_step(Path(output))
    folder = Path(resume)
    if not (folder / META).is_file():
        raise UserError(f"resume={resume!r} is no complete checkpoint; give `latest` or a step-*/ folder of a run")
    return folder


def begin(
    run: Path, config: Config, splits: Mapping[str, Sources | None], extra: dict[str, Any], resume: Path | None
) -> None:
    """Make or reuse the run folder, and write into it what the run is (a collective; rank 0 writes). `splits`: train,
    val and test."""

    def write() -> None:
        try:
            _prepare(run, config, resume)
            replace_text(run / "config.yaml", dump_config(config))
            replace_text(run / "data.json", json.dumps(_record(splits), indent=2) + "\n")
            write_environment(run, extra)
        except OSError as error:
            raise UserError(str(error)) from None

    distributed.on_first(write)


def _prepare(run: Path, config: Config, resume: Path | None) -> None:
    run.mkdir(parents=True, exist_ok=True)
    there = [path for pattern in RUN_FILES for path in run.glob(pattern)]
    if resume is not None and resume.parent.resolve() == run.resolve():
        for newer in complete_steps(run):  # of the branch that is left: not to be taken for the latest, nor lost
            if step_of(newer) > step_of(resume):
                shutil.rmtree(run / f"old-{newer.name}", ignore_errors=True)
                newer.rename(run / f"old-{newer.name}")
        return
    if not there:
        return
    if not config.train.overwrite:
        steps = complete_steps(run)
        state = f"its newest checkpoint is {steps[-1].name}" if steps else "it has no complete checkpoint"
        raise UserError(
            f"train.output={str(run)!r} holds a run already ({state}). Go on with resume=latest, choose another "
            "train.output=FOLDER, or delete what it holds with train.overwrite=true"
        )
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _record(splits: Mapping[str, Sources | None]) -> dict[str, Any]:
    """Reference and hash of the data: which shards gave which rows, and the hashes of what is held out."""
    sources = splits["train"]
    assert sources is not None
    parts = [{"first_shard": part.urls[0], "shards": len(part.urls), "pairs": part.manifest.num_samples,
              "digest": part.manifest.digest} for part in sources.parts]  # fmt: skip
    held_out = {name: x and x.digest for name, x in splits.items() if name != "train"}
    return {"digest": sources.digest, "pairs": sources.num_samples, "sources": parts, "held_out": held_out}
