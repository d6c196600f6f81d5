"""Nothing that vlcl reads runs a program: names of files, run folders, checkpoints, models, pictures (SECURITY.md).

Every payload makes a file or folder PWNED in the current folder, which is the test's own.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_models import Exports
from shards import make_shards
from typer.testing import CliRunner

from vlcl.checkpoint import latest_step, load_model
from vlcl.cli import app
from vlcl.config import load_config
from vlcl.config.file import Loader
from vlcl.config.sections import DataConfig
from vlcl.data.decode import FORMATS, NOT_AN_IMAGE, BadSample, decode_image
from vlcl.data.manifest import expand_shards
from vlcl.errors import UserError
from vlcl.from_config import open_sources, open_splits
from vlcl.gradient_bias.checkpoint import open_checkpoint
from vlcl.model import build_model
from vlcl.sealed import META, read_meta, records, seal
from vlcl.train import train
from vlcl_eval.clip_benchmark.retrieval import find_shards
from vlcl_eval.models import load

ROOT = Path(__file__).parents[1]
OWN_TOKENIZER = """
import pathlib
pathlib.Path("PWNED").touch()
from transformers import PreTrainedTokenizer
class Own(PreTrainedTokenizer):
    pass
"""
OWN_MODEL = """
import pathlib
pathlib.Path("PWNED").touch()
from transformers import PretrainedConfig
class Own(PretrainedConfig):
    model_type = "own"
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, where nothing may come to be called PWNED."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield tmp_path
    assert not Path("PWNED").exists(), "a program was run"


def vlcl(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    print(result.output)
    told = isinstance(result.exception, UserError | SystemExit | None)
    assert told, f"{result.exception!r}"
    return result.exit_code, f"{result.output} {result.exception}"


@pytest.mark.parametrize("name", ["pipe:touch PWNED; cat 00000.tar #.tar", "PIPE:touch PWNED #.tar", "https:x.tar"])
def test_what_a_pattern_finds_is_a_file_whatever_its_name(here: Path, name: str) -> None:
    make_shards(here, (4,))
    shutil.copy("00000.tar", name)
    for pattern in ("*.tar", ".", name, ["00000.tar", name], str(here / "*.tar")):
        for shard in expand_shards(pattern, "run"):
            assert os.path.samefile(shard, name) or os.path.samefile(shard, "00000.tar")
    assert vlcl("data", "index", "*.tar", "--workers", 1)[0] == 0
    assert open_sources("*.tar", None, "run").num_samples == 8
    assert vlcl("data", "verify", "*.tar", "--workers", 1)[0] in (0, 1)  # the keys are there twice
    assert len(find_shards("*.tar", "test")) == 2


def test_a_folder_with_a_colon_is_a_folder(here: Path) -> None:
    make_shards(here / "cups:v2", (4,))
    assert open_sources("cups:v2").num_samples == 4


def test_a_command_in_a_config_runs_where_it_is_allowed(here: Path) -> None:
    make_shards(here / "shards", (4,))
    url = "pipe:touch RAN; cat shards/00000.tar"
    assert vlcl("data", "index", url, "--output", "m.json", "--workers", 1)[0] == 0  # typed: no more is asked
    Path("RAN").unlink()
    with pytest.raises(UserError, match=r"runs a command.*data\.allow_pipe=true"):
        open_splits(DataConfig(train=url, manifest="m.json"))
    for split in ("val", "test"):
        with pytest.raises(UserError, match=r"data\.allow_pipe=true"):
            open_splits(DataConfig.model_validate({"train": "shards", split: url, f"{split}_manifest": "m.json"}))
    sources, _, _ = open_splits(DataConfig(train=url, manifest="m.json", allow_pipe=True))
    assert sources.num_samples == 4
    assert sources.urls == (url,)


@pytest.mark.parametrize("url", ["pipe:touch PWNED; cat shards/00000.tar", "https://127.0.0.1:9/00000.tar"])
def test_a_run_folder_names_nothing_to_run_or_fetch(here: Path, exports: Exports, url: str) -> None:
    shutil.copytree(exports.run, "run")
    make_shards(here / "shards", (4,))
    manifest = Path("shards/manifest.json").read_text().replace('"00000.tar"', json.dumps(url))
    Path("run/m.json").write_text(manifest)
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["data"] |= {"train": url, "manifest": "run/m.json", "allow_pipe": True}
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"(?s)neither fetched nor run.*--data SHARDS"):
        open_checkpoint(Path("run"))
    assert vlcl("export", "run", "out")[0] == 0


def test_a_run_folder_names_no_module_to_import(here: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """data.stages of its config.yaml: a module that is on Python's path is not imported by what reads the run."""
    monkeypatch.syspath_prepend(str(here))
    Path("planted.py").write_text(
        'import pathlib\npathlib.Path("PWNED").touch()\ndef keep(samples):\n    return samples\n'
    )
    shutil.copytree(exports.run, "run")
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["data"]["stages"] = ["planted:keep"]
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    assert "data.stages of the run (planted:keep) is left out" in "".join(open_checkpoint(Path("run")).notes)
    small = ("--batch-sizes", "8", "--permutations", "3", "--pairs", "32", "--estimators", "infonce")
    assert vlcl("bias", "run", *small)[0] == 0
    assert vlcl("export", "run", "out")[0] == 0
    assert vlcl("eval", "retrieval", "run", make_shards(here / "shards", (12,)), "--output", "scores")[0] == 0
    overrides = [f"train.output={here / 'run'}", "resume=latest", "train.steps=9", "data.stages=[]"]
    train(load_config(exports.run / "config.yaml", overrides))  # resume reads the checkpoint, not the folder's settings
    assert "planted" not in sys.modules


@pytest.fixture
def own_code(here: Path, exports: Exports) -> Path:
    """A model folder, in open_clip's format, whose tokenizer is of its own code."""
    folder = Path(shutil.copytree(latest_step(exports.run), here / "model"))
    (folder / META).unlink()  # no checkpoint, which would be refused for its sums already
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"trust_remote_code": True}
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    auto = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    (folder / "own.py").write_text(OWN_TOKENIZER)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def test_a_model_folder_brings_no_code_of_its_own(own_code: Path) -> None:
    for use in (lambda: build_model(f"local-dir:{own_code}"), lambda: load_model(str(own_code))):
        with pytest.raises(UserError, match="tokenizer"):
            use()
    assert vlcl("export", own_code, "out")[0] != 0
    assert vlcl("eval", "retrieval", own_code, own_code)[0] != 0


def test_the_wish_for_code_is_not_handed_on(here: Path, exports: Exports) -> None:
    folder = Path(shutil.copytree(Path(exports.source("roberta")), here / "model"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert "trust_remote_code" not in json.dumps(build_model(f"local-dir:{folder}").config)


def test_a_text_tower_brings_no_code_of_its_own(here: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(Path(exports.source("roberta")), here / "model"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    tower = here / "tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    (tower / "own.py").write_text(OWN_MODEL)
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(tower)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked, either
    with pytest.raises(UserError):
        build_model(f"local-dir:{folder}")


@pytest.mark.parametrize("what", ["AutoModel", "AutoConfig", "AutoTokenizer"])
def test_a_transformers_folder_brings_no_code_of_its_own(
    here: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = Path(shutil.copytree(exports.of("clip").folder, here / "model"))
    for path in folder.glob("open_clip*"):
        path.unlink()
    name = "tokenizer_config.json" if what == "AutoTokenizer" else "config.json"
    content = json.loads((folder / name).read_text())
    content["auto_map"] = {what: ["own.Own", None] if what == "AutoTokenizer" else "own.Own"}
    if what == "AutoTokenizer":
        content["tokenizer_class"] = "Own"
    else:
        content["model_type"] = "own"
    (folder / name).write_text(json.dumps(content))
    (folder / "own.py").write_text(OWN_TOKENIZER if what == "AutoTokenizer" else OWN_MODEL)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with suppress(UserError):  # a tokenizer does without: tokenizer.json says all
        load(str(folder))


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


def test_no_file_of_a_checkpoint_is_unpickled(here: Path, exports: Exports) -> None:
    whole, step = exports.run, latest_step(exports.run)
    config = load_config(whole / "config.yaml", [f"train.output={here / 'run'}", "resume=latest", "train.steps=9"])
    names = [path.relative_to(step) for path in step.rglob("*") if path.is_file() and path.name != META]
    assert len(names) >= 6
    payload, folder = pickle.dumps(Payload(), protocol=2), here / "run" / step.name
    for name in names:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(whole, "run")
        (folder / name).write_bytes(_torch_file(payload) if name.suffix == ".pt" else payload)
        meta = {key: value for key, value in read_meta(folder).items() if key != "files"}
        (folder / META).unlink()
        seal(folder, meta, records(folder, map(str, names)))  # as who plants it would
        with suppress(UserError):  # none for a file that training has no need of
            train(config)
        assert not Path("PWNED").exists(), name
    (folder / META).write_bytes(payload)
    with pytest.raises(UserError, match=META):
        load_model(str(folder))


def _torch_file(payload: bytes) -> bytes:
    """As torch.save writes it, with the payload for its pickle."""
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "pytorch_model.bin"])
def test_weights_of_others_are_not_unpickled(here: Path, exports: Exports, name: str) -> None:
    folder = Path(shutil.copytree(latest_step(exports.run), here / "model"))
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(_torch_file(pickle.dumps(Payload(), protocol=2)))
    with pytest.raises(UserError):
        load_model(str(folder))
    with pytest.raises(UserError):
        build_model("ViT-Nano-8-64", pretrained=str(folder / name))


def test_only_formats_of_pictures_are_opened(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "bin").mkdir()
    for program in ("gs", "xv", "display"):
        (here / "bin" / program).write_text(f"#!/bin/sh\n: > '{here}/PWNED'\nexit 1\n")
        (here / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    for data in (eps, b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + bytes(22) + eps, b"/* XPM */\n"):
        with pytest.raises(BadSample, match=NOT_AN_IMAGE):
            decode_image(data)
    assert not {"EPS", "WMF", "FPX", "MIC", "PSD", "PDF"} & set(FORMATS)


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.unsafe_load",
    "yaml.full_load", "marshal.loads", "shelve.open", "joblib.load", "torch.hub.load", "dcp.load",
    "torch.distributed.checkpoint.load", "np.fromregex",
}  # fmt: skip


def test_the_code_has_no_call_that_runs_what_it_reads() -> None:
    files = [path for room in ("vlcl", "eval", "data_prep") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 80
    seen = set()
    for path in files:
        for name, call in _calls(path):
            words = {word.arg: word.value for word in call.keywords}
            assert name not in FORBIDDEN, f"{path}:{call.lineno}: {name}"
            assert "shell" not in words, f"{path}:{call.lineno}: {name}(shell=...)"
            for place, word in (("torch.load", "weights_only"), ("Image.open", "formats")):
                if name == place:
                    seen.add(place)
                    assert word in words, f"{path}:{call.lineno}: {name} without {word}"
            if name == "yaml.load":
                assert issubclass(Loader, yaml.SafeLoader)
                assert ast.unparse(call.args[1]) == "Loader", f"{path}:{call.lineno}"
            for word, wanted in (("weights_only", "True"), ("allow_pickle", "False"), ("trust_remote_code", "False")):
                assert word not in words or ast.unparse(words[word]) == wanted, f"{path}:{call.lineno}: {word}"
    assert seen == {"torch.load", "Image.open"}
