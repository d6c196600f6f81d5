"""What a run says of its speed: shares of the time, a trace, arithmetic."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from shards import TINY_MODEL
from test_accumulate import tiny
from test_reliability import run, settings

from vlcl.config import dump_config, load_config
from vlcl.errors import UserError
from vlcl.flops import Arithmetic, flops_of_pair, peak_of
from vlcl.logs import read_metrics
from vlcl.meter import Meter


def test_parts_of_the_time_are_shares_of_it() -> None:
    meter = Meter()
    for _ in range(2):
        with meter.part("loss"):
            time.sleep(0.05)
        time.sleep(0.05)
        meter.passed(8, 0.0)
    values = meter.flush()
    assert 0.3 < values["speed/loss"] < 0.6
    assert values["speed/checkpoint"] == values["speed/collectives"] == 0
    assert meter.flush()["speed/loss"] == 0


def test_a_run_logs_shares_and_traces_the_steps_that_were_asked_for(fifty_pairs: Path, tmp_path: Path) -> None:
    more = ("train.steps=3", "checkpoint.every=1", "checkpoint.async_save=false", "train.profile=1:2")
    run(fifty_pairs, tmp_path / "run", *more)
    lines = read_metrics(tmp_path / "run")
    assert all(0 < line["speed/loss"] < 1 for line in lines)
    assert [line["speed/checkpoint"] > 0 for line in lines] == [False, True, True]  # of the step before
    assert "speed/mfu" not in lines[-1]
    (file,) = (tmp_path / "run" / "profile").iterdir()
    assert file.name == "steps-1-2.json.gz"
    events = [event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
              if event.get("cat") == "user_annotation"]  # fmt: skip
    assert events.count("loss") == 1
    assert any(name.startswith("Optimizer.step") for name in events)


def test_a_profile_of_no_steps_is_refused(fifty_pairs: Path, tmp_path: Path) -> None:
    for steps, message in (("3:3", "train.profile=3:3 has no steps"), ("3", "START:STOP, two steps")):
        with pytest.raises(UserError, match=message):
            load_config(None, settings(fifty_pairs, tmp_path, f"train.profile={steps}"))
    config = load_config(None, settings(fifty_pairs, tmp_path, "train.profile=10:20"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml").train.profile == "10:20"  # and no number to the base 60


def test_arithmetic_of_a_pair_is_that_of_its_matrix_products() -> None:
    """Forward by hand; backward is twice that, but for the pixels, which get no gradient."""
    encoder = tiny(0.0).float()

    def tower(width: int, tokens: int) -> int:
        return 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width

    patches = (32 // 8) ** 2
    pixels, image_head, text_head = 2 * patches * 3 * 8 * 8 * 32, 2 * 32 * 16, 2 * 16 * 16
    image, text = tower(32, patches + 1) + image_head, tower(16, 8) + text_head
    weights = {name: x.clone() for name, x in encoder.state_dict().items()}
    state = torch.get_rng_state()
    assert flops_of_pair(encoder, TINY_MODEL) == 3 * (image + text) + 2 * pixels
    square: dict[str, Any] = {**TINY_MODEL, "preprocess_cfg": {"size": 32}}  # as others write it
    assert flops_of_pair(encoder, square) == 3 * (image + text) + 2 * pixels
    other: dict[str, Any] = {**TINY_MODEL, "preprocess_cfg": {"size": 40}}  # of which the tower makes no features
    assert flops_of_pair(encoder, other) is None
    encoder.clip.visual.requires_grad_(False)
    assert flops_of_pair(encoder, TINY_MODEL) == image + pixels + 3 * text
    encoder.clip.set_grad_checkpointing()
    assert flops_of_pair(encoder, TINY_MODEL, checkpointed=True) == image + pixels + 3 * text
    assert encoder.clip.transformer.grad_checkpointing
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, weights[name]) for name, x in encoder.state_dict().items())


def test_share_of_the_peak() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert [peak_of(f"NVIDIA {name}") for name in ("L4", "L40S", "A100-SXM4-80GB", "GH200 480GB")] == [
        121e12, 362e12, 312e12, 989e12
    ]  # fmt: skip
    assert peak_of("NVIDIA TITAN V") is None
    speeds = Arithmetic(44e9, 312e12).speeds({"speed/samples_per_second_per_device": 3000.0})
    assert speeds == pytest.approx({"speed/tflops_per_device": 132, "speed/mfu": 132 / 312})
    assert Arithmetic(44e9).speeds({"speed/samples_per_second_per_device": 1e3}) == {"speed/tflops_per_device": 44}
