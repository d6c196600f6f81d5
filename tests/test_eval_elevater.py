"""`vlcl eval elevater` from end to end, on small data sets of every kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_data import many_labels, samples, write_model, write_native
from ranks import on_ranks
from typer.testing import CliRunner

from vlcl.cli import app
from vlcl.errors import UserError
from vlcl_eval import results
from vlcl_eval.datasets.class_names import class_names, templates
from vlcl_eval.datasets.find import find_data_set
from vlcl_eval.datasets.images import read_image
from vlcl_eval.elevater.command import evaluate
from vlcl_eval.elevater.head import head_start, merged
from vlcl_eval.elevater.metrics import metric_of
from vlcl_eval.elevater.sampling import few_shot_subset
from vlcl_eval.elevater.search import LEARNING_RATES, WEIGHT_DECAYS, Setting
from vlcl_eval.elevater.work import Protocol
from vlcl_eval.models import load

Record = dict[str, Any]
FIXED = Setting(0.1, 1e-4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of all four metrics, IRIS and COCO, one and several labels; and a model."""
    folder = tmp_path_factory.mktemp("elevater")
    data = folder / "data"
    write_native(data, "mnist", train=samples(10, 8, 0), test=samples(10, 5, 1))
    write_native(data, "kitti-distance", train=samples(4, 8, 2), test=samples(4, 5, 3))
    write_native(data, "hateful-memes", train=samples(2, 10, 4), test=samples(2, 12, 5))
    write_native(data, "oxford-iiit-pets", train=samples(37, 4, 6), test=samples(37, 2, 7))
    write_native(data, "voc-2007-classification", train=many_labels(20, 150, 8), test=many_labels(20, 80, 9))
    write_model(folder / "model")
    return folder


def measure(root: Path, output: Path, names: Sequence[str], say: Any = print, **more: Any) -> list[Record]:
    records, problems = evaluate(
        str(root / "model"), root / "data", names, Protocol(**more), output=output, cache=root / "cache", say=say
    )
    assert problems == {}
    return records


def one(records: list[Record], **wanted: Any) -> Record:
    (found,) = [r for r in records if all(r[key] == value for key, value in wanted.items())]
    return found


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("mnist", "accuracy"),
        ("kitti-distance", "accuracy"),
        ("hateful-memes", "roc_auc"),
        ("oxford-iiit-pets", "mean_per_class"),
        ("voc-2007-classification", "11point_map"),
    ],
)
def test_zero_shot_is_the_formula(root: Path, tmp_path: Path, name: str, metric: str) -> None:
    (elevater, strict) = measure(root, tmp_path, [name], shots=(0,))
    model, data = load(str(root / "model")), find_data_set(root / "data", name)
    columns = []
    for class_name in class_names(name) or []:
        texts = [template.format(class_name) for template in templates(name)]
        mean = F.normalize(model.texts(texts), dim=1).mean(0)
        columns.append(mean / mean.norm())
    transform = model.transform(data.center_crop)
    images = torch.stack([transform(read_image(ref)) for ref in data.test.refs])
    prob = (100 * F.normalize(model.image(images), dim=1) @ torch.stack(columns, 1)).softmax(1)
    target = data.targets(data.test)
    assert (elevater["metric"], elevater["mode"], strict["mode"]) == (metric, "elevater", "strict")
    assert elevater["score"] == pytest.approx(100 * metric_of(metric, "elevater")(prob, target), abs=1e-3)
    assert strict["score"] == pytest.approx(100 * metric_of(metric, "strict")(prob, target), abs=1e-3)
    saved = np.load(tmp_path / elevater["predictions"])
    np.testing.assert_allclose(saved["probabilities"], prob, atol=1e-5)
    assert np.array_equal(saved["labels"], target)
    assert strict["predictions"] is None
    assert elevater["sizes"] == {"classes": len(data.classes), "train": 0, "test": len(data.test)}
    assert not elevater["complete"]


def test_few_and_full_shot_records(root: Path, tmp_path: Path) -> None:
    records = measure(root, tmp_path, ["mnist"], shots=(0, 5, "full"), seeds=(0, 1))
    assert len(records) == 2 * (1 + 2 + 1)  # zero-shot, two seeds of 5-shot, one of full
    data = find_data_set(root / "data", "mnist")
    target = data.targets(data.test)
    for record in records:
        if record["shots"] == 0 or record["mode"] == "strict":
            continue
        assert record["settings"]["lr"] in LEARNING_RATES
        assert record["settings"]["weight_decay"] in WEIGHT_DECAYS
        assert record["search"]["runs"] <= 90
        assert record["search"]["failed"] == []
        size = 80 if record["shots"] == "full" else 50
        assert record["sizes"] == {"classes": 10, "train": size, "test": 50, "small_classes": 0}
        assert record["images"]["reference"] == record["search"]["runs"] * 10 * size + 50 * (size + 50)
        prob = torch.tensor(np.load(tmp_path / record["predictions"])["probabilities"])
        assert record["score"] == pytest.approx(100 * metric_of("accuracy", "elevater")(prob, target), abs=1e-3)
        strict = one(records, shots=record["shots"], seed=record["seed"], mode="strict", method="linear_probe")
        assert strict["score"] <= record["score"]
        assert strict["settings"]["epoch"] == 50 >= record["settings"]["epoch"]
        assert record["params"]["trainable"] == 10 * (16 + 1)


def test_second_run_measures_nothing_and_new_shots_alone(root: Path, tmp_path: Path) -> None:
    first = measure(root, tmp_path, ["kitti-distance"], shots=(0, 2), seeds=(0,))
    content = (tmp_path / "results.jsonl").read_text()
    said: list[str] = []
    assert measure(root, tmp_path, ["kitti-distance"], say=said.append, shots=(0, 2), seeds=(0,)) == first
    assert (tmp_path / "results.jsonl").read_text() == content
    assert said == []
    more = measure(root, tmp_path, ["kitti-distance"], shots=(0, 2, 3), seeds=(0,))
    assert (tmp_path / "results.jsonl").read_text().startswith(content)
    assert {r["shots"] for r in more} == {0, 2, 3}
    assert one(more, shots=3, mode="strict")["images"]["forwards"] <= 4 * 3  # test images are in the cache


def test_a_killed_run_goes_on(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = measure(root, tmp_path, ["kitti-distance"], shots=(0, 2), seeds=(0, 1), setting=FIXED)
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:100])
    again = measure(root, tmp_path, ["kitti-distance"], shots=(0, 2), seeds=(0, 1), setting=FIXED)
    assert "line 4 is no whole record" in capsys.readouterr().out

    def scores(records: list[Record]) -> dict[str, float]:
        return {results.key(record): record["score"] for record in records}

    assert scores(again) == scores(whole)
    assert scores(results.read_results(tmp_path)) == scores(whole)


def test_multilabel_and_auc_train(root: Path, tmp_path: Path) -> None:
    names = ["voc-2007-classification", "hateful-memes"]
    records = measure(root, tmp_path, names, shots=(5,), seeds=(0,), setting=FIXED)
    for name in names:
        record = one(records, dataset=name, mode="elevater")
        data = find_data_set(root / "data", name)
        prob = torch.tensor(np.load(tmp_path / record["predictions"])["probabilities"])
        score = metric_of(data.metric, "elevater")(prob, data.targets(data.test))
        assert record["score"] == pytest.approx(100 * score, abs=1e-3)
        assert record["search"] is None
        assert record["settings"]["lr"] == 0.1


def test_bad_image_is_refused_in_elevater_mode_and_others_go_on(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    images = samples(10, 5, 1)
    images[3] = (b"broken", images[3][1])
    write_native(data, "mnist", train=samples(10, 8, 0), test=images)
    write_native(data, "kitti-distance", test=samples(4, 5, 3))
    arguments = ["eval", "elevater", str(root / "model"), "--data-root", str(data), "--shots", "0"]
    arguments += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "mnist: error: 1 of the test images cannot be read" in result.output
    assert result.output.splitlines()[-1] == "failed, for the reasons above: mnist"
    assert {r["dataset"] for r in results.read_results(tmp_path / "out")} == {"kitti-distance"}
    result = CliRunner().invoke(app, [*arguments, "--mode", "strict"])
    assert result.exit_code == 0
    record = one(results.read_results(tmp_path / "out"), dataset="mnist")
    assert (record["mode"], record["sizes"]["test"], record["bad_images"]) == ("strict", 49, {"test": 1})
    assert not record["complete"]


def test_logistic_probe_is_scikit_learns(root: Path, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    from vlcl_eval.features import Extractor

    (record,) = measure(root, tmp_path, ["mnist"], shots=(5,), seeds=(1,), methods=("logistic",))
    data = find_data_set(root / "data", "mnist")
    subset = few_shot_subset(data.train.labels, 10, 5, seed=1)
    extractor = Extractor(load(str(root / "model")), tmp_path / "cache", torch.device("cpu"))
    train, _ = extractor.features(data, data.train, subset)
    test, _ = extractor.features(data, data.test, range(50))
    model = LogisticRegression(C=1 / record["settings"]["weight_decay"], max_iter=1000)
    model.fit(train.numpy(), data.targets(data.train)[subset].numpy())
    assert record["score"] == pytest.approx(100 * model.score(test.numpy(), data.targets(data.test).numpy()), abs=1e-3)
    assert record["mode"] == "strict"
    assert 7 <= record["search"]["runs"] <= 15


def _on_rank(root: str, output: str) -> list[Record]:
    return measure(Path(root), Path(output), ["kitti-distance"], shots=(0, 2, 3), seeds=(0, 1, 2), setting=FIXED)


def test_two_ranks_write_what_one_writes(root: Path, tmp_path: Path) -> None:
    alone = measure(root, tmp_path / "1", ["kitti-distance"], shots=(0, 2, 3), seeds=(0, 1, 2), setting=FIXED)
    for records in on_ranks(2, _on_rank, str(root), str(tmp_path / "2")):
        both = {results.key(r): r["score"] for r in records}
        assert both == pytest.approx({results.key(r): r["score"] for r in alone}, abs=1e-3)
    lines = (tmp_path / "2" / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(alone) == 2 * 7
    assert all(
        (tmp_path / "2" / json.loads(line)["predictions"]).is_file()
        for line in lines
        if 'elevater"' in line and json.loads(line)["predictions"]
    )


def test_all_are_the_20_that_are_there_and_those_of_the_registry(root: Path, tmp_path: Path) -> None:
    """A data set of one's own without a training split is measured zero-shot, and that is said."""
    write_native(tmp_path, "kitti-distance", test=samples(4, 5, 3))
    folder = write_native(tmp_path, "mnist", test=samples(10, 2, 1))
    folder.rename(tmp_path / "figures")
    entry = {"name": "figures", "version": 1, "type": "classification_multiclass", "root_folder": "figures",
             "test": {"index_path": "test.txt", "files_for_local_usage": ["val.zip"], "num_images": 20},
             "labelmap": "labels.txt", "num_classes": 10}  # fmt: skip
    (tmp_path / "vision_datasets.json").write_text(json.dumps([entry]))
    said: list[str] = []
    records, problems = evaluate(
        str(root / "model"), tmp_path, None, Protocol(shots=(0, 2)), output=tmp_path / "o", cache=tmp_path / "c",
        say=said.append,
    )  # fmt: skip
    assert {record["dataset"] for record in records} == {"figures", "kitti-distance"}
    assert one(records, mode="strict", dataset="figures")["complete"]
    assert any("figures has no training split: zero-shot only" in line for line in said)
    assert "has no training split; add it, or zero-shot alone: --shots 0" in problems["kitti-distance"]
    assert {r["dataset"] for r in results.read_results(tmp_path / "o")} == {"figures", "kitti-distance"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of caltech-101"):
        evaluate(str(root / "model"), tmp_path / "empty", None, output=tmp_path / "o", cache=tmp_path / "c")


def test_merged_head_takes_over_the_projection(root: Path) -> None:
    model = load(str(root / "model"))
    images = torch.randn(6, 3, 32, 32)
    class_DC = F.normalize(torch.randn(16, 4), dim=0)
    plain = model.image(images) @ head_start("language", class_DC, None).weight_CD.T
    with merged(model, True) as projection:
        assert projection is not None
        wide = model.image(images)
        assert wide.shape[1] == projection.shape[0] == 32
        head = head_start("language", class_DC, projection)
    torch.testing.assert_close(wide @ head.weight_CD.T, plain)
    assert model.image(images).shape[1] == 16  # the projection is back


@pytest.mark.parametrize("more", [{"merge": True}, {"init": "random"}])
def test_other_heads_are_other_measurements(root: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    plain = measure(root, tmp_path, ["mnist"], shots=(2,), seeds=(0,), setting=FIXED)
    both = measure(root, tmp_path, ["mnist"], shots=(2,), seeds=(0,), setting=FIXED, **more)
    assert len(both) == len(plain) + 2
    other = next(r for r in both if r not in plain)
    assert other["params"]["trainable"] == 10 * ((32 if "merge" in more else 16) + 1)


def test_a_whole_data_set_can_be_handed_in(root: Path, tmp_path: Path) -> None:
    """The benchmark's KITTI has 6,347 training and 711 test images, and so has this made-up one: its zip is valid."""
    train = (samples(4, 6, 2) * 265)[:6347]
    write_native(tmp_path / "data", "kitti-distance", train=train, test=samples(4, 178, 3)[:711])
    base = ["eval", "elevater", str(root / "model"), "--data-root", str(tmp_path / "data"), "--output", str(tmp_path)]
    base += ["--cache", str(tmp_path / "cache"), "--shots", "0,5", "--lr", "0.01", "--weight-decay", "1e-4"]
    result = CliRunner().invoke(app, base)
    assert result.exit_code == 0
    assert all(record["complete"] for record in results.read_results(tmp_path))
    for options in ([], ["--track", "linear_probe", "--shots", "5"]):
        result = CliRunner().invoke(app, ["eval", "submission", str(tmp_path), *options])
        assert result.exit_code == 0, result.output
        assert "all_predictions.zip is valid" in result.output
    result = CliRunner().invoke(app, ["eval", "submission", str(tmp_path / "all_predictions.zip")])
    assert result.exit_code == 0
    result = CliRunner().invoke(app, ["eval", "report", str(tmp_path)], env={"COLUMNS": "150"})
    assert "kitti-distance" in result.output
    assert (tmp_path / "report.md").is_file()
    assert (tmp_path / "report.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--datasets", "mnits"], ["mnits", "did you mean mnist"]),
        (["--datasets", ","], ["--datasets ','", "a name is missing"]),
        (["--methods", "logistic", "--mode", "elevater"], ["--methods logistic", "--mode strict or both"]),
        (["--shots", "0,many"], ["--shots", "many", "0,5,20,50,full"]),
        (["--seeds", "a"], ["--seeds", "0,1,2"]),
        (["--mode", "fair"], ["--mode", "fair", "both, elevater, strict"]),
        (["--methods", "knn"], ["--methods", "linear_probe, finetune, logistic"]),
        (["--lr", "0.1"], ["--weight-decay", "both or neither"]),
        (["--lr", "-1", "--weight-decay", "0"], ["--lr -1.0 must be above 0"]),
        (["--output", "README.md"], ["README.md cannot be written", "--output"]),
        (["--cache", "README.md"], ["the cache README.md cannot be written", "another folder with --cache"]),
        (["--gpt3", "2"], ["--knowledge DIR"]),
        (["--datasets", "dtd"], ["no dtd under", "vlcl data elevater"]),
        (["--datasets", "dtd,gtsrb"], ["none of dtd, gtsrb is under"]),
        (["--data-root", "nowhere"], ["--data-root nowhere is not a folder"]),
    ],
)
def test_mistakes(root: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    base = ["eval", "elevater", str(root / "model"), "--data-root", str(root / "data"), "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*base, "--cache", str(tmp_path), "--shots", "0", *arguments])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    for word in words:
        assert word in result.output


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no/such", ["no folder no/such", "hf download no/such --local-dir such", "then give such"]),
        ("hf-hub:laion/CLIP-x", ["hf download laion/CLIP-x --local-dir CLIP-x"]),
        ("eval/vlcl_evil", ["no folder eval/vlcl_evil; did you mean eval/vlcl_eval?"]),
        ("configs/9", ["no folder configs/9; configs has"]),
        ("no-such", ["MODEL 'no-such' is no run", "no architecture"]),
        ("VIT-B-23", ["did you mean", "ViT-B-32"]),
        ("ViT-B-32:openia", ["openia", "openai"]),
        ("docs", ["docs is no model", "no step-*/ folder", "ARCHITECTURE:FILE.pt"]),
        ("README.md", ["README.md is a file", "ViT-B-32:README.md"]),
    ],
)
def test_no_such_model(root: Path, tmp_path: Path, model: str, words: list[str]) -> None:
    folders = ["--data-root", str(root / "data"), "--cache", str(tmp_path / "c"), "--output", str(tmp_path / "o")]
    result = CliRunner().invoke(app, ["eval", "elevater", model, *folders])
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())  # nothing is begun
    for word in words:
        assert word in result.output


def test_a_folder_without_weights_is_no_model(root: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text((root / "model" / "open_clip_config.json").read_text())
    with pytest.raises(UserError, match="no weights"):
        load(str(tmp_path))
