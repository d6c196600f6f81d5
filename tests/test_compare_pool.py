"""Workers of `vlcl compare --jobs`: shared work, deaths, Ctrl-C, and a real grid in two processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from compare_fakes import folders, work
from shards import make_shards, tiny_model

from vlcl.compare.command import compare
from vlcl.compare.grid import Cell
from vlcl.compare.pool import environments_of, run_in_pool, visible_gpus
from vlcl.config import Config, DataConfig, TrainConfig

ENVIRONMENTS = [{"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": str(n)} for n in range(2)]


def cell(folder: Path, loss: str, seed: int) -> Cell:
    name = f"{loss}-s{seed}"
    settings = Config(data=DataConfig(train="x"), train=TrainConfig(steps=1, output=str(folder / name)))
    return Cell(name, loss, 8, 0.5, seed, settings)


def run(cells: list[Cell], after: Callable[[str], list[Cell]] = lambda name: []) -> dict[str, str | None]:
    """All cells in two workers, with those that the end of one brings; the error of each."""
    todo, ended = list(cells), {}
    pool = run_in_pool(lambda: [c for c in todo if c.name not in ended], 2, work, ENVIRONMENTS)
    for one, ran in pool:
        ended[one.name] = ran.error
        todo += after(one.name)
    return ended


def worker(folder: Path, name: str) -> dict[str, str]:
    return json.loads((folder / name / "worker.json").read_text())


def test_two_workers_share_what_comes(tmp_path: Path) -> None:
    more = {"a-s0": [cell(tmp_path, "late", 0)]}
    ended = run([cell(tmp_path, "a", seed) for seed in range(8)], lambda name: more.pop(name, []))
    assert ended == dict.fromkeys([*(f"a-s{seed}" for seed in range(8)), "late-s0"])
    about = [worker(tmp_path, name) for name in ended]
    pids = {entry["pid"] for entry in about}
    assert len(pids) == 2  # each ran cell after cell
    assert os.getpid() not in pids
    assert {entry["OMP_NUM_THREADS"] for entry in about} == {"3"}
    # data workers of a worker start as elsewhere, not as the worker itself did, by importing all anew
    assert {entry["start_method"] for entry in about} == {multiprocessing.get_start_method()}
    assert {entry["CUDA_VISIBLE_DEVICES"] for entry in about} == {"0", "1"}


def test_a_worker_that_dies_takes_one_cell_with_it(tmp_path: Path) -> None:
    losses = ("dies", "exits", "raises", "a", "b")
    ended = run([cell(tmp_path, loss, 0) for loss in losses])
    assert set(ended) == {f"{loss}-s0" for loss in losses}
    assert (
        ended["dies-s0"]
        == "the process that ran it was ended by SIGKILL (there may have been too little memory: try fewer --jobs)"
    )
    assert ended["exits-s0"] == "the process that ran it ended with exit code 3"
    assert ended["raises-s0"] == "ZeroDivisionError: by nobody"
    assert (ended["a-s0"], ended["b-s0"]) == (None, None)


SCRIPT = """
import signal
import sys
from pathlib import Path
import test_compare_pool as here

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, as this may be, is deaf to it
    try:
        here.run([here.cell(Path(sys.argv[1]), "waits", seed) for seed in range(3)])
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start_waiting(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A process with two workers that are at a cell each; their ids."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen([sys.executable, script, folder], env={**os.environ, "PYTHONPATH": path},
                               stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    names = ["waits-s0", "waits-s1"]
    deadline = time.monotonic() + 100
    while not all((folder / name / "worker.json").is_file() for name in names):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.3)
    return process, [int(worker(folder, name)["pid"]) for name in names]


def are_gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() and " Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_ctrl_c_stops_all_and_lets_them_tidy_up(tmp_path: Path) -> None:
    process, pids = start_waiting(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert are_gone(pids, 1)
    assert [(tmp_path / f"waits-s{seed}" / "stopped").read_text() for seed in (0, 1)] == ["SIGTERM"] * 2
    assert said == ""
    assert not (tmp_path / "waits-s2").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    process, pids = start_waiting(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert are_gone(pids, 20)


def test_shares_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environments_of(3, 8, []) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert environments_of(3, 2, ["0"]) == [{"OMP_NUM_THREADS": "1"}] * 3
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments_of(3, 8, ["4", "7"])] == ["4", "7", "4"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environments_of(2, 8, [])[0] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert environments_of(2, 8, [])[0] == {"OMP_NUM_THREADS": "4"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,3")
    assert visible_gpus(2) == ["GPU-a", "3"]


def test_a_grid_in_two_processes_is_that_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(f"""
data: {{train: {make_shards(tmp_path / "train", (30,))}, val: {make_shards(tmp_path / "val", (9,))},
  test: {make_shards(tmp_path / "test", (12,))}, shuffle: 16, streams: 1, workers: 0}}
model: {{name: "{tiny_model(tmp_path / "model")}"}}
train: {{steps: 3, batch_size: 10, precision: fp32, log_every: 1}}
optim: {{lr: 2e-3, warmup: 1}}
eval: {{examples: 0}}
log: {{trackers: []}}
""")
    grid = {"losses": ["em", "infonce"], "batch_sizes": [10], "seeds": 1}
    results = tmp_path / "results.jsonl"
    found = compare(tmp_path / "tiny.yaml", **grid, output=tmp_path / "two", jobs=2, results=results, discard=True)
    said = capsys.readouterr().out
    assert "cell 2/2 " in said
    assert [result.error for result in found.results] == [None] * 2
    assert folders(tmp_path / "two") == []
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["threads"] for line in lines} == {1}
    assert all(line["cpu_seconds"] > 0 and line["seconds"] > 0 for line in lines)
    assert all(line["training"]["train/loss"] > 0 for line in lines)
    assert all("test/text_to_image_R@10" in line["metrics"] for line in lines)
    one = compare(tmp_path / "tiny.yaml", **grid, output=tmp_path / "one")
    assert [result.metrics for result in one.results] == [result.metrics for result in found.results]
