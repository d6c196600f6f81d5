"""What a run writes and says. Run: pytest tests/test_logs.py"""

import io
import json
import sys
import types

import pytest
from PIL import Image
from rich.console import Console

from vlcl.environment import memory_used, write_environment
from vlcl.errors import UserError
from vlcl.logs import RunLog, read_metrics


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def strict_json(text):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_each_call_is_one_whole_line_of_valid_json(tmp_path):
    with RunLog(tmp_path, [], {}, total_steps=20, enabled=True) as log:
        log.metrics(10, {"train/loss": 3.5, "train/infonce": float("nan"), "train/grad_norm": float("inf")})
        first = strict_json((tmp_path / "metrics.jsonl").read_text())  # there before the run ends
        log.metrics(20, {"train/loss": 3.25})
    assert first["step"] == 10
    assert first["train/loss"] == 3.5
    assert first["train/infonce"] is None
    assert first["train/grad_norm"] is None
    assert first["total_steps"] == 20
    assert [line["step"] for line in lines_of(tmp_path)] == [10, 20]


def test_a_resumed_run_has_each_step_once_and_drops_a_torn_line(tmp_path):
    with RunLog(tmp_path, [], {}, total_steps=50, enabled=True) as log:
        for step in (10, 20, 30, 40):
            log.metrics(step, {"train/loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "train/lo')  # the crash
    with RunLog(tmp_path, [], {}, total_steps=50, enabled=True, resume_step=20) as log:
        for step in (30, 40, 50):
            log.metrics(step, {"train/loss": -float(step)})
    assert [(line["step"], line["train/loss"]) for line in lines_of(tmp_path)] == [
        (10, 10.0), (20, 20.0), (30, -30.0), (40, -40.0), (50, -50.0),
    ]  # fmt: skip
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_run_that_starts_anew_leaves_no_old_lines(tmp_path):
    for loss in (1.0, 2.0):
        with RunLog(tmp_path, [], {}, total_steps=5, enabled=True) as log:
            log.metrics(0, {"train/loss": loss})
    assert [line["train/loss"] for line in lines_of(tmp_path)] == [2.0]


def test_torn_line_is_left_out_when_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2}\n[1]\n{"step": 2, "a"')
    assert read_metrics(tmp_path) == [{"step": 1, "a": 2}]


def test_missing_metrics_is_the_users_mistake_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist.*vlcl train"):
        read_metrics(tmp_path)


def test_other_ranks_touch_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", ["no such tracker"], {}, total_steps=5, enabled=False) as log:
        log.metrics(1, {"train/loss": 1.0})
        log.message("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    out = io.StringIO()
    with RunLog(tmp_path, [], {}, total_steps=1300, enabled=True, console=Console(file=out)) as log:
        log.message("a message of more than eighty characters stays one line, " * 3)
        log.metrics(
            120,
            {
                "train/loss": 3.4121, "train/infonce": 2.98, "train/logit_scale": 15.21, "train/lr": 1e-3,
                "speed/samples_per_second": 412.3, "speed/data_wait": 0.031, "data/skipped": 0,
            },
        )  # fmt: skip
        log.metrics(130, {"val/image_to_text_R@1": 0.4123, "val/text_to_image_R@1": 0.398})
    message, training, evaluation = out.getvalue().splitlines()
    assert message.count("a message") == 3
    assert training.startswith(
        "step 120/1300  loss 3.412  infonce 2.980  scale 15.2  412 samples/s  data wait 3%  skipped 0  eta "
    )
    assert evaluation == "step 130/1300  image-to-text R@1 41.2%  text-to-image R@1 39.8%"
    assert "\x1b" not in out.getvalue()


def test_one_bar_on_a_terminal(tmp_path):
    out = io.StringIO()
    console = Console(force_terminal=True, file=out, width=100, color_system=None)
    with RunLog(tmp_path, [], {}, total_steps=40, enabled=True, resume_step=10, console=console) as log:
        log.message("[bold]as it is[/bold]")
        log.metrics(20, {"train/loss": 3.4121, "speed/samples_per_second": 412.3, "speed/data_wait": 0.03})
        log.metrics(30, {"val/image_to_text_R@1": 0.4123, "val/text_to_image_R@1": 0.398})
        log.metrics(40, {"train/loss": 3.1})
    screen = out.getvalue()
    assert "[bold]as it is[/bold]" in screen
    assert "step 10/40" in screen
    assert "loss 3.412  412/s  wait 3%  eta 0:00:0" in screen
    last = screen[screen.rindex("step 40/40") :]
    assert "loss 3.100  412/s  wait 3%  R@1 41.2/39.8%" in last
    assert "step 30/40  image-to-text R@1 41.2%" in screen  # an evaluation stays above the bar


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, ["tensorboard"], {}, total_steps=30, enabled=True) as log:
        for step in (10, 20, 30):
            log.metrics(step, {"train/loss": step})
    with RunLog(tmp_path, ["tensorboard"], {}, total_steps=30, enabled=True, resume_step=20) as log:
        log.metrics(30, {"train/loss": -30})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 10), (20, 20), (30, -30)]


def test_a_missing_or_unknown_tracker_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a missing package meets
    for tracker, text in (
        ("wandb", "pip install wandb"),
        ("mlflow", "'mlflow' is unknown.*tensorboard, wandb, trackio"),
    ):
        with pytest.raises(UserError, match=text):
            RunLog(tmp_path / "run", [tracker], {}, total_steps=5, enabled=True)
    assert not (tmp_path / "run").exists()


def test_wandb_goes_on_in_the_same_run_after_a_resume(tmp_path, monkeypatch):
    started, logged, ended = [], [], []
    run = types.SimpleNamespace(
        define_metric=lambda *_, **__: None, log=logged.append, finish=lambda exit_code: ended.append(exit_code)
    )
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: started.append(settings) or run)
    )
    log = RunLog(tmp_path, ["wandb"], {"a": 1}, total_steps=9, enabled=True)
    log.__enter__().metrics(3, {"train/loss": 1.0})
    log.__exit__(KeyboardInterrupt)
    with RunLog(tmp_path, ["wandb"], {"a": 1}, total_steps=9, enabled=True, resume_step=3):
        pass
    with RunLog(tmp_path, ["wandb"], {"a": 1}, total_steps=9, enabled=True):
        pass
    assert started[0]["config"] == {"a": 1}
    assert started[0]["id"] == started[1]["id"] != started[2]["id"]
    assert logged == [{"train/loss": 1.0, "step": 3}]
    assert ended == [1, 0, 0]


def test_pictures_go_to_the_trackers(tmp_path, monkeypatch):
    """tensorboard's own files are read back; wandb and trackio get an Image of the file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = []
    run = types.SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append, finish=lambda exit_code: None)
    image = types.SimpleNamespace(Image=lambda path: ("image", path))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run, **vars(image)))
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(
        init=lambda **_: None, finish=lambda: None, log=lambda values, step: logged.append((values, step)),
        **vars(image),
    ))  # fmt: skip
    path = tmp_path / "retrieval.png"
    with RunLog(tmp_path, ["tensorboard", "wandb", "trackio"], {}, total_steps=9, enabled=True) as log:
        log.picture(3, "retrieval", tmp_path / "not there.png")
        Image.new("RGB", (30, 20), "red").save(path)
        log.picture(6, "retrieval", path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [shown] = events.Images("retrieval")
    assert (shown.step, shown.width, shown.height) == (6, 30, 20)
    with Image.open(io.BytesIO(shown.encoded_image_string)) as decoded:
        assert decoded.convert("RGB").getpixel((5, 5)) == (255, 0, 0)
    expected = ("image", str(path))
    assert logged == [{"retrieval": expected, "step": 6}, ({"retrieval": expected}, 6)]


def test_speed_of_a_device_is_told_where_there_are_several(tmp_path):
    out = io.StringIO()
    with RunLog(tmp_path, [], {}, total_steps=9, enabled=True, console=Console(file=out)) as log:
        for world in (1, 8):
            speed = {"speed/samples_per_second": 400.0 * world, "speed/samples_per_second_per_device": 400.0}
            log.metrics(world, speed | {"speed/memory": 31.26})
    one, eight = out.getvalue().splitlines()
    assert "400 samples/s  memory 31.3 GiB" in one
    assert "3,200 samples/s  400 a device  memory 31.3 GiB" in eight
    assert all("speed/samples_per_second_per_device" in line for line in lines_of(tmp_path))


def test_memory_is_that_of_this_process():
    held = bytearray(64 << 20)
    used = memory_used("cpu")
    assert 64 / 1024 < used < 64
    bigger = bytearray(held) * 4
    assert memory_used("cpu") >= used
    assert len(bigger) / (1 << 30) < memory_used("cpu")


def test_environment_has_versions_and_no_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    monkeypatch.setattr(sys, "argv", ["vlcl", "train", "configs/x.yaml"])
    write_environment(tmp_path, {"pairs": 123})
    text = (tmp_path / "environment.json").read_text()
    record = json.loads(text)
    assert record["command"] == ["vlcl", "train", "configs/x.yaml"]
    assert record["pairs"] == 123
    assert record["packages"]["torch"].split(".")[0].isdigit()
    assert record["packages"]["vlcl"]
    assert "hf_secret_value" not in text
