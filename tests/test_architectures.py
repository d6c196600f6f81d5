"""`vlcl models`: names, sizes and export forms, from a table that a measurement agrees with."""

from __future__ import annotations

import open_clip
import pytest
from export_models import plain_vits
from typer.testing import CliRunner

from vlcl.architectures import describe, measure, names
from vlcl.cli import app
from vlcl.errors import UserError
from vlcl.model import build_model


@pytest.mark.parametrize("name", ["ViT-Pico-8-32", "ViT-B-32", "ViT-B-16-SigLIP", "RN50", "coca_base"])
def test_the_table_has_what_is_measured(name: str) -> None:
    assert describe(name) == measure(name)


def test_parameters_are_those_of_the_model_itself() -> None:
    built = build_model("ViT-Pico-8-32")
    assert describe("ViT-Pico-8-32").parameters == sum(p.numel() for p in built.encoder.clip.parameters())
    assert describe("ViT-B-32").parameters == 151_277_313  # as open_clip's docs have it


def test_forms_are_those_of_the_families() -> None:
    forms = {"clip": "CLIPModel", "metaclip": "MetaClip2Model", "siglip": "SiglipModel"}
    for kind, entries in plain_vits().items():
        known = {describe(entry["name"]).form for entry in entries}
        assert known == {forms[kind]}, kind
    assert describe("roberta-ViT-B-32").parameters is None
    assert describe("roberta-ViT-B-32").reason == "its text tower is described on the Hugging Face hub"


def test_the_command_lists_and_finds() -> None:
    done = CliRunner().invoke(app, ["models"])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == open_clip.list_models()
    done = CliRunner().invoke(app, ["models", "siglip2"])
    assert "model.pretrained=webli" in done.output
    assert "SiglipModel" in done.output
    assert names("laion2b_s34b_b79k") == ["ViT-B-32"]  # a tag
    with pytest.raises(UserError, match=r"no architecture or tag has 'ViT-B-23'.*did you mean .*ViT-B-32"):
        names("ViT-B-23")
