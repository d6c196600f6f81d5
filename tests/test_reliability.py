"""A run that looks after itself: signals, one writer a folder, damaged checkpoints, starts that failed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from shards import make_shards, tiny_model

import vlcl.lock
from vlcl import distributed
from vlcl.checkpoint import complete_steps, load_model
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.lock import LOCK, FolderLock
from vlcl.sealed import META, check, read_meta, seal
from vlcl.stop import Stop
from vlcl.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder / "train", (20, 30))
    tiny_model(folder / "model")
    return folder


def settings(data: Path, output: Path, *more: str) -> list[str]:
    return [
        f"data.train={data / 'train'}", f"model.name=local-dir:{data / 'model'}", f"train.output={output}",
        "train.steps=6", "train.batch_size=10", "train.log_every=1", "optim.warmup=2", "checkpoint.every=2",
        "checkpoint.keep=9", "data.workers=0", "data.streams=2", "data.shuffle=16", "log.trackers=[]",
        "train.precision=fp32", *more,
    ]  # fmt: skip


def run(data: Path, output: Path, *more: str) -> dict[str, float]:
    return train(load_config(None, settings(data, output, *more)))


def logged(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_model(str(output)).encoder.clip.state_dict()


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints of steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(data, output)
    return output


def signal_at(step: int, number: int, rank: int = 0) -> Callable[[], None]:
    """Make this process get a signal in its optimizer step `step`. Returns what undoes it."""
    real, taken = torch.optim.AdamW.step, [0]

    def stepping(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        taken[0] += 1
        if taken[0] == step and distributed.rank() == rank:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    torch.optim.AdamW.step = stepping  # pyright: ignore[reportAttributeAccessIssue]
    return lambda: setattr(torch.optim.AdamW, "step", real)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_loses_nothing(
    data: Path, whole: Path, tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    handler, undo = signal.getsignal(number), signal_at(3, number)
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as ended:
            run(data, tmp_path / "run")
    finally:
        undo()
    if number != signal.SIGINT:
        assert isinstance(ended.value, SystemExit)
        assert ended.value.code == 0
    assert signal.getsignal(number) == handler
    assert complete_steps(tmp_path / "run")[-1].name == "step-00000003"
    assert (tmp_path / "run" / "report.html").is_file()
    said = capsys.readouterr().out
    assert f"stopped by {number.name} after step 3 of 6; to go on: the same command with resume=latest" in said
    assert not (tmp_path / "run" / LOCK).exists()
    run(data, tmp_path / "run", "resume=auto")
    assert logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    for name, x in weights(whole).items():
        assert torch.equal(weights(tmp_path / "run")[name], x), name


def test_a_second_ctrl_c_stops_at_once() -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # what a launcher hands on
        assert stop.asked == signal.SIGINT
        stop._when -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_may_train_without_handlers() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with Stop():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def signalled_ranks(data: Path, output: Path) -> str:
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    signal_at(3, signal.SIGTERM, rank=1)
    try:
        run(data, output, "checkpoint.every=100")
        return "returned"
    except SystemExit as ended:
        return f"exit {ended.code}"


def test_a_signal_to_one_of_two_ranks_stops_both_at_one_step(data: Path, tmp_path: Path) -> None:
    ended = on_ranks(2, signalled_ranks, data, tmp_path / "run")
    assert list(ended) == ["returned", "exit 0"]
    assert [path.name for path in complete_steps(tmp_path / "run")] == ["step-00000003"]


def test_auto_begins_where_nothing_is_and_goes_on_where_something_is(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(data, output, "resume=auto", "train.steps=3")
    run(data, output, "resume=auto")
    assert logged(output) == [1, 2, 3, 4, 5, 6]
    for folder in complete_steps(output):  # killed before its first checkpoint
        shutil.rmtree(folder)
    run(data, output, "resume=auto", "train.steps=2")
    assert logged(output) == [1, 2]
    shutil.move(output / "step-00000002", output / "old-step-00000002")
    with pytest.raises(UserError, match="no complete checkpoint to go on from"):
        run(data, output, "resume=auto")


def test_a_start_that_failed_blocks_no_other(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb"):
        run(data, tmp_path / "run", "log.trackers=[wandb]")
    run(data, tmp_path / "run", "train.steps=1")
    with pytest.raises(UserError):
        run(data, tmp_path / "other", "train.batch_size=5000")
    assert not (tmp_path / "other").exists()


def test_logs_without_a_checkpoint_are_not_deleted_unasked(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", "train.steps=1")
    shutil.rmtree(tmp_path / "run" / "step-00000001")
    with pytest.raises(UserError, match=r"holds a run already\. It has no complete checkpoint") as refused:
        run(data, tmp_path / "run")
    assert "resume=latest" not in str(refused.value)
    assert logged(tmp_path / "run") == [1]


DAMAGE = {
    "one bit": lambda data: bytes([*data[:-9], data[-9] ^ 0x40, *data[-8:]]),
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "empty": lambda data: b"",
    "gone": None,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_any_file_is_noticed_and_the_one_before_is_taken(
    data: Path, whole: Path, tmp_path: Path, kind: str
) -> None:
    newest = complete_steps(whole)[-1]
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 6
    for file in files:
        folder = Path(shutil.copytree(newest, tmp_path / file.name / newest.name))
        change = DAMAGE[kind]
        if change is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(change((folder / file).read_bytes()))
        with pytest.raises(UserError, match=file.name):
            check(folder)


def test_a_run_goes_on_from_the_newest_that_is_whole(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for resume in ("latest", "auto"):
        output = Path(shutil.copytree(whole, tmp_path / resume))
        path = output / "step-00000006" / "optimizer.pt"
        path.write_bytes(DAMAGE["one bit"](path.read_bytes()))
        run(data, output, f"resume={resume}", "train.steps=7")
        said = capsys.readouterr().out
        assert f"step-00000006 is passed over: {path} is damaged" in said
        assert f"going on from {output / 'step-00000004'}" in said
        assert logged(output) == [1, 2, 3, 4, 5, 6, 7]
        assert (output / "old-step-00000006").is_dir()  # not lost, should anyone want to look
    with pytest.raises(UserError, match=r"optimizer\.pt is damaged"):
        run(data, tmp_path / "x", f"resume={tmp_path / 'auto' / 'old-step-00000006'}")


def test_a_table_of_sums_is_that_of_sha256sum(whole: Path) -> None:
    folder = complete_steps(whole)[-1]
    meta = read_meta(folder)
    listing = "".join(f"{record['sha256']}  {name}\n" for name, record in meta["files"].items())
    done = subprocess.run(["sha256sum", "--check"], input=listing, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert meta["step"] == 6


def sealed(folder: Path) -> dict[str, object]:
    if distributed.rank() == 0:
        for i in range(5):
            (folder / f"{i}.bin").write_bytes(bytes([i]) * 1000)
    distributed.barrier()
    seal(folder, {"a": 1})
    distributed.barrier()
    check(folder)
    distributed.barrier()
    if distributed.rank() == 0:
        (folder / "3.bin").write_bytes(bytes(1000))
    distributed.barrier()
    try:
        check(folder)
    except UserError as error:
        return {"problem": str(error), "files": len(read_meta(folder)["files"])}
    return {}


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_share_the_sums_and_all_hear_of_damage(tmp_path: Path, world: int) -> None:
    for found in on_ranks(world, sealed, tmp_path):
        assert "3.bin is damaged" in found["problem"]
        assert found["files"] == 5


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlcl.lock, "PATIENCE", 0.2)


def another_process() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)


def written_by(process: subprocess.Popen[str], folder: Path, **other: object) -> None:
    import psutil

    started = psutil.Process(process.pid).create_time()
    holder = {"host": socket.gethostname(), "process": process.pid, "started": started, "since": "today"}
    (folder / LOCK).write_text(json.dumps(holder | other))


@pytest.mark.usefixtures("impatient")
def test_one_writer_a_folder(data: Path, tmp_path: Path) -> None:
    process = another_process()
    try:
        run(data, tmp_path / "run", "train.steps=1")
        written_by(process, tmp_path / "run")
        for more in ("resume=latest", "train.overwrite=true"):
            with pytest.raises(UserError, match=rf"process {process.pid} on {socket.gethostname()}, since today"):
                run(data, tmp_path / "run", more)
        assert logged(tmp_path / "run") == [1]
        written_by(process, tmp_path / "run", started=1.0)  # the number is another's by now
        run(data, tmp_path / "run", "resume=latest", "train.steps=2")
        assert not (tmp_path / "run" / LOCK).exists()
    finally:
        process.kill()
        process.wait()
    written_by_gone = {"host": socket.gethostname(), "process": process.pid, "started": 1.0, "since": "today"}
    (tmp_path / "run" / LOCK).write_text(json.dumps(written_by_gone))
    run(data, tmp_path / "run", "resume=latest", "train.steps=3")
    assert logged(tmp_path / "run") == [1, 2, 3]


@pytest.mark.usefixtures("impatient")
def test_a_holder_on_another_machine_is_judged_by_its_signs_of_life(tmp_path: Path) -> None:
    holder = {"host": "elsewhere", "process": 1, "started": 1.0, "since": "today"}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        FolderLock(tmp_path).acquire()
    long_ago = time.time() - vlcl.lock.SILENT - 1
    os.utime(tmp_path / LOCK, (long_ago, long_ago))
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    lock.release()
    assert not tmp_path.exists()  # nothing else was in it


@pytest.mark.usefixtures("impatient")
def test_a_torn_lock_blocks_nobody_for_long(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(UserError, match="a process that has just begun"):
        FolderLock(tmp_path).acquire()
    long_ago = time.time() - vlcl.lock.BEAT - 1
    os.utime(tmp_path / LOCK, (long_ago, long_ago))
    FolderLock(tmp_path).acquire()


def test_the_holder_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlcl.lock, "BEAT", 0.05)
    lock = FolderLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / LOCK, (1, 1))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / LOCK).stat().st_mtime > 2
    lock.release()


def test_a_data_worker_that_is_killed_is_told_in_a_sentence(data: Path, tmp_path: Path) -> None:
    import multiprocessing

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for child in multiprocessing.active_children():
                if logged_any(tmp_path / "run"):
                    child.kill()
                    return
            time.sleep(0.01)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(UserError, match=r"a data worker has gone.*fewer data\.workers"):
        run(data, tmp_path / "run", "data.workers=1", "train.steps=100000", "checkpoint.every=90000")


def logged_any(output: Path) -> bool:
    return (output / "metrics.jsonl").is_file() and bool(logged(output))


def test_meta_is_the_last_file_to_be_written(whole: Path) -> None:
    for folder in complete_steps(whole):
        last = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
        assert last.name == META
