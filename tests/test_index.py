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
from vlcl_data_prep.engine import map_shards
from vlcl_data_prep.index import index_shards


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
    assert "broken: 3 of 6 shards, so no manifest was written" in message
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
    with pytest.raises(UserError, match=r"no samples in 1 shard of .* KEY\.SUFFIX"):
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
    monkeypatch.setattr("vlcl_data_prep.engine.SECONDS_A_LINE", -1)
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


def warnings_of(tmp_path, caplog, names):
    caplog.clear()
    index_shards(write_names(tmp_path, names), workers=1, progress=False)
    return caplog.messages


def test_a_sample_of_many_files_is_warned_of(tmp_path, caplog):
    frames = [f"clip.{n:03d}.jpeg" for n in range(40)]
    [text] = warnings_of(tmp_path / "frames", caplog, ["a.jpg", "a.txt", "b.jpg", "b.txt", *frames])
    assert "sample clip of" in text
    assert "has 40 files: all that is called clip.SOMETHING is one sample" in text


def test_files_of_a_key_that_are_apart_are_warned_of(tmp_path, caplog):
    names = ["a.jpg", "a.txt", "b.jpg", "b.txt", "a.json", "c.jpg", "c.txt"]
    [text] = warnings_of(tmp_path / "apart", caplog, names)
    assert "1 of 4 samples are called as an earlier one of their shard with others between them (a in " in text
    again = ["a.jpg", "a.txt", "a.jpg", "a.txt", "b.jpg", "b.txt"]  # beside each other: as webdataset's own error
    assert warnings_of(tmp_path / "again", caplog, again) == []


def test_most_samples_without_image_or_caption_are_warned_of(tmp_path, caplog):
    [text] = warnings_of(tmp_path / "gif", caplog, ["0.gif", "0.txt", "1.gif", "1.txt", "2.jpg", "2.txt"])
    assert "2 of 3 samples have no image (jpg;jpeg;png;webp). Files are: txt, gif, jpg." in text
    assert "data.image_key=SUFFIX" in text
    [text] = warnings_of(tmp_path / "cls", caplog, ["0.jpg", "0.cls", "1.jpg", "1.cls"])
    assert "2 of 2 samples have no caption (txt, json)" in text
    [text] = warnings_of(tmp_path / "json", caplog, ["0.jpg", "0.json", "1.jpg", "1.json"])
    assert "data.json_text_key=KEY" in text
    assert warnings_of(tmp_path / "half", caplog, ["0.jpg", "0.txt", "1.gif", "1.txt"]) == []


@pytest.mark.parametrize("kind", ["", "gz"])
def test_joined_archives_are_warned_of(tmp_path, caplog, kind):
    """`cat a.tar b.tar`: what is behind the first end is read by nothing."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", f"w:{kind}") as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
            for suffix in ("jpg", "txt"):
                tar.addfile(tarfile.TarInfo(f"{name}.{suffix}"))
    whole = (tmp_path / "a.tar").read_bytes()
    (shards / "0.tar").write_bytes(whole + (tmp_path / "b.tar").read_bytes())
    assert index_shards(str(shards), workers=1, progress=False).num_samples == 1
    [text] = caplog.messages
    assert "0.tar: there is more behind the end of the archive, and nothing reads it" in text
    caplog.clear()
    (shards / "0.tar").write_bytes(whole if kind else whole + bytes(1 << 20))
    index_shards(str(shards), workers=1, progress=False)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["cups:v2", "a[1]", "x{1,2}", "with space", "100%", "pipe:cat x", "~old"])
def test_folders_of_any_name(tmp_path, name, monkeypatch):
    """Given as they are, with a glob, with braces, relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    for number in range(2):
        make_shard(tmp_path / name / f"{number:05d}.tar", 2)
    assert index_shards(name, workers=1, progress=False).num_samples == 4
    patterns = [name, f"{name}/00000.tar", f"{name}/*.tar", f"{tmp_path}/{name}/0000?.tar"]
    if "{" not in name:
        patterns.append(f"{name}/{{00000..00001}}.tar")
    for pattern in patterns:
        found = expand_shards(pattern, "here")
        assert [os.path.basename(path) for path in found] == ["00000.tar", "00001.tar"][: len(found)], pattern
        assert len(found) == (1 if pattern.endswith("0.tar") else 2)
        assert len(open_source(pattern, reach="here").urls) == len(found)


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    """What a shell does not expand: data.train=~/shards."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "shards").mkdir()
    make_shard(tmp_path / "shards" / "0.tar", 2)
    index_shards("~/shards", workers=1, progress=False)
    os.rename(tmp_path / "shards" / "manifest.json", tmp_path / "m.json")
    index_shards("~/shards/{0..0}.tar", output=str(tmp_path / "shards" / "m.json"), workers=1, progress=False)
    for pattern in ("~/shards", "~/shards/*.tar", "~/shards/{0..0}.tar"):
        assert open_source(pattern, "~/shards/m.json").manifest.num_samples == 2


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
