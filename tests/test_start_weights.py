"""Start weights that are not what model.name says: every fact of the config beside them counts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from export_models import Exports
from safetensors.torch import save_file
from shards import TINY_MODEL

from vlcl.errors import UserError
from vlcl.model import Built, build_model
from vlcl.start_weights import tag_wants_quick_gelu

NAME = "tiny-that-is-started"


@pytest.fixture(autouse=True)
def _named(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.json").write_text(json.dumps(TINY_MODEL["model_cfg"]))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")


def folder_of(folder: Path, change: dict[str, Any]) -> Path:
    """Weights with their config, which is that of NAME but for `change`: {"quick_gelu": True}, or "text_cfg.KEY"."""
    config: Any = copy.deepcopy(TINY_MODEL)
    config["preprocess_cfg"] = {}
    for key, value in change.items():
        *place, last = key.split(".")
        part = config["model_cfg"] if not place or place[0] != "preprocess_cfg" else config
        for name in place:
            part = part[name]
        part[last] = value
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({name: x.contiguous() for name, x in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def image_of(built: Built) -> torch.Tensor:
    side = built.config["model_cfg"]["vision_cfg"]["image_size"]
    return built.encoder.eval().image(torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quick_gelu": True}, ["quick_gelu is true, this model's false", "model.name=local-dir:"]),
        ({"text_cfg.no_causal_mask": True}, ["text_cfg.no_causal_mask is true", "model.name=local-dir:"]),
        ({"text_cfg.tokenizer_kwargs": {"clean": "canonicalize"}}, ["tokenizer is"]),
        ({"preprocess_cfg.mean": [0.5] * 3}, ["model.image_mean=[0.5,0.5,0.5] or model.image_mean=[0.48145466,"]),
        ({"vision_cfg.image_size": 64}, ["model.image_size=64 or model.image_size=32"]),
        ({"text_cfg.context_length": 12}, ["model.context_length=12 or model.context_length=8"]),
        ({"preprocess_cfg.resize_mode": "squash"}, ['model.image_resize_mode="squash" or']),
    ],
)
def test_weights_of_another_model_are_refused(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "weights", change)
    with pytest.raises(UserError) as caught:
        build_model(NAME, pretrained=str(folder))
    assert all(word in str(caught.value) for word in words), caught.value
    built = build_model(f"local-dir:{folder}", pretrained=str(folder))  # what the message says to take
    assert built.note is None


def test_what_is_set_is_meant(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "weights", {"preprocess_cfg.mean": [0.5] * 3, "vision_cfg.image_size": 64})
    for mean in ([0.5] * 3, [0.4] * 3):
        built = build_model(NAME, pretrained=str(folder), image_mean=mean, image_size=64)
        assert tuple(built.config["preprocess_cfg"]["mean"]) == tuple(mean)
        assert torch.equal(image_of(built), image_of(build_model(f"local-dir:{folder}")))
    with pytest.raises(UserError, match=r"vision_cfg\.image_size"):
        build_model(NAME, pretrained=str(folder), image_mean=[0.5] * 3)


def test_the_same_model_is_taken_without_a_word(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "weights", {"vision_cfg.mlp_ratio": 4.0, "preprocess_cfg.size": 32})  # defaults
    assert build_model(NAME, pretrained=str(folder)).note is None


def test_a_file_alone_cannot_be_known(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "weights", {"quick_gelu": True})
    (folder / "open_clip_config.json").unlink()
    built = build_model(NAME, pretrained=str(folder / "open_clip_model.safetensors"))
    assert "cannot be known" in (built.note or "")
    (folder / "open_clip_config.json").write_text("{")
    assert "is damaged" in (build_model(NAME, pretrained=str(folder)).note or "")


def test_pictures_of_a_transformers_folder_are_compared(exports: Exports, tmp_path: Path) -> None:
    folder = exports.copy("clip", tmp_path / "hf")
    config = json.loads((folder / "open_clip_config.json").read_text())
    (tmp_path / "tiny-hf-start.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(tmp_path / "tiny-hf-start.json")
    for path in folder.glob("open_clip_*"):
        path.unlink()
    assert build_model("tiny-hf-start", pretrained=str(folder)).note is None
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5] * 3}))
    with pytest.raises(UserError, match=r"model.image_mean=\[0.5,0.5,0.5\] or"):
        build_model("tiny-hf-start", pretrained=str(folder))
    assert build_model("tiny-hf-start", pretrained=str(folder), image_mean=[0.5] * 3).note is None


def test_a_tag_of_quick_gelu_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip itself warns and goes on with the wrong activation."""
    folder = folder_of(tmp_path / "weights", {"quick_gelu": True})
    tag: Any = {"url": "https://example.org/x.pt", "quick_gelu": True}
    registry: Any = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(registry, NAME, {"mytag": tag})
    weights = str(folder / "open_clip_model.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: weights)
    built = build_model(NAME, pretrained="mytag")
    assert "QuickGELU" in (built.note or "")
    assert built.config["model_cfg"]["quick_gelu"]
    assert torch.equal(image_of(built), image_of(build_model(f"local-dir:{folder}")))
    assert tag_wants_quick_gelu("ViT-B-32", "openai", {"model_cfg": {}})
    assert not tag_wants_quick_gelu("ViT-B-32", "laion2b_s34b_b79k", {"model_cfg": {}})
    with pytest.raises(UserError, match=r"take model\.name='ViT-B-32'"):
        tag_wants_quick_gelu("ViT-B-32", "laion2b_s34b_b79k", {"model_cfg": {"quick_gelu": True}})
