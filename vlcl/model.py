"""Two towers behind one call: DualEncoder(images, tokens) -> Features. open_clip builds and loads them.

Any open_clip architecture by name, those of vlcl/model_configs/ too, or `local-dir:FOLDER` (a folder with
open_clip_config.json, such as a checkpoint or an export of vlcl). Go through `DualEncoder.forward` when training:
calling `.clip.encode_image` on a wrapped model bypasses autocast and gradient synchronisation.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.transforms import Compose, InterpolationMode

from vlcl.batch import Features
from vlcl.data.decode import on_background
from vlcl.errors import UserError, first_line
from vlcl.hf.weights import is_hf_folder, load_hf_weights
from vlcl.image_weights import load_image_weights
from vlcl.locked import before_training, lock_towers
from vlcl.paths import MODEL_CONFIG, check_architecture
from vlcl.start_weights import (
    architectures,
    check_facts,
    check_sizes,
    has_bias,
    load_pieces,
    pretrained_source,
    read_config,
    tag_wants_quick_gelu,
    weights_in,
)

open_clip.add_model_config(Path(__file__).parent / "model_configs")

# open_clip asserts shapes, and takes settings that it does not know for arguments
BUILD_ERRORS = (
    RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, SafetensorError,
    UnpicklingError, EOFError, ArithmeticError, MemoryError,
)  # fmt: skip


class DualEncoder(nn.Module):
    """An open_clip model as `images_BCHW, tokens_BL -> Features`, unit length, float32."""

    has_text = True
    clip: Any  # open_clip's models share methods, not a type
    image_mean_C11: Tensor
    image_std_C11: Tensor

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        pictures = PreprocessCfg(**getattr(getattr(clip, "visual", None), "preprocess_cfg", {}))
        for name, values in (("mean", pictures.mean), ("std", pictures.std)):
            try:
                values_C = torch.tensor(values, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"the config of the model has preprocess_cfg.{name}={values!r}: {error}") from None
            self.register_buffer(f"image_{name}_C11", values_C.view(-1, 1, 1), persistent=False)
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
        """[B, D] of pictures: normalized ones, or uint8. Or of what `frozen_image` gave for them, [B, F]."""
        if images_BCHW.dim() == 2 and (parts := before_training(self.clip)) is not None:
            return unit(parts[2](images_BCHW))
        return unit(self.clip.encode_image(self.normalized(images_BCHW)))

    def frozen_image(self, images_BCHW: Tensor) -> Tensor | None:
        """[B, F] of pictures by the part of a locked image tower that does not train, which `image` goes on from. None
        where there is none, or it gives something else than a vector."""
        if (parts := before_training(self.clip)) is None:
            return None
        features = parts[1](self.normalized(images_BCHW))
        return features if isinstance(features, Tensor) and features.dim() == 2 else None

    @property
    def image_is_frozen(self) -> bool:
        """Whether there is such a part."""
        return before_training(self.clip) is not None

    def frozen_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers that `frozen_image` depends on."""
        if (parts := before_training(self.clip)) is not None:
            yield from parts[0].state_dict().items()

    def normalized(self, images_BCHW: Tensor) -> Tensor:
        """uint8 pixels as this model wants them, with the bits of torchvision's ToTensor and Normalize on a CPU; others
        are taken to be so. Here, so that workers send a quarter of the bytes, and the device does the arithmetic."""
        if images_BCHW.dtype != torch.uint8:
            return images_BCHW
        values_BCHW = images_BCHW.to(torch.float32).div_(255)
        return values_BCHW.sub_(self.image_mean_C11).div_(self.image_std_C11)

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
    """A model with what belongs to it. `config`: open_clip's format (model_cfg, preprocess_cfg), overrides in it.
    `note`: what a user should know of its start weights."""

    encoder: DualEncoder
    preprocess_train: Callable[[Image.Image], Tensor]
    preprocess_eval: Callable[[Image.Image], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor]
    config: dict[str, Any]
    note: str | None = None


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
    bias = logit_bias_init if logit_bias_init is not None else 0.0 if has_bias(source) else None
    pictures = {"mean": image_mean, "std": image_std, "interpolation": image_interpolation,
                "resize_mode": image_resize_mode}  # fmt: skip
    forced = {"force_image_size": image_size, "force_context_length": context_length,
              "force_patch_dropout": patch_dropout, "force_preprocess_cfg": pictures}  # fmt: skip
    if quick := tag_wants_quick_gelu(name, source, config):
        forced["force_quick_gelu"] = True
    clip = _create(name, source, pretrained, forced | ({} if bias is None else {"init_logit_bias": bias}))
    _override(config["model_cfg"], clip, image_size, context_length)
    preprocess, train, evaluation = _preprocessing(name, clip, image_interpolation)
    config["preprocess_cfg"] = dataclasses.asdict(preprocess)
    length = config["model_cfg"]["text_cfg"].get("context_length", 77)
    tokenize = _tokenizer(name, length, config["model_cfg"]["text_cfg"])
    if source is not None and is_hf_folder(Path(source)):
        load_hf_weights(clip, Path(source), config, tokenize)
    note = f"model.pretrained={pretrained}: trained with QuickGELU, which {name} is built with, then" if quick else None
    if source is not None and pretrained is not None:
        given = {"image_size": image_size, "context_length": context_length}
        given |= {f"image_{key}": value for key, value in pictures.items()}
        meant = {key for key, value in given.items() if value is not None}
        note = check_facts(name, pretrained, Path(source), config, tokenize, _tokenizer_at, meant) or note
    if pretrained_image is not None:
        load_image_weights(clip.visual, pretrained_image)
    lock_towers(name, clip, lock_image, lock_image_unlocked_groups, lock_text, lock_text_unlocked_layers)
    if grad_checkpointing:
        clip.set_grad_checkpointing()
    if logit_scale_init is not None:
        clip.logit_scale.data.fill_(math.log(logit_scale_init))
    if bias is not None:
        if logit_bias_init is not None and not bool(clip.logit_bias.any()):  # open_clip puts 0 where weights have none
            clip.logit_bias.data.fill_(logit_bias_init)
        config["model_cfg"]["init_logit_bias"] = bias
    return Built(DualEncoder(clip), train, evaluation, tokenize, config, note)


def _preprocessing(name: str, clip: Any, interpolation: str | None) -> tuple[PreprocessCfg, Any, Any]:
    """What pictures go through before this model, as open_clip describes it, in training and in evaluation.
    interpolation: of training's crop, which open_clip makes bicubic whatever the model's is."""
    try:
        config = PreprocessCfg(**clip.visual.preprocess_cfg)
        train: Any = image_transform_v2(config, is_train=True)
        if interpolation is not None:
            train.transforms[0].interpolation = InterpolationMode(interpolation)
        return config, train, eval_preprocessing(config)
    except BUILD_ERRORS as error:
        raise UserError(
            f"model.name={name!r}: its preprocess_cfg {clip.visual.preprocess_cfg!r} is none that open_clip knows "
            f"({type(error).__name__}: {first_line(error)[:200]})"
        ) from None


def eval_preprocessing(config: PreprocessCfg) -> Any:
    """open_clip's of evaluation, but that transparent pictures get a background, where open_clip's drops it."""
    evaluation: Any = image_transform_v2(config, is_train=False)
    return Compose([on_background, *evaluation.transforms])


def _create(name: str, source: str | None, pretrained: str | None, settings: dict[str, Any]) -> Any:
    """open_clip's model, with the weights of `source` where open_clip can read them, or which are in pieces."""
    hf_folder = source is not None and is_hf_folder(Path(source))
    local = name.startswith("local-dir:")
    weights = weights_in(Path(name.removeprefix("local-dir:"))) if local and source is None else source
    cut = weights is not None and not hf_folder and Path(weights).is_dir()
    # open_clip would not look at `pretrained` with local-dir:, and knows neither transformers' names nor pieces.
    own_load = hf_folder or cut or (source is not None and local)
    if cut:
        settings = settings | {"pretrained_text": False}  # no weights of another text tower, to be fetched, before
    disabled = logging.root.manager.disable
    if own_load:
        logging.disable(logging.WARNING)  # open_clip says that such a model stays random
    try:
        clip: Any = open_clip.create_model(
            name, pretrained=None if own_load else source, load_weights=not own_load, **settings
        )
        if cut:
            load_pieces(clip, Path(cast(str, weights)))
        elif source is not None and own_load and not hf_folder:
            open_clip.load_checkpoint(clip, source)
    except BUILD_ERRORS as error:
        detail = (" ".join(str(error).split()) or type(error).__name__)[:300]
        if isinstance(error, UnpicklingError):  # torch's own words advise to run it all the same
            detail = "these weights are damaged, or a pickle that could run code; take a .safetensors file"
        if isinstance(error, SafetensorError):
            detail += " (the file of weights is damaged or cut short: copy it again, or take another checkpoint)"
        config = Path(source or "").parent / "open_clip_config.json"
        if source is not None and config.is_file() and (names := architectures(read_config(config))):
            detail += f"; the weights are of model.name={' or '.join(names)}"
        raise UserError(f"model.name={name!r}, model.pretrained={pretrained!r}: {detail}") from None
    finally:
        logging.disable(disabled)
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


def tokenizer_of(name: str, context_length: int | None = None) -> Callable[[Sequence[str]], Tensor]:
    """The tokenizer of the architecture `name`, without its weights: texts -> [n, L]. Raises UserError."""
    text_cfg = model_config(name)["model_cfg"]["text_cfg"]
    if text_cfg.get("hf_model_name"):
        _never_ask()
    return _tokenizer(name, context_length or text_cfg.get("context_length", 77), text_cfg)


def model_config(name: str) -> dict[str, Any]:
    """The architecture `name` in open_clip's format; UserError with the nearest names where there is none."""
    if name.startswith("local-dir:"):
        check_architecture(name)
        path = Path(name.removeprefix("local-dir:")) / MODEL_CONFIG
        if (content := read_config(path)) is None:
            raise UserError(f"model.name={name!r}: {path} is damaged, or no config of an open_clip model")
        check_sizes(content, path)
        return content
    config = open_clip.get_model_config(name)
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise UserError(f"model.name={name!r} is no architecture of open_clip or vlcl{hint} All names: vlcl models")
    return {"model_cfg": copy.deepcopy(config)}


def _override(model_cfg: dict[str, Any], clip: Any, image_size: int | None, context_length: int | None) -> None:
    """Write into the saved config what open_clip was told by argument, so that the config alone rebuilds the model."""
    if image_size is not None:
        model_cfg["vision_cfg"]["image_size"] = image_size
    if context_length is not None:
        model_cfg["text_cfg"]["context_length"] = context_length
    if any(isinstance(module, QuickGELU) for module in clip.modules()):
        model_cfg["quick_gelu"] = True  # some pretrained tags switch it on


def _tokenizer_at(folder: Path, config: Mapping[str, Any]) -> Any:
    text = config["model_cfg"]["text_cfg"]
    return _tokenizer(f"local-dir:{folder}", text.get("context_length", 77), text)
