"""What other tests rely on: ranks in order, in fresh processes, that end in time where they fail; threads."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import on_ranks

from vlcl import distributed


def leave_traces(value: int) -> tuple[int, int, float, bool]:
    """Sum of `value` + rank over the ranks, and the state that a rank begins with."""
    seed, fresh = torch.initial_seed(), "VLCL_TRACE" not in os.environ and torch.get_default_dtype() == torch.float32
    torch.manual_seed(value)
    torch.set_default_dtype(torch.float64)
    os.environ["VLCL_TRACE"] = "1"
    total = distributed.all_sum(torch.tensor([value + distributed.rank()]))
    return int(total), distributed.rank(), seed, fresh


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_meet_and_leave_nothing_to_the_next(world: int) -> None:
    for value in (10, 20):
        results = on_ranks(world, leave_traces, value)
        assert [rank for _, rank, _, _ in results] == list(range(world))
        assert {total for total, _, _, _ in results} == {world * value + sum(range(world))}
        assert all(fresh and seed not in (10, 20) for _, _, seed, fresh in results)


def test_they_have_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("a", "b"):
        monkeypatch.setenv("VLCL_TRACE", value)
        assert on_ranks(2, os.getenv, "VLCL_TRACE") == [value] * 2


def gather_strictly() -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return distributed.gather(torch.tensor([distributed.rank()])).tolist()


def test_gathering_warns_of_nothing() -> None:
    """As torch does of an older name of its own, once a rank."""
    assert on_ranks(2, gather_strictly) == [[0, 1]] * 2


def fail(how: str) -> None:
    if distributed.rank() == 1:
        if how == "raises":
            raise ValueError("rank 1 has a problem")
        if how == "expects an error":
            with pytest.raises(ValueError):
                pass
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            time.sleep(100)
    time.sleep(0.5)  # rank 1 is first
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raises", "ValueError: rank 1 has a problem"),
        ("expects an error", "DID NOT RAISE"),
        ("dies", "rank 1 of 2, fail: .* SIGKILL"),
        ("hangs", r"(?s)rank . of 2, fail: .*test_ranks.py.* in fail"),
    ],
)
def test_a_rank_that_fails_ends_the_call_and_is_told(how: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LIMIT", 4.0 if how == "hangs" else 60.0)
    start = time.monotonic()
    with pytest.raises(Exception, match=told):
        on_ranks(2, fail, how)
    assert time.monotonic() - start < 60
    assert on_ranks(2, distributed.rank) == [0, 1]


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="for several workers: pytest -n 2")
def test_a_worker_has_one_thread() -> None:
    assert torch.get_num_threads() == 1
