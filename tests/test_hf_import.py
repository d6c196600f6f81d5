"""`model.pretrained` from folders that transformers wrote, and the way there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import Exports, export, families, write_folder
from safetensors.torch import load_file, save_file
from shards import make_shards
from transformers import AutoModel

from vlcl.checkpoint import load_model
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.model import build_model
from vlcl.train import train

KINDS = ("clip", "siglip", "metaclip", "roberta")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def hf_only(folder: Path) -> Path:
    """Of an exported folder, what transformers itself would write."""
    for path in folder.glob("open_clip_*"):
        path.unlink()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_export_pretrained_export_gives_the_same_weights(kind: str, exports: Exports, tmp_path: Path) -> None:
    """Both formats of the first export lead back to the same second one."""
    first = exports.copy(kind, tmp_path / "first")
    assert_same(state(first), state(Path(exports.source(kind))))
    wanted = {name: (first / name).read_bytes() for name in ("model.safetensors", "open_clip_model.safetensors")}
    bare = f"local-dir:{_without_weights(first, tmp_path / 'bare')}"
    for step, folder in (("open_clip", first), ("transformers", hf_only(first))):
        built = build_model(bare, pretrained=str(folder))
        again = tmp_path / step
        again.mkdir()
        (again / "open_clip_config.json").write_text(json.dumps(built.config))
        if save_tokenizer := getattr(built.tokenize, "save_pretrained", None):
            save_tokenizer(again)
        save_file(built.encoder.clip.state_dict(), again / "open_clip_model.safetensors")
        export(again, tmp_path / f"second-{step}")
        got = {name: (tmp_path / f"second-{step}" / name).read_bytes() for name in wanted}
        assert got == wanted


def _without_weights(folder: Path, target: Path) -> Path:
    """The architecture of `folder` alone, with other random weights to come."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix in (".json", ".txt"):
            (target / path.name).write_bytes(path.read_bytes())
    (target / "config.json").unlink()
    return target


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_transformers_itself_saved(kind: str, exports: Exports, tmp_path: Path) -> None:
    """Its own save_pretrained, in several files and in half precision too."""
    source = exports.source(kind)
    model: Any = AutoModel.from_pretrained(exports.of(kind).folder)
    expected = load_model(source).encoder.clip.state_dict()
    for name, dtype, options in (("one", torch.float32, {}), ("many", torch.float32, {"max_shard_size": "100KB"}),
                                 ("half", torch.float16, {})):  # fmt: skip
        model.to(dtype).save_pretrained(tmp_path / name, **options)
        got = build_model(f"local-dir:{source}", pretrained=str(tmp_path / name)).encoder.clip.state_dict()
        assert len(list((tmp_path / name).glob("*.safetensors"))) > (1 if name == "many" else 0)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value.to(dtype).float(), rtol=0, atol=0)


def test_training_starts_from_a_hugging_face_folder(exports: Exports, tmp_path: Path) -> None:
    source = exports.source("clip")
    hf_only(exports.copy("clip", tmp_path / "out"))
    train(load_config(None, [
        f"data.train={make_shards(tmp_path / 'train', (20,))}", f"model.name=local-dir:{source}",
        f"model.pretrained={tmp_path / 'out'}", f"train.output={tmp_path / 'run'}", "train.steps=1",
        "train.batch_size=10", "optim.lr=1e-9", "data.workers=0", "data.streams=1", "log.trackers=[]",
        "train.precision=fp32",
    ]))  # fmt: skip
    trained = load_file(tmp_path / "run" / "step-00000001" / "model.safetensors")
    for name, value in state(Path(source)).items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)


def test_a_bias_comes_with_the_weights(exports: Exports, tmp_path: Path) -> None:
    """And one that CLIPModel lacks starts where the setting says."""
    source = shutil.copytree(exports.source("siglip"), tmp_path / "in")
    exports.copy("siglip", tmp_path / "out")
    config = json.loads((tmp_path / "in" / "open_clip_config.json").read_text())
    del config["model_cfg"]["init_logit_bias"]
    (tmp_path / "in" / "open_clip_config.json").write_text(json.dumps(config))
    built = build_model(f"local-dir:{source}", pretrained=str(hf_only(tmp_path / "out")))
    assert float(built.encoder.clip.logit_bias) == pytest.approx(float(state(tmp_path / "in")["logit_bias"]))
    clip, out = exports.source("clip"), exports.copy("clip", tmp_path / "clip-out")
    built = build_model(f"local-dir:{clip}", pretrained=str(hf_only(out)), logit_bias_init=-10.0)
    assert float(built.encoder.clip.logit_bias) == -10.0


def test_another_architecture_is_named(tmp_path: Path) -> None:
    config = families("clip")
    small = write_folder(tmp_path / "in", config[next(name for name in config if "ViT-Nano" in name)])
    export(small, tmp_path / "out")
    hf_only(tmp_path / "out")
    with pytest.raises(UserError, match=r"another architecture .*vision_config.hidden_size is 128, this model's 192"):
        build_model("ViT-Ti-16-64", pretrained=str(tmp_path / "out"))
    quick = config[next(name for name in config if "ViT-Nano" in name)] | {"quick_gelu": True}
    other = write_folder(tmp_path / "quick", quick)
    with pytest.raises(UserError, match=r"hidden_act is gelu, this model's quick_gelu"):
        build_model(f"local-dir:{other}", pretrained=str(tmp_path / "out"))


def test_the_name_that_fits_is_told(exports: Exports, tmp_path: Path) -> None:
    folder = hf_only(exports.copy("ViT-Nano-8-64", tmp_path / "out"))
    with pytest.raises(UserError, match=r"it is model.name=ViT-Nano-8-64"):
        build_model("ViT-Ti-16-64", pretrained=str(folder))


def test_the_name_that_fits_an_export_is_told(exports: Exports) -> None:
    with pytest.raises(UserError, match=r"the weights are of model.name=ViT-Nano-8-64"):
        build_model("ViT-Ti-16-64", pretrained=str(exports.of("ViT-Nano-8-64").folder))


def test_folders_that_cannot_be_used(exports: Exports, tmp_path: Path) -> None:
    source, folder = exports.source("clip"), hf_only(exports.copy("clip", tmp_path / "out"))
    weights = (folder / "model.safetensors").read_bytes()
    name = f"local-dir:{source}"
    config = json.loads((folder / "config.json").read_text())

    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(UserError, match="its weights cannot be read"):
        build_model(name, pretrained=str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors is looked for"):
        build_model(name, pretrained=str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "blip"}))
    with pytest.raises(UserError, match="holds a model of type 'blip'"):
        build_model(name, pretrained=str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        build_model(name, pretrained=str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": 3}))
    with pytest.raises(UserError, match=r"config.json is damaged"):
        build_model(name, pretrained=str(folder))


def test_another_end_token_is_refused(exports: Exports, tmp_path: Path) -> None:
    """transformers would take the text feature elsewhere."""
    source, path = exports.source("clip"), hf_only(exports.copy("clip", tmp_path / "out")) / "config.json"
    config = json.loads(path.read_text())
    for end, fits in ((2, True), (320, False)):
        config["text_config"]["eos_token_id"] = end
        path.write_text(json.dumps(config))
        if fits:
            build_model(f"local-dir:{source}", pretrained=str(tmp_path / "out"))
        else:
            with pytest.raises(UserError, match="eos_token_id is 320"):
                build_model(f"local-dir:{source}", pretrained=str(tmp_path / "out"))
