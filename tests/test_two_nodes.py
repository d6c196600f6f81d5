"""Two launchers, as on two machines: a rendezvous over the loopback device, one run folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from shards import make_shards, tiny_model

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


def test_two_agents_train_as_one_process_does(tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(f"""
data: {{train: {make_shards(tmp_path / "train", (20, 20))}, val: {make_shards(tmp_path / "val", (6,))}, shuffle: 1,
  streams: 1, workers: 0, augment: none}}
model: {{name: "{tiny_model(tmp_path / "model")}"}}
train: {{steps: 4, batch_size: 40, precision: fp32, log_every: 1, output: {tmp_path / "run"}}}
optim: {{lr: 2e-3, warmup: 1}}
eval: {{examples: 0}}
log: {{trackers: []}}
""")
    port = free_port()
    common = ["--nnodes=2", f"--nproc-per-node={PER_NODE}", "--rdzv-backend=c10d", "--rdzv-id=two",
              f"--rdzv-endpoint=127.0.0.1:{port}"]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    logs = [(tmp_path / f"node{node}.log").open("w+") for node in range(2)]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *common, f"--rdzv-conf=is_host={1 - node}",
             "-m", "vlcl.train", str(config), "resume=auto"],
            env=environment, stdout=log, stderr=log,
        )
        for node, log in enumerate(logs)
    ]  # fmt: skip
    try:
        ended = [agent.wait(timeout=280) for agent in agents]
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(Path(log.name).read_text()[-3000:] for log in logs))
    finally:
        for agent in agents:
            agent.kill()
        for log in logs:
            log.close()
    assert ended == [0, 0], [Path(log.name).read_text()[-3000:] for log in logs]
    environment_of_run = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment_of_run["world_size"] == 2 * PER_NODE
    train(load_config(config, [f"train.output={tmp_path / 'one'}"]))  # every batch is the whole set
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
