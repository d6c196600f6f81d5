"""What stands still: a rank of two, a data worker; and what only takes long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import apart, on_ranks

import vlcl.data.reader
import vlcl.saving
import vlcl.train
from vlcl.checkpoint import complete_steps
from vlcl.config import load_config
from vlcl.watch import STANDING, Watch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="stops processes by signals")


@pytest.fixture(scope="module")
def data(fifty_pairs: Path) -> Path:
    return fifty_pairs


def run(data: Path, output: Path, *more: str) -> None:
    vlcl.train.train(load_config(None, [
        f"data.train={data / 'train'}", f"model.name=local-dir:{data / 'model'}", f"train.output={output}",
        "train.steps=4", "train.batch_size=10", "train.log_every=1", "data.workers=0", "data.streams=2",
        "train.precision=fp32", *more,
    ]))  # fmt: skip


def stop_at_the_third_step(data: Path, output: Path) -> None:
    """Rank 1 of 2 is stopped by SIGSTOP, as by a debugger or a machine that hangs."""
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    real = vlcl.train.train_step

    def step(run: Any, batch: Any) -> Any:
        if os.environ["RANK"] == "1" and run.state.step == 2:
            subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])  # it can be ended then
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(run, batch)

    vlcl.train.train_step = step
    run(data, output, "train.timeout=3")


def test_a_rank_that_stands_still_ends_the_run_and_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 0 of 2.*exit code 1"):
        on_ranks(2, stop_at_the_third_step, data, tmp_path / "run")
    stacks = (tmp_path / "run" / STANDING / "rank-0.txt").read_text()
    assert stacks.startswith("step 3: computing it with the other ranks\nprocess ")
    assert "in train_step" in stacks
    assert not (tmp_path / "run" / STANDING / "rank-1.txt").exists()


def stop_the_data_worker(data: Path, output: Path) -> None:
    real = vlcl.data.reader.ShardReader.prepare

    def prepare(self: vlcl.data.reader.ShardReader, sample: Any, epoch: int, row: int) -> Any:
        if (output / "metrics.jsonl").is_file() and (output / "metrics.jsonl").read_text():
            (output.parent / "worker").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(self, sample, epoch, row)

    vlcl.data.reader.ShardReader.prepare = prepare
    sums = vlcl.saving.records
    vlcl.saving.records = lambda *of: (time.sleep(2), sums(*of))[1]  # a save is under way when the run ends
    run(data, output, "train.steps=40", "data.workers=1", "train.timeout=3", "checkpoint.every=1")


def test_a_data_worker_that_stands_still_ends_the_run(data: Path, tmp_path: Path) -> None:
    process = apart(tmp_path / "said", stop_the_data_worker, data, tmp_path / "run")
    process.join(120)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 1, said
    assert "error: rank 0 has stood still for 3 s (train.timeout): step " in said
    assert ": waiting for a batch" in said
    assert "resume=latest" in said
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert complete_steps(tmp_path / "run")[-1].name == f"step-{last:08d}"  # the save that was under way is not lost
    worker, deadline = int((tmp_path / "worker").read_text()), time.monotonic() + 20
    while is_alive(worker):  # it may take a moment to be gone
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_who_goes_on_is_left_alone(tmp_path: Path) -> None:
    """Twice the time in all, never the whole of it at once; what stood for half of it says so, and takes it back."""
    with Watch(1.0, tmp_path) as watch:
        for _ in watch.each(range(4), "first"):
            time.sleep(0.2)
        watch.at("second")
        deadline = time.monotonic() + 0.95
        while not (tmp_path / STANDING / "rank-0.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / STANDING / "rank-0.txt").read_text().startswith("second\nprocess ")
        watch.at("third")
        time.sleep(0.3)
        assert not (tmp_path / STANDING).exists()
    with Watch(None, tmp_path):
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def stop_for_a_while(folder: Path) -> None:
    """As by Ctrl-Z, for longer than the timeout."""
    with Watch(2.0, folder):
        subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5)


def test_a_process_that_was_stopped_may_go_on(tmp_path: Path) -> None:
    process = apart(tmp_path / "said", stop_for_a_while, tmp_path)
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "said").read_text()


def test_all_ranks_are_in_the_last_words(tmp_path: Path) -> None:
    """Of four: two wait in the same place, one in another, one cannot say anything."""
    watch = Watch(60.0, tmp_path)
    watch.world = 4
    for rank, place in ((0, "step 7: computing"), (1, "step 7: waiting for a batch"), (3, "step 7: computing")):
        watch.rank = rank
        watch.at(place)
        watch._tell()
    said = watch._last_words(60.0)
    assert "rank 1: step 7: waiting for a batch\n" in said
    assert "rank 0, 3: step 7: computing\n" in said
    assert "rank 2: has said nothing: its process or its machine is stopped, or gone" in said
