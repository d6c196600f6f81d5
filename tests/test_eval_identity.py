"""What makes two measurements the same: nothing that changes a score may be believed or reused after a change."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_data import picture, samples, write_model, write_native
from PIL import Image
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from shards import add
from test_eval_zeroshot import write_transformers, write_wds
from transformers import AutoModel

from vlcl import distributed
from vlcl.errors import UserError
from vlcl_eval.datasets.find import find_data_set
from vlcl_eval.datasets.images import ImageRef
from vlcl_eval.datasets.native import check_containers
from vlcl_eval.elevater.command import evaluate
from vlcl_eval.elevater.search import Setting
from vlcl_eval.elevater.work import Protocol
from vlcl_eval.models import load

Record = dict[str, Any]
DIGITS = [str(digit) for digit in range(10)]


def zero_shot(model: str, data: Path, folder: Path, name: str = "mnist", mode: str = "strict") -> Record:
    """The newest record of `name`, measured or kept."""
    records, problems = evaluate(
        model, data, [name], Protocol(shots=(0,), modes=(mode,)), output=folder / "out", cache=folder / "cache"
    )
    if problems:
        raise UserError(problems[name])
    return records[-1]


def test_corrected_labels_are_measured_anew_on_cached_features(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    for content, (label,) in samples(10, 4, 0):
        folder = tmp_path / "data" / "mnist" / "test" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{len(list(folder.iterdir()))}.png").write_bytes(content)
    names = tmp_path / "data" / "mnist" / "label.txt"
    names.write_text("\n".join(map(str, reversed(range(10)))))
    wrong = zero_shot(model, tmp_path / "data", tmp_path)
    names.write_text("\n".join(map(str, range(10))))
    right = zero_shot(model, tmp_path / "data", tmp_path)
    assert right["fingerprints"] != wrong["fingerprints"]
    assert right["images"]["forwards"] == 0
    assert right == zero_shot(model, tmp_path / "data", tmp_path)


@pytest.mark.parametrize("change", ["quick_gelu", "mean"])
def test_another_architecture_or_preprocessing_is_another_model(tmp_path: Path, change: str) -> None:
    """With the same weights, output and cache."""
    write_native(tmp_path, "mnist", test=samples(10, 4, 0))
    first = zero_shot(write_model(tmp_path / "a"), tmp_path, tmp_path)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "open_clip_config.json"
    config = json.loads(path.read_text())
    if change == "quick_gelu":
        config["model_cfg"]["quick_gelu"] = True
    else:
        config["preprocess_cfg"]["mean"] = [0.1, 0.1, 0.1]
    path.write_text(json.dumps(config))
    second = zero_shot(str(tmp_path / "b"), tmp_path, tmp_path)
    assert first["weights"] != second["weights"]
    assert second["images"]["forwards"] == 40


def test_a_model_without_finite_features_gets_no_score(tmp_path: Path) -> None:
    write_native(tmp_path, "mnist", train=samples(10, 4, 1), test=samples(10, 4, 0))
    model = write_model(tmp_path / "model")
    path = Path(model) / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["visual.proj"][0] = torch.nan
    save_file(weights, path)
    for shots, method in ((0, "linear_probe"), (2, "linear_probe"), (2, "finetune")):
        protocol = Protocol(shots=(shots,), methods=(method,), setting=Setting(0.1, 0.0))
        _, problems = evaluate(model, tmp_path, ["mnist"], protocol, output=tmp_path / "o", cache=tmp_path / "c")
        assert "no finite numbers" in problems["mnist"]


def test_half_precision_folders_are_computed_in_float32(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "hf", ["a", "photo"])
    AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    model = load(str(folder))
    assert {p.dtype for p in model.image.model.parameters()} == {torch.float32}
    assert model.texts(["a photo"]).dtype == torch.float32


def test_a_transformers_folder_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes one up that gives every text the same tokens."""
    folder = write_transformers(tmp_path / "hf", ["a", "photo", "of", "cat"])
    whole = load(str(folder)).weights
    kept = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load(str(folder))
    (folder / "tokenizer.json").write_text(kept.replace('"photo"', '"cat2"').replace('"cat"', '"photo"'))
    assert load(str(folder)).weights != whole  # another vocabulary is another model
    (folder / "tokenizer.json").write_text(kept)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="has no preprocessor_config"):
        load(str(folder))


def test_a_mended_image_is_read_again(tmp_path: Path) -> None:
    images = samples(10, 3, 0)
    write_native(tmp_path, "mnist", test=images)
    refs = find_data_set(tmp_path, "mnist").test.refs
    archive = tmp_path / "classification" / "mnist_20211008" / "val.zip"
    model = write_model(tmp_path / "model")

    def rewrite(bad: bool) -> None:
        with zipfile.ZipFile(archive, "w") as out:
            for i, (content, _) in enumerate(images):
                junk = bytes(len(content))  # of the same size
                out.writestr(refs[i].entry, junk if bad and i == 7 else content)

    rewrite(bad=True)
    with pytest.raises(UserError, match="1 of the test images cannot be read"):
        zero_shot(model, tmp_path, tmp_path, mode="elevater")
    rewrite(bad=False)
    assert zero_shot(model, tmp_path, tmp_path, mode="elevater")["sizes"]["test"] == 30


def test_what_lacks_bad_images_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In strict mode a fault of the disk costs an image and no more than one run."""
    write_native(tmp_path, "mnist", test=samples(10, 3, 0))
    model = write_model(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr("vlcl_eval.datasets.images.decode_image", failing_once())
        assert zero_shot(model, tmp_path, tmp_path)["bad_images"] == {"test": 1}
    again = zero_shot(model, tmp_path, tmp_path)
    assert (again["bad_images"], again["sizes"]["test"]) == ({}, 30)
    assert zero_shot(model, tmp_path, tmp_path) == again


def replace_in_place(path: Path, content: bytes) -> None:
    """Other bytes, of the same number."""
    path.write_bytes(content + bytes(path.stat().st_size - len(content)))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))  # file systems count in steps


@pytest.mark.parametrize("form", ["loose files", "class folders", "wds"])
def test_files_replaced_by_others_of_the_same_size_are_other_images(tmp_path: Path, form: str) -> None:
    images = samples(10, 2, 0)
    if form == "wds":
        write_wds(tmp_path / "wds_mnist", [content for content, _ in images], [label for _, (label,) in images], DIGITS)
        file = tmp_path / "wds_mnist" / "test" / "0.tar"
        content = file.read_bytes().replace(images[0][0], bytes(len(images[0][0])))
    else:
        below = "mnist/test/{}" if form == "class folders" else "classification/mnist_20211008/{}"
        paths = [tmp_path / below.format(label) / f"{i // 10}.png" for i, (_, (label,)) in enumerate(images)]
        for path, (image, _) in zip(paths, images):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        if form == "loose files":
            folder = paths[0].parents[1]
            lines = [f"{path.relative_to(folder)} {label}" for path, (_, (label,)) in zip(paths, images)]
            (folder / "test.txt").write_text("\n".join(lines))
            (folder / "labels.txt").write_text("\n".join(DIGITS))
        file, content = paths[0], b"another image"
    before = find_data_set(tmp_path, "mnist").test.fingerprint
    assert find_data_set(tmp_path, "mnist").test.fingerprint == before
    replace_in_place(file, content)
    assert find_data_set(tmp_path, "mnist").test.fingerprint != before


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    """An index that lists them in another order is of other images."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(b"same size")
        os.utime(tmp_path / folder / "0.png", (0, 0))
    refs = [ImageRef(str(tmp_path / folder / "0.png")) for folder in ("a", "b")]
    index = tmp_path / "test.txt"
    assert check_containers(refs, index, tmp_path) != check_containers(refs[::-1], index, tmp_path)


def test_a_passing_failure_of_reading_does_not_stick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files: rows that could not be read are tried again, those that could are not."""
    write_native(tmp_path, "mnist", test=samples(10, 3, 0))
    model = write_model(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr("vlcl_eval.datasets.images.decode_image", failing_once())
        with pytest.raises(UserError, match="1 of the test images"):
            zero_shot(model, tmp_path, tmp_path, mode="elevater")
    assert zero_shot(model, tmp_path, tmp_path, mode="elevater")["images"]["forwards"] == 1


def failing_once() -> Any:
    from vlcl.data.decode import BadSample, decode_image

    calls: list[int] = []

    def decode(data: bytes) -> Image.Image:
        calls.append(1)
        if len(calls) == 5:
            raise BadSample("unreadable", "a passing fault")
        return decode_image(data)

    return decode


def write_marks(folder: Path, marks: bytes, shards: str = "1") -> None:
    import tarfile

    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("a\nb\nc\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    (folder / "dataset_type.txt").write_text("Multilabel\n")
    (folder / "test" / "nshards.txt").write_text(shards)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        add(tar, "s0.png", picture((0,), 0))
        add(tar, "s0.npy", marks)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize(
    ("marks", "shards", "words"),
    [
        (npy(np.ones(2)), "1", "an array of 3 numbers"),
        (b"", "1", "label of sample s0 cannot be read"),
        (npy(np.ones(3)), "0", "says 0 shards"),
        (npy(np.ones(3)), "-3", "says -3 shards"),
    ],
)
def test_malformed_wds_labels(tmp_path: Path, marks: bytes, shards: str, words: str) -> None:
    from vlcl_eval.datasets.folders import open_wds

    write_marks(tmp_path / "wds_x", marks, shards)
    with pytest.raises(UserError, match=words):
        open_wds(tmp_path / "wds_x").read("test")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["images"].append(index["images"][0]), "lists 1 image ids more than once"),
        (lambda index: index["images"][0].update(file_name=5, zip_file=None), "file_name is no text"),
        (lambda index: index["annotations"][0].update(category_id=99), "label -1 is out of range"),
        (lambda index: index["categories"][0].pop("id"), "each category needs an id"),
    ],
)
def test_malformed_coco(tmp_path: Path, change: Any, words: str) -> None:
    folder = write_native(tmp_path, "kitti-distance", test=samples(4, 2, 0))
    index = json.loads((folder / "test_meta.json").read_text())
    change(index)
    (folder / "test_meta.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        _ = find_data_set(tmp_path, "kitti-distance").test


def _one_rank_fails() -> str:
    def part() -> int:
        if distributed.rank() == 0:
            raise UserError("the disk of rank 0 is full")
        return 1

    try:
        distributed.together(part)
    except UserError as error:
        return str(error)
    return "no error"


def test_a_failure_of_one_rank_is_raised_on_all() -> None:
    assert on_ranks(2, _one_rank_fails) == ["the disk of rank 0 is full"] * 2
