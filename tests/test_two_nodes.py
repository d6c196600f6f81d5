"""Two launchers, as on two machines: a rendezvous over the loopback device, one run folder."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from ranks import apart
from shards import make_shards, tiny_model
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from vlcl.cli import app
from vlcl.config import load_config
from vlcl.train import train

PER_NODE = 2 if os.environ.get("VLCL_TEST_EVERYTHING") else 1  # a rank costs as much as the whole of this training


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def torchrun(options: list[str], arguments: list[str]) -> None:
    """torchrun's own agent, whose ranks are forked where it would start a Python: that takes them longer than all else.
    tests/test_train.py starts them as users do."""
    config, _, _ = config_from_args(parse_args([*options, *arguments]))
    config.start_method = "fork"
    elastic_launch(config, cli_train)(arguments)


def cli_train(arguments: list[str]) -> None:
    app(["train", *arguments], standalone_mode=False)


def test_two_agents_train_as_one_process_does(tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(f"""
data: {{train: {make_shards(tmp_path / "train", (20, 20))}, val: {make_shards(tmp_path / "val", (6,))}, shuffle: 1,
  slices: {2 * PER_NODE}, streams: 1, workers: 0, augment: none}}
model: {{name: "{tiny_model(tmp_path / "model")}"}}
train: {{steps: 4, batch_size: 40, precision: fp32, log_every: 1, output: {tmp_path / "run"}}}
optim: {{lr: 2e-3, warmup: 1}}
eval: {{examples: 0}}
log: {{trackers: []}}
""")
    port = free_port()
    common = ["--nnodes=2", f"--nproc-per-node={PER_NODE}", "--rdzv-backend=c10d", "--rdzv-id=two",
              f"--rdzv-endpoint=127.0.0.1:{port}"]  # fmt: skip
    logs = [tmp_path / f"node{node}.log" for node in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        agents = [
            apart(log, torchrun, [*common, f"--rdzv-conf=is_host={1 - node}", "-m", "vlcl.train"],
                  [str(config), "resume=auto"])
            for node, log in enumerate(logs)
        ]  # fmt: skip
    for agent in agents:
        agent.join(timeout=240)
    ended = [agent.exitcode for agent in agents]
    for agent in agents:
        if agent.is_alive():
            agent.kill()
    assert ended == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    environment_of_run = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment_of_run["world_size"] == 2 * PER_NODE
    train(load_config(config, [f"train.output={tmp_path / 'one'}"]))  # every batch is the whole set
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
