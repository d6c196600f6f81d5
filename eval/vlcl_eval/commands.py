"""The commands of `vlcl eval`. Each imports what it needs when it runs, so that `--help` needs no torch."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer

from vlcl.data.decode import IMAGE_KEY, TEXT_KEY, Keys, parse_limits
from vlcl.errors import UserError
from vlcl.paths import check_model, check_model_and_folders, check_model_and_pairs
from vlcl_eval.options import (
    MODES,
    cache_folder,
    choose,
    data_set_names,
    end_with,
    extraction_of,
    interruptible,
    knowledge_of,
    method_names,
    numbers,
    output_folder,
    setting_of,
    shot_list,
)

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


def elevater(
    model: ModelArgument,
    folder: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="A folder of class folders of your own, as it is.")
    ] = None,
    data_root: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the data sets; `vlcl data elevater DIR` checks it.")
    ] = None,
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
    if (folder is None) == (data_root is None):
        raise UserError(
            "give --data-root DIR, the folder of the benchmark's data sets, or a folder of class folders of your own: "
            "vlcl eval elevater MODEL DIR"
        )
    if data_root is not None:
        from vlcl_eval.datasets.registry import registered

        registered(Path(data_root))  # a mistake shows at once, not after torch's import
    check_model(model)
    options |= {"setting": setting_of(lr, weight_decay), "knowledge": knowledge_of(knowledge, knowledge_source, gpt3)}
    extraction = {"crop": preprocess, **extraction_of(precision, batch_size, workers)}
    from vlcl import distributed
    from vlcl_eval.elevater.command import evaluate
    from vlcl_eval.elevater.work import Protocol
    from vlcl_eval.report.page import report

    protocol = Protocol(methods=wanted_methods, modes=modes, init=init, merge=merge, labels=labels, **options)
    results = output_folder(model, output)
    with interruptible():
        records, problems = evaluate(
            model, data_root, names, protocol, folder=folder, output=results, cache=cache_folder(cache), averaged=ema,
            **extraction,
        )  # fmt: skip
    if records and distributed.rank() == 0:
        report([results], None)
    end_with(problems)


def report(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders with results.jsonl.")],
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="For report.md, .html, .png.", show_default="first DIR")
    ] = None,
) -> None:
    """Table, figure and comparison of the results of one or several models."""
    from vlcl_eval.report.page import report

    report([Path(folder) for folder in folders], Path(output) if output else None)


def zeroshot(
    model: ModelArgument,
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER...", help="wds_* folders, or folders of class folders."),
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
    check_model_and_folders(model, folders, "give folders of CLIP_benchmark's form, or DIR/CLASS/*.jpg")
    extraction = extraction_of(precision, batch_size, workers)
    from vlcl_eval.clip_benchmark.zeroshot import evaluate_wds

    with interruptible():
        _, problems = evaluate_wds(
            model, folders, split, output=output_folder(model, output), cache=cache_folder(cache), averaged=ema,
            **extraction,
        )  # fmt: skip
    end_with(problems)


def datacomp(
    model: ModelArgument,
    data_root: Annotated[str, typer.Option(metavar="DIR", help="Folder of the wds_* folders.")],
    output: OutputOption = None,
    cache: CacheOption = None,
    precision: PrecisionOption = "fp32",
    batch_size: BatchOption = 64,
    workers: WorkersOption = None,
    ema: AverageOption = False,
) -> None:
    """Score MODEL on DataComp's 38 data sets, those that are there, with its metrics and averages.

    The summary goes to OUTPUT/datacomp.json; what is measured is kept, as by `vlcl eval zeroshot`. docs/eval.md has
    the metric of each data set.
    """
    check_model(model)
    if not Path(data_root).is_dir():
        raise UserError(f"--data-root {data_root} is no folder; it should hold folders such as wds_imagenet1k")
    extraction = extraction_of(precision, batch_size, workers)
    from vlcl_eval.clip_benchmark.datacomp import evaluate_datacomp

    with interruptible():
        _, problems = evaluate_datacomp(
            model, data_root, output=output_folder(model, output), cache=cache_folder(cache), averaged=ema, **extraction
        )
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
    check_model_and_pairs(model, shards)
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
    if not Path(folder).exists():
        report([folder])  # told without torch
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
