"""What all tests share: few threads (one in each of several workers), no network for hubs, what is made once."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

from vlcl_data_prep.mnist import build_mnist

if TYPE_CHECKING:
    from export_models import Exports

    from vlcl.metrics import Figure
    from vlcl.report.page import Records

# Before torch is imported, which none of the modules above does.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # not the 2 that it has from the process that started it
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# With several workers each file is one worker's, and those of exports are one's together, as they share `exports`.
# What takes longest starts first, or the end would wait for it.
LONG = (
    "test_train", "test_export", "test_compare", "test_reliability", "test_watch", "test_api", "test_pairwise_triton",
    "test_remote",
)  # fmt: skip


gc.disable()  # while the tests are imported, and torch and transformers with them: a fifth of that time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: next((n for n, x in enumerate(LONG) if item.path.stem.startswith(x)), len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As --dist loadfile; xdist 3.8 does not see its own groups under pytest 9."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "exports" if Path(file).stem.startswith("test_export") else file

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def figures_drawn_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of the runs of this process show the figures that its first run drew: 15 of them take most of the time of
    a run of few steps. Tests of the report draw theirs."""
    if "vlcl.train" in sys.modules and not request.path.stem.startswith("test_report"):
        monkeypatch.setattr("vlcl.report.page.draw", _draw_once)


@pytest.fixture(autouse=True)
def vocabulary_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's tokenizer unpacks and sorts 49,000 entries, for each model that is built."""
    if factory := sys.modules.get("open_clip.factory"):
        monkeypatch.setattr(factory, "SimpleTokenizer", partial(_made, factory.SimpleTokenizer))


def _made(tokenizer: Callable[..., object], **settings: object) -> object:
    name = repr(sorted(settings.items()))
    if name not in _tokenizers:
        _tokenizers[name] = tokenizer(**settings)
    return _tokenizers[name]


_tokenizers: dict[str, object] = {}
_drawn: dict[str, str] = {}


def _draw_once(figure: Figure, records: Records) -> str | None:
    from vlcl.report.figures import draw, points_of

    if not any(points_of(records, metric.name)[0] for metric in figure.metrics):
        return None
    if figure.title not in _drawn:
        _drawn[figure.title] = draw(figure, records) or ""
    return _drawn[figure.title]


@contextmanager
def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Iterator[Path]:
    """A folder that `make` fills for the tests of all workers; a test that changed it makes the session fail."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    whole = folder.with_suffix(".whole")
    with FileLock(folder.with_suffix(".lock")):
        if not whole.exists():
            make(folder)
            whole.touch()
    before = _state(folder)
    yield folder
    assert _state(folder) == before, f"a test changed {folder}, which all share: it needs a copy"


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`vlcl data mnist --wds`: the digits in both formats."""
    with made_once(tmp_path_factory, "digits", partial(build_mnist, wds=True)) as folder:
        yield folder


@pytest.fixture(scope="session")
def fifty_pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """50 pairs in two shards in `train`, and a tiny model to train in `model`."""
    from shards import make_shards, tiny_model

    def make(folder: Path) -> None:
        make_shards(folder / "train", (20, 30))
        tiny_model(folder / "model")

    with made_once(tmp_path_factory, "fifty_pairs", make) as folder:
        yield folder


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """A tiny run, tiny models and their exported folders, each made once, at the first test that asks."""
    from export_models import Exports  # here: it loads torch

    return Exports(tmp_path_factory.mktemp("exports"))
