"""`vlcl bias RUN`: the gradient-bias diagnostic (vlcl/gradient_bias/measure.py) on a checkpoint and its training pairs.

The checkpoint is frozen and in evaluation mode, pictures are prepared as for evaluation; the rows of the run's table
were filled in training mode, which is part of the error that is reported of them. One process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlcl.checkpoint import load_model
from vlcl.errors import UserError
from vlcl.gradient_bias.batches import Embeddings, Estimator, Exact, LogScale, Pairs, Target
from vlcl.gradient_bias.checkpoint import (
    Checkpoint,
    Say,
    Table,
    decoded,
    decoder_of,
    embed_pairs,
    epoch_of,
    open_checkpoint,
    stale_estimators,
    table_of,
)  # fmt: skip
from vlcl.gradient_bias.measure import (
    QUANTILES,
    Record,
    exact_gradient,
    exact_statistics,
    measure,
    predicted_bias,
    standard_estimators,
)  # fmt: skip
from vlcl.gradient_bias.report import advice, as_text, make_folder, write
from vlcl.gradient_bias.towers import Embedded, encoder_weights
from vlcl.losses.estep import floored

STANDARD = {"infonce": "infonce", "dcl": "dcl", "exact a": "exact", "sampled u": "sampled"}
ESTIMATORS = (*STANDARD.values(), "table", "converged", "stale")
PACKAGES = ("vlcl", "torch", "open_clip_torch", "numpy", "matplotlib")


@dataclass(frozen=True)
class Options:
    """What a user may set. `pairs`: at most so many are measured; `weights`: a pattern of names of the towers' weights,
    measured too, on `weight_pairs` pairs; `data`: shards instead of the run's. `check` says what is allowed."""

    batch_sizes: tuple[int, ...] = (8, 32, 128, 512)
    permutations: int = 32
    pairs: int = 16384
    estimators: tuple[str, ...] = ESTIMATORS
    weights: str | None = None
    weight_pairs: int = 256
    data: str | None = None
    seed: int = 0


def whole_numbers(text: str) -> tuple[int, ...]:
    """`8,32` as numbers, each once, in order; UserError where it is none."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UserError(
            f"--batch-sizes={text!r}: give whole numbers from 2 to the number of pairs, joined by commas: 8,32,128"
        ) from None


def check(options: Options) -> None:
    """UserError for the first option whose value is not allowed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"vlcl bias works in one process, and the launcher started {os.environ['WORLD_SIZE']}: start it without "
            "accelerate or torchrun"
        )
    if options.permutations < 3:
        raise UserError(f"--permutations={options.permutations}: at least 3, to tell bias from noise (32 by default)")
    for name, value in (("--pairs", options.pairs), ("--weight-pairs", options.weight_pairs)):
        if value < 4:
            raise UserError(f"{name}={value}: at least 4 pairs")
    if small := [size for size in options.batch_sizes if size < 2]:
        raise UserError(f"--batch-sizes has {small[0]}: allowed are 2 to the number of pairs that are measured")
    if unknown := [name for name in options.estimators if name not in ESTIMATORS]:
        raise UserError(f"--estimators has {unknown[0]!r}; allowed: {', '.join(ESTIMATORS)}")


def kept_places(num: int, options: Options) -> Tensor:
    """Places of the pairs that every batch size divides into batches, if that costs at most a tenth of the `num`."""
    if large := [size for size in options.batch_sizes if size > num]:
        raise UserError(f"--batch-sizes has {large[0]}, more than the {num} pairs that are measured: 2 to {num}")
    least = math.lcm(*options.batch_sizes)
    kept = num // least * least
    shuffled_N = torch.randperm(num, generator=torch.Generator().manual_seed(options.seed))
    return shuffled_N[: kept if kept >= 0.9 * num else num].sort().values


def distribution(x: Tensor) -> dict[str, float]:
    """Quantiles and mean of all its numbers."""
    values = x.double().flatten().sort().values
    places = [round(q * (len(values) - 1)) for q in QUANTILES]
    quantiles = {f"p{100 * q:g}": float(values[place]) for q, place in zip(QUANTILES, places)}
    return quantiles | {"mean": float(values.mean())}


def table_error(table: Table, pairs: Pairs, exact: Exact) -> dict[str, Any] | None:
    """How far the stored a are from the exact ones, in nats, both directions together."""
    a_NK, exact_NK = table.a(pairs), floored(exact.a_NK, table.loss.epsilon)
    known_NK = torch.isfinite(a_NK)
    if not bool(known_NK.any()):
        return None
    error = (a_NK - exact_NK)[known_NK]
    written = float(known_NK.double().mean())
    return {"absolute": distribution(error.abs()), "mean_signed": float(error.mean()), "rows_written": written}


def predictions(
    pairs: Pairs, exact: Exact, targets: Sequence[Target], batch_sizes: Sequence[int], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The first-order bias, relative to |G|, of "infonce" and "dcl": theory, before anything is measured."""
    reference = exact_gradient(pairs)
    norms = [float(target.vector(reference).norm()) for target in targets]
    found = []
    for name in names:
        for size in batch_sizes:
            gradients = predicted_bias(pairs, exact, size, positive=name == "infonce")
            for target, norm in zip(targets, norms):
                bias = float(target.vector(gradients).norm()) / norm
                found.append({"estimator": name, "target": target.name, "batch_size": size, "bias": bias})
    return found


def chosen_standard(exact: Exact, options: Options) -> list[Estimator]:
    return [e for e in standard_estimators(exact) if STANDARD[e.name] in options.estimators]


def weight_records(checkpoint: Checkpoint, options: Options, say: Say) -> list[Record]:
    """With respect to chosen weights of the towers, on a few pairs spread over the data, as if they were all."""
    if options.weights is None:
        return []
    built = load_model(str(checkpoint.folder))
    built.encoder.to(checkpoint.device)
    total = checkpoint.sources.num_samples
    wanted = min(options.weight_pairs, total)
    rows = [int((place + 0.5) * total / wanted) for place in range(wanted)]
    images, tokens = zip(*decoded(checkpoint.sources, rows, decoder_of(checkpoint, built)))
    device = checkpoint.device
    target, image_SD, text_SD = encoder_weights(
        built.encoder, torch.stack(images).to(device), torch.stack(tokens).to(device), options.weights
    )
    pairs = Pairs.of(image_SD, text_SD, float(built.encoder.clip.logit_scale.detach().exp()))
    checkpoint.notes.append(f"{target.name}: on {len(pairs)} pairs, against the gradient over these {len(pairs)} alone")
    sizes = [size for size in options.batch_sizes if size <= len(pairs)]
    chosen = chosen_standard(exact_statistics(pairs), options)
    return measure(pairs.image_ND, pairs.text_ND, pairs.scale, sizes, options.permutations, chosen, targets=[target],
                   seed=options.seed, progress=lambda text: say(f"{target.name}: {text}"))  # fmt: skip


def account(checkpoint: Checkpoint, whole: Embedded, pairs: Pairs, options: Options) -> dict[str, Any]:
    """What was measured: the head of bias.json."""
    total, meta = checkpoint.sources.num_samples, checkpoint.meta
    checkpoint.notes += whole.notes
    if options.pairs < total:
        checkpoint.notes.append(f"--pairs={options.pairs}: the first pairs of every shard, of {total:,} in all")
    if whole.skipped:
        checkpoint.notes.append(f"bad samples, left out: {whole.skipped}")
    if len(pairs) < len(whole.row_N):
        left_out = len(whole.row_N) - len(pairs)
        checkpoint.notes.append(f"{left_out} pairs, drawn at random, are left out: all batch sizes divide the rest")
    return {
        "checkpoint": str(checkpoint.folder), "step": meta["step"], "epoch": epoch_of(meta),
        "loss": checkpoint.config.loss.model_dump(), "train_batch_size": meta["layout"]["global_batch"],
        "logit_scale": pairs.scale, "pairs": len(pairs), "pairs_of_the_data": total, "settings": asdict(options),
        "device": str(checkpoint.device), "versions": {name: metadata.version(name) for name in PACKAGES},
    }  # fmt: skip


def bias(run: str | Path, options: Options | None = None, output: str | Path | None = None, say: Say = print) -> Path:
    """Measure, and write bias.json and bias.png into `output` (None: RUN/bias), which is returned.

    `run`: a run folder or a step folder of one. `say` gets progress and tables as text. UserError for what a user can
    mend: no checkpoint, shards that are gone, options that are not allowed.
    """
    options = options or Options()
    check(options)
    checkpoint = open_checkpoint(Path(run), options.data)
    if options.weights is not None and checkpoint.config.model.kind == "views":
        raise UserError("--weights is for two towers; a run of model.kind=views is measured on its embeddings alone")
    folder = make_folder(Path(output) if output else checkpoint.run / "bias")
    num_read = min(options.pairs, checkpoint.sources.num_samples)
    say(f"embedding {num_read:,} pairs with {checkpoint.folder} on {checkpoint.device}")
    whole = embed_pairs(checkpoint, checkpoint.folder, options.pairs)
    index_N = kept_places(len(whole.row_N), options).to(checkpoint.device)
    embedded = whole.take(index_N)
    pairs = Pairs.of(embedded.image_ND, embedded.text_ND, embedded.scale, embedded.row_N, embedded.keys)
    exact = exact_statistics(pairs)
    targets: list[Target] = [Embeddings(len(pairs)), LogScale()]
    if embedded.heads is not None:
        targets.insert(0, embedded.heads)
    report = account(checkpoint, whole, pairs, options)
    table = table_of(checkpoint, pairs)
    sizes = sorted({*options.batch_sizes, min(report["train_batch_size"], len(pairs))})
    names = [name for name in ("infonce", "dcl") if name in options.estimators and pairs.keys is None]
    report |= {
        "kappa": distribution(exact.kappa_NK),
        "effective_negatives": distribution((len(pairs) - 1) / exact.kappa_NK),
        "table_error": None if table is None else table_error(table, pairs, exact),
        "predictions": predictions(pairs, exact, targets, sizes, names),
    }
    say(advice(report))
    estimators = chosen_standard(exact, options) + (table.estimators(options.estimators) if table else [])
    if "stale" in options.estimators:
        estimators += stale_estimators(checkpoint, index_N, pairs, options.pairs, say)
    records = measure(pairs.image_ND, pairs.text_ND, pairs.scale, options.batch_sizes, options.permutations, estimators,
                      targets=targets, seed=options.seed, progress=say, keys=pairs.keys)  # fmt: skip
    records += weight_records(checkpoint, options, say)
    report["estimators"] = {estimator.name: estimator.about for estimator in estimators}
    report |= {"notes": checkpoint.notes, "records": [asdict(record) for record in records]}
    write(folder, report)
    say(as_text(report))
    say(f"written: {folder / 'bias.json'}, {folder / 'bias.png'}")
    return folder


def main(run: str, *, batch_sizes: str, estimators: str, output: str | None, **rest: Any) -> None:
    """The command: options as they were typed."""
    names = tuple(name.strip() for name in estimators.split(",") if name.strip())
    bias(run, Options(batch_sizes=whole_numbers(batch_sizes), estimators=names, **rest), output)
