"""From settings to the parts of a run that other commands build as well (`vlcl bias`, `vlcl compare`): data, order of
the data, loss, model settings. vlcl/run.py puts the whole together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, cast, get_args

import torch
from PIL import Image
from torch import Tensor

from vlcl import distributed
from vlcl.config import Config
from vlcl.config.sections import AUGMENTATION, DataConfig
from vlcl.data.cache import MEMORY, CacheReader, open_cache
from vlcl.data.captions import Choice
from vlcl.data.decode import Keys, Limits
from vlcl.data.manifest import Reach, open_source, split_sources
from vlcl.data.order import Layout, source_probabilities
from vlcl.data.preprocess import Augmentation, augmented
from vlcl.data.reader import Decoder, Reader, ShardReader, Sources
from vlcl.data.views import LabelledReader, PictureDecoder, ViewAugmentation, make_view_reader
from vlcl.errors import UserError
from vlcl.fingerprint import tokens_of
from vlcl.losses import Loss, build_loss
from vlcl.losses.pairs import Kernels
from vlcl.losses.views import SymmetrizedLoss
from vlcl.model import Built, build_model
from vlcl.views.build import build_views

# Settings of `model` that `model.kind=views` has a use for.
VIEW_MODEL = (
    "name", "pretrained_image", "image_size", "image_mean", "image_std", "image_interpolation", "image_resize_mode",
    "grad_checkpointing", "logit_bias_init",
)  # fmt: skip


def open_sources(
    patterns: str | list[str], manifests: str | list[str] | None = None, reach: Reach = "fetch"
) -> Sources:
    """The shards of `::`-joined patterns, a manifest each; `reach`: how far they may go. Raises UserError."""
    names = split_sources(patterns)
    paths = [manifests] if isinstance(manifests, str) else manifests or [None] * len(names)
    return Sources(tuple(open_source(name, path, reach) for name, path in zip(names, paths)))


def open_splits(data: DataConfig) -> tuple[Sources, Sources | None, Sources | None]:
    """The sources of data.train, data.val and data.test; None for what is not set. Raises UserError."""
    reach = "run" if data.allow_pipe else "fetch"
    held_out = ((data.val, data.val_manifest), (data.test, data.test_manifest))
    val, test = (open_sources(shards, manifest, reach) if shards else None for shards, manifest in held_out)
    return open_sources(data.train, data.manifest, reach), val, test


def make_decoder(
    config: Config, preprocess: Callable[[Image.Image], Tensor], tokenize: Callable[[Sequence[str]], Tensor]
) -> Decoder:
    data = config.data
    return Decoder(preprocess, tokenize, keys_of(data), limits_of(data), data.background)


def keys_of(data: DataConfig) -> Keys:
    """Where captions and pictures are."""
    text = tuple(data.text_key) if isinstance(data.text_key, list) else data.text_key
    json_text = tuple(data.json_text_key) if isinstance(data.json_text_key, list) else data.json_text_key
    return Keys(data.image_key, text, json_text, data.text_lines)


def limits_of(data: DataConfig) -> Limits:
    return Limits(**{field.name: getattr(data, field.name) for field in fields(Limits)})


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
    if place is None:
        return ShardReader(sources, decoder, choice)
    about = {"tokens": tokens_of(lambda texts: {"text": built.tokenize(list(texts))})}
    if not crop:
        about["preprocess"] = built.config["preprocess_cfg"]
    readers: list[Reader] = []

    def read() -> None:
        kept = {"finished": not crop, "about": about, "key": key, "ranks": ranks_here()}
        cache = open_cache(place, sources, decoder, **kept, say=say)
        readers.append(CacheReader(cache, sources, decoder.preprocess, choice))

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
        return LabelledReader(sources, decoder, built.preprocess_eval)
    pictures = built.config["preprocess_cfg"]
    how = ViewAugmentation(**config.views.only(config.views.OF_PICTURES))
    size, interpolation = pictures["size"][0], pictures["interpolation"]
    return make_view_reader(sources, decoder, how, built.preprocess_eval, size, interpolation, config.train.seed)


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
    remote = [url for url in sources.urls if not os.path.exists(url.removeprefix("file:"))]
    if remote and len(sources.urls) < world and not config.data.resample:
        raise UserError(
            f"{world} ranks share {len(sources.urls)} shards that are not local ({remote[0]}): each would read whole "
            "shards for a part of them. Copy them to a local folder, pack more and smaller shards, or set "
            "data.resample=true"
        )
    probabilities = None
    if config.data.resample:
        counts = [[shard.samples for shard in part.manifest.shards] for part in sources.parts]
        probabilities = tuple(source_probabilities(counts, config.data.weights or [sum(c) for c in counts]))
    return Layout(sources.counts, batch // world, rank, world, config.data.streams, config.train.seed, probabilities)


def num_steps(config: Config, steps_per_epoch: int) -> int:
    """The run's length in optimizer steps."""
    return config.train.steps or math.ceil((config.train.epochs or 1) * steps_per_epoch)


def layout_record(config: Config, sources: Sources, layout: Layout, loss: Loss) -> dict[str, Any]:
    """What the order of the data depends on; see checkpoint.load_checkpoint for a change of it."""
    global_batch = layout.batch_size * layout.world
    return {
        "digest": sources.digest, "loss": config.loss.name, "rows": loss.meaning_of_rows,
        "world": layout.world, "streams": layout.streams,
        "global_batch": global_batch, "epoch_pairs": layout.steps_per_epoch * global_batch, "seed": layout.seed,
        "shuffle": config.data.shuffle, "resample": config.data.resample, "weights": config.data.weights,
    }  # fmt: skip


def make_loss(config: Config, num_pairs: int, total_steps: int, steps_per_epoch: int) -> Loss:
    span = {"num_pairs": num_pairs, "total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    kernels = kernels_asked_for()
    loss = build_loss(config.loss.name, **span, seed=config.train.seed, kernels=kernels, **config.loss.settings())
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
    if config.model.kind == "clip":
        return build_model(**settings)
    settings = {name: x for name, x in settings.items() if name in VIEW_MODEL}
    return build_views(towers=config.views.only(config.views.OF_TOWERS), **settings)


def ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
