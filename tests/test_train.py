"""The trainer end to end on real shards: learning, resume to the bit, 2 ranks, and what a user can get wrong."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from ranks import apart, on_a_full_disk, on_ranks
from safetensors.torch import load_file
from shards import colour_of, make_shards, tiny_model

from vlcl.checkpoint import best_step, complete_steps, load_model, prune
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.pair_table import PairTable
from vlcl.train import main, train

Capture = pytest.CaptureFixture[str]
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")

    def damage(i: int, files: dict[str, bytes]) -> None:
        if i % 29 == 3:
            files["png"] = b"<html>"

    return {
        "train": make_shards(folder / "train", (30, 7, 41, 22), damage),
        "val": make_shards(folder / "val", (9, 10)),
        "model": folder / "model",
    }


def settings(shards: dict[str, Path], output: Path, *more: str) -> list[str]:
    return [
        f"data.train={shards['train']}", f"data.val={shards['val']}", f"model.name={tiny_model(shards['model'])}",
        f"train.output={output}", "train.steps=20", "train.batch_size=12", "train.log_every=1", "optim.warmup=2",
        "optim.lr=1e-3", "checkpoint.every=3", "checkpoint.keep=3", "eval.batch_size=8", "data.workers=0",
        "data.streams=2", "data.shuffle=16", "log.trackers=[]", "train.precision=fp32",
        "eval.examples=0", *more,
    ]  # fmt: skip


def given(shards: dict[str, Path], output: Path, *more: str) -> list[str]:
    """The same on a command line, which wants a file."""
    config = shards["train"].parent / "empty.yaml"
    config.write_text("{}")
    return [str(config), *settings(shards, output, *more)]


def run(shards: dict[str, Path], output: Path, *more: str) -> dict[str, float]:
    return train(load_config(None, settings(shards, output, *more)))


def metrics_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def final_state(output: Path) -> dict[str, torch.Tensor]:
    folder = complete_steps(output)[-1]
    assert folder.name == "step-00000020"
    state = {f"model/{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    if (folder / "ema.safetensors").exists():
        state |= {f"ema/{k}": v for k, v in load_file(folder / "ema.safetensors").items()}
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    state |= {f"optimizer/{n}/{k}": v for n, values in optimizer.items() for k, v in values.items()}
    table = PairTable(100)
    table.load(folder / "table")
    values_GK, visits_G = table.read(torch.arange(100))
    assert (visits_G > 0).sum() > 50
    return state | {"table/values": values_GK.nan_to_num(1e9), "table/visits": visits_G}


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    bits = [{key: x.cpu().numpy().tobytes() for key, x in tensors.items()} for tensors in (got, expected)]  # NaN is NaN
    differ = [key for key in got if bits[0][key] != bits[1][key]]
    assert differ == []


def launch(said: Path, arguments: list[str]) -> int:
    """The trainer on two ranks, as users start it: the id of its launcher."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "-m", "vlcl.train", *arguments]
    with said.open("wb") as log:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True).pid


def train_alone(arguments: list[str]) -> None:
    main(arguments[0], arguments[1:])


def kill_when_logged(pid: int, output: Path, step: int, said: Path) -> None:
    """SIGKILL a launcher and its ranks once `step` is in metrics.jsonl: no chance to tidy up."""
    process, deadline = psutil.Process(pid), time.monotonic() + 240
    while time.monotonic() < deadline:
        lines = (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").exists() else []
        assert process.is_running(), said.read_text()
        assert process.status() != psutil.STATUS_ZOMBIE, said.read_text()
        if len(lines) >= step:
            break
        time.sleep(0.02)
    all_of_it = [process, *process.children(recursive=True)]  # ranks of torchrun are in sessions of their own
    for one in all_of_it:
        one.kill()
    psutil.wait_procs(all_of_it)


MORE = ["train.ema=0.9", "model.patch_dropout=0.5", "eval.every=7", "train.accumulate=2"]


@pytest.fixture(scope="module")
def whole_of_1(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped, in this process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with one_thread():
        run(shards, folder, *MORE)
    return folder


@pytest.fixture(scope="module")
def whole_of_2(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    on_ranks(2, run_on_rank, shards, folder, *MORE)
    return folder


def run_on_rank(shards: dict[str, Path], output: Path, *more: str) -> dict[str, float]:
    """What torchrun tells a rank of this machine, then the run."""
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"],
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    return run(shards, output, *more)


@contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as launched runs have: sums over several may end in other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(
    shards: dict[str, Path], tmp_path: Path, world: int, request: pytest.FixtureRequest, capsys: Capture
) -> None:
    whole = request.getfixturevalue(f"whole_of_{world}")
    step = random.randint(4, 9)  # the checkpoint of step 3 is whole once step 4 is logged
    said, arguments = tmp_path / "said", given(shards, tmp_path / "again", *MORE)
    pid = apart(said, train_alone, arguments).pid if world == 1 else launch(said, arguments)
    assert pid
    kill_when_logged(pid, tmp_path / "again", step, said)
    if world == 1:
        with one_thread():
            run(shards, tmp_path / "again", *MORE, "resume=latest")
        assert "going on from" in capsys.readouterr().out
    else:  # a folder that holds a run is refused, unless it goes on
        on_ranks(2, run_on_rank, shards, tmp_path / "again", *MORE, "resume=latest")
    assert_same_bits(final_state(tmp_path / "again"), final_state(whole))
    got, expected = metrics_of(tmp_path / "again"), metrics_of(whole)
    assert [(m["step"], m.get("train/loss")) for m in got] == [(m["step"], m.get("train/loss")) for m in expected]
    assert [m.get("data/skipped") for m in got] == [m.get("data/skipped") for m in expected]


def test_a_run_from_a_cache_ends_with_the_same_bits(
    shards: dict[str, Path], whole_of_1: Path, whole_of_2: Path, tmp_path: Path, capsys: Capture
) -> None:
    """In memory, resumed from a checkpoint of a run without one; from a folder, 2 ranks, then 1."""
    cut = f"resume={whole_of_1 / 'step-00000015'}"
    with one_thread():
        run(shards, tmp_path / "memory", *MORE, "data.cache=memory", cut)
    text = capsys.readouterr().out
    assert "data.train: 100 pairs kept in memory, decoded" in text
    assert "data.val: 19 pairs kept in memory, preprocessed" in text
    assert_same_bits(final_state(tmp_path / "memory"), final_state(whole_of_1))
    assert metrics_of(tmp_path / "memory")[-1] | {"time": 0} == metrics_of(whole_of_1)[-1] | {"time": 0}
    folder = f"data.cache={tmp_path / 'cache'}"
    on_ranks(2, run_on_rank, shards, tmp_path / "folder", *MORE, folder)
    assert_same_bits(final_state(tmp_path / "folder"), final_state(whole_of_2))
    with one_thread():
        run(shards, tmp_path / "again", *MORE, folder)
    assert "decoding" not in capsys.readouterr().out
    assert_same_bits(final_state(tmp_path / "again"), final_state(whole_of_1))


def test_one_rank_goes_on_from_a_run_of_two(shards: dict[str, Path], whole_of_2: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_of_2, tmp_path / "run")
    run(shards, tmp_path / "run", *MORE, "train.steps=24", "resume=latest")
    lines = metrics_of(tmp_path / "run")
    assert [m["step"] for m in lines if "train/loss" in m] == list(range(1, 25))
    assert complete_steps(tmp_path / "run")[-1].name == "step-00000024"


def test_a_run_folder_is_whole_and_its_model_loads(shards: dict[str, Path], tmp_path: Path) -> None:
    results = run(shards, tmp_path / "run", "train.steps=60", "optim.lr=3e-3", "train.ema=0.5", "eval.examples=4")
    folder = tmp_path / "run"
    for name in ("config.yaml", "data.json", "metrics.jsonl", "environment.json", "report.html", "retrieval.png"):
        assert (folder / name).stat().st_size > 0
    assert [path.name for path in complete_steps(folder)] == ["step-00000054", "step-00000057", "step-00000060"]
    lines = [m for m in metrics_of(folder) if "train/loss" in m]
    assert lines[-1]["train/infonce"] < lines[0]["train/infonce"] - 0.3  # it learns
    assert lines[0]["train/first_visits"] == 1.0
    assert lines[-1]["train/first_visits"] == 0.0
    assert lines[-1]["data/skipped/not an image"] > 0
    assert results["val/text_to_image_R@10"] == next(
        m["val/text_to_image_R@10"] for m in reversed(metrics_of(folder)) if "val/text_to_image_R@10" in m
    )
    import open_clip

    built = load_model(str(folder))
    theirs: Any = open_clip.create_model_and_transforms(f"local-dir:{complete_steps(folder)[-1]}")[0]
    images, tokens = torch.randn(2, 3, 32, 32), built.tokenize(["picture 1", "picture 2"])
    torch.testing.assert_close(built.encoder.image(images), theirs.eval().encode_image(images, normalize=True))
    torch.testing.assert_close(built.encoder.text(tokens), theirs.encode_text(tokens, normalize=True))
    assert load_config(folder / "config.yaml").train.batch_size == 12
    averaged = load_model(str(folder), averaged=True)
    assert not torch.equal(averaged.encoder.clip.visual.proj, built.encoder.clip.visual.proj)


def test_the_best_checkpoint_is_kept(shards: dict[str, Path], tmp_path: Path) -> None:
    folder, name = tmp_path / "run", "val/image_to_text_R@5"
    more = ["eval.every=4", "checkpoint.every=2", "checkpoint.keep=1", f"checkpoint.keep_best={name}"]
    run(shards, folder, "train.steps=20", *more)
    values = {m["step"]: m[name] for m in metrics_of(folder) if name in m}
    best = max(values, key=lambda step: (values[step], step))
    assert {path.name for path in complete_steps(folder)} == {f"step-{best:08}", "step-00000020"}
    for step in (1, 2, 3):
        shutil.copytree(folder / "step-00000020", tmp_path / "scored" / f"step-{step:08}")
    lines = [{"step": 1, name: 0.5}, {"step": 2, name: 0.7}, {"step": 3, name: 0.6}, {"step": 4, name: 0.9}]
    (tmp_path / "scored" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert best_step(tmp_path / "scored", name) == tmp_path / "scored" / "step-00000002"
    prune(tmp_path / "scored", 1, None, name)
    assert [path.name[-1] for path in complete_steps(tmp_path / "scored")] == ["2", "3"]
    assert best_step(tmp_path / "scored", None) is None


def test_the_test_pairs_are_evaluated_once_at_the_end(shards: dict[str, Path], tmp_path: Path) -> None:
    test, folder = make_shards(tmp_path / "test", (7, 6)), tmp_path / "run"
    more = [f"data.test={test}", "eval.every=2", "checkpoint.every=2"]
    results = run(shards, folder, "train.steps=6", *more)
    lines = metrics_of(folder)
    assert [m["step"] for m in lines if "val/image_to_text_R@1" in m] == [2, 4, 6]
    assert [m["step"] for m in lines if "test/image_to_text_R@1" in m] == [6]
    built = load_model(str(folder))
    pictures = [built.preprocess_eval(Image.new("RGB", (32, 32), colour_of(i))) for i in range(13)]
    scores = (
        built.encoder.image(torch.stack(pictures))
        @ built.encoder.text(built.tokenize([f"picture {i}" for i in range(13)])).T
    )
    ranks = (scores > scores.diagonal()[:, None]).sum(dim=1)
    assert results["test/image_to_text_R@5"] == pytest.approx((ranks < 5).double().mean().item())
    assert json.loads((folder / "environment.json").read_text())["test_pairs"] == 13
    assert "19 held-out pairs and 13 test pairs" in (folder / "report.html").read_text()
    # an end that had been an evaluation in the middle has the test pairs still to come
    shutil.rmtree(folder / "step-00000006")
    run(shards, folder, "train.steps=4", *more, "resume=latest")
    assert [m["step"] for m in metrics_of(folder) if "test/image_to_text_R@1" in m] == [4]


def test_zero_shot_on_a_folder_of_classes(shards: dict[str, Path], tmp_path: Path) -> None:
    for name, colour in (("red", (255, 0, 0)), ("sky_blue", (0, 128, 255))):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (40, 32), colour).save(tmp_path / "classes" / name / f"{n}.png")
    classes = tmp_path / "classes"
    results = run(shards, tmp_path / "run", "train.steps=2", f"eval.zeroshot={classes}")
    built = load_model(str(tmp_path / "run"))
    prompts = built.encoder.text(built.tokenize(["a photo of a red.", "a photo of a sky blue."]))
    pictures = [built.preprocess_eval(Image.open(path)) for path in sorted(classes.glob("*/0.png"))]
    guesses = (built.encoder.image(torch.stack(pictures)) @ prompts.T).argmax(dim=1)
    assert results["val/zeroshot_top1"] == (guesses == torch.arange(2)).float().mean()
    (classes / "red" / "0.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"red/0.png: not an image"):
        run(shards, tmp_path / "run2", "train.steps=2", f"eval.zeroshot={classes}")
    assert complete_steps(tmp_path / "run2")[-1].name == "step-00000002"  # saved before it was judged
    (classes / "sky_blue").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="at least two are needed"):
        run(shards, tmp_path / "run3", f"eval.zeroshot={classes}")
    assert not (tmp_path / "run3").exists()


def test_an_existing_run_is_refused_unless_told(shards: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(shards, output, "train.steps=3")
    (output / "notes.txt").write_text("mine")
    before = (output / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"holds a run already.*resume=latest.*train.overwrite=true"):
        run(shards, output, "train.steps=3")
    assert (output / "metrics.jsonl").read_text() == before
    run(shards, output, "train.steps=1", "train.overwrite=true")
    assert [path.name for path in complete_steps(output)] == ["step-00000001"]
    assert (output / "notes.txt").read_text() == "mine"


def test_resume_needs_a_whole_checkpoint(shards: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint to go on from .*nothing"):
        run(shards, tmp_path / "nothing", "resume=latest")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "half" / "step-00000009").mkdir(parents=True)
    with pytest.raises(UserError, match="no complete step"):
        run(shards, tmp_path / "half", "resume=latest")
    with pytest.raises(UserError, match="no complete checkpoint"):
        run(shards, tmp_path / "half", f"resume={tmp_path / 'half' / 'step-00000009'}")


def test_a_corrupt_checkpoint_and_other_data_are_refused(shards: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(shards, output, "train.steps=3")
    other = make_shards(tmp_path / "other", (30, 70))
    with pytest.raises(UserError, match="other shards"):
        run(shards, output, f"data.train={other}", "resume=latest")
    with pytest.raises(UserError, match="another loss"):
        run(shards, output, "loss.name=infonce", "resume=latest")
    for more in ("loss.prediction=similarity", "loss.prediction=level", "loss.bank=9", "loss.temperature=pair"):
        with pytest.raises(UserError, match=r"other settings of the loss .*rows 'prediction drift', now"):
            run(shards, output, more, "resume=latest")
    weights = output / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"(?s)no checkpoint to go on from is as it was written.*model\.safetensors is damaged"
    ):
        run(shards, output, "resume=latest")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: 1,000 bytes"):
        load_model(str(output))


def test_another_layout_goes_on_and_says_so(shards: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    run(shards, tmp_path / "run", "train.steps=6")
    run(shards, tmp_path / "run", "train.steps=12", "train.batch_size=6", "resume=latest")
    assert "global_batch changed since step-00000006" in capsys.readouterr().out
    last = [m for m in metrics_of(tmp_path / "run") if "epoch" in m][-1]
    assert last["epoch"] == pytest.approx((6 * 12 // 6 + 6) / (100 // 6), abs=0.1)


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing(shards: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step \d+: the loss is not finite") as raised:
        run(shards, tmp_path / "run", "optim.lr=1e30", "optim.clip_norm=null", "checkpoint.every=1", "optim.warmup=0")
    step = int(str(raised.value).split("step ")[1].split(":")[0])
    assert complete_steps(tmp_path / "run") == []  # the one of the step before led here, and is set aside
    assert (tmp_path / "run" / f"old-step-{step - 1:08d}").is_dir()
    dump = json.loads((tmp_path / "run" / "anomalies" / f"step-{step:08d}.json").read_text())
    assert len(dump["rows"]) == len(dump["losses"]) == 12


def test_broken_weights_never_replace_a_good_checkpoint(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has made them so: no number of the step shows it."""
    import vlcl.train

    real = vlcl.train.train_step

    def step(run, batch):
        outcome = real(run, batch)
        if run.state.step == 5:
            run.state.built.encoder.clip.text_projection.data[0, 0] = torch.inf
        return outcome

    monkeypatch.setattr(vlcl.train, "train_step", step)
    with pytest.raises(UserError, match="weights of step 6 are not finite"):
        run(shards, tmp_path / "run", "checkpoint.every=2", "checkpoint.keep=1", "train.log_every=100")
    assert complete_steps(tmp_path / "run")[-1].name == "step-00000004"
    monkeypatch.setattr(vlcl.train, "train_step", real)
    run(shards, tmp_path / "run", "resume=latest", "train.steps=8")


def test_going_on_from_an_older_step_moves_the_newer_ones_aside(shards: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(shards, output, "train.steps=9")
    run(shards, output, f"resume={output / 'step-00000003'}", "train.steps=4", "checkpoint.every=50")
    assert [path.name for path in complete_steps(output)] == ["step-00000003", "step-00000004"]
    assert sorted(path.name for path in output.glob("old-*")) == ["old-step-00000006", "old-step-00000009"]
    run(shards, tmp_path / "other", "train.steps=3")
    with pytest.raises(UserError, match="holds a run already"):
        run(shards, tmp_path / "other", f"resume={output / 'step-00000003'}")


def test_a_full_disk_leaves_the_last_good_checkpoint(shards: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(shards, output, "train.steps=3")
    before = final_bytes(output / "step-00000003")
    arguments = given(shards, output, "train.steps=6", "resume=latest")
    said = on_a_full_disk(tmp_path / "said", 300_000, "train", *arguments)
    assert "could not be written" in said
    assert "step-00000003" in said
    assert final_bytes(output / "step-00000003") == before
    assert [path.name for path in output.iterdir() if "step-" in path.name] == ["step-00000003"]


def final_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_report_that_cannot_be_written_fails_no_run(
    shards: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder stands where the report is to be; once it is gone, what the last line says to type writes the report."""
    output = tmp_path / "run"
    report = output / "report.html"
    run(shards, output, "train.steps=1")
    report.unlink()
    report.mkdir()
    run(shards, output, "train.steps=2", "resume=latest")
    last, after = capsys.readouterr().out.splitlines()[-2:]
    assert after == f"next: vlcl export {output} OUT"
    assert re.match(r"done: 2 steps, \d+\.\d minutes; the report could not be written: .*Is a directory", last)
    assert str(report) in last
    assert last.endswith(". To try again: resume=latest")
    assert complete_steps(output)[-1].name == "step-00000002"
    report.rmdir()
    run(shards, output, "train.steps=2", "resume=latest")
    assert capsys.readouterr().out.splitlines()[-2].endswith(f" minutes; report: {report}")
    assert report.stat().st_size > 0


def test_too_many_bad_samples_stop_the_run(shards: dict[str, Path], tmp_path: Path) -> None:
    bad = make_shards(tmp_path / "bad", (60, 60), lambda i, f: f.update(png=b"<html>") if i % 4 == 0 else None)
    with pytest.raises(UserError, match=r"samples are bad \(data.max_bad_share=0.1\): \d+ not an image"):
        run(shards, tmp_path / "run", f"data.train={bad}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("train.batch_size=13 train.accumulate=13 data.train=NOWHERE", "NOWHERE"),
        ("train.batch_size=101", "at most the 100 pairs"),
        ("train.accumulate=12 train.negatives=chunk loss.order=before", "a pair alone in its chunk has no negatives"),
        ("model.name=ViT-B-33", "did you mean 'ViT-B-32'"),
        ("model.name=ViT-B-32 model.pretrained=laion9", "nor a tag of 'ViT-B-32'"),
        ("optim.name=timm/lion9", "did you mean timm/lion"),
        ("eval.zeroshot=NOWHERE", "is not a folder"),
        ("model.lock_image=true model.lock_text=true optim.logit_scale_lr=0", "nothing is left to train"),
    ],
)
def test_mistakes_get_one_clear_error(shards: dict[str, Path], tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        run(shards, tmp_path / "run", *more.split())
    assert message in str(raised.value)


@pytest.mark.parametrize("more", ["train.precision=bf16 train.accumulate=3", "train.precision=bf16 train.ema=0.5"])
def test_bf16_learns(shards: dict[str, Path], tmp_path: Path, more: str) -> None:
    run(shards, tmp_path / "run", "train.steps=40", "optim.lr=3e-3", *more.split())
    lines = [m for m in metrics_of(tmp_path / "run") if "train/loss" in m]
    assert lines[-1]["train/infonce"] < lines[0]["train/infonce"] - 0.1


def test_timm_optimizer_constant_rate_and_locked_tower(shards: dict[str, Path], tmp_path: Path) -> None:
    run(shards, tmp_path / "run", "optim.name=timm/lamb", "optim.schedule=constant", "train.steps=4",
        "model.lock_image=true", "optim.logit_scale_lr=0", "loss.name=infonce")  # fmt: skip
    lines = [m for m in metrics_of(tmp_path / "run") if "train/lr" in m]
    assert [m["train/lr"] for m in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert lines[0]["train/logit_scale"] == lines[-1]["train/logit_scale"]
    states = [load_file(tmp_path / "run" / f"step-0000000{n}" / "model.safetensors") for n in (3, 4)]
    assert torch.equal(states[0]["visual.conv1.weight"], states[1]["visual.conv1.weight"])
    assert not torch.equal(states[0]["text_projection"], states[1]["text_projection"])


@pytest.mark.parametrize(
    "more",
    [
        "loss.name=siglip model.logit_scale_init=10 train.accumulate=2",
        "loss.name=fastclip-v2 train.ema=0.5",
        "loss.name=neuclip loss.prototypes=16",
        "loss.name=em loss.order=before loss.bank=24 loss.prediction=level train.accumulate=2 train.negatives=chunk",
    ],
)
def test_every_kind_of_loss_trains_and_resumes_to_the_bit(shards: dict[str, Path], tmp_path: Path, more: str) -> None:
    """Rows, shared parts and the learned bias come back from a checkpoint."""
    run(shards, tmp_path / "whole", *more.split())
    run(shards, tmp_path / "kept", *more.split(), "checkpoint.keep=20")
    shutil.rmtree(tmp_path / "kept" / "step-00000020")
    for step in (12, 15, 18):
        shutil.rmtree(tmp_path / "kept" / f"step-{step:08d}")
    run(shards, tmp_path / "kept", *more.split(), "resume=latest")
    whole, kept = (tmp_path / name / "step-00000020" for name in ("whole", "kept"))
    files = [p.relative_to(whole) for p in whole.rglob("*.safetensors")]
    assert len(files) >= 1
    for name in files:
        assert_same_bits(load_file(kept / name), load_file(whole / name))
    losses = [[m.get("train/loss") for m in metrics_of(tmp_path / name)] for name in ("whole", "kept")]
    assert losses[0] == losses[1]
    built = load_model(str(tmp_path / "whole"))
    assert (getattr(built.encoder.clip, "logit_bias", None) is not None) == ("siglip" in more)
    if "siglip" in more:
        bias = built.encoder.clip.logit_bias.item()
        assert bias not in (-10.0, 0.0)  # it learned, and was saved
        start = f"model.pretrained={tmp_path / 'whole'}"
        for name in ("siglip", "em"):  # weights with a bias start either kind of run; em leaves it alone
            run(shards, tmp_path / name, start, f"loss.name={name}", "train.steps=1", "optim.lr=1e-9")
            assert load_model(str(tmp_path / name)).encoder.clip.logit_bias.item() == pytest.approx(bias, abs=1e-5)
        run(shards, tmp_path / "plain", "train.steps=1")
        run(shards, tmp_path / "new", f"model.pretrained={tmp_path / 'plain'}", "loss.name=siglip", "train.steps=1",
            "optim.lr=1e-9")  # fmt: skip
        assert load_model(str(tmp_path / "new")).encoder.clip.logit_bias.item() == pytest.approx(-10.0, abs=1e-5)


def test_warm_rows_are_written_before_the_first_update(
    shards: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    run(shards, tmp_path / "cold", "train.steps=4")
    run(shards, tmp_path / "warm", "train.steps=4", "loss.warm=2", "train.accumulate=3")
    assert "loss.warm=2: 9" in capsys.readouterr().out  # of 100 pairs, 4 are broken
    cold, warm = ([m for m in metrics_of(tmp_path / name) if "train/loss" in m] for name in ("cold", "warm"))
    assert cold[0]["train/first_visits"] == 1.0
    assert warm[0]["train/first_visits"] == 0.0
    assert warm[0]["train/infonce"] == pytest.approx(cold[0]["train/infonce"], abs=1e-5)  # same batch, same weights
    assert warm[0]["train/loss"] != cold[0]["train/loss"]
