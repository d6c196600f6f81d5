"""Sharded towers (FSDP2) learn what whole ones learn, to rounding, and go on from each other's checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from test_reliability import run, settings
from torch import Tensor, nn

import vlcl.launcher
import vlcl.train
from vlcl.checkpoint import AVERAGED, OPTIMIZER, WEIGHTS, latest_step, load_model
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.from_config import make_model
from vlcl.launcher import make_accelerator, sharding_asked_for
from vlcl.logs import read_metrics
from vlcl.sharding import Sharding, blocks, local

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
COMMON = ("train.batch_size=12", "data.slices=6", "train.ema=0.9", "optim.clip_norm=0.05", "optim.lr=1e-3")
CHUNKS = (
    "train.steps=4",
    "train.accumulate=2",
    "train.on_anomaly=skip",
    "eval.every=2",
    "eval.batch_size=7",
    "eval.examples=0",
)


def learn(environment: dict[str, str], data: Path, output: Path, *more: str) -> list[float]:
    """Train, as one of the ranks. Returns, for each step, the share of the model's weights that this rank keeps."""
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"],
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    shares, real = [], vlcl.train.train_step

    def step(run: Any, batch: Any) -> Any:
        parameters = list(run.state.built.encoder.parameters())
        parameters += [] if run.state.averaged is None else run.state.averaged.module.parameters()
        shares.append(sum(local(p).numel() for p in parameters) / sum(p.numel() for p in parameters))
        return real(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlcl.train, "train_step", step)
        patch.setattr("vlcl.report.page.draw", lambda *_: "")  # figures take longer than the run
        for name, value in environment.items():
            patch.setenv(name, value)
        run(data, output, *COMMON, *more)
    return shares


def both_ways(data: Path, output: Path) -> list[list[float]]:
    """Held-out pairs are 50, so that the ranks evaluate batches of other numbers, and sizes."""
    more = (*CHUNKS, f"data.val={data / 'train'}")
    shares = [learn({}, data, output / "whole", *more), learn(SHARDED, data, output / "sharded", *more)]
    for name, environment in (("whole", SHARDED), ("sharded", {})):
        middle = output / name / "step-00000002"
        shares.append(learn(environment, data, output / f"{name}-then", *more, f"resume={middle}"))
    return shares


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, dict):
        return {key: x for inner, part in value.items() for key, x in tensors(part, f"{name}/{inner}").items()}
    return {name: value} if isinstance(value, Tensor) else {}


def state_of(run: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint that is the same on all ranks."""
    folder = latest_step(run)
    state = torch.load(folder / OPTIMIZER, weights_only=True)["optimizer"]["state"]
    return tensors({WEIGHTS: load_file(folder / WEIGHTS), AVERAGED: load_file(folder / AVERAGED), OPTIMIZER: state})


def assert_same_weights(one: Path, other: Path, start: Path, rel: float) -> None:
    """Checkpoints differ by less than a share `rel` of what training has changed since `start`, tensor by tensor."""
    found, expected = state_of(one), state_of(other)
    assert found.keys() == expected.keys()
    before = load_file(start / WEIGHTS)
    for name, x in expected.items():
        moved = x - before[name.removeprefix(f"/{WEIGHTS}/")] if name.startswith(f"/{WEIGHTS}") else x
        assert found[name].dtype == x.dtype
        assert float((found[name] - x).norm()) <= rel * float(moved.norm()) + 1e-12, name


def assert_same_lines(one: Path, other: Path, after: int, rel: float) -> None:
    lines = [[line for line in read_metrics(run) if line["step"] > after] for run in (one, other)]
    assert len(lines[0]) == len(lines[1]) > 0
    for line, as_it_should_be in zip(*lines):
        assert line.keys() == as_it_should_be.keys()
        for name in line:
            if name in ("train/loss", "train/grad_norm", "train/logit_scale", "val/infonce", "val/text_to_image_R@5"):
                assert line[name] == pytest.approx(as_it_should_be[name], rel=rel), name


def test_sharded_towers_learn_the_same_and_go_on_as_whole_ones(fifty_pairs: Path, tmp_path: Path) -> None:
    """In chunks, with an average, gradients that are clipped, evaluations. `whole-then` is sharded from step 2 on."""
    shares = on_ranks(2, both_ways, fifty_pairs, tmp_path)
    for of_rank in shares:
        assert [len(x) for x in of_rank] == [4, 4, 2, 2]
        assert set(of_rank[0] + of_rank[3]) == {1.0}
        assert of_rank[1] + of_rank[2] == pytest.approx([0.5] * 6, abs=1e-3)
    start = tmp_path / "whole" / "step-00000002"
    for name in ("sharded", "whole-then", "sharded-then"):
        assert_same_weights(tmp_path / name, tmp_path / "whole", start, 1e-4)
        assert_same_lines(tmp_path / name, tmp_path / "whole", 2, 1e-4)
    assert any("val/infonce" in line for line in read_metrics(tmp_path / "whole-then"))
    assert load_model(str(tmp_path / "sharded"), averaged=True).encoder.clip.logit_scale.dtype == torch.float32


OTHERS = {  # what FSDP treats in another way: scalars that learn, frozen towers, its own dtype, checkpointed blocks
    "siglip": ("loss.name=siglip", "model.lock_text=true", "model.lock_text_unlocked_layers=1", "optim.clip_norm=null"),
    "bf16": (
        "train.batch_size=24",
        "train.precision=bf16",
        "loss.name=em",
        "loss.order=before",
        "train.accumulate=2",
        "train.negatives=chunk",
    ),
}


def as_on_a_gpu() -> None:
    """Weights are gathered in bf16, and autocast computes norms in float32. Of these processes, which end."""

    def in_float32(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return real(x.float(), shape, weight.float(), bias.float(), eps)

    real = torch.nn.functional.layer_norm
    torch.nn.functional.layer_norm = in_float32
    vlcl.launcher.Sharding = lambda mesh, reshard, classes, _, autocast: Sharding(
        mesh, reshard, classes, torch.bfloat16, autocast
    )


def other_ways(data: Path, output: Path) -> None:
    for name, more in OTHERS.items():
        if name == "bf16":
            as_on_a_gpu()
        short = (*more, "train.steps=2", "optim.warmup=0", "checkpoint.every=1")
        learn({}, data, output / name / "whole", *short)
        learn({**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, data, output / name / "sharded", *short)


def test_scalars_frozen_towers_and_half_precision_on_three_ranks(fifty_pairs: Path, tmp_path: Path) -> None:
    on_ranks(3, other_ways, fifty_pairs, tmp_path)
    siglip, bf16 = tmp_path / "siglip", tmp_path / "bf16"
    start = siglip / "whole" / "step-00000001"
    assert_same_weights(siglip / "sharded", siglip / "whole", start, 5e-3)  # keys' biases have no gradient but noise
    assert_same_lines(siglip / "sharded", siglip / "whole", 0, 1e-4)
    assert_same_lines(bf16 / "sharded", bf16 / "whole", 0, 0.05)
    assert {x.dtype for x in state_of(bf16 / "sharded").values()} == {torch.float32}


REFUSED = {
    "fsdp_version: 1": ({"FSDP_VERSION": "1"}, ()),
    "fsdp_offload_params": ({"FSDP_OFFLOAD_PARAMS": "true"}, ()),
    "SIZE_BASED_WRAP": ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "100"}, ()),
    "optim.name=timm/lamb": ({}, ("optim.name=timm/lamb",)),
    "train.compile=true": ({}, ("train.compile=true",)),
    "names Bottleneck, of which this model has none; leave it out (its blocks are of ResidualAttentionBlock)": (
        {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Bottleneck"},
        (),
    ),
}


def test_what_is_not_done_so_is_told(fifty_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator, encoder = make_accelerator("fp32"), None
    monkeypatch.setattr("vlcl.distributed.world_size", lambda: 2)
    for message, (environment, more) in REFUSED.items():
        config = load_config(None, settings(fifty_pairs, tmp_path, *more))
        encoder = encoder or make_model(config).encoder
        with monkeypatch.context() as patch:
            for name, value in (SHARDED | environment).items():
                patch.setenv(name, value)
            with pytest.raises(UserError, match=re.escape(message)):
                sharding_asked_for(config, accelerator, encoder)


def test_blocks_are_found_inner_ones_first() -> None:
    stage = nn.Sequential(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}), nn.GELU())
    model = nn.ModuleDict({"stages": nn.Sequential(stage), "head": nn.Sequential(nn.Linear(2, 2))})
    first, second = stage[0]["blocks"]  # pyright: ignore[reportIndexIssue]
    assert blocks(model) == [second, first, stage]
    assert blocks(model, ["GELU"]) == [stage[1]]
