"""Two towers behind one call: DualEncoder(images, tokens) -> Features. open_clip builds and loads them.

Any open_clip architecture by name, those of vlcl/model_configs/ too, or `local-dir:FOLDER` (a folder with
open_clip_config.json, such as a checkpoint or an export of vlcl). Go through `DualEncoder.forward` when training:
calling `.clip.encode_image` on a wrapped model bypasses autocast and gradient synchronisation.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from vlcl.batch import Features
from vlcl.errors import UserError, first_line
from vlcl.hf.weights import has_logit_bias, is_hf_folder, load_hf_weights
from vlcl.image_weights import load_image_weights

open_clip.add_model_config(Path(__file__).parent / "model_configs")

WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)

# open_clip asserts shapes, and takes settings that it does not know for arguments
BUILD_ERRORS = (
    RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, SafetensorError,
    UnpicklingError, EOFError, ArithmeticError, MemoryError,
)  # fmt: skip


class DualEncoder(nn.Module):
    """An open_clip model as `images_BCHW, tokens_BL -> Features`, unit length, float32."""

    has_text = True
    clip: Any  # open_clip's models share methods, not a type

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        self.learn_bias(False)
        if hasattr(clip, "text_decoder"):
            self.clip.text_decoder.requires_grad_(False)  # CoCa's captioner, likewise

    def forward(self, images_BCHW: Tensor, tokens_BL: Tensor) -> Features:
        bias = getattr(self.clip, "logit_bias", None)
        return Features(self.image(images_BCHW), self.text(tokens_BL), self.clip.logit_scale.exp(), bias)

    def learn_bias(self, wanted: bool) -> None:
        """Whether the bias of the logits trains: only SigLIP's loss uses it, and DDP would wait for its gradient."""
        if getattr(self.clip, "logit_bias", None) is not None:
            self.clip.logit_bias.requires_grad_(wanted)

    def image(self, images_BCHW: Tensor) -> Tensor:
        return unit(self.clip.encode_image(images_BCHW))

    def text(self, tokens_BL: Tensor) -> Tensor:
        return unit(self.clip.encode_text(tokens_BL))

    @torch.no_grad()
    def clamp_logit_scale(self, largest: float) -> None:
        """Keep kappa within [1, largest], as CLIP does with 100."""
        self.clip.logit_scale.clamp_(0, math.log(largest))


def unit(x_BD: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least, whatever autocast computed them in."""
    return F.normalize(x_BD.to(torch.promote_types(x_BD.dtype, torch.float32)), dim=1)


@dataclass(frozen=True)
class Built:
    """A model with what belongs to it. `config`: open_clip's format (model_cfg, preprocess_cfg), overrides in it."""

    encoder: DualEncoder
    preprocess_train: Callable[[Image.Image], Tensor]
    preprocess_eval: Callable[[Image.Image], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor]
    config: dict[str, Any]


def build_model(
    name: str,
    *,
    pretrained: str | None = None,
    pretrained_image: str | None = None,
    image_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    context_length: int | None = None,
    patch_dropout: float | None = None,
    grad_checkpointing: bool = False,
    lock_image: bool = False,
    lock_image_unlocked_groups: int = 0,
    lock_text: bool = False,
    lock_text_unlocked_layers: int = 0,
    logit_scale_init: float | None = None,
    logit_bias_init: float | None = None,
) -> Built:
    """Build `name`; `pretrained` is a tag of open_clip, a weights file, or a folder that holds one (open_clip's or
    transformers' format); `pretrained_image`: weights of the image tower alone (vlcl/image_weights.py).

    `image_*` override the preprocessing that goes with the model: mean and standard deviation of a picture's values of
    0 to 1, [3] each; interpolation "bicubic" or "bilinear", of training's crop too, which is bicubic otherwise;
    resize_mode "shortest", "longest" or "squash". `patch_dropout` is the share of patches dropped in training; `lock_*`
    freezes a tower but for its last groups or layers (LiT); `logit_scale_init` is the initial exp(logit_scale),
    `logit_bias_init` that of a learned bias, unless the start weights have one. Raises UserError for a name or tag that
    does not exist, weights that do not fit, and weights that cannot be fetched.
    """
    config = model_config(name)
    if config["model_cfg"]["text_cfg"].get("hf_model_name"):
        _never_ask()
    source = None if pretrained is None else pretrained_source(name, pretrained)
    # The model must have the bias before weights with one are loaded into it.
    bias = logit_bias_init if logit_bias_init is not None else 0.0 if _has_bias(source) else None
    pictures = {"mean": image_mean, "std": image_std, "interpolation": image_interpolation,
                "resize_mode": image_resize_mode}  # fmt: skip
    forced = {"force_image_size": image_size, "force_context_length": context_length,
              "force_patch_dropout": patch_dropout, "force_preprocess_cfg": pictures}  # fmt: skip
    clip = _create(name, source, pretrained, forced | ({} if bias is None else {"init_logit_bias": bias}))
    _override(config["model_cfg"], clip, image_size, context_length)
    preprocess, train, evaluation = _preprocessing(name, clip, image_interpolation)
    config["preprocess_cfg"] = dataclasses.asdict(preprocess)
    length = config["model_cfg"]["text_cfg"].get("context_length", 77)
    tokenize = _tokenizer(name, length, config["model_cfg"]["text_cfg"])
    if source is not None and is_hf_folder(Path(source)):
        load_hf_weights(clip, Path(source), config, tokenize)
    if pretrained_image is not None:
        load_image_weights(clip.visual, pretrained_image)
    _lock(clip, lock_image, lock_image_unlocked_groups, lock_text, lock_text_unlocked_layers)
    if grad_checkpointing:
        clip.set_grad_checkpointing()
    if logit_scale_init is not None:
        clip.logit_scale.data.fill_(math.log(logit_scale_init))
    if bias is not None:
        if logit_bias_init is not None and not bool(clip.logit_bias.any()):  # open_clip puts 0 where weights have none
            clip.logit_bias.data.fill_(logit_bias_init)
        config["model_cfg"]["init_logit_bias"] = bias
    return Built(DualEncoder(clip), train, evaluation, tokenize, config)


def _preprocessing(name: str, clip: Any, interpolation: str | None) -> tuple[PreprocessCfg, Any, Any]:
    """What pictures go through before this model, as open_clip describes it, in training and in evaluation.
    interpolation: of training's crop, which open_clip makes bicubic whatever the model's is."""
    try:
        config = PreprocessCfg(**clip.visual.preprocess_cfg)
        train: Any = image_transform_v2(config, is_train=True)
        if interpolation is not None:
            train.transforms[0].interpolation = InterpolationMode(interpolation)
        return config, train, image_transform_v2(config, is_train=False)
    except BUILD_ERRORS as error:
        raise UserError(
            f"model.name={name!r}: its preprocess_cfg {clip.visual.preprocess_cfg!r} is none that open_clip knows "
            f"({type(error).__name__}: {first_line(error)[:200]})"
        ) from None


def _create(name: str, source: str | None, pretrained: str | None, settings: dict[str, Any]) -> Any:
    """open_clip's model, with the weights of `source` where open_clip can read them."""
    hf_folder = source is not None and is_hf_folder(Path(source))
    # open_clip would not look at `pretrained` with local-dir:, and does not know transformers' names.
    own_load = hf_folder or (source is not None and name.startswith("local-dir:"))
    try:
        clip: Any = open_clip.create_model(
            name, pretrained=None if own_load else source, load_weights=not own_load, **settings
        )
        if source is not None and own_load and not hf_folder:
            open_clip.load_checkpoint(clip, source)
    except BUILD_ERRORS as error:
        detail = (" ".join(str(error).split()) or type(error).__name__)[:300]
        if isinstance(error, UnpicklingError):  # torch's own words advise to run it all the same
            detail = "these weights are damaged, or a pickle that could run code; take a .safetensors file"
        if isinstance(error, SafetensorError):
            detail += " (the file of weights is damaged or cut short: copy it again, or take another checkpoint)"
        config = Path(source or "").parent / "open_clip_config.json"
        if source is not None and config.is_file() and (names := architectures(_read_config(config))):
            detail += f"; the weights are of model.name={' or '.join(names)}"
        raise UserError(f"model.name={name!r}, model.pretrained={pretrained!r}: {detail}") from None
    return clip


def _never_ask() -> None:
    """transformers would ask on the terminal whether a text tower's own code may be run. It may not."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # then it is an error at once


def _tokenizer(name: str, length: int, text_cfg: dict[str, Any]) -> Any:
    """open_clip's tokenizer. Whatever the model's files ask for, none of their code is run."""
    settings: dict[str, Any] = {"trust_remote_code": False} if text_cfg.get("hf_tokenizer_name") else {}
    try:
        return open_clip.get_tokenizer(name, context_length=length, **settings)
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
        wanted = open_clip.get_model_config(name) if ":" not in name else None
        source = (wanted or {}).get("text_cfg", {}).get("hf_tokenizer_name", "that folder")
        raise UserError(
            f"model.name={name!r}: its tokenizer ({source}) cannot be loaded: {str(error).splitlines()[0][:200]}"
        ) from None


def architectures(config: dict[str, Any] | None) -> list[str]:
    """The names of open_clip's and vlcl's architectures with this very config (open_clip's format)."""
    model_cfg = None if config is None else config["model_cfg"]
    return [name for name in open_clip.list_models() if open_clip.get_model_config(name) == model_cfg]


def _read_config(path: Path) -> dict[str, Any] | None:
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


def model_config(name: str) -> dict[str, Any]:
    """The architecture `name` in open_clip's format; UserError with the nearest names where there is none."""
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        if not path.is_file():
            raise UserError(f"model.name={name!r}: {path} does not exist; give a folder with open_clip_config.json")
        if (content := _read_config(path)) is None:
            raise UserError(f"model.name={name!r}: {path} is damaged, or no config of an open_clip model")
        return content
    config = open_clip.get_model_config(name)
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise UserError(
            f"model.name={name!r} is no architecture of open_clip or vlcl{hint} "
            "All names: python -c 'import vlcl.model, open_clip; print(open_clip.list_models())'"
        )
    return {"model_cfg": copy.deepcopy(config)}


def pretrained_source(name: str, pretrained: str) -> str:
    """A tag that exists for `name`, the path of a weights file, or a folder that transformers wrote."""
    path = Path(pretrained)
    if path.is_file():
        return str(path)
    if is_hf_folder(path):
        return str(path)
    if path.is_dir():
        for folder in (path, *sorted(path.glob("step-*"), reverse=True)):
            for file in WEIGHT_FILES:
                if (folder / file).is_file():
                    return str(folder / file)
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


def _has_bias(source: str | None) -> bool:
    """Whether a local weights file holds the bias of the logits (SigLIP's)."""
    if source is not None and is_hf_folder(Path(source)):
        return has_logit_bias(Path(source))
    if source is None or not source.endswith(".safetensors") or not Path(source).is_file():
        return False
    try:
        with safe_open(source, "pt") as file:
            return "logit_bias" in file.keys()  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError):
        return False  # open_clip will say what is wrong with it


def _override(model_cfg: dict[str, Any], clip: Any, image_size: int | None, context_length: int | None) -> None:
    """Write into the saved config what open_clip was told by argument, so that the config alone rebuilds the model."""
    if image_size is not None:
        model_cfg["vision_cfg"]["image_size"] = image_size
    if context_length is not None:
        model_cfg["text_cfg"]["context_length"] = context_length
    if any(isinstance(module, QuickGELU) for module in clip.modules()):
        model_cfg["quick_gelu"] = True  # some pretrained tags switch it on


def _lock(clip: Any, image: bool, image_groups: int, text: bool, text_layers: int) -> None:
    if image:
        clip.lock_image_tower(unlocked_groups=image_groups, freeze_bn_stats=True)
    if text:
        clip.lock_text_tower(unlocked_layers=text_layers, freeze_layer_norm=True)
