"""The command `vlcl eval linear`: its options. It imports what it needs when it runs."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from vlcl.errors import UserError
from vlcl.paths import check_model_and_folders
from vlcl_eval.commands import (
    BatchOption,
    ModelArgument,
    OutputOption,
    PrecisionOption,
    WorkersOption,
    extraction_of,
    output_folder,
)


def linear(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Argument(metavar="DIR", help="DIR/train and DIR/test: shards with a .cls file a sample, or CLASS/*.jpg."),
    ],
    split: Annotated[str | None, typer.Option(help="Of DIR, to score.", show_default="test, else val")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training pictures.", min=1)] = 90,
    lrs: Annotated[
        str, typer.Option(help="Learning rates at a batch of 256; a tenth of DIR/train chooses.")
    ] = "0.003,0.01,0.03,0.1,0.3,1",
    crops: Annotated[
        int, typer.Option(help="Random crops a training picture, used in turn; 0: the middle alone.", min=0)
    ] = 0,
    knn: Annotated[int, typer.Option(help="Neighbours of the kNN score.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the crops and of the order.", min=0)] = 0,
    output: OutputOption = None,
    precision: PrecisionOption = "fp32",
    batch_size: BatchOption = 64,
    workers: WorkersOption = None,
) -> None:
    """Train a linear classifier (SGD) on MODEL's frozen image features, and score it; kNN besides.

    Features are computed once and serve all epochs and learning rates. The record goes to OUTPUT/linear.jsonl.
    """
    check_model_and_folders(model, [data], "DIR should have train/ and test/, with shards or CLASS/*.jpg")
    extraction = extraction_of(precision, batch_size, workers)
    rates = learning_rates(lrs)
    from vlcl_eval.linear import evaluate_linear

    evaluate_linear(
        model, data, split, output=output_folder(model, output), epochs=epochs, lrs=rates, crops=crops, neighbours=knn,
        seed=seed, **extraction,
    )  # fmt: skip


def learning_rates(text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = (0.0,)
    if not all(0 < rate < math.inf for rate in found):
        raise UserError(f"--lrs {text!r} should be numbers above 0, joined by commas, e.g. 0.01,0.1,1")
    return found
