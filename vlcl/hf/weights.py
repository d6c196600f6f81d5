"""The other way: weights of a Hugging Face folder (CLIP, SigLIP, MetaCLIP 2) into an open_clip model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlcl.errors import UserError
from vlcl.hf.forms import CLIP, HF_CLASSES, Form, find_form
from vlcl.hf.keys import convert
from vlcl.hf.towers import NoForm, Tokenize

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TOKENS = "text_model.embeddings.token_embedding.weight"
# What a tower of transformers' config says that decides what it computes; the rest is about training and generation.
_DECISIVE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "max_position_embeddings", "vocab_size", "hidden_act", "layer_norm_eps", "projection_dim", "projection_size",
)  # fmt: skip


def is_hf_folder(folder: Path) -> bool:
    """Whether `folder` was written by transformers, and not (also) in open_clip's format."""
    return (folder / CONFIG).is_file() and not any(folder.glob("open_clip_*"))


def load_hf_weights(clip: nn.Module, folder: Path, config: Mapping[str, Any], tokenize: Tokenize) -> None:
    """Put the weights of `folder` into `clip`. `config`: open_clip's format. UserError where they do not fit."""
    try:
        form = find_form(clip, config, tokenize)
    except NoForm as error:
        raise UserError(f"{folder} is of transformers, which has no class for this model: {error}") from None
    theirs, wanted = _config(folder), form.hf_config()
    if theirs.get("model_type") != wanted.model_type:
        raise UserError(
            f"{folder} holds a model of type {theirs.get('model_type')!r}; this model.name is one of type "
            f"{wanted.model_type!r} there"
        )
    if problems := _differences(form, wanted, theirs, folder):
        raise UserError(f"{folder} holds another architecture than this model.name: {'; '.join(problems[:4])}")
    in_memory = {form.stored(name): name for name in form.shapes()}
    source = {in_memory.get(name, name): x for name, x in _weights(folder).items()}
    own = clip.state_dict()
    shapes = {name: x.shape for name, x in (own | form.filled).items()}
    try:
        if form.pad_row:
            source[_TOKENS] = source[_TOKENS][:-1]
        found = convert([link.turned() for link in form.links], source, shapes)
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder}: its weights do not fit this model, at {error}") from None
    # Only the bias of the logits may be missing: not every class of transformers has one.
    left = clip.load_state_dict({name: x for name, x in found.items() if name in own}, strict=False)
    if missing := set(left.missing_keys) - {"logit_bias"}:
        raise UserError(f"{folder} has no weights for {', '.join(sorted(missing)[:3])}")


def has_logit_bias(folder: Path) -> bool:
    return _config(folder).get("model_type") in {x.model_type for x in HF_CLASSES if x.has_logit_bias}


def image_facts(folder: Path) -> dict[str, Any]:
    """What the image processor beside the weights does, in the words of open_clip's preprocess_cfg; nothing where there
    is none, or one that cannot be read."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            settings = content.get("image_processor", content)
            size = settings.get("size")
            return {
                "preprocess_cfg.mean": [float(x) for x in settings["image_mean"]],
                "preprocess_cfg.std": [float(x) for x in settings["image_std"]],
                "preprocess_cfg.interpolation": {2: "bilinear", 3: "bicubic"}.get(settings.get("resample")),
                "preprocess_cfg.resize_mode": (
                    ("squash" if "height" in size else "shortest") if isinstance(size, dict) else None
                ),
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}


def _differences(form: Form, wanted: PretrainedConfig, theirs: dict[str, Any], folder: Path) -> list[str]:
    """ "vision_config.hidden_size is 768, this model's 512", for all that decides what a tower computes."""
    try:
        found = type(wanted).from_dict(theirs)
        problems = _ends_elsewhere(form, wanted, found)
    except Exception as error:  # each version of transformers has its own for a damaged config
        raise UserError(f"{folder / CONFIG} is damaged: {(str(error).splitlines() or [''])[-1][:200]}") from None
    for tower in ("vision_config", "text_config"):
        ours, others = (_comparable(getattr(config, tower).to_dict()) for config in (wanted, found))
        problems += [
            f"{tower}.{key} is {others.get(key)}, this model's {ours[key]}"
            for key in ours
            if ours[key] != others.get(key)
        ]
    if problems and (names := _architectures(found)):
        problems.insert(0, f"it is model.name={' or '.join(names)}")
    return problems


def _ends_elsewhere(form: Form, wanted: PretrainedConfig, found: PretrainedConfig) -> list[str]:
    """Whether CLIP's text feature is taken at another token; 2 means the largest id there, which is CLIP's own end."""
    ours, theirs = (getattr(config.text_config, "eos_token_id", None) for config in (wanted, found))
    if form.hf_class.reads_last_token or theirs == ours or (form.hf_class is CLIP and theirs == 2):
        return []
    return [f"text_config.eos_token_id is {theirs}, this model's {ours}"]


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: config[key] for key in _DECISIVE if key in config}
    if kept.get("hidden_act") == "gelu_pytorch_tanh":
        kept["hidden_act"] = "gelu"  # nearly the same; open_clip itself runs SigLIP's weights with the exact one
    return kept


def _architectures(found: PretrainedConfig) -> list[str]:
    """open_clip's plain CLIP architectures of the shape of `found`, a config of transformers."""
    vision, text = found.vision_config, found.text_config
    if found.model_type != CLIP.model_type:
        return []
    wanted = (
        vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers, text.hidden_size,
        text.num_hidden_layers, text.max_position_embeddings, found.projection_dim, vision.hidden_act == "quick_gelu",
    )  # fmt: skip
    names = []
    for name in open_clip.list_models():
        config: Any = open_clip.get_model_config(name)
        image, words = config["vision_cfg"], config["text_cfg"]
        shape = (
            image.get("image_size"), image.get("patch_size"), image.get("width"), image.get("layers"),
            words.get("width"), words.get("layers"), words.get("context_length"), config["embed_dim"],
            config.get("quick_gelu", False),
        )  # fmt: skip
        if shape == wanted:
            names.append(name)
    return names


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, of one file or of several that an index names, in float32."""
    try:
        names = [WEIGHTS]
        if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        tensors = {name: x for file in names for name, x in load_file(folder / file).items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: its weights cannot be read ({error}); {WEIGHTS} is looked for. From a pytorch_model.bin: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from None
    return {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
