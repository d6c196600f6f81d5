"""`checkpoint.remote`: the copy of a run folder in a store. It is whole or known not to be, training never waits for it
or ends because of it, and a machine that has nothing else goes on from it with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from ranks import on_ranks
from test_reliability import logged, run, weights
from test_stores import s3

import vlcl.mirror
import vlcl.paths
import vlcl.train
from vlcl import distributed
from vlcl.checkpoint import complete_steps
from vlcl.compare.grid import Grid, check_grid, make_cells
from vlcl.config import load_config
from vlcl.data import stores
from vlcl.errors import UserError
from vlcl.mirror import WRITER, Mirror
from vlcl.sealed import META, records, seal

__all__ = ["s3"]
URL = "memory://bucket/run"


@pytest.fixture(scope="module")
def data(fifty_pairs: Path) -> Path:
    return fifty_pairs


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints of steps 2, 4 and 6, and no copy."""
    run(data, (output := tmp_path_factory.mktemp("whole") / "run"))
    return output


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    yield store
    if store.exists("/bucket"):
        store.rm("/bucket", recursive=True)


def there(url: str = URL) -> set[str]:
    """The files of the copy, and of checkpoints one name."""
    names = stores.files_below(url)
    return {name.split("/")[0] + "/" * (name.split("/")[1:] != []) for name in names} - {WRITER}


def steps_there(url: str = URL) -> list[int]:
    names = [name.split("/") for name in stores.files_below(url)]
    return sorted(int(name[0][5:]) for name in names if name[0].startswith("step-") and name[1] == META)


def stopping(before: int) -> Callable[[], None]:
    """The run ends with an error before this step. Returns what undoes it."""
    real = vlcl.train.train_step

    def step(run: Any, batch: Any) -> Any:
        if run.state.step + 1 == before:
            raise UserError("the machine is gone")
        return real(run, batch)

    vlcl.train.train_step = step
    return lambda: setattr(vlcl.train, "train_step", real)


def half_a_run(data: Path, output: Path, *more: str) -> None:
    """To step 4 of 6; then the machine is gone with its disk."""
    undo = stopping(6)
    try:
        with pytest.raises(UserError, match="the machine is gone"):
            run(data, output, f"checkpoint.remote={URL}", *more)
    finally:
        undo()
    shutil.rmtree(output)


def same_end(output: Path, whole: Path) -> None:
    assert logged(output) == [1, 2, 3, 4, 5, 6]
    one, other = output / "step-00000006", whole / "step-00000006"
    for path in [path for path in other.rglob("*") if path.is_file()]:
        assert (one / path.relative_to(other)).read_bytes() == path.read_bytes(), path


# A run and its copy


@pytest.mark.parametrize("in_background", ["true", "false"])
def test_an_empty_machine_goes_on_with_the_same_bits(
    memory: Any, data: Path, whole: Path, tmp_path: Path, in_background: str, capsys: pytest.CaptureFixture[str]
) -> None:
    half_a_run(data, tmp_path / "run", f"checkpoint.async_save={in_background}")
    assert {"config.yaml", "metrics.jsonl", "environment.json", "data.json"} <= there()
    assert steps_there() == [2, 4]
    assert not (tmp_path / "run").exists()
    run(data, tmp_path / "run", f"checkpoint.remote={URL}", "resume=auto")
    said = capsys.readouterr().out
    assert f"step-00000004 was fetched from {URL}" in said
    assert f"a copy of {tmp_path / 'run'} is kept at {URL}" in said
    assert said.splitlines()[-1] == f"copied to {URL}"
    same_end(tmp_path / "run", whole)
    assert steps_there() == [2, 4, 6]
    for path in (tmp_path / "run" / "step-00000006").rglob("*.*"):
        assert memory.cat_file(f"/bucket/run/{path.relative_to(tmp_path / 'run')}") == path.read_bytes()
    last = (tmp_path / "run/report.html").read_bytes()
    assert memory.cat_file("/bucket/run/report.html") == last  # written after the last checkpoint


def test_a_disk_that_is_behind_takes_the_newer_copy_and_one_that_is_ahead_stays(
    memory: Any, data: Path, whole: Path, tmp_path: Path
) -> None:
    undo = stopping(6)
    try:
        with pytest.raises(UserError, match="the machine is gone"):
            run(data, tmp_path / "run", f"checkpoint.remote={URL}")
    finally:
        undo()
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    run(data, tmp_path / "run", f"checkpoint.remote={URL}", "resume=latest")
    same_end(tmp_path / "run", whole)
    for step in (4, 6):
        stores.remove(f"{URL}/step-{step:08d}")
    run(data, tmp_path / "run", f"checkpoint.remote={URL}", "resume=latest")  # nothing left to train
    assert steps_there() == [2, 4, 6]


def two_ranks(data: Path, output: Path, expected: Path) -> list[int]:
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    run(data, expected)
    undo = stopping(6)
    with pytest.raises(UserError, match="the machine is gone"):
        run(data, output, f"checkpoint.remote={URL}")
    undo()
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(output)
    distributed.barrier()
    run(data, output, f"checkpoint.remote={URL}", "resume=auto")
    return steps_there()


def test_rank_0_sends_and_fetches_for_all(data: Path, tmp_path: Path) -> None:
    """Each process has a memory of its own: what rank 1 would send, it would keep."""
    assert on_ranks(2, two_ranks, data, tmp_path / "run", tmp_path / "whole") == [[2, 4, 6], []]
    same_end(tmp_path / "run", tmp_path / "whole")


def test_a_store_that_fails_ends_no_run(
    memory: Any, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real, full, failed = vlcl.mirror.put_files, [True], threading.Event()
    take = vlcl.train.train_step

    def step(run: Any, batch: Any) -> Any:
        assert run.state.step < 4 or failed.wait(20)
        return take(run, batch)

    def put_files(folder: Path, names: Any, url: str) -> None:
        if full[0]:
            failed.set()
            raise OSError("503 SlowDown key=SECRET&sig=SECRET")
        real(folder, names, url)

    monkeypatch.setattr(vlcl.mirror, "put_files", put_files)
    monkeypatch.setattr(vlcl.train, "train_step", step)
    with pytest.raises(UserError, match=r"is not copied in full to checkpoint.remote='memory://.*503.*resume=latest"):
        run(data, tmp_path / "run", f"checkpoint.remote={URL}")
    said = capsys.readouterr().out
    assert said.count("Training goes on; it is tried again with the next checkpoint") == 1
    assert "done: 6 steps" in said
    assert steps_there() == []
    same_end(tmp_path / "run", whole)
    full[0] = False
    run(data, tmp_path / "run", f"checkpoint.remote={URL}", "resume=latest")
    assert steps_there() == [2, 4, 6]


def test_a_half_of_a_checkpoint_is_none(
    memory: Any, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What a kill in the middle of sending step 4 leaves: any of its files, and not the last one."""
    real = vlcl.mirror.put_files

    def put_files(folder: Path, names: Any, url: str) -> None:
        real(folder, sorted(names)[:3] if "00000004" in url else names, url)
        if "00000004" in url:
            raise OSError("killed")

    monkeypatch.setattr(vlcl.mirror, "put_files", put_files)
    half_a_run(data, tmp_path / "run")
    assert steps_there() == [2]
    assert "step-00000004/" in there()
    monkeypatch.undo()
    run(data, tmp_path / "run", f"checkpoint.remote={URL}", "resume=auto")
    assert "step-00000002 was fetched" in capsys.readouterr().out
    same_end(tmp_path / "run", whole)
    assert steps_there() == [2, 4, 6]


def test_what_is_not_as_it_was_written_is_passed_over(
    memory: Any, data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, tmp_path / "run", f"checkpoint.remote={URL}")
    shutil.rmtree(tmp_path / "run")
    model = "/bucket/run/step-00000006/model.safetensors"
    bytes_ = bytearray(memory.cat_file(model))
    bytes_[-1] ^= 1
    memory.pipe_file(model, bytes(bytes_))
    run(data, tmp_path / "run", f"checkpoint.remote={URL}", "resume=auto")
    said = capsys.readouterr().out
    passed = "is passed over: step-00000006/model.safetensors is damaged: it does not have the checksum"
    assert f"{URL}/step-00000006 {passed}" in said
    assert "step-00000004 was fetched" in said
    same_end(tmp_path / "run", whole)
    assert steps_there() == [2, 4, 6]
    assert "old-step-00000006/" in there()  # not lost, as in a run folder
    shutil.rmtree(tmp_path / "run")
    for step in (2, 4, 6):
        memory.pipe_file(f"/bucket/run/step-{step:08d}/{META}", b'{"step": 6}')
    with pytest.raises(UserError, match=r"(?s)no checkpoint to go on from.*00000006 is passed.*00000002 is passed"):
        run(data, tmp_path / "run", f"checkpoint.remote={URL}", "resume=auto")  # and no new run in its place


# Told before anything is trained


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/run", "checkpoint.remote: s3://bucket/run is read by the package .*pip install"),
        ("hf://models/me/run", r"checkpoint.remote: hf://models/me/run cannot be written to. Give .*\(s3, "),
        ("https://h.org/run", "checkpoint.remote: https://h.org/run cannot be written to"),
        ("runs/copy", "checkpoint.remote: 'runs/copy' is no file here"),
        ("memory://bucket/run-*", "checkpoint.remote: .* is no place for files"),
        ("memory://", "checkpoint.remote: .* is no place for files"),
    ],
)
def test_addresses_that_nothing_is_written_to(address: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlcl.data.urls.find_spec", lambda name: None if name == "s3fs" else True)
    with pytest.raises(UserError, match=said):
        vlcl.paths.check_remote(address)
    with pytest.raises(UserError, match=r"is an address.*checkpoint.remote=ADDRESS .of the run. and resume=latest"):
        vlcl.paths.check_resume("s3://bucket/run/step-00000002")


def test_a_store_that_cannot_be_written_is_told_at_the_start(
    memory: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    for name, said in (("pipe_file", "cannot be written"), ("ls", "cannot be used")):
        with monkeypatch.context() as patch:
            patch.setattr(type(memory), name, denied)
            with pytest.raises(UserError) as raised:
                run(data, tmp_path / "run", f"checkpoint.remote={URL}", "resume=auto")
        assert f"checkpoint.remote='{URL}' {said}" in str(raised.value)
        assert "access is denied" in str(raised.value)
        assert "checkpoint.remote=null" in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_an_address_that_holds_a_run_is_refused(memory: Any, data: Path, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/run/thesis.txt", b"mine")
    run(data, tmp_path / "run", f"checkpoint.remote={URL}")
    before = stores.files_below(URL)
    for more in ((), (f"resume={tmp_path / 'run/step-00000002'}",)):
        with pytest.raises(UserError, match=r"checkpoint.remote='memory://.*' holds a run already. .*resume=latest"):
            run(data, tmp_path / "other", f"checkpoint.remote={URL}", *more)
    assert stores.files_below(URL) == before
    assert not (tmp_path / "other").exists()
    more = ("train.overwrite=true", "checkpoint.keep=1", "train.steps=2")
    run(data, tmp_path / "other", f"checkpoint.remote={URL}", *more)
    assert steps_there() == [2]
    assert memory.cat_file("/bucket/run/thesis.txt") == b"mine"
    assert len(memory.cat_file("/bucket/run/metrics.jsonl").splitlines()) == 2


def test_cells_of_a_comparison_do_not_share_an_address(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{train: x}}\ncheckpoint: {{remote: {URL}}}\n")
    grid = Grid(str(config), ("em",), (16,), (0,), (1e-3,), None, str(tmp_path), ())
    assert [cell.config.checkpoint.remote for cell in make_cells(grid, load_config(config))] == [None]
    with pytest.raises(UserError, match=r"vlcl compare sets checkpoint.remote itself; cells are folders here"):
        check_grid(replace(grid, overrides=(f"checkpoint.remote={URL}",)))


# The copy alone: folders with sums in place of trained ones


def checkpoint(folder: Path, step: int, content: bytes = b"") -> None:
    path = folder / f"step-{step:08d}"
    shutil.rmtree(path, ignore_errors=True)
    (path / "table").mkdir(parents=True)
    for name in ("model.safetensors", "table/a.safetensors"):
        (path / name).write_bytes(content or name.encode() * step)
    seal(path, {"step": step}, records(path, ["model.safetensors", "table/a.safetensors"]))


class Copied:
    """A run folder whose copy is brought up to date by hand."""

    def __init__(self, folder: Path, resume: str | None = None, url: str = URL, **rule: Any) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.mirror = Mirror(folder, url, **{"keep": 2, "keep_every": None, "keep_best": None} | rule)
        self.mirror.open(resume, False)

    def send(self, *steps: int, back: int | None = None, content: bytes = b"") -> None:
        for step in steps:
            checkpoint(self.folder, step, content)
        self.mirror._send_all(back)


def test_what_is_kept_there(memory: Any, tmp_path: Path) -> None:
    copied = Copied(tmp_path / "run", keep_every=4, keep_best="val/text_to_image_R@1")
    scores = ({"step": step, "val/text_to_image_R@1": 0.9 if step == 3 else 0.1} for step in range(1, 10))
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    for step in range(1, 10):
        copied.send(step)
        for old in [path for path in complete_steps(tmp_path / "run") if path.name[-1] != str(step)]:
            shutil.rmtree(old)
    assert steps_there() == [3, 4, 8, 9]  # the best, the multiples, the newest two
    checkpoint(tmp_path / "run", 8)
    checkpoint(tmp_path / "run", 7)
    copied.send(10)
    assert steps_there() == [3, 4, 7, 8, 9, 10]  # and what is still here


def test_a_branch_that_is_left_is_set_aside_there(memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/run/step-00000008/model.safetensors", b"a half")
    copied = Copied(tmp_path / "run", "auto", keep=9)
    copied.send(2, 4)
    copied.mirror.set_aside_after(4)
    copied.send(6)
    assert there() == {f"step-0000000{step}/" for step in (2, 4, 6)}
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"run/step-{step:08d}")
    old = memory.cat_file(f"/bucket/run/step-00000006/{META}")
    copied.send(6, back=2, content=b"another branch")
    assert steps_there() == [2, 6]
    assert {"old-step-00000004/", "old-step-00000006/"} <= there()
    assert memory.cat_file(f"/bucket/run/old-step-00000006/{META}") == old
    assert memory.cat_file("/bucket/run/step-00000006/model.safetensors") == b"another branch"


def test_the_last_to_start_has_the_address(memory: Any, tmp_path: Path) -> None:
    first = Copied(tmp_path / "first")
    first.send(2)
    second = Copied(tmp_path / "second", resume="auto")
    with pytest.raises(UserError, match=r"another run sends its files there .*second.*; nothing more of this"):
        first.send(4)
    assert steps_there() == [2]
    assert second.mirror.fetch(2) is None
    second.send(3)
    assert steps_there() == [2, 3]


def test_only_what_has_changed_is_sent(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    real = type(memory)._open

    def opened(self: Any, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "wb":
            sent.append(path.removeprefix("/bucket/run/"))
        return real(self, path, mode, **more)

    copied = Copied(tmp_path / "run")
    (tmp_path / "run/tensorboard").mkdir()
    (tmp_path / "run/tensorboard/events").write_bytes(b"1")
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    (tmp_path / "run/.lock").write_text("not this")
    (tmp_path / "run/thesis.txt").write_text("nor this")
    monkeypatch.setattr(type(memory), "_open", opened)
    copied.send(2)
    assert sorted(sent[:2]) == ["metrics.jsonl", "tensorboard/events"]
    assert sent[-1] == f"step-00000002/{META}"
    assert len(sent) == 5
    sent.clear()
    (tmp_path / "run/metrics.jsonl").write_text("{}\n{}\n")
    copied.send(4)
    assert sent[0] == "metrics.jsonl"
    assert {name.split("/")[0] for name in sent[1:]} == {"step-00000004"}


def test_training_does_not_wait_and_the_newest_goes_first(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, going, real = [], threading.Event(), vlcl.mirror.put_files

    def put_files(folder: Path, names: Any, url: str) -> None:
        assert going.wait(20)
        sent.append(folder.name)
        real(folder, names, url)

    monkeypatch.setattr(vlcl.mirror, "put_files", put_files)
    said: list[str] = []
    copied = Copied(tmp_path / "run", keep=9)
    with copied.mirror.at_work(said.append):
        for step in (1, 2, 3):  # while the first is sent
            checkpoint(tmp_path / "run", step)
            copied.mirror.send()
            while step == 1 and copied.mirror.sending is None:
                pass
        assert copied.mirror.sending == tmp_path / "run/step-00000001"  # what prune spares meanwhile
        going.set()
    assert sent == ["step-00000001", "step-00000003", "step-00000002"]
    assert said[-1] == f"copied to {URL}"
    assert copied.mirror.sending is None


def test_a_second_ctrl_c_waits_for_no_store(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going = threading.Event()
    monkeypatch.setattr(vlcl.mirror, "put_files", lambda *_: going.wait(20))
    copied, said = Copied(tmp_path / "run"), []
    checkpoint(tmp_path / "run", 2)
    with pytest.raises(KeyboardInterrupt), copied.mirror.at_work(said.append):
        raise KeyboardInterrupt
    assert len(said) == 1  # where the copy is, and nothing of an end
    going.set()


def test_names_there_lead_nowhere_else(memory: Any, tmp_path: Path) -> None:
    """Whoever can write to the store can compute sums as well."""
    outside = tmp_path / "outside"
    for name in ("../../outside", str(outside), "table/../../../outside", "a\0b"):
        folder = tmp_path / "evil"
        folder.mkdir(exist_ok=True)
        seal(folder, {"step": 2}, {name: {"bytes": 1, "sha256": "0"}})
        memory.pipe_file(f"/bucket/run/step-00000002/{META}", (folder / META).read_bytes())
        memory.pipe_file("/bucket/outside", b"x")
        copied = Copied(tmp_path / "run", resume="auto")
        problem = copied.mirror.fetch(2)
        assert problem is not None, name
        assert "is passed over" in problem
        assert complete_steps(tmp_path / "run") == []
        assert not outside.exists()
    for name in ("step-12345678901234567890x", "step-000000002", "step-" + 8 * "\u0661"):  # a digit, too
        memory.pipe_file(f"/bucket/run/{name}/meta.json", b"{}")
    assert Copied(tmp_path / "run", resume="auto").mirror.steps == [2]
    memory.pipe_file("/bucket/run/step-*/meta.json", b"{}")  # no glob is made of it
    copied = Copied(tmp_path / "run", resume="auto")
    copied.mirror.clear()
    assert "step-*/" in there()
    assert not there() & {"step-00000002/", "step-000000002/"}


def test_a_copy_that_has_no_room_is_told_before_it_is_fetched(memory: Any, tmp_path: Path, monkeypatch: Any) -> None:
    Copied(tmp_path / "run").send(2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3))
    copied = Copied(tmp_path / "other", resume="auto")
    with pytest.raises(UserError, match=r"has room for 0.0 GB.*train.output=FOLDER"):
        copied.mirror.fetch(2)


def test_the_same_on_s3(s3: Any, tmp_path: Path) -> None:
    """The calls that memory takes, as a server understands them."""
    with pytest.raises(UserError, match=r"checkpoint.remote='s3://nowhere/run' cannot be written: it is not there"):
        Copied(tmp_path / "run", url="s3://nowhere/run")
    s3.create_bucket(Bucket="mirror")
    url = "s3://mirror/runs/one"
    copied = Copied(tmp_path / "run", url=url, keep=1)
    (tmp_path / "run/tensorboard").mkdir()
    (tmp_path / "run/tensorboard/events").write_bytes(b"1")
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    for step in (2, 4):
        copied.send(step)
    shutil.rmtree(tmp_path / "run/step-00000002")
    copied.send(6, content=bytes(1 << 20))
    assert steps_there(url) == [4, 6]
    again = Copied(tmp_path / "again", resume="auto", url=url)
    assert again.mirror.steps == [4, 6]
    assert again.mirror.fetch(6) is None
    assert (tmp_path / "again/step-00000006/table/a.safetensors").read_bytes() == bytes(1 << 20)
    assert (tmp_path / "again/tensorboard/events").read_bytes() == b"1"
    again.mirror.set_aside_after(4)
    assert steps_there(url) == [4]
    assert "old-step-00000006/" in there(url)
    s3.put_object(Bucket="mirror", Key="runs/one/thesis.txt", Body=b"mine")
    again.mirror.clear()
    assert there(url) == {"thesis.txt"}
    with pytest.raises(UserError, match="another run sends its files there"):
        copied.send(8)


def test_weights_of_the_copy_are_a_model(memory: Any, data: Path, whole: Path, tmp_path: Path) -> None:
    half_a_run(data, tmp_path / "run", "checkpoint.keep=1")
    memory.get("/bucket/run/", str(tmp_path / "fetched"), recursive=True)
    fetched = weights(tmp_path / "fetched" / "step-00000004")
    for name, x in weights(whole / "step-00000004").items():
        assert torch.equal(fetched[name], x), name
