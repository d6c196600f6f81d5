"""What tests/test_fuzz.py and tests/test_fuzz_folders.py have found, each as a test of its own."""

from __future__ import annotations

import gzip
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from eval_data import write_model
from fuzz import bounded_memory
from shards import add, make_shards, picture
from test_fuzz import PLAIN, checked, tar_of

from vlcl.checkpoint import load_model
from vlcl.config import load_config
from vlcl.data.manifest import Manifest, Shard, open_source, read_manifest
from vlcl.data.shard import ShardError, read_samples, scan_keys, scan_shard
from vlcl.errors import UserError
from vlcl.logs import parse_metrics
from vlcl_eval.datasets.folders import open_class_folders, read_wds, wds_shards
from vlcl_eval.datasets.images import ImageRef
from vlcl_eval.datasets.native import _coco, check_containers
from vlcl_eval.datasets.registry import registered

DEEP = "[" * 100_000


def digest(shards: list[dict[str, Any]]) -> str:
    return Manifest(tuple(Shard(**shard) for shard in shards)).digest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bytes", "many"),
        ("bytes", 1.5),
        ("mtime_ns", []),
        ("samples", 10**30),
        ("name", "\ud800"),
        ("checksum", "\ud800"),
    ],
)
def test_a_manifest_with_a_value_that_is_none(tmp_path: Path, key: str, value: Any) -> None:
    folder = make_shards(tmp_path, (2,))
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][0][key] = value
    if value != "\ud800":
        content["digest"] = digest(content["shards"])
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="bad shard entry"):
        open_source(str(folder))


def test_what_is_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(DEEP)
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(str(path))
    with pytest.raises(UserError, match="nested too deeply"):
        load_config(path)
    with pytest.raises(UserError, match=r"data.train: .* is not YAML: it is nested too deeply"):
        load_config(None, [f"data.train={DEEP[:5000]}"])
    with pytest.raises(UserError, match="is not JSON"):
        _coco(path)
    assert parse_metrics([DEEP, '{"step": ' + "9" * 5000 + "}", '{"step": -1}', '{"step": 1}']) == [{"step": 1}]


# 2^30 numbers, for who writes them out.
BOMB = (
    "x: [&b0 [1, 1]"
    + "".join(f", &b{i + 1} [*b{i}, *b{i}]" for i in range(30))
    + "]\ndata: {train: x, workers: *b30}\n"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("? [data]\n: 1\n", "a key must be a word"),
        ("data: {train: x, workers: !!int x}\n", "a value cannot be read: invalid literal"),
        ("data: {train: !!timestamp x}\n", "a value cannot be read"),
        ('data: {train: x, "\\ud800": 1}\n', r"data: got .*allowed: a section"),
        ("data: {train: &a [*a]}\n", "unconstructable recursive node"),
        (BOMB, "data.workers: got .*allowed: a whole number"),
    ],
)  # fmt: skip
def test_yaml_that_no_setting_is(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_config(tmp_path / "config.yaml")


HUGE = b"\x80" + b"\0" * 3 + b"\x10" + b"\0" * 7  # 2^60 bytes, as GNU tar writes it


def test_a_stream_whose_member_has_no_end(tmp_path: Path) -> None:
    """tarfile would seek for 3 million years."""
    data = tar_of(0, PLAIN)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(checked(data[:124] + HUGE + data[136:512]) + data[512:]))
    began = time.monotonic()
    with pytest.raises(ShardError, match="ends in the middle of a member"):
        scan_shard(str(path))
    assert time.monotonic() - began < 5


def test_a_pax_header_whose_length_lies(tmp_path: Path) -> None:
    """The rows of a shard are the same by its headers and as a stream."""
    name = "n" * 120
    data = tar_of(tarfile.PAX_FORMAT, [name])
    (tmp_path / "whole.tar").write_bytes(data)
    (tmp_path / "a.tar").write_bytes(checked(data[:124] + b"1".ljust(12, b"\0") + data[136:512]) + data[512:])
    keys = list(scan_keys(str(tmp_path / "a.tar")))
    assert keys == list(scan_keys(str(tmp_path / "whole.tar")))
    assert keys == [(0, name, suffix) for suffix in ("png", "txt", "json")]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert keys == list(scan_keys(str(tmp_path / "a.tar.gz")))


def test_a_number_of_shards_without_end(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "nshards.txt").write_text(str(2**53))
    with pytest.raises(UserError, match=r"do not exist: 0\.tar, 1\.tar, 2\.tar"):
        wds_shards(tmp_path, "test")


@pytest.mark.parametrize("name", ["\ud800.zip", "a\0.zip", "x" * 3000 + ".zip"])
def test_an_index_with_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    for path in (ImageRef(str(tmp_path / name), "0.png"), ImageRef(str(tmp_path / name))):
        with pytest.raises(UserError, match=r"cannot be read|does not exist|do not exist"):
            check_containers([path], tmp_path / "test.json", tmp_path)


def test_names_that_are_not_utf8_are_names(tmp_path: Path) -> None:
    """Of samples in a wds shard, and of pictures in a folder a class."""
    folder = tmp_path / "wds"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        add(tar, "\udcff.png", picture(1))
        add(tar, "\udcff.cls", b"0")
    assert read_wds(folder, "test", 1, False).labels == [(0,)]
    (tmp_path / "test" / "a").mkdir(parents=True)
    try:
        (tmp_path / "test" / "a" / "\udcff.png").write_bytes(picture(1))
    except OSError:
        return  # a file system that has no such names
    assert open_class_folders(tmp_path, {"test": tmp_path / "test"}).test.labels == [(0,)]


def test_a_length_of_64_gib_takes_no_memory(tmp_path: Path) -> None:
    data = tar_of(0, PLAIN)
    path = tmp_path / "a.tar"
    path.write_bytes(checked(data[:124] + b"7" * 12 + data[136:512]) + data[512:])
    with bounded_memory(), pytest.raises(ShardError, match=r"ends in the middle of 0000\.png"):
        list(read_samples(str(path)))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("preprocess_cfg", "mode", "CMYK"), ("vision_cfg", "patch_size", 0)],
)
def test_a_model_that_open_clip_cannot_build(tmp_path: Path, section: str, key: str, value: Any) -> None:
    path = Path(write_model(tmp_path)) / "open_clip_config.json"
    content = json.loads(path.read_text())
    (content if section in content else content["model_cfg"])[section][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model\.name="):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_cfg", "layers", 1_001),
        ("vision_cfg", "layers", [2, 10**9, 2, 2]),
        ("text_cfg", "vocab_size", 10**12),
        ("vision_cfg", "width", float("inf")),
    ],
)
def test_a_model_without_end_is_not_built(tmp_path: Path, section: str, key: str, value: Any) -> None:
    path = Path(write_model(tmp_path)) / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"][section][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"model_cfg\.{section}\.{key}=.* is too large for a model; the limit is"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("key", ["labelmap", "root_folder", "index_path"])
@pytest.mark.parametrize("name", ["a\0.txt", "\ud800", "x" * 256, "x/" * 2000])
def test_a_registry_with_names_that_no_file_has(tmp_path: Path, key: str, name: str) -> None:
    test = {"index_path": "test.txt", "num_images": 1}
    entry = {"name": "mine", "type": "classification_multiclass", "num_classes": 2, "root_folder": "mine",
             "labelmap": "labels.txt", "test": test}  # fmt: skip
    (test if key in test else entry)[key] = name
    (tmp_path / "vision_datasets.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=rf"{key} is [\s\S]*; no file can have such a name"):
        registered(tmp_path)
