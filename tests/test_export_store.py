"""`vlcl export RUN s3://...`: the files of a folder, and at no moment what looks like a model and is not whole."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import fsspec
import open_clip
import pytest
import torch
from export_models import Exports, export
from test_mirror import memory
from transformers import AutoModel
from typer.testing import CliRunner

import vlcl.export.command
import vlcl.export.output
from vlcl.cli import app
from vlcl.data.stores import files_below, remove
from vlcl.data.urls import fetch_command
from vlcl.errors import UserError
from vlcl.export.output import FIRST_READ, UNFINISHED, in_store

__all__ = ["memory"]
URL = "memory://bucket/models/out"  # the name of the folder that is compared with


def contents(url: str = URL) -> dict[str, bytes]:
    store = fsspec.filesystem("memory")
    return {name: store.cat_file(f"{url}/{name}") for name in files_below(url)}


def vlcl_export(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    return f"{result.output} {result.exception}"


def test_what_is_there_is_what_a_folder_has_and_loads(exports: Exports, memory: Any, tmp_path: Path) -> None:
    local = exports.of("run").folder
    result = CliRunner().invoke(app, ["export", str(exports.run), URL])
    assert result.exit_code == 0, result.output
    assert not list(Path().glob("memory:*"))
    assert contents() == {path.name: path.read_bytes() for path in local.iterdir()}
    said = result.output.splitlines()[-1]
    assert said.startswith(f"wrote    {URL} (")
    code = said.partition("python -c ")[2]
    assert code.startswith('"import fsspec') or code.startswith("'import fsspec")
    memory.get("/bucket/models/out/", str(tmp_path / "out"), recursive=True)
    theirs: Any = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    ours: Any = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs.logit_scale, ours.logit_scale)


def send(exports: Exports, overwrite: bool = False) -> None:
    """What `vlcl export RUN URL` does, with an export that was made before."""
    with in_store(URL, overwrite) as folder:
        exports.copy("run", folder)


def half(memory: Any, exports: Exports, monkeypatch: pytest.MonkeyPatch, failing: str) -> list[str]:
    """An export that ends as `failing` would be written. Returns what was, in this order."""
    written: list[str] = []
    real = type(memory)._open

    def opened(self: Any, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "wb":
            if path.endswith(f"out/{failing}"):
                raise OSError("503")
            written.append(path.rpartition("/")[2])
        return real(self, path, mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "_open", opened)
        with pytest.raises(UserError, match=r"could not be written: 503; it is not whole"):
            send(exports)
    return written


def test_half_of_one_is_no_model_and_the_same_command_makes_it_whole(
    exports: Exports, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = half(memory, exports, monkeypatch, FIRST_READ[0])
    assert written[0] == UNFINISHED
    assert len(written) == len(list(exports.of("run").folder.iterdir())) - 1
    assert not {*FIRST_READ} & {*contents()}
    memory.pipe_file("/bucket/models/out/thesis.txt", b"mine")
    with pytest.raises(UserError, match=r"no export that --overwrite could replace \(it holds thesis.txt\)"):
        send(exports)
    memory.rm_file("/bucket/models/out/thesis.txt")
    send(exports)
    assert contents().keys() == {path.name for path in exports.of("run").folder.iterdir()}


def test_what_is_there_is_left_alone(exports: Exports, memory: Any) -> None:
    send(exports)
    before = contents()
    with pytest.raises(UserError, match=r"OUT memory://.* exists already; give another address, or --overwrite"):
        export(exports.run, URL)
    assert contents() == before
    memory.pipe_file("/bucket/models/out/onnx/text_encoder.onnx", b"of an export with more")
    memory.pipe_file("/bucket/models/out/model.safetensors", b"old")
    send(exports, overwrite=True)
    assert contents() == before
    with pytest.raises(UserError, match="no run, checkpoint or exported folder"):  # nothing of it is touched
        export("nowhere", URL, overwrite=True)
    assert contents() == before
    memory.pipe_file("/bucket/data/00000.tar", b"x")
    with pytest.raises(UserError, match=r"it holds 00000\.tar"):
        export(exports.run, "memory://bucket/data", overwrite=True)


def test_another_config_is_gone_before_its_files_are_replaced(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = json.dumps({vlcl.export.output.MARK: "1"}).encode()
    for name in ("config.json", "open_clip_config.json", "model.safetensors", "modules.json"):
        memory.pipe_file(f"/bucket/models/out/{name}", mark)
    seen: list[set[str]] = []
    real = vlcl.export.output.put_files

    def put_files(*args: Any) -> None:
        seen.append({*contents()})
        real(*args)

    monkeypatch.setattr(vlcl.export.output, "put_files", put_files)
    gone: list[str] = []
    monkeypatch.setattr(vlcl.export.output, "remove", lambda url: (gone.append(url.rpartition("/")[2]), remove(url)))
    with in_store(URL, overwrite=True) as folder:
        folder.mkdir()
        assert not gone
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes(b"new")
    assert seen == [{UNFINISHED}]
    assert sorted(gone[:2]) == sorted(FIRST_READ)
    assert contents() == {"config.json": b"new", "model.safetensors": b"new"}


def test_what_cannot_be_written_is_told_before_the_export_is_made(
    exports: Exports, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(vlcl.export.command, "find_model", lambda _: pytest.fail("too late"))
    monkeypatch.setattr(type(memory), "pipe_file", denied)
    with pytest.raises(UserError, match=r"OUT memory://.* could not be written: access is denied.*as it was before"):
        export(exports.run, URL)
    for out, said in (("hf://models/me/clip", "--push-to-hub REPO"), ("s4://bucket/x", "is no kind of address")):
        assert said in vlcl_export(exports.run, out)


def test_what_to_type_next(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch_command("s3a://bucket/my clip/") == "aws s3 cp --recursive 's3://bucket/my clip' 'my clip'"
    assert fetch_command("gcs://bucket/clip") == "gcloud storage cp --recursive gs://bucket/clip ."
    memory.pipe_file("/bucket/my clip/onnx/a.onnx", b"x")
    _, option, code = shlex.split(fetch_command("memory://bucket/my clip"))
    monkeypatch.chdir(tmp_path)
    exec(code)
    assert (option, (tmp_path / "my clip/onnx/a.onnx").read_bytes()) == ("-c", b"x")
    for model in ("s3://bucket/run", "gs://bucket/run"):
        said = vlcl_export(model, tmp_path / "out")
        assert f"MODEL {model} is an address, and models are read here. {fetch_command(model)}" in said
