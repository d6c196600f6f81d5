"""Which class of transformers holds an open_clip model exactly, with its config and the links between the weights.

| open_clip                                                      | transformers                 |
|----------------------------------------------------------------|------------------------------|
| ViT + text transformer, pooled at the end-of-text token        | CLIPModel                    |
| the same with that token's id in the config (pool_type=eos)    | MetaClip2Model               |
| timm's ViT with MAP head + text transformer, pooled at the end | SiglipModel                  |
| ViT or SigLIP's ViT + Hugging Face text tower                  | VisionTextDualEncoderModel   |

A setting that the class has no place for is named in `NoForm`: the model then exists in open_clip's format only.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from vlcl.hf.keys import Link, convert, moved, named, projection, text_links
from vlcl.hf.towers import (
    TEXT_KEYS,
    NoForm,
    Tokenize,
    activation,
    clip_vision,
    only_defaults,
    siglip_vision,
    text_config,
    text_stages,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_NESTED = "vision_model."


@dataclass(frozen=True)
class HFClass:
    """A class of transformers for dual encoders: what the files for it, their check and their users need to know."""

    name: str
    model_type: str
    """Its name in config.json."""
    processor: str
    """The class of its tokenizer and image processor together."""
    token_inputs: tuple[str, ...] | None
    """What its text tower takes of a tokenizer's output; None where the tokenizer itself knows."""
    squashing_processor: str = "CLIPImageProcessor"
    """The class that resizes pictures to a square, whatever their shape; CLIPImageProcessor does all else."""
    has_logit_bias: bool = False
    reads_last_token: bool = False
    """Whether the text feature is taken at the last position, so that texts must be padded to the model's length."""
    wants_padding_mask: bool = False
    """Whether it must be told what is padding, which open_clip's tower finds out itself."""
    nests_image_tower: bool = False
    """Whether transformers 4 has the image tower one name deeper in files than in memory."""
    has_pipeline: bool = True
    """Whether the pipeline of zero-shot image classification knows it."""
    pipeline_length: int | None = None
    """Tokens that the pipeline pads texts to, whatever the model wants; None: to the longest one."""

    def fits_pipeline(self, length: int) -> bool:
        """Whether the pipeline gives a model with texts of `length` tokens what it wants."""
        return self.has_pipeline and self.pipeline_length in (None, length)


CLIP = HFClass("CLIPModel", "clip", "CLIPProcessor", ("input_ids", "attention_mask"))
METACLIP = HFClass("MetaClip2Model", "metaclip_2", "CLIPProcessor", ("input_ids", "attention_mask"))
SIGLIP = HFClass(
    "SiglipModel", "siglip", "SiglipProcessor", ("input_ids",),  # it is trained with its padding seen
    squashing_processor="SiglipImageProcessor", has_logit_bias=True, reads_last_token=True, pipeline_length=64,
)  # fmt: skip
DUAL = HFClass(
    "VisionTextDualEncoderModel", "vision-text-dual-encoder", "VisionTextDualEncoderProcessor", None,
    wants_padding_mask=True, nests_image_tower=True, has_pipeline=False,
)  # fmt: skip
HF_CLASSES = (CLIP, METACLIP, SIGLIP, DUAL)


@dataclass(frozen=True)
class Form:
    """A model in the shape of `hf_class`. `config` is that of the class; `filled` holds tensors that it needs and
    open_clip lacks."""

    hf_class: HFClass
    config: dict[str, Any]
    links: list[Link]
    stages: dict[str, list[tuple[str, str]]]
    """Tower -> its modules that compute the same, in order: open_clip's name, transformers'."""
    filled: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    pad_row: bool = False
    """Whether the vocabulary has one more token, a copy of token 0, for padding."""

    def weights(self, clip: nn.Module) -> dict[str, Tensor]:
        """The weights of `clip` under transformers' names, shared with it where the layout allows."""
        source = {name: x.detach() for name, x in clip.state_dict().items()} | self.filled
        if self.pad_row:
            name = next(name for name in source if name.endswith("token_embedding.weight"))
            source[name] = torch.cat([source[name], source[name][:1]])
        return {self.stored(name): x for name, x in convert(self.links, source, self.shapes()).items()}

    def stored(self, name: str) -> str:
        """The name in the file of what is called `name` in memory: transformers 4 nests the tower once more."""
        if self.hf_class.nests_image_tower and name.startswith(_NESTED):
            return _NESTED + name
        return name

    def shapes(self) -> dict[str, torch.Size]:
        return {
            name.replace(_NESTED + _NESTED, _NESTED): x.shape for name, x in self.empty_model().state_dict().items()
        }

    def empty_model(self) -> PreTrainedModel:
        """transformers' model without memory for its weights."""
        import transformers

        with torch.device("meta"):
            return getattr(transformers, self.hf_class.name)(self.hf_config())

    def hf_config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        config = AutoConfig.for_model(**copy.deepcopy(self.config))  # version 4 empties what it gets
        config.architectures = [self.hf_class.name]
        return config


def find_form(clip: nn.Module, config: Mapping[str, Any], tokenize: Tokenize) -> Form:
    """The form of `clip`. `config`: open_clip's format (model_cfg, preprocess_cfg). Raises NoForm."""
    model_cfg = config["model_cfg"]
    if "multimodal_cfg" in model_cfg:
        raise NoForm("CoCa's text decoder has no class there")
    if config["preprocess_cfg"].get("resize_mode") == "longest":
        raise NoForm("no image processor there pads pictures (resize_mode=longest)")
    text = CLIPTextCfg(**model_cfg["text_cfg"])
    if text.tokenizer_mode:
        raise NoForm(f"no tokenizer there does text_cfg.tokenizer_mode={text.tokenizer_mode}")
    if more := set(text.tokenizer_kwargs or {}) - {"clean"}:
        raise NoForm(f"no tokenizer there does text_cfg.tokenizer_kwargs.{sorted(more)[0]}")
    if text.hf_model_name:
        return _dual_form(clip, model_cfg, text)
    if CLIPVisionCfg(**model_cfg["vision_cfg"]).timm_model_name:
        return _siglip_form(clip, model_cfg, text, tokenize)
    return _clip_form(clip, model_cfg, text, tokenize)


def _clip_form(clip: nn.Module, model_cfg: Mapping[str, Any], text: CLIPTextCfg, tokenize: Tokenize) -> Form:
    act, dim = activation(model_cfg), model_cfg["embed_dim"]
    vision, links, stages = clip_vision(model_cfg, act)
    only_defaults("text_cfg", text, TEXT_KEYS | {"pool_type"})
    if text.pool_type not in ("argmax", "eos"):
        raise NoForm(
            f"{CLIP.name} takes the text feature at the end-of-text token, not text_cfg.pool_type={text.pool_type}"
        )
    # 2 is transformers' sign for "at the largest id", which is what open_clip's argmax does with any vocabulary.
    bos, eos = (tokenize.sot_token_id, tokenize.eot_token_id) if isinstance(tokenize, SimpleTokenizer) else (None, 2)
    hf_class = METACLIP if text.pool_type == "eos" else CLIP
    prefix, kind = _text_prefix(clip), hf_class.model_type
    return Form(
        hf_class,
        {
            "model_type": kind,
            "projection_dim": dim,
            "logit_scale_init_value": float(clip.get_parameter("logit_scale").detach()),
            "vision_config": vision | {"model_type": f"{kind}_vision_model", "projection_dim": dim},
            "text_config": text_config(text, act) | {
                "model_type": f"{kind}_text_model", "projection_dim": dim, "bos_token_id": bos, "pad_token_id": None,
                "eos_token_id": text.eos_id if text.pool_type == "eos" else eos,
            },
        },
        [
            *links, *text_links(prefix, text.layers), *named(["logit_scale"]),
            projection("visual.proj", "visual_projection"),
            projection(f"{prefix}text_projection", "text_projection"),
        ],
        {"image": stages, "text": text_stages(prefix, text)},
    )  # fmt: skip


def _siglip_form(clip: nn.Module, model_cfg: Mapping[str, Any], text: CLIPTextCfg, tokenize: Tokenize) -> Form:
    vision, links, stages = siglip_vision(clip, model_cfg, SIGLIP.name)
    only_defaults("text_cfg", text, TEXT_KEYS | {"pool_type", "no_causal_mask", "proj_bias", "proj_type", "act_kwargs"})
    if text.pool_type != "last" or not text.no_causal_mask:
        raise NoForm(f"{SIGLIP.name} takes the text feature at the last position, without a causal mask")
    act = "gelu_pytorch_tanh" if (text.act_kwargs or {}).get("approximate") == "tanh" else activation(model_cfg)
    dim, pad_row = model_cfg["embed_dim"], isinstance(tokenize, SimpleTokenizer)
    filled, head = _siglip_head(text, dim)
    if getattr(clip, "logit_bias", None) is None:
        filled["logit_bias"] = torch.zeros(1)
    return Form(
        SIGLIP,
        {
            "model_type": SIGLIP.model_type,
            "vision_config": vision,
            "text_config": text_config(text, act) | {
                "model_type": "siglip_text_model", "projection_size": dim,
                "vocab_size": text.vocab_size + pad_row, "pad_token_id": text.vocab_size if pad_row else None,
                "bos_token_id": None, "eos_token_id": None,
            },
        },
        [*links, *text_links("text.", text.layers), *head, *named(["logit_scale", "logit_bias"])],
        {"image": stages, "text": text_stages("text.", text)},
        filled,
        pad_row,
    )  # fmt: skip


def _siglip_head(text: CLIPTextCfg, dim: int) -> tuple[dict[str, Tensor], list[Link]]:
    """transformers always has a projection with a bias there: identity and zeros say "none"."""
    weight, bias = moved("text.text_projection.", "text_model.head.", ("weight", "bias"))
    if text.proj_type == "none":
        return {weight.ours[0]: torch.eye(dim), bias.ours[0]: torch.zeros(dim)}, [weight, bias]
    if text.proj_bias:
        return {}, [weight, bias]
    return {bias.ours[0]: torch.zeros(dim)}, [projection("text.text_projection", "text_model.head"), bias]


def _dual_form(clip: nn.Module, model_cfg: Mapping[str, Any], text: CLIPTextCfg) -> Form:
    dim, tower = model_cfg["embed_dim"], clip.get_submodule("text")
    trunk: Any = tower.get_submodule("transformer")
    if text.hf_pooler_type != "cls_pooler" or getattr(trunk, "pooler", None) is None:
        raise NoForm(
            f"{DUAL.name} takes the text feature from the tower's own pooler, not from "
            f"text_cfg.hf_pooler_type={text.hf_pooler_type} of a {type(trunk).__name__}"
        )
    proj = tower.get_submodule("proj")
    if not isinstance(proj, nn.Identity | nn.Linear):
        raise NoForm(f"{DUAL.name} projects with one matrix, not with hf_proj_type={text.hf_proj_type}")
    filled = {}
    if isinstance(proj, nn.Identity):
        filled["text.proj.weight"] = torch.eye(dim)
    if CLIPVisionCfg(**model_cfg["vision_cfg"]).timm_model_name:
        vision, links, stages = siglip_vision(clip, model_cfg, SIGLIP.name)
        filled["visual.proj"] = torch.eye(dim)
    else:
        vision, links, stages = clip_vision(model_cfg, activation(model_cfg))
    return Form(
        DUAL,
        {
            "model_type": DUAL.model_type,
            "projection_dim": dim,
            "logit_scale_init_value": float(clip.get_parameter("logit_scale").detach()),
            "vision_config": vision,
            "text_config": trunk.config.to_dict(),
        },
        [
            *links, *moved("text.transformer.", "text_model.", trunk.state_dict()), *named(["logit_scale"]),
            projection("visual.proj", "visual_projection"),
            Link(("text.proj.weight",), ("text_projection.weight",)),
        ],
        {"image": stages, "text": [("text.transformer.embeddings", "text_model.embeddings")]},
        filled,
    )  # fmt: skip


def _text_prefix(clip: nn.Module) -> str:
    return "text." if hasattr(clip, "text") else ""
