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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import apart, on_ranks

import vlcl.environment
import vlcl.files
import vlcl.lock
import vlcl.run_folder
import vlcl.sealed
from vlcl import distributed
from vlcl.checkpoint import complete_steps, load_model
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.lock import LOCK, FolderLock
from vlcl.sealed import META, Damaged, check, check_file, read_meta, records, seal
from vlcl.stop import SIGNALS, Stop, Stopped
from vlcl.train import train


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Those of a program in the foreground: a shell's background job, as this may be, is deaf to Ctrl-C."""
    before = {number: signal.signal(number, usual) for number, usual in SIGNALS.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(fifty_pairs: Path) -> Path:
    return fifty_pairs


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
        with pytest.raises(Stopped) as ended:
            run(data, tmp_path / "run")
    finally:
        undo()
    assert ended.value.number == number
    assert signal.getsignal(number) == handler
    assert complete_steps(tmp_path / "run")[-1].name == "step-00000003"
    assert (tmp_path / "run" / "report.html").is_file()
    said = capsys.readouterr().out
    assert f"stopped by {number.name} after step 3 of 6; to go on: the same command with resume=latest" in said
    assert not (tmp_path / "run" / LOCK).exists()
    run(data, tmp_path / "run", "resume=auto")
    assert logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    resumed = weights(tmp_path / "run")
    for name, x in weights(whole).items():
        assert torch.equal(resumed[name], x), name


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


def signalled_ranks(data: Path, output: Path, at: int, every: int) -> str:
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    signal_at(at, signal.SIGTERM, rank=1)
    try:
        run(data, output, f"checkpoint.every={every}")
        return "returned"
    except Stopped as ended:
        return str(ended)


@pytest.mark.parametrize(("at", "every"), [(3, 100), (3, 3)])
def test_a_signal_to_one_of_two_ranks_stops_both_at_one_step(data: Path, tmp_path: Path, at: int, every: int) -> None:
    """In a step of its own, and in one that was to be saved."""
    ended = on_ranks(2, signalled_ranks, data, tmp_path / "run", at, every)
    assert list(ended) == ["stopped by SIGTERM"] * 2
    assert [path.name for path in complete_steps(tmp_path / "run")] == ["step-00000003"]


def test_signals_that_others_handle_are_left_alone() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Stop():
            assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_exit_codes_of_the_command(
    data: Path, tmp_path: Path, number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from vlcl.cli import app

    (tmp_path / "config.yaml").write_text("{}")
    undo = signal_at(2, number)
    try:
        done = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml"), *settings(data, tmp_path / "run")])
    finally:
        undo()
    assert done.exit_code == code, done.output
    assert complete_steps(tmp_path / "run")[-1].name == "step-00000002"


def test_a_comparison_that_is_told_to_stop_does_not_go_on(data: Path, tmp_path: Path) -> None:
    from vlcl.compare.command import compare

    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{train: {data / 'train'}, val: {data / 'train'}}}\n")
    undo = signal_at(2, signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            compare(config, losses=("em", "infonce"), batch_sizes=(10,), seeds=1, output=str(tmp_path / "out"),
                    overrides=settings(data, tmp_path / "out")[1:2] + settings(data, tmp_path)[3:])  # fmt: skip
    finally:
        undo()
    assert ended.value.code == 128 + signal.SIGTERM
    assert len(list((tmp_path / "out").glob("*/metrics.jsonl"))) == 1


def test_auto_begins_where_nothing_is_and_goes_on_where_something_is(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(data, output, "resume=auto", "train.steps=3")
    run(data, output, "resume=auto")
    assert logged(output) == [1, 2, 3, 4, 5, 6]
    for folder in complete_steps(output):  # killed before its first checkpoint
        shutil.rmtree(folder)
    run(data, output, "resume=auto", "train.steps=2")
    assert logged(output) == [1, 2]
    for name in ("old-step-00000002", "step-00000004"):  # the last one without a meta.json
        other = Path(shutil.copytree(output, tmp_path / name))
        shutil.move(other / "step-00000002", other / name)
        (other / name / META).unlink()
        with pytest.raises(UserError, match="no complete checkpoint to go on from"):
            run(data, other, "resume=auto")
        assert (other / name / "model.safetensors").is_file()


@pytest.mark.parametrize("more", [(), ("resume=auto",)])
def test_what_is_not_of_a_run_is_left_alone(data: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    for name in ("config.yaml", "examples/mine.py", "wandb/notes"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(UserError, match="holds a run already"):
        run(data, tmp_path / "run", *more)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match="holds a run already"):
        run(data, tmp_path / "run", *more)
    assert (tmp_path / "run" / "examples" / "mine.py").read_text() == "mine"


def test_a_run_that_is_past_its_end_is_done(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    run(data, tmp_path / "run", "resume=latest", "train.steps=3")
    said = capsys.readouterr().out
    assert "nothing is left to train" in said
    assert "done: 6 steps" in said


def test_a_meta_json_of_others_is_no_checkpoints(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(complete_steps(whole)[-1], tmp_path / "model"))
    (folder / "optimizer.pt").unlink()
    (folder / META).write_text('{"made": "elsewhere"}')
    load_model(str(folder))


def test_a_start_that_failed_blocks_no_other(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb"):
        run(data, tmp_path / "run", "log.trackers=[wandb]")
    run(data, tmp_path / "run", "train.steps=1")
    with pytest.raises(UserError):
        run(data, tmp_path / "other", "train.batch_size=5000")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_start_that_was_killed_as_it_wrote_blocks_no_other(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    """After so many of the files that say what the run is."""
    written: list[Path] = []

    def write(path: Path, text: str) -> None:
        if len(written) == files:
            raise KeyboardInterrupt
        real(path, text)
        written.append(path)

    real = vlcl.files.replace_text
    for module in (vlcl.run_folder, vlcl.environment):
        monkeypatch.setattr(module, "replace_text", write)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "run")
    monkeypatch.undo()
    assert len(written) == files
    run(data, tmp_path / "run", "resume=auto", "train.steps=1")


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


def test_names_of_other_files_are_not_read(tmp_path: Path, whole: Path) -> None:
    for name, record in (("/etc/passwd", {"bytes": 1, "sha256": ""}), ("../x", {"bytes": 1, "sha256": ""}), ("a", 5)):
        folder = Path(shutil.copytree(complete_steps(whole)[-1], tmp_path / str(len(name))))
        meta = json.loads((folder / META).read_text())
        meta["files"] = {name: record}
        del meta["sha256"]
        meta["sha256"] = vlcl.sealed._sum_of(meta)
        (folder / META).write_text(json.dumps(meta))
        with pytest.raises(Damaged, match=META):
            check(folder)


def test_what_cannot_be_read_just_now_is_no_damage(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> str:
        raise OSError(5, "Input/output error")

    folder = complete_steps(whole)[-1]
    files = read_meta(folder)["files"]
    monkeypatch.setattr(vlcl.sealed, "_sum", fails)
    with pytest.raises(UserError, match="cannot be read: Input/output error") as raised:
        check_file(folder, "model.safetensors", files)
    assert not isinstance(raised.value, Damaged)


def test_a_table_of_sums_is_that_of_sha256sum(whole: Path) -> None:
    folder = complete_steps(whole)[-1]
    meta = read_meta(folder)
    listing = "".join(f"{record['sha256']}  {name}\n" for name, record in meta["files"].items())
    done = subprocess.run(["sha256sum", "--check"], input=listing, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert meta["step"] == 6


def sealed(folder: Path) -> dict[str, object]:
    own = [f"{i}.bin" for i in range(5)][distributed.rank() :: distributed.world_size()]
    for name in own:
        (folder / name).write_bytes(name.encode() * 1000)
    parts = distributed.gather_objects(records(folder, own))
    distributed.on_first(lambda: seal(folder, {"a": 1}, {name: x for part in parts for name, x in part.items()}))
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


def lock_of(process: int, started: float = 1.0, **other: object) -> dict[str, object]:
    here = {"host": socket.gethostname(), "space": vlcl.lock._space(), "since": "today"}
    return here | {"process": process, "started": started} | other


def another_process() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)


def written_by(process: subprocess.Popen[str], folder: Path, **other: object) -> None:
    import psutil

    started = psutil.Process(process.pid).create_time()
    holder = lock_of(process.pid, started)
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
    (tmp_path / "run" / LOCK).write_text(json.dumps(lock_of(process.pid)))
    run(data, tmp_path / "run", "resume=latest", "train.steps=3")
    assert logged(tmp_path / "run") == [1, 2, 3]


@pytest.mark.parametrize("space", ["another machine", "a container of the same name"])
def test_a_holder_that_cannot_be_seen_is_judged_by_its_signs_of_life(
    tmp_path: Path, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of the same process number: every container has a process 1."""
    monkeypatch.setattr(vlcl.lock, "SILENCE", 0.5)
    (tmp_path / LOCK).write_text(json.dumps(lock_of(os.getpid(), space=space)))
    alive = threading.Timer(0.2, os.utime, [tmp_path / LOCK])
    alive.start()
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path).acquire()
    alive.join()
    lock = FolderLock(tmp_path)  # silent from now on
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["space"] == vlcl.lock._space()
    lock.check()
    (tmp_path / LOCK).write_text(json.dumps(lock_of(1, space=space)))  # as another takes over in a long silence of ours
    with pytest.raises(UserError, match="taken over"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK).is_file()


def test_a_torn_lock_blocks_nobody_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlcl.lock, "SILENCE", 0.3)
    (tmp_path / LOCK).write_text("{")
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()
    assert not tmp_path.exists()  # nothing else was in it


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_leaves_no_torn_lock(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            FolderLock(tmp_path / "run").acquire()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "run").iterdir()) == []


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


def slow_batches(data: Path, output: Path) -> None:
    """A run whose worker is busy for a minute when it ends."""
    import vlcl.data.reader

    real = vlcl.data.reader.ShardReader.prepare

    def prepare(self: vlcl.data.reader.ShardReader, sample: Any, epoch: int, row: int) -> Any:
        if (output / "metrics.jsonl").is_file() and logged(output):
            (output.parent / "busy").touch()
            time.sleep(60)
        return real(self, sample, epoch, row)

    vlcl.data.reader.ShardReader.prepare = prepare
    run(data, output, "train.steps=2", "data.workers=1")


def test_a_busy_worker_does_not_keep_a_run_from_ending(data: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    process = apart(tmp_path / "said", slow_batches, data, tmp_path / "run")
    process.join(100)
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    assert (tmp_path / "busy").exists()
    assert time.monotonic() - began < 50


def test_meta_is_the_last_file_to_be_written(whole: Path) -> None:
    for folder in complete_steps(whole):
        last = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
        assert last.name == META
