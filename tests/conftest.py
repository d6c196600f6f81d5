"""What all tests share: two threads at most (one in each of several workers), no network for model hubs, exports."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from export_models import Exports

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """A tiny run, tiny models and their exported folders, each made once, at the first test that asks."""
    from export_models import Exports  # here: it loads torch

    return Exports(tmp_path_factory.mktemp("exports"))
