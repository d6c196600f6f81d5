"""What a record says of its measurement, and when a record is measured again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from eval_data import samples, write_model, write_native, write_own
from ranks import apart
from test_eval_submission import few_shot
from test_eval_zeroshot import write_wds

from vlcl.errors import UserError
from vlcl.lock import LOCK
from vlcl_eval.alone import alone
from vlcl_eval.clip_benchmark.zeroshot import evaluate_wds
from vlcl_eval.datasets.find import find_data_set
from vlcl_eval.elevater.command import evaluate
from vlcl_eval.elevater.search import Setting
from vlcl_eval.elevater.submission import validate_submission, write_submission
from vlcl_eval.elevater.work import Protocol
from vlcl_eval.report.page import report
from vlcl_eval.results import key, read_results
from vlcl_eval.text import cut_matters

Record = dict[str, Any]


def measure(folder: Path, names: list[str], say: Any = print, **protocol: Any) -> list[Record]:
    """All records of `names`: few-shot ones with one setting."""
    protocol = {"seeds": (0,), "setting": Setting(0.1, 1e-4)} | protocol
    records, problems = evaluate(
        write_model(folder / "model"), folder, names, Protocol(**protocol), output=folder / "out",
        cache=folder / "cache", say=say,
    )  # fmt: skip
    assert problems == {}
    return records


def measure_apart(folder: Path) -> None:
    evaluate(str(folder / "model"), folder, ["figures"], Protocol(shots=(0,)), output=folder / "out",
             cache=folder / "cache")  # fmt: skip


def test_two_evaluations_at_once_write_a_record_once(tmp_path: Path) -> None:
    write_own(tmp_path, "figures", train=samples(10, 4, 0), test=samples(10, 2, 1))
    write_model(tmp_path / "model")
    both = [apart(tmp_path / f"said{n}", measure_apart, tmp_path) for n in range(2)]
    for process in both:
        process.join(100)
    assert [process.exitcode for process in both] == [0, 0], (tmp_path / "said0").read_text()
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len({key(json.loads(line)) for line in lines}) == len(lines) > 0
    assert list((tmp_path / "out").glob(f"{LOCK}*")) == []


def test_a_data_set_that_another_process_measures_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other data sets are measured."""
    monkeypatch.setattr("vlcl.lock.PATIENCE", 0.1)
    write_own(tmp_path, "figures", train=samples(10, 4, 0), test=samples(10, 2, 1))
    write_native(tmp_path, "mnist", train=samples(10, 4, 0), test=samples(10, 2, 1))
    model = write_model(tmp_path / "model")
    (weights,) = {r["weights"] for r in measure(tmp_path, ["mnist"], shots=(0,))}
    process = apart(tmp_path / "said", hold, tmp_path / "out", weights)
    while not (tmp_path / "out" / "held").exists():
        time.sleep(0.05)
    records, problems = evaluate(
        model, tmp_path, ["figures", "mnist"], Protocol(shots=(0,)), output=tmp_path / "out", cache=tmp_path / "cache"
    )
    assert {record["dataset"] for record in records} == {"mnist"}
    assert list(problems) == ["figures"]
    assert f"is another process's: process {process.pid} on " in problems["figures"]
    assert "give another --output" in problems["figures"]
    process.kill()
    process.join()
    assert len(measure(tmp_path, ["figures"], shots=(0,))) > 0


def hold(folder: Path, weights: str) -> None:
    with alone(folder, weights, "figures"):
        (folder / "held").touch()
        time.sleep(100)


def test_few_shot_is_complete_only_with_the_whole_training_split(tmp_path: Path) -> None:
    write_own(tmp_path, "figures", {"train": 50}, train=samples(10, 4, 0), test=samples(10, 2, 1))
    records = measure(tmp_path, ["figures"], shots=(0, 2), methods=("linear_probe", "logistic"))
    found = {(r["method"], r["complete"], tuple(r["short"].get("train", ()))) for r in records}
    assert found == {
        ("zeroshot", True, ()),
        ("linear_probe", False, (40, 50)),
        ("logistic", False, (40, 50)),
    }


def test_results_of_another_order_of_images_are_not_handed_in(tmp_path: Path) -> None:
    """A wds folder of the benchmark's size: every number of the zip would be right, and its rows would not."""
    few_shot(tmp_path, "kitti-distance", form="wds", fingerprints={"test": "wds", "train": "r"})
    for allow_incomplete in (False, True):
        with pytest.raises(UserError, match="kitti-distance: read from wds, in another order of images"):
            write_submission(tmp_path, "linear_probe", 5, tmp_path, allow_incomplete)
    few_shot(tmp_path, "kitti-distance")  # the benchmark's own form goes before it
    assert validate_submission(write_submission(tmp_path, "linear_probe", 5, tmp_path)) == []


def test_lines_that_are_no_records_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a torn disk, of a hand that edited: the rest is read and reported, and what is left out is measured again."""
    write_own(tmp_path, "figures", test=samples(10, 2, 1))
    first, second = measure(tmp_path, ["figures"], shots=(0,))
    path = tmp_path / "out" / "results.jsonl"
    wrong = [second | {"score": "high"}, {name: value for name, value in second.items() if name != "sizes"}, [second]]
    lines = [b"\xff\xfe half", json.dumps(first).encode(), *(json.dumps(one).encode() for one in wrong), b"[" * 10**5]
    path.write_bytes(b"\n".join(lines))
    assert read_results(tmp_path / "out") == [first]
    said = capsys.readouterr().out
    assert [number for number in range(1, 7) if f"line {number} is no whole record" in said] == [1, 3, 4, 5, 6]
    assert report([tmp_path / "out"]).is_file()
    assert [r["mode"] for r in measure(tmp_path, ["figures"], shots=(0,))] == ["elevater", "strict"]


def test_zero_shot_records_are_read_and_appended_the_same_way(tmp_path: Path) -> None:
    folder = write_wds(tmp_path / "wds_x", [content for content, _ in samples(2, 3, 0)], [0, 1, 0, 1, 0, 1], ["a", "b"])
    folders: dict[str, Any] = {"output": tmp_path, "cache": tmp_path / "cache"}
    (tmp_path / "zeroshot.jsonl").write_bytes(b'\xff\n{"weights": "torn')
    (record,), problems = evaluate_wds(write_model(tmp_path / "model"), [folder], **folders)
    assert problems == {}
    assert (tmp_path / "zeroshot.jsonl").read_bytes().splitlines()[2:] == [json.dumps(record).encode()]
    assert evaluate_wds(str(tmp_path / "model"), [folder], **folders) == ([record], {})


def test_a_final_training_that_diverges_is_recorded(tmp_path: Path) -> None:
    write_own(tmp_path, "figures", train=samples(10, 4, 0), test=samples(10, 2, 1))
    for setting, diverged in ((Setting(0.1, 1e-4), False), (Setting(1e20, 1e20), True)):
        records = measure(tmp_path, ["figures"], shots=(2,), setting=setting)
        assert [r["settings"]["diverged"] for r in records if r["settings"]["lr"] == setting.lr] == [diverged] * 2


def test_texts_are_compared_once_and_not_for_each_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_own(tmp_path, "figures", train=samples(10, 4, 0), test=samples(10, 2, 1))
    asked: list[bool] = []
    monkeypatch.setattr(
        "vlcl_eval.elevater.work.cut_matters", lambda *texts: asked.append(cut_matters(*texts)) or asked[-1]
    )
    measure(tmp_path, ["figures"], shots=(0, 2, 3))
    assert asked == [False]


def test_the_registrys_number_of_classes_is_that_of_the_labels_file(tmp_path: Path) -> None:
    folder = write_own(tmp_path, "figures", test=samples(10, 2, 1))
    (folder / "labels.txt").write_text("\n".join(map(str, range(11))))
    with pytest.raises(UserError, match=r"labels\.txt: the number of class names is 11, but .* num_classes 10"):
        find_data_set(tmp_path, "figures")
