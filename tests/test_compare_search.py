"""Learning rates of `vlcl compare`: scaled, searched, chosen by one metric and shown by another; paired differences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev

import pytest
from compare_fakes import WAYS, finish, folders, noise, recall
from shards import make_shards, tiny_model
from typer.testing import CliRunner

import vlcl.compare.command as command
from vlcl.cli import app
from vlcl.compare.comparison import T_975, Comparison, Difference, Point, Result, best_rate
from vlcl.compare.grid import Cell, Data, rates_of
from vlcl.compare.search import wanted_cells
from vlcl.config import Config, DataConfig, TrainConfig
from vlcl.errors import UserError

VAL, TEST = (tuple(f"{split}/{way}_R@1" for way in WAYS) for split in ("val", "test"))
SETTINGS = Config(data=DataConfig(train="x"), train=TrainConfig(steps=1))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """96 samples at batch size 16; with pairs for the choice and others to show."""
    folder = tmp_path_factory.mktemp("data")
    path = folder / "tiny.yaml"
    path.write_text(f"""
data: {{train: {make_shards(folder / "train", (90,))}, val: {make_shards(folder / "val", (9,))},
  test: {make_shards(folder / "test", (11,))}}}
model: {{name: "{tiny_model(folder / "model")}"}}
train: {{steps: 6, batch_size: 16, output: runs/never}}
optim: {{lr: 1e-3, warmup: 2}}
log: {{trackers: []}}
""")
    return str(path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that were run, in order; they are faked."""
    names: list[str] = []

    def run_cell(cell: Cell):
        names.append(cell.name)
        return finish(cell)

    monkeypatch.setattr(command, "run_cell", run_cell)
    return names


def cell(lr: float, seed: int = 0, beyond: int = 0, loss: str = "em") -> Cell:
    return Cell(f"{loss}-{lr:g}-s{seed}", loss, 8, lr, seed, SETTINGS, beyond)


@pytest.mark.parametrize(
    ("scale", "size", "expected"),
    [
        ("none", 64, [1e-3, 2e-3]),
        ("sqrt", 64, [2e-3, 4e-3]),
        ("linear", 64, [4e-3, 8e-3]),
        ("sqrt", 8, [7.07107e-4, 1.41421e-3]),
    ],
)
def test_rates_are_for_the_batch_size_of_the_config(scale: str, size: int, expected: list[float]) -> None:
    assert rates_of([1e-3, 2e-3], size, 16, scale, False, 2) == [(lr, 0) for lr in expected]


def test_rates_beyond_go_on_in_the_ratio_of_their_neighbours() -> None:
    rates = rates_of([9e-3, 1e-3, 3e-3, 18e-3], 16, 16, "none", True, 2)
    assert [lr for lr, _ in rates] == [1.11111e-4, 3.33333e-4, 1e-3, 3e-3, 9e-3, 0.018, 0.036, 0.072]
    assert [beyond for _, beyond in rates] == [-2, -1, 0, 0, 0, 0, 1, 2]
    assert rates_of([3e-3, 1e-3], 16, 16, "none", True, 0) == [(1e-3, 0), (3e-3, 0)]


CELLS = [
    cell(2.0**power, seed, beyond) for seed in (0, 1, 2) for power, beyond in zip(range(-2, 4), (-2, -1, 0, 0, 1, 2))
]


def search(merit, failing: tuple[float, ...] = ()) -> tuple[list[str], int]:
    """Cells by the time they are asked for, one at a time, and how often the search asked for more."""
    results: dict[str, Result] = {}
    rounds = 0
    while waiting := [cell for cell in wanted_cells(CELLS, results, VAL) if cell.name not in results]:
        rounds += len(waiting) > 0
        one = waiting[0]
        fails = one.lr in failing
        results[one.name] = Result(one, error="inf") if fails else Result(one, value=0.0, choice=merit(one.lr))
    return list(results), rounds


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (1.0, [1, 2, 0.5]),  # the lower end of 1, 2: a step below it, and the best is inside
        (0.25, [1, 2, 0.5, 0.25]),  # no more than two steps
        (0.01, [1, 2, 0.5, 0.25]),
        (2.0, [1, 2, 4]),
        (99.0, [1, 2, 4, 8]),
    ],
)
def test_the_search_goes_on_until_the_best_is_inside(best: float, expected: list[float]) -> None:
    names, _ = search(lambda lr: -abs(math.log2(lr / best)))
    found = min(expected, key=lambda lr: abs(math.log2(lr / best)))
    assert names == [f"em-{lr:g}-s0" for lr in expected] + [f"em-{found:g}-s{seed}" for seed in (1, 2)]


def test_a_rate_that_fails_is_an_end_and_all_that_fail_are_no_choice() -> None:
    assert search(lambda lr: lr, failing=(4.0, 8.0))[0] == ["em-1-s0", "em-2-s0", "em-4-s0", "em-2-s1", "em-2-s2"]
    assert search(lambda lr: lr, failing=(1.0, 2.0))[0] == ["em-1-s0", "em-2-s0"]


def test_a_search_that_is_asked_again_wants_the_same() -> None:
    ended = {one.name: Result(one, value=0.0, choice=-one.lr) for one in CELLS}
    stopped = {name: ended[name] for name in ("em-1-s0", "em-2-s0", "em-0.5-s0")}
    assert [c.name for c in wanted_cells(CELLS, stopped, VAL)] == ["em-0.25-s0", "em-0.5-s0", "em-1-s0", "em-2-s0"]
    whole = [c.name for c in wanted_cells(CELLS, ended, VAL)]
    assert whole == ["em-0.25-s0", "em-0.5-s0", "em-1-s0", "em-2-s0", "em-0.25-s1", "em-0.25-s2"]


def test_rates_are_compared_on_the_seeds_that_all_have() -> None:
    rates = {
        1.0: [Result(cell(1.0, 0), value=0.0, choice=0.5)],
        2.0: [Result(cell(2.0, 0), value=9.0, choice=0.4), Result(cell(2.0, 1), value=9.0, choice=0.9)],
    }
    assert best_rate(rates, float) == 1.0
    rates[1.0].append(Result(cell(1.0, 1), value=0.0, choice=0.6))
    assert best_rate(rates, float) == 2.0
    rates[2.0][1] = Result(cell(2.0, 1), error="inf")
    assert best_rate(rates, float) == 1.0


def test_quantiles_of_student_s_t() -> None:
    """Each leaves 2.5 % above it: the density is integrated."""
    for n, t in enumerate(T_975, 1):
        scale = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
        steps = 2000
        heights = [(1 + (t * k / steps) ** 2 / n) ** (-(n + 1) / 2) for k in range(steps + 1)]
        area = t / steps / 3 * sum(h * (1 if k in (0, steps) else 4 if k % 2 else 2) for k, h in enumerate(heights))
        assert 0.5 - scale * area == pytest.approx(0.025, abs=3e-5), n


def test_differences_pair_the_seeds() -> None:
    """Seeds vary more than losses do: unpaired, nothing would be seen."""
    seeds = {0: 0.1, 1: 0.5, 2: 0.9, 3: 0.2}
    first = [Result(cell(1.0, s, loss="infonce"), value=v) for s, v in seeds.items() if s < 3]
    first.append(Result(cell(1.0, 3, loss="infonce"), error="inf"))
    gains = {0: 0.02, 1: 0.03, 2: 0.04, 3: 0.9}
    other = [Result(cell(1.0, s), value=v + gains[s]) for s, v in seeds.items()]
    comparison = Comparison(Path(), "", VAL, Data(100, 10, 96), (*first, *other))
    (found,) = comparison.differences
    assert (found.point.cell.loss, found.first.cell.loss, len(found.values)) == ("em", "infonce", 3)
    assert found.mean == pytest.approx(0.03)
    assert found.half_width == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    point = Point(())
    assert Difference(point, point, (0.1,)).half_width is None
    many = Difference(point, point, tuple(map(float, range(50))))
    assert many.half_width == pytest.approx(2.042 * stdev(range(50)) / math.sqrt(50))


def test_chosen_on_val_shown_on_test(config: str, tmp_path: Path, trained: list[str]) -> None:
    grid = {"losses": ["infonce", "em"], "batch_sizes": [16, 64], "seeds": 3, "lrs": [1e-3, 2e-3]}
    done = command.compare(config, **grid, output=tmp_path, scale_lr="sqrt")
    assert len(trained) == 24
    assert (done.metric, done.select) == (TEST, VAL)
    best = {(p.cell.loss, p.cell.batch_size): p for p in done.points if p.best}
    assert {key: p.cell.lr for key, p in best.items()} == {
        ("infonce", 16): 2e-3, ("infonce", 64): 4e-3, ("em", 16): 2e-3, ("em", 64): 4e-3,
    }  # fmt: skip
    shown = [recall(result.cell, "test") for result in best["em", 64].results]
    assert best["em", 64].mean == pytest.approx(mean(shown))
    text = (tmp_path / "compare.md").read_text()
    assert text.startswith("# Test R@1, mean of image to text and text to image\n")
    assert "`test/text_to_image_R@1` at the end of training, 11 test pairs." in text
    assert "Bold: the learning rate that is best by mean of `val/image_to_text_R@1` and `val/text_to_image_R@1`" in text
    assert "looks a little too good" not in text
    assert "Learning rates grow with the square root of the batch size" in text
    found = json.loads((tmp_path / "compare.json").read_text())
    assert (found["select_on"], found["scale_lr"], found["test_pairs"]) == (list(VAL), "sqrt", 11)
    point = next(p for p in found["points"] if (p["loss"], p["lr"]) == ("em", 2e-3) and p["batch_size"] == 16)
    assert point["selection_mean"] == pytest.approx(mean(recall(r.cell, "val") for r in best["em", 16].results))
    seeds = [recall(em.cell, "test") - recall(nce.cell, "test")
             for em, nce in zip(best["em", 16].results, best["infonce", 16].results)]  # fmt: skip
    difference = found["differences"][0]
    assert (difference["loss"], difference["to"], difference["batch_size"]) == ("em", "infonce", 16)
    assert difference["values"] == pytest.approx(seeds)
    half = 4.303 * stdev(seeds) / math.sqrt(3)
    row = f"{100 * mean(seeds):+.2f} | {100 * (mean(seeds) - half):+.2f} to {100 * (mean(seeds) + half):+.2f} |   3 |"
    assert row in " ".join(text.split("## Differences from `infonce`")[1].split()).replace("| 3 |", "|   3 |")


def test_another_metric_may_choose(config: str, tmp_path: Path, trained: list[str]) -> None:
    def best(**options) -> float:
        done = command.compare(
            config, losses=["em"], batch_sizes=[16], seeds=1, lrs=[1e-3, 2e-3, 8e-3], output=tmp_path, **options
        )
        return next(point.cell.lr for point in done.points if point.best)

    assert best() == 2e-3
    assert best(metric=VAL[0]) == 2e-3
    assert best(metric=TEST[0]) == 2e-3
    assert best(metric=TEST[0], select_on=VAL[1]) == 2e-3
    assert len(trained) == 3
    with pytest.raises(UserError, match=r"--select-on test/.*nothing is chosen on data.test"):
        best(select_on=TEST[0])
    with pytest.raises(UserError, match=r"--select-on val/R@2: the runs do not produce it"):
        best(select_on="val/R@2")
    with pytest.raises(UserError, match=r"nothing is chosen on data.test.*set data.val=SHARDS"):
        best(overrides=["data.val=null"])


def test_without_val_there_is_a_table_of_test_where_nothing_is_chosen(
    config: str, tmp_path: Path, trained: list[str]
) -> None:
    done = command.compare(
        config, losses=["em"], batch_sizes=[16], seeds=2, output=tmp_path, overrides=["data.val=null"]
    )
    assert done.metric == TEST
    assert [result.value for result in done.results] == [pytest.approx(recall(r.cell, "test")) for r in done.results]


def test_tune_on_the_command_line_is_stopped_and_goes_on(
    config: str, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["compare", config, "--loss", "infonce,em", "--batch-size", "16", "--seeds", "3", "--output", str(tmp_path)]
    line += ["--lr", "1e-3,2e-3", "--tune"]
    fake = command.run_cell

    def stopped(cell: Cell):
        if len(trained) == 5:
            raise KeyboardInterrupt
        return fake(cell)

    monkeypatch.setattr(command, "run_cell", stopped)
    assert CliRunner().invoke(app, line).exit_code == 130
    assert "5 of 8 cells have a result" in (tmp_path / "compare.md").read_text()
    monkeypatch.setattr(command, "run_cell", fake)
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "5 of them finished earlier" in done.output
    first = [f"{loss}-b16-lr{lr:g}-s0" for loss in ("infonce", "em") for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
    rest = [f"{loss}-b16-lr0.004-s{seed}" for loss in ("infonce", "em") for seed in (1, 2)]
    assert sorted(trained) == sorted(first + rest) == folders(tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert "12 of 12 cells have a result" in text
    assert "Rates were compared with the first seed" in text
    assert "the best is at the end" not in text
    found = json.loads((tmp_path / "compare.json").read_text())
    means = [p["selection_mean"] for p in found["points"][:4]]  # of the first seed alone, as that is what chose
    assert means == [pytest.approx(0.42 + noise("infonce", 0) + step) for step in (0, 0.04, 0.08, 0.04)]
    assert [(p["lr"], p["n"], p["best_lr"]) for p in found["points"][:4]] == [
        (1e-3, 1, False), (2e-3, 1, False), (4e-3, 3, True), (8e-3, 1, False),
    ]  # fmt: skip
    trained.clear()
    assert CliRunner().invoke(app, [*line, "--widen", "0"]).exit_code == 0  # the end of the list is the end then
    assert trained == [f"{loss}-b16-lr0.002-s{seed}" for seed in (1, 2) for loss in ("infonce", "em")]
    assert (tmp_path / "compare.md").read_text().count("the best is at the end of the rates tried") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--scale-lr cube", "--scale-lr cube: allowed are none, sqrt, linear"),
        ("--tune", "--tune needs two learning rates or more"),
        ("--tune --lr 1e-3", "--tune needs two learning rates or more"),
        ("--tune --lr 1e-3,2e-3 --widen -1", "--widen -1: allowed are whole numbers >= 0"),
        ("--tune --lr 1e-3,2e-3 optim.lr_min=4e-4", "optim.lr_min=0.0004 is above optim.lr=0.00025"),
        ("--jobs 0", "--jobs 0: allowed are whole numbers >= 1"),
        ("--discard", "give --results FILE.jsonl"),
        ("--results .", "--results . is a folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    config: str, tmp_path: Path, trained: list[str], arguments: str, message: str
) -> None:
    line = ["compare", config, "--loss", "em", "--batch-size", "8", "--seeds", "2", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*line, *arguments.split()])
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not trained
