"""Anomalies: what is found in the numbers of steps, and that skip and rewind leave no trace of a bad batch."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from test_reliability import logged, settings, signal_at

import vlcl.train
from vlcl import distributed
from vlcl.anomalies import HORIZON, MEANING, STREAK, Anomalies, Limits, in_words, rewinds_after
from vlcl.batch import Batch
from vlcl.checkpoint import complete_steps
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.loss_state import LossState
from vlcl.losses import build_loss
from vlcl.pair_table import PairTable
from vlcl.report.page import write_report
from vlcl.sealed import read_meta
from vlcl.stop import Stopped


@pytest.fixture(scope="module")
def data(fifty_pairs: Path) -> Path:
    return fifty_pairs


def run(data: Path, output: Path, *more: str) -> None:
    more = ("train.steps=8", "checkpoint.every=2", *more)
    vlcl.train.train(load_config(None, settings(data, output, *more)))


@contextmanager
def poisoned(bad: Callable[[int], bool], kind: str, rank: int = 0) -> Iterator[dict[int, list[int]]]:
    """Batches of these steps are bad on one rank: pictures that are no numbers, or a gradient without bound. Yields the
    rows of each step's batch on this rank."""
    real, rows = vlcl.train.em_step, {}

    def em_step(run: Any, batch: Batch) -> Any:
        step = run.state.step + 1
        rows[step] = batch.row_B.tolist()
        if not bad(step) or distributed.rank() != rank:
            return real(run, batch)
        if kind == "loss":
            return real(run, replace(batch, images_BCHW=batch.images_BCHW * math.nan))
        hook = run.state.built.encoder.clip.text_projection.register_hook(lambda g: g * math.inf)
        try:
            return real(run, batch)
        finally:
            hook.remove()

    vlcl.train.em_step = em_step
    try:
        yield rows
    finally:
        vlcl.train.em_step = real


@contextmanager
def leaving_out(*steps: int) -> Iterator[None]:
    """The oracle: no batch of these steps is ever looked at."""
    real = vlcl.train.build

    def build(config: Any, stages: Any) -> Any:
        made = real(config, stages)
        made.left_out = frozenset(steps)
        return made

    vlcl.train.build = build
    try:
        yield
    finally:
        vlcl.train.build = real


def result(output: Path) -> dict[str, Any]:
    """Sums of all files of the last checkpoint: weights, optimizer, table, random states, place in the data."""
    folder = complete_steps(output)[-1]
    assert folder.name == "step-00000008"
    return read_meta(folder)["files"]


@pytest.fixture(scope="module")
def without_5(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("without") / "run"
    with leaving_out(5):
        run(data, output)
    return output


def dump_of(output: Path, step: int) -> dict[str, Any]:
    return json.loads((output / "anomalies" / f"step-{step:08d}.json").read_text())


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_skipped_step_leaves_no_trace(
    data: Path, tmp_path: Path, without_5: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with poisoned(lambda step: step == 5, kind) as rows:
        run(data, tmp_path / "run", "train.on_anomaly=skip")
    assert f"step 5: the {kind} is not finite; the step is left out" in capsys.readouterr().out
    assert result(tmp_path / "run") == result(without_5)
    dump = dump_of(tmp_path / "run", 5)
    assert dump["rows"] == rows[5]
    assert (dump["kinds"], dump["action"], dump["left_out"], dump["ranks"]) == ([kind], "skip", [5], 1)
    assert [loss is None for loss in dump["losses"]] == [kind == "loss"] * 10
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/anomalies"] for line in lines] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert lines[-1][f"train/anomalies/{kind}"] == 1
    assert MEANING[kind] in (tmp_path / "run" / "report.html").read_text()


def skipped_on_ranks(data: Path, output: Path) -> list[int]:
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    with leaving_out(5):
        run(data, output / "without")
    with poisoned(lambda step: step == 5, "loss", rank=1) as rows:
        run(data, output / "skip", "train.on_anomaly=skip")
    with poisoned(lambda step: step == 5, "gradient", rank=1):
        run(data, output / "rewind", "train.on_anomaly=rewind", "checkpoint.keep_every=2")
    return rows[5]


def test_what_one_rank_of_two_finds_both_leave_out(data: Path, tmp_path: Path) -> None:
    rows = on_ranks(2, skipped_on_ranks, data, tmp_path)
    assert result(tmp_path / "skip") == result(tmp_path / "rewind") == result(tmp_path / "without")
    dump = dump_of(tmp_path / "skip", 5)
    assert dump["rows"] == rows[0] + rows[1]
    assert dump["ranks"] == 2


def test_a_rewind_leaves_the_batch_out_and_a_resumed_run_does_too(
    data: Path, tmp_path: Path, without_5: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    with poisoned(lambda step: step == 5, "gradient") as rows:
        run(data, output, "train.on_anomaly=rewind")
    said = capsys.readouterr().out
    assert "step 5: the gradient is not finite" in said
    assert f"back to {output / 'step-00000004'}; the batches of steps 5 are left out" in said
    assert result(output) == result(without_5)
    assert logged(output) == list(range(1, 9))
    assert dump_of(output, 5)["rows"] == rows[5]
    meta = read_meta(complete_steps(output)[-1])
    assert (meta["anomalies"]["rewinds"], meta["anomalies"]["counts"]) == (1, {"gradient": 1})
    for folder in complete_steps(output)[2:]:  # as if it had been killed just after it went back
        shutil.rmtree(folder)
    run(data, output, "train.on_anomaly=rewind", "resume=latest")
    assert result(output) == result(without_5)
    assert read_meta(complete_steps(output)[-1])["anomalies"] == meta["anomalies"]


def test_a_loss_is_of_the_weights_before_so_that_batch_is_left_out_too(data: Path, tmp_path: Path) -> None:
    with leaving_out(4, 5):
        run(data, tmp_path / "without")
    with poisoned(lambda step: step == 5, "loss"):
        run(data, tmp_path / "run", "train.on_anomaly=rewind")
    assert result(tmp_path / "run") == result(tmp_path / "without")
    assert dump_of(tmp_path / "run", 5)["left_out"] == [4, 5]
    assert (tmp_path / "run" / "old-step-00000004").is_dir()  # the update before it had led to its weights


@pytest.mark.parametrize(
    ("more", "bad", "message"),
    [
        ("stop", 5, r"step 5: the gradient is not finite\. No checkpoint was written since.*step-00000005\.json"),
        ("skip train.max_anomalies=2", 4, "step 5: .*; 2 steps in a row were left out"),
        ("rewind train.max_anomalies=2", 3, r"step 5: .*; the run went back 2 times before \(train\.max_anomalies\)"),
        ("rewind", 2, "finds no checkpoint before step 2 to go back to"),
    ],
)
def test_a_run_that_stays_bad_stops(data: Path, tmp_path: Path, more: str, bad: int, message: str) -> None:
    with poisoned(lambda step: step >= bad, "gradient"), pytest.raises(UserError, match=message):
        run(data, tmp_path / "run", *f"train.on_anomaly={more}".split())
    assert [path.name for path in complete_steps(tmp_path / "run")] == [
        f"step-{step:08d}" for step in (() if bad == 2 else (2, 4))
    ]


def test_log_lines_are_the_same_with_and_without_a_stop(data: Path, tmp_path: Path) -> None:
    def lines(output: Path) -> list[dict[str, float]]:
        found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "time" and not k.startswith("speed/")} for line in found]

    more = ("train.log_every=4", "checkpoint.every=3", "train.steps=11")
    run(data, tmp_path / "whole", *more)
    undo = signal_at(6, signal.SIGTERM)
    try:
        with pytest.raises(Stopped):
            run(data, tmp_path / "run", *more)
    finally:
        undo()
    assert logged(tmp_path / "run") == [4]
    run(data, tmp_path / "run", *more, "resume=latest")
    assert logged(tmp_path / "run") == [4, 8, 11]
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def found_in(losses: list[float], limits: Limits, **others: float) -> tuple[Anomalies, list[tuple[str, ...]]]:
    past = Anomalies()
    return past, [past.judge({"objective": x, "infonce": x, **others}, limits) for x in losses]


@pytest.mark.parametrize("leaves_out", [False, True])
def test_a_spike_stands_out_of_the_steps_before(leaves_out: bool) -> None:
    torch.manual_seed(0)
    losses = (3 + 0.1 * torch.randn(HORIZON, dtype=torch.float64)).tolist()
    deviation, mean = (x.item() for x in torch.std_mean(torch.tensor(losses, dtype=torch.float64), correction=0))
    limits = Limits(loss_spike=5.0, leaves_out=leaves_out)
    past, found = found_in(losses, limits)
    assert set(found) == {()}
    assert past.mean == pytest.approx(mean)
    assert past.variance == pytest.approx(deviation**2)
    for x, kinds in ((mean + 4.9 * deviation, ()), (mean + 5.1 * deviation, ("spike",))):
        now = Anomalies.restored(asdict(past))
        assert now.judge({"objective": 0.0, "infonce": x}, limits) == kinds
        assert now.acts_on(kinds, limits) == list(kinds) * leaves_out
    again = [past.judge({"objective": 9.0, "infonce": 9.0}, limits) for _ in range(400)]
    assert again[0] == ("spike",)
    assert (again[-1] == ()) != leaves_out  # a level that stays is normal in time, unless it is never trained on
    assert found_in([*losses, 1e9], Limits())[1][-1] == ()  # null: none is


def test_what_lasts_is_found_after_a_while_and_told_what_to_change() -> None:
    limits = Limits(clip_norm=1.0, scale_bounds=(1.0, 100.0))
    values = {
        "clip": {"grad_norm": 3.0}, "scale": {"logit_scale": 99.99}, "drift": {"drift": 5.0, "gamma": 0.5},
    }  # fmt: skip
    fine = {"grad_norm": 0.9, "logit_scale": 99.0, "drift": 5.0, "gamma": 1.0}
    for kind, bad in values.items():
        past, found = found_in([1.0] * (STREAK - 1), limits, **fine | bad)
        assert set(found) == {()}
        interrupted = Anomalies.restored(asdict(past))
        assert past.judge({"objective": 1.0, **fine, **bad}, limits) == (kind,)
        assert interrupted.judge({"objective": 1.0, **fine}, limits) == ()
        assert interrupted.judge({"objective": 1.0, **fine, **bad}, limits) == ()
        assert "optim." in in_words(kind, fine | bad, limits)
    assert "raise model.logit_scale_max" in in_words("scale", values["scale"], limits)
    assert "raise model.logit_scale_max" not in in_words("scale", {"logit_scale": 1.0}, limits)
    assert found_in([1.0] * STREAK, Limits(), **fine | values["clip"] | values["scale"])[1][-1] == ()
    fp16 = Limits(scaled=True)  # its scaler leaves such steps out by itself
    assert found_in([1.0], fp16, grad_norm=math.inf)[1] == [()]
    assert found_in([math.nan], fp16, grad_norm=math.inf)[1] == [("loss",)]


def test_lasting_anomalies_are_told_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlcl.anomalies.STREAK", 2)
    more = ["optim.clip_norm=1e-3", "model.logit_scale_init=1.01", "optim.logit_scale_lr=0.1"]
    run(data, tmp_path / "run", "train.steps=3", *more)
    run(data, tmp_path / "run", "train.steps=6", *more, "resume=latest")
    said = capsys.readouterr().out
    assert said.count("above optim.clip_norm=0.001 in each of the last") == 1
    assert said.count("exp(logit_scale) has been at its bound") == 1
    assert "it is kept between 1 and 100" in said
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["train/anomalies/clip"] == 5
    assert not (tmp_path / "run" / "anomalies").exists()
    monkeypatch.undo()
    write_report(tmp_path / "run")
    assert MEANING["clip"] in (tmp_path / "run" / "report.html").read_text()


def test_what_was_written_is_taken_back_to_the_bit() -> None:
    torch.manual_seed(0)
    loss = build_loss("em", num_pairs=6)
    state = LossState(loss, 6, 4)
    state.table = PairTable(6, 2)
    row_G = torch.tensor([1, 4, 1])
    state.table.write(torch.tensor([1]), torch.tensor([[0.5, 0.25]]))
    before = [x.clone() for x in state.table.read(torch.arange(6))]
    state.begin()
    for _ in range(2):
        state.table.write(row_G, torch.randn(3, 2) * math.nan)
    state.take_back()
    for now, then in zip(state.table.read(torch.arange(6)), before):
        assert torch.equal(now.nan_to_num(-1), then.nan_to_num(-1))


def test_files_that_are_not_of_vlcl_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "anomalies").mkdir()
    whole = {"step": 7, "kinds": ["loss"], "action": "rewind", "left_out": [6, 7], "rows": [1]}
    without = [{k: v for k, v in whole.items() if k != key} for key in whole if key != "rows"]
    wrong = [[], None, *without, whole | {"left_out": ["x"]}, whole | {"action": "skip"}]
    for number, text in enumerate(["{", *map(json.dumps, [*wrong, whole])]):
        (tmp_path / "anomalies" / f"step-{number:08d}.json").write_text(text)
    assert [(sorted(one.left_out), one.kinds) for one in rewinds_after(tmp_path, 5)] == [([6, 7], ("loss",))]
    assert rewinds_after(tmp_path, 7) == []
