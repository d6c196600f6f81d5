"""SigLIP starts at scale 10 and bias -10 unless told otherwise, by a setting or by start weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import save_file
from shards import make_shards, tiny_model

from vlcl.config import load_config
from vlcl.from_config import make_model
from vlcl.model import build_model
from vlcl.train import train


def start(*settings: str) -> tuple[float, float | None]:
    clip = make_model(load_config(None, ["data.train=x", *settings])).encoder.clip
    bias = getattr(clip, "logit_bias", None)
    return round(clip.logit_scale.exp().item(), 4), None if bias is None else bias.item()


def test_scale_and_bias_of_the_start(tmp_path: Path) -> None:
    name = f"model.name={tiny_model(tmp_path / 'model')}"
    assert start(name) == (round(1 / 0.07, 4), None)
    assert start(name, "loss.name=siglip") == (10, -10)
    assert start(name, "loss.name=siglip", "model.logit_scale_init=20", "model.logit_bias_init=-5") == (20, -5)
    clip = build_model(name.partition("=")[2]).encoder.clip
    clip.logit_scale.data.fill_(math.log(33))
    save_file(clip.state_dict(), tmp_path / "weights.safetensors")
    assert start(name, "loss.name=siglip", f"model.pretrained={tmp_path / 'weights.safetensors'}") == (33, -10)
    (tmp_path / "weights.safetensors").rename(tmp_path / "model" / "open_clip_model.safetensors")
    assert start(name, "loss.name=siglip") == (33, -10)  # weights in the folder of the model itself


def test_a_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(load_config(None, [
        f"data.train={make_shards(tmp_path / 'train', (20,))}", f"model.name={tiny_model(tmp_path / 'model')}",
        "loss.name=siglip", f"train.output={tmp_path / 'run'}", "train.steps=1", "train.batch_size=10",
        "data.workers=0", "data.streams=2", "log.trackers=[]", "train.precision=fp32",
    ]))  # fmt: skip
    assert "loss.name=siglip starts at logit scale 10 and bias -10" in capsys.readouterr().out
