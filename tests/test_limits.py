"""What a sample may ask for: bounded, counted by reason, the same in training, verify, pack, retrieval and ELEVATER."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shards import add, make_shards, picture

from vlcl.config.sections import DataConfig
from vlcl.data import decode
from vlcl.data.captions import captions_from
from vlcl.data.decode import (
    DEFAULT_LIMITS,
    BadSample,
    Keys,
    Limits,
    decode_image,
    image_bytes_from,
    parse_limits,
    wanted_files,
)
from vlcl.data.manifest import read_manifest
from vlcl.data.reader import Decoder, read_run
from vlcl.data.shard import ShardError, Unread, Wanted, read_samples, scan_shard
from vlcl.errors import UserError
from vlcl_data_prep.index import index_shards
from vlcl_data_prep.pack import pack_shards
from vlcl_data_prep.verify import Rules, verify_shards
from vlcl_eval.clip_benchmark.retrieval import SampleStream
from vlcl_eval.datasets.images import ImageRef, read_image

MB = 1 << 20
JSON = Keys(json_text="caption")
DEEP = b'{"caption": "a cup", "more": ' + b"[" * 3000 + b"]" * 3000 + b"}"
NARROW = Limits(max_pixels=5_000, max_aspect=4, max_bytes=3_000, max_caption=30, max_json=400, max_json_depth=5)


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def reason_of(function: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(BadSample) as raised:
        function(*args)
    return raised.value.reason


# name -> (files of the sample, reason under NARROW)
ODD = {
    "pixels": ({"png": png(80, 70), "txt": b"a cup"}, decode.IMAGE_TOO_LARGE),
    "aspect": ({"png": png(10, 41), "txt": b"a cup"}, decode.IMAGE_TOO_LONG),
    "bytes": ({"png": picture(1) + bytes(4000), "txt": b"a cup"}, decode.FILE_TOO_LARGE),
    "caption": ({"png": picture(1), "txt": b"x" * 31}, decode.CAPTION_TOO_LONG),
    "text bytes": ({"png": picture(1), "txt": b"x" * 3001}, decode.FILE_TOO_LARGE),
}
ODD_JSON = {
    "json": (json.dumps({"caption": "a cup", "more": "x" * 400}).encode(), decode.JSON_TOO_LARGE),
    "depth": (b'{"caption": "a cup", "more": [[[[[1]]]]]}', decode.JSON_TOO_DEEP),
    "caption": (json.dumps({"caption": "x" * 31}).encode(), decode.CAPTION_TOO_LONG),
    "bytes": (b'{"caption": "a cup"}' + b" " * 3001, decode.FILE_TOO_LARGE),
}


@pytest.fixture(params=[*ODD, *(f"json {name}" for name in ODD_JSON)])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Keys, str]:
    """A folder with a shard of three samples, of which the second asks for too much; its keys; the reason."""
    name = request.param
    in_json = name.startswith("json ")
    if in_json:
        data, reason = ODD_JSON[name.removeprefix("json ")]
        files = {"png": picture(1), "json": data}
    else:
        files, reason = ODD[name]
    plain = {"json": b'{"caption": "a cup"}'} if in_json else {"txt": b"a cup"}
    tmp_path.joinpath("set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w") as tar:
        for key, sample in (("0", {"png": picture(0), **plain}), ("1", files), ("2", {"png": picture(2), **plain})):
            for suffix, content in sample.items():
                add(tar, f"{key}.{suffix}", content)
    index_shards(str(tmp_path / "set"), progress=False)
    return tmp_path / "set", JSON if in_json else Keys(), reason


def test_training_verify_and_retrieval_judge_alike(odd: tuple[Path, Keys, str]) -> None:
    folder, keys, reason = odd
    url = str(folder / "0.tar")
    decoder = Decoder(lambda image: image, lambda texts: texts, keys, NARROW)  # pyright: ignore[reportArgumentType]
    reasons = []
    for _, sample in read_run(url, 0, 3, decoder.wanted):
        assert not isinstance(sample, BadSample)
        try:
            decoder.raw(sample.files)
            reasons.append("")
        except BadSample as bad:
            reasons.append(bad.reason)
    assert reasons == ["", reason, ""]
    found = verify_shards(url, 1, Rules(keys=keys, limits=NARROW), progress=False)
    assert [(problem.position, problem.reason) for problem in found] == [(1, reason)]
    stream = SampleStream([url], lambda image: image, 0, 1, keys, NARROW)
    problems = [sample.problems for sample in stream if not isinstance(sample, str)]
    assert [[why for why, _ in listed] for listed in problems] == [[], [reason], []]
    assert verify_shards(url, 1, Rules(min_side=1, keys=keys), progress=False) == []


@pytest.mark.parametrize("name", ODD)
def test_pack_judges_alike(tmp_path: Path, name: str) -> None:
    files, reason = ODD[name]
    source = tmp_path / "pictures"
    source.mkdir()
    for key, sample in (("0", {"png": picture(0), "txt": b"a"}), ("1", files), ("2", {"png": picture(2), "txt": b"b"})):
        for suffix, content in sample.items():
            (source / f"{key}.{suffix}").write_bytes(content)
    summary = pack_shards(source, tmp_path / "out", limits=NARROW)
    reason = decode.CAPTION_TOO_LONG if name == "text bytes" else reason
    assert dict(summary.skipped) == {reason: 1}
    assert read_manifest(str(tmp_path / "out" / "manifest.json")).num_samples == 2


def test_settings_and_options_have_these_names() -> None:
    config = DataConfig(train="shards")
    for name, value in vars(DEFAULT_LIMITS).items():
        assert getattr(config, name) == value
        assert getattr(parse_limits([f"{name}=7"]), name) == 7
    for wrong in ("max_pixels", "pixels=3", "max_pixels=0", "max_pixels=-1", "max_pixels=x", "max_pixels=²"):
        with pytest.raises(UserError, match=r"--limit .*max_aspect"):
            parse_limits([wrong])


def test_a_picture_of_1_by_200000_is_refused_by_its_header() -> None:
    data = png(1, 200_000)
    assert len(data) < 2_000
    tracemalloc.start()
    assert reason_of(decode_image, data) == decode.IMAGE_TOO_LONG
    assert tracemalloc.get_traced_memory()[1] < MB
    tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("levels", [65, 3000, 100_000])
def test_deep_json(levels: int, encoding: str) -> None:
    data = ('{"caption": "a cup", "more": ' + "[" * levels + "]" * levels + "}").encode(encoding)
    assert reason_of(captions_from, {"json": data}, JSON) == decode.JSON_TOO_DEEP


@pytest.mark.parametrize("text", ["[" * 500, '\\"' + "[" * 500, "\\\\", '{"a": [' * 100])
def test_brackets_in_a_text_are_no_depth(text: str) -> None:
    data = json.dumps({"caption": text, "more": [[1]] * 80}).encode()
    assert captions_from({"json": data}, JSON).texts == (text,)


def test_a_text_that_does_not_end_takes_no_time() -> None:
    data = b"{" * 65 + b'"' + b'\\"' * (MB // 2 - 100)
    began = time.monotonic()
    assert reason_of(captions_from, {"json": data}, JSON) in (decode.BAD_JSON, decode.JSON_TOO_DEEP)
    assert time.monotonic() - began < 5  # it was hours


def test_too_little_memory_is_no_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert reason_of(decode_image, picture(0)) == decode.NO_MEMORY


def compressed(folder: Path, members: dict[str, int], kind: str) -> str:
    """A tar of zeros, compressed to a thousandth and less."""
    path = folder / f"0.tar.{kind}"
    with tarfile.open(str(path), f"w:{kind}") as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, size in members.items():
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    return str(path)


def peak_of(function: Callable[[], Any]) -> tuple[Any, int]:
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_what_nobody_asks_for_is_not_read(tmp_path: Path, kind: str) -> None:
    url = compressed(tmp_path, {"0.npy": 60 * MB, "0.png": 10, "0.txt": 3}, kind)
    (sample,), peak = peak_of(lambda: list(read_samples(url, wanted=wanted_files())))
    assert peak < 16 * MB
    assert {suffix: len(data) for suffix, data in sample.files.items()} == {"npy": 0, "png": 10, "txt": 3}
    assert isinstance(sample.files["npy"], Unread)
    assert sample.files["npy"].size == 60 * MB
    plain = tmp_path / "plain.tar"
    with tarfile.open(plain, "w") as tar:
        add(tar, "0.npy", bytes(60 * MB))
        add(tar, "0.txt", b"abc")
    _, peak = peak_of(lambda: list(read_samples(str(plain), wanted=wanted_files())))
    assert peak < 16 * MB


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_too_large_a_file_is_not_read(tmp_path: Path, kind: str) -> None:
    url = compressed(tmp_path, {"0.png": 80 * MB, "0.txt": 3}, kind)
    (sample,), peak = peak_of(lambda: list(read_samples(url, wanted=wanted_files())))
    assert peak < 16 * MB
    assert reason_of(image_bytes_from, sample.files) == decode.FILE_TOO_LARGE


def sparse(name: str, declared: int) -> bytes:
    """An old GNU sparse member: one block is there, the rest is a hole."""

    def octal(number: int, width: int) -> bytes:
        return f"{number:0{width - 1}o}".encode() + b"\0"

    header = bytearray(512)
    for place, data in (
        (0, name.encode()), (100, octal(0o644, 8)), (108, octal(0, 8)), (116, octal(0, 8)), (124, octal(512, 12)),
        (136, octal(0, 12)), (148, b" " * 8), (156, b"S"), (257, b"ustar  \0"), (386, octal(0, 12)),
        (398, octal(512, 12)), (410, octal(declared, 12)), (422, octal(0, 12)), (483, octal(declared, 12)),
    ):  # fmt: skip
        header[place : place + len(data)] = data
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + b"x" * 512


def test_a_hole_that_says_6_GB_is_one_bad_sample(tmp_path: Path) -> None:
    make_shards(tmp_path / "set", (2,))
    path = tmp_path / "set" / "00000.tar"
    path.write_bytes(sparse("huge.png", 6 << 30) + path.read_bytes())
    assert index_shards(str(tmp_path / "set"), progress=False).num_samples == 3
    samples, peak = peak_of(lambda: list(read_samples(str(path), wanted=wanted_files())))
    assert peak < 16 * MB
    assert reason_of(image_bytes_from, samples[0].files) == decode.FILE_TOO_LARGE
    assert [sample.key for sample in samples[1:]] == ["000000", "000001"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_header_is_not_read_whatever_its_size(tmp_path: Path, kind: bytes) -> None:
    import gzip

    info = tarfile.TarInfo("0.png")
    info.type, info.size = kind, 500 * MB
    path = tmp_path / "0.tar.gz"
    with gzip.open(path, "wb") as out:
        out.write(info.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(50):
            out.write(bytes(MB))
    with pytest.raises(ShardError, match=r"0\.tar\.gz.*a header of 524,288,000 bytes"):
        peak_of(lambda: scan_shard(str(path)))


@pytest.mark.parametrize(
    "data", [b"\x1f\x8b\x08", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x1f\x8b\x08\x04" + b"\xff" * 20]
)
def test_the_beginning_of_a_compressed_file_is_a_broken_shard(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "1.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"1\.tar"):
        index_shards(str(tmp_path), progress=False)


def test_a_fifo_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(UserError, match=r"0\.tar.*no regular file"):
        index_shards(str(tmp_path), progress=False)


def test_a_shard_that_breaks_off_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_shards(tmp_path, (6,))
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[:4000])
    samples = [sample for _, sample in read_run(str(path), 0, 6)]
    assert isinstance(samples[-1], BadSample)
    assert str(path) in caplog.text
    assert "truncated" in caplog.text


def test_images_of_an_archive_are_bounded(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(65 * MB))
    (tmp_path / "b.png").write_bytes(bytes(65 * MB))
    for ref in (ImageRef(str(tmp_path / "a.zip"), "a.png"), ImageRef(str(tmp_path / "b.png"))):
        assert reason_of(read_image, ref) == decode.FILE_TOO_LARGE


def test_wanted() -> None:
    assert Wanted(frozenset({"a"}), 5).takes("a", 5)
    assert not Wanted(frozenset({"a"}), 5).takes("a", 6)
    assert not Wanted(frozenset({"a"}), 5).takes("b", 1)
    assert wanted_files(Keys("png;jpg", "txt", "caption")).suffixes == {"png", "jpg", "json"}
    import pickle

    assert pickle.loads(pickle.dumps(Unread(7))).size == 7  # to and from the processes that read
