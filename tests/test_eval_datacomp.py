"""DataComp's list: its metrics against scikit-learn and by hand, its averages, and what is missing."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_data import picture, write_model
from shards import add
from sklearn.metrics import f1_score
from typer.testing import CliRunner

from vlcl.cli import app
from vlcl.data.decode import decode_image
from vlcl_eval.clip_benchmark.datacomp import (
    FILE,
    GROUPS,
    averages,
    evaluate_datacomp,
    f1_macro,
    metadata,
    tasks,
    worst_group,
)
from vlcl_eval.clip_benchmark.zeroshot import FILE as ZEROSHOT
from vlcl_eval.models import load
from vlcl_eval.text import class_weights


def test_the_list_is_datacomps() -> None:
    found = tasks()
    assert len(found) == 38
    assert len({task.name for task in found}) == 38
    assert [sum(task.group == group for task in found) for group in GROUPS] == [1, 6, 13, 3]
    special = {task.name: task.metric for task in found if task.metric not in ("acc1", "mean_per_class_recall")}
    assert special == {
        "Flickr": "mean_recall@1", "MSCOCO": "mean_recall@1", "WinoGAViL": "jaccard_score_10-12",
        "iWildCam": "F1-macro_all", "FMoW": "acc_worst_region", "Dollar Street": "acc_top5_wg", "GeoDE": "acc_wg",
    }  # fmt: skip
    assert {task.name for task in found if task.metric == "mean_per_class_recall"} == {
        "Caltech-101", "FGVC Aircraft", "Oxford Flowers-102", "Oxford-IIIT Pet",
    }  # fmt: skip


def test_averages_need_all_of_their_sets() -> None:
    scores = {task.name: 0.5 for task in tasks()}
    scores["ImageNet 1k"] = 0.9
    assert averages(scores) == pytest.approx(
        {"ImageNet": 0.9, "ImageNet dist. shifts": 0.5, "VTAB": 0.5, "Retrieval": 0.5, "Average": (37 * 0.5 + 0.9) / 38}
    )
    del scores["WinoGAViL"]
    assert set(averages(scores)) == {"ImageNet", "ImageNet dist. shifts", "VTAB"}


def test_f1_and_the_worst_group() -> None:
    rng = np.random.default_rng(0)
    target, predicted = rng.integers(0, 5, 60), rng.integers(0, 7, 60)  # some predicted classes have no image
    target[target == 3] = 1
    expected = f1_score(target, predicted, average="macro", labels=np.unique(target))
    assert f1_macro(torch.tensor(predicted), torch.tensor(target)) == pytest.approx(expected)
    hit, group = torch.tensor([True, True, False, True, False]), torch.tensor([4, 4, 4, 9, 9])
    assert worst_group(hit, group) == 0.5


def write_wds(folder: Path, groups: list[int] | None = None) -> Path:
    """24 pictures of 4 classes in two shards, with metadata whose first column is `groups`."""
    (folder / "test").mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for i in range(12 * shard, 12 * shard + 12):
                add(tar, f"s{i:07d}.png", picture((5 * (i % 4),), i))
                add(tar, f"s{i:07d}.cls", str(i % 4).encode())
                if groups is not None:
                    out = io.BytesIO()
                    np.save(out, np.array([groups[i], 7]))
                    add(tar, f"s{i:07d}.npy", out.getvalue())
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("red\ngreen\nblue\ngrey\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return folder


def test_what_is_there_is_measured_and_the_rest_is_named(tmp_path: Path) -> None:
    groups = [i // 9 for i in range(24)]
    root, model = tmp_path / "data", write_model(tmp_path / "model")
    write_wds(root / "wds_imagenet1k")
    geode = write_wds(root / "wds_geode_test", groups)
    write_wds(root / "wds_wilds-fmow")  # without metadata
    assert metadata(geode)[:, 0].tolist() == groups
    said: list[str] = []
    summary, problems = evaluate_datacomp(
        model, root, output=tmp_path / "out", cache=tmp_path / "cache", say=said.append, workers=0
    )
    assert list(problems) == ["FMoW"]
    assert "has no metadata" in problems["FMoW"]
    loaded = load(model)
    weights_DC = class_weights(loaded, ["red", "green", "blue", "grey"], ["a photo of a {}."], None, cut=False)
    hits = []
    for i in range(24):
        image_1D = loaded.image(loaded.transform(None)(decode_image(picture((5 * (i % 4),), i)))[None])
        hits.append(int((image_1D @ weights_DC).argmax()) == i % 4)
    of_groups = [np.mean([hit for hit, group in zip(hits, groups) if group == g]) for g in range(3)]
    assert summary["scores"] == pytest.approx({"ImageNet 1k": np.mean(hits), "GeoDE": min(of_groups)})
    assert summary["averages"] == pytest.approx({"ImageNet": np.mean(hits)})
    assert len(summary["missing"]) == 36
    assert "WinoGAViL (no wds form" in said[-1]
    assert "mean over the 2 of 38 that are there (not DataComp's average)" in said[-1]
    assert "ImageNet 1k †" in said[-1]
    assert json.loads((tmp_path / "out" / FILE).read_text()) == summary
    count = len((tmp_path / "out" / ZEROSHOT).read_text().splitlines())
    again, _ = evaluate_datacomp(model, root, output=tmp_path / "out", cache=tmp_path / "cache", say=said.append)
    assert again["scores"] == summary["scores"]
    assert len((tmp_path / "out" / ZEROSHOT).read_text().splitlines()) == count


def test_a_root_without_any_is_told(tmp_path: Path) -> None:
    options = ["--data-root", str(tmp_path), "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, ["eval", "datacomp", write_model(tmp_path / "model"), *options])
    assert done.exit_code == 2
    assert "looked for folders such as wds_imagenet1k" in done.output
