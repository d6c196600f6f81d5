"""Submissions to the benchmark: what is in the zip, what is refused, and what the check of any zip finds."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlcl.errors import UserError
from vlcl_eval import results
from vlcl_eval.datasets.registry import find_benchmark
from vlcl_eval.elevater import submission
from vlcl_eval.elevater.metrics import metric_of
from vlcl_eval.elevater.submission import validate_submission, write_submission

SMALL = ("hateful-memes", "kitti-distance", "voc-2007-classification")  # 500 x 2, 711 x 4, 4,952 x 20 probabilities


def probabilities(name: str, seed: int, num_images: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    benchmark = find_benchmark(name)
    count = num_images or benchmark.splits["test"].num_images
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, benchmark.num_classes)) * 3
    probability_NC = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    if benchmark.multilabel:
        return probability_NC, (rng.random(probability_NC.shape) < 0.1).astype(np.int64)
    return probability_NC, rng.integers(0, benchmark.num_classes, count)


def add(
    folder: Path, name: str, method: str = "linear_probe", shots: int | str = 5, seed: int = 0,
    predictions: np.ndarray | None = None, num_images: int | None = None, model: str = "emoji", **more: Any,
) -> Path:  # fmt: skip
    """Append a record with its predictions; returns their file."""
    benchmark = find_benchmark(name)
    probability_NC, labels = probabilities(name, seed, num_images)
    head = 11 * benchmark.num_classes
    record = {
        "model": model, "weights": model.encode().hex(), "dataset": name, "method": method, "shots": shots,
        "seed": seed, "mode": "elevater", "metric": benchmark.metric, "protocol": {"preprocess": "elevater"},
        "fingerprints": {"test": "t", "train": "r"}, "form": "native", "complete": num_images is None, "bad_images": {},
        "short": {"test": [num_images, 711]} if num_images else {}, "sizes": {"train": 50, "test": len(labels)},
        "settings": {}, "search": None, "images": {}, "params": {"total": 1000, "visual": 500, "backbone": 990},
        "score": 100 * metric_of(benchmark.metric, "elevater")(torch.tensor(probability_NC), torch.tensor(labels)),
    } | more  # fmt: skip
    record["params"].setdefault("trainable", {"zeroshot": 0, "linear_probe": head, "finetune": head + 500}[method])
    saved = probability_NC if predictions is None else predictions
    file = f"{model}-{name}-{method}-{shots}-{seed}-{len(saved)}-{record['mode']}-{record['protocol']}"
    record["predictions"] = results.save_predictions(folder, file.replace(" ", ""), saved, labels)
    results.append(folder, [record])
    return folder / record["predictions"]


def few_shot(folder: Path, *names: str, **more: Any) -> Path:
    for name in names:
        for seed in (2, 0, 1):  # in the order in which they happened to end
            add(folder, name, seed=seed, **more)
    return folder


def entries_of(path: Path) -> dict[str, dict[str, Any]]:
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["all_predictions.json"]
        assert archive.infolist()[0].compress_type == zipfile.ZIP_DEFLATED
        content = json.loads(archive.read("all_predictions.json"))
    assert set(content) == {"data"}
    return {entry["dataset_name"]: entry for entry in content["data"]}


def test_the_few_shot_track_has_an_entry_a_data_set_with_its_seeds_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few_shot(tmp_path, *reversed(SMALL))
    add(tmp_path, "kitti-distance", seed=3)  # not the benchmark's
    add(tmp_path, "kitti-distance", seed=0, mode="strict", predictions=probabilities("kitti-distance", 9)[0])
    path = write_submission(tmp_path, "linear_probe", 5, tmp_path / "out")
    assert path == tmp_path / "out" / "all_predictions.zip"
    assert [file.name for file in path.parent.iterdir()] == ["all_predictions.zip"]
    entries = entries_of(path)
    assert list(entries) == list(SMALL)
    kitti = entries["kitti-distance"]
    assert {key: value for key, value in kitti.items() if key != "predictions"} == {
        "model_name": "emoji", "dataset_name": "kitti-distance", "num_trainable_params": 44.0, "num_params": 1044,
        "num_visual_params": 500, "num_backbone_params": 990, "n_shot": 5, "rnd_seeds": [0, 1, 2],
    }  # fmt: skip
    for name in SMALL:
        expected = [np.round(probabilities(name, seed)[0].astype(np.float64), 6) for seed in range(3)]
        assert np.array_equal(np.array(entries[name]["predictions"]), np.array(expected))
    assert validate_submission(path) == []
    errors = capsys.readouterr().err
    assert errors.count("warning: 17 of the 20 data sets are missing") == 2
    assert "cifar-100" in errors
    assert "kitti-distance" not in errors


def test_zero_shot_and_full_shot_have_one_seed_and_their_own_numbers(tmp_path: Path) -> None:
    add(tmp_path, "hateful-memes", "zeroshot", 0)
    entry = entries_of(write_submission(tmp_path, "zeroshot", 0, tmp_path / "zero.zip"))["hateful-memes"]
    assert (entry["model_name"], entry["n_shot"], entry["rnd_seeds"]) == ("CLIP-emoji", 0, [0])
    assert (entry["num_trainable_params"], entry["num_params"]) == (0, 1000)
    for seed in (0, 1):
        add(tmp_path, "hateful-memes", "finetune", "full", seed)
    path = write_submission(tmp_path, "finetune", "full", tmp_path / "full.zip")
    entry = entries_of(path)["hateful-memes"]
    assert (entry["model_name"], entry["n_shot"], entry["rnd_seeds"]) == ("emoji", -1, [0])
    assert (entry["num_trainable_params"], entry["num_params"]) == (522.0, 1022)  # the tower is trained and counts once
    assert validate_submission(path) == []


@pytest.mark.parametrize(
    ("track", "shots", "message"),
    [
        ("logistic", 5, "--track logistic: the benchmark has zeroshot, linear_probe, finetune"),
        ("linear_probe", 20, "--shots 20: the benchmark's linear_probe track takes 5 or full"),
        ("zeroshot", 5, "--shots 5: the benchmark's zeroshot track takes 0"),
        ("finetune", 5, "holds no results for --track finetune --shots 5 in mode elevater"),
    ],
)
def test_a_track_that_is_not_there_is_refused(tmp_path: Path, track: Any, shots: int, message: str) -> None:
    few_shot(tmp_path, "hateful-memes")
    with pytest.raises(UserError, match=message):
        write_submission(tmp_path, track, shots, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sample_of_the_test_split_is_refused_or_written_to_fail_the_check(tmp_path: Path) -> None:
    few_shot(tmp_path, "kitti-distance", num_images=100)
    with pytest.raises(UserError, match="kitti-distance: a sample: 100 of 711 test images"):
        write_submission(tmp_path, "linear_probe", 5, tmp_path)
    path = write_submission(tmp_path, "linear_probe", 5, tmp_path, allow_incomplete=True)
    problems = validate_submission(path)
    assert problems == [
        f"kitti-distance, predictions[{place}]: probabilities of 100 images; the test split has 711"
        for place in range(3)
    ]
    # once the whole split is measured, the sample does not stand in the way
    few_shot(tmp_path, "kitti-distance", fingerprints={"test": "whole", "train": "r"})
    assert validate_submission(write_submission(tmp_path, "linear_probe", 5, tmp_path)) == []


def broken(name: str, how: str) -> np.ndarray:
    probability_NC = probabilities(name, 1)[0]
    if how == "width":
        return probability_NC[:, :-1]
    if how == "length":
        return probability_NC[:-1]
    if how == "sum":
        probability_NC[7] *= 0.99
    if how == "outside":
        probability_NC[7, :2] = [-0.5, 1.5]
    if how == "nan":
        probability_NC[7, 0] = np.nan
    return probability_NC


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("width", r"probabilities of shape \[711, 3\]; the data set has 4 classes"),
        ("length", "probabilities of 710 images; the test split has 711"),
        ("sum", r"1 rows do not add up to 1, the first is row 7: 0\.9900"),
        ("outside", "1 rows with a probability outside 0 to 1, the first is row 7"),
        ("nan", "1 rows with a probability outside 0 to 1, the first is row 7"),
    ],
)
def test_wrong_probabilities_are_found_before_anything_is_written(tmp_path: Path, how: str, message: str) -> None:
    few_shot(tmp_path, "kitti-distance")
    old = write_submission(tmp_path, "linear_probe", 5, tmp_path).read_bytes()
    add(tmp_path, "kitti-distance", seed=1, predictions=broken("kitti-distance", how))
    with pytest.raises(UserError, match=f"(?s)nothing is written.*kitti-distance, seed 1: .*{message}.*evaluate again"):
        write_submission(tmp_path, "linear_probe", 5, tmp_path)
    assert (tmp_path / "all_predictions.zip").read_bytes() == old
    # the same in a zip of another tool
    tables = [
        probabilities("kitti-distance", 0)[0],
        broken("kitti-distance", how),
        probabilities("kitti-distance", 2)[0],
    ]
    zipped = zip_of(tmp_path / "other.zip", [entry(predictions=[table.tolist() for table in tables])])
    (problem,) = validate_submission(zipped)
    assert problem.startswith("kitti-distance, predictions[1]: ")


def test_a_sum_within_a_thousandth_passes_and_one_beyond_does_not(tmp_path: Path) -> None:
    for factor, valid in ((1.0009, True), (1.0012, False)):
        zipped = zip_of(tmp_path / "z.zip", [entry(predictions=[np.full((711, 4), 0.25 * factor).tolist()] * 3)])
        assert (validate_submission(zipped) == []) is valid


def test_files_that_are_torn_missing_or_of_another_run_are_named_together(tmp_path: Path) -> None:
    torn = add(tmp_path, "hateful-memes", seed=0)
    torn.write_bytes(torn.read_bytes()[:-200])
    gone = add(tmp_path, "hateful-memes", seed=1)
    gone.unlink()
    add(tmp_path, "hateful-memes", seed=2)
    few_shot(tmp_path, "kitti-distance")
    replaced = add(tmp_path, "kitti-distance", seed=1, predictions=probabilities("kitti-distance", 8)[0])
    add(tmp_path, "dtd", seed=0)
    with pytest.raises(UserError) as caught:
        write_submission(tmp_path, "linear_probe", 5, tmp_path / "out")
    message = str(caught.value)
    assert f"hateful-memes, seed 0: {torn} cannot be read" in message
    assert f"hateful-memes, seed 1: {gone} cannot be read" in message
    assert f"kitti-distance, seed 1: {replaced}: its predictions score " in message
    assert "dtd: results of seed 0, needed are 0, 1, 2" in message
    assert "hateful-memes, seed 2" not in message
    assert not (tmp_path / "out").exists()


def test_a_record_without_predictions_is_refused(tmp_path: Path) -> None:
    add(tmp_path, "hateful-memes", "zeroshot", 0)
    line = json.loads((tmp_path / "results.jsonl").read_text())
    (tmp_path / "results.jsonl").write_text(json.dumps(line | {"predictions": None}) + "\n")
    with pytest.raises(UserError, match="hateful-memes, seed 0: it has no predictions"):
        write_submission(tmp_path, "zeroshot", 0, tmp_path)


def test_of_several_models_one_is_chosen_by_label_or_weights(tmp_path: Path) -> None:
    few_shot(tmp_path, "hateful-memes")
    few_shot(tmp_path, "hateful-memes", model="other")
    with pytest.raises(UserError, match=r"several models: emoji \(.*\), other \(.*\); choose one with --model"):
        write_submission(tmp_path, "linear_probe", 5, tmp_path)
    for choice in ("other", b"other".hex()[:6]):
        path = write_submission(tmp_path, "linear_probe", 5, tmp_path, model=choice)
        assert entries_of(path)["hateful-memes"]["model_name"] == "other"
    with pytest.raises(UserError, match="no results for --track linear_probe --shots 5 --model third"):
        write_submission(tmp_path, "linear_probe", 5, tmp_path, model="third")


def test_seeds_must_agree_in_everything_else(tmp_path: Path) -> None:
    few_shot(tmp_path, "hateful-memes", protocol={"init": "language"})
    add(tmp_path, "hateful-memes", seed=1, protocol={"init": "random"})
    with pytest.raises(UserError, match=r'hateful-memes: more than one result for a seed.*"language".*"random"'):
        write_submission(tmp_path, "linear_probe", 5, tmp_path)
    mixed = tmp_path / "mixed"
    for seed in range(3):
        add(mixed, "hateful-memes", seed=seed, protocol={"init": "random" if seed else "language"})
        add(mixed, "kitti-distance", seed=seed, fingerprints={"test": f"t{seed}", "train": "r"})
        params = {"trainable": 22 + seed, "total": 1000, "visual": 500, "backbone": 990}
        add(mixed, "voc-2007-classification", seed=seed, params=params)
    with pytest.raises(UserError) as caught:
        write_submission(mixed, "linear_probe", 5, tmp_path)
    assert "hateful-memes: the protocol of its seeds are not the same" in str(caught.value)
    assert "kitti-distance: the fingerprints of its seeds are not the same" in str(caught.value)
    assert "voc-2007-classification: the numbers of parameters of its seeds are not the same" in str(caught.value)


def test_subsets_of_training_images_may_differ_between_seeds(tmp_path: Path) -> None:
    for seed in range(3):
        add(tmp_path, "hateful-memes", seed=seed, fingerprints={"test": "t", "train": f"r{seed}"})
    assert validate_submission(write_submission(tmp_path, "linear_probe", 5, tmp_path)) == []


def test_where_it_cannot_be_written_it_says_so(tmp_path: Path) -> None:
    few_shot(tmp_path, "hateful-memes")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_submission(tmp_path, "linear_probe", 5, tmp_path / "file" / "out.zip")


def entry(name: str = "kitti-distance", **more: Any) -> dict[str, Any]:
    seeds = more.get("rnd_seeds", [0, 1, 2])
    return {
        "model_name": "m", "dataset_name": name, "num_trainable_params": 1, "num_params": 2, "num_visual_params": 3,
        "num_backbone_params": 4, "n_shot": 5, "rnd_seeds": seeds,
        "predictions": [probabilities(name, seed)[0].round(6).tolist() for seed in seeds],
    } | more  # fmt: skip


def zip_of(path: Path, data: Any) -> Path:
    text = data if isinstance(data, str) else json.dumps({"data": data})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("all_predictions.json", text)
    return path


NO_TABLE = "kitti-distance, predictions[{}]: not a table of numbers with rows of one length"


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        ([entry(), entry("hateful-memes")], []),
        ([entry(), entry()], ["kitti-distance: more than one entry"]),
        ([entry(), entry("hateful-memes", n_shot=-1, rnd_seeds=[0])], ["n_shot is not the same in all entries: -1, 5"]),
        ([], ["no data set of the benchmark in it"]),
        ([entry(n_shot=20)], ["kitti-distance: n_shot is 20; allowed are 0, 5, -1 (-1: all training images)"]),
        ([entry(rnd_seeds=[0, 2, 1])], ["kitti-distance: rnd_seeds is [0, 2, 1]; with n_shot 5 it is [0, 1, 2]"]),
        ([entry(predictions=[])], ["kitti-distance: predictions of 0 seeds, but rnd_seeds is [0, 1, 2]"]),
        ([entry(num_params="7")], ["kitti-distance: num_params is missing or of a wrong type: str"]),
        ([entry(predictions=[[[0.5, 0.5], [1.0]]] * 3)], [NO_TABLE.format(i) for i in range(3)]),
        ([entry(predictions=[["x"]] * 3)], [NO_TABLE.format(i) for i in range(3)]),
    ],
)
def test_the_check_of_any_zip(tmp_path: Path, data: list[Any], problems: list[str]) -> None:
    assert validate_submission(zip_of(tmp_path / "z.zip", data)) == problems


def test_the_check_names_data_sets_that_are_not_the_benchmarks(tmp_path: Path) -> None:
    problems = validate_submission(zip_of(tmp_path / "z.zip", [entry(), {**entry(), "dataset_name": "my-own"}]))
    assert len(problems) == 1
    assert problems[0].startswith("dataset_name 'my-own' is not one of the benchmark's: caltech-101, ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"data": [{}',
        '{"data": [1]}',
        '{"data": {}}',
        '[{"a": {}}]',
        '{"data": [{"a": 1}}',
        '{"data": [{x}]}',
    ],
)
def test_a_zip_of_other_json_is_a_problem_and_no_crash(tmp_path: Path, text: str) -> None:
    problems = validate_submission(zip_of(tmp_path / "z.zip", text))
    assert "cannot be read" in problems[-1]


def test_a_torn_zip_no_zip_and_no_file(tmp_path: Path) -> None:
    whole = zip_of(tmp_path / "z.zip", [entry()]).read_bytes()
    half = len(whole) // 2
    damaged = whole[:half] + bytes([whole[half] ^ 255]) + whole[half + 1 :]
    for content in (whole[:half], damaged):
        (tmp_path / "bad.zip").write_bytes(content)
        assert "cannot be read" in validate_submission(tmp_path / "bad.zip")[-1]
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("predictions.json", "{}")
    assert "all_predictions.json" in validate_submission(tmp_path / "other.zip")[0]
    with pytest.raises(UserError, match="does not exist"):
        validate_submission(tmp_path / "none.zip")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_reading_in_parts_of_any_size_gives_the_same_entries(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [{"a": 'x"}{\\', "b": [[0.5, 1e-6], {"c": "}"}]}, {}, {"é": '\\"'}]
    monkeypatch.setattr(submission, "CHARACTERS_AT_ONCE", size)
    path = zip_of(tmp_path / "z.zip", json.dumps({"data": data}, ensure_ascii=False))
    with zipfile.ZipFile(path) as archive, archive.open("all_predictions.json") as file:
        assert [json.loads(text) for text in submission._entries(file)] == data
