"""The scripts of examples/, as a user starts them, on small inputs: train on a folder, export, search."""

from __future__ import annotations

import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_api import write_pictures

import vlcl
from vlcl.config import load_config

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def said_by(name: str, *arguments: object) -> str:
    """The same in this process, which has torch already: what it prints. An exit fails the test."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return said.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the first example leaves, and says."""
    folder = tmp_path_factory.mktemp("examples")
    write_pictures(folder / "pictures" / "some", 30)
    write_pictures(folder / "pictures" / "more", 14, seed=2)
    settings = ["train.epochs=2", "train.batch_size=8", "data.workers=0", "data.streams=1", "optim.warmup=2"]
    return folder, said_by("train_on_your_folder.py", folder / "pictures", folder / "out", *settings)


def test_train_on_your_folder(trained: tuple[Path, str]) -> None:
    folder, said = trained
    assert "train: 39 pairs, skipped {}" in said
    assert "val: 5 pairs, skipped {}" in said
    [report] = [line.removeprefix("report: ") for line in said.splitlines() if line.startswith("report: ")]
    assert Path(report).is_file()
    config = load_config(folder / "out" / "run" / "config.yaml")
    assert (config.train.batch_size, config.train.epochs, config.optim.lr) == (8, 2, 1e-3)


def test_search_pictures_by_text(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    vlcl.export_model(str(folder / "out" / "run"), folder / "my-clip", say=lambda text: None)
    said = said_by("search_pictures_by_text.py", folder / "my-clip", folder / "pictures", "a red shape on green")
    scores, paths = zip(*(line.split() for line in said.splitlines()))
    assert len(set(paths)) == 5
    assert all(Path(path).is_file() for path in paths)
    assert sorted(map(float, scores), reverse=True) == list(map(float, scores))
    built = vlcl.load_model(str(folder / "my-clip"))
    image = built.preprocess_eval(Image.open(paths[0]).convert("RGB"))
    with torch.no_grad():
        own = built.encoder(image[None], built.tokenize(["a red shape on green"]))
    assert float(own.logit_scale * (own.image_BD @ own.text_BD.T)) == pytest.approx(float(scores[0]), abs=0.02)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    done = example("train_on_your_folder.py")
    assert done.returncode == 1
    assert "PICTURES OUT" in done.stderr
    done = example("train_on_your_folder.py", write_pictures(tmp_path / "few", 3), tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'few'} has 3 pictures with a caption in a .txt; 20 are needed")
