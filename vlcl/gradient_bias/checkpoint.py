"""What the gradient-bias diagnostic takes from a run: its data, embeddings of its pairs by a checkpoint, its table as
an estimator, and rows as old as an earlier checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlcl.batch import Aux
from vlcl.checkpoint import META, TABLE, complete_steps, latest_step, load_model, step_of
from vlcl.config import Config, load_config
from vlcl.data.captions import Choice
from vlcl.data.decode import BadSample
from vlcl.data.reader import Decoder, Reader, ShardReader, Sources, samples_at
from vlcl.data.stream import EvalStream, make_loader, pick_workers
from vlcl.data.urls import without_secrets
from vlcl.errors import UserError
from vlcl.from_config import make_decoder, make_loss, make_picture_reader, num_steps, open_sources
from vlcl.gradient_bias.batches import Estimator, Pairs
from vlcl.gradient_bias.measure import exact_statistics, held
from vlcl.gradient_bias.towers import Embedded, embed, embed_views
from vlcl.loss_state import LossState
from vlcl.losses.contrastive import ContrastiveLoss
from vlcl.losses.estep import Context, Rate
from vlcl.losses.mstep import Temperature
from vlcl.losses.views import SymmetrizedLoss
from vlcl.model import Built
from vlcl.paths import check_run

MOST_PASSES = 30  # E-steps over all pairs until a table counts as converged
Say = Callable[[str], None]


@dataclass(frozen=True)
class Part(Sources):
    """The first samples of every shard, `limit` pairs in all, in proportion to the shards' sizes; true row ids."""

    limit: int = 0

    @cached_property
    def counts(self) -> tuple[int, ...]:
        whole = Sources(self.parts).counts
        ends = [sum(whole[: n + 1]) * self.limit // sum(whole) for n in range(len(whole))]
        return tuple(end - start for start, end in zip([0, *ends], ends))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return Sources(self.parts).offsets


@dataclass
class Checkpoint:
    """A step folder with the data that its run was trained on. `meta`: its meta.json. `notes`: for the user."""

    run: Path
    folder: Path
    config: Config
    sources: Sources
    meta: dict[str, Any]
    device: torch.device
    notes: list[str] = field(default_factory=list)

    @property
    def same_data(self) -> bool:
        return self.sources.digest == self.meta["layout"]["digest"]


def epoch_of(meta: dict[str, Any]) -> float:
    """How far the run was, in passes over its data."""
    return meta["batch"] * meta["layout"]["global_batch"] / meta["layout"]["epoch_pairs"]


def open_checkpoint(path: Path, data: str | None = None) -> Checkpoint:
    """A run folder (its newest checkpoint) or a step folder of one, with the run's shards or those of `data`.

    UserError where it is neither, or the shards are not there.
    """
    folder = path if (path / META).is_file() else _latest(path)
    run = folder.parent
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} has no config.yaml, which says with what data and loss {folder.name} was trained")
    config = load_config(run / "config.yaml")
    train = config.data.train
    try:  # a run folder may be another's: what it says is neither fetched nor run
        sources = open_sources(data, None, "run") if data else open_sources(train, config.data.manifest, "here")
    except UserError as error:
        where = f"--data={data}" if data else f"data.train={train!r} of {run / 'config.yaml'}"
        where = without_secrets(where)
        raise UserError(f"{where}: {error}\nSay where the shards are: --data SHARDS") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = Checkpoint(run, folder, config, sources, json.loads((folder / META).read_text()), device)
    if config.data.stages:  # names of code, and a run folder may be another's: nothing of it is imported
        found.notes.append(
            f"data.stages of the run ({', '.join(config.data.stages)}) is left out: all pairs are measured"
        )
    if not found.same_data:
        found.notes.append("these are not the shards that the run was trained on: its table is left out")
    return found


def _latest(run: Path) -> Path:
    check_run(run)
    if complete_steps(run):
        return latest_step(run)
    raise UserError(
        f"no checkpoint in {run}: it has no complete step-*/ folder. Give a run folder of `vlcl train`, or a step "
        "folder of one"
    )


def decoder_of(checkpoint: Checkpoint, built: Built) -> Decoder:
    return make_decoder(checkpoint.config, built.preprocess_eval, built.tokenize)


def embed_pairs(checkpoint: Checkpoint, folder: Path, limit: int) -> Embedded:
    """The run's pairs, or `limit` of them (the first of every shard), by the weights in `folder`, in row order."""
    built = load_model(str(folder))
    built.encoder.to(checkpoint.device)
    sources, config = checkpoint.sources, checkpoint.config
    if limit < sources.num_samples:
        sources = Part(sources.parts, sources.fetching, limit)
    if built.encoder.has_text:
        reader: Reader = ShardReader(sources, decoder_of(checkpoint, built), Choice("first"))
    else:
        reader = make_picture_reader("data.train", config, sources, built)
    stream = EvalStream(sources, config.eval.batch_size, reader, 0, 1)
    workers = pick_workers(config.data.streams) if config.data.workers is None else config.data.workers
    loader = make_loader(stream, workers, checkpoint.device)
    return (embed if built.encoder.has_text else embed_views)(built.encoder, loader, checkpoint.device)


def decoded(sources: Sources, rows: Sequence[int], decoder: Decoder) -> Iterator[tuple[Tensor, Tensor]]:
    """Image and tokens of some rows; bad samples are passed over."""
    for row in rows:
        with suppress(BadSample):
            ((image, caption),) = samples_at(sources, [row], decoder)
            yield decoder.preprocess(image), decoder.tokenize([caption])[0]


@dataclass(frozen=True)
class Table:
    """The run's E-step, order, form and cap as an estimator of the gradient that all others estimate; its step, and
    what it remembered of the pairs at the checkpoint."""

    loss: ContrastiveLoss
    step: int
    memory: Aux

    def a(self, pairs: Pairs) -> Tensor:
        """[N, 2] in relative form; NaN where a row was never written and nothing is predicted."""
        own_NK = pairs.own()
        reference_NK = self.loss.reference(own_NK)
        peers = pairs.peers()
        scale_NK = torch.full_like(own_NK, pairs.scale)
        context = Context(peers, len(pairs), self.step, scale_NK, reference_NK, self.loss.epsilon)
        return self.loss.estep.prior(self.memory, context) + reference_NK - own_NK

    def estimators(self, names: Sequence[str]) -> list[Estimator]:
        """Those of "table" (rows as stored) and "converged" (E-steps repeated on the frozen weights) in `names`."""
        about = f"the run's rows and E-step, order {self.loss.order}"
        passes, between = (passes_to_settle(self.loss.estep.rate, left) for left in (0.01, 0.1))
        found = {
            "table": Estimator("table as trained", self.loss, self.memory, step=self.step, about=f"{about}, as stored"),
            "converged": Estimator("table converged", self.loss, self.memory, passes, between - 1, self.step,
                                   f"{about}, after {passes} E-steps over all pairs with batches of this size"),
        }  # fmt: skip
        return [estimator for name, estimator in found.items() if name in names]


def passes_to_settle(rate: Rate | None, left: float) -> int:
    """E-steps until that share of a row's start is left, at most MOST_PASSES, which is taken where it depends on the
    row (rates that fall with visits never get there: an average over all visits)."""
    if rate is None or rate.kind not in ("constant", "sgd") or rate.gamma <= 0:
        return MOST_PASSES if left < 0.1 else 1
    return 1 if rate.gamma >= 1 else min(math.ceil(math.log(left) / math.log1p(-rate.gamma)), MOST_PASSES)


def table_of(checkpoint: Checkpoint, pairs: Pairs) -> Table | None:
    """The run's table; None, with a note, where there is none that can be compared."""
    layout, config = checkpoint.meta["layout"], checkpoint.config
    name, num_rows = config.loss.name, checkpoint.sources.num_samples
    if not checkpoint.same_data:
        return None
    steps = max(layout["epoch_pairs"] // layout["global_batch"], 1)
    loss = make_loss(config, num_rows, num_steps(config, steps), steps)
    loss = loss.loss if isinstance(loss, SymmetrizedLoss) else loss
    if not isinstance(loss, ContrastiveLoss) or (loss.estep.rate is None and loss.estep.predictor is None):
        checkpoint.notes.append(f"loss.name={name} remembers no log-normalizers: there is no table to measure")
        return None
    if loss.temperature.kind == "pair":
        checkpoint.notes.append(f"loss.name={name} has a temperature for each pair: its table is left out")
        return None
    if loss.bank:
        checkpoint.notes.append("the run's bank of recent pairs is left out: its table is measured without")
    if len(pairs) < 0.9 * num_rows:
        checkpoint.notes.append(
            f"the table's rows are about {num_rows:,} pairs, what is measured about {len(pairs):,}: their errors have "
            "a part that comes from that, of order sqrt(kappa / pairs)"
        )
    state = LossState(loss, num_rows, pairs.image_ND.shape[1], checkpoint.device)
    try:
        state.load(checkpoint.folder / TABLE)
    except ValueError as error:
        raise UserError(f"the table of {checkpoint.folder} cannot be read: {error}") from None
    if loss.same_caption == "ignore":
        checkpoint.notes.append("the run's loss.same_caption=ignore is left out: all other pairs are negatives here")
    same = replace(
        loss, num_pairs=len(pairs), temperature=Temperature(), positive=True, bank=0, bank_negatives=False,
        same_caption="negative",
    )  # fmt: skip
    return Table(same, checkpoint.meta["step"], state.read(pairs.row_N))


def stale_estimators(checkpoint: Checkpoint, index_N: Tensor, pairs: Pairs, limit: int, say: Say) -> list[Estimator]:
    """Rows exact for older checkpoints of the run, held: the newest of them, and the oldest."""
    older = [folder for folder in complete_steps(checkpoint.run) if step_of(folder) < step_of(checkpoint.folder)]
    if not older:
        checkpoint.notes.append("no older checkpoint in the run folder (checkpoint.keep): stale rows are not measured")
    found = []
    for folder in dict.fromkeys(older[-1:] + older[:1]):
        say(f"embedding the pairs with {folder.name}, for rows as old as that")
        old = embed_pairs(checkpoint, folder, limit).take(index_N)
        age = f"{epoch_of(checkpoint.meta) - epoch_of(json.loads((folder / META).read_text())):.2g}"
        a_NK = exact_statistics(Pairs.of(old.image_ND, old.text_ND, old.scale, pairs.row_N, old.keys)).a_NK
        name = f"{age} epoch{'' if age == '1' else 's'} stale"
        found.append(held(name, a_NK, f"exact a of {folder.name}, held"))
    return found
