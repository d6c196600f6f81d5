"""A full disk is called that, with the folder: /dev/full refuses every byte, as a disk does that has none left."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vlcl.compare.report
import vlcl_data_prep.verify
from vlcl.errors import UserError, reason
from vlcl.files import replace_text
from vlcl_eval.results import append

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="has no /dev/full")


def test_words_for_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(OSError(errno.ENOSPC, "No space left on device", "x")) == "disk full: no space left"
    assert reason(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path) == f"disk full: no space left in {tmp_path}"
    assert reason(OSError(errno.EIO, "Input/output error", "x"), tmp_path) == "[Errno 5] Input/output error: 'x'"
    assert reason(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path).startswith("disk full")
    torch_says = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nand more")
    assert reason(torch_says, tmp_path) == str(torch_says).splitlines()[0]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 4096}))
    assert reason(torch_says, tmp_path) == f"disk full: no space left in {tmp_path}"


def test_results_of_evaluations(tmp_path: Path) -> None:
    for file in ("results.jsonl", "retrieval.jsonl"):
        (tmp_path / file).symlink_to(FULL)
        with pytest.raises(UserError, match=rf"{tmp_path / file} cannot be written: disk full: .*make room"):
            append(tmp_path, [{"score": 1.0}], file)


def test_verify_and_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def replacing_file(path: str | Path) -> Iterator[Path]:
        yield FULL

    monkeypatch.setattr(vlcl_data_prep.verify, "replacing_file", replacing_file)
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/problems.tsv: disk full"):
        vlcl_data_prep.verify._write_table(str(tmp_path / "problems.tsv"), [])

    monkeypatch.setattr(vlcl.compare.report, "replace_text", lambda path, text: FULL.write_text(text))
    monkeypatch.setattr(vlcl.compare.report, "page", lambda comparison: "x")
    comparison = type("Comparison", (), {"folder": tmp_path})
    with pytest.raises(UserError, match=rf"{tmp_path} could not be written: disk full"):
        vlcl.compare.report.write_all(comparison)  # pyright: ignore[reportArgumentType]


def test_a_file_that_takes_the_place_of_another_names_itself(tmp_path: Path) -> None:
    """Not the hidden one that was written."""
    import resource

    (tmp_path / "a").write_text("before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/a'"):
            replace_text(tmp_path / "a", "after" * 9999)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]
