"""A training run's settings: the sections together, what must agree between them, and how they are read and written.

`load_config("configs/cc3m.yaml", ["optim.lr=1e-3"])` reads a file and applies overrides, `dump_config` writes the
result back. `python -m vlcl.config > docs/config.md` writes the table of all keys. In a notebook:
 `Config(data=DataConfig(train="shards/{0000..0331}.tar"), loss=EMConfig(gamma=0.5))`.

Objects of this file stop at the commands: below them, functions take keyword arguments. No torch here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from vlcl.config.errors import Problem, find_problems, keys_of, sections_of, unknown_key
from vlcl.config.file import dump, merge, read_file
from vlcl.config.losses import EMConfig, LossConfig
from vlcl.config.optim import OptimConfig
from vlcl.config.sections import (
    AUGMENTATION,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    TrainConfig,
)
from vlcl.config.types import Section, Word
from vlcl.config.views import ViewsConfig, view_checks
from vlcl.data.remote import CACHE_BYTES
from vlcl.data.urls import without_secrets
from vlcl.errors import UserError
from vlcl.metrics import produced


class Config(Section):
    """A whole run. Raises pydantic's ValidationError (load_config: UserError), which lists every mistake."""

    data: DataConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    views: ViewsConfig = Field(default_factory=ViewsConfig)
    loss: LossConfig = Field(default_factory=EMConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    resume: Word | None = None
    """`latest` (of `train.output`), the path of a step folder, or `auto`: the latest where there is one, and a new run
    where there is none; null: start anew"""

    @property
    def logit_scale_ratio(self) -> float:
        """The rate of logit_scale over that of the weights: `optim.logit_scale_ratio`, or what goes with the batch.

        Adam moves a parameter by its rate, whatever the gradient, and a small batch takes more steps. Where the rate
        goes with the root of the batch, so must this: the temperature then moves as far per sample at every batch.
        """
        given = self.optim.logit_scale_ratio
        return 0.2 * min(1.0, (self.train.batch_size / 256) ** 0.5) if given is None else given

    @property
    def loss_choices(self) -> dict[str, Any]:
        """What comes of the loss's settings that go with the batch where they are null: `gamma` and `form` of `em`."""
        return self.loss.choices(self.train.batch_size // self.train.parts)

    def shareable(self) -> dict[str, Any]:
        """The settings for the pages of others (`log.trackers`): addresses without passwords and signatures."""
        return _shareable(self.model_dump())

    @model_validator(mode="after")
    def _settings_agree(self) -> Config:
        if problems := _disagreements(self):
            text = "\n".join(problem.text for problem in problems)
            raise PydanticCustomError("disagreement", "{text}", {"text": text, "problems": problems})
        return self


def _shareable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shareable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_shareable(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value


def _num_sources(pattern: str | list[str] | None) -> int:
    """How many sources a pattern names, as `vlcl.data.manifest.split_sources` divides it: a list is one."""
    return pattern.count("::") + 1 if isinstance(pattern, str) else int(pattern is not None)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _manifest_check(data: DataConfig, key: str, split: str) -> tuple[bool, str, str]:
    """Whether `data.KEY` has a manifest for each source of `data.SPLIT`, in the form of `_disagreements`."""
    manifest, sources = getattr(data, key), _num_sources(getattr(data, split))
    files = len(_as_list(manifest))
    return (
        manifest is not None and files != sources, f"data.{key} data.{split}",
        f"data.{key} names {_count(files, 'file')} for {_count(sources, 'source')} in data.{split}; give one per "
        "source",
    )  # fmt: skip


def _caption_checks(data: DataConfig) -> list[tuple[bool, str, str]]:
    """Of data.caption_weights, in the form of `_disagreements`."""
    key = "json_text_key" if data.json_text_key is not None else "text_key"
    weights, names = len(data.caption_weights or []), _as_list(getattr(data, key))
    example = "[caption,recaption]" if key == "json_text_key" else "[txt,recap.txt]"
    return [
        (data.caption_weights is not None and data.captions != "sample", "data.caption_weights data.captions",
         f"data.caption_weights needs data.captions=sample; with data.captions={data.captions} nothing is drawn"),
        (data.caption_weights is not None and weights != len(names), f"data.caption_weights data.{key}",
         f"data.caption_weights has {_count(weights, 'number')} for {_count(len(names), 'key')} in data.{key}; give "
         f"one per key, as data.{key}={example} data.caption_weights=[1,3]"),
    ]  # fmt: skip


def _augment_checks(data: DataConfig) -> list[tuple[bool, str, str]]:
    """Of what is done to training pictures, in the form of `_disagreements`: nothing that is set would do nothing."""
    defaults = {key: DataConfig.model_fields[key].get_default(call_default_factory=True) for key in AUGMENTATION}
    changed = [key for key, default in defaults.items() if getattr(data, key) != default]
    return [
        *((data.augment == "none", f"data.augment data.{key}",
           f"data.{key} needs data.augment=crop: with data.augment=none training sees pictures as evaluation does")
          for key in changed),
        ("color_jitter_prob" in changed and data.color_jitter is None, "data.color_jitter_prob data.color_jitter",
         "data.color_jitter_prob needs data.color_jitter, as data.color_jitter=[0.32,0.32,0.32,0.08]"),
        ("blur_sigma" in changed and data.blur_prob == 0, "data.blur_sigma data.blur_prob",
         "data.blur_sigma needs data.blur_prob, the share of pictures that are blurred: it is 0"),
    ]  # fmt: skip


def _disagreements(config: Config) -> list[Problem]:
    """Settings that are fine alone and not together."""
    data, model, optim, train, checkpoint = config.data, config.model, config.optim, config.train, config.checkpoint
    num_train, num_weights, best = _num_sources(data.train), len(data.weights or []), checkpoint.keep_best
    checks: list[tuple[bool, str, str]] = [  # wrong?, the keys it is about, what to say
        (data.weights is not None and not data.resample, "data.weights data.resample",
         "data.weights needs data.resample=true: without it every sample is read once an epoch"),
        (data.weights is not None and num_weights != num_train, "data.weights data.train",
         f"data.weights has {_count(num_weights, 'number')} for {_count(num_train, 'source')} in data.train; give one "
         "per source"),
        (data.remote_cache is None and data.remote_cache_bytes != CACHE_BYTES,
         "data.remote_cache_bytes data.remote_cache", "data.remote_cache_bytes needs data.remote_cache=FOLDER"),
        (bool(data.stages and data.cache), "data.stages data.cache",
         "data.stages needs data.cache=null: a cache keeps decoded pictures, and no files that stages could work on"),
        (bool(data.long_captions != "start" and data.cache), "data.long_captions data.cache",
         f"data.long_captions={data.long_captions} needs data.cache=null: a cache keeps the start of each caption"),
        *_caption_checks(data),
        *_augment_checks(data),
        *view_checks(config),
        _manifest_check(data, "manifest", "train"),
        _manifest_check(data, "val_manifest", "val"),
        _manifest_check(data, "test_manifest", "test"),
        (train.batch_size % ((data.slices or 1) * train.parts) > 0, "train.batch_size data.slices",
         f"train.batch_size={train.batch_size} must be a multiple of data.slices={data.slices}"
         + f" x train.accumulate={train.accumulate}, whose chunks are batches" * (train.negatives == "chunk")),
        (bool(data.workers and data.streams % data.workers), "data.streams data.workers",
         f"data.streams={data.streams} must be a multiple of data.workers={data.workers}"),
        (model.lock_image_unlocked_groups > 0 and not model.lock_image,
         "model.lock_image_unlocked_groups model.lock_image",
         "model.lock_image_unlocked_groups needs model.lock_image=true"),
        (model.lock_text_unlocked_layers > 0 and not model.lock_text,
         "model.lock_text_unlocked_layers model.lock_text",
         "model.lock_text_unlocked_layers needs model.lock_text=true"),
        ((model.logit_scale_init or 0) > model.logit_scale_max, "model.logit_scale_init model.logit_scale_max",
         f"model.logit_scale_init={model.logit_scale_init} is above model.logit_scale_max={model.logit_scale_max}"),
        (optim.lr_min > optim.lr, "optim.lr_min optim.lr", f"optim.lr_min={optim.lr_min} is above optim.lr={optim.lr}"),
        ("://" in (train.output or ""), "train.output",
         f"train.output={without_secrets(train.output)} is an address, and a run folder is on a file system: give a "
         f"folder, and have it copied there: train.output=FOLDER checkpoint.remote={without_secrets(train.output)}"),
        (train.steps is not None and train.epochs is not None, "train.steps train.epochs",
         f"train.steps={train.steps} and train.epochs={train.epochs} are both given; give one of them"),
        (train.batch_size % train.accumulate > 0, "train.batch_size train.accumulate",
         f"train.batch_size={train.batch_size} must be a multiple of train.accumulate={train.accumulate}"),
        (bool(train.profile and not operator.lt(*map(int, train.profile.split(":")))), "train.profile",
         f"train.profile={train.profile} has no steps: START:STOP are the steps after START to STOP"),
        *(config.loss.chunk_checks() if train.negatives == "chunk" else []),
        *config.loss.checks(),
        ((checkpoint.keep_every or 0) % checkpoint.every > 0, "checkpoint.keep_every checkpoint.every",
         f"checkpoint.keep_every={checkpoint.keep_every} must be a multiple of checkpoint.every={checkpoint.every}"),
        (best not in (None, *(known := produced(config, test=False))), "checkpoint.keep_best data.val",
         f"checkpoint.keep_best={best} is not measured: the run has {', '.join(known) or 'none: set data.val=SHARDS'}"),
        (bool(best and not config.eval.every), "checkpoint.keep_best eval.every",
         f"checkpoint.keep_best needs eval.every=STEPS, best a multiple of checkpoint.every={checkpoint.every}"),
    ]  # fmt: skip
    return [Problem(tuple(keys.split()), text) for wrong, keys, text in checks if wrong]


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file (None: all defaults) with `section.key=value` overrides, the later over the earlier.

    Values of overrides are YAML: `data.workers=0`, `eval.templates=["a photo of a {}."]`, `optim.clip_norm=null`.
    Raises UserError, which lists every mistake in the file and the overrides.
    """
    path = None if path is None else Path(path)
    values = {} if path is None else read_file(path)
    known = {key.path for key in keys_of(Config)}
    sections = [name for name, field in Config.model_fields.items() if sections_of(field.annotation)]
    problems = merge(values, overrides, known, sections, lambda key: unknown_key(Config, key))
    for section in sections:
        if values.get(section) is None:  # a section whose lines are all comments
            values[section] = {}
    if isinstance(values["train"], dict) and values["train"].get("output") is None:
        values["train"]["output"] = f"runs/{path.stem if path else 'run'}"
    problems += find_problems(Config, values)
    if problems:
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        lines = [f"{count} in the settings{f' of {path}' if path else ''}:", *(f"  {p.text}" for p in problems)]
        raise UserError("\n".join([*lines, "all keys are in docs/config.md"]))
    return Config.model_validate(values)


def dump_config(config: Config) -> str:
    """YAML of every setting, defaults as well; load_config reads it back to an equal Config."""
    return dump(config.model_dump())
