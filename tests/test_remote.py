"""Shards behind http, from a server that stalls, resets, breaks off, redirects, is busy and lies about lengths."""

from __future__ import annotations

import http.server
import json
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shards import make_shards, tiny_model
from typer.testing import CliRunner

from vlcl.cli import app
from vlcl.config import load_config
from vlcl.data import remote
from vlcl.data.reader import read_run
from vlcl.data.remote import RemoteFile
from vlcl.data.shard import ShardError, read_samples, scan_shard
from vlcl.train import train

LENGTH = 40_000
CONTENT = bytes(i * i % 251 for i in range(LENGTH))


class Server(http.server.ThreadingHTTPServer):
    """Files by name, and how often each request goes wrong before it goes right, by what is wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/file": CONTENT}
        self.wrong: list[str] = []  # of the next requests, one each
        self.ranges, self.version, self.announced = True, '"1"', 0
        self.asked: list[tuple[str, dict[str, str]]] = []

    def url(self, path: str = "/file", user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:  # a client may go at any time
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # type: ignore[reportIncompatibleVariableOverride] # of ours there is one class alone

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        server.asked.append((self.path, dict(self.headers)))
        wrong = server.wrong.pop(0) if server.wrong else ""
        if wrong.isdigit():
            self.send_error(int(wrong))
            return
        if wrong == "redirects":
            wrong = f"to /moved{self.path.removeprefix('/moved')}"
        if wrong.startswith("to "):
            self.send_response(302)
            self.send_header("Location", wrong.removeprefix("to "))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if wrong == "silent":
            time.sleep(1.5)
            return
        content = server.files.get(self.path.removeprefix("/moved").partition("?")[0])
        if content is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if server.ranges else None
        start = int(asked[1]) if asked else 0
        if start >= len(content) > 0:
            self.send_error(416)
            return
        whole = len(content) + server.announced
        stop = min(int(asked[2]) + 1, whole) if asked and asked[2] else whole
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{whole}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", server.version)
        self.end_headers()
        body = b"" if self.command == "HEAD" else content[start:stop]
        if wrong:
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.wfile.flush()
        if wrong == "stalls":
            time.sleep(1.5)
        if wrong == "resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "TIMEOUT", 0.4)
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def read_all(url: str, size: int = 7000) -> bytes:
    with RemoteFile(url) as stream:
        return b"".join(iter(lambda: stream.read(size), b""))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("wrong", ["stalls", "resets", "breaks off", "silent", "503", "429", "500"])
def test_a_read_is_taken_up_where_it_broke(server: Server, wrong: str, ranges: bool) -> None:
    server.wrong, server.ranges = [wrong, "", wrong], ranges
    assert read_all(server.url()) == CONTENT
    assert RemoteFile(server.url()).read(5) == CONTENT[:5]
    if ranges and wrong in ("stalls", "breaks off"):
        assert server.asked[1][1]["Range"] == f"bytes={LENGTH // 2}-"  # nothing is fetched twice


def test_failures_in_a_row_and_then_success(server: Server) -> None:
    server.wrong = ["503", "resets", "breaks off", "stalls", "503", "503", "503", "503"]
    assert read_all(server.url()) == CONTENT


@pytest.mark.parametrize(
    ("wrong", "said", "requests"),
    [
        (["404"], "the server answers 404 Not Found", 1),
        (["403"], "the server answers 403 Forbidden", 1),
        (["503"] * 9, r"the server answers 503 Service Unavailable \(6 tries\)", 6),
        (["silent"] * 9, r"nothing came for 0.4 s \(6 tries\)", 6),
        (["to file:///etc/passwd"], r"the server answers 302 .*file:///etc/passwd.* is not allowed", 1),
        (["to /file"] * 20, "redirect", 5),
    ],
)
def test_what_does_not_get_better_is_told(server: Server, wrong: list[str], said: str, requests: int) -> None:
    server.wrong = wrong
    with pytest.raises(OSError, match=said):
        read_all(server.url())
    assert len(server.asked) == requests


def test_nobody_is_there(server: Server) -> None:
    url = server.url()
    server.server_close()
    with pytest.raises(OSError, match=r"refused.*\(6 tries\)"):
        RemoteFile(url)


def test_a_length_that_is_a_lie(server: Server) -> None:
    server.announced = 100
    with pytest.raises(OSError, match="416"):
        read_all(server.url())


def test_another_file_in_its_place_is_not_joined_to_the_first(server: Server) -> None:
    server.wrong = ["breaks off"]
    stream = RemoteFile(server.url())
    assert stream.read(100) == CONTENT[:100]
    server.version, server.files["/file"] = '"2"', CONTENT[::-1]
    with pytest.raises(OSError, match="it is another file than it was at first"):
        _ = list(iter(lambda: stream.read(1000), b""))


def test_the_password_goes_to_its_server_alone(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.wrong = ["503"]
    with caplog.at_level(logging.WARNING):
        assert read_all(server.url("/file?key=SIGNED", "me:SECRET@")) == CONTENT
    server.asked.clear()
    assert "again in" in caplog.text
    assert "SECRET" not in caplog.text
    assert "SIGNED" not in caplog.text
    with Server() as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        server.wrong = [f"to {other.url()}"]
        assert read_all(server.url(user="me:s%20t@")) == CONTENT
        assert server.asked[0][1]["Authorization"] == "Basic bWU6cyB0"
        assert "Authorization" not in other.asked[0][1]
        other.shutdown()


@pytest.fixture
def shard(tmp_path: Path, server: Server) -> Path:
    make_shards(tmp_path, (40,))
    server.files["/00000.tar"] = (tmp_path / "00000.tar").read_bytes()
    return tmp_path / "00000.tar"


@pytest.mark.parametrize("wrong", ["stalls", "resets", "breaks off", "503", "redirects"])
def test_a_shard_has_its_samples_whatever_happens(server: Server, shard: Path, wrong: str) -> None:
    server.wrong = [wrong] * 3
    here, there = scan_shard(str(shard)), scan_shard(server.url("/00000.tar"))
    assert (there.samples, there.checksum) == (here.samples, here.checksum)
    server.wrong = [wrong] * 3
    assert list(read_samples(server.url("/00000.tar"))) == list(read_samples(str(shard)))


def test_a_shard_that_stays_bad_is_named_and_skipped(
    server: Server, shard: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.wrong = ["breaks off", *["503"] * 9]
    url = server.url("/00000.tar")
    with caplog.at_level(logging.WARNING):
        found = list(read_run(url, 0, 40))
    good = [sample for _, sample in found if not isinstance(sample, Exception)]
    assert [position for position, _ in found] == list(range(40))
    assert 10 < len(good) < 30
    assert {str(sample) for _, sample in found[len(good) :]} == {"unreadable shard"}
    assert f"{url}: cannot be read as a tar file to its end: the server answers 503" in caplog.text
    with pytest.raises(ShardError, match="404"):
        scan_shard(server.url("/other.tar"))


def test_index_and_training_over_http(server: Server, shard: Path, tmp_path: Path) -> None:
    """The same losses as from the disk, though every third answer goes wrong."""
    manifest, losses = str(tmp_path / "m.json"), {}
    server.wrong = ["resets", "503", "stalls"]
    arguments = ["--output", manifest, "--workers", "1"]
    done = CliRunner().invoke(app, ["data", "index", server.url("/{00000..00000}.tar"), *arguments])
    assert done.exit_code == 0, done.output
    for name, url in (("here", str(shard)), ("there", server.url("/{00000..00000}.tar"))):
        server.wrong = ["breaks off", "", "503", "stalls", "", "resets"] * 4
        output = tmp_path / name
        train(load_config(None, [
            f"data.train={url}", f"model.name={tiny_model(tmp_path / 'model')}", f"train.output={output}",
            "train.steps=6", "train.batch_size=10", "train.log_every=1", "data.workers=0", "data.streams=1",
            "train.precision=fp32", *([f"data.manifest={manifest}"] if name == "there" else []),
        ]))  # fmt: skip
        losses[name] = [json.loads(line).get("train/loss") for line in (output / "metrics.jsonl").open()]
    assert losses["here"] == losses["there"]
    assert len(server.asked) > 5


def test_passwords_and_signatures_are_shown_nowhere(
    server: Server, shard: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    url = server.url("/{00000..00001}.tar?X-Amz-Signature=SIGNED&x=1", "me:SECRET@")
    server.wrong = ["", "404"]
    done = CliRunner().invoke(app, ["data", "index", url, "--output", str(tmp_path / "m.json"), "--workers", "1"])
    told = f"{done.output} {done.exception}"
    assert "00001.tar?...: cannot be opened: the server answers 404" in told
    server.files["/00001.tar"] = server.files["/00000.tar"]
    assert CliRunner().invoke(app, ["data", "index", url, "--output", str(tmp_path / "m.json")]).exit_code == 0
    names = [entry["name"] for entry in json.loads((tmp_path / "m.json").read_text())["shards"]]
    assert names == [server.url(f"/0000{n}.tar") for n in range(2)]
    tomorrow = url.replace("SIGNED", "SIGNED-again")
    table = tmp_path / "verify.tsv"
    assert (
        CliRunner().invoke(app, ["data", "verify", tomorrow, "--output", str(table), "--workers", "1"]).exit_code == 1
    )
    server.wrong = ["503", "403", "breaks off", "503", "404"]
    train(load_config(None, [
        f"data.train={tomorrow}", f"data.manifest={tmp_path / 'm.json'}",
        f"model.name={tiny_model(tmp_path / 'model')}", f"train.output={tmp_path / 'run'}", "train.steps=2",
        "train.batch_size=10", "train.log_every=1", "data.workers=0", "data.streams=1", "train.precision=fp32",
        "data.max_bad_share=1",
    ]))  # fmt: skip
    assert "403" in caplog.text
    out, err = capfd.readouterr()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    logs = "".join(path.read_text(errors="replace") for path in files if path.name != "config.yaml")
    for secret in ("SIGNED", "SECRET"):
        assert secret in (tmp_path / "run" / "config.yaml").read_text()  # the run goes on with it
        for text in (told, table.read_text(), caplog.text, out, err, logs):
            assert secret not in text
    done = CliRunner().invoke(app, ["bias", str(tmp_path / "run")])  # of a run folder nothing is fetched
    assert "neither fetched nor run" in f"{done.output} {done.exception}"
    assert not {"SIGNED", "SECRET"} & set(re.findall("[A-Z]+", f"{done.output} {done.exception}"))
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.shareable()["data"]["train"] == server.url("/{00000..00001}.tar?...")
