"""What the commands of `vlcl eval` say beside their scores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import typer
from eval_data import samples, write_model, write_native, write_own
from ranks import on_ranks
from typer.testing import CliRunner

from vlcl import distributed
from vlcl.cli import app
from vlcl.errors import UserError
from vlcl_eval.options import end_with
from vlcl_eval.report.page import report
from vlcl_eval.results import read_results


def run(folder: Path, *options: str) -> Any:
    base = [
        "eval",
        "elevater",
        write_model(folder / "model"),
        "--data-root",
        str(folder),
        "--output",
        str(folder / "o"),
    ]
    return CliRunner().invoke(
        app, [*base, "--cache", str(folder / "c"), "--lr", "0.1", "--weight-decay", "0", *options]
    )


def test_zero_shot_is_reported_where_the_training_split_is_missing(tmp_path: Path) -> None:
    write_native(tmp_path, "mnist", test=samples(10, 2, 1))
    result = run(tmp_path, "--datasets", "mnist", "--shots", "0,2")
    assert result.exit_code == 1
    assert "has no training split; add it, or zero-shot alone: --shots 0" in result.output
    assert (tmp_path / "o" / "report.md").is_file()
    assert result.output.splitlines()[-1] == "failed, for the reasons above: mnist"
    assert run(tmp_path, "--datasets", "mnist", "--shots", "0").exit_code == 0


def test_more_shots_than_images_are_said_and_recorded(tmp_path: Path) -> None:
    images = [image for image in samples(10, 4, 0) if image[1] != (3,)] + samples(10, 2, 2)
    write_own(tmp_path, "figures", train=images, test=samples(10, 2, 1))
    result = run(tmp_path, "--datasets", "figures", "--shots", "2,5,50,full", "--seeds", "0,1")
    assert result.exit_code == 0, result.output
    said = [line for line in result.output.splitlines() if "have fewer training images" in line]
    assert said == [
        "figures, 5-shot: 1 of 10 classes have fewer training images, of which all are taken",
        "figures, 50-shot: 10 of 10 classes have fewer training images, of which all are taken",
    ]
    found = {record["shots"]: record["sizes"]["small_classes"] for record in read_results(tmp_path / "o")}
    assert found == {2: 0, 5: 1, 50: 10, "full": 0}


def test_an_interrupted_run_says_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    write_own(tmp_path, "figures", test=samples(10, 2, 1))
    for name in ("elevater.command.evaluate", "clip_benchmark.zeroshot.evaluate_wds"):
        monkeypatch.setattr(f"vlcl_eval.{name}", interrupted)
    zeroshot = CliRunner().invoke(app, ["eval", "zeroshot", "ViT-B-32:openai", str(tmp_path)])
    for result in (run(tmp_path, "--shots", "0"), zeroshot):
        assert result.exit_code == 130
        assert "the same command goes on from here" in result.output


def _fails(folder: str) -> bool:
    """Whether the report was there when this rank ended."""
    report_file = Path(folder) / "report.md"
    if distributed.rank() == 0:
        time.sleep(1)
        report_file.touch()
    with pytest.raises(typer.Exit):
        end_with(["mnist"])
    return report_file.exists()


def test_no_rank_ends_with_an_error_while_rank_0_reports(tmp_path: Path) -> None:
    assert on_ranks(2, _fails, str(tmp_path)) == [True, True]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("elevater", ["RUN/eval", "$VLCL_CACHE or ~/.cache/vlcl", "by the cores"]),
        ("zeroshot", ["RUN/eval", "$VLCL_CACHE or ~/.cache/vlcl", "by the cores"]),
        ("report", ["first DIR"]),
        ("submission", ["DIR/all_predictions.zip"]),
    ],
)
def test_help_shows_all_defaults(command: str, words: list[str]) -> None:
    result = CliRunner().invoke(app, ["eval", command, "--help"], env={"COLUMNS": "200"})
    for word in words:
        assert f"[default: ({word}" in result.output


def test_where_there_are_no_results_the_way_to_some_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "eval").mkdir(parents=True)
    (tmp_path / "run" / "eval" / "results.jsonl").touch()
    for name, file in (("new", "config.yaml"), ("other", "zeroshot.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    words = {
        ".": r"results\.jsonl does not exist; make results: vlcl eval elevater MODEL --data-root DIR --output",
        "run": "give the folder of that run's results: .*run/eval",
        "run/eval": "holds no results yet; make some: vlcl eval elevater MODEL",
        "run/eval/results.jsonl": "is a file; give the folder",
        "new": "the run is not evaluated; vlcl eval elevater .*new --data-root DIR",
        "other": r"only zeroshot\.jsonl, whose tables their own commands print",
        "gone": "there is no folder",
    }
    for folder, message in words.items():
        with pytest.raises(UserError, match=message):
            report([tmp_path / folder])
