"""What all tests share: few threads (one in each of several workers), no network for hubs, one tiny run, exports."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from export_models import Exports

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# With several workers each file is one worker's: those that take longest start first, or the end would wait for one.
LONG = ("test_train", "test_export", "test_export_families", "test_compare")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of 8 steps on 50 pairs with 20 held out, checkpoints of steps 4 and 8 and an average of the weights.

    One for all tests, of all workers: a test that changes it, or leaves something in it, takes a copy (`own_run`).
    """
    from filelock import FileLock
    from shards import train_tiny_run

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny_run"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "whole").exists():
            train_tiny_run(folder)
            (folder / "whole").touch()
    before = _state(folder)
    yield folder / "tiny"
    assert _state(folder) == before, "a test changed the run that all share; it needs a copy: own_run"


@pytest.fixture
def own_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of tiny_run for one test to change."""
    return Path(shutil.copytree(tiny_run, tmp_path / "own" / tiny_run.name))


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """A tiny run, tiny models and their exported folders, each made once, at the first test that asks."""
    from export_models import Exports  # here: it loads torch

    return Exports(tmp_path_factory.mktemp("exports"))
