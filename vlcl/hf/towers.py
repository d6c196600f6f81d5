"""The towers of transformers' dual encoders as configs: what an open_clip tower must be to be one of them.

A setting that the class has no place for raises NoForm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vlcl.hf.keys import Link, clip_vision_links, siglip_vision_links

Tokenize = Callable[[Sequence[str]], Tensor]  # texts -> tokens_BL, one of open_clip's tokenizers
Tower = tuple[dict[str, Any], list[Link], list[tuple[str, str]]]  # config, links, modules that compute the same

# What a form's config says, or what only training uses; all else must be at open_clip's default.
VISION_KEYS = {
    "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs", "pos_embed_type",
    "patch_dropout", "attn_pooler_queries", "attn_pooler_heads",
}  # fmt: skip
TEXT_KEYS = {
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "eos_id", "pad_id",
    "hf_tokenizer_name", "tokenizer_kwargs", "hf_model_pretrained", "final_ln_after_pool", "output_tokens",
}  # fmt: skip


class NoForm(Exception):
    """transformers has no class for this model; the message says what stands in the way."""


def clip_vision(model_cfg: Mapping[str, Any], act: str) -> Tower:
    cfg = CLIPVisionCfg(**model_cfg["vision_cfg"])
    if not isinstance(cfg.layers, int):
        raise NoForm("ResNets of CLIP have no class there")
    only_defaults("vision_cfg", cfg, VISION_KEYS)
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": cfg.width,
        "intermediate_size": int(cfg.width * cfg.mlp_ratio),
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.width // cfg.head_width,
        "image_size": _side("image_size", cfg.image_size),
        "patch_size": _side("patch_size", cfg.patch_size),
        "hidden_act": act,
        "layer_norm_eps": _epsilon("vision_cfg", cfg),
    }
    stages = [
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        *((f"visual.transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}") for i in range(cfg.layers)),
    ]
    return config, clip_vision_links("visual.", "vision_model.", cfg.layers), stages


def siglip_vision(clip: nn.Module, model_cfg: Mapping[str, Any], form: str) -> Tower:
    """From timm's modules themselves: a name of timm's says too little. `form`: transformers' class, for messages."""
    name = model_cfg["vision_cfg"]["timm_model_name"]
    trunk = clip.get_submodule("visual.trunk")
    if not isinstance(trunk, VisionTransformer) or not isinstance(trunk.attn_pool, AttentionPoolLatent):
        raise NoForm(f"timm's {name} has no class there; {form} is a ViT with attention pooling (global_pool=map)")
    if any(True for _ in clip.get_submodule("visual.head").children()) or not isinstance(trunk.head, nn.Identity):
        raise NoForm(f"{form} has no projection after its image tower (vision_cfg.timm_proj must be none)")
    config = _siglip_config(name, trunk, trunk.blocks[0], trunk.attn_pool, form)
    layers = config["num_hidden_layers"]
    stages = [(f"visual.trunk.blocks.{i}", f"vision_model.encoder.layers.{i}") for i in range(layers)]
    stages += [("visual.trunk.norm", "vision_model.post_layernorm")]
    return config, siglip_vision_links("vision_model.", layers), stages


def _siglip_config(name: str, trunk: Any, block: Any, head: Any, form: str) -> dict[str, Any]:
    """timm's settings under transformers' names, where its blocks and its pooling head are SigLIP's."""
    plain = (
        (type(block), type(block.attn)) == (Block, Attention)
        and isinstance(head.q, nn.Linear)
        and all(isinstance(x, nn.Identity) for x in (block.ls1, block.attn.q_norm, trunk.norm_pre, head.q_norm))
        and (trunk.num_prefix_tokens, head.latent_len, head.num_heads) == (0, 1, block.attn.num_heads)
        and head.pos_embed is None
    )
    acts = {_gelu_name(block.mlp.act), _gelu_name(getattr(head.mlp, "act", None))}
    if not plain or len(acts) > 1 or None in acts:
        raise NoForm(f"timm's {name} differs from SigLIP's image tower in its attention, norms or activation")
    if trunk.norm.eps != block.norm1.eps or head.norm.eps != block.norm1.eps:
        raise NoForm(f"the layer norms of timm's {name} differ in epsilon, those of {form} share one")
    if head.mlp.fc1.out_features != block.mlp.fc1.out_features:
        raise NoForm(f"the pooling head of timm's {name} has an MLP of another width than its blocks")
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": _side("image_size", trunk.patch_embed.img_size),
        "patch_size": _side("patch_size", trunk.patch_embed.patch_size),
        "hidden_act": acts.pop(),
        "layer_norm_eps": block.norm1.eps,
    }


def text_config(text: CLIPTextCfg, act: str) -> dict[str, Any]:
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": int(text.width * text.mlp_ratio),
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.context_length,
        "hidden_act": act,
        "layer_norm_eps": _epsilon("text_cfg", text),
    }


def text_stages(prefix: str, text: CLIPTextCfg) -> list[tuple[str, str]]:
    blocks = ((f"{prefix}transformer.resblocks.{i}", f"text_model.encoder.layers.{i}") for i in range(text.layers))
    return [*blocks, (f"{prefix}ln_final", "text_model.final_layer_norm")]


def only_defaults(section: str, cfg: Any, known: set[str]) -> None:
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name not in known and not field.name.startswith("hf_") and value != field.default:
            raise NoForm(f"{section}.{field.name}={value!r} has no place in transformers' classes")


def _epsilon(section: str, cfg: Any) -> float:
    settings = dict(cfg.norm_kwargs or {})
    epsilon = settings.pop("eps", 1e-5)
    if settings:
        raise NoForm(f"{section}.norm_kwargs={cfg.norm_kwargs} has no place in transformers' classes")
    return epsilon


def _side(name: str, value: Any) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) > 1:
        raise NoForm(f"vision_cfg.{name}={value} is no square")
    return sides.pop()


def activation(model_cfg: Mapping[str, Any]) -> str:
    return "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"


def _gelu_name(act: nn.Module | None) -> str | None:
    """transformers' name of an activation of timm; None for what is no GELU."""
    if type(act).__name__ == "GELUTanh" or (isinstance(act, nn.GELU) and act.approximate == "tanh"):
        return "gelu_pytorch_tanh"
    return "gelu" if isinstance(act, nn.GELU) or type(act).__name__ == "GELU" else None
