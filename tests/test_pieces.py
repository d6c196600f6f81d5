"""Files of tensors in pieces: rows are read from whichever files have them, and what does not fit together is told.
Runs that write them are in tests/test_sharding.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from shards import TINY_MODEL
from torch import Tensor

from vlcl.checkpoint import load_model
from vlcl.errors import UserError
from vlcl.image_weights import load_image_weights
from vlcl.model import build_model
from vlcl.pieces import Piece, file_name, opened, read, save_pieces, stored

TENSORS = {
    "matrix": torch.arange(10.0).view(5, 2),
    "vector": torch.tensor([7, 8]).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
}


def cut(tensors: dict[str, Tensor], folder: Path, count: int) -> Path:
    """The files that `count` ranks write: rows as torch.chunk deals them, what has no rows in the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pieces = {}
        for name, x in tensors.items():
            parts = x.chunk(count) if x.ndim else (x,)
            if number < len(parts):
                start = sum(len(part) for part in parts[:number]) if x.ndim else 0
                pieces[name] = Piece(parts[number].contiguous(), start, tuple(x.shape))
        save_pieces(pieces, folder / file_name(number, count))
    return folder


@pytest.mark.parametrize("count", [1, 3, 7])
def test_any_rows_are_read_from_any_number_of_files(tmp_path: Path, count: int) -> None:
    folder = cut(TENSORS, tmp_path / "model", count)
    save_file(TENSORS, tmp_path / "file.safetensors")
    for path in (folder, tmp_path / "file.safetensors"):
        with opened(path) as found:
            assert found.keys() == TENSORS.keys()
            for name, x in TENSORS.items():
                assert (found[name].shape, found[name].whole().dtype) == (x.shape, x.dtype)
                assert torch.equal(found[name].whole(), x)
                for start in range(len(x) + 1 if x.ndim else 0):
                    for stop in range(start, len(x) + 1):
                        rows = found[name][start:stop]
                        assert torch.equal(rows, x[start:stop])
                        assert rows.dtype == x.dtype
        assert all(torch.equal(x, TENSORS[name]) for name, x in read(path).items())


def rewritten(path: Path, change: Any) -> None:
    """The file with another description of its pieces."""
    with opened(path) as tensors:
        content = {name: x.whole().clone() for name, x in tensors.items()}
    with safe_open(path, "pt") as file:
        info = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    change(info)
    save_file(content, path, {"DCP_SHARDING_INFO": json.dumps(info)})


BROKEN = {
    "a file is missing": (lambda folder: (folder / file_name(1, 3)).unlink(), "lacks rows 2 .. 3 of matrix"),
    "the last is missing": (lambda folder: (folder / file_name(2, 3)).unlink(), "lacks rows 4 .. 4 of matrix"),
    "two checkpoints": (lambda folder: cut(TENSORS, folder, 2), "rows 0 .. 2 of matrix twice"),
    "other shapes": (
        lambda folder: rewritten(folder / file_name(1, 3), lambda x: x["matrix"].update(full_shape=[6, 2])),
        r"matrix is \[6, 2\] here, \[5, 2\] in other files",
    ),
    "other columns": (
        lambda folder: rewritten(folder / file_name(1, 3), lambda x: x["matrix"].update(full_shape=[5, 3])),
        r"00001-of-00003.safetensors is no piece of a checkpoint",
    ),
    "a negative row": (
        lambda folder: rewritten(folder / file_name(0, 3), lambda x: x["matrix"].update(saved_offsets=[-1, 0])),
        "of matrix twice",
    ),
    "a huge row": (
        lambda folder: rewritten(folder / file_name(0, 3), lambda x: x["matrix"].update(saved_offsets=[10**30, 0])),
        "matrix",
    ),
    "no description": (
        lambda folder: save_file({"matrix": torch.ones(2, 2)}, folder / file_name(0, 3)),
        r"00000-of-00003.safetensors is no piece of a checkpoint",
    ),
    "no tensors at all": (
        lambda folder: (folder / file_name(0, 3)).write_bytes(b"x" * 20),
        r"00000-of-00003.safetensors: ",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_together_is_told_with_its_place(tmp_path: Path, kind: str) -> None:
    change, message = BROKEN[kind]
    folder = cut(TENSORS, tmp_path / "model", 3)
    change(folder)
    with pytest.raises(SafetensorError, match=message) as raised:
        read(folder)
    assert str(folder) in str(raised.value)


def test_a_folder_named_so_is_no_piece_and_a_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"")
    assert stored(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"
    cut(TENSORS, tmp_path / "model", 2)
    assert stored(tmp_path, "model.safetensors") == tmp_path / "model"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert stored(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same weights in a file, and in three pieces; in folders of a run each."""
    folders = tuple(tmp_path_factory.mktemp("models") / name / "step-00000001" for name in ("whole", "pieces"))
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "open_clip_config.json").write_text(json.dumps(TINY_MODEL))
    torch.manual_seed(0)
    clip: Any = open_clip.create_model(f"local-dir:{folders[0]}", load_weights=False)
    weights = {name: torch.randn_like(x) for name, x in clip.state_dict().items()}
    save_file(weights, folders[0] / "model.safetensors")
    cut(weights, folders[1] / "model", 3)
    return folders[0].parent, folders[1].parent


STARTS = {
    "as it is": {},
    "pictures of another size": {"image_size": 48},
    "more tokens": {"context_length": 12},
    "a bias that it lacks": {"logit_bias_init": -10.0},
}


@pytest.mark.parametrize("kind", STARTS)
def test_start_weights_in_pieces_are_those_of_a_file(
    models: tuple[Path, Path], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(TINY_MODEL))
    built = [build_model(f"local-dir:{tmp_path}", pretrained=str(run), **STARTS[kind]) for run in models]
    expected, found = (x.encoder.clip.state_dict() for x in built)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert built[0].config == built[1].config
    assert "random" not in caplog.text


def test_a_folder_with_pieces_is_a_model_and_its_image_tower_a_start(models: tuple[Path, Path]) -> None:
    whole, pieces = models
    built = load_model(str(pieces / "step-00000001"))
    expected = load_file(whole / "step-00000001" / "model.safetensors")
    assert all(torch.equal(x, expected[name]) for name, x in built.encoder.clip.state_dict().items())
    visual: Any = build_model(f"local-dir:{pieces / 'step-00000001'}").encoder.clip.visual
    for x in visual.parameters():
        x.data.zero_()
    load_image_weights(visual, str(pieces))
    assert all(torch.equal(x, expected[f"visual.{name}"]) for name, x in visual.state_dict().items())


def test_a_missing_piece_ends_a_start_with_its_place(models: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    cut({"logit_scale": torch.tensor(1.0), "x": torch.ones(5, 2)}, folder, 3)
    (folder / file_name(1, 3)).unlink()
    with pytest.raises(UserError, match=r"lacks rows 2 .. 3 of x: a file of it is missing"):
        build_model(f"local-dir:{models[0] / 'step-00000001'}", pretrained=str(tmp_path))
