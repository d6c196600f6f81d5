"""The commands of `vlcl eval`. Each imports what it needs when it runs, so that `--help` needs no torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlcl.data.decode import IMAGE_KEY, TEXT_KEY, Keys, parse_limits
from vlcl.errors import UserError

if TYPE_CHECKING:
    from vlcl_eval.elevater.search import Setting
    from vlcl_eval.text import Knowledge

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A vlcl run or export, a folder of open_clip or transformers, or an open_clip name (ViT-B-32:openai).",
    ),
]
OutputOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="For results.", show_default="RUN/eval, or runs/eval-MODEL")
]
CacheOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="For features.", show_default="$VLCL_CACHE or ~/.cache/vlcl")
]
PrecisionOption = Annotated[str, typer.Option(help="Of the image tower: fp32, or bf16.")]
BatchOption = Annotated[int, typer.Option(help="Images at a time.", min=1)]
WorkersOption = Annotated[
    int | None, typer.Option(help="Reader processes per rank.", show_default="by the cores, 8 at most", min=0)
]
AverageOption = Annotated[bool, typer.Option("--ema", help="The moving average of a run's weights.")]

METHODS = ("linear_probe", "finetune", "logistic")
MODES = {"both": ("elevater", "strict"), "elevater": ("elevater",), "strict": ("strict",)}


def elevater(
    model: ModelArgument,
    data_root: Annotated[
        str, typer.Option(metavar="DIR", help="Folder of the data sets; `vlcl data elevater DIR` checks it.")
    ],
    datasets: Annotated[str, typer.Option(help="Names joined by commas, or all that are there.")] = "all",
    shots: Annotated[
        str, typer.Option(help="Training images a class: 0 is zero-shot, full is all of them.")
    ] = "0,5,20,50,full",
    seeds: Annotated[str, typer.Option(help="Of the few-shot subsets.")] = "0,1,2",
    methods: Annotated[
        str, typer.Option(help="linear_probe, finetune, logistic (not ELEVATER's; strict mode alone).")
    ] = "linear_probe",
    mode: Annotated[str, typer.Option(help="elevater, strict or both; docs/eval.md tells them apart.")] = "both",
    init: Annotated[str, typer.Option(help="Heads start from class names (language) or at random.")] = "language",
    merge: Annotated[bool, typer.Option("--merge", help="Merge the tower's projection into the head.")] = False,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate, in place of the search; needs --weight-decay.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay, in place of the search.")] = None,
    knowledge: Annotated[str | None, typer.Option(metavar="DIR", help="ELEVATER's knowledge files.")] = None,
    knowledge_source: Annotated[str | None, typer.Option(help="wiktionary, wordnet or hierarchy.")] = None,
    gpt3: Annotated[int, typer.Option(help="GPT-3 texts a class from --knowledge.", min=0, max=5)] = 0,
    labels: Annotated[str, typer.Option(help="Map a folder's classes by-name or by-position.")] = "by-name",
    preprocess: Annotated[str, typer.Option(help="elevater's resizing, or the model's own.")] = "elevater",
    output: OutputOption = None,
    cache: CacheOption = None,
    precision: PrecisionOption = "fp32",
    batch_size: BatchOption = 64,
    workers: WorkersOption = None,
    ema: AverageOption = False,
) -> None:
    """Score MODEL on ELEVATER's image classification data sets, zero-, few- and full-shot, and write the report.

    What is measured is kept: the same command goes on where it stopped. docs/eval.md has the protocol.
    On several GPUs: accelerate launch -m vlcl.cli eval elevater ...
    """
    choose("--init", init, ("language", "random"))
    choose("--labels", labels, ("by-name", "by-position"))
    choose("--preprocess", preprocess, ("elevater", "model"))
    modes = MODES[choose("--mode", mode, tuple(MODES))]
    names, wanted_methods = data_set_names(datasets), method_names(methods, modes)
    options: dict[str, Any] = {"shots": shot_list(shots), "seeds": numbers("--seeds", seeds)}
    from vlcl_eval.datasets.registry import registered

    registered(Path(data_root))  # a mistake shows at once, not after torch's import
    options |= {"setting": setting_of(lr, weight_decay), "knowledge": knowledge_of(knowledge, knowledge_source, gpt3)}
    extraction = {"crop": preprocess, **extraction_of(precision, batch_size, workers)}
    from vlcl import distributed
    from vlcl_eval.elevater.command import evaluate
    from vlcl_eval.elevater.work import Protocol
    from vlcl_eval.report.page import report

    protocol = Protocol(methods=wanted_methods, modes=modes, init=init, merge=merge, labels=labels, **options)
    folder = output_folder(model, output)
    with interruptible():
        records, problems = evaluate(
            model, data_root, names, protocol, output=folder, cache=cache_folder(cache), averaged=ema, **extraction
        )
    if records and distributed.rank() == 0:
        report([folder], None)
    end_with(problems)


def report(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders with results.jsonl.")],
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="For report.md and report.png.", show_default="first DIR")
    ] = None,
) -> None:
    """Table, figure and comparison of the results of one or several models."""
    from vlcl_eval.report.page import report

    report([Path(folder) for folder in folders], Path(output) if output else None)


def zeroshot(
    model: ModelArgument,
    folders: Annotated[
        list[str], typer.Argument(metavar="FOLDER...", help="wds_* folders of CLIP_benchmark, or DIR/CLASS/*.jpg.")
    ],
    split: Annotated[str, typer.Option(help="The folders' split to score.")] = "test",
    output: OutputOption = None,
    cache: CacheOption = None,
    precision: PrecisionOption = "fp32",
    batch_size: BatchOption = 64,
    workers: WorkersOption = None,
    ema: AverageOption = False,
) -> None:
    """Zero-shot classification with each folder's own class names and templates, as CLIP_benchmark scores it.

    Records go to OUTPUT/zeroshot.jsonl, and what is recorded there is not measured again.
    """
    extraction = extraction_of(precision, batch_size, workers)
    from vlcl_eval.clip_benchmark.zeroshot import evaluate_wds

    with interruptible():
        _, problems = evaluate_wds(
            model, folders, split, output=output_folder(model, output), cache=cache_folder(cache), averaged=ema,
            **extraction,
        )  # fmt: skip
    end_with(problems)


def retrieval(
    model: ModelArgument,
    shards: Annotated[
        str, typer.Argument(metavar="SHARDS", help="Held-out pairs as data.val takes them, or a wds_* folder.")
    ],
    split: Annotated[str, typer.Option(help="Of a wds_* folder.")] = "test",
    text_key: Annotated[
        list[str] | None,
        typer.Option(help="Suffix of the captions: data.text_key; for a list, again for each.", show_default=TEXT_KEY),
    ] = None,
    json_text_key: Annotated[
        list[str] | None,
        typer.Option(help="Key of the .json with a caption or a list of them: data.json_text_key; or again for each."),
    ] = None,
    text_lines: Annotated[
        bool, typer.Option("--text-lines/--no-text-lines", help="Each line of the file is a caption: data.text_lines.")
    ] = True,
    image_key: Annotated[str, typer.Option(help="Suffixes of the image, best first.")] = IMAGE_KEY,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Of a sample, as data.max_*: max_pixels=1000000.")
    ] = None,
    output: OutputOption = None,
    precision: PrecisionOption = "fp32",
    batch_size: BatchOption = 64,
    workers: WorkersOption = None,
    ema: AverageOption = False,
) -> None:
    """Recall at 1, 5 and 10 of images by captions and of captions by images, as CLIP_benchmark counts it.

    An image may have several captions. The record goes to OUTPUT/retrieval.jsonl.
    """
    extraction = extraction_of(precision, batch_size, workers)
    from vlcl_eval.clip_benchmark.retrieval import evaluate_retrieval

    keys = Keys(image_key, tuple(text_key or [TEXT_KEY]), tuple(json_text_key or []), text_lines)
    rules: Any = {"keys": keys, "limits": parse_limits(limit or [])}
    evaluate_retrieval(model, shards, split, output=output_folder(model, output), averaged=ema, **rules, **extraction)


def submission(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder with results.jsonl; or a zip, to check it.")],
    track: Annotated[str, typer.Option(help="zeroshot, linear_probe or finetune.")] = "zeroshot",
    shots: Annotated[str, typer.Option(help="5 or full; 0 for zeroshot.")] = "0",
    model: Annotated[str | None, typer.Option(help="Label or weights, where DIR has several models.")] = None,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Samples of test splits too: to try out, not to hand in.")
    ] = False,
    output: Annotated[
        str | None, typer.Option(metavar="ZIP", help="To write it to.", show_default="DIR/all_predictions.zip")
    ] = None,
) -> None:
    """Write the predictions of one track in the benchmark's format, and check the zip; or check one that is there."""
    from vlcl_eval.elevater.submission import TRACKS, validate_submission, write_submission

    path = Path(folder)
    if path.suffix != ".zip":
        choose("--track", track, TRACKS)
        (number,) = shot_list(shots) if "," not in shots else (None,)
        if number is None:
            raise UserError(f"--shots {shots!r}: a submission is of one track: 0, 5 or full")
        path = write_submission(
            path, track, number, Path(output) if output else path, allow_incomplete=allow_incomplete, model=model
        )
        print(f"written: {path}")
        with redirect_stderr(StringIO()):  # the writer has warned of missing data sets
            problems = validate_submission(path)
    else:
        problems = validate_submission(path)
    for problem in problems:
        print(f"not valid: {problem}")
    if problems and allow_incomplete:
        return
    if problems:
        raise typer.Exit(1)
    print(f"{path} is valid")


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
