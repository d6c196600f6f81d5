"""What each format of `vlcl export` must have (vlcl/export/format.py): what a new one forgot is told here."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from export_models import Exports, export

from vlcl import cli
from vlcl.checkpoint import load_model
from vlcl.errors import UserError
from vlcl.export.check import drawn_pairs
from vlcl.export.command import prepare
from vlcl.export.format import Format, Job, asked_for
from vlcl.export.formats import FORMATS
from vlcl.export.output import EXPORT_FILES

ADDS_TO_OTHERS = {"sentence-transformers"}  # without files of its own for most models, and without a check
CHECKED = [x for x in FORMATS if x.name not in ADDS_TO_OTHERS]


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def job(exports: Exports) -> Job:
    """Of a model that has every format, all in its folder."""
    shared = exports.of("clip", onnx=True)
    return prepare(shared.folder, load_model(shared.source), drawn_pairs(), half=False)


def test_they_can_be_told_apart() -> None:
    for values in ([x.name for x in FORMATS], [x.card_place for x in FORMATS], [x.option for x in FORMATS if x.option]):
        assert len(set(values)) == len(values)


def test_every_file_is_one_that_overwrite_may_replace(exports: Exports) -> None:
    written = files_of(exports.of("clip", onnx=True).folder) | files_of(exports.of("siglip").folder)
    assert written <= EXPORT_FILES
    assert [x.name for x in FORMATS if not written & x.files] == []
    for format in FORMATS:  # as --overwrite with another option, and the hub, would else leave old files
        assert not format.subfolder or all(name.startswith(f"{format.subfolder}/") for name in format.files)


def test_every_option_is_a_flag_of_the_command() -> None:
    flags = inspect.signature(cli.export).parameters
    assert [x.option for x in FORMATS if x.option and x.option not in flags] == []


def test_an_option_that_no_format_has(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no export option tflite"):
        export("ViT-B-32:openai", tmp_path / "out", tflite=True)
    assert [x.name for x in asked_for(FORMATS, {"onnx": False})] == [x.name for x in FORMATS if not x.option]


@pytest.mark.parametrize("format", FORMATS, ids=lambda x: x.name)
def test_the_card_and_the_docs_say_how_each_is_used(format: Format, job: Job) -> None:
    """One snippet each; test_every_snippet_of_the_card_runs runs those of the card as they stand."""
    card = (job.folder / "README.md").read_text()
    usage = "\n\n".join(format.usage(job.folder.name, job))
    assert usage in card
    assert len(re.findall("```python", usage)) == 1
    assert format.name in usage
    assert format.name in (Path(__file__).parents[1] / "docs" / "export.md").read_text()


@pytest.mark.parametrize("format", CHECKED, ids=lambda x: x.name)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_each_check_compares_the_features_of_its_files(format: Format, tower: str, job: Job) -> None:
    format.check(job)
    assert job.found.by_library()[format.name].keys() == {"image", "text"}
    field = {"image": "image_BD", "text": "text_TD"}[tower]
    other = dataclasses.replace(job.full, **{field: getattr(job.full, field) + 1e-3})
    with pytest.raises(UserError, match=f"the {tower} tower as {format.name} loads it differs by 1.0e-03"):
        format.check(dataclasses.replace(job, full=other, stored=other))


@pytest.mark.parametrize("format", [x for x in FORMATS if x.packages], ids=lambda x: x.name)
def test_packages_that_are_missing_are_told(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    format.require_packages()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"--{format.option} needs {', '.join(format.packages)}: pip install"):
        format.require_packages()
