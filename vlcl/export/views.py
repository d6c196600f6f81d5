"""Export of an image tower that was trained alone (`model.kind: views`):

    OUT/config.json, model.safetensors     timm (`local-dir:OUT`), and transformers' AutoModel, AutoImageProcessor
    OUT/vit/                               transformers' ViTModel and image processor, for a plain ViT
    OUT/README.md                          the model card

Projector, predictor and momentum copy stay behind. Each folder is loaded as its library does, and its features are
compared with the tower's own, before OUT gets its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlcl import __version__
from vlcl.errors import UserError
from vlcl.export.check import TOLERANCE, Findings
from vlcl.export.run_facts import RunFacts
from vlcl.export.view_card import view_card
from vlcl.hf.processor import image_processor, write_json
from vlcl.model import Built, unit
from vlcl.views.build import TIMM, width_of

MARK = "exported_by"
FILES = frozenset({
    "config.json", "model.safetensors", "README.md", "vit/config.json", "vit/model.safetensors",
    "vit/preprocessor_config.json",
})  # fmt: skip


@dataclass(frozen=True)
class TimmForm:
    """What timm builds the tower from, and its weights there."""

    architecture: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]


def write_views(folder: Path, built: Built, facts: RunFacts | None, name: str, license: str | None, half: bool,
                images: Sequence[Image.Image], origin: str, say: Callable[[str], None]) -> Findings:  # fmt: skip
    """All files in `folder`, checked. UserError where timm has no class for the tower, or features differ."""
    visual, pictures = built.encoder.clip.visual.float().eval(), PreprocessCfg(**built.config["preprocess_cfg"])
    if pictures.resize_mode == "longest":
        raise UserError("model.image_resize_mode=longest: timm and transformers have no such preprocessing")
    form, found = timm_form(visual, built.config), Findings(origin, len(images), 0)
    pixels = torch.stack([built.preprocess_eval(image) for image in images])
    with torch.no_grad():
        expected_BD = visual(pixels)
    _write_timm(folder, form, pictures, width_of(visual, pictures), half)
    plain = isinstance(visual, VisionTransformer) and is_plain(visual)
    say(f"format   timm, transformers (TimmWrapperModel{', ViTModel' * plain})")
    say(f"check    {len(images)} pictures ({origin})")
    tolerance = 1e-2 if half else TOLERANCE
    _check_timm(folder, pixels, expected_BD, images, built, found, tolerance)
    _check_transformers(folder, pixels, expected_BD, found, tolerance)
    if plain:
        (folder / "vit").mkdir()
        _write_vit(folder / "vit", visual, pictures, half)
        _check_vit(folder / "vit", pixels, expected_BD, images, found, tolerance)
    text = view_card(name, built.config, form.architecture, expected_BD.shape[1], plain, found, facts, license)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return found


def timm_form(visual: Any, config: dict[str, Any]) -> TimmForm:
    """UserError where timm has none."""
    views = config["views"]
    if views["name"].startswith(TIMM):
        sized = {"img_size": views["image_size"]} if views["image_size"] and hasattr(visual, "patch_embed") else {}
        return TimmForm(visual.pretrained_cfg["architecture"], sized, visual.state_dict())
    cfg = views["vision"]["vision_cfg"]
    if not hasattr(visual, "transformer") or not hasattr(visual, "class_embedding"):
        raise UserError(
            f"model.name={views['name']!r}: an image tower alone is exported where it is timm's or a plain ViT of "
            f"open_clip's, this is a {type(visual).__name__}. A CLIP training takes it from the run: "
            "model.pretrained_image=RUN"
        )
    blocks = visual.transformer.resblocks
    quick = any(isinstance(module, QuickGELU) for module in visual.modules())
    ratio = blocks[0].mlp.c_fc.out_features / visual.conv1.out_channels
    arguments = {
        "img_size": config["preprocess_cfg"]["size"][0], "patch_size": visual.conv1.kernel_size[0],
        "embed_dim": visual.conv1.out_channels, "depth": len(blocks), "num_heads": blocks[0].attn.num_heads,
        "mlp_ratio": ratio, "pre_norm": isinstance(visual.ln_pre, nn.LayerNorm),
    }  # fmt: skip
    unusual = [key for key in ("attentional_pool", "ls_init_value", "final_ln_after_pool") if cfg.get(key)]
    if unusual or cfg.get("pool_type", "tok") != "tok":
        raise UserError(f"model.name={views['name']!r}: timm has no form for its {', '.join(unusual) or 'pooling'}")
    name = "vit_base_patch16_clip_quickgelu_224" if quick else "vit_base_patch16_clip_224"
    return TimmForm(name, arguments, _timm_weights(visual))


def _timm_weights(visual: Any) -> dict[str, Tensor]:
    """Of open_clip's ViT, by timm's names."""
    renamed = {
        "class_embedding": "cls_token", "positional_embedding": "pos_embed", "conv1.weight": "patch_embed.proj.weight",
        "ln_pre.": "norm_pre.", "ln_post.": "norm.", "transformer.resblocks.": "blocks.", "attn.in_proj_": "attn.qkv.",
        "attn.out_proj.": "attn.proj.", "ln_1.": "norm1.", "ln_2.": "norm2.", "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    }  # fmt: skip
    found = {}
    for name, x in visual.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        found[name] = x.reshape(1, -1, x.shape[-1]) if name in ("cls_token", "pos_embed") else x
    if not isinstance(visual.conv1.bias, Tensor):
        width = visual.conv1.out_channels
        if not isinstance(visual.ln_pre, nn.LayerNorm):  # timm's without that norm has a bias there
            found["patch_embed.proj.bias"] = torch.zeros(width)
    return found


def _save(weights: dict[str, Tensor], path: Path, half: bool) -> None:
    halved = {n: x.half() if half and x.is_floating_point() else x for n, x in weights.items()}
    save_file({n: x.detach().cpu().contiguous() for n, x in halved.items()}, path, {"format": "pt"})


def _write_timm(folder: Path, form: TimmForm, pictures: PreprocessCfg, width: int, half: bool) -> None:
    _save(form.weights, folder / "model.safetensors", half)
    side = pictures.size if isinstance(pictures.size, int) else pictures.size[0]
    config = {
        "architecture": form.architecture, "num_classes": 0, "num_features": width, "model_args": form.arguments,
        MARK: f"vlcl {__version__}",
        "pretrained_cfg": {
            "num_classes": 0, "input_size": [3, side, side], "mean": list(pictures.mean), "std": list(pictures.std),
            "interpolation": pictures.interpolation, "crop_pct": 1.0, "custom_load": False,
            "crop_mode": "squash" if pictures.resize_mode == "squash" else "center",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _compare(library: str, got_BD: Tensor, expected_BD: Tensor, found: Findings, tolerance: float) -> None:
    error = float((unit(got_BD) - unit(expected_BD)).abs().max())
    if not error <= tolerance:
        raise UserError(f"{library} computes other features from the exported folder: they differ by {error:.1e}")
    found.errors[f"{library} image"] = error


@torch.no_grad()
def _check_timm(
    folder: Path, pixels: Tensor, expected_BD: Tensor, images: Sequence[Image.Image], built: Built, found: Findings,
    tolerance: float,
) -> None:  # fmt: skip
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _compare("timm", model(pixels), expected_BD, found, tolerance)
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    difference = max(float((transform(image) - built.preprocess_eval(image)).abs().max()) for image in images)
    if difference > 1e-5:
        raise UserError(
            f"timm's preprocessing of the exported folder makes other pixels: they differ by {difference:.1e}"
        )


@torch.no_grad()
def _check_transformers(folder: Path, pixels: Tensor, expected_BD: Tensor, found: Findings, tolerance: float) -> None:
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
    _compare("TimmWrapperModel", model(pixel_values=pixels).pooler_output, expected_BD, found, tolerance)


def is_plain(visual: VisionTransformer) -> bool:
    """Whether it is the ViT that transformers' ViTModel is: a class token, norms before each part and at the end."""
    block: Any = visual.blocks[0]
    plain = isinstance(visual.norm_pre, nn.Identity) and isinstance(visual.fc_norm, nn.Identity)
    plain = plain and visual.global_pool == "token" and visual.cls_token is not None and visual.num_prefix_tokens == 1
    plain = plain and isinstance(block.ls1, nn.Identity) and isinstance(block.attn.q_norm, nn.Identity)
    return plain and isinstance(block.mlp.act, nn.GELU) and visual.pos_embed is not None and not visual.no_embed_class


def _write_vit(folder: Path, visual: VisionTransformer, pictures: PreprocessCfg, half: bool) -> None:
    """In the names that all versions of transformers read."""
    block: Any = visual.blocks[0]
    proj: Any = visual.patch_embed.proj
    side = pictures.size if isinstance(pictures.size, int) else pictures.size[0]
    config = {
        "architectures": ["ViTModel"], "model_type": "vit", "hidden_size": visual.embed_dim, "image_size": side,
        "patch_size": proj.kernel_size[0], "num_hidden_layers": len(visual.blocks),
        "num_attention_heads": block.attn.num_heads, "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu", "layer_norm_eps": block.norm1.eps, "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_channels": 3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_json(folder / "preprocessor_config.json", image_processor(asdict(pictures), "CLIPImageProcessor"))
    _save(_vit_weights(visual.state_dict()), folder / "model.safetensors", half)


def _vit_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.", "norm.": "layernorm.",
    }  # fmt: skip
    parts = {
        "norm1.": "layernorm_before.", "norm2.": "layernorm_after.", "attn.proj.": "attention.output.dense.",
        "mlp.fc1.": "intermediate.dense.", "mlp.fc2.": "output.dense.",
    }  # fmt: skip
    found = {}
    for name, x in weights.items():
        if not name.startswith("blocks."):
            old = next(old for old in names if name.startswith(old))
            found[name.replace(old, names[old], 1)] = x
            continue
        _, number, rest = name.split(".", 2)
        before = f"encoder.layer.{number}."
        if rest.startswith("attn.qkv."):
            for part, third in zip(("query", "key", "value"), x.chunk(3)):
                found[f"{before}attention.attention.{part}.{rest.removeprefix('attn.qkv.')}"] = third
            continue
        old = next(old for old in parts if rest.startswith(old))
        found[before + rest.replace(old, parts[old], 1)] = x
    return found


@torch.no_grad()
def _check_vit(
    folder: Path, pixels: Tensor, expected_BD: Tensor, images: Sequence[Image.Image], found: Findings, tolerance: float
) -> None:
    from transformers import AutoImageProcessor, ViTModel

    model: Any = ViTModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).float().eval()
    _compare("ViTModel", model(pixel_values=pixels).last_hidden_state[:, 0], expected_BD, found, tolerance)
    processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    own = processor(images=list(images), return_tensors="pt")["pixel_values"]
    got_BD = model(pixel_values=own).last_hidden_state[:, 0]
    found.pictures = float((F.normalize(got_BD, dim=1) - F.normalize(expected_BD, dim=1)).abs().max())
