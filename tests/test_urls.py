"""Which addresses are read, and what of them is shown and kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlcl.cli import app
from vlcl.data import urls
from vlcl.data.manifest import expand_shards
from vlcl.data.shard import ShardError, scan_shard
from vlcl.data.urls import lasting, without_secrets
from vlcl.errors import UserError


def vlcl(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, f"{result.output} {result.exception}"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("simplecache::memory://bucket/cc3m/00000.tar", "simplecache: is no kind of address"),
        ("reference://x.json", "reference: is no kind of address"),
        ("ssh://host/x.tar", "ssh: is no kind of address.*'pipe:PROGRAM"),
        ("github://a:b@/x.tar", "github: is no kind of address"),
        ("local:///etc/x.tar", "local: is no kind of address"),
        ("memory:bucket/cc3m", "begins with memory://"),  # fsspec would take it for a path
        ("memory://bucket/a.tar::memory://bucket/b.tar", "'::' separates sources"),
    ],
)
def test_schemes_that_are_not_read(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        expand_shards([url], "run")
    with pytest.raises(ShardError):
        scan_shard(url)
    assert vlcl("data", "index", url)[0] == 2


def test_a_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(urls, "find_spec", lambda name: None)
    config = tmp_path / "c.yaml"
    for scheme, extra in (("s3", "s3"), ("gs", "gs"), ("az", "az")):
        config.write_text(f"data: {{train: {scheme}://bucket/x}}")
        code, said = vlcl("train", config)
        assert (code, f"not installed: pip install 'vlcl[{extra}]'" in said) == (2, True), said
    text = (
        "import sys, vlcl.cli, vlcl.data.urls as urls; urls.find_spec = lambda name: None\n"
        f"sys.argv = ['vlcl', 'train', {str(config)!r}]\n"
        "try: vlcl.cli.main()\nfinally: assert not {'torch', 'fsspec'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:SECRET@h.org/a.tar: 404", "https://h.org/a.tar: 404"),
        ("https://TOKEN@h.org/a.tar", "https://h.org/a.tar"),
        ("'https://h.org/{0..3}.tar?X-Amz-Signature=SECRET&x=1' (2)", "'https://h.org/{0..3}.tar?...' (2)"),
        ("URL can't contain '/a b.tar?sig=SECRET&v=2'", "URL can't contain '/a b.tar?sig=...&v=2'"),
        ("s3://KEY:SECRET@bucket/a.tar", "s3://bucket/a.tar"),
        ("abfs://box@account.dfs.core.windows.net/a", "abfs://box@account.dfs.core.windows.net/a"),
        ("hf://datasets/a/b@main/0000?.tar", "hf://datasets/a/b@main/0000?.tar"),
    ],
)
def test_what_of_an_address_is_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(ShardError(text, 2, "no")).startswith(shown)


def test_what_of_an_address_a_manifest_keeps() -> None:
    assert lasting("https://me:SECRET@h.org:8/a.tar?X-Goog-Signature=1&Expires=2") == "https://h.org:8/a.tar"
    assert lasting("https://h.org/get?id=3") == "https://h.org/get?id=3"
    assert lasting("s3://bucket/a?b.tar") == "s3://bucket/a?b.tar"


@pytest.mark.parametrize("address", ["s3://me:SECRET@bucket/run", "gs://bucket/run"])
def test_run_folders_are_not_at_addresses_but_have_copies_there(address: str, tmp_path: Path) -> None:
    shown = without_secrets(address)
    code, said = vlcl("train", "configs/openmoji.yaml", f"train.output={address}")
    assert code == 2 or "UserError" in said
    assert f"train.output={shown} is an address, and a run folder is on a file system" in said
    assert f"train.output=FOLDER checkpoint.remote={shown}" in said
    code, said = vlcl("export", tmp_path, "https://me:SECRET@h.org/clip")
    assert "OUT https://h.org/clip cannot be written to" in said
    assert "SECRET" not in said
