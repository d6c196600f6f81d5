"""What is said about wrong settings: every mistake at once, each with its key, the value given and what is allowed.

The words come from the records of config.py (types, bounds, choices), so that errors and docs/config.md say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

BASIC_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
OPEN_CLIP_FLAGS = {  # names that people bring along, where ours differ
    "accum_freq": "train.accumulate",
    "aug_cfg": "data.augment",
    "csv_caption_key": "data.text_key",
    "csv_img_key": "data.image_key",
    "dataset_resampled": "data.resample",
    "force_context_length": "model.context_length",
    "force_image_size": "model.image_size",
    "force_patch_dropout": "model.patch_dropout",
    "grad_clip_norm": "optim.clip_norm",
    "imagenet_val": "eval.zeroshot",
    "log_every_n_steps": "train.log_every",
    "logs": "train.output",
    "lr_scheduler": "optim.schedule",
    "max_image_pixels": "data.max_pixels",
    "opt": "optim.name",
    "ratio": "data.crop_ratio",
    "report_to": "log.trackers",
    "save_frequency": "checkpoint.every",
    "scale": "data.crop_scale",
    "text": "data.text_key",
    "torchcompile": "train.compile",
    "train_data": "data.train",
    "train_data_upsampling_factors": "data.weights",
    "val_data": "data.val",
    "val_frequency": "eval.every",
    "wd": "optim.weight_decay",
    "zeroshot_frequency": "eval.every",
}


@dataclass(frozen=True)
class Allowed:
    """Mark of a type in config.py: these words describe it better than its bounds do."""

    text: str


@dataclass(frozen=True)
class Problem:
    """One mistake: the keys it is about (`section.key`) and what to say."""

    keys: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Key:
    """One setting: its path, the name of the loss it belongs to ("" for others), and its type and text."""

    path: str
    loss: str
    field: FieldInfo


def sections_of(annotation: Any) -> dict[str, type[BaseModel]]:
    """The records that a field may hold, by their `name` where there are several; {} for a plain setting."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"": annotation}
    members = [get_args(part)[0] for part in get_args(annotation) if get_origin(part) is Annotated]
    return {m.model_fields["name"].default: m for m in members if isinstance(m, type) and issubclass(m, BaseModel)}


def keys_of(model: type[BaseModel]) -> list[Key]:
    """Every setting, in the order of the records."""

    def walk(model: type[BaseModel], prefix: str, loss: str) -> Iterator[Key]:
        for name, field in model.model_fields.items():
            if sections := sections_of(field.annotation):
                for tag, section in sections.items():
                    yield from walk(section, f"{prefix}{name}.", tag)
            else:
                yield Key(prefix + name, loss, field)

    return list(walk(model, "", ""))


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a setting of this type may be, in words."""
    for mark in metadata:
        if isinstance(mark, Allowed):
            return mark.text
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        marks = [m for mark in parts[1:] for m in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
        return describe(parts[0], marks)
    if origin in (Union, UnionType):
        return ", or ".join(describe(part, metadata) if part is not NoneType else "null" for part in parts)
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin is list:
        return f"a list of: {describe(parts[0])}"
    signs = {annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<"}
    bounds = [
        f"{sign} {getattr(mark, kind.__name__.lower())}"
        for kind, sign in signs.items()
        for mark in metadata
        if isinstance(mark, kind)
    ]
    return f"{BASIC_TYPES[annotation]} {' and '.join(bounds)}".rstrip()


def find_problems(model: type[BaseModel], values: dict[str, Any]) -> list[Problem]:
    """Every mistake in the nested mapping `values`, in the order of the records.

    Wrong settings hide disagreements between settings, so these are looked for once more without the wrong ones.
    """
    try:
        model.model_validate(values)
        return []
    except ValidationError as error:
        problems = list(dict.fromkeys(p for e in error.errors() for p in _explain(model, e, values)))
    wrong = {key for problem in problems for key in problem.keys}
    rest = deepcopy(values)
    for key in wrong:
        _remove(rest, key.split("."))
    for key in keys_of(model):
        if key.field.is_required():
            section, _, name = key.path.rpartition(".")
            rest.setdefault(section, {}).setdefault(name, "placeholder")
    try:
        model.model_validate(rest)
    except ValidationError as error:
        found = [p for e in error.errors() if e["type"] == "disagreement" for p in _explain(model, e, rest)]
        problems += [p for p in found if not wrong & {*p.keys, *(key.partition(".")[0] for key in p.keys)}]
    return problems


def unknown_key(model: type[BaseModel], path: str) -> Problem:
    """The problem of a key that does not exist, with the nearest ones that do."""
    near = suggest_keys(path, [key.path for key in keys_of(model)], list(model.model_fields))
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return Problem((path,), f"{path}: there is no such key{hint}")


def suggest_keys(path: str, known: Sequence[str], sections: Sequence[str]) -> list[str]:
    """Keys that `path` may have meant: the same name in another section, open_clip's flag, then a near spelling."""
    section, _, name = path.rpartition(".")
    name = name.replace("-", "_")
    same_name = [key for key in known if key.rpartition(".")[2] == name]
    if same_name or name in OPEN_CLIP_FLAGS:
        return list(dict.fromkeys(same_name))[:3] or [OPEN_CLIP_FLAGS[name]]
    if not section and (near := get_close_matches(name, sections, n=1)):
        return near
    in_section = [key for key in known if key.startswith(f"{section}.")]
    if near := get_close_matches(f"{section}.{name}", in_section, n=1, cutoff=0.75):
        return near
    near = get_close_matches(name, [key.rpartition(".")[2] for key in known], n=1, cutoff=0.75)
    return list(dict.fromkeys(key for key in known if near and key.rpartition(".")[2] == near[0]))[:3]


def show(value: Any) -> str:
    """A value as the user may have typed it, text in quotes, cut to a readable length."""
    text = ""
    with suppress(ValueError, RecursionError):  # a list that holds itself has a beginning, too
        for part in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
            text += part
            if len(text) > 80:  # aliases in YAML can make a short file a text without end
                return text[:77] + "..."
    return text


def _explain(model: type[BaseModel], error: Any, values: dict[str, Any]) -> list[Problem]:
    """The problems behind one of pydantic's errors."""
    if error["type"] == "disagreement":
        return list(error["ctx"]["problems"])
    path, field, sections = _locate(model, error["loc"])
    if error["type"] == "extra_forbidden":
        owners = [key.loss for key in keys_of(model) if key.path == path and key.loss]
        if not owners:
            return [unknown_key(model, path)]
        text = f"{path}: loss {show(error['loc'][1])} has no such setting (it is of {', '.join(owners)})"
        return [Problem((path,), f"{text}; leave it out or set loss.name={owners[-1]}")]
    if field is None:  # of a key that is no text as UTF-8 knows it
        return [unknown_key(model, path)]
    if error["type"] == "missing":
        return [Problem((path,), f"{path}: required; {(field.description or '').partition(';')[0]}")]
    given = error["input"]
    if sections and isinstance(given, dict):  # the name that chooses the record is unknown
        name, known = given.get("name"), ", ".join(sections)
        return [Problem((path,), f"{path}.name: got {show(name)}; allowed: {known}{_did_you_mean([name], sections)}")]
    if sections:
        hint = f"; did you mean {path}.name={given}?" if isinstance(given, str) and _has_name(sections) else ""
        names = dict.fromkeys(name for section in sections.values() for name in section.model_fields)
        return [Problem((path,), f"{path}: got {show(given)}; allowed: a section with {', '.join(names)}{hint}")]
    given = _value_at(values, path.split("."))
    hint = _did_you_mean(given if isinstance(given, list) else [given], _choices(field.annotation))
    allowed = describe(field.annotation, field.metadata)
    return [Problem((path,), f"{path}: got {show(given)}; allowed: {allowed}{hint}")]


def _locate(
    model: type[BaseModel], location: Sequence[str | int]
) -> tuple[str, FieldInfo | None, dict[str, type[BaseModel]]]:
    """Key, field and sections at pydantic's error location, which has tags and list positions in it as well."""
    names: list[str] = []
    field, sections = None, {"": model}
    for part in location:
        if names and len(sections) > 1 and part in sections:
            sections = {"": sections[str(part)]}
            continue
        names.append(str(part))
        field = next(iter(sections.values())).model_fields.get(str(part))
        sections = sections_of(field.annotation) if field else {}
        if not sections:
            break
    return ".".join(names), field, sections


def _has_name(sections: dict[str, type[BaseModel]]) -> bool:
    return all("name" in section.model_fields for section in sections.values())


def _choices(annotation: Any) -> list[str]:
    parts = get_args(annotation)
    return list(parts) if get_origin(annotation) is Literal else [choice for part in parts for choice in _choices(part)]


def _did_you_mean(values: Sequence[Any], choices: Sequence[str] | dict[str, Any]) -> str:
    wrong = [value for value in values if isinstance(value, str) and value not in choices]
    near = [match for value in wrong for match in get_close_matches(value.lower(), list(choices), n=1)]
    return f"; did you mean {' and '.join(map(repr, near))}?" if near else ""


def _value_at(values: Any, names: Sequence[str]) -> Any:
    for name in names:
        values = values[name]
    return values


def _remove(values: dict[str, Any], names: Sequence[str]) -> None:
    for name in names[:-1]:
        values = values.get(name, {})
        if not isinstance(values, dict):
            return
    values.pop(names[-1], None)
