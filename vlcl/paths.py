"""Paths that a user typed and that are not there: told at once, before torch is imported.

A command calls these first; what loads the things calls them again, where notebooks come in. Each raises UserError.
What is there and is not what it should be is told by what loads it. No torch.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vlcl.config import Config
from vlcl.config.sections import DataConfig
from vlcl.data.manifest import expand_shards, manifest_path, read_manifest, show_pattern, split_sources
from vlcl.data.urls import STORES, check_writable, fetch_command, scheme_of, without_secrets
from vlcl.errors import UserError

HUB = "hf-hub:"
MODEL_CONFIG = "open_clip_config.json"


def check_training(config: Config) -> None:
    """Whatever the settings of a run name."""
    check_data(config.data)
    sets = config.eval.zeroshot or []
    for folder in [sets] if isinstance(sets, str) else sets:
        check_class_folder(folder)
    if config.resume not in (None, "latest", "auto"):
        check_resume(config.resume)
    check_remote(config.checkpoint.remote)
    check_architecture(config.model.name)
    start = config.model.pretrained
    if start and "/" in start and not Path(start).exists():  # tags have no such sign
        _refuse_address(f"model.pretrained={start!r}", start)
        raise UserError(f"model.pretrained={start!r}: there is no such file or folder")


def check_data(data: DataConfig) -> None:
    """The shards of each split, and their manifests."""
    reach = "run" if data.allow_pipe else "fetch"
    splits = ((data.train, data.manifest), (data.val, data.val_manifest), (data.test, data.test_manifest))
    for shards, given in splits:
        patterns = split_sources(shards) if shards else []
        manifests = [given] if isinstance(given, str) else given or [None] * len(patterns)
        for pattern, manifest in zip(patterns, manifests):
            urls = expand_shards(pattern, reach)
            path = os.path.expanduser(manifest) if manifest else manifest_path(urls)
            if not os.path.exists(path):
                read_manifest(path, show_pattern(pattern))


def check_class_folder(folder: str) -> None:
    """eval.zeroshot."""
    if not Path(folder).is_dir():
        raise UserError(f"eval.zeroshot={folder!r} is not a folder; it should hold a folder of images for each class")


def check_resume(step: str) -> None:
    """The step folder that resume names."""
    if "://" in step:
        raise UserError(
            f"resume={without_secrets(step)!r} is an address. A run of which a store has a copy goes on with "
            "checkpoint.remote=ADDRESS (of the run) and resume=latest"
        )
    if not Path(step).is_dir():
        raise UserError(f"resume={step!r} is no complete checkpoint; give latest, auto or a run's step-*/ folder")


def check_architecture(name: str) -> None:
    """model.name, where it is a folder."""
    path = Path(name.removeprefix("local-dir:")) / MODEL_CONFIG
    if name.startswith("local-dir:") and not path.is_file():
        raise UserError(f"model.name={name!r}: {path} does not exist; give a folder with {MODEL_CONFIG}")


def check_remote(url: str | None) -> None:
    """checkpoint.remote."""
    if url is not None:
        try:
            check_writable(url)
        except UserError as error:
            raise UserError(f"checkpoint.remote: {error}") from None


def check_export_folder(folder: str | Path) -> None:
    """OUT of an export, where it is an address."""
    if "://" in str(folder):
        try:
            check_writable(str(folder))
        except UserError as error:
            raise UserError(f"OUT {error}") from None


def check_run(run: str | Path) -> None:
    """The run, or step folder, of a command that takes nothing else."""
    if not Path(run).is_dir():
        raise UserError(
            f"no checkpoint in {run}: there is no such folder. Give a run folder of `vlcl train`, or a step folder of "
            "one"
        )


def architectures() -> set[str]:
    """What open_clip and vlcl build. open_clip is asked where it is imported, else its files are looked at."""
    folders = [Path(__file__).parent / "model_configs"]
    if "open_clip" not in sys.modules and (found := find_spec("open_clip")) and found.origin:
        folders.append(Path(found.origin).parent / "model_configs")
    known = sys.modules["open_clip"].list_models() if "open_clip" in sys.modules else []
    return {path.stem for folder in folders for path in folder.glob("*.json")} | set(known)


def check_model(spec: str) -> None:
    """A run, a checkpoint, an export, or an architecture."""
    name = spec.removeprefix(HUB)
    _refuse_address(f"MODEL {spec}", spec)
    if Path(spec.removeprefix("local-dir:")).exists():
        return
    if "/" not in spec.partition(":")[0] and name == spec:
        name, known = spec.partition(":")[0], architectures()
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UserError(
                f"MODEL {name!r} is no run, checkpoint or exported folder, and no architecture{hint} "
                "All names: vlcl models"
            )
        return
    folder = Path(name)
    if name == spec and folder.parent.is_dir():
        folders = sorted(path for path in folder.parent.iterdir() if path.is_dir())
        models = [path for path in folders if (path / MODEL_CONFIG).is_file() or any(path.glob("step-*/"))]
        there = [path.name for path in models or folders]
        near = difflib.get_close_matches(folder.name, there, n=1, cutoff=0.5)
        hint = f"did you mean {folder.parent / near[0]}?" if near else f"{folder.parent} has {', '.join(there[:5])}"
        raise UserError(f"there is no folder {folder}; {hint}")
    raise UserError(
        f"there is no folder {folder}, and models of the Hugging Face hub are not fetched. If it is one: "
        f"hf download {name} --local-dir {folder.name}, then give {folder.name}"
    )


def _refuse_address(what: str, value: str) -> None:
    if "://" in value and scheme_of(value) in STORES:
        raise UserError(f"{without_secrets(what)} is an address, and models are read here. {fetch_command(value)}")


def check_model_and_pairs(model: str, shards: str) -> None:
    """Shards that a user typed, or a folder in another form."""
    check_model(model)
    if not os.path.isdir(shards):
        for pattern in split_sources(shards):
            expand_shards(pattern, "run")


def check_model_and_folders(model: str, folders: Sequence[str], what: str) -> None:
    """At least one of several folders is there; the others are told of when their turn comes."""
    check_model(model)
    if not any(map(os.path.isdir, folders)):
        raise UserError(f"there is no folder {' and no folder '.join(folders[:3])}; {what}")
