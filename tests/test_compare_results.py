"""The file of `vlcl compare --results`: whole lines, cells that need not be run again, folders that may go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from compare_fakes import finish, folders
from shards import make_shards, tiny_model

import vlcl.compare.command as command
from vlcl.compare.cell import Ran
from vlcl.compare.comparison import Comparison
from vlcl.compare.grid import Cell
from vlcl.compare.results import fingerprint_of
from vlcl.errors import UserError
from vlcl.metrics import HEADLINE


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A machine: data, a config beside it, and nothing trained."""
    return machine(tmp_path / "here")


def machine(folder: Path) -> Path:
    train, val = make_shards(folder / "train", (30,)), make_shards(folder / "val", (9,))
    (folder / "tiny.yaml").write_text(f"""
data: {{train: {train}, val: {val}}}
model: {{name: "{tiny_model(folder.parent / "model")}"}}
train: {{steps: 6, batch_size: 8, output: runs/never}}
optim: {{lr: 1e-3, warmup: 2}}
log: {{trackers: []}}
""")
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that were run, in order; they are faked."""
    names: list[str] = []

    def run_cell(cell: Cell) -> Ran:
        names.append(cell.name)
        return finish(cell, ("val",))

    monkeypatch.setattr(command, "run_cell", run_cell)
    return names


def compare(folder: Path, results: Path | None, *overrides: str, **options: Any) -> Comparison:
    grid = {"losses": ["em", "infonce"], "batch_sizes": [8], "seeds": 2, "output": folder / "out"} | options
    return command.compare(folder / "tiny.yaml", results=results, overrides=overrides, **grid)


def lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def values(comparison: Comparison) -> list[float | None]:
    return [result.value for result in comparison.results]


def test_a_line_a_cell_says_all_that_is_to_be_kept(place: Path, trained: list[str]) -> None:
    results = place / "evidence" / "results.jsonl"
    found = compare(place, results)
    assert len(lines(results)) == len(trained) == 4
    line = lines(results)[1]
    cell = found.results[1].cell
    assert {name: line[name] for name in ("cell", "label", "loss", "batch_size", "lr", "seed", "samples", "steps")} == {
        "cell": "infonce-b8-lr0.001-s0", "label": "infonce", "loss": "infonce", "batch_size": 8, "lr": 1e-3, "seed": 0,
        "samples": 48, "steps": 6,
    }  # fmt: skip
    assert line["metrics"] == found.results[1].metrics
    assert set(line["metrics"]) == {metric.name for metric in HEADLINE}
    assert line["training"] == {"train/loss": 1.5, "train/logit_scale": 14.5}
    assert (line["seconds"], line["cpu_seconds"], line["torch"], line["device"]) == (2.5, 3.5, "2.9", "cpu")
    assert line["threads"] >= 1
    assert line["vlcl"]
    assert line["settings"]["loss.name"] == cell.config.loss.name
    assert line["settings"]["optim.warmup"] == 2
    assert line["settings"]["train.precision"] == "fp32"
    assert line["data"]["train"]
    assert line["fingerprint"] == fingerprint_of(line["settings"], line["data"])
    assert len({line["fingerprint"] for line in lines(results)}) == 4
    assert str(place) not in json.dumps({name: line[name] for name in line if name != "settings"})


def test_another_machine_goes_on_from_the_file(place: Path, tmp_path: Path, trained: list[str]) -> None:
    results = place / "results.jsonl"
    first = compare(place, results, seeds=1)
    shutil.rmtree(place / "out")
    (tmp_path / "there").mkdir()
    for name in ("train", "val"):
        shutil.copytree(place / name, tmp_path / "there" / name)
    there = tmp_path / "there"
    text = (place / "tiny.yaml").read_text().replace(str(place), str(there))
    (there / "tiny.yaml").write_text(text + "checkpoint: {keep: 1}\n")
    shutil.copy(results, there / "results.jsonl")
    trained.clear()
    second = compare(there, there / "results.jsonl", "data.workers=0", "train.precision=fp32")
    assert trained == ["em-b8-lr0.001-s1", "infonce-b8-lr0.001-s1"]
    assert values(second)[:2] == values(first)
    assert folders(there / "out") == trained
    assert len(lines(there / "results.jsonl")) == 4


@pytest.mark.parametrize(
    "override", ["optim.weight_decay=0.3", "train.log_every=5", "train.precision=bf16", "data.streams=4"]
)
def test_cells_of_other_settings_are_others(place: Path, trained: list[str], override: str) -> None:
    results = place / "results.jsonl"
    compare(place, results, seeds=1, discard=True)
    compare(place, results, override, seeds=1, discard=True)
    assert trained == ["em-b8-lr0.001-s0", "infonce-b8-lr0.001-s0"] * 2
    compare(place, results, seeds=1)
    compare(place, results, override, seeds=1)
    assert len(trained) == 4  # both comparisons are in the file


def test_cells_of_other_data_are_others(place: Path, trained: list[str]) -> None:
    results = place / "results.jsonl"
    compare(place, results, seeds=1, discard=True)
    shutil.rmtree(place / "val")
    make_shards(place / "val", (10,))
    compare(place, results, seeds=1)
    assert len(trained) == 4


def test_a_run_folder_of_other_data_is_refused(place: Path, trained: list[str]) -> None:
    compare(place, place / "results.jsonl", seeds=1)
    folder = place / "out" / trained[0]
    record = {"digest": "of shards that were written anew since", "held_out": {"val": None, "test": None}}
    (folder / "data.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"other data \(data.train and data.val: the shards have changed"):
        compare(place, place / "other.jsonl", seeds=1)
    (folder / "data.json").write_text('{"digest": "of an older version, which knew no more"}')
    with pytest.raises(UserError, match=r"data.json does not say what data the run was of; delete .*anew"):
        compare(place, place / "other.jsonl", seeds=1)
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("override", "discard"),
    [("data.cache=memory", True), ("data.cache=memory", False), ("data.workers=0", False), ("checkpoint.keep=7", True)],
)
def test_how_a_cell_reads_and_saves_makes_no_other_of_it(
    place: Path, trained: list[str], override: str, discard: bool
) -> None:
    compare(place, place / "results.jsonl", seeds=1, discard=discard)
    compare(place, place / "results.jsonl", override, seeds=1, discard=discard)
    assert len(trained) == 2


def test_a_setting_that_is_newer_than_a_line_had_its_default(place: Path, trained: list[str]) -> None:
    results = place / "results.jsonl"
    compare(place, results, seeds=1, discard=True)
    old = lines(results)
    for line in old:
        assert line["settings"].pop("optim.clip_norm") == 1.0
        line["fingerprint"] = fingerprint_of(line["settings"], line["data"])
    results.write_text("".join(json.dumps(line) + "\n" for line in old))
    compare(place, results, seeds=1)
    assert len(trained) == 2
    compare(place, results, "optim.clip_norm=2", seeds=1)
    assert len(trained) == 4


@pytest.mark.parametrize("key", ["eval.templates", "views.crop_scale", "train.timeout"])
def test_a_default_of_what_the_cell_has_no_use_for_may_change(place: Path, trained: list[str], key: str) -> None:
    results = place / "results.jsonl"
    compare(place, results, seeds=1, discard=True)
    old = lines(results)
    for line in old:
        line["settings"][key] = "of an earlier version"
        line["fingerprint"] = fingerprint_of(line["settings"], line["data"])
    results.write_text("".join(json.dumps(line) + "\n" for line in old))
    compare(place, results, seeds=1)
    assert len(trained) == 2


def test_damaged_lines_are_told_and_left_out(
    place: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    results = place / "results.jsonl"
    compare(place, results, discard=True)
    whole = results.read_text()
    changed = whole.replace('"optim.weight_decay": 0.2', '"optim.weight_decay": 0.4', 1)  # by hand
    results.write_text(changed[: len(changed) - 40])
    trained.clear()
    capsys.readouterr()
    compare(place, results)
    said = capsys.readouterr().out
    assert f"note: {results}, line 1: no whole line of a cell, left out" in said
    assert f"note: {results}, line 4: no whole line of a cell, left out" in said
    assert "4 cells of 48 samples, 2 of them finished earlier (2 in " in said
    assert trained == ["em-b8-lr0.001-s0", "infonce-b8-lr0.001-s1"]
    last = results.read_text().splitlines()
    assert [json.loads(line)["cell"] for line in last[4:]] == trained  # not behind the torn one, on its line
    assert last[3] + "" == whole.splitlines()[3][: len(last[3])]
    trained.clear()
    compare(place, results)
    assert not trained


def test_discarded_folders_leave_their_line(place: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results = place / "results.jsonl"
    kept = compare(place, None, seeds=1)  # finished before there was a file
    assert len(folders(place / "out")) == 2
    seen = []
    real = command.run_cell

    def failing(cell: Cell) -> Ran:
        seen.append((len(lines(results)), folders(place / "out")))
        if cell.name == "infonce-b8-lr0.001-s1":
            cell.folder.mkdir()
            return Ran(error="no memory")
        return real(cell)

    monkeypatch.setattr(command, "run_cell", failing)
    found = compare(place, results, discard=True)
    assert seen == [(2, []), (3, [])]
    assert values(found)[:2] == values(kept)
    assert (len(lines(results)), folders(place / "out")) == (3, ["infonce-b8-lr0.001-s1"])
    assert lines(results)[0]["seconds"] is None  # nobody knows any more
    assert (place / "out" / "compare.png").is_file()
    monkeypatch.setattr(command, "run_cell", real)
    assert None not in values(compare(place, results, discard=True))
    assert folders(place / "out") == []


def test_a_file_that_cannot_be_written_is_told(place: Path, trained: list[str]) -> None:
    (place / "file").write_text("")
    with pytest.raises(UserError, match=r"--results .* could not be written: .*the same command"):
        compare(place, place / "file" / "results.jsonl")
    assert len(trained) == 1
    assert folders(place / "out") == trained


def test_two_comparisons_may_append_at_once(place: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line is one write to the end of the file as it is then."""
    results, fake = place / "results.jsonl", command.run_cell

    def run_cell(cell: Cell) -> Ran:
        with open(results, "ab") as other:
            other.write(b'{"of": "another program"}\n')
        return fake(cell)

    monkeypatch.setattr(command, "run_cell", run_cell)
    compare(place, results)
    assert [line.get("of") for line in lines(results)] == ["another program", None] * 4
