"""`vlcl compare` on real shards: a whole grid, equal samples, going on, failing cells, and what users get wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from PIL import Image
from shards import make_shards, tiny_model
from typer.testing import CliRunner

import vlcl.train
from vlcl.cli import app
from vlcl.compare.command import compare
from vlcl.compare.comparison import Comparison, Result
from vlcl.compare.grid import Cell, Data
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.metrics import COMPARABLE

R1 = ("val/image_to_text_R@1", "val/text_to_image_R@1")
CELLS = [
    f"{loss}-b{size}-lr0.002-s{seed}" for seed in (0, 1) for loss in ("em_gamma=0.5", "infonce") for size in (8, 16)
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An experiment of 8 steps of 12 pairs: 96 samples, 24 of them in the warm-up."""
    folder = tmp_path_factory.mktemp("data")
    path = folder / "tiny.yaml"
    path.write_text(f"""
data: {{train: {make_shards(folder / "train", (30, 7, 41, 22))}, val: {make_shards(folder / "val", (9, 10))},
  workers: 0, streams: 1, shuffle: 16}}
model: {{name: "{tiny_model(folder / "model")}"}}
loss: {{name: em, order: before}}
optim: {{lr: 2e-3, warmup: 2}}
train: {{steps: 8, batch_size: 12, log_every: 1, precision: fp32, output: runs/never}}
eval: {{every: 1, examples: 1}}
checkpoint: {{every: 3, async_save: false}}
log: {{trackers: []}}
""")
    return str(path)


@pytest.fixture(scope="module")
def whole(config: str, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two losses, two batch sizes, two seeds. Tests that write take a copy."""
    output = tmp_path_factory.mktemp("comparison")
    return compare(config, losses=["em:gamma=0.5", "infonce"], batch_sizes=[8, 16], seeds=2, output=output)


def again(config: str, output: Path) -> Comparison:
    return compare(config, losses=["em:gamma=0.5", "infonce"], batch_sizes=[8, 16], seeds=2, output=output)


def copy_of(whole: Comparison, folder: Path) -> Path:
    shutil.copytree(whole.folder, folder)  # keeps the times of files
    return folder


def times(folder: Path) -> dict[str, int]:
    """When each file of a cell was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def last_line(cell: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if "val/image_to_text_R@1" in line)


def values(comparison: Comparison) -> dict[str, float | None]:
    return {result.cell.name: result.value for result in comparison.results}


def test_the_grid_is_whole_and_every_cell_sees_as_many_samples(whole: Comparison) -> None:
    assert [result.cell.name for result in whole.results] == CELLS
    assert sorted(path.name for path in whole.folder.iterdir() if path.is_dir()) == sorted(CELLS)
    for result in whole.results:
        cell, settings = result.cell, load_config(result.cell.folder / "config.yaml")
        assert (cell.steps, cell.samples) == {8: (12, 96), 16: (6, 96)}[cell.batch_size]
        assert (settings.train.steps, settings.train.epochs, settings.train.seed) == (cell.steps, None, cell.seed)
        assert settings.optim.warmup * cell.batch_size == {8: 24, 16: 32}[cell.batch_size]  # 1.5 steps of 16, rounded
        assert settings.loss.name == cell.loss.partition(":")[0]
        assert getattr(settings.loss, "gamma", 0.5) == 0.5  # of the item
        assert getattr(settings.loss, "order", "before") == "before"  # of the file, which is about the same loss
        lines = (cell.folder / "metrics.jsonl").read_text().splitlines()
        assert sum("val/" in line for line in lines) == 1  # at the end only
        assert "done: " in (cell.folder / "log.txt").read_text()


def test_means_and_deviations_are_those_of_the_logs(whole: Comparison) -> None:
    found = json.loads((whole.folder / "compare.json").read_text())
    table = (whole.folder / "compare.md").read_text()
    assert found["metric"] == list(R1)
    assert [cell["cell"] for cell in found["cells"]] == CELLS
    for point in found["points"]:
        label = point["loss"].replace(":", "_")
        seeds = [last_line(whole.folder / f"{label}-b{point['batch_size']}-lr0.002-s{seed}") for seed in (0, 1)]
        expected = [(line[R1[0]] + line[R1[1]]) / 2 for line in seeds]
        assert point["mean"] == pytest.approx(mean(expected))
        assert point["sd"] == pytest.approx(stdev(expected))
        assert (point["n"], point["samples"]) == (2, 96)
        row = [cell.strip() for line in table.splitlines() if f"`{point['loss']}`" in line for cell in line.split("|")]
        assert f"{100 * mean(expected):.2f}%" in row
        assert f"{100 * stdev(expected):.2f}%" in row
    assert len({point["mean"] for point in found["points"]}) > 1


def test_the_figure_is_a_picture(whole: Comparison) -> None:
    with Image.open(whole.folder / "compare.png") as picture:
        assert picture.width > 1000
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(0x25, 0x63, 0xC9), (0xD2, 0x60, 0x0F)} <= colours  # a line for each of the two losses


def test_a_cell_is_the_run_that_it_says_it_is(whole: Comparison, tmp_path: Path) -> None:
    """Other cells before it in the same process change nothing."""
    cell = whole.results[-1].cell
    alone = vlcl.train.train(load_config(cell.folder / "config.yaml", [f"train.output={tmp_path / 'alone'}"]))
    assert {name: alone[name] for name in R1} == {name: last_line(cell.folder)[name] for name in R1}
    of_pictures = {"val/knn_top1", "val/linear_top1"}  # alone
    needed = {m.name for m in COMPARABLE if m.compare_needs == "data.val"} - of_pictures
    assert needed == set(alone) - {"val/skipped"}


def test_what_is_finished_is_not_run_again(config: str, whole: Comparison, tmp_path: Path) -> None:
    output = copy_of(whole, tmp_path / "copy")
    before = {name: times(output / name) for name in CELLS}
    assert values(again(config, output)) == values(whole)
    assert {name: times(output / name) for name in CELLS} == before
    shutil.rmtree(output / CELLS[3] / "step-00000006")  # its last step: one is left to do ...
    shutil.rmtree(output / CELLS[4])  # ... and here all of them
    assert values(again(config, output)) == values(whole)
    after = {name: times(output / name) for name in CELLS}
    assert [name for name in CELLS if after[name] != before[name]] == [CELLS[3], CELLS[4]]
    assert "going on from" in (output / CELLS[3] / "log.txt").read_text()


@pytest.mark.parametrize("step", [2, 5])  # before and after the first checkpoint, which is of step 3
def test_a_comparison_goes_on_where_it_was_stopped(
    config: str, whole: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    output, real = copy_of(whole, tmp_path / "copy"), vlcl.train.train_step
    shutil.rmtree(output / CELLS[1])
    shutil.rmtree(output / CELLS[2])

    def train_step(run, batch):
        if run.folder.name == CELLS[2] and run.state.step == step:
            raise KeyboardInterrupt
        return real(run, batch)

    monkeypatch.setattr(vlcl.train, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        again(config, output)
    text = (output / "compare.md").read_text()
    assert "7 of 8 cells have a result, 0 failed, 1 not run yet" in text
    assert "| not run yet |" in text
    monkeypatch.setattr(vlcl.train, "train_step", real)
    before = times(output / CELLS[1])
    assert values(again(config, output)) == values(whole)
    assert times(output / CELLS[1]) == before
    assert ("going on from" in (output / CELLS[2] / "log.txt").read_text()) == (step > 3)


def test_a_folder_with_a_run_of_other_settings_is_refused(config: str, whole: Comparison, tmp_path: Path) -> None:
    output = copy_of(whole, tmp_path / "copy")
    settings = output / CELLS[1] / "config.yaml"
    settings.write_text(settings.read_text().replace("weight_decay: 0.2", "weight_decay: 0.3"))
    before = times(output)
    with pytest.raises(UserError) as raised:
        again(config, output)
    assert str(output / CELLS[1]) in str(raised.value)
    assert "optim.weight_decay: 0.3 there, 0.2 now" in str(raised.value)
    assert "--output" in str(raised.value)
    assert times(output) == before


def test_command_line_with_a_grid_of_rates_and_cells_that_fail(config: str, tmp_path: Path) -> None:
    output = tmp_path / "it's 1"
    command = ["compare", config, "--loss", "infonce", "--batch-size", "8", "--seeds", "0,3", "--lr", "1e-3,1e30"]
    command += ["--metric", "val/image_to_text_R@5", "--output", str(output), "optim.clip_norm=null", "optim.warmup=0"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert "cell 1/4 infonce-b8-lr0.001-s0: " in done.output
    assert "infonce-b8-lr1e+30-s3: failed: step 2: the loss is not finite" in done.output
    assert "step 1/12" not in done.output  # the cells' own voice is in their log.txt
    found = json.loads((output / "compare.json").read_text())
    assert [cell["error"] is None for cell in found["cells"]] == [True, False, True, False]
    assert "is not finite" in found["cells"][1]["error"]
    good, bad = found["points"]
    assert (good["n"], good["best_lr"], bad["n"], bad["best_lr"], bad["mean"]) == (2, True, 0, False, None)
    one = last_line(output / "infonce-b8-lr0.001-s0"), last_line(output / "infonce-b8-lr0.001-s3")
    assert good["mean"] == pytest.approx(mean(line["val/image_to_text_R@5"] for line in one))
    text = (output / "compare.md").read_text()
    assert "2 of 4 cells have a result, 2 failed" in text
    assert text.count("failed: step 2: the loss is not finite") == 2
    assert "2 failed" in text.partition("## Every cell")[0]
    assert "--seeds 0,3 --lr 0.001,1e+30 --metric val/image_to_text_R@5 --output " in text


def test_one_seed_has_no_deviation(config: str, tmp_path: Path) -> None:
    done = compare(config, losses=["em"], batch_sizes=[12], seeds=[4], output=tmp_path, overrides=["train.steps=2"])
    assert [point.sd for point in done.points] == [None]
    assert "one seed, no sd" in (tmp_path / "compare.md").read_text()
    assert "--seeds 4, " in done.command  # `4` alone would be four seeds


def test_too_little_memory_fails_a_cell(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vlcl.train, "train", train)
    done = compare(config, losses=["em"], batch_sizes=[12], seeds=1, output=tmp_path)
    assert [result.error for result in done.results] == ["CUDA out of memory"]


def test_the_best_rate_is_one_at_which_all_seeds_end(config: str) -> None:
    settings = load_config(config)

    def result(lr: float, seed: int, value: float | None) -> Result:
        error = None if value is not None else "not finite"
        return Result(Cell(f"{lr}-{seed}", "em", 8, lr, seed, settings), {}, value, error)

    results = [result(0.1, 0, 0.3), result(0.1, 1, 0.5), result(0.2, 0, 0.4), result(0.2, 1, 0.6)]
    results += [result(0.3, 0, 0.9), result(0.3, 1, None)]
    comparison = Comparison(Path(), "", R1, Data(100, 10, 96), tuple(results))
    assert [(point.cell.lr, point.best) for point in comparison.points] == [(0.1, False), (0.2, True), (0.3, False)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss emm", 'loss.name: got "emm"; allowed: '),
        ("--loss em:gama=1,infonce", "loss.gama: there is no such key; did you mean 'loss.gamma'"),
        ("--loss em:gamma=2", "loss.gamma: got 2; allowed: a number > 0 and <= 1"),
        ("--loss infonce:gamma=0.5", 'loss "infonce" has no such setting'),
        ("--loss em,em", "--loss: em is given twice"),
        ("--loss em:optim.lr=1", "optim.lr is the same for every loss"),
        ("--batch-size 8,big", "--batch-size 8,big: allowed are whole numbers"),
        ("--batch-size 8.5", "--batch-size 8.5: allowed are whole numbers"),
        ("--batch-size 8,1", "--batch-size 1: allowed are whole numbers >= 2"),
        ("--batch-size 8,200", "train.batch_size=200 must be at least 2 and at most the 100 pairs"),
        ("--batch-size 8,9 train.accumulate=2 train.batch_size=4", "train.batch_size=9 must be a multiple"),
        ("--seeds 0", "--seeds: give at least one"),
        ("--seeds 0,-1", "train.seed: got -1"),
        ("--lr 1e-3,fast", "--lr 1e-3,fast: allowed are numbers"),
        ("--lr 0", "optim.lr: got 0.0; allowed: a number > 0"),
        ("--metric val/R@1", "they produce val/image_to_text_R@1, "),
        ("--metric val/zeroshot_top1", "the runs do not produce it"),
        ("data.val=null", "nothing is held out"),
        ("data.train=NOWHERE", "NOWHERE"),
        ("loss.gamma=0.5", "give losses with their settings in --loss"),
        ("train.output=here", "give the folder in --output"),
        ("optim.lrr=1", "did you mean 'optim.lr'"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    config: str, tmp_path: Path, arguments: str, message: str
) -> None:
    common = ["--loss", "em", "--batch-size", "8", "--seeds", "2", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["compare", config, *common, *arguments.split()])
    assert done.exit_code == 2, done.output
    assert done.output.startswith("error: ")
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_it_is_for_one_process(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        compare(config, losses=["em"], batch_sizes=[8], seeds=1, output=tmp_path / "out")


def test_mistakes_need_no_torch(config: str) -> None:
    code = f"""
import sys
from vlcl.cli import main
sys.argv = ["vlcl", "compare", {config!r}, "--loss", "em,emm", "--batch-size", "8", "--seeds", "2"]
try:
    main()
except SystemExit as end:
    assert end.code == 2
    assert not {{"torch", "matplotlib"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'em'" in done.stderr
