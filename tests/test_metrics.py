"""The table of metrics is whole, and what runs log and the docs say. Run: pytest tests/test_metrics.py"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from shards import make_shards, tiny_model

import vlcl
from vlcl.config import load_config
from vlcl.flops import Arithmetic
from vlcl.logs import read_metrics
from vlcl.metrics import COMPARABLE, FIGURES, GROUPS, HEADLINE, METRICS, docs_table, is_test, metric_of, on_val
from vlcl.report.figures import draw
from vlcl.train import train

FRAME = {"step", "time", "total_steps"}  # of a line of metrics.jsonl
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """By loss, the names that a short run with all evaluations logs; a training picture in ten is broken."""
    folder = tmp_path_factory.mktemp("runs")

    def damage(i: int, files: dict[str, bytes]) -> None:
        if i % 10 == 3:
            files["png"] = b"<html>"

    data, val = make_shards(folder / "train", (30, 22), damage), make_shards(folder / "val", (12,))
    test = make_shards(folder / "test", (11,))
    for place in ("classes", "more"):
        for name, colour in (("red", (255, 0, 0)), ("blue", (0, 128, 255))):
            (folder / place / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), colour).save(folder / place / name / "0.png")
    names = {}
    patch = pytest.MonkeyPatch()
    patch.setattr("vlcl.anomalies.STREAK", 1)  # the clip is an anomaly at once
    patch.setattr("vlcl.run.arithmetic_of", lambda *_: Arithmetic(1e6, 1e12))  # as on a GPU
    for loss in ("em", "siglip", "isogclr"):  # with a table; without one; with a temperature a pair
        train(load_config(None, [
            f"data.train={data}", f"data.val={val}", f"data.test={test}",
            f"eval.zeroshot=[{folder / 'classes'},{folder / 'more'}]",
            f"loss.name={loss}", f"model.name={tiny_model(folder / 'model')}", f"train.output={folder / loss}",
            "train.steps=3", "train.batch_size=12", "train.log_every=1", "train.precision=fp32", "eval.examples=0",
            "data.workers=0", "data.streams=2", "log.trackers=[]", "optim.clip_norm=1e-9",
        ]))  # fmt: skip
        names[loss] = {name for line in read_metrics(folder / loss) for name in line} - FRAME
    patch.undo()

    def label(i: int, files: dict[str, bytes]) -> None:
        damage(i, files)
        files["cls"] = b"1" if i % 2 else b"0"

    data, val, test = (make_shards(folder / f"pictures{n}", (n,), label) for n in (30, 9, 8))
    train(load_config(None, [
        "model.kind=views", f"data.train={data}", f"data.val={val}", f"data.test={test}", "views.projector_hidden=8",
        "views.predictor_hidden=8", "views.linear_epochs=2", f"model.name={tiny_model(folder / 'model')}",
        f"train.output={folder / 'views'}", "train.steps=3", "train.batch_size=12", "train.log_every=1",
        "train.precision=fp32", "eval.examples=0", "data.workers=0", "data.streams=2", "log.trackers=[]",
    ]))  # fmt: skip
    names["views"] = {name for line in read_metrics(folder / "views") for name in line} - FRAME
    return names


def test_a_run_logs_no_metric_that_the_table_lacks(logged: dict[str, set[str]]) -> None:
    assert {loss: {name for name in names if metric_of(name) is None} for loss, names in logged.items()} == {
        "em": set(), "siglip": set(), "isogclr": set(), "views": set()
    }  # fmt: skip


def test_every_metric_of_the_table_is_logged_by_some_run(logged: dict[str, set[str]]) -> None:
    found = {metric_of(name) for names in logged.values() for name in names}
    assert [metric.name for metric in METRICS if metric not in found] == []


def test_what_compare_may_choose_is_logged_by_a_run_with_all_evaluations(logged: dict[str, set[str]]) -> None:
    for loss, names in logged.items():
        held_out = {name for name in names if name.startswith(("val/", "test/"))}
        of_sets = {f"val/zeroshot_top{k}/{name}" for k in (1, 5) for name in ("classes", "more")}
        assert of_sets <= held_out or loss == "views"
        held_out -= of_sets
        kind = "views" if loss == "views" else "clip"
        wanted = {metric.name for metric in COMPARABLE if metric.kind == kind}
        assert wanted == held_out - {"val/skipped", "test/skipped"}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_record_is_complete(metric) -> None:
    assert re.fullmatch(r"[\w@/]+", metric.name)
    assert metric.name.endswith("/") == bool(metric.tail)
    assert re.fullmatch(r"[A-Z].{15,}\.", metric.meaning)
    assert metric.unit
    assert metric.direction in ("higher", "lower", "none")
    for show in (metric.line, metric.bar):
        assert show is None or re.search(r"1\d|\d1", show(11.0))  # the value is in it, also as a percentage
    if metric.figure and not metric.compare_needs:
        assert bool(metric.label) == (len(metric.figure.metrics) > 1)
    if metric.compare_needs:
        section, key = metric.compare_needs.split(".")
        assert hasattr(getattr(load_config(None, ["data.train=x", "train.output=y"]), section), key)
        assert metric.direction != "none"
        assert metric.label  # with the figure, its name in a comparison's title
        assert metric.figure


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.title)
def test_every_figure_is_drawn_with_all_its_metrics(figure) -> None:
    assert figure.group in GROUPS
    assert figure.title
    assert figure.axis
    assert figure.explanation or len({metric.meaning for metric in figure.metrics}) == 1
    assert len({metric.colour for metric in figure.metrics}) == len(figure.metrics)
    svg = draw(figure, [{"step": step, **{m.name: step / 9 for m in figure.metrics}} for step in (1, 2)])
    assert svg
    assert figure.axis in svg
    for metric in figure.metrics:
        assert f"var({metric.colour})" in svg
        assert metric.label in svg


def test_names_are_unique_and_a_varying_tail_is_known() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    broken, skipped = metric_of("data/skipped/broken image"), metric_of("data/skipped")
    assert broken
    assert skipped
    assert (broken.tail, skipped.tail) == ("REASON", "")
    assert [metric_of(name) for name in ("data/skipped/", "data/skippe", "train/loss/x", "val/R@1", "step")] == [
        None
    ] * 5


def test_merit_orders_values_from_worse_to_better() -> None:
    loss, recall = metric_of("train/loss"), HEADLINE[0]
    assert loss
    assert max([0.2, 0.5, 0.1], key=loss.merit) == 0.1
    assert max([0.2, 0.5, 0.1], key=recall.merit) == 0.5


def test_a_metric_of_the_test_pairs_has_its_like_on_val() -> None:
    of_test = [metric for metric in METRICS if is_test(metric.name)]
    assert len(of_test) > 6
    for metric in of_test:
        like = metric_of(on_val(metric.name))
        assert like
        assert (like.unit, like.direction, like.label) == (metric.unit, metric.direction, metric.label)
    assert on_val("val/zeroshot_top1") == "val/zeroshot_top1"


def test_the_docs_have_the_table() -> None:
    assert docs_table() in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(f"`{metric.name}{metric.tail}`" in docs_table() and metric.meaning in docs_table() for metric in METRICS)
    printed = subprocess.run([sys.executable, "-m", "vlcl.metrics"], capture_output=True, text=True, check=True)
    assert printed.stdout == docs_table() + "\n"


def test_who_shows_metrics_takes_their_names_from_the_table() -> None:
    package = Path(vlcl.__file__).parent
    shown = [
        package / "logs.py",
        *(file for room in ("report", "compare", "export") for file in package.glob(f"{room}/*.py")),
    ]
    quoted = {
        metric.name: re.compile(rf"""["']{re.escape(metric.name)}["']""") for metric in METRICS if "/" in metric.name
    }
    assert len(shown) > 10
    assert [(file.name, name) for file in shown for name, text in quoted.items() if text.search(file.read_text())] == []


def test_the_table_needs_nothing_of_vlcl() -> None:
    code = (
        "import sys, vlcl.metrics; print([m for m in sys.modules if m.startswith('vlcl.') or m in ('torch', 'rich')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['vlcl.metrics']"
