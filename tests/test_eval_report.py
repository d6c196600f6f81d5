"""The report of an evaluation: what its cells, averages, marks and notes say, and that its figure can be read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vlcl.errors import UserError
from vlcl.report.style import COLOURS
from vlcl_eval.datasets.registry import benchmarks
from vlcl_eval.report import figure as report_figure
from vlcl_eval.report.page import Table, comparison, model_tables, page, report, write_report
from vlcl_eval.report.scores import models_of

Records = Sequence[dict[str, Any]]
Capture = pytest.CaptureFixture[str]
Draw = Callable[[Records], Figure]
ALL = [benchmark.name for benchmark in benchmarks()]
SIZES = {benchmark.name: benchmark.splits["test"].num_images for benchmark in benchmarks()}
METRIC = {benchmark.name: benchmark.metric for benchmark in benchmarks()}


def record(
    dataset: str = "mnist", score: float = 50.0, method: str = "linear_probe", shots: int | str = 5, seed: int = 0,
    mode: str = "elevater", model: str = "emoji", weights: str = "3f" * 8, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    protocol = {"preprocess": "elevater", "knowledge": None, "precision": "fp32"}
    if method in ("linear_probe", "finetune"):
        protocol |= {"init": "language", "merge": False}
    base = {
        "model": model, "weights": weights, "dataset": dataset, "method": method, "shots": shots, "seed": seed,
        "mode": mode, "metric": METRIC.get(dataset, "accuracy"), "score": score, "protocol": protocol,
        "settings": {"lr": 0.01, "weight_decay": 1e-4, "epoch": 37, "epochs": 50} if method != "zeroshot" else {},
        "search": None, "sizes": {"classes": 10, "train": 50, "test": SIZES.get(dataset, 100)}, "complete": True,
        "short": {}, "bad_images": {}, "form": "native", "fingerprints": {"test": f"test of {dataset}"},
        "predictions": None, "seconds": 1.0, "images": {"forwards": 0, "cached": 0, "reference": 0},
        "params": {"trainable": 5130, "total": 1000, "visual": 500, "backbone": 1000},
    }  # fmt: skip
    return base | more


def zeroshot(dataset: str = "mnist", score: float = 40.0, **more: Any) -> dict[str, Any]:
    return record(dataset, score, method="zeroshot", shots=0, **more)


def rows_of(table: Table) -> dict[str, dict[str, str]]:
    head = table.rows[0]
    return {row[0]: dict(zip(head, row)) for row in table.rows[1:]}


def only_table(records: Records) -> Table:
    (table,) = model_tables(*models_of(records))
    return table


def test_a_cell_is_mean_and_deviation_over_seeds_with_their_number_where_it_is_not_three() -> None:
    records = [record(score=score, seed=seed) for seed, score in enumerate((60.0, 61.0, 63.5))]
    records += [record(score=score, seed=seed, shots=20) for seed, score in enumerate((70.0, 72.0))]
    records += [record(score=80.0, shots="full"), zeroshot(), record("dtd", 33.3)]
    assert f"{mean((60.0, 61.0, 63.5)):.2f} ± {stdev((60.0, 61.0, 63.5)):.2f}" == "61.50 ± 1.80"
    row, other = rows_of(only_table(records))["mnist"], rows_of(only_table(records))["dtd"]
    assert [row[name] for name in ("linear probe 5", "linear probe 20", "linear probe full", "zero-shot")] == [
        "61.50 ± 1.80", "71.00 ± 1.41 (n=2)", "80.00 (n=1)", "40.00"
    ]  # fmt: skip
    assert (other["linear probe 5"], other["linear probe 20"]) == ("33.30 (n=1)", "-")


def test_each_mode_has_its_table_and_says_how_the_epoch_was_chosen() -> None:
    records = [record(score=60), record(score=55, mode="strict"), zeroshot(score=41), zeroshot(score=39, mode="strict")]
    elevater, strict = model_tables(*models_of(records))
    assert elevater.title == "emoji, elevater: best of 50 epochs on the test set"
    assert strict.title == "emoji, strict: last epoch"
    assert rows_of(elevater)["mnist"]["zero-shot"] == "41.00"
    assert strict.rows[0] == ["data set", "metric", "chance", "zero-shot", "linear probe 5"]
    assert strict.rows[1] == ["mnist", "accuracy", "10.00", "39.00", "55.00 (n=1)"]
    assert only_table([zeroshot()]).title == "emoji, elevater"


def test_rows_are_in_the_benchmarks_order_with_their_metric_and_others_behind() -> None:
    names = ["voc-2007-classification", "my-own", "hateful-memes", "caltech-101"]
    table = only_table([zeroshot(name, 50.0) for name in names] + [zeroshot("my-own", 90.0)])
    shown = [tuple(row[:3]) for row in table.rows[1:]]
    assert shown == [
        ("caltech-101", "mean per class", "10.00"), ("hateful-memes", "ROC AUC", "50.00"),
        ("voc-2007-classification", "11-point mAP", "-"), ("my-own", "accuracy", "10.00"), ("mean of 3 of 20", "", ""),
    ]  # fmt: skip
    assert table.rows[-1][3] == "50.00"  # without the data set that is not of the benchmark
    assert only_table([zeroshot("a", 10.0), zeroshot("b", 20.0)]).rows[-1] == ["mean of 2", "", "", "15.00"]


def test_there_is_an_average_only_of_all_twenty_and_its_deviation_is_that_of_the_seeds_averages() -> None:
    scores = {(name, seed): 40 + i + (3 + i % 3) * seed for i, name in enumerate(ALL) for seed in range(3)}
    records = [record(name, score, seed=seed) for (name, seed), score in scores.items()]
    by_seed = [mean(scores[name, seed] for name in ALL) for seed in range(3)]
    *_, last = only_table(records).rows
    assert last == ["**Average**", "of all 20", "", f"**{mean(by_seed):.2f} ± {stdev(by_seed):.2f}**"]
    # one cell less: neither an average nor the same name
    *_, last = only_table(records[3:]).rows
    by_seed = [mean(scores[name, seed] for name in ALL[1:]) for seed in range(3)]
    assert last == ["mean of 19 of 20", "", "", f"{mean(by_seed):.2f} ± {stdev(by_seed):.2f}"]
    # a column with all of them beside one with fewer
    *_, average, rest = only_table([*records, zeroshot("mnist", 12.0)]).rows
    assert (average[0], average[3], rest[0], rest[3:]) == ("**Average**", "-", "mean of 1 of 20", ["12.00", "-"])


def test_a_mean_without_the_same_seeds_everywhere_has_no_more_seeds_than_all_share() -> None:
    records = [record("mnist", 10.0 + seed, seed=seed) for seed in range(3)]
    records += [record("dtd", 20.0 + seed, seed=seed) for seed in (0, 1)] + [record("dtd", 50.0, shots=20)]
    *_, last = only_table(records).rows
    assert last[0] == "mean of k of 20"
    assert last[3] == f"{mean((11.0, 20.5)):.2f} ± {stdev((15.0, 16.0)):.2f} (n=2, k=2)"
    assert last[4] == "50.00 (n=1, k=1)"


def test_a_sample_is_marked_and_is_no_part_of_an_average() -> None:
    small = {"complete": False, "short": {"test": [1000, 10000]}}
    table = only_table([zeroshot(name, 50.0, **(small if name == "mnist" else {})) for name in ALL])
    assert "mnist †" in rows_of(table)
    assert "cifar-10" in rows_of(table)
    assert table.notes == ["† mnist: a sample: 1,000 of 10,000 test images; not comparable with published figures."]
    assert table.rows[-1] == ["mean of 20 of 20 †", "", "", "50.00"]
    bad = only_table([zeroshot(complete=False, bad_images={"test": 2})])
    assert bad.notes == ["† mnist: a sample: 2 bad test images left out; not comparable with published figures."]
    assert "mnist §" in rows_of(only_table([zeroshot(), record(form="wds")]))
    assert "mnist" in rows_of(only_table([zeroshot(form="wds")]))  # the order of images makes no difference to it


def two_models() -> list[dict[str, Any]]:
    records = []
    for seed, (a, b) in enumerate([(50.0, 52.0), (51.0, 54.0), (52.0, 53.0)]):
        records += [record("mnist", a, seed=seed), record("mnist", b, seed=seed, model="other", weights="aa" * 8)]
        records += [record("dtd", a, seed=seed), record("dtd", a, seed=seed, model="other", weights="aa" * 8)]
    for seed in (0, 1):
        records.append(record("my-own", 50.0 + seed, seed=seed))
        records.append(record("my-own", 61.0 + seed, seed=seed + 1, model="other", weights="aa" * 8))
    return [*records, record("gtsrb", 70.0), zeroshot("mnist", 30.0)]


def test_a_comparison_shows_the_best_in_bold_and_the_difference_seed_by_seed() -> None:
    table, means = comparison(models_of(two_models()))
    rows = rows_of(table)
    assert table.title == "linear probe 5, elevater: best of 50 epochs on the test set"
    assert table.rows[0][3:] == ["emoji", "other", "other − emoji"]
    change = f"+2.00 ± {stdev((2.0, 3.0, 1.0)):.2f}"
    assert list(rows["mnist"].values()) == ["mnist", "accuracy", "10.00", "51.00 ± 1.00", "**53.00 ± 1.00**", change]
    assert rows["dtd"]["emoji"] == rows["dtd"]["other"] == "51.00 ± 1.00"  # equal: none is the best
    assert list(rows["gtsrb"].values())[3:] == ["70.00 (n=1)", "-", "-"]
    assert table.rows[-1][0] == "mean of 2 of 20"  # of those that both have
    assert rows["mean of 2 of 20"]["other − emoji"] == f"+1.00 ± {stdev((1.0, 1.5, 0.5)):.2f}"
    assert rows["my-own"]["other − emoji"] == "+11.00"  # not the same seeds: no deviation
    assert means.rows[1] == [table.title, "mean of 2 of 20", *table.rows[-1][3:]]
    text = page(models_of(two_models()), two_models())
    assert text.index("## Comparison") < text.index("## emoji") < text.index("## other")


def test_different_test_images_are_not_compared() -> None:
    records = [zeroshot("mnist", 50.0), zeroshot("mnist", 60.0, model="b", weights="bb", fingerprints={"test": "x"})]
    (table,) = comparison(models_of(records))
    assert table.rows[1:] == [["mnist ‡", "accuracy", "10.00", "50.00", "60.00", "-"]]
    assert table.notes == ["‡ mnist: other test images, labels or class names; not compared."]
    only_mnist = [r for r in two_models() if r["dataset"] == "mnist"]
    assert [table.rows[-1][0] for table in comparison(models_of(only_mnist))] == ["mnist"]  # one has no mean


def test_labels_are_unique_and_the_weights_tell_models_of_one_name_apart() -> None:
    twins = [
        zeroshot(weights="abcdef0123456789"),
        zeroshot(weights="0123456789abcdef"),
        zeroshot(model="c", weights="c"),
    ]
    assert [model.label for model in models_of(twins)] == ["emoji (abcdef01)", "emoji (01234567)", "c"]
    near = [zeroshot(weights="abcdef0100000000"), zeroshot(weights="abcdef01ffffffff")]
    assert [model.label for model in models_of(near)] == ["emoji (abcdef0100000000)", "emoji (abcdef01ffffffff)"]


def by_label(records: Records) -> dict[str, dict[str, str]]:
    return {model.label: rows_of(model_tables(model)[0])["mnist"] for model in models_of(records)}


def test_protocols_are_kept_apart_and_share_what_does_not_depend_on_them() -> None:
    base = record()["protocol"]
    records = [record(score=60.0), record(score=50.0, protocol=base | {"init": "random"}), zeroshot(score=30.0)]
    rows = by_label(records)
    assert {label: row["linear probe 5"] for label, row in rows.items()} == {
        "emoji, init=language": "60.00 (n=1)", "emoji, init=random": "50.00 (n=1)"
    }  # fmt: skip
    assert {row["zero-shot"] for row in rows.values()} == {"30.00"}
    # a fixed setting against a search: the key is in some of the records alone
    rows = by_label([record(score=60.0), record(score=50.0, protocol=base | {"lr": 0.1})])
    assert set(rows) == {"emoji, lr=unset", "emoji, lr=0.1"}


def write(folder: Path, records: Records) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return folder


def test_of_several_folders_the_later_one_wins_and_the_first_gets_the_report(tmp_path: Path, capsys: Capture) -> None:
    first = write(tmp_path / "a", [zeroshot("mnist", 11.0), zeroshot("dtd", 22.0)])
    second = write(tmp_path / "b", [zeroshot("mnist", 33.0)])
    path = report([first, second], None)
    assert path == first / "report.md"
    text = path.read_text(encoding="utf-8")
    assert ("33.00" in text, "11.00" in text) == (True, False)
    assert "22.00" in capsys.readouterr().out
    assert report([first], tmp_path / "out") == tmp_path / "out" / "report.md"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md", "report.png"]


def test_what_cannot_be_reported_is_said_and_an_older_report_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"results\.jsonl does not exist"):
        report([tmp_path], None)
    with pytest.raises(UserError, match="1 in number, none has a score"):
        write_report([record(score=math.nan)], tmp_path / "x")
    old = write_report([record()], tmp_path).read_text(encoding="utf-8")
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: (tmp_path / "no" / "folder").touch())
    with pytest.raises(UserError, match="could not be written"):
        write_report([record(score=99.0)], tmp_path)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == old


def test_notes_count_searches_and_forwards_once_for_both_modes_and_what_has_no_score() -> None:
    shared = {
        "search": {"val_score": 70.0, "runs": 90, "diverged": 12,
                   "failed": [{"lr": 0.1, "weight_decay": 1.0, "why": "out of memory"}]},
        "images": {"forwards": 1000, "cached": 50, "reference": 2_000_000},
    }  # fmt: skip
    records = [record(seed=seed, mode=mode, **shared) for seed in (0, 1) for mode in ("elevater", "strict")]
    records += [record(seed=2, score=math.inf), record(shots=20, fingerprints={"test": "grown"})]
    own = {"forwards": 9, "cached": 9, "reference": None}
    records += [record(method="logistic", mode="strict", settings={}, images=own)]
    for seed, mode in product(range(3), ("elevater", "strict")):
        records.append(record("dtd", seed=seed, mode=mode, settings={"diverged": seed > 0}))
    text = page(models_of(records), records)
    notes = text[text.index("## Notes") :]
    assert "- emoji, linear probe: 180 settings searched, 24 diverged, 2 failed (out of memory)." in notes
    assert "- emoji: 2,000 image forwards, 100 images from the cache;" in notes
    assert "4,000,000 forwards for the same scores, 2,000 times as many." in notes
    assert notes.count("- emoji, dtd, linear probe 5: the final training diverged, seed 1, 2.\n") == 1
    assert "- Results without a finite score, which are left out: 1." in notes
    assert "- emoji, linear probe: preprocess=elevater, knowledge=none, precision=fp32, init=language, merge=f" in text
    assert "L-BFGS probe (not ELEVATER) 5" in text
    assert "- emoji, mnist: the results are not all of the same test images." in notes


def few_shot(names: Sequence[str], model: str = "emoji", lift: float = 0.0, methods: Sequence[str] = ("linear_probe",)):
    """Zero-shot and three columns of each method in both modes, with two seeds."""
    weights, records = model.encode().hex(), []
    for (place, name), mode in product(enumerate(names), ("elevater", "strict")):
        records.append(zeroshot(name, 30.0 + place + lift, mode=mode, model=model, weights=weights))
        for method, (step, shots), seed in product(methods, enumerate((5, 20, "full"), start=1), (0, 1)):
            score = 30 + place + lift + 8 * step + seed - 2 * (mode == "strict")
            records.append(record(name, score, method, shots, seed, mode, model, weights))
    return records


CASES = {
    "one model, one data set": few_shot(["mnist"]),
    "two models, three data sets": few_shot(["mnist", "dtd", "gtsrb"]) + few_shot(["mnist", "dtd", "gtsrb"], "b", 5.0),
    "three models, all data sets": [r for i, m in enumerate("abc") for r in few_shot(ALL, m, 4.0 * i)],
    "zero-shot alone": [zeroshot(name, 3.0 * place) for place, name in enumerate(ALL)],
    "two methods": few_shot(ALL[:6], methods=("linear_probe", "finetune")),
    "nine models of long names": [r for i in range(9) for r in few_shot(["mnist"], f"{i} {'long name ' * 6}", 3.0 * i)],
}


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Draw:
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda canvas, *_, **__: drawn.append(canvas))
    return lambda records: report_figure.draw(models_of(records), Path("nowhere")) or drawn[-1]


def shown_texts(canvas: Figure) -> list[Text]:
    """All texts but labels of ticks beyond an axis' limits, which exist and are not drawn."""
    texts = [*canvas.texts, *(text for legend in canvas.legends for text in legend.get_texts())]
    for axes in canvas.axes:
        texts += axes.texts
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            texts += [label for label, at in zip(axis.get_ticklabels(), axis.get_ticklocs()) if low <= at <= high]
    return texts


@pytest.mark.parametrize("case", CASES)
def test_no_text_of_the_figure_covers_another_or_leaves_the_page(case: str, draw: Draw) -> None:
    canvas = draw(CASES[case])
    renderer = FigureCanvasAgg(canvas).get_renderer()
    canvas.draw(renderer)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown_texts(canvas)]
    outside = [text for text, box in boxes if not canvas.bbox.x0 <= box.x0 <= box.x1 <= canvas.bbox.x1]
    outside += [text for text, box in boxes if not canvas.bbox.y0 <= box.y0 <= box.y1 <= canvas.bbox.y1]
    assert not outside
    assert not [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]


def test_the_figure_has_a_panel_a_data_set_and_one_of_the_mean(draw: Draw) -> None:
    mean_axes, dtd, _ = draw(few_shot(["mnist", "dtd"]) + few_shot(["mnist", "dtd"], "b", 5.0)).axes
    assert [text.get_text() for text in dtd.texts] == ["dtd", "accuracy"]
    assert [label.get_text() for label in dtd.get_xticklabels()] == ["0", "5", "20", "full"]
    ys = [(line.get_color(), line.get_linestyle(), np.asarray(line.get_ydata()).tolist()) for line in dtd.lines]
    heights = {(colour, style): values for colour, style, values in ys if len(values) == 3}
    # dtd stands second in the records, so 31 and its gains; the mean of two seeds adds a half
    assert heights[COLOURS[0], "-"] == [39.5, 47.5, 55.5]
    assert heights[COLOURS[0], "--"] == [37.5, 45.5, 53.5]
    assert heights[COLOURS[1], "-"] == [44.5, 52.5, 60.5]
    rings = sorted(np.asarray(line.get_ydata())[0] for line in mean_axes.lines if np.asarray(line.get_xdata())[0] < 0.5)
    assert rings == [30.5, 30.5, 35.5, 35.5]


def test_the_mean_in_the_figure_is_of_the_data_sets_that_every_point_has(draw: Draw) -> None:
    records = [r for r in few_shot(["mnist", "dtd", "gtsrb"]) if (r["dataset"], r["shots"]) != ("gtsrb", "full")]
    texts = [text.get_text() for text in draw(records).axes[0].texts]
    assert texts == ["mean", "2 of 3 data sets, those with every point"]


def test_report_png_shows_each_model_in_its_colour(tmp_path: Path) -> None:
    write_report(few_shot(["mnist"]) + few_shot(["mnist"], "b", 5.0), tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "report.png").convert("RGB"), dtype=np.int64)
    for colour, shown in zip(COLOURS[:3], (True, True, False)):
        wanted = np.array([round(255 * part) for part in to_rgb(colour)])
        assert bool((np.abs(pixels - wanted).sum(axis=2) < 6).sum() > 100) is shown
