"""`vlcl data verify` and the rules it shares with the training loader (vlcl/data/decode.py).

.venv/bin/python -m pytest tests/test_verify.py
"""

import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib
from array import array

import pytest
from PIL import Image

from vlcl.data.captions import captions_from
from vlcl.data.decode import BadSample, Keys, Limits, decode_image, image_bytes_from
from vlcl.errors import UserError
from vlcl_data_prep.verify import Problem, Rules, _repeated, verify_shards


def encode(image, format="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(width=32, height=24, mode="RGB", colour=None):
    return Image.new(mode, (width, height), colour)


NOISE = Image.effect_noise((64, 48), 50).convert("RGB")
JPEG, PNG = encode(NOISE), encode(NOISE, "PNG")


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def reason_of(function, *args, **kwargs):
    with pytest.raises(BadSample) as raised:
        function(*args, **kwargs)
    return raised.value.reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image"),
        (b"<!DOCTYPE html><html>not found</html>", "not an image"),
        (b"\0" * 3000, "not an image"),
        (JPEG[: len(JPEG) // 2], "broken image"),
        (PNG[: len(PNG) // 2], "broken image"),
        (PNG[:20], "broken image"),
        (encode(picture(), "WEBP")[:-10], "broken image"),
    ],
    ids=["empty", "html", "zeros", "half jpeg", "half png", "start of png", "cut webp"],
)
def test_bad_images(data, reason):
    assert reason_of(decode_image, data) == reason


def test_size_is_judged_from_the_header():
    header_only = encode(picture(300, 200))[:700]
    assert reason_of(decode_image, header_only, Limits(max_pixels=59_999)) == "image too large"
    assert reason_of(decode_image, header_only, Limits(max_pixels=60_000)) == "broken image"
    assert decode_image(encode(picture(300, 200)), Limits(max_pixels=60_000)).size == (300, 200)


@pytest.mark.parametrize(("side", "reason"), [(10_000, "broken image"), (60_000, "image too large")])
def test_decompression_bomb_is_refused_without_a_warning(side, reason):
    png = bytearray(encode(picture(1, 1), "PNG"))
    png[16:24] = struct.pack(">II", side, side)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    script = (
        "import sys; from vlcl.data.decode import *\n"
        "try: decode_image(sys.stdin.buffer.read(), Limits(max_pixels=10**12))\n"
        "except BadSample as bad: print(bad.reason)"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", script], input=bytes(png), capture_output=True)
    assert (done.stdout.decode().strip(), done.stderr) == (reason, b"")


def test_every_mode_becomes_rgb_without_a_warning():
    palette = picture(mode="P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (
            encode(palette, "PNG", transparency=bytes(range(256))),
            encode(picture(mode="RGBA"), "PNG"),
            encode(picture(mode="LA"), "PNG"),
            encode(picture(mode="L")),
            encode(picture(mode="CMYK")),
            encode(picture(mode="1"), "PNG"),
            encode(palette, "GIF"),
            encode(picture(mode="RGBA"), "WEBP"),
        ):
            image = decode_image(data)
            assert (image.mode, image.size) == ("RGB", (32, 24))


def test_exif_orientation_is_honoured_and_bad_exif_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = encode(picture(), exif=exif)
    assert decode_image(turned).size == (24, 32)
    place = turned.index(b"Exif\0\0") + 6
    assert decode_image(turned[:place] + b"\xff" * 8 + turned[place + 8 :]).size == (32, 24)


@pytest.mark.parametrize("most", [0, 4, 100])
def test_repeated_hashes_are_found_in_parts_and_at_once(most, monkeypatch):
    monkeypatch.setattr("vlcl_data_prep.verify.MOST_SORTED", most)
    parts = [[7, 1 << 63, 9], [], [10, 9, 12, 2**64 - 1], [1 << 63, 2**64 - 1, 2**64 - 1, 8]]
    assert _repeated([array("Q", part) for part in parts]) == {9, 1 << 63, 2**64 - 1}
    assert _repeated([array("Q"), array("Q", [3])]) == set()


def test_captions():
    files = {"txt": b"\xef\xbb\xbf two  dogs\n\n run\n"}
    assert captions_from(files).texts == ("two  dogs", "run")
    assert captions_from(files, Keys(lines=False)).texts == ("two  dogs\n\n run",)
    for nothing in (b" \n\t", b""):
        assert reason_of(captions_from, {"txt": nothing}) == "empty caption"
    assert reason_of(captions_from, {"txt": "caf\u00e9".encode("latin-1")}) == "caption not UTF-8"


def test_which_file_is_taken():
    files = {
        "png": b"p",
        "webp": b"w",
        "txt": b"plain",
        "json": json.dumps({"recap": " long ", "n": 1, "e": ""}).encode(),
    }
    assert image_bytes_from(files) == b"p"
    assert image_bytes_from(files, Keys("webp;png")) == b"w"
    assert reason_of(image_bytes_from, files, Keys("jpg")) == "no image"
    assert captions_from(files).texts == ("plain",)
    assert captions_from(files, Keys(text="caption;txt")).texts == ("plain",)
    assert reason_of(captions_from, files, Keys(text="cap")) == "no caption"
    assert captions_from(files, Keys(json_text="recap")).texts == ("long",)
    assert captions_from(files, Keys(json_text="other;n;recap")).texts == ("long",)
    assert reason_of(captions_from, files, Keys(json_text="n")) == "caption is not text"
    assert reason_of(captions_from, files, Keys(json_text="e")) == "empty caption"
    assert reason_of(captions_from, {"txt": b"x"}, Keys(json_text="recap")) == "no caption"
    for bad in (b"{", b"[1]", b"\xff\xfe{}"):
        assert reason_of(captions_from, {"json": bad}, Keys(json_text="recap")) == "bad json"


def test_bad_sample_crosses_process_borders():
    copy = pickle.loads(pickle.dumps(BadSample("no image", "why")))
    assert (copy.reason, copy.detail, str(copy)) == ("no image", "why", "no image (why)")


@pytest.fixture
def broken(tmp_path):
    """A folder with every kind of damage, and (shard, position, key, reason) of each."""
    good = [("jpg", JPEG), ("txt", b"caption")]
    big = encode(picture(200, 100))
    parts = [
        ("ok", good, []),
        ("html", [("jpg", b"<html>gone</html>"), good[1]], ["not an image"]),
        ("zero", [("jpg", b""), good[1]], ["empty image"]),
        ("cut", [("jpg", JPEG[:-500]), good[1]], ["broken image"]),
        ("tiny", [("jpg", encode(picture(15, 40))), good[1]], ["image too small"]),
        ("huge", [("jpg", big), good[1]], ["image too large"]),
        ("noimage", [("txt", b"x")], ["no image"]),
        ("nocaption", [("jpg", JPEG)], ["no caption"]),
        ("emptycaption", [("jpg", JPEG), ("txt", b" \n")], ["empty caption"]),
        ("latin", [("jpg", JPEG), ("txt", b"caf\xe9")], ["caption not UTF-8"]),
        ("both", [("jpg", b"no"), ("txt", b"")], ["not an image", "empty caption"]),
        ("twice", good, []),
        ("apart", [("jpg", JPEG)], ["no caption"]),
        ("between", good, []),
        ("apart", [("txt", b"late")], ["no image"]),
    ]
    files, expected = [], []
    for position, (key, members, reasons) in enumerate(parts):
        files += [(f"{key}.{suffix}", content) for suffix, content in members]
        expected += [("0.tar", position, key, reason) for reason in reasons]
    write_tar(tmp_path / "0.tar", files)
    write_tar(
        tmp_path / "1.tar", [(f"{key}.{suffix}", content) for key in ("a", "twice", "b") for suffix, content in good]
    )
    whole = write_tar(tmp_path / "2.tar", [(f"{key}.{s}", c) for key in ("c", "a", "d") for s, c in good])
    with open(whole, "r+b") as file:
        file.truncate(2 * (3 * 512 + -(-len(JPEG) // 512) * 512) + 900)
    expected += [("2.tar", 2, "", "broken shard")]
    expected += [
        ("0.tar", 14, "apart", "files of one key not adjacent"),
        ("1.tar", 1, "twice", "duplicate key"),
        ("2.tar", 1, "a", "duplicate key"),
    ]
    return tmp_path, expected


def shown(problems, folder):
    return [(p.shard.removeprefix(f"{folder}/"), p.position, p.key, p.reason) for p in problems]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_kind_of_damage_is_found(broken, workers):
    folder, expected = broken
    problems = verify_shards(str(folder), workers, Rules(limits=Limits(max_pixels=10_000)), progress=False)
    assert shown(problems, folder) == expected
    (twice,) = (p for p in problems if p.key == "twice")
    assert twice.detail == f"jpg, txt here; also in {folder}/0.tar at 11"


def test_rules_can_be_changed(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.png", encode(picture(8, 8), "PNG")), ("0.json", b'{"c": "x"}')])
    assert {p.reason for p in verify_shards(path, 1)} == {"image too small", "no caption"}
    assert verify_shards(path, 1, Rules(min_side=8, keys=Keys(json_text="c"))) == []
    assert [p.reason for p in verify_shards(path, 1, Rules(min_side=8, keys=Keys("jpg", json_text="c")))] == [
        "no image"
    ]


def verify_command(*args):
    script = "from vlcl.cli import main; main()"
    command = [sys.executable, "-c", script, "data", "verify", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_writes_a_table_and_exits_with_1(broken):
    folder, expected = broken
    done = verify_command(folder, "--limit", "max_pixels=10000")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"3 shards, {len(expected)} problems; table: {folder}/verify.tsv" in done.stdout
    assert "broken shard" in done.stdout
    header, *rows = [line.split("\t") for line in (folder / "verify.tsv").read_text().splitlines()]
    assert header == ["shard", "position", "key", "reason", "detail"]
    assert {len(row) for row in rows} == {5}
    found = [Problem(row[0], int(row[1]), *row[2:]) for row in rows]
    assert shown(found, folder) == expected


def test_command_on_clean_shards_exits_with_0(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.jpg", JPEG), ("0.txt", b"x")])
    done = verify_command(tmp_path, "--output", tmp_path / "t.tsv")
    assert done.returncode == 0, done.stderr
    assert "1 shard, 0 problems" in done.stdout
    assert (tmp_path / "t.tsv").read_text() == "shard\tposition\tkey\treason\tdetail\n"


def test_table_that_cannot_be_written_is_an_error_before_the_work(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.jpg", JPEG)])
    with pytest.raises(UserError, match="--output TSV"):
        verify_shards(path, 1, output=str(tmp_path / "none" / "t.tsv"))
