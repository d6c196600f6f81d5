"""Readers of the three forms of data sets, and what they say of bad input."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_data import many_labels, picture, png, samples, write_native
from PIL import Image
from typer.testing import CliRunner

from vlcl.cli import app
from vlcl.data.decode import BadSample
from vlcl.errors import UserError
from vlcl_data_prep.mnist import build_mnist
from vlcl_eval.datasets.class_names import class_names
from vlcl_eval.datasets.find import find_data_set
from vlcl_eval.datasets.images import ImageRef, ImageRows, read_image


def test_iris_in_index_order(tmp_path: Path) -> None:
    train, test = samples(10, 3, 0), samples(10, 2, 1)
    write_native(tmp_path, "mnist", train=train, test=test)
    data = find_data_set(tmp_path, "mnist")
    assert (data.form, data.metric, data.multilabel, data.center_crop) == ("native", "accuracy", False, True)
    assert data.classes == [str(i) for i in range(10)]
    for split, images in ((data.train, train), (data.test, test)):
        assert split.labels == [labels for _, labels in images]
        for ref, (content, _) in zip(split.refs, images):
            expected = np.asarray(Image.open(io.BytesIO(content)))
            assert np.array_equal(np.asarray(read_image(ref)), expected)
    assert torch.equal(data.targets(data.test), torch.tensor([labels[0] for _, labels in test]))
    assert not data.complete(data.test)
    assert data.expected == {"train": 60000, "test": 10000}


def test_coco_by_ascending_id_and_rank_of_category(tmp_path: Path) -> None:
    train, test = samples(4, 3, 0), samples(4, 2, 1)
    write_native(tmp_path, "kitti-distance", train=train, test=test)
    data = find_data_set(tmp_path, "kitti-distance")
    assert not data.center_crop
    assert data.classes == class_names("kitti-distance")
    assert data.test.labels == [labels for _, labels in test]
    assert [ref.entry for ref in data.train.refs] == [f"some dir/train {i:04d}.png" for i in range(12)]


def test_multilabel_with_negatives(tmp_path: Path) -> None:
    train = many_labels(20, 60, 0)
    write_native(tmp_path, "voc-2007-classification", train=train, test=many_labels(20, 40, 1))
    data = find_data_set(tmp_path, "voc-2007-classification")
    assert data.train.labels == [labels for _, labels in train]
    assert () in data.train.labels
    target = data.targets(data.train)
    assert target.shape == (60, 20)
    assert [tuple(row.nonzero()[:, 0].tolist()) for row in target] == data.train.labels


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    """A labels.txt in another order: the numbers of the index change, the meaning does not."""
    test = samples(10, 2, 1)
    folder = write_native(tmp_path, "cifar-10", test=test)
    names = class_names("cifar-10") or []
    shuffled = [names[i] for i in (3, 1, 0, 2, 9, 4, 5, 6, 8, 7)]
    (folder / "labels.txt").write_text("\n".join(name.upper() for name in shuffled))
    data = find_data_set(tmp_path, "cifar-10")
    assert data.class_order == "mapped by name"
    for (label,), (_, (number,)) in zip(data.test.labels, test):
        assert names[label] == shuffled[number]
    by_position = find_data_set(tmp_path, "cifar-10", "by-position")
    assert by_position.test.labels == [labels for _, labels in test]
    assert by_position.test.fingerprint == data.test.fingerprint  # the images are the same; `labels` is in the record


def test_wds_and_class_folders_hold_the_same_images(tmp_path: Path) -> None:
    build_mnist(tmp_path / "a", wds=True)
    native = find_data_set(tmp_path / "a", "mnist")
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "wds_mnist", tmp_path / "b" / "wds_mnist")
    wds = find_data_set(tmp_path / "b", "mnist")
    assert (wds.form, wds.templates, wds.classes) == ("wds", native.templates, native.classes)
    assert wds.test.labels == native.test.labels
    for i in (0, 1, 500, 999):
        assert np.array_equal(np.asarray(read_image(wds.test.refs[i])), np.asarray(read_image(native.test.refs[i])))
    names = tmp_path / "b" / "wds_mnist" / "classnames.txt"
    names.write_text(names.read_text().replace("3\n", "\n"))
    with pytest.raises(UserError, match=r"classnames\.txt, line 4 is blank"):
        find_data_set(tmp_path / "b", "mnist")
    for i in range(0, 1000, 10):
        target = tmp_path / "c" / "mnist" / "test" / str(native.test.labels[i][0])
        target.mkdir(parents=True, exist_ok=True)
        read_image(native.test.refs[i]).save(target / f"{i}.png")
    folders = find_data_set(tmp_path / "c", "mnist")
    assert folders.form == "class folders"
    assert len(folders.test) == 100
    assert {label for (label,) in folders.test.labels} == {label for (label,) in native.test.labels[::10]}
    (tmp_path / "c" / "mnist" / "test").rename(tmp_path / "c" / "mnist" / "val")
    with pytest.raises(UserError, match=r"a val folder and no test folder.*mv .*/mnist/val .*/mnist/test"):
        find_data_set(tmp_path / "c", "mnist")


def test_a_data_set_of_ones_own(tmp_path: Path) -> None:
    """vision_datasets.json adds data sets in the native format."""
    folder = tmp_path / "fruit"
    folder.mkdir()
    (folder / "labels.txt").write_text("apple\npear\n")
    (folder / "a.png").write_bytes(picture((0,), 1))
    (folder / "b c.png").write_bytes(picture((1,), 1))
    (folder / "test.txt").write_text("a.png 0\nb c.png 1\n")
    entry = {"name": "fruit", "version": 1, "type": "classification_multiclass", "root_folder": "fruit",
             "test": {"index_path": "test.txt", "files_for_local_usage": [], "num_images": 2},
             "labelmap": "labels.txt", "num_classes": 2}  # fmt: skip
    (tmp_path / "vision_datasets.json").write_text(json.dumps([entry]))
    data = find_data_set(tmp_path, "fruit")
    assert data.classes == ["apple", "pear"]
    assert data.templates == ["a photo of a {}"]
    assert [read_image(ref).size for ref in data.test.refs] == [(24, 20)] * 2
    assert data.complete(data.test)


def test_the_documentations_registry_can_be_copied(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "eval.md").read_text()
    (tmp_path / "vision_datasets.json").write_text(text.split("To copy:")[1].split("```json\n")[1].split("```")[0])
    folder = tmp_path / "leaves"
    folder.mkdir()
    (folder / "labels.txt").write_text("oak\nelm\nash\n")
    for split, count in (("train", 30), ("test", 12)):
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for i in range(count):
                archive.writestr(f"oak/{i}.jpg", b"a leaf")
        lines = [f"{split}.zip@oak/{i}.jpg {i % 3}\n" for i in range(count)]
        (folder / f"{split}.txt").write_text("".join(lines))
    data = find_data_set(tmp_path, "leaves")
    assert data.classes == ["oak", "elm", "ash"]
    for split, count in ((data.train, 30), (data.test, 12)):
        assert split is not None
        assert split.labels == [(i % 3,) for i in range(count)]
        assert data.complete(split)


def broken(folder: Path, what: str) -> None:
    index, archive = folder / "test.txt", folder / "val.zip"
    lines = index.read_text().splitlines()
    match what:
        case "zip":
            archive.unlink()
        case "entry":
            with zipfile.ZipFile(archive, "w") as out:
                out.writestr("some dir/test 0000.png", b"x")
        case "not a zip":
            archive.write_bytes(b"<html>quota exceeded</html>")
        case "no label":
            index.write_text("\n".join([*lines[:3], lines[3].rpartition(" ")[0]]))
        case "range":
            index.write_text("\n".join([*lines[:4], lines[4].rpartition(" ")[0] + " 10"]))
        case "two labels":
            index.write_text(lines[0].rpartition(" ")[0] + " 1,2\n")
        case "too few names":
            (folder / "labels.txt").write_text("0\n1\n2\n")
        case "other names":
            (folder / "labels.txt").write_text(
                "\n".join(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
            )
        case "no names":
            (folder / "labels.txt").unlink()
        case "empty":
            index.write_text("\n")
        case "no index":
            index.unlink()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("zip", ["val.zip", "does not exist", "test.txt"]),
        ("entry", ["val.zip lacks 19 of the 20 images", "some dir/test 0001.png"]),
        ("not a zip", ["val.zip", "cannot be read"]),
        ("no label", ["test.txt, line 4", "no label"]),
        ("range", ["test.txt, line 5", "label 10", "0..9"]),
        ("two labels", ["test.txt, line 1", "2 labels"]),
        ("too few names", ["labels.txt", "3", "10"]),
        ("other names", ["labels.txt", "zero", "--labels by-position"]),
        ("no names", ["labels.txt", "cannot be read"]),
        ("empty", ["test.txt", "no image"]),
        ("no index", ["no mnist under", "mnist_20211008", "vlcl data elevater"]),
    ],
)
def test_bad_input_is_named(tmp_path: Path, what: str, words: list[str]) -> None:
    folder = write_native(tmp_path, "mnist", test=samples(10, 2, 1))
    broken(folder, what)
    with pytest.raises(UserError) as caught:
        _ = find_data_set(tmp_path, "mnist").test
    for word in words:
        assert word in str(caught.value)


def test_unknown_name_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean stanford-cars"):
        find_data_set(tmp_path, "stanfordcras")


def test_images_turn_by_exif_become_rgb_and_fill_up(tmp_path: Path) -> None:
    tall = Image.fromarray(np.arange(40 * 20 * 3, dtype=np.uint8).reshape(40, 20, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.jpg").write_bytes(png(tall, "JPEG", exif=exif))
    assert read_image(ImageRef(str(tmp_path / "turned.jpg"))).size == (40, 20)
    (tmp_path / "cmyk.jpg").write_bytes(png(tall.convert("CMYK"), "JPEG"))
    assert read_image(ImageRef(str(tmp_path / "cmyk.jpg"))).mode == "RGB"
    whole = png(Image.effect_noise((200, 200), 60).convert("RGB"), "JPEG")
    (tmp_path / "short.jpg").write_bytes(whole[: len(whole) // 2])
    assert read_image(ImageRef(str(tmp_path / "short.jpg"))).size == (200, 200)  # as the benchmark's toolkit
    (tmp_path / "no.jpg").write_bytes(b"nothing like an image")
    with pytest.raises(BadSample, match="not an image"):
        read_image(ImageRef(str(tmp_path / "no.jpg")))
    rows = ImageRows([ImageRef(str(tmp_path / "no.jpg"))], [0], lambda image: torch.ones(3, 8, 8), 8)
    assert rows[0][0] == 0
    assert not rows[0][1].any()
    assert "not an image" in rows[0][2]


def test_data_elevater_lists_what_is_there(tmp_path: Path) -> None:
    write_native(tmp_path, "mnist", train=samples(10, 3, 0), test=samples(10, 2, 1))
    voc = write_native(tmp_path, "voc-2007-classification", test=many_labels(20, 40, 1))
    result = CliRunner().invoke(app, ["data", "elevater", str(tmp_path)], env={"COLUMNS": "150"})
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert "20 / 10,000" in lines["mnist"]
    assert "sample" in lines["mnist"]
    assert lines["mnist:"] == "mnist: 10 classes, same order"
    assert "missing" in lines["dtd"]
    assert "problem" in lines["voc-2007-classification"]
    assert "so there is no train split" in lines["voc-2007-classification:"]
    assert "2 of 20 data sets are there" in result.output
    assert result.exit_code == 1  # VOC has no train split
    shutil.rmtree(voc)
    assert CliRunner().invoke(app, ["data", "elevater", str(tmp_path)]).exit_code == 0
