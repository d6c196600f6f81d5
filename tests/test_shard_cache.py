"""Copies of remote shards: whole or not there, of this version, within the bound, whoever writes; and reading ahead."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
from test_remote import CONTENT, LENGTH, Server, server

from vlcl.config import load_config
from vlcl.data import remote, shard_cache
from vlcl.data.read_ahead import ReadAhead
from vlcl.data.remote import Fetching, RemoteFile
from vlcl.data.shard_cache import cached
from vlcl.errors import UserError

__all__ = ["server"]


@pytest.fixture
def fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetching:
    monkeypatch.setattr(shard_cache, "_believed", set())
    monkeypatch.setattr(shard_cache, "_told", set())
    return Fetching(cache=str(tmp_path / "cache"), cache_bytes=10**6)


def content(url: str, fetching: Fetching) -> bytes | None:
    file = cached(url, fetching)
    if file is None:
        return None
    with file:
        return file.read()


def fetches(server: Server) -> int:
    """How often the whole file was asked for, since the last time."""
    whole = [headers for _, headers in server.asked if "Range" not in headers]
    server.asked.clear()
    return len(whole)


def shards(fetching: Fetching) -> list[Path]:
    assert fetching.cache
    return sorted(Path(fetching.cache).glob("*.shard"))


def test_a_copy_is_made_once_and_of_the_whole_url(server: Server, fetching: Fetching) -> None:
    server.wrong = ["", "breaks off", "503"]
    assert content(server.url("/file"), fetching) == CONTENT
    assert fetches(server) == 1  # the rest of it by a range
    assert content(server.url("/file"), fetching) == CONTENT
    assert (fetches(server), len(shards(fetching))) == (0, 1)
    assert content(server.url("/file?key=SECRET", "me:PASSWORD@"), fetching) == CONTENT
    assert (fetches(server), len(shards(fetching))) == (1, 2)
    kept = "".join(path.name + path.read_text(errors="replace") for path in Path(fetching.cache or "").iterdir())
    assert "SECRET" not in kept
    assert "PASSWORD" not in kept
    name = hashlib.sha256(server.url("/file").encode()).hexdigest()[:40]
    assert name in {path.stem for path in shards(fetching)}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def drop_sum(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


@pytest.mark.parametrize("damage", [cut, flip, drop_sum])
def test_a_damaged_copy_is_fetched_anew(
    server: Server, fetching: Fetching, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert content(server.url(), fetching) == CONTENT
    fetches(server)
    assert callable(damage)
    damage(shards(fetching)[0])
    assert content(server.url(), fetching) == CONTENT
    assert fetches(server) == 1
    assert ("is damaged" in caplog.text) == (damage is flip)
    assert content(server.url(), fetching) == CONTENT
    assert fetches(server) == 0


def test_another_version_is_fetched_and_an_old_one_serves_when_nobody_answers(
    server: Server, fetching: Fetching, caplog: pytest.LogCaptureFixture
) -> None:
    assert content(server.url(), fetching) == CONTENT
    server.version, server.files["/file"] = '"2"', CONTENT[::-1]
    assert content(server.url(), fetching) == CONTENT[::-1]
    server.wrong = ["503"] * remote.TRIES
    assert content(server.url(), fetching) == CONTENT[::-1]
    assert "503 Service Unavailable (6 tries); its copy in" in caplog.text
    flip(shards(fetching)[0])
    server.wrong = ["503"] * remote.TRIES
    with pytest.raises(OSError, match="503"):
        content(server.url(), fetching)
    server.wrong = ["", "403"]
    with pytest.raises(OSError, match="403"):
        content(server.url(), fetching)
    assert not list(Path(fetching.cache or "").glob("*.part"))


def test_the_bound_holds_and_the_least_used_goes_first(
    server: Server, tmp_path: Path, fetching: Fetching, caplog: pytest.LogCaptureFixture
) -> None:
    fetching = Fetching(cache=fetching.cache, cache_bytes=3 * LENGTH + 10)
    server.files |= {f"/{n}": CONTENT for n in range(5)} | {"/large": CONTENT * 4}
    other = tmp_path / "cache" / "mine.tar"
    other.parent.mkdir()
    other.write_bytes(bytes(10**6))
    dead = other.with_name(f"{'0' * 40}.123.part")
    dead.write_bytes(bytes(LENGTH))
    os.utime(dead, (1, 1))
    for n in (0, 1, 2):
        assert content(server.url(f"/{n}"), fetching) == CONTENT
        time.sleep(0.01)
    assert not dead.exists()
    held = cached(server.url("/0"), fetching)  # used again: 1 is the oldest now
    fetches(server)
    for n in (3, 4):
        assert content(server.url(f"/{n}"), fetching) == CONTENT
        assert sum(path.stat().st_size for path in shards(fetching)) <= fetching.cache_bytes
    assert fetches(server) == 2
    assert content(server.url("/0"), fetching) == CONTENT
    assert fetches(server) == 0
    assert content(server.url("/1"), fetching) == CONTENT
    assert fetches(server) == 1
    assert held is not None
    assert held.read() == CONTENT
    held.close()
    for _ in range(2):
        assert content(server.url("/large"), fetching) is None
    assert caplog.text.count("larger shards are read without the cache") == 1
    assert other.stat().st_size == 10**6  # of somebody else's


def _many(url: str, fetching: Fetching, out: str) -> None:
    Path(out).write_bytes(b"".join(content(f"{url}/{n % 3}", fetching) or b"" for n in range(6)))


def test_several_processes_fetch_a_shard_once(server: Server, tmp_path: Path, fetching: Fetching) -> None:
    server.files |= {f"/{n}": CONTENT[n:] for n in range(3)}
    context = multiprocessing.get_context("fork")
    outputs = [str(tmp_path / f"out{n}") for n in range(4)]
    them = [context.Process(target=_many, args=(server.url(""), fetching, out)) for out in outputs]
    for one in them:
        one.start()
    for one in them:
        one.join(60)
    assert {Path(out).read_bytes() for out in outputs} == {b"".join(CONTENT[n % 3 :] for n in range(6))}
    assert fetches(server) == 3


def test_a_folder_that_cannot_be_written_is_told_once(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert content(server.url(), Fetching(cache=str(tmp_path / "file"))) is None
    assert caplog.text.count("shards are read without it") == 1
    with pytest.raises(UserError, match=r"needs data\.remote_cache=FOLDER"):
        load_config(None, ["data.train=x", "data.remote_cache_bytes=1000"])


def test_reading_ahead_is_bounded_and_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlcl.data.web.WebFile.chunk", 1000)
    file = RemoteFile(server.url())
    with ReadAhead(file, 5000) as stream:
        assert stream.read(10) == CONTENT[:10]
        end = time.monotonic() + 5
        while file.tell() < 6000 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        assert 5000 <= file.tell() <= 6000  # what was taken, and 5000 bytes
        assert stream.read(20_000) + stream.read() == CONTENT[10:]
        assert stream.read(1) == b""
    with ReadAhead(RemoteFile(server.url()), 5000) as stream:  # left early
        stream.read(10)
    server.wrong = ["breaks off", *["404"]]
    with ReadAhead(RemoteFile(server.url()), 5000) as stream:
        assert stream.read(LENGTH // 2) == CONTENT[: LENGTH // 2]  # what came before
        with pytest.raises(OSError, match="404"):
            stream.read(1)
    end = time.monotonic() + 5
    while (left := [x for x in threading.enumerate() if x.name == "read ahead"]) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left


def test_a_copy_says_what_it_is(server: Server, fetching: Fetching) -> None:
    content(server.url("/file?a=b"), fetching)
    [about] = Path(fetching.cache or "").glob("*.json")
    kept = json.loads(about.read_text())
    assert kept["bytes"] == LENGTH
    assert kept["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert kept["url"] == server.url("/file?...")
