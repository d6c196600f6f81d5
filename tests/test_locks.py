"""Every architecture of open_clip, tiny, with each lock: features, or a refusal that says what to do."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import timm
import torch
from export_models import own_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from vlcl.errors import UserError
from vlcl.locked import lock_towers
from vlcl.model import Built, build_model

EVERYTHING = os.environ.get("VLCL_TEST_EVERYTHING") == "1"
LAYERS = 2
# By the start of timm's names: what makes the trunk small.
TRUNKS: dict[str, dict[str, Any]] = {
    "vitamin": {"depth": LAYERS, "img_size": 64},
    "vit_base_mci": {"depth": LAYERS, "img_size": 64},
    "vit_relpos": {"depth": LAYERS, "embed_dim": 32, "num_heads": 2},
    "vit": {"depth": LAYERS, "embed_dim": 32, "num_heads": 2},
    "eva": {"depth": LAYERS, "embed_dim": 32, "num_heads": 2},
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "swin": {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 1, 1)},
    "fastvit": {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)},
}
TEXT_TOWERS = {
    "roberta": {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32},
    "xlm-roberta": {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32},
    "mt5": {"d_model": 32, "num_layers": LAYERS, "num_heads": 2, "d_kv": 16, "d_ff": 32},
    "m2m_100": {"d_model": 32, "encoder_layers": LAYERS, "decoder_layers": 1, "encoder_attention_heads": 2,
                "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
}  # fmt: skip


def kind_of(hf_name: str) -> str:
    """The type of a text tower in transformers, by its name on the hub."""
    kinds = {"xlm": "xlm-roberta", "roberta": "roberta", "mt5": "mt5", "nllb": "m2m_100"}
    return next(kind for word, kind in kinds.items() if word in hf_name)


def tiny(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config` with few narrow layers; all that decides which code of open_clip runs is kept."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    trunk = vision.get("timm_model_name", "")
    if trunk.startswith(("vitamin", "vit_base_mci")):  # their convolutions keep their widths
        vision["image_size"] = 64
    else:
        config["embed_dim"] = 32
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
    elif "timm_model_name" in vision:
        vision["image_size"] = 64 if trunk.startswith("convnext") else vision["image_size"]
    else:
        vision |= {"layers": LAYERS, "width": 32, "head_width": 16, "image_size": 2 * vision["patch_size"]}
    if vision.get("attentional_pool"):
        vision |= {"attn_pooler_heads": 2, "attn_pooler_queries": 4}
    if "hf_model_name" in text:
        text["hf_model_name"] = hf_tower(folder, kind_of(text["hf_model_name"]))
    else:
        text |= {"layers": LAYERS, "width": 32, "heads": 2}
    if "hf_tokenizer_name" in text:
        text["vocab_size"] = 400
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "width": 32, "heads": 2}
    return config


@cache
def hf_tower(folder: Path, kind: str) -> str:
    shape: dict[str, Any] = {"vocab_size": 400, "max_position_embeddings": 160, "pad_token_id": 0}
    AutoModel.from_config(AutoConfig.for_model(kind, **shape, **TEXT_TOWERS[kind])).save_pretrained(folder / kind)
    return str(folder / kind)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    found = own_tokenizer(400, 1)
    found.sep_token = found.eos_token  # CLIPA's is BERT's, and is stripped
    return found


def write(name: str, folder: Path, towers: Path) -> str:
    """A folder with the config of `name`, tiny: its `local-dir:`."""
    config = tiny(open_clip.get_model_config(name) or {}, towers)
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    if "hf_tokenizer_name" in config["text_cfg"]:
        tokenizer().save_pretrained(folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.fixture(autouse=True)
def _small_trunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, **settings: Any) -> nn.Module:
        small = next(small for start, small in TRUNKS.items() if name.startswith(start))
        return timm.create_model(name, **{**settings, **small})

    monkeypatch.setattr("open_clip.timm_model.timm", SimpleNamespace(create_model=create))


def one_of_each() -> list[str]:
    """The first name of each set of architectures that differ in sizes alone."""
    found: dict[str, str] = {}
    sizes = {"image_size", "patch_size", "width", "layers", "heads", "head_width", "mlp_ratio", "context_length",
             "vocab_size", "hf_tokenizer_name", "ls_init_value", "timm_drop_path", "eos_id", "embed_dim"}  # fmt: skip
    for name in open_clip.list_models():
        config: Any = open_clip.get_model_config(name)
        kinds: dict[str, Any] = {
            part: {key: x for key, x in config[part].items() if key not in sizes} for part in ("vision_cfg", "text_cfg")
        }
        if trunk := kinds["vision_cfg"].get("timm_model_name"):
            kinds["vision_cfg"]["timm_model_name"] = next(start for start in TRUNKS if trunk.startswith(start))
        kinds["resnet"] = isinstance(config["vision_cfg"].get("layers"), list)
        kinds["coca"] = "multimodal_cfg" in config
        kinds["custom"] = config.get("custom_text", False)
        if "hf_model_name" in kinds["text_cfg"]:
            kinds["text_cfg"]["hf_model_name"] = kind_of(kinds["text_cfg"]["hf_model_name"])
        found.setdefault(json.dumps(kinds, sort_keys=True), name)
    return list(found.values())


def features(built: Built) -> None:
    side = built.config["preprocess_cfg"]["size"]
    height, width = (side, side) if isinstance(side, int) else side
    with torch.no_grad():
        out = built.encoder(torch.rand(2, 3, height, width), built.tokenize(["a cat", "a dog, sitting"]))
    for x in (out.image_BD, out.text_BD):
        torch.testing.assert_close(x.norm(dim=1), torch.ones(2))


def trained(clip: nn.Module, tower: str) -> int:
    """Numbers of a tower, "image" or "text", that train."""
    named = ((name, p) for name, p in clip.named_parameters() if not name.startswith(("logit_", "text_decoder.")))
    return sum(p.numel() for name, p in named if p.requires_grad and name.startswith("visual.") == (tower == "image"))


@pytest.mark.parametrize("name", open_clip.list_models() if EVERYTHING else one_of_each())
def test_an_architecture_with_each_lock(name: str, folder: Path, tmp_path: Path) -> None:
    built = build_model(write(name, tmp_path, folder))
    clip: Any = built.encoder.clip
    built.encoder.train()
    features(built)
    for tower, other, key in (
        ("image", "text", "model.lock_image_unlocked_groups"), ("text", "image", "model.lock_text_unlocked_layers"),
    ):  # fmt: skip
        left = []
        for parts in (1, 0):
            clip.requires_grad_(True)
            all_of_it, elsewhere = trained(clip, tower), trained(clip, other)
            image, text = (tower == x for x in ("image", "text"))
            with nullcontext() if parts == 0 else refused_or_not(f"{key}=1: ", left, all_of_it):
                lock_towers(name, clip, image, parts * image, text, parts * text)
                left.append(trained(clip, tower))
            assert len(left) == 2 - parts
            assert trained(clip, other) == (elsewhere if left[-1] < all_of_it else trained(clip, other))
            features(built)
        assert left[1] < left[0] <= all_of_it, (name, tower, left, all_of_it)


@contextmanager
def refused_or_not(start: str, left: list[int], all_of_it: int) -> Iterator[None]:
    """A part of a tower may be refused: then all of it trains."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith(start):
            raise
        left.append(all_of_it)


def test_a_resnet_has_no_groups_and_coca_has_locks(folder: Path, tmp_path: Path) -> None:
    """By the settings, as a run has them."""
    resnet, coca = (write(name, tmp_path / name, folder) for name in ("RN50", "coca_base"))
    with pytest.raises(UserError, match=r"lock_image_unlocked_groups=2: .* leave .* out to freeze the whole tower"):
        build_model(resnet, lock_image=True, lock_image_unlocked_groups=2)
    clip = build_model(coca, lock_image=True, lock_text=True).encoder.clip
    assert trained(clip, "image") == trained(clip, "text") == 0
