"""The short form of `make chaos`: a try of what no other test has, and that a try can fail."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from chaos import files, training
from chaos.__main__ import BEGIN, END, PAGE, faults, table
from chaos.training import STEPS, Found, Place
from chaos.victims import Fault, command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("chaos"))


def well(found: Found) -> bool:
    return not (found.lost or found.hang or found.traceback) and found.outcome != "too late"


def test_a_rank_whose_other_is_killed_says_so(place: Place, tmp_path: Path) -> None:
    fault = Fault(1, signal.SIGKILL, tmp_path / "run" / "metrics.jsonl", line=4)
    first = command(tmp_path, place.arguments(tmp_path / "run", "train.timeout=20"), 2, fault)
    assert first.codes == [2, -signal.SIGKILL], first.said
    assert "error: another rank, or the network to it, has gone (" in first.said
    found = training.gone_on(place, tmp_path, 2, first, "", clear=True)
    assert well(found), found


def test_a_kill_in_the_middle_of_a_save(place: Place, tmp_path: Path) -> None:
    assert place.events(1, 0) > 10  # files, syncs, half-written weights; often an old checkpoint, too
    found = training.kill_in_save(place, tmp_path, random.Random(0), 1, 1, tries=2)
    assert well(found), found


@pytest.mark.parametrize("try_", [1, 2])
def test_a_full_disk_in_index_and_pack(place: Place, tmp_path: Path, try_: int) -> None:
    found = files.full_disk_elsewhere(place, tmp_path, random.Random(1), try_)
    assert well(found), found


def test_a_full_disk_in_verify(place: Place, tmp_path: Path) -> None:
    found = files.full_disk_elsewhere(place, tmp_path, random.Random(1), 0, ["data verify"])
    assert well(found), found


def test_several_who_write_the_same(place: Place, tmp_path: Path) -> None:
    for name, attempt in (("index", files.three_indexers), ("scores", files.two_evaluations)):
        found = attempt(place, tmp_path / name, random.Random(0), 0)
        assert well(found), found


def test_what_is_lost_is_noticed(place: Place, tmp_path: Path) -> None:
    run = Path(shutil.copytree(place.whole(1), tmp_path / "run"))
    assert training.differs(run, place.whole(1)) == ""
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("".join(lines.splitlines(keepends=True)[:-1]))
    assert training.differs(run, place.whole(1)) == "other losses"
    meta = run / f"step-{STEPS:08d}" / "meta.json"
    content = json.loads(meta.read_text())
    content["files"]["model.safetensors"]["sha256"] = "0"
    meta.write_text(json.dumps(content))
    assert training.differs(run, place.whole(1)) == "other bits in model.safetensors"
    meta.unlink()
    assert "model.safetensors" in training.differs(run, place.whole(1))


def test_the_page_has_all_faults_and_what_was_found(place: Place) -> None:
    page = PAGE.read_text()
    rows = page[page.index(BEGIN) : page.index(END)].splitlines()
    named = [row.split(" | ")[0].removeprefix("| ") for row in rows if row.startswith("| ")]
    assert named[1:] == [name for name, _, _ in faults(place, 1.0)]
    line = {"fault": "f", "outcome": "a|b", "lost": "", "hang": False, "traceback": True}
    assert list(table([line, line], ["e", "f"]))[-1] == "| f | 2 | a/b | 0 | 0 | 2 |"
