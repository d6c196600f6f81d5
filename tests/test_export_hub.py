"""`vlcl export` to a hub, and what its options need: what is told before the work, and what is never published."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_models import Exports, card_of, export
from typer.testing import CliRunner

from vlcl.cli import app
from vlcl.errors import UserError
from vlcl.export.onnx import Onnx


@pytest.fixture
def run(exports: Exports) -> Path:
    return exports.run


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


class ConnectionRefused(Exception):
    """As HTTP clients have it: no OSError."""


class FakeHub:
    """Stands for huggingface_hub's client, which needs a network."""

    calls: list[tuple[str, dict[str, Any]]]
    fails: str | None = None

    def whoami(self) -> dict[str, str]:
        return self._call("whoami") or {"name": "me"}

    def create_repo(self, repo: str, **more: Any) -> Any:
        self._call("create_repo", repo=repo, **more)
        return f"https://hub/{repo}"

    def upload_folder(self, **more: Any) -> None:
        self._call("upload_folder", files=sorted(path.name for path in Path(more["folder_path"]).iterdir()), **more)

    def _call(self, name: str, **more: Any) -> Any:
        if self.fails == name:
            raise ConnectionRefused("no route to the hub")
        self.calls.append((name, more))
        return {}


def _write_files(folder: Path, names: Iterable[str]) -> None:
    """Stands for ONNX, which takes longest."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_push_to_hub(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlcl.export.hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [], raising=False)
    monkeypatch.setattr(FakeHub, "fails", "whoami")
    result = command(run, tmp_path / "out", "--push-to-hub", "me/tiny")
    assert result.exit_code == 2
    assert "hf auth login" in result.stderr
    assert not (tmp_path / "out").exists()
    assert command(run, tmp_path / "out", "--push-to-hub", "a/b/c").exit_code == 2
    assert "give --push-to-hub REPO" in command(run, tmp_path / "out", "--private").stderr

    monkeypatch.setattr(FakeHub, "fails", None)
    monkeypatch.setattr(Onnx, "require_packages", lambda self: None)
    monkeypatch.setattr(Onnx, "write", lambda self, job: _write_files(job.folder, self.files))
    monkeypatch.setattr(Onnx, "check", lambda self, job: None)
    result = command(run, tmp_path / "out", "--push-to-hub", "tiny", "--private", "--onnx")
    assert result.exit_code == 0, result.stderr
    [_, create, upload] = FakeHub.calls
    assert create == ("create_repo", {"repo": "me/tiny", "private": True, "exist_ok": True})
    assert upload[1]["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert (upload[1]["repo_id"], upload[1]["delete_patterns"]) == ("me/tiny", [])
    card = card_of(tmp_path / "out")[1]
    for text in ('model="me/tiny"', "hf-hub:me/tiny", 'hf_hub_download("me/tiny", "onnx/image_encoder.onnx")'):
        assert text in card

    monkeypatch.setattr(FakeHub, "fails", "upload_folder")
    result = command(run, tmp_path / "out", "--push-to-hub", "me/tiny", "--overwrite")
    assert result.exit_code == 2
    assert "hf upload me/tiny" in result.stderr
    assert "config.json" in {path.name for path in (tmp_path / "out").iterdir()}
    assert FakeHub.calls[-1][0] == "create_repo"
    monkeypatch.setattr(FakeHub, "fails", None)
    command(run, tmp_path / "out", "--push-to-hub", "me/tiny", "--overwrite")
    assert FakeHub.calls[-1][1]["delete_patterns"] == ["onnx/*"]  # those there are of other weights


def test_onnx_without_its_packages_is_told_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--onnx needs onnx, onnxscript, onnxruntime: pip install 'vlcl\[export\]'"):
        export(run, tmp_path / "out", onnx=True)


def test_no_secret_of_the_data_is_in_the_card(run: Path, tmp_path: Path) -> None:
    """And no command of it is run, and nothing fetched, to check the export."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    moved = tmp_path / "tiny"
    moved.mkdir()
    (moved / "step-00000008").symlink_to(run / "step-00000008")
    mark = tmp_path / "ran"
    for source, shown in (
        (f"pipe:touch {mark}; curl -H 'Authorization: SECRET' host", "(a command)"),
        ("https://user:SECRET@host/a/{0..3}.tar?key=SECRET", "https://host/a/{0..3}.tar"),
        ("/home/SECRET/shards/cc3m", "shards/cc3m"),
    ):
        config["data"] |= {"train": source, "val": source}
        (moved / "config.yaml").write_text(yaml.safe_dump(config))
        made = export(moved, tmp_path / "out", overwrite=True)
        assert made.findings.origin == "drawn pictures"
        text = card_of(tmp_path / "out")[1]
        assert f"| shards | {shown} |" in text
        assert "SECRET" not in text
        assert str(tmp_path) not in text
    assert not mark.exists()
