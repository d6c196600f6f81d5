"""Checkpoints that are written in the background: the same bytes, while training goes on, and as safe."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_reliability import logged, run

import vlcl.saving
import vlcl.train
from vlcl import distributed
from vlcl.checkpoint import complete_steps
from vlcl.errors import UserError

EMA = ("train.ema=0.9", "loss.bank=20")  # all that a checkpoint may hold


@pytest.fixture(scope="module")
def data(fifty_pairs: Path) -> Path:
    return fifty_pairs


@contextmanager
def slow(before: Callable[[Path], None]) -> Iterator[None]:
    """Something happens before each file of tensors is written."""
    real = vlcl.saving.save_file

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        before(path)
        real(tensors, path)

    vlcl.saving.save_file = save_file  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        vlcl.saving.save_file = real


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for step in complete_steps(output)
            for path in step.rglob("*") if path.is_file()}  # fmt: skip


def both_ways(data: Path, output: Path) -> None:
    if "RANK" in os.environ:
        os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    run(data, output / "sync", *EMA, "checkpoint.async_save=false")
    with slow(lambda path: time.sleep(0.3)):  # by then the weights are those of a later step
        run(data, output / "async", *EMA)


@pytest.mark.parametrize("world", [1, 2])
def test_the_bytes_are_those_of_a_save_that_training_waits_for(data: Path, tmp_path: Path, world: int) -> None:
    on_ranks(2, both_ways, data, tmp_path) if world == 2 else both_ways(data, tmp_path)
    expected = contents(tmp_path / "sync")
    assert sum(name.endswith("ema.safetensors") for name in expected) == 3
    assert sum(".safetensors" in name and "/table/" in name for name in expected) == 3 * (world + 1)
    assert contents(tmp_path / "async") == expected


def test_training_goes_on_meanwhile_and_what_is_not_finished_is_not_there(data: Path, tmp_path: Path) -> None:
    going, seen = threading.Event(), []
    real = vlcl.train.train_step

    def step(run: Any, batch: Any) -> Any:
        if run.state.step == 3:  # two are taken since the save of step 2 began
            seen.extend([run.saver.busy, run.saver.written, complete_steps(run.folder)])
            seen.append([path.name for path in run.folder.glob(".step-*.tmp")])
            going.set()
        return real(run, batch)

    vlcl.train.train_step = step
    try:
        with slow(lambda path: None if going.wait(20) else pytest.fail("training waits for the save")):
            run(data, tmp_path / "run")
    finally:
        vlcl.train.train_step = real
    assert seen == [True, False, [], [".step-00000002.tmp"]]
    assert [path.name[-1] for path in complete_steps(tmp_path / "run")] == ["2", "4", "6"]
    assert list((tmp_path / "run").glob(".step-*")) == []


def full(step: int, rank: int, path: Path) -> None:
    if f"step-{step:08d}" in str(path) and distributed.rank() == rank:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_write_that_fails_ends_the_run_and_leaves_the_last_good_one(data: Path, tmp_path: Path) -> None:
    with (
        slow(lambda path: full(4, 0, path)),
        pytest.raises(UserError, match=r"step 4 could not be written to .*: disk full: no space left in "),
    ):
        run(data, tmp_path / "run", "train.steps=20")
    assert [path.name[-1] for path in complete_steps(tmp_path / "run")] == ["2"]
    assert list((tmp_path / "run").glob(".step-*")) == []
    assert logged(tmp_path / "run")[-1] < 8  # told as soon as it was known, not when the run ends


def fails_on_rank_1(data: Path, output: Path) -> str:
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    with slow(lambda path: full(4, 1, path)), pytest.raises(UserError) as raised:
        run(data, output, "train.steps=20")
    return str(raised.value)


def test_all_ranks_hear_of_a_write_that_failed_on_one(data: Path, tmp_path: Path) -> None:
    said = on_ranks(2, fails_on_rank_1, data, tmp_path / "run")
    assert said[0] == said[1]
    assert "disk full: no space left in" in said[0]
    assert "The last good one is" in said[0]
    assert [path.name[-1] for path in complete_steps(tmp_path / "run")] == ["2"]


def test_a_run_that_fails_while_it_saves_keeps_what_it_saved(data: Path, tmp_path: Path) -> None:
    real = vlcl.train.train_step

    def step(run: Any, batch: Any) -> Any:
        if run.state.step == 2:
            raise UserError("something else")
        return real(run, batch)

    vlcl.train.train_step = step
    try:
        with slow(lambda path: time.sleep(0.2)), pytest.raises(UserError, match="something else"):
            run(data, tmp_path / "run")
    finally:
        vlcl.train.train_step = real
    assert [path.name[-1] for path in complete_steps(tmp_path / "run")] == ["2"]
    run(data, tmp_path / "run", "resume=latest")
    assert logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
