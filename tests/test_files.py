"""Files and folders that are whole or not there, whatever ends the process that makes them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from shards import left_by_killed

from vlcl.files import replace_text, replacing, replacing_file


class Refused(Exception):
    pass


def may(target: Path) -> None:
    """Any target may be replaced."""


def absent(target: Path) -> None:
    if target.exists():
        raise Refused


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def make(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a").write_text(text)


def test_several_targets_absent_empty_and_full(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "full", "before")
    targets = [tmp_path / "deep" / "absent", tmp_path / "empty", tmp_path / "full"]
    with replacing(targets, may) as folders:
        for folder in folders:
            make(folder, "new")
        assert contents(tmp_path / "full") == {"a": "before"}
    assert contents(tmp_path) == {"deep/absent/a": "new", "empty/a": "new", "full/a": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_all_as_it_was(error: type[BaseException], tmp_path: Path) -> None:
    make(tmp_path / "full", "before")

    def block() -> None:
        with replacing([tmp_path / "new", tmp_path / "full"], may) as folders:
            make(folders[0], "half")
            raise error

    with pytest.raises(error):
        block()
    assert contents(tmp_path) == {"full/a": "before"}
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_appears_in_the_meantime_is_asked_about_again(tmp_path: Path) -> None:
    def block() -> None:
        with replacing([tmp_path / "out"], absent) as (folder,):
            make(folder, "new")
            make(tmp_path / "out", "thesis")

    with pytest.raises(Refused):
        block()
    assert contents(tmp_path) == {"out/a": "thesis"}


def test_interrupted_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", "before")
    true = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".building"):
            raise KeyboardInterrupt
        return true(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), replacing([tmp_path / "out"], may) as (folder,):
        make(folder, "new")
    assert contents(tmp_path) == {"out/a": "before"}


def test_what_killed_processes_left(tmp_path: Path) -> None:
    """Half-built folders go and a set-aside one comes back; those of a running process, of another machine, or with
    another name stay."""
    target = tmp_path / "out"
    make(left_by_killed(target, "building"), "half")
    make(left_by_killed(target, "old"), "before")
    stay = [f".out.{socket.gethostname()}-{os.getppid()}.building", ".out.elsewhere-1.building", ".out.mine"]
    for name in stay:
        make(tmp_path / name, "stays")
    with pytest.raises(Refused), replacing([target], absent):
        pass
    assert contents(tmp_path) == {"out/a": "before"} | {f"{name}/a": "stays" for name in stay}
    make(left_by_killed(target, "old"), "older")
    with replacing([target], may) as (folder,):
        make(folder, "new")
    assert contents(tmp_path) == {"out/a": "new"} | {f"{name}/a": "stays" for name in stay}


def test_two_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replacing([tmp_path / "out"], may) as (first,):
        make(first, "first")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getppid)
            with replacing([tmp_path / "out"], may) as (second,):
                make(second, "second")
            assert contents(first) == {"a": "first"}
            assert contents(tmp_path / "out") == {"a": "second"}
    assert contents(tmp_path) == {"out/a": "first"}


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    make(tmp_path, "before")
    with replacing_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        assert (tmp_path / "a").read_text() == "before"
        temporary.write_text("whole")
    replace_text(str(tmp_path / "b"), "\u00e9")
    assert contents(tmp_path) == {"a": "whole", "b": "\u00e9"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_that_is_not_finished_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    make(tmp_path, "before")

    def block() -> None:
        with replacing_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        block()
    assert contents(tmp_path) == {"a": "before"}


def test_a_file_where_none_can_be(tmp_path: Path) -> None:
    make(tmp_path / "folder", "before")
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "folder", "text")
    for path in ("none/a", "none/", "folder/a/b", "folder/a/"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            replace_text(f"{tmp_path}/{path}", "text")
    assert contents(tmp_path) == {"folder/a": "before"}


def test_two_that_write_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replacing_file(tmp_path / "a") as first:
        first.write_text("first")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getppid)
            with replacing_file(tmp_path / "a") as second:
                second.write_text("second")
        assert (tmp_path / "a").read_text() == "second"
    assert contents(tmp_path) == {"a": "first"}


def test_half_a_file_of_a_killed_process_goes(tmp_path: Path) -> None:
    left_by_killed(tmp_path / "a", "tmp").write_text("half")
    stay = [f".a.{socket.gethostname()}-{os.getppid()}.tmp", ".a.elsewhere-1.tmp", ".a.tmp"]
    for name in stay:
        (tmp_path / name).write_text("stays")
    replace_text(tmp_path / "a", "whole")
    assert contents(tmp_path) == {"a": "whole"} | dict.fromkeys(stay, "stays")
