"""Tiny copies, with random weights, of every open_clip architecture that has a class in transformers."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm.models
import torch
import yaml
from safetensors.torch import save_file
from shards import train_tiny_run
from timm.models import model_entrypoint, register_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from vlcl.export.command import Exported, export_model
from vlcl.model import build_model

SENTENCES = (
    "a photo of a cat", "a photo of a dog", "This is a photo of a handwritten digit.", "two dogs running fast",
    "the number seven", "grinning face with big eyes", "don't stop: it's 24/7!", "salt & pepper, \"quoted\" _text_",
)  # fmt: skip
SIGLIP_PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
TINY_TEXT = {"vocab_size": 400, "width": 64, "heads": 2, "layers": 2}


def plain_vits() -> dict[str, list[dict[str, Any]]]:
    """Kind -> open_clip's architectures of that kind, as (name, config) records."""
    kinds: dict[str, list[dict[str, Any]]] = {"clip": [], "metaclip": [], "siglip": []}
    for name in open_clip.list_models():
        config: Any = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        if "multimodal_cfg" in config or "hf_model_name" in text or "tiny" in name:
            continue
        if vision.get("timm_pool") == "map" and "siglip" in vision["timm_model_name"]:
            kinds["siglip"].append({"name": name, "config": config})
        elif isinstance(vision.get("layers"), int) and not {"no_ln_pre", "ls_init_value", "timm_model_name"} & set(
            vision
        ):
            kinds["metaclip" if text.get("pool_type") == "eos" else "clip"].append({"name": name, "config": config})
    return kinds


def tiny(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with two narrow layers a tower and few patches; all that decides the form of the model is kept."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        name = re.sub(r"_\d+$", "", vision["timm_model_name"])
        (patch,) = map(int, re.findall(r"patch(\d+)", name))
        vision |= {"timm_model_name": _tiny_timm(vision["timm_model_name"], name, 3 * patch), "image_size": 3 * patch}
        config["embed_dim"] = 64
        text |= TINY_TEXT
    else:
        vision |= {"layers": 2, "width": 2 * vision.get("head_width", 64), "image_size": 3 * vision["patch_size"]}
        config["embed_dim"] = 48
        text |= {"width": 64, "heads": 2, "layers": 2} | ({"vocab_size": 400} if "hf_tokenizer_name" in text else {})
    return config


def families(kind: str) -> dict[str, dict[str, Any]]:
    """The distinct tiny copies of a kind, under the names that they stand for."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for entry in plain_vits()[kind]:
        config = tiny(entry["config"])
        key = copy.deepcopy(config)
        key["text_cfg"].pop("hf_tokenizer_name", None)
        found.setdefault(json.dumps(key, sort_keys=True), ([], config))[0].append(entry["name"])
    return {", ".join(names): config for names, config in found.values()}


def write_folder(folder: Path, model_cfg: dict[str, Any], preprocess: dict[str, Any] | None = None) -> str:
    """A folder in open_clip's format, with random weights and, where the model wants it, a tokenizer."""
    folder.mkdir(parents=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    text = model_cfg["text_cfg"]
    if "hf_tokenizer_name" in text:
        own_tokenizer(text.get("vocab_size", 400), text.get("eos_id", 1)).save_pretrained(folder)
    torch.manual_seed(0)
    clip: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for p in clip.parameters():  # away from zeros and ones, which would hide what is mixed up
            p.add_(0.02 * torch.randn_like(p))
    save_file({name: x.contiguous() for name, x in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    return str(folder)


def with_roberta(model_cfg: dict[str, Any], folder: Path, **more: Any) -> dict[str, Any]:
    """`model_cfg` with a tiny RoBERTa, saved in `folder`, as its text tower: its own pooler and one projection."""
    tokenizer = own_tokenizer(400, 1)
    config = RobertaConfig(
        vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=40, pad_token_id=tokenizer.get_vocab()["<pad>"], type_vocab_size=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_pooler_type": "cls_pooler",
            "hf_proj_type": "linear", "context_length": 32, "hf_model_pretrained": False}  # fmt: skip
    return {"embed_dim": model_cfg["embed_dim"], "vision_cfg": model_cfg["vision_cfg"], "text_cfg": text | more}


def own_tokenizer(vocab_size: int, eos: int, sentences: Iterable[str] = SENTENCES) -> PreTrainedTokenizerFast:
    """A BPE with case and punctuation, trained here; its end-of-text token has the id `eos`."""
    bpe: Any = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<unk>", "<s>"]
    specials.insert(eos, "</s>")
    bpe.train_from_iterator(sentences, trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))  # fmt: skip
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _tiny_timm(full: str, name: str, size: int) -> str:
    """Register timm's `full` with two narrow blocks; the name that it gets."""
    small = f"tiny_{name}"
    if not timm.models.is_model(small):
        entry = model_entrypoint(full)

        def build(pretrained: bool = False, **more: Any) -> Any:
            return entry(
                pretrained=pretrained, **({"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": size} | more)
            )

        build.__name__, build.__module__ = small, "timm.models.vision_transformer"
        register_model(build)
    return small


@dataclass(frozen=True)
class Shared:
    """An exported folder that tests read and never change."""

    source: str
    folder: Path
    made: Exported


class Exports:
    """See the fixture `exports`. Kinds: "run" (the newest step), "clip", "siglip" (with a bias), "metaclip", "roberta",
    or an architecture of vlcl."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sources: dict[str, str] = {}
        self._made: dict[str, Shared] = {}

    @cached_property
    def run(self) -> Path:
        return train_tiny_run(self.root / "run")

    def source(self, kind: str) -> str:
        """A folder in open_clip's format with random weights, which tests never change either."""
        if kind not in self._sources:
            self._sources[kind] = str(self.run) if kind == "run" else self._write(kind)
        return self._sources[kind]

    def _write(self, kind: str) -> str:
        folder = self.root / kind / "in"
        if kind == "roberta":
            return write_folder(folder, with_roberta(clip_config(), folder.with_name("roberta")))
        if kind == "siglip":
            config = next(iter(families(kind).values())) | {"init_logit_bias": -10.0}
            return write_folder(folder, config, SIGLIP_PREPROCESS)
        if kind in ("clip", "metaclip"):
            return write_folder(folder, next(iter(families(kind).values())))
        return write_folder(folder, build_model(kind).config["model_cfg"])

    def of(self, kind: str, onnx: bool = False) -> Shared:
        """The export of a kind; `onnx` takes ten times as long, and skips the test where its packages are not there."""
        if onnx:
            pytest.importorskip("onnxscript", reason="ONNX needs vlcl[export]")
        name = "my-clip" if onnx else "out"
        if f"{kind}/{name}" not in self._made:
            folder = self.root / kind / name
            self._made[f"{kind}/{name}"] = Shared(
                self.source(kind), folder, export(self.source(kind), folder, onnx=onnx)
            )
        return self._made[f"{kind}/{name}"]

    def copy(self, kind: str, target: Path) -> Path:
        """A copy to change."""
        return shutil.copytree(self.of(kind).folder, target)


def clip_config() -> dict[str, Any]:
    return next(iter(families("clip").values()))


def export(source: object, output: str | Path, **options: Any) -> Exported:
    return export_model(str(source), output, say=lambda text: None, **options)


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of the model card, with one space where its tables have several."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), re.sub(" {2,}", " ", text)
