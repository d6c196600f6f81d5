"""The two towers: names, overrides, locks, start weights, and the folder that rebuilds them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from shards import tiny_model

from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.model import build_model
from vlcl.optim import OF_THE_STEP, build_optimizer


def features(built):
    torch.manual_seed(0)
    size = built.config["preprocess_cfg"]["size"][0]
    return built.encoder.eval()(torch.randn(2, 3, size, size), built.tokenize(["a cat", "a dog, sitting"]))


@pytest.mark.parametrize("name", ["ViT-Ti-16-64", "ViT-Nano-8-64", "ViT-Pico-8-32"])
def test_our_own_models_build_with_their_tokenizer(name: str) -> None:
    built = build_model(name)
    out = features(built)
    torch.testing.assert_close(out.image_BD.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(out.text_BD.norm(dim=1), torch.ones(2))
    assert out.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-3)
    assert built.tokenize(["a"]).shape[1] == built.config["model_cfg"]["text_cfg"]["context_length"]


def test_overrides_are_in_the_saved_config(tmp_path: Path) -> None:
    built = build_model("ViT-Nano-8-64", image_size=32, context_length=12, logit_scale_init=20.0)
    expected = features(built)
    assert expected.logit_scale.item() == pytest.approx(20.0, rel=1e-5)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(built.config))
    save_file(built.encoder.clip.state_dict(), tmp_path / "model.safetensors")
    again = build_model(f"local-dir:{tmp_path}")
    assert torch.equal(features(again).image_BD, expected.image_BD)
    assert torch.equal(features(again).text_BD, expected.text_BD)


def test_start_weights_from_a_folder_and_a_file(tmp_path: Path) -> None:
    name = tiny_model(tmp_path / "config")
    torch.manual_seed(1)
    source = build_model(name)
    (tmp_path / "run" / "step-00000010").mkdir(parents=True)
    file = tmp_path / "run" / "step-00000010" / "model.safetensors"
    save_file(source.encoder.clip.state_dict(), file)
    plain = tmp_path / "config" / "open_clip_config.json"
    open_clip.add_model_config(_as_named(plain, tmp_path))
    for path in (tmp_path / "run", file.parent, file):
        built = build_model("tiny-for-tests", pretrained=str(path))
        assert torch.equal(built.encoder.clip.visual.proj, source.encoder.clip.visual.proj)
    with pytest.raises(UserError, match="no weights in that folder"):
        build_model("tiny-for-tests", pretrained=str(tmp_path / "config"))
    with pytest.raises(UserError, match=r"model.name='ViT-B-32'"):
        build_model("ViT-B-32", pretrained=str(file))


def _as_named(config: Path, folder: Path) -> Path:
    (folder / "tiny-for-tests.json").write_text(json.dumps(json.loads(config.read_text())["model_cfg"]))
    return folder / "tiny-for-tests.json"


def test_locks_freeze_towers() -> None:
    clip = build_model("ViT-Nano-8-64", lock_image=True, lock_image_unlocked_groups=1).encoder.clip
    assert not clip.visual.conv1.weight.requires_grad
    assert clip.visual.proj.requires_grad
    clip = build_model("ViT-Nano-8-64", lock_text=True).encoder.clip
    assert not clip.token_embedding.weight.requires_grad
    assert clip.visual.conv1.weight.requires_grad


def test_patch_dropout_and_checkpointing() -> None:
    built = build_model("ViT-Nano-8-64", patch_dropout=0.5, grad_checkpointing=True)
    images, tokens = torch.randn(2, 3, 64, 64), built.tokenize(["a", "b"])
    train = built.encoder.train()
    assert not torch.equal(train(images, tokens).image_BD, train(images, tokens).image_BD)
    train(images, tokens).image_BD.sum().backward()
    assert built.encoder.clip.visual.transformer.grad_checkpointing
    evaluation = built.encoder.eval()
    assert torch.equal(evaluation(images, tokens).image_BD, evaluation(images, tokens).image_BD)


def test_the_scale_is_clamped() -> None:
    encoder = build_model("ViT-Nano-8-64").encoder
    encoder.clip.logit_scale.data.fill_(9.0)
    encoder.clamp_logit_scale(100.0)
    assert encoder.clip.logit_scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize(("scale_lr", "expected"), [(None, 3e-4), (1e-5, 1e-5), (0.0, None)])
def test_the_scale_learns_at_a_share_of_the_rate_unless_it_has_its_own(
    scale_lr: float | None, expected: float | None
) -> None:
    settings = load_config(None, ["data.train=x", "optim.lr=1e-3", "optim.logit_scale_ratio=0.3"]).optim
    given: dict[str, Any] = settings.model_dump(exclude=OF_THE_STEP) | {"logit_scale_lr": scale_lr}
    encoder = build_model("ViT-Nano-8-64").encoder
    groups = build_optimizer(encoder, **given).param_groups
    rates = [group["peak_lr"] for group in groups if any(p is encoder.clip.logit_scale for p in group["params"])]
    assert rates == ([] if expected is None else [pytest.approx(expected)])


@pytest.mark.parametrize(("batch_size", "ratio"), [(16, 0.05), (64, 0.1), (256, 0.2), (4096, 0.2)])
def test_the_temperature_moves_as_far_per_sample_at_every_batch(batch_size: int, ratio: float) -> None:
    config = load_config(None, ["data.train=x", f"train.batch_size={batch_size}"])
    assert config.logit_scale_ratio == pytest.approx(ratio)
    rate = (batch_size / 128) ** 0.5
    if batch_size <= 256:  # of the scale, times the number of steps
        assert rate * config.logit_scale_ratio / batch_size == pytest.approx(2**0.5 * 0.2 / 256)
    assert load_config(None, ["data.train=x", "optim.logit_scale_ratio=0.7"]).logit_scale_ratio == 0.7


def test_unknown_names_suggest() -> None:
    with pytest.raises(UserError, match="did you mean 'ViT-Ti-16-64'"):
        build_model("ViT-Ti-16-46")
    with pytest.raises(UserError, match="does not exist"):
        build_model("local-dir:/nowhere")
