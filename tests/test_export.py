"""`vlcl export` as a user meets it: from a run, with its card; refusals, interruptions, and the check that stops it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export_models import Exports, card_of, export, families, write_folder
from PIL import Image
from ranks import apart, on_a_full_disk
from safetensors.torch import load_file, save_file
from shards import tiny_model
from typer.testing import CliRunner

import vlcl.export.command
from vlcl.checkpoint import load_model
from vlcl.cli import app
from vlcl.errors import UserError
from vlcl.export.check import transparent_pictures
from vlcl.export.output import EXPORT_FILES
from vlcl.export.transformers import Transformers
from vlcl.fingerprint import fingerprint_of

EVERYTHING = os.environ.get("VLCL_TEST_EVERYTHING") == "1"
FILES = {
    "README.md", "training_curve.png", "config.json", "model.safetensors", "open_clip_config.json",
    "open_clip_model.safetensors", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
}  # fmt: skip


@pytest.fixture
def run(exports: Exports) -> Path:
    return exports.run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_its_steps_and_its_average(exports: Exports, run: Path, tmp_path: Path) -> None:
    made = exports.of("run").made
    assert made.form == "CLIPModel"
    assert made.findings.images == 16
    assert "held-out" in made.findings.origin
    assert {path.name for path in made.folder.iterdir()} == FILES
    assert set(FILES) <= EXPORT_FILES
    folders = {"out": made.folder, "early": tmp_path / "early", "ema": tmp_path / "ema"}
    export(run / "step-00000004", folders["early"])
    export(run, folders["ema"], averaged=True)
    weights = {name: load_file(folder / "open_clip_model.safetensors") for name, folder in folders.items()}
    for name, file in (("out", "step-00000008/model"), ("early", "step-00000004/model"), ("ema", "step-00000008/ema")):
        expected = load_file(run / f"{file}.safetensors")
        assert all(torch.equal(weights[name][key], value) for key, value in expected.items())
    assert not torch.equal(weights["out"]["visual.proj"], weights["ema"]["visual.proj"])
    modes = {path.stat().st_mode & 0o777 for path in made.folder.iterdir()}
    assert len(modes) == 1  # safetensors would leave its own at 0600


def test_the_card_tells_what_the_run_did(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "my-clip", license="apache-2.0", averaged=True)
    front, text = card_of(tmp_path / "my-clip")
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert front["library_name"] == "transformers"
    assert text.startswith("\n# my-clip\n")
    assert "| pairs | 50 |" in text
    assert "| loss | em |" in text
    assert "the moving average of the weights at step 8" in text
    [last] = [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
              if r["step"] == 8 and "val/image_to_text_R@5" in r]  # fmt: skip
    assert f"| image to text R@5 | {100 * last['val/image_to_text_R@5']:.2f} % |" in text
    assert "on 20 held-out pairs" in text
    assert "Gradient-Bias Perspective" in text
    with Image.open(tmp_path / "my-clip" / "training_curve.png") as curve:
        assert curve.size[0] > 800  # two panels


def test_the_card_has_evaluations_of_these_weights_alone(run: Path, tmp_path: Path) -> None:
    kinds = {"raw": fingerprint_of(load_model(str(run))), "ema": fingerprint_of(load_model(str(run), averaged=True))}
    assert kinds["raw"] != kinds["ema"]
    shared = {"method": "linear_probe", "metric": "accuracy", "shots": 5, "complete": False}
    records = [
        shared | {"weights": kinds[kind], "dataset": kind, "mode": mode, "seed": seed, "score": score}
        for kind in kinds
        for mode, seed, score in (("elevater", 0, 50.0), ("elevater", 1, 60.0), ("strict", 0, 40.0))
    ]
    (run / "eval").mkdir()
    (run / "eval" / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "{torn")
    try:
        for kind, other in (("raw", "ema"), ("ema", "raw")):
            export(run, tmp_path / kind, averaged=kind == "ema")
            text = card_of(tmp_path / kind)[1]
            assert f"| {kind} † | accuracy | linear_probe | 5 | 55.00 | 40.00 |" in text
            assert f"| {other} " not in text
    finally:
        shutil.rmtree(run / "eval")


def test_the_card_of_other_weights_than_were_scored(exports: Exports) -> None:
    front, text = card_of(exports.of("run").folder)
    assert front["license"] == "unknown"
    assert "No licence was stated" in text
    assert "of the moving average of the weights, which this is not" in text


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_snippet_of_the_card_runs(
    kind: str, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, in one session, beside the folder and a picture, as the card says."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers of this form needs transformers 5")
    folder, onnx = tmp_path / "my-clip", kind == "clip" or EVERYTHING
    if kind == "clip":
        folder = exports.of(kind, onnx=True).folder
    else:  # of pictures that are cropped
        export(write_folder(tmp_path / "in", next(iter(families(kind).values()))), folder, onnx=onnx)
    monkeypatch.chdir(folder.parent)
    transparent_pictures()[0].save("picture.jpg", format="PNG")  # each library is to see it on white
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    libraries = ["pipeline", "open_clip", "SentenceTransformer", *(["onnxruntime"] if onnx else [])]
    assert [
        re.findall(r"pipeline|open_clip|SentenceTransformer|onnxruntime", text)[0] for text in snippets
    ] == libraries
    names: dict[str, Any] = {}
    for library, text in zip(libraries, snippets):
        exec(text, names)
        if library != "pipeline":  # of the others two have the same pixels: so are the similarities
            image, texts = (F.normalize(torch.as_tensor(names[x]), dim=-1) for x in ("image", "texts"))
            most = 2e-2 if library == "SentenceTransformer" else 1e-5
            assert float(abs(image @ texts.T - _similarity(folder)).max()) < most
    printed = capsys.readouterr().out
    assert "'label': 'cat'" in printed
    assert printed.count("tensor(") == 2


def _similarity(folder: Path) -> torch.Tensor:
    built = load_model(str(folder))
    with torch.no_grad():
        image = built.encoder.image(built.preprocess_eval(Image.open("picture.jpg"))[None])
        return image @ built.encoder.text(built.tokenize(["a photo of a cat", "a photo of a dog"])).T


def test_half_precision(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    made = export(run, tmp_path / "half", half=True)
    assert made.findings.half is not None
    assert made.findings.half > 1e-6
    for file in ("model.safetensors", "open_clip_model.safetensors"):
        assert {x.dtype for x in load_file(tmp_path / "half" / file).values()} == {torch.float16}
    assert next(AutoModel.from_pretrained(tmp_path / "half").parameters()).dtype == torch.float16
    export(run, tmp_path / "full")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.52 * sizes[1]


def test_half_refuses_numbers_that_it_cannot_hold(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", next(iter(families("clip").values())))
    file = tmp_path / "in" / "open_clip_model.safetensors"
    weights = load_file(file)
    for name, message in (("logit_scale", "logit_scale has values beyond"), ("visual.proj", "change features by nan")):
        save_file(weights | {name: torch.full_like(weights[name], 1e5)}, file)
        with pytest.raises(UserError, match=f"--half: .*{message}"):
            export(source, tmp_path / "out", half=True)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(exports: Exports, run: Path, tmp_path: Path) -> None:
    exports.copy("run", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"exists already; give another folder, or --overwrite"):
        export(run, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no export that --overwrite could replace .it holds notes.txt"):
        export(run, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before | {"notes.txt": b"mine"}
    (tmp_path / "out" / "notes.txt").unlink()
    export(run / "step-00000004", tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out")["model.safetensors"] != before["model.safetensors"]
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_only_what_vlcl_exported_is_replaced(exports: Exports, run: Path, tmp_path: Path) -> None:
    """Files of the same names from elsewhere, another file in a folder of ours, a link."""
    with pytest.raises(UserError, match="vlcl did not write it"):
        export(run, Path(exports.source("clip")), overwrite=True)
    exports.copy("run", tmp_path / "out")
    (tmp_path / "out" / "onnx").mkdir()
    (tmp_path / "out" / "onnx" / "mine.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"it holds onnx/mine.bin"):
        export(run, tmp_path / "out", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="is a link; give the folder"):
        export(run, tmp_path / "link", overwrite=True)


def test_what_appears_during_an_export_stays(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = vlcl.export.command.write_card

    def meanwhile(folder: Path, card: Any) -> None:
        true(folder, card)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")

    monkeypatch.setattr(vlcl.export.command, "write_card", meanwhile)
    with pytest.raises(UserError, match="exists already"):
        export(run, tmp_path / "out")
    assert contents(tmp_path) == {"out/thesis.txt": b"mine"}


@pytest.mark.parametrize("where", [".", "step-00000008", ".."])
def test_the_run_itself_is_never_the_target(run: Path, where: str) -> None:
    before = contents(run)
    with pytest.raises(UserError, match="holds the model to export"):
        export(run, run / where, overwrite=True)
    assert contents(run) == before


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_export_leaves_what_was_there(
    exports: Exports, run: Path, tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        exports.copy("clip", tmp_path / "out")
    before = contents(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vlcl.export.command, "write_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out", overwrite=there)
    assert contents(tmp_path) == before


def test_a_killed_export_leaves_no_half_folder(run: Path, tmp_path: Path) -> None:
    """SIGKILL while the files are there and are being checked; the next export cleans up."""
    folder = tmp_path / "folder"
    folder.mkdir()
    process = apart(tmp_path / "said", export_and_wait, run, folder / "out")
    for _ in range(600):
        if list(folder.glob(".out.*.building/processor_config.json")) or not process.is_alive():
            break
        time.sleep(0.1)
    assert list(folder.glob(".out.*.building/processor_config.json")), (tmp_path / "said").read_text()
    process.kill()
    process.join()
    assert not (folder / "out").exists()
    export(run, folder / "out")
    assert [path.name for path in folder.iterdir()] == ["out"]


def export_and_wait(run: Path, output: Path) -> None:
    Transformers.check = lambda *_: time.sleep(60)  # type: ignore[method-assign, assignment]
    export(run, output)


def test_a_full_disk(run: Path, tmp_path: Path) -> None:
    said = on_a_full_disk(tmp_path / "said", 100_000, "export", str(run), str(tmp_path / "out"))
    assert "out could not be written" in said
    assert "Make room" in said
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_mistakes_get_one_clear_error(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    tiny_model(broken)
    (broken / "model.safetensors").write_bytes((run / "step-00000008" / "model.safetensors").read_bytes()[:5000])
    empty = tmp_path / "empty"
    tiny_model(empty)
    unknown = tmp_path / "unknown"
    tiny_model(unknown)
    config = json.loads((unknown / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = {"timm_model_name": "no_such_vit", "image_size": 32}
    (unknown / "open_clip_config.json").write_text(json.dumps(config))
    (unknown / "model.safetensors").write_bytes(b"x")
    for source, message in (
        (broken, "cannot load .*broken.*damaged or cut short"),
        (empty, "has no weights; looked for open_clip_model.safetensors"),
        (unknown, "no_such_vit"),
        (tmp_path / "brocken", f"there is no folder .*; did you mean {broken}"),
        (tmp_path, "is no model: it has no open_clip_config.json and no step"),
        (broken / "model.safetensors", f"is a file of a model; give its folder: {broken}"),
        ("nowhere", "is no run, checkpoint or exported folder"),
        ("ViT-B-32", "needs its tag, ViT-B-32:TAG"),
        ("ViT-B-33:openai", "did you mean 'ViT-B-32'"),
    ):
        result = command(source, tmp_path / "out")
        assert result.exit_code == 2
        assert re.search(message, result.stderr), result.stderr
        assert not (tmp_path / "out").exists()
    result = command(run / "step-00000008", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "--ema exports that" in result.stdout
    assert "largest difference allowed: 1e-05" in result.stdout


def test_ema_of_a_run_without_one_and_a_damaged_one(tmp_path: Path) -> None:
    plain = write_folder(tmp_path / "plain", next(iter(families("clip").values())))
    with pytest.raises(UserError, match="the run kept no average"):
        export(plain, tmp_path / "out", averaged=True)
    (tmp_path / "plain" / "ema.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"ema.safetensors cannot be read"):
        export(plain, tmp_path / "out", averaged=True)
