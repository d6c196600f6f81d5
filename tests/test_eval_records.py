"""What a record says of its measurement, and when a record is measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from eval_data import samples, write_model, write_own
from test_eval_submission import few_shot

from vlcl.errors import UserError
from vlcl_eval.elevater import evaluate
from vlcl_eval.search import Setting
from vlcl_eval.submission import validate_submission, write_submission
from vlcl_eval.work import Protocol

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
