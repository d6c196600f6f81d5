"""Manifest: row offsets, patterns, and the refusal of shards that are not those that were indexed.

.venv/bin/python -m pytest tests/test_manifest.py
"""

import io
import json
import os
import re
import shutil
import tarfile
from typing import Any

import pytest

from vlcl.data.manifest import (
    Manifest,
    Shard,
    expand_shards,
    manifest_path,
    open_source,
    read_manifest,
    shard_name,
    split_sources,
    write_manifest,
)
from vlcl.data.shard import scan_shard
from vlcl.errors import UserError


def make_shard(path, count, image=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            for suffix, content in (("jpg", bytes(image)), ("txt", b"caption")):
                info = tarfile.TarInfo(f"{path.stem}{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path):
    """Three shards of 3, 1 and 4 samples, indexed."""
    paths = [make_shard(tmp_path / "set" / f"{i:04d}.tar", count) for i, count in enumerate((3, 1, 4))]
    make_manifest(paths, tmp_path / "set" / "manifest.json")
    return tmp_path / "set"


def make_manifest(paths, target):
    shards = []
    for path in map(str, paths):
        scan = scan_shard(path)
        name = shard_name(path, str(target))
        shards.append(Shard(name, scan.samples, scan.bytes, scan.mtime_ns, scan.checksum))
    write_manifest(str(target), Manifest(tuple(shards)))


def test_offsets_and_count(folder):
    manifest = read_manifest(str(folder / "manifest.json"))
    assert manifest.offsets == (0, 3, 4)
    assert manifest.num_samples == 8
    assert [shard.name for shard in manifest.shards] == ["0000.tar", "0001.tar", "0002.tar"]
    assert Manifest(()).offsets == ()


def test_file_is_json_with_a_shard_a_line(folder):
    text = (folder / "manifest.json").read_text()
    assert json.loads(text)["version"] == 1
    assert len([line for line in text.splitlines() if '"name"' in line]) == 3
    assert [path.name for path in folder.iterdir() if "tmp" in path.name] == []


def test_digest_depends_on_what_rows_depend_on(folder):
    manifest = read_manifest(str(folder / "manifest.json"))
    first, *rest = manifest.shards
    touched = Shard(first.name, first.samples, first.bytes, 1, first.checksum)
    assert Manifest((touched, *rest)).digest == manifest.digest
    for other in (
        Shard("x.tar", first.samples, first.bytes, 1, first.checksum),
        Shard(first.name, first.samples + 1, first.bytes, 1, first.checksum),
        Shard(first.name, first.samples, first.bytes, 1, "x"),
    ):
        assert Manifest((other, *rest)).digest != manifest.digest
    assert Manifest((*rest, first)).digest != manifest.digest


def test_failed_write_keeps_the_old_manifest(folder):
    before = (folder / "manifest.json").read_text()
    with pytest.raises(UserError, match="--output PATH"):
        write_manifest(str(folder / "no" / "manifest.json"), Manifest(()))
    unwritable: Any = object()
    with pytest.raises(TypeError):
        write_manifest(str(folder / "manifest.json"), Manifest((Shard("a", 1, 1, 1, unwritable),)))
    assert (folder / "manifest.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: None, "not indexed yet"),
        (lambda text: text[:50], "cannot be read"),
        (lambda text: "[]", "no vlcl manifest"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "format version 2, this vlcl reads 1"),
        (lambda text: text.replace('"samples": 3, "bytes"', '"bytes"'), "bad shard entry"),
        (lambda text: text.replace('"samples": 3, "bytes"', '"samples": "3", "bytes"'), "bad shard entry"),
        (lambda text: text.replace('"samples": 3, "bytes"', '"samples": 5, "bytes"'), "digest does not fit"),
    ],
)
def test_bad_manifests_say_what_to_type(folder, change, says):
    path = folder / "manifest.json"
    text = change(path.read_text())
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=says) as raised:
        open_source(str(folder))
    assert f"vlcl data index {folder}" in str(raised.value)
    assert str(path) in str(raised.value)


def test_patterns(folder, monkeypatch):
    everything = [str(folder / f"{i:04d}.tar") for i in range(3)]
    assert expand_shards(str(folder)) == everything
    assert expand_shards(f"{folder}/*.tar") == everything
    assert expand_shards(f"{folder}/{{0000..0002}}.tar") == everything
    assert expand_shards(f"{folder}/{{0002,0000}}.tar") == [everything[2], everything[0]]
    assert expand_shards([f"{folder}/0001.tar", f"{folder}/0000.tar"]) == [everything[1], everything[0]]
    assert expand_shards(f"file:{everything[0]}") == everything[:1]
    assert expand_shards("pipe:cat {0..1}.tar", "run") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]
    assert expand_shards("s3://bucket/{00..10}.tar")[-1] == "s3://bucket/10.tar"
    monkeypatch.chdir(folder)
    assert expand_shards(".") == ["./0000.tar", "./0001.tar", "./0002.tar"]
    monkeypatch.setenv("HOME", str(folder.parent))
    assert expand_shards("~/set") == everything


def test_braces_over_folders_and_odd_names(tmp_path):
    a = make_shard(tmp_path / "a" / "0.tar", 1)
    b = make_shard(tmp_path / "b" / "0.tar", 1)
    odd = make_shard(tmp_path / "odd[1]{x" / "0.tar", 1)
    assert expand_shards(f"{tmp_path}/{{b,a}}") == [str(b), str(a)]
    assert expand_shards(str(tmp_path / "odd[1]{x")) == [str(odd)]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{}/nothing*.tar", "set has 0000.tar, 0001.tar, 0002.tar, manifest.json"),
        ("{}/none", "has 0000.tar"),
        ("{}/none/deep/a.tar", "there is no folder"),
        ("{}/{{0001..0012}}.tar", "10 of the 12 shards .* do not exist"),
        ("{}/{{0001..0012}}.tar", "and 5 more"),
        ("{}/{{0001..", "unbalanced braces"),
        (["{}", "{}/0001.tar"], "named twice"),
        (["{}/0001.tar", "file:{}/0001.tar"], "named twice"),
        ([], "no shards"),
    ],
)
def test_patterns_without_a_match_name_the_way_out(folder, pattern, says):
    filled = [p.format(folder) for p in pattern] if isinstance(pattern, list) else pattern.format(folder)
    with pytest.raises(UserError, match=says):
        expand_shards(filled)


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is empty"):
        expand_shards(str(tmp_path))


def test_sources_are_split_at_double_colons():
    assert split_sources("a/{0..1}.tar::b") == ["a/{0..1}.tar", "b"]
    assert split_sources("s3://a") == ["s3://a"]
    assert split_sources(["a", "b"]) == [["a", "b"]]
    with pytest.raises(UserError, match="empty source"):
        split_sources("a::")


def test_manifest_lies_in_the_common_folder(folder):
    assert manifest_path(expand_shards(str(folder))) == str(folder / "manifest.json")
    assert manifest_path([f"{folder}/a/0.tar", f"{folder}/b/0.tar"]) == str(folder / "manifest.json")
    assert manifest_path(["s3://bucket/a/0.tar", "s3://bucket/b/0.tar"]) == "s3://bucket/manifest.json"
    assert manifest_path(["https://me:x@host/a/0.tar?sig=1"]) == "https://me:x@host/a/manifest.json"
    for urls in (["pipe:cat s3://bucket/a/0.tar"], ["s3://one/0.tar", "s3://two/0.tar"], ["s3://one/0.tar", "/0.tar"]):
        with pytest.raises(UserError, match=r"data\.manifest"):
            manifest_path(urls)


def test_open_source_reads_a_part_in_the_order_given(folder):
    source = open_source(f"{folder}/{{0002,0000}}.tar")
    assert source.urls == (f"{folder}/0002.tar", f"{folder}/0000.tar")
    assert source.manifest.offsets == (0, 4)
    assert source.manifest.num_samples == 7


def test_moved_and_copied_shards_are_the_same(folder, tmp_path):
    digest = open_source(str(folder)).manifest.digest
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)  # new modification times
    assert open_source(str(tmp_path / "copy")).manifest.digest == digest
    os.rename(folder, tmp_path / "moved")
    assert open_source(str(tmp_path / "moved")).manifest.digest == digest


def test_manifest_elsewhere(folder, tmp_path):
    target = tmp_path / "m.json"
    make_manifest([folder / "0001.tar"], target)
    assert open_source(f"{folder}/0001.tar", str(target)).manifest.num_samples == 1


def test_remote_shards_take_their_manifest_from_the_user(folder, tmp_path):
    urls = [f"pipe:cat {folder}/{i:04d}.tar" for i in range(2)]
    make_manifest(urls, tmp_path / "m.json")
    source = open_source(f"pipe:cat {folder}/{{0000..0001}}.tar", str(tmp_path / "m.json"), "run")
    assert source.urls == tuple(urls)
    assert source.manifest.num_samples == 4


def test_changed_shards_are_refused_all_at_once(folder):
    make_shard(folder / "0003.tar", 2)
    make_shard(folder / "0001.tar", 9)  # another size
    entries = read_manifest(str(folder / "manifest.json")).shards
    make_shard(folder / "0002.tar", 4, image=101)  # another member size in a file of the same size
    assert os.path.getsize(folder / "0002.tar") == entries[2].bytes
    os.utime(folder / "0002.tar", ns=(1, 1))
    with pytest.raises(UserError) as raised:
        open_source(str(folder))
    message = str(raised.value)
    assert "3 problems with the manifest" in message
    assert "0003.tar is not in the manifest" in message
    assert re.search(r"0001\.tar has changed: [\d,]+ bytes, the manifest says", message)
    assert "0002.tar has changed: other samples" in message
    assert "0000.tar" not in message
    assert message.endswith(f"vlcl data index {folder}")


def test_other_shards_manifest_and_long_lists(folder, tmp_path):
    for i in range(8):
        make_shard(tmp_path / "other" / f"{i:04d}.tar", 1)
    with pytest.raises(UserError, match=r"8 problems with the manifest .*, which has 3 shards:") as raised:
        open_source(str(tmp_path / "other"), str(folder / "manifest.json"))
    assert str(raised.value).count("is not in the manifest") == 5
    assert "and 3 more" in str(raised.value)


def test_damaged_shard_of_the_same_size_is_refused(folder):
    path = folder / "0001.tar"
    path.write_bytes(b"<html>".ljust(path.stat().st_size, b"x"))
    with pytest.raises(UserError, match=r"0001\.tar: an HTML or XML page"):
        open_source(str(folder))
