"""From settings, or from what a checkpoint says, to a model of `model.kind: views`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from open_clip.model import _build_vision_tower
from open_clip.transform import PreprocessCfg
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vlcl.errors import UserError, first_line
from vlcl.image_weights import load_image_weights
from vlcl.model import BUILD_ERRORS, Built, eval_preprocessing, model_config
from vlcl.views.towers import ViewEncoder, ViewTowers, mlp
from vlcl.views.vit import fix_positions, freeze_patches, init_vit, is_vit

TIMM = "timm/"


def build_views(
    name: str, *, towers: dict[str, Any], image_size: int | None = None, image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None, image_interpolation: str | None = None,
    image_resize_mode: str | None = None, pretrained_image: str | None = None, grad_checkpointing: bool = False,
    logit_bias_init: float | None = None,
) -> Built:  # fmt: skip
    """`name`: an open_clip architecture, whose image tower it is, without its linear head; or `timm/NAME`. towers: the
    settings of the section `views` that say how projector and predictor are built (its OF_TOWERS).

    Pictures go through what MoCo-v3 has, unless `image_*` says otherwise: ImageNet's mean and standard deviation,
    bilinear. UserError for a name that does not exist, and for weights that do not fit.
    """
    vision = {"timm": name.removeprefix(TIMM)} if name.startswith(TIMM) else _open_clip_config(name)
    visual = _visual(name, vision, image_size)
    size = _size(visual, vision, image_size)
    pictures = PreprocessCfg(
        size=(size, size),
        mean=tuple(image_mean or IMAGENET_DEFAULT_MEAN), std=tuple(image_std or IMAGENET_DEFAULT_STD),
        interpolation=image_interpolation or "bilinear", resize_mode=image_resize_mode or "shortest",
    )  # fmt: skip
    config = {
        "views": {"name": name, "vision": vision, "image_size": image_size, "towers": towers,
                  "logit_bias_init": logit_bias_init},
        "model_cfg": {"embed_dim": towers["projector_width"]},
        "preprocess_cfg": dataclasses.asdict(pictures),
    }  # fmt: skip
    if is_vit(visual):
        init_vit(visual)
    if pretrained_image is not None:
        load_image_weights(visual, pretrained_image)
    built = _assemble(visual, config)
    if grad_checkpointing:
        built.encoder.clip.set_grad_checkpointing()
    return built


def rebuild_views(config: dict[str, Any]) -> Built:
    """The model that a checkpoint's config tells of; its weights are to be loaded."""
    views = config["views"]
    return _assemble(_visual(views["name"], views["vision"], views["image_size"]), config)


def load_views(folder: Path) -> Built | None:
    """The model of `model.kind: views` in a checkpoint; None where it is of another kind. UserError where it is
    damaged."""
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # whoever builds the other kind has words for it
    if not isinstance(config, dict) or "views" not in config:
        return None
    try:
        built = rebuild_views(config)
        built.encoder.clip.load_state_dict(load_file(folder / "model.safetensors"))
        return built
    except BUILD_ERRORS as error:
        raise UserError(f"{folder} cannot be read: {type(error).__name__}: {first_line(error)[:300]}") from None


def _assemble(visual: nn.Module, config: dict[str, Any]) -> Built:
    views, pictures = config["views"], PreprocessCfg(**config["preprocess_cfg"])
    towers = views["towers"]
    if is_vit(visual):
        try:
            if towers["fixed_positions"]:
                fix_positions(visual)
        except ValueError as error:
            raise UserError(f"model.name={views['name']!r}: {error}; take views.fixed_positions=false") from None
        if towers["freeze_patches"]:
            freeze_patches(visual)
    width, dim = width_of(visual, pictures), towers["projector_width"]
    projector = mlp(towers["projector_layers"], width, towers["projector_hidden"], dim, last_norm=True)
    predictor = mlp(towers["predictor_layers"], dim, towers["predictor_hidden"], dim, towers["predictor_norm"])
    visual.preprocess_cfg = config["preprocess_cfg"]  # pyright: ignore[reportArgumentType] (as open_clip keeps it)
    clip = ViewTowers(visual, projector, predictor, towers["temperature"])
    if views["logit_bias_init"] is not None:
        clip.logit_bias = nn.Parameter(torch.tensor(float(views["logit_bias_init"])))
    prepare = eval_preprocessing(pictures)
    return Built(ViewEncoder(clip), prepare, prepare, _no_text, config)


def _no_text(texts: Sequence[str]) -> Tensor:
    raise UserError(
        "this model was trained on pictures alone (model.kind=views): it has no text tower, and no tokenizer. Use "
        "`vlcl eval linear` or few-shot `vlcl eval elevater`; or start a CLIP training from it: "
        "model.pretrained_image=RUN"
    )


def _open_clip_config(name: str) -> dict[str, Any]:
    found = model_config(name)["model_cfg"]
    return {
        "vision_cfg": found["vision_cfg"],
        "embed_dim": found["embed_dim"],
        "quick_gelu": found.get("quick_gelu", False),
    }


def _visual(name: str, vision: dict[str, Any], image_size: int | None) -> Any:
    """A tower that gives [B, W] features: of timm without a classifier, of open_clip without its head."""
    try:
        if "timm" in vision:
            return _timm(vision["timm"], image_size)
        cfg = vision["vision_cfg"] | ({} if image_size is None else {"image_size": image_size})
        visual: Any = _build_vision_tower(vision["embed_dim"], cfg, vision["quick_gelu"])
    except BUILD_ERRORS as error:
        hint = " (timm.list_models() has all names)" if "timm" in vision else ""
        raise UserError(f"model.name={name!r}: {type(error).__name__}: {first_line(error)[:300]}{hint}") from None
    if isinstance(getattr(visual, "proj", None), nn.Parameter):
        visual.proj = None
    elif hasattr(visual, "trunk"):
        visual.head = nn.Identity()
    return visual


def _timm(name: str, image_size: int | None) -> nn.Module:
    if image_size is None:
        return timm.create_model(name, num_classes=0)
    try:
        return timm.create_model(name, num_classes=0, img_size=image_size)
    except TypeError:  # convolutions take any size
        return timm.create_model(name, num_classes=0)


def _size(visual: Any, vision: dict[str, Any], image_size: int | None) -> int:
    if image_size is not None:
        return image_size
    if "timm" in vision:
        return visual.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    return vision["vision_cfg"]["image_size"]


@torch.no_grad()
def width_of(visual: nn.Module, pictures: PreprocessCfg) -> int:
    """W, the width of a tower's features."""
    training = visual.training
    found = visual.eval()(torch.zeros(1, 3, *pictures.size))  # pyright: ignore[reportGeneralTypeIssues]
    visual.train(training)
    if found.ndim != 2:
        raise UserError(f"the tower gives {list(found.shape)} for a picture, where [1, W] is needed: it pools nothing")
    return found.shape[1]
