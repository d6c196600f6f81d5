"""`vlcl data index`: right counts in parallel, all broken shards in one message, an old manifest never lost.

.venv/bin/python -m pytest tests/test_index.py
"""

import io
import json
import logging
import os
import subprocess
import sys
import tarfile

import pytest

from vlcl.data.manifest import expand_shards, open_source, read_manifest
from vlcl.errors import UserError
from vlcl_data_prep.index import index_shards, map_shards


def make_shard(path, count):
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            for suffix, content in (("jpg", b"x" * 2000), ("json", b"{}"), ("txt", b"caption")):
                info = tarfile.TarInfo(f"{path.stem}{i:04d}.{suffix}")
                info.size, info.mtime = len(content), 0.5
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        make_shard(tmp_path / f"{i:05d}.tar", i + 1)
    return tmp_path


def vlcl(*args):
    script = "from vlcl.cli import main; main()"
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True)


@pytest.mark.parametrize("workers", [1, 2, None])
def test_counts_every_sample_and_writes_beside_the_shards(folder, workers):
    manifest = index_shards(str(folder), workers=workers, progress=False)
    assert [shard.samples for shard in manifest.shards] == [1, 2, 3, 4, 5, 6]
    assert manifest.offsets == (0, 1, 3, 6, 10, 15)
    assert read_manifest(str(folder / "manifest.json")) == manifest
    assert open_source(str(folder)).manifest == manifest


def test_shards_are_not_touched(folder):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.tar")}
    index_shards(str(folder), workers=1)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.tar")} == before
    assert {path.name for path in folder.iterdir()} == {path.name for path in before} | {"manifest.json"}


def test_broken_shards_are_all_named_and_nothing_is_written(folder):
    index_shards(str(folder), workers=1)
    before = (folder / "manifest.json").read_text()
    whole = (folder / "00004.tar").read_bytes()
    (folder / "00004.tar").write_bytes(whole[:5000])
    (folder / "00001.tar").write_text("<!DOCTYPE html><title>404</title>")
    (folder / "00002.tar").write_bytes(b"")
    with pytest.raises(UserError) as raised:
        index_shards(str(folder), workers=2, progress=False)
    message = str(raised.value)
    assert "3 of 6 shards are broken, so no manifest was written" in message
    assert "00001.tar: an HTML or XML page" in message
    assert "00002.tar: empty file" in message
    assert "00004.tar: truncated" in message
    assert f"Download them again or move them away, then: vlcl data index {folder}" in message
    assert (folder / "manifest.json").read_text() == before


def test_img2dataset_stats_are_compared(folder, caplog):
    for i in range(6):
        (folder / f"{i:05d}_stats.json").write_text(json.dumps({"successes": i + 1, "count": 10}))
    (folder / "00003_stats.json").write_text(json.dumps({"successes": 9}))
    (folder / "00005_stats.json").write_text("not json")
    with caplog.at_level(logging.WARNING):
        index_shards(str(folder), workers=1)
    (warning,) = caplog.messages
    assert "00003.tar has 4 samples" in warning
    assert "00003_stats.json says 9 successes" in warning


def test_shards_without_samples(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("README"))
    with pytest.raises(UserError, match=r"no samples in 1 shards .* KEY\.SUFFIX"):
        index_shards(str(tmp_path))
    assert not (tmp_path / "manifest.json").exists()


def test_place_that_cannot_be_written_is_an_error_before_the_work(folder):
    with pytest.raises(UserError, match="give --output PATH"):
        index_shards(str(folder), output=str(folder / "none" / "m.json"))
    with pytest.raises(UserError, match=r"data\.manifest=PATH"):
        index_shards("pipe:cat x.tar")


def test_remote_shards(folder):
    manifest = index_shards(f"pipe:cat {folder}/{{00000..00002}}.tar", output=str(folder / "remote.json"), workers=1)
    assert manifest.num_samples == 6
    assert [shard.bytes for shard in manifest.shards] == [None] * 3
    assert (
        open_source(f"pipe:cat {folder}/{{00000..00002}}.tar", str(folder / "remote.json"), "run").manifest == manifest
    )


def test_command(folder):
    done = vlcl("data", "index", folder)
    assert done.returncode == 0, done.stderr
    assert "6 shards, N = 21 samples (3.5 a shard)" in done.stdout
    assert f"manifest: {folder}/manifest.json" in done.stdout
    done = vlcl("data", "index", *sorted(folder.glob("0000[01].tar")), "--output", folder / "part.json", "--workers", 1)
    assert "2 shards, N = 3 samples" in done.stdout
    assert read_manifest(str(folder / "part.json")).num_samples == 3


def test_command_gives_each_source_its_manifest(folder):
    (folder / "b").mkdir()
    make_shard(folder / "b" / "0.tar", 2)
    done = vlcl("data", "index", f"{folder}::{folder}/b")
    assert done.returncode == 0, done.stderr
    assert read_manifest(str(folder / "b" / "manifest.json")).num_samples == 2
    assert read_manifest(str(folder / "manifest.json")).num_samples == 21
    done = vlcl("data", "index", f"{folder}::{folder}/b", "--output", folder / "m.json")
    assert done.returncode == 2
    assert "index them one by one" in done.stderr


def test_command_prints_mistakes_without_traceback(folder):
    done = vlcl("data", "index", folder / "none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no shards")
    assert "Traceback" not in done.stderr


def test_map_keeps_the_order_and_prints_lines_off_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("vlcl_data_prep.index.SECONDS_A_LINE", -1)
    names = [str(i) for i in range(50)]
    assert list(map_shards(os.path.abspath, names, 2, "work")) == [os.path.abspath(name) for name in names]
    assert "work: 50 of 50 shards" in capsys.readouterr().err
    assert list(map_shards(len, names, 1, None)) == [len(name) for name in names]
    assert capsys.readouterr().err == ""


def write_names(folder, names):
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    return str(folder)


def test_names_that_may_mean_other_samples_are_warned_of(tmp_path, caplog):
    index_shards(write_names(tmp_path / "dots", ["cup.v1.jpg", "cup.v1.txt", "cup.v2.jpg", "cup.v2.txt"]), workers=1)
    assert "X.v1.jpg is the file v1.jpg of the sample X" in caplog.text
    caplog.clear()
    index_shards(write_names(tmp_path / "apart", ["a.jpg", "b.jpg", "c.jpg", "a.txt", "b.txt", "c.txt"]), workers=1)
    assert "no sample has both a picture and a text: 3 pictures and 3 texts make 6 samples" in caplog.text
    caplog.clear()
    usual = ["0.jpg", "0.txt", "0.json", "0.seg.png", "1.jpg", "1.txt", "1.json", "1.seg.png"]
    index_shards(write_names(tmp_path / "usual", usual), workers=1)
    assert "samples" not in caplog.text


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"])
def test_a_folder_of_compressed_shards(tmp_path, suffix):
    make_shard(tmp_path / "plain.tar", 3)
    kind = {".tgz": "gz"}.get(suffix, suffix.rpartition(".")[2])
    compressed = tarfile.open(str(tmp_path / f"0{suffix}"), f"w:{kind}")  # pyright: ignore[reportCallIssue, reportArgumentType] # noqa: SIM115
    with tarfile.open(tmp_path / "plain.tar") as plain, compressed as out:
        for member in plain:
            out.addfile(member, plain.extractfile(member))
    assert expand_shards(str(tmp_path)) == [str(tmp_path / "plain.tar")]  # the same shards twice, mostly
    (tmp_path / "plain.tar").unlink()
    assert index_shards(str(tmp_path), workers=1).num_samples == 3
