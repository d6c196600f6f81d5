"""Shards in object stores: fsspec's memory, and an S3 server of moto's. Nothing may be worse than on the disk."""

from __future__ import annotations

import gzip
import importlib.util
import json
import socket
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from shards import make_shards, tiny_model
from test_remote import Server, server
from torchvision.transforms.functional import to_tensor
from typer.testing import CliRunner

from vlcl.cli import app
from vlcl.config import load_config
from vlcl.data import remote, urls
from vlcl.data.manifest import expand_shards, open_source, read_manifest
from vlcl.data.reader import read_run
from vlcl.data.remote import Fetching, RemoteFile
from vlcl.data.shard import ShardError, read_samples, scan_keys, scan_shard
from vlcl.errors import UserError
from vlcl.train import train
from vlcl_eval.clip_benchmark.retrieval import SampleStream, find_shards

__all__ = ["server"]
AWS = {
    "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "SECRET", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Any]:
    """The store, with the shards of tmp_path/shards in bucket/cc3m."""
    store = fsspec.filesystem("memory")
    make_shards(tmp_path / "shards", (6, 4))
    store.put(f"{tmp_path}/shards/", "/bucket/cc3m", recursive=True)
    yield store
    store.rm("/bucket", recursive=True)


def vlcl(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert isinstance(result.exception, UserError | SystemExit | None), repr(result.exception)
    return result.exit_code, f"{result.output} {result.exception}"


def test_what_a_pattern_names_in_a_store(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [f"memory://bucket/cc3m/{number:05d}.tar" for number in range(2)]
    for pattern in ("", "/", "/*.tar", "/{00000..00001}.tar", "/0000[01].tar", "/{00000,00001}.t?r"):
        assert expand_shards(f"memory://bucket/cc3m{pattern}") == both, pattern
    assert expand_shards("MEMORY://bucket/cc3m/00001.tar") == ["MEMORY://bucket/cc3m/00001.tar"]
    memory.pipe_file("/bucket/packed/a.tar.gz", b"x")
    memory.pipe_file("/bucket/packed/pipe:touch PWNED.tar.gz", b"x")  # a name, whatever it is
    names = ["memory://bucket/packed/a.tar.gz", "memory://bucket/packed/pipe:touch PWNED.tar.gz"]
    assert expand_shards("memory://bucket/packed") == names
    lies = ("/bucket/in/a.tar", "/other/b.tar", "/bucket/in/../c.tar")
    listing = [{"name": name, "type": "file", "size": 1} for name in lies]
    monkeypatch.setattr(memory.__class__, "ls", lambda *_, **__: listing)
    assert expand_shards("memory://bucket/in") == ["memory://bucket/in/a.tar"]  # whatever the server says
    monkeypatch.undo()
    for pattern in ("memory://bucket/cc3m/x*.tar", "memory://bucket/nothing"):
        with pytest.raises(UserError, match="no shards match 'memory://bucket/"):
            expand_shards(pattern)


def test_a_manifest_beside_the_shards_is_found_and_stays_where_it_is(memory: Any, tmp_path: Path) -> None:
    here = open_source(str(tmp_path / "shards"))
    assert open_source("memory://bucket/cc3m").manifest == here.manifest  # written on the disk, and copied with them
    memory.rm_file("/bucket/cc3m/manifest.json")
    with pytest.raises(UserError, match=r"no manifest memory://bucket/cc3m/manifest.json.*--output PATH"):
        open_source("memory://bucket/cc3m")
    code, said = vlcl("data", "index", "memory://bucket/cc3m", "--workers", 1)
    assert (code, "--output memory://bucket/cc3m/manifest.json" in said) == (2, True), said
    for output in ("memory://bucket/cc3m/manifest.json", str(tmp_path / "m.json")):
        assert vlcl("data", "index", "memory://bucket/cc3m", "-o", output, "--workers", 1)[0] == 0
    beside, apart = (
        open_source("memory://bucket/cc3m/{00000..00001}.tar", manifest)
        for manifest in (None, str(tmp_path / "m.json"))
    )
    for found in (beside, apart):
        assert [(x.samples, x.checksum, x.bytes) for x in found.manifest.shards] == [
            (x.samples, x.checksum, x.bytes) for x in here.manifest.shards
        ]
    assert [shard.name for shard in beside.manifest.shards] == ["00000.tar", "00001.tar"]
    assert apart.manifest.shards[0].name == "memory://bucket/cc3m/00000.tar"
    memory.pipe_file("/bucket/cc3m/00001.tar", b"x")
    memory.rm_file("/bucket/cc3m/00000.tar")
    with pytest.raises(UserError, match=r"(?s)00000.tar is not there.*00001.tar has changed: 1 bytes"):
        open_source("memory://bucket/cc3m/{00000..00001}.tar")


def test_names_in_a_manifest_open_nothing(memory: Any, tmp_path: Path) -> None:
    """They are compared: a shard is opened because the pattern names it. What a run folder names is not fetched."""
    text = memory.cat_file("/bucket/cc3m/manifest.json").decode()
    memory.pipe_file("/bucket/cc3m/manifest.json", text.replace("00000.tar", "../../etc/x.tar").encode())
    with pytest.raises(UserError, match="edited by hand"):
        open_source("memory://bucket/cc3m")
    make_shards(tmp_path / "local", (4,))
    for path in ("memory://bucket/cc3m/manifest.json", "http://127.0.0.1:9/m.json"):
        with pytest.raises(UserError, match="neither fetched nor run"):
            open_source(str(tmp_path / "local"), path, "here")


def test_samples_are_those_of_the_disk(memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/packed.tar.gz", gzip.compress((tmp_path / "shards/00000.tar").read_bytes()))
    for name, url in (("00000", "cc3m/00000.tar"), ("00001", "cc3m/00001.tar"), ("00000", "packed.tar.gz")):
        path, there = str(tmp_path / f"shards/{name}.tar"), f"memory://bucket/{url}"
        for ahead in (0, 700, 1 << 20):
            assert list(read_samples(there, 1, fetching=Fetching(ahead))) == list(read_samples(path, 1)), (url, ahead)
        assert scan_shard(there).checksum == scan_shard(path).checksum
        assert list(scan_keys(there)) == list(scan_keys(path))
    assert vlcl("data", "verify", "memory://bucket/cc3m", "--workers", 1, "--output", tmp_path / "v.tsv")[0] == 0


def test_headers_are_read_without_the_pictures(memory: Any, tmp_path: Path) -> None:
    def large(index: int, files: dict[str, bytes]) -> None:
        files["png"] += bytes(100_000 + index)

    shard = make_shards(tmp_path / "large", (30,), large) / "00000.tar"
    memory.pipe_file("/bucket/large.tar", shard.read_bytes())
    here, there = scan_shard(str(shard)), scan_shard("memory://bucket/large.tar")
    assert (there.checksum, there.bytes) == (here.checksum, here.bytes)
    assert here.bytes is not None
    assert 0.02 < there.fetched / here.bytes < 0.1
    assert scan_shard("memory://bucket/large.tar", window=1 << 20).fetched > 0.9 * here.bytes
    memory.pipe_file("/bucket/large.tar", shard.read_bytes()[: here.bytes // 2])
    with pytest.raises(ShardError, match=r"png should end at byte [\d,]+, the file ends at"):
        scan_shard("memory://bucket/large.tar")


def test_unusual_headers_are_left_to_tarfile_from_afar_too(memory: Any, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "gnu.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(3):
            for suffix in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{'long/' * 40}{number}.{suffix}")
                info.size = 20_000
                tar.addfile(info, (tmp_path / "shards/00000.tar").open("rb"))
    memory.put_file(str(tmp_path / "gnu.tar"), "/bucket/gnu.tar")
    assert scan_shard("memory://bucket/gnu.tar").checksum == scan_shard(str(tmp_path / "gnu.tar")).checksum


@pytest.mark.parametrize("scheme", ["gs", "gcs", "az", "abfs", "abfss", "s3a"])
def test_stores_of_other_names_are_read_through_their_filesystem(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """fsspec's memory under the names of others: what vlcl asks of gcsfs and adlfs, without their servers."""

    class Store(MemoryFileSystem):
        protocol = scheme

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.replace(f"{scheme}://", "memory://"))

    monkeypatch.setitem(urls.STORES, scheme, ("fsspec", "x"))
    monkeypatch.setitem(_registry, scheme, Store)
    url = f"{scheme}://bucket/cc3m"
    assert expand_shards(f"{url}/*.tar") == [f"{url}/0000{number}.tar" for number in range(2)]
    assert vlcl("data", "index", url, "-o", f"{url}/manifest.json", "--workers", 1)[0] == 0
    here, there = open_source(str(tmp_path / "shards")).manifest, open_source(url).manifest
    assert [shard.checksum for shard in there.shards] == [shard.checksum for shard in here.shards]
    path = str(tmp_path / "shards/00000.tar")
    assert list(read_samples(f"{url}/00000.tar", 1)) == list(read_samples(path, 1))
    kept = Fetching(cache=str(tmp_path / "cache"), cache_bytes=10**8)
    assert list(read_samples(f"{url}/00000.tar", fetching=kept)) == list(read_samples(path))
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 1


def test_evaluation_reads_the_same_way(memory: Any, tmp_path: Path) -> None:
    found = {}
    for place in ("memory://bucket/cc3m", str(tmp_path / "shards")):
        stream = SampleStream(find_shards(place, "test"), to_tensor, rank=0, world_size=1)
        found[place] = [(x.row, x.captions, x.digest) for x in stream if not isinstance(x, str)]
    first, second = found.values()
    assert len(first) == 10
    assert first == second


# Servers that fail, and others' servers


@pytest.fixture
def broken(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that fails, with a shard at s3://bucket/00000.tar, and its copy in tmp_path."""
    if importlib.util.find_spec("s3fs") is None:
        pytest.skip("s3fs is not installed: pip install s3fs")
    for name, value in {**AWS, "AWS_ENDPOINT_URL": server.url("")}.items():
        monkeypatch.setenv(name, value)
    server.files["/bucket/00000.tar"] = (make_shards(tmp_path, (40,)) / "00000.tar").read_bytes()
    monkeypatch.setattr("vlcl.data.stores.StoreFile.chunk", 9000)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield server
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("wrong", ["stalls", "resets", "breaks off", "503"])
def test_s3_is_asked_again_from_the_byte(broken: Server, tmp_path: Path, wrong: str) -> None:
    path, url = str(tmp_path / "00000.tar"), "s3://bucket/00000.tar"
    broken.wrong = [wrong, "", wrong, wrong, "", wrong]
    assert list(read_samples(url)) == list(read_samples(path))
    starts = [headers["Range"] for _, headers in broken.asked if "Range" in headers]
    assert starts[0] == "bytes=0-8999"
    broken.wrong = ["", wrong, wrong, "", wrong]
    assert scan_shard(url).checksum == scan_shard(path).checksum


@pytest.mark.parametrize(("wrong", "said"), [("503", r"\(6 tries\)"), ("silent", r"\(6 tries\)"), ("403", "denied")])
def test_an_s3_that_stays_bad_is_told_in_bounded_time(broken: Server, wrong: str, said: str) -> None:
    broken.wrong = [wrong] * 40
    began = time.monotonic()
    with pytest.raises(ShardError, match=said):
        scan_shard("s3://bucket/00000.tar")
    assert time.monotonic() - began < 20  # the library's own tries are not multiplied by ours
    assert len(broken.asked) <= 12


def test_hf_is_read_from_a_hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What huggingface_hub asks for, answered as the hub does."""
    data = (make_shards(tmp_path, (8,)) / "00000.tar").read_bytes()
    folder, entry = {"type": "directory", "oid": "d", "size": 0}, {"type": "file", "oid": "v1", "size": len(data)}
    api = {
        "": {"id": "me/set", "sha": "f" * 40, "siblings": [], "private": False, "downloads": 0, "likes": 0, "tags": []},
        "/tree/main": [folder | {"path": "cc3m"}],
        "/tree/main/cc3m": [entry | {"path": "cc3m/00000.tar"}],
    }
    server.files |= {f"/api/datasets/me/set{path}": json.dumps(content).encode() for path, content in api.items()}
    server.files["/datasets/me/set/resolve/main/cc3m/00000.tar"] = data
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url("")})
    [url] = expand_shards("hf://datasets/me/set/cc3m")
    assert url == "hf://datasets/me/set/cc3m/00000.tar"
    assert list(read_samples(url)) == list(read_samples(str(tmp_path / "00000.tar")))
    assert scan_shard(url).checksum == scan_shard(str(tmp_path / "00000.tar")).checksum
    with pytest.raises(ShardError, match="it is not there"):
        scan_shard("hf://datasets/me/set/cc3m/00001.tar")


# An S3 server, of another package


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """boto3's client of a server that is alone on this machine."""
    for package in ("s3fs", "moto", "flask", "boto3"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install s3fs 'moto[s3]' flask flask-cors")
    import boto3
    from moto.server import ThreadedMotoServer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**AWS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield boto3.client("s3")
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def bucket(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with two shards, without a manifest; those of tmp_path/shards."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    s3.create_bucket(Bucket=(name := tmp_path.name.replace("_", "-")[:50].strip("-")))
    for path in sorted(make_shards(tmp_path / "shards", (12, 10)).glob("*.tar")):
        s3.upload_file(str(path), name, f"cc3m/{path.name}")
    return f"s3://{name}/cc3m"


def test_index_verify_and_training_from_s3(bucket: str, tmp_path: Path) -> None:
    """In processes and workers, which are forked from one that has asked the store already."""
    assert expand_shards(f"{bucket}/*.tar") == [f"{bucket}/0000{n}.tar" for n in range(2)]
    code, said = vlcl("data", "index", bucket, "--output", f"{bucket}/manifest.json", "--workers", 2)
    assert (code, "bytes fetched" in said) == (0, True), said
    here = read_manifest(str(tmp_path / "shards/manifest.json"))
    there = open_source(bucket).manifest
    assert [(x.name, x.samples, x.bytes, x.checksum) for x in there.shards] == [
        (x.name, x.samples, x.bytes, x.checksum) for x in here.shards
    ]
    assert vlcl("data", "verify", bucket, "--workers", 2, "--output", tmp_path / "v.tsv")[0] == 0
    losses = {}
    for name, more in {
        "here": [f"data.train={tmp_path / 'shards'}"],
        "there": [f"data.train={bucket}", "data.workers=1"],
        "kept": [f"data.train={bucket}", f"data.remote_cache={tmp_path / 'cache'}"],
    }.items():
        train(load_config(None, [
            f"model.name={tiny_model(tmp_path / 'model')}", f"train.output={tmp_path / name}", "train.steps=4",
            "train.batch_size=10", "train.log_every=1", "data.workers=0", "data.streams=1", "train.precision=fp32",
            "log.trackers=[]", "eval.examples=0", *more,
        ]))  # fmt: skip
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line).get("train/loss") for line in lines]
    assert losses["here"] == losses["there"] == losses["kept"]
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 2


def test_another_object_in_its_place_is_not_joined_to_the_first(
    bucket: str, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlcl.data.stores.StoreFile.chunk", 2000)
    name, data = bucket.removeprefix("s3://").partition("/")[0], (tmp_path / "shards/00000.tar").read_bytes()
    with RemoteFile(f"{bucket}/00000.tar") as file:
        assert file.read(3000) == data[:3000]
        s3.put_object(Bucket=name, Key="cc3m/00000.tar", Body=data[::-1])
        with pytest.raises(OSError, match="it is another file than it was at first"):
            file.read(5000)


def test_what_a_store_refuses_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShardError, match=r"x\.tar: cannot be opened: it is not there .*after 0"):
        scan_shard(f"{bucket}/x.tar")
    with pytest.raises(UserError, match="no shards match"):
        expand_shards("s3://no-such-bucket-here/cc3m")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with socket.socket() as free:  # nobody listens
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setattr(remote, "TRIES", 2)
        found = [sample for _, sample in read_run(f"{bucket}/00000.tar", 0, 3)]
        assert [str(sample) for sample in found] == ["unreadable shard"] * 3
        with pytest.raises(ShardError, match=r"Could not connect.*\(2 tries\)"):
            scan_shard(f"{bucket}/00000.tar")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
