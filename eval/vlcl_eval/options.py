"""The options of `vlcl eval` as values: checked, and what is around every evaluation. No torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlcl.errors import UserError

if TYPE_CHECKING:
    from vlcl_eval.elevater.search import Setting
    from vlcl_eval.text import Knowledge

METHODS = ("linear_probe", "finetune", "logistic")
MODES = {"both": ("elevater", "strict"), "elevater": ("elevater",), "strict": ("strict",)}


def shot_list(text: str) -> tuple[int | str, ...]:
    """(0, 5, "full") of "0,5,full"."""
    shots: list[int | str] = []
    for part in text.split(","):
        if part.strip() != "full" and not part.strip().isdecimal():
            raise UserError(f"--shots {text!r}: {part!r} is neither a number nor full; e.g. --shots 0,5,20,50,full")
        shots.append("full" if part.strip() == "full" else int(part))
    return tuple(dict.fromkeys(shots))


def numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = (-1,)
    if min(found) < 0:  # Python's generator takes -1 for 1
        raise UserError(f"{option} {text!r} should be whole numbers from 0, joined by commas, e.g. 0,1,2")
    return found


def data_set_names(text: str) -> list[str] | None:
    """None for all that are there."""
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise UserError(f"--datasets {text!r}: a name is missing; e.g. --datasets mnist,dtd, or all")
    return None if names == ["all"] else names


def method_names(text: str, modes: tuple[str, ...]) -> tuple[str, ...]:
    methods = tuple(dict.fromkeys(choose("--methods", method.strip(), METHODS) for method in text.split(",")))
    if "logistic" in methods and "strict" not in modes:
        raise UserError("--methods logistic is not the benchmark's and has strict scores alone: --mode strict or both")
    return methods


def setting_of(lr: float | None, weight_decay: float | None) -> Setting | None:
    """Of every training; None for a search."""
    from vlcl_eval.elevater.search import Setting

    if lr is None and weight_decay is None:
        return None
    if lr is None or weight_decay is None:
        raise UserError("--lr and --weight-decay replace the search together; give both or neither")
    if not (lr > 0 and weight_decay >= 0):
        raise UserError(f"--lr {lr} must be above 0 and --weight-decay {weight_decay} at least 0")
    return Setting(lr, weight_decay)


def knowledge_of(folder: str | None, source: str | None, gpt3: int) -> Knowledge | None:
    if folder is None and (source or gpt3):
        raise UserError(
            "--knowledge-source and --gpt3 need the files: --knowledge DIR (with external/ and gpt3/ in it)"
        )
    if folder is not None and not (source or gpt3):
        raise UserError("--knowledge DIR: say what of it, with --knowledge-source or --gpt3")
    if folder is None:
        return None
    from vlcl_eval.text import Knowledge

    return Knowledge(folder, source, gpt3)


def extraction_of(precision: str, batch_size: int, workers: int | None) -> dict[str, Any]:
    choose("--precision", precision, ("fp32", "bf16"))
    return {"precision": precision, "batch_size": batch_size, "workers": num_workers(workers)}


@contextmanager
def interruptible() -> Iterator[None]:
    """Around what is kept as it comes."""
    try:
        yield
    except KeyboardInterrupt:
        print("what was measured is kept: the same command goes on from here", file=sys.stderr)
        raise


def end_with(problems: Collection[str]) -> None:
    """The last line, and exit code 1, where something failed that did not stop the rest."""
    if not problems:
        return
    from vlcl import distributed

    if distributed.rank() == 0:
        print(f"failed, for the reasons above: {', '.join(problems)}", flush=True)
    distributed.barrier()  # launchers stop the other ranks, while rank 0 reports, once one ends with an error
    raise typer.Exit(1)


def choose(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UserError(f"{option} {value!r}: choose from {', '.join(allowed)}")
    return value


def output_folder(model: str, output: str | None) -> Path:
    if output is not None:
        return Path(output)
    folder = Path(model)
    if (folder / "config.yaml").is_file():
        return folder / "eval"
    return Path("runs") / f"eval-{re.sub(r'[^A-Za-z0-9._-]+', '-', model.strip('/')).strip('-')}"


def cache_folder(cache: str | None) -> Path:
    return Path(cache or os.environ.get("VLCL_CACHE") or Path.home() / ".cache" / "vlcl")


def num_workers(workers: int | None) -> int:
    """A reader per core of this rank but one, 8 at most."""
    if workers is not None:
        return workers
    from vlcl.data.stream import cpu_cores

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(cpu_cores() // ranks - 1, 8))
