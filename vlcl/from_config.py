"""From settings to the parts of a run that other commands build as well (`vlcl bias`, `vlcl compare`): data, order of
the data, loss, model settings. vlcl/run.py puts the whole together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from PIL import Image
from torch import Tensor

from vlcl import distributed
from vlcl.config import Config
from vlcl.config.samples import keys_of, limits_of
from vlcl.config.sections import AUGMENTATION, DataConfig
from vlcl.data.cache import CacheReader, open_cache
from vlcl.data.captions import Choice, LongCaptions
from vlcl.data.manifest import Reach, open_source, split_sources
from vlcl.data.order import Layout, default_slices, source_probabilities
from vlcl.data.preprocess import Augmentation, augmented
from vlcl.data.reader import Decoder, Reader, ShardReader, Sources
from vlcl.data.remote import AS_DEFAULT, Fetching
from vlcl.data.room import MEMORY
from vlcl.data.stages import Stage, StageFunction, as_stage, load_stages
from vlcl.data.stream import Position, TrainStream
from vlcl.data.urls import without_secrets
from vlcl.data.views import LabelledReader, PictureDecoder, ViewAugmentation, make_view_reader
from vlcl.errors import UserError, counted
from vlcl.fingerprint import tokens_of
from vlcl.losses import Loss, build_loss
from vlcl.losses.pairs import Kernels
from vlcl.losses.views import SymmetrizedLoss
from vlcl.model import Built, build_model
from vlcl.start_weights import has_weights
from vlcl.views.build import build_views

# Settings of `model` that `model.kind=views` has a use for.
VIEW_MODEL = (
    "name", "pretrained_image", "image_size", "image_mean", "image_std", "image_interpolation", "image_resize_mode",
    "grad_checkpointing", "logit_bias_init",
)  # fmt: skip


def open_sources(
    patterns: str | list[str], manifests: str | list[str] | None = None, reach: Reach = "fetch",
    fetching: Fetching = AS_DEFAULT,
) -> Sources:  # fmt: skip
    """The shards of `::`-joined patterns, a manifest each; `reach`: how far they may go. Raises UserError."""
    names = split_sources(patterns)
    paths = [manifests] if isinstance(manifests, str) else manifests or [None] * len(names)
    return Sources(tuple(open_source(name, path, reach) for name, path in zip(names, paths)), fetching)


def how_far(data: DataConfig) -> tuple[Reach, Fetching]:
    """How far shards that the settings name may go, and how they are fetched."""
    return "run" if data.allow_pipe else "fetch", Fetching(data.read_ahead, data.remote_cache, data.remote_cache_bytes)


def open_splits(data: DataConfig) -> tuple[Sources, Sources | None, Sources | None]:
    """The sources of data.train, data.val and data.test; None for what is not set. Raises UserError."""
    how = how_far(data)
    held_out = ((data.val, data.val_manifest), (data.test, data.test_manifest))
    val, test = (open_sources(shards, manifest, *how) if shards else None for shards, manifest in held_out)
    return open_sources(data.train, data.manifest, *how), val, test


def make_decoder(
    config: Config, preprocess: Callable[[Image.Image], Tensor], tokenize: Callable[[Sequence[str]], Tensor]
) -> Decoder:
    data = config.data
    return Decoder(preprocess, tokenize, keys_of(data), limits_of(data), data.background)


def augmentation_of(data: DataConfig) -> Augmentation:
    values = ((key, getattr(data, key)) for key in AUGMENTATION)
    settings: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in values}
    return Augmentation(**settings)


def make_reader(key: str, config: Config, sources: Sources, built: Built) -> Reader:
    """The samples of `sources`, which the setting `key` names, as training (data.train) or evaluation takes them: from
    the shards, or from data.cache (a collective then: each rank keeps them, or waits until one has written them)."""
    if config.model.kind == "views":
        return make_picture_reader(key, config, sources, built)
    crop = key == "data.train" and config.data.augment == "crop"
    preprocess = built.preprocess_eval
    if crop:
        preprocess = augmented(built.preprocess_train, augmentation_of(config.data))
    decoder = make_decoder(config, preprocess, built.tokenize)
    place = config.data.cache
    weights = tuple(config.data.caption_weights) if config.data.caption_weights else None
    choice = Choice(config.data.captions, weights, config.train.seed) if key == "data.train" else None
    how = {"fast": crop and config.data.decode == "fast", "pixels": True}  # which `built.encoder` normalizes
    if place is None:
        part = config.data.long_captions
        long = None if choice is None or part == "start" else LongCaptions(part, config.train.seed)
        return ShardReader(sources, decoder, choice, long, **how)
    about = {"tokens": tokens_of(lambda texts: {"text": built.tokenize(list(texts))})}
    if not crop:
        about["preprocess"] = built.config["preprocess_cfg"]
    readers: list[Reader] = []

    def read() -> None:
        kept = {"finished": not crop, "about": about, "key": key, "ranks": ranks_here()}
        cache = open_cache(place, sources, decoder, **kept, say=say)
        readers.append(CacheReader(cache, sources, decoder.preprocess, choice, **how))

    def say(text: str) -> None:
        if place != MEMORY or distributed.rank() == 0:  # a folder is written by one rank, memory is each rank's own
            print(text, flush=True)

    distributed.together(read)
    return readers[0]


def picture_decoder_of(data: DataConfig) -> PictureDecoder:
    return PictureDecoder(keys_of(data), limits_of(data), data.background)


def make_picture_reader(key: str, config: Config, sources: Sources, built: Built) -> Reader:
    """`make_reader` for pictures alone: two views of each in training, else the picture with its label."""
    decoder = picture_decoder_of(config.data)
    if key != "data.train":
        return LabelledReader(sources, decoder, built.preprocess_eval, pixels=True)
    pictures = built.config["preprocess_cfg"]
    how = ViewAugmentation(**config.views.only(config.views.OF_PICTURES))
    size, interpolation = pictures["size"][0], pictures["interpolation"]
    return make_view_reader(sources, decoder, how, size, interpolation, config.train.seed)


def make_layout(config: Config, sources: Sources) -> Layout:
    batch, rank, world = config.train.batch_size, distributed.rank(), distributed.world_size()
    if batch % (world * config.train.accumulate):
        raise UserError(
            f"train.batch_size={batch} must be a multiple of {world} ranks x train.accumulate={config.train.accumulate}"
        )
    if batch < 2 or batch > sources.num_samples:
        raise UserError(
            f"train.batch_size={batch} must be at least 2 and at most the {sources.num_samples} pairs of data.train"
        )
    if config.train.negatives == "chunk" and batch // config.train.accumulate < 2:
        raise UserError(
            f"train.negatives=chunk with train.batch_size={batch} and train.accumulate={config.train.accumulate}: "
            "a pair alone in its chunk has no negatives; take chunks of at least 2 pairs"
        )
    few = len(sources.urls) < world and not (config.data.resample or config.data.remote_cache)
    remote = [url for url in sources.urls if few and not os.path.exists(url.removeprefix("file:"))]
    if remote:
        raise UserError(
            f"{world} ranks share {counted(len(sources.urls), 'shard')}, not all local ({without_secrets(remote[0])}): "
            "each would read whole shards for a part of them. Set data.remote_cache=FOLDER, pack more and smaller "
            "shards, or set data.resample=true"
        )
    slices = config.data.slices or default_slices(batch // config.train.parts, config.data.streams)
    if config.data.slices is None and slices % world:
        raise UserError(cannot_share(world, slices, batch, batch // config.train.parts))
    probabilities = None
    if config.data.resample:
        counts = [[shard.samples for shard in part.manifest.shards] for part in sources.parts]
        probabilities = tuple(source_probabilities(counts, config.data.weights or [sum(c) for c in counts]))
    return Layout(
        sources.counts, batch // world, rank, world, config.data.streams, config.train.seed, probabilities, slices,
        config.train.parts,
    )  # fmt: skip


def cannot_share(world: int, slices: int, batch: int, chunk: int) -> str:
    """Of ranks that do not divide the slices, where nobody has said how many slices there are."""
    fit = [n for n in range(world, chunk + 1, world) if chunk % n == 0]
    best = next((n for n in fit if n % slices == 0), world)
    return (
        f"{world} ranks do not divide the {slices} slices of data.slices=null (from data.streams and "
        f"train.batch_size={batch}), which {told([n for n in range(1, slices + 1) if slices % n == 0])} ranks do. "
        f"For a new run take data.slices={best}: the order of samples is another one, the same on any of its divisors. "
        f"To go on with a run in its own order: data.slices={slices}, where ranks read some samples that another gives"
    )


def told(numbers: Sequence[int]) -> str:
    *but_last, last = map(str, numbers)
    return f"{', '.join(but_last)} or {last}" if but_last else last


def make_stages(config: Config, stages: Sequence[StageFunction] = ()) -> list[Stage]:
    """The stages that the settings name, whose modules are imported now, and `stages` after them (a collective)."""
    found = list(map(as_stage, stages))
    distributed.together(lambda: found.__setitem__(slice(0, 0), load_stages(config.data.stages)))
    return found


def train_pipeline(config: Config, built: Built, stages: Sequence[StageFunction] = ()) -> TrainStream:
    """The batches that a run with these settings trains on, of this rank and from the start: a webdataset.DataPipeline.

    `stages` come after those of `data.stages`; `.compose(stage, ...)` adds more. Raises UserError.
    """
    sources = open_splits(config.data)[0]
    reader = make_reader("data.train", config, sources, built)
    layout = make_layout(config, sources)
    return make_stream(config, sources, layout, reader, Position(), make_stages(config, stages))


def make_stream(
    config: Config, sources: Sources, layout: Layout, reader: Reader, start: Position, stages: Sequence[Stage]
) -> TrainStream:
    hashed = config.loss.same_caption == "ignore"
    return TrainStream(sources, layout, reader, config.data.shuffle, start, stages, hashed)


def num_steps(config: Config, steps_per_epoch: int) -> int:
    """The run's length in optimizer steps."""
    return config.train.steps or math.ceil((config.train.epochs or 1) * steps_per_epoch)


def layout_record(
    config: Config, sources: Sources, layout: Layout, loss: Loss, stages: Sequence[Stage] = ()
) -> dict[str, Any]:
    """What the order of the data depends on, and the number of ranks; see checkpoint.load_checkpoint for a change."""
    global_batch = layout.global_batch
    return {
        "digest": sources.digest, "loss": config.loss.name, "rows": loss.meaning_of_rows,
        "world": layout.world, "slices": layout.slices, "streams": layout.streams,
        "global_batch": global_batch, "epoch_pairs": layout.steps_per_epoch * global_batch, "seed": layout.seed,
        "shuffle": config.data.shuffle, "resample": config.data.resample, "weights": config.data.weights,
        "stages": [stage.name for stage in stages],
    }  # fmt: skip


def make_loss(config: Config, num_pairs: int, total_steps: int, steps_per_epoch: int) -> Loss:
    span = {"num_pairs": num_pairs, "total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    kernels = kernels_asked_for()
    same, settings = config.loss.same_caption, config.loss.settings() | config.loss_choices
    loss = build_loss(config.loss.name, **span, seed=config.train.seed, kernels=kernels, same_caption=same, **settings)
    return SymmetrizedLoss(loss) if config.model.kind == "views" else loss


def kernels_asked_for() -> Kernels:
    """VLCL_KERNELS of the environment. UserError where it is none, or cannot be had."""
    name = os.environ.get("VLCL_KERNELS", "auto")
    if name not in get_args(Kernels):
        allowed = ", ".join(get_args(Kernels))
        raise UserError(f"VLCL_KERNELS={name!r} in the environment: allowed are {allowed} (unset: auto)")
    if name == "triton" and torch.cuda.is_available():  # without a GPU nothing asks for them
        try:
            import vlcl.losses.pairwise_triton  # noqa: F401 (whether it can be imported is the question)
        except ImportError as error:
            raise UserError(f"VLCL_KERNELS=triton in the environment needs the package triton ({error})") from error
    return cast(Kernels, name)


def make_model(config: Config) -> Built:
    """The model of `model.kind`, at its start."""
    settings = config.model.model_dump(exclude={"logit_scale_max", "kind"})
    if settings["logit_bias_init"] is None:
        settings["logit_bias_init"] = config.loss.bias_init
    if config.model.kind == "views":
        settings = {name: x for name, x in settings.items() if name in VIEW_MODEL}
        return build_views(towers=config.views.only(config.views.OF_TOWERS), **settings)
    if settings["logit_scale_init"] is None and not has_weights(config.model.name, config.model.pretrained):
        settings["logit_scale_init"] = config.loss.scale_init
    return build_model(**settings)


def zeroshot_sets(folders: str | list[str] | None) -> dict[str, str]:
    """The folders of eval.zeroshot by the names of their sets: the last part of the path that tells them apart."""
    paths = [Path(folder) for folder in ([folders] if isinstance(folders, str) else folders or [])]
    for depth in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["-".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return {name: str(path) for name, path in zip(names, paths)}
    if paths:
        raise UserError(f"eval.zeroshot names {paths[0]} twice")
    return {}


def ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
