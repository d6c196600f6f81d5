"""Start weights: where `model.pretrained` points, and whether the weights there are of the model that takes them.

Shapes do not say what a model computes: with another activation, normalization or tokenizer the same weights load and
give other features. So every fact of the config beside the weights is compared with the model that was built.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import (
    CLIPTextCfg,
    CLIPVisionCfg,
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from torch import Tensor

from vlcl.errors import UserError
from vlcl.hf.weights import has_logit_bias, image_facts, is_hf_folder
from vlcl.pieces import opened, read, stored

CONFIG = "open_clip_config.json"
MOST_LAYERS, MOST = 1_000, 10_000_000  # of a model
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
# Facts that a setting of `model` decides: one that is set is meant.
SETTINGS = {
    "vision_cfg.image_size": "image_size", "text_cfg.context_length": "context_length",
    "preprocess_cfg.mean": "image_mean", "preprocess_cfg.std": "image_std",
    "preprocess_cfg.interpolation": "image_interpolation", "preprocess_cfg.resize_mode": "image_resize_mode",
}  # fmt: skip
# Of training, of where other weights come from, and of the tokenizer, which is compared by what it does.
_NOT_COMPARED = {
    "patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "output_tokens", "hf_model_pretrained",
    "hf_model_name", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs",
}  # fmt: skip
_PROBES = ("a photo of a cat.", "Two DOGS, running: fast!", "don't stop 24/7", "under_score  two  spaces")

Tokenize = Callable[[Sequence[str]], Tensor]


def pretrained_source(name: str, pretrained: str) -> str:
    """A tag that exists for `name`, the path of a weights file or of the folder of its pieces, or a folder that
    transformers wrote."""
    path = Path(pretrained)
    if path.is_file():
        return str(path)
    if is_hf_folder(path):
        return str(path)
    if path.is_dir():
        for folder in (path, *sorted(path.glob("step-*"), reverse=True)):
            if (weights := weights_in(folder)) is not None:
                return str(weights)
        raise UserError(
            f"model.pretrained={pretrained!r}: no weights in that folder; looked for {', '.join(WEIGHT_FILES)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained.lower() not in {tag.lower() for tag in tags}:
        raise UserError(
            f"model.pretrained={pretrained!r} is neither a file, a folder, nor a tag of {name!r} "
            f"(tags: {', '.join(tags) or 'none'})"
        )
    return pretrained


def weights_in(folder: Path) -> Path | None:
    """The weights of a checkpoint or an export: a file or, of sharded towers, the folder of its pieces."""
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    pieces = stored(folder, "model.safetensors")
    return files[0] if files else pieces if pieces.is_dir() else None


def load_pieces(clip: Any, folder: Path) -> None:
    """What open_clip.load_checkpoint does, which takes a file alone: positions are resized to the model's, a bias of
    the logits that the weights lack is 0."""
    weights = read(folder)
    if "positional_embedding" in weights and not hasattr(clip, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    for name in ("logit_scale", "logit_bias"):
        if getattr(clip, name, None) is not None:
            value = weights.get(name, torch.zeros_like(weights["logit_scale"]))
            weights[name] = value.reshape(getattr(clip, name).shape)
    resize_pos_embed(weights, clip)
    resize_text_pos_embed(weights, clip)
    clip.load_state_dict(weights)


def has_weights(name: str, pretrained: str | None) -> bool:
    """Whether a model starts from weights: `pretrained`, or those in the folder that is its name."""
    folder = Path(name.removeprefix("local-dir:"))
    return pretrained is not None or (name.startswith("local-dir:") and weights_in(folder) is not None)


def has_bias(source: str | None) -> bool:
    """Whether local weights hold the bias of the logits (SigLIP's)."""
    if source is not None and is_hf_folder(Path(source)):
        return has_logit_bias(Path(source))
    if source is None or not (source.endswith(".safetensors") or Path(source).is_dir()):
        return False
    try:
        with opened(Path(source)) as tensors:
            return "logit_bias" in tensors
    except (SafetensorError, OSError):
        return False  # open_clip will say what is wrong with it


def read_config(path: Path) -> dict[str, Any] | None:
    """model_cfg and preprocess_cfg of an open_clip_config.json; None where it is damaged.

    Without a wish for its own code to be run: it is not granted here, and not handed on in what vlcl writes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(content["model_cfg"][key], dict) for key in ("vision_cfg", "text_cfg")):
            (content["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}).pop("trust_remote_code", None)
            return {key: content[key] for key in ("model_cfg", "preprocess_cfg") if key in content}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    return None


def check_sizes(config: Mapping[str, Any], path: Path) -> None:
    """UserError where a config from elsewhere asks for a model that would be built without end: `layers` (of a tower,
    or of each of its stages) above 1,000, or any number above ten million. open_clip's deepest has 64, its largest
    vocabulary 256,000 tokens."""
    places: list[tuple[str, Any]] = [(str(path), config)]
    while places:
        where, value = places.pop()
        if isinstance(value, Mapping):
            places += [(f"{where}: {key}" if where == str(path) else f"{where}.{key}", x) for key, x in value.items()]
        elif isinstance(value, list):
            places += [(where, x) for x in value]
        elif isinstance(value, int | float):
            most = MOST_LAYERS if where.endswith(".layers") else MOST
            if abs(value) > most:
                raise UserError(f"{where}={value!r} is too large for a model; the limit is {most:,}")


def tag_wants_quick_gelu(name: str, source: str | None, config: Mapping[str, Any]) -> bool:
    """Whether the weights of a tag were trained with QuickGELU, and `name` alone would be built without it.

    UserError where it is the other way round.
    """
    if source is None or Path(source).exists() or not (tag := open_clip.get_pretrained_cfg(name, source)):
        return False
    theirs, ours = bool(tag.get("quick_gelu")), bool(config["model_cfg"].get("quick_gelu"))
    if ours and not theirs:
        raise UserError(
            f"model.name={name!r} has QuickGELU, and the weights of model.pretrained={source!r} were trained "
            f"with GELU; take model.name={name.removesuffix('-quickgelu')!r}"
        )
    return theirs and not ours


def check_facts(
    name: str,
    pretrained: str,
    source: Path,
    config: Mapping[str, Any],
    tokenize: Tokenize,
    tokenizer_at: Callable[[Path, Mapping[str, Any]], Tokenize],
    meant: Collection[str],
) -> str | None:
    """Compare the config beside the weights `source` with `config`, that of the model they were loaded into.

    `meant`: the keys of `model` that were set, which may differ. tokenizer_at: the tokenizer of a folder with that
    config. Returns what cannot be known, where there is no config; UserError where the two differ.
    """
    if not source.exists():  # a tag: open_clip knows its facts
        return None
    if is_hf_folder(source):  # what its towers compute is compared as its weights are loaded
        found = {key: value for key, value in image_facts(source).items() if value is not None}
        own = _facts(config)
        _refuse(name, pretrained, None, {key: (value, own[key]) for key, value in found.items()}, meant)
        return None
    path = source.parent / CONFIG
    if not path.is_file():
        return (
            f"model.pretrained={pretrained}: a file of weights alone does not say its activation, normalization of "
            f"pictures, or tokenizer. That they are those of model.name={name} cannot be known"
        )
    theirs = read_config(path)
    try:
        found = None if theirs is None else _facts(theirs)
    except (TypeError, AssertionError, ValueError):  # settings that open_clip does not know
        found = None
    if theirs is None or found is None:
        return f"{path} is damaged: whether the weights beside it are of model.name={name} cannot be known"
    own = _facts(config)
    different = {key: (value, own.get(key)) for key, value in found.items() if value != own.get(key)}
    try:
        if not _same_tokens(theirs, config, path.parent, tokenize, tokenizer_at):
            different["tokenizer"] = ("another one", "its own")
    except UserError as error:
        return f"{error}. Whether model.name={name} has the same tokenizer as model.pretrained cannot be known"
    _refuse(name, pretrained, path, different, meant)
    return None


def _refuse(
    name: str, pretrained: str, path: Path | None, different: Mapping[str, tuple[Any, Any]], meant: Collection[str]
) -> None:
    different = {key: both for key, both in different.items() if not _equal(*both) and SETTINGS.get(key) not in meant}
    if not different:
        return
    facts = "; ".join(f"{key} is {json.dumps(a)}, this model's {json.dumps(b)}" for key, (a, b) in different.items())
    if all(key in SETTINGS for key in different):
        both = ((f"model.{SETTINGS[key]}={json.dumps(x).replace(' ', '')}" for x in pair)
                for key, pair in different.items())  # fmt: skip
        say = "say which is meant: " + ", ".join(" or ".join(pair) for pair in both)
    elif path is None:
        say = "take the model.name of the weights"
    else:
        names = architectures(read_config(path))
        say = "take the model that the weights are of: " + " or ".join(
            f"model.name={x}" for x in (*names, f"local-dir:{path.parent}")
        )
    raise UserError(f"model.pretrained={pretrained!r} holds another model than model.name={name!r}: {facts}; {say}")


def _equal(a: Any, b: Any) -> bool:
    """Numbers to four digits: each library writes as many as it likes."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return abs(a - b) < 1e-4 if isinstance(a, float) and isinstance(b, float) else a == b


def architectures(config: Mapping[str, Any] | None) -> list[str]:
    """The names of open_clip's and vlcl's architectures with this very config (open_clip's format)."""
    model_cfg = None if config is None else config["model_cfg"]
    return [name for name in open_clip.list_models() if open_clip.get_model_config(name) == model_cfg]


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what a model computes, defaults filled in, as JSON has it."""
    model = config["model_cfg"]
    parts = {
        "vision_cfg": dataclasses.asdict(CLIPVisionCfg(**model["vision_cfg"])),
        "text_cfg": dataclasses.asdict(CLIPTextCfg(**model["text_cfg"])),
        "preprocess_cfg": dataclasses.asdict(PreprocessCfg(**(config.get("preprocess_cfg") or {}))),
    }
    parts["preprocess_cfg"].pop("size")  # vision_cfg.image_size
    found = {"embed_dim": model["embed_dim"], "quick_gelu": bool(model.get("quick_gelu"))}
    found |= {f"{part}.{key}": x for part, all in parts.items() for key, x in all.items() if key not in _NOT_COMPARED}
    found["preprocess_cfg.mean"], found["preprocess_cfg.std"] = (
        [x] * 3 if isinstance(x, int | float) else x
        for x in (found["preprocess_cfg.mean"], found["preprocess_cfg.std"])
    )
    size = found["vision_cfg.image_size"]
    found["vision_cfg.image_size"] = size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size
    return json.loads(json.dumps(found))


def _same_tokens(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], folder: Path, tokenize: Tokenize,
    tokenizer_at: Callable[[Path, Mapping[str, Any]], Tokenize],
) -> bool:  # fmt: skip
    """Whether both make the same tokens of some texts; told from the configs where these say the same."""
    keys = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
    a, b = ([config["model_cfg"]["text_cfg"].get(key) or None for key in keys] for config in (theirs, ours))
    if a == b:
        return True
    return tokenizer_at(folder, theirs)(_PROBES).tolist() == tokenize(_PROBES).tolist()
