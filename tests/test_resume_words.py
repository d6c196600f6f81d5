"""What a run says of its schedules when it goes on with other settings, and of start weights that say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from shards import make_shards, tiny_model

from vlcl.checkpoint import complete_steps
from vlcl.config import OptimConfig, load_config
from vlcl.export.command import export_model
from vlcl.model import build_model
from vlcl.optim import rate_factor
from vlcl.train import train

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "train", (30, 20))


def run(shards: Path, folder: Path, *more: str) -> None:
    train(load_config(None, [
        f"data.train={shards}", f"model.name={tiny_model(folder / 'model')}", f"train.output={folder / 'run'}",
        "train.steps=6", "train.batch_size=10", "train.log_every=1", "optim.lr=1e-3", "optim.warmup=2",
        "optim.logit_scale_lr=1e-4", "data.workers=0", "data.streams=2", "data.shuffle=16", "log.trackers=[]",
        "train.precision=fp32", "checkpoint.every=4", *more,
    ]))  # fmt: skip


def rates(folder: Path) -> dict[int, float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["train/lr"] for line in map(json.loads, lines) if "train/lr" in line}


def test_another_length_says_where_the_rate_goes(shards: Path, tmp_path: Path, capsys: Capture) -> None:
    run(shards, tmp_path)
    before = rates(tmp_path)
    capsys.readouterr()
    run(shards, tmp_path, "resume=latest")
    assert "schedules" not in capsys.readouterr().out  # nothing changed, nothing said
    run(shards, tmp_path, "resume=latest", "train.steps=3")
    said = capsys.readouterr().out
    assert "6 steps are done, and this run is of 3 steps: nothing is left to train" in said
    assert "done: 6 steps" in said
    run(shards, tmp_path, "resume=latest", "train.steps=12")
    said, after = capsys.readouterr().out, rates(tmp_path)
    assert after[7] == pytest.approx(1e-3 * rate_factor(6, 12, OptimConfig(warmup=2)))
    assert after[7] > 3 * before[6]  # the jump that it is about
    assert f"the run was of 6 steps, now it is of 12 steps: schedules go by the new settings, and the learning rate "\
        f"goes on at {after[7]:.2e}, where step 6 had {before[6]:.2e}" in said  # fmt: skip


def test_another_rate_is_taken(shards: Path, tmp_path: Path, capsys: Capture) -> None:
    """The advice after a loss that is no number is a lower rate."""
    run(shards, tmp_path)
    capsys.readouterr()
    step = complete_steps(tmp_path / "run")[0]
    run(shards, tmp_path, f"resume={step}", "optim.lr=1e-4")
    assert rates(tmp_path)[5] == pytest.approx(1e-4 * rate_factor(4, 6, OptimConfig(warmup=2)))
    assert "note: the rate is another one" in capsys.readouterr().out


def test_weights_of_a_file_alone_are_told_of_in_log_and_card(shards: Path, tmp_path: Path, capsys: Capture) -> None:
    name = tiny_model(tmp_path / "model")
    save_file(build_model(name).encoder.clip.state_dict(), tmp_path / "weights.safetensors")
    run(shards, tmp_path, f"model.pretrained={tmp_path / 'weights.safetensors'}", "train.steps=4")
    assert "cannot be known" in capsys.readouterr().out
    export_model(str(tmp_path / "run"), tmp_path / "out", say=lambda text: None)
    assert "Of its start weights: model.pretrained=" in (tmp_path / "out" / "README.md").read_text()
