"""The scripts of examples/, as a user starts them, on small inputs: train on a folder, export, search."""

from __future__ import annotations

import json
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_api import write_pictures
from typer.testing import CliRunner

import vlcl
from vlcl import cli
from vlcl.config import load_config
from vlcl.data.manifest import read_manifest

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


def test_two_runs_side_by_side(trained: tuple[Path, str]) -> None:
    run = trained[0] / "out" / "run"
    *_, last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "val/" in line]
    head, *lines = said_by("side_by_side.py", run, run).splitlines()
    assert head.split() == ["em", "em"]
    shown = {line.split()[0]: line.split()[1:] for line in lines}
    assert len(shown) == 6
    for name, values in shown.items():
        assert values == [f"{last[name]:.1%}"] * 2
    with pytest.raises(SystemExit, match=r"error: .*metrics\.jsonl does not exist"):
        said_by("side_by_side.py", trained[0])


def test_search_pictures_by_text(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    vlcl.export_model(str(folder / "out" / "run"), folder / "my-clip", say=lambda text: None)
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(folder / "pictures" / "nothing.png")
    Image.new("RGB", (40, 40), "white").save(folder / "pictures" / "white.png")
    model = [folder / "my-clip", folder / "pictures", "a red shape on green"]
    everything = runpy.run_path(str(EXAMPLES / "search_pictures_by_text.py"))["search"](
        *map(str, model[:1]), *model[1:]
    )
    score = {path.name: score for score, path in everything}
    assert score["nothing.png"] == pytest.approx(score["white.png"], abs=1e-4)  # as training saw it: nothing of red
    said = said_by("search_pictures_by_text.py", *model)
    scores, paths = zip(*(line.split() for line in said.splitlines()))
    assert len(set(paths)) == 5
    assert all(Path(path).is_file() for path in paths)
    assert sorted(map(float, scores), reverse=True) == list(map(float, scores))
    built = vlcl.load_model(str(folder / "my-clip"))
    image = built.preprocess_eval(Image.open(paths[0]).convert("RGB"))
    with torch.no_grad():
        own = built.encoder(image[None], built.tokenize(["a red shape on green"]))
    assert float(own.logit_scale * (own.image_BD @ own.text_BD.T)) == pytest.approx(float(scores[0]), abs=0.02)


DRAWING = """<svg xmlns:dc="http://purl.org/dc/elements/1.1/"
  xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><dc:title> {} </dc:title>
  <dc:creator><dc:title>someone</dc:title></dc:creator>
  <dc:subject><rdf:Bag><rdf:li>an_animal</rdf:li><rdf:li> </rdf:li><rdf:li>pet</rdf:li></rdf:Bag></dc:subject></svg>"""


def test_openclipart(tmp_path: Path) -> None:
    """From what dpkg-deb writes to pairs with their captions, by the commands that are printed. 40 drawings in a series
    of one title, 60 of their own, a torn one; a link is no picture of its own."""
    root = tmp_path / "clipart" / "usr" / "share" / "openclipart"
    for kind in ("png", "svg"):
        (root / kind / "animals").mkdir(parents=True)
    for number in range(100):
        title = "The Series" if number < 40 else f"cat {number}"
        Image.new("RGBA", (20, 20), (0, 0, number, 0)).save(root / "png" / "animals" / f"{number:03d}.png")
        (root / "svg" / "animals" / f"{number:03d}.svg").write_text(DRAWING.format(title))
    (root / "svg" / "animals" / "099.svg").write_text("<svg>")
    (root / "png" / "animals" / "link.png").symlink_to("000.png")
    said = said_by("openclipart.py", tmp_path / "clipart", tmp_path / "out")
    rows = {
        split: [json.loads(line) for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "val")
    }
    titles = {split: [row["title"] for row in found] for split, found in rows.items()}
    assert sorted(titles["train"] + titles["val"]) == sorted(
        ["", *["The Series"] * 40, *[f"cat {n}" for n in range(40, 99)]]
    )
    assert not set(titles["train"]) & set(titles["val"])
    assert "The Series" in titles["train"]
    assert 2 <= len(titles["val"]) <= 15  # a tenth of 60, by chance
    assert {row["keywords"] for row in rows["val"]} == {"an animal, pet"}
    commands = [line.removeprefix("next: vlcl ") for line in said.splitlines() if line.startswith("next: ")]
    for command in commands:
        done = CliRunner().invoke(cli.app, shlex.split(command))
        assert done.exit_code == 0, done.output
        assert "'data.json_text_key=[title,keywords]'" in done.output
    for split, left_out in (("train", 1), ("val", 0)):
        manifest = read_manifest(str(tmp_path / "out" / split / "manifest.json"))
        assert manifest.num_samples == len(rows[split]) - left_out  # the torn one has no words


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    done = example("train_on_your_folder.py")
    assert done.returncode == 1
    assert "PICTURES OUT" in done.stderr
    done = example("train_on_your_folder.py", write_pictures(tmp_path / "few", 3), tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'few'} has 3 pictures with a caption in a .txt; 20 are needed")
