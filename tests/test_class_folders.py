"""Folders of class folders as people have them: splits, order, names, and never an id in a prompt in silence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import pytest
from eval_data import picture, write_model
from typer.testing import CliRunner

from vlcl.cli import app
from vlcl.data.class_folders import TEST, TRAIN, VAL, Classes, find_classes, imagenet_templates
from vlcl.errors import UserError
from vlcl_eval.clip_benchmark.zeroshot import evaluate_wds, open_folder
from vlcl_eval.datasets.find import find_data_set


def write(root: Path, names: Sequence[str], per_class: int = 1) -> Path:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i}.PNG").write_bytes(picture((3 * label,), i))
    return root


def classes(folder: Path, splits: Sequence[str] = TEST + VAL + TRAIN) -> Classes:
    found = find_classes(folder, splits)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("there", "splits", "taken"),
    [
        ([""], TEST + VAL, ""),
        (["train", "val", "test"], TEST + VAL, "test"),
        (["train", "val"], TEST + VAL, "val"),
        (["train", "validation"], VAL + TEST, "validation"),
        (["test", "val"], VAL + TEST + TRAIN, "val"),
        (["train"], TRAIN, "train"),
    ],
)
def test_the_split_that_is_wanted_first(there: list[str], splits: Sequence[str], taken: str, tmp_path: Path) -> None:
    for split in there:
        write(tmp_path / split if split else tmp_path, ["cat", "a_dog"])
    found = classes(tmp_path, splits)
    assert (found.split, found.folders, found.names) == (taken, ("a_dog", "cat"), ("a dog", "cat"))
    assert found.pictures() == [(found.root / "a_dog" / "0.PNG", 0), (found.root / "cat" / "0.PNG", 1)]


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train", ["cat", "dog"])
    with pytest.raises(UserError, match="has train, and no test or val"):
        find_classes(tmp_path, TEST + VAL[:1])
    (tmp_path / "empty").mkdir()
    assert find_classes(tmp_path / "empty", TEST) is None


def test_a_class_called_test_is_a_class(tmp_path: Path) -> None:
    assert classes(write(tmp_path, ["test", "exam"])).folders == ("exam", "test")


@pytest.mark.parametrize(
    ("folders", "file", "names"),
    [
        (["0", "1", "2", "10"], "a\nb\nc\n-\n-\n-\n-\n-\n-\n-\nk\n", ["a", "b", "c", "k"]),  # by number, not by letter
        (["1", "2", "3"], "a\nb\nc\n", ["a", "b", "c"]),  # from 1
        (["00", "01"], "a, b\nc d\n", ["a, b", "c d"]),
        (["x9", "x10"], "x10 ten\nx9 a nine\n", ["ten", "a nine"]),  # FOLDER NAME, in the order of folders
        (["n00000001", "n00000002"], "n00000001 tench, Tinca tinca\nn00000002 cock\n", ["tench", "cock"]),
        (["red_cup", "blue_cup"], "Blue cup\nRed cup\n", ["Blue cup", "Red cup"]),
    ],
)
def test_a_file_of_names(folders: list[str], file: str, names: list[str], tmp_path: Path) -> None:
    write(tmp_path / "test", folders)
    (tmp_path / "labels.txt").write_text(file)
    found = classes(tmp_path)
    assert list(found.names) == names
    assert str(tmp_path / "labels.txt") in found.note


@pytest.mark.parametrize(
    ("folders", "file", "words"),
    [
        (["0", "1"], None, "are called 0, 1: a prompt with a number or an id means nothing; write the names into"),
        (["c0", "c1"], None, "are called c0, c1"),
        (["class_001", "class_002"], None, "are called class_001"),
        (["3f9a11bc", "77aa00de"], None, "are called 3f9a11bc"),
        (["n01440764", "n00000001"], None, "n00000001 is called by a WordNet id that is none of ImageNet's"),
        (["0", "7"], "a\nb\n", "should be numbered 0..1"),
        (["cat", "dog"], "a\nb\n", "does not say what the folder cat is called; write a line for each"),
        (["only"], None, "holds one class"),
    ],
)
def test_what_cannot_be_a_name_is_refused(folders: list[str], file: str | None, words: str, tmp_path: Path) -> None:
    write(tmp_path, folders)
    if file is not None:
        (tmp_path / "labels.txt").write_text(file)
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(".", r"\.")):
        find_classes(tmp_path, TEST)


def test_names_that_have_numbers_stay(tmp_path: Path) -> None:
    """FGVC Aircraft's: a few look like ids, which is said; CUB's numbers before the names go, which is said, too."""
    found = classes(write(tmp_path / "air", ["707-320", "A380", "Boeing_747"]))
    assert found.names == ("707-320", "A380", "Boeing 747")
    assert "A380" in found.note
    assert "may be no names" in found.note
    found = classes(write(tmp_path / "birds", ["001.Black_footed_Albatross", "002.Laysan_Albatross"]))
    assert found.names == ("Black footed Albatross", "Laysan Albatross")
    assert "the numbers before the names of classes are left out" in found.note
    assert classes(write(tmp_path / "things", ["3d_printer", "7_up", "cup"])).note == ""


def test_wordnet_ids_get_imagenets_names_and_templates(tmp_path: Path) -> None:
    found = classes(write(tmp_path, ["n01443537", "n01440764"]))
    assert found.names == ("tench", "goldfish")
    assert list(found.templates) == imagenet_templates()
    assert len(found.templates) == 80
    assert [t("x") for t in open_clip.OPENAI_IMAGENET_TEMPLATES] == [t.format("x") for t in found.templates]
    assert "ImageNet's names" in found.note


def test_zeroshot_takes_a_folder_as_it_is(tmp_path: Path) -> None:
    """val where there is no test, ImageNet's templates, and chance beside the score."""
    write(tmp_path / "pets" / "train", ["n01440764", "n01443537"])
    write(tmp_path / "pets" / "val", ["n01440764", "n01443537"], 3)
    model, said = write_model(tmp_path / "model"), []
    records, problems = evaluate_wds(
        model, [tmp_path / "pets"], output=tmp_path / "out", cache=tmp_path / "cache", say=said.append
    )
    assert not problems
    assert records[0]["split"] == "val"
    assert records[0]["sizes"] == {"images": 6, "classes": 2, "templates": 80}
    assert any("ImageNet's names" in text for text in said)
    assert "chance" in said[-1]
    assert "50.00" in said[-1].split()
    write(tmp_path / "numbers", ["0", "1"])
    with pytest.raises(UserError, match="means nothing"):
        open_folder(tmp_path / "numbers", "test")


def test_elevater_takes_a_folder_as_it_is(tmp_path: Path) -> None:
    names = ["cat", "dog", "red_cup"]
    for split, count in (("train", 3), ("val", 2)):
        write(tmp_path / "mine" / split, names, count)
    options = ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--workers", "0"]
    command = ["eval", "elevater", write_model(tmp_path / "model"), str(tmp_path / "mine")]
    done = CliRunner().invoke(app, [*command, "--shots", "0,full", "--lr", "0.1", "--weight-decay", "0", *options])
    assert done.exit_code == 0, done.output
    assert "has no test folder: val is scored" in done.output
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {(r["dataset"], r["method"], r["sizes"]["train"], r["sizes"]["test"]) for r in records} == {
        ("mine", "zeroshot", 0, 6), ("mine", "linear_probe", 9, 6),
    }  # fmt: skip
    done = CliRunner().invoke(app, command[:3])
    assert done.exit_code == 2
    assert "give --data-root DIR" in done.output


def test_names_that_do_not_match_are_mended_where_they_stand(tmp_path: Path) -> None:
    """Names of folders are in no file."""
    found = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "lorry"]
    write(tmp_path / "cifar10" / "test", found)
    with pytest.raises(UserError, match=r"'lorry' \(nearest: .*Rename the folders, or number them and write the names"):
        find_data_set(tmp_path, "cifar-10")
    names = tmp_path / "wds_cifar10" / "classnames.txt"
    (names.parent / "test").mkdir(parents=True)
    (names.parent / "test" / "nshards.txt").write_text("1\n")
    (names.parent / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    names.write_text("\n".join(found))
    with pytest.raises(UserError, match=f"Correct the names in {names}"):
        find_data_set(tmp_path, "cifar-10")
