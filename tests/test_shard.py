"""Shards: the header walk sees what webdataset and tarfile see, and never takes a damaged shard for a whole one.

.venv/bin/python -m pytest tests/test_shard.py
"""

import gzip
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcl.data.manifest import open_source
from vlcl.data.reader import read_run
from vlcl.data.shard import RawSample, ShardError, read_samples, scan_keys, scan_shard, split_name
from vlcl_data_prep.index import index_shards

LONG = "folder-" + "x" * 130
NOISE = random.Random(0).randbytes(5000)


def write_tar(path, members, format=tarfile.PAX_FORMAT, mtime=0.0):
    """`members`: (name, content); content None = a folder."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            if content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if content is not None else None)
    return str(path)


def samples(count, prefix="", image=3000):
    files = []
    for i in range(count):
        files += [(f"{prefix}{i:05d}.jpg", os.urandom(image + i)), (f"{prefix}{i:05d}.json", b"{}")]
        files += [(f"{prefix}{i:05d}.txt", f"caption {i}".encode())]
    return files


def by_webdataset(path):
    from webdataset.tariterators import tarfile_to_samples

    found = []
    for sample in tarfile_to_samples()([{"url": path}]):
        files = {name: data for name, data in sample.items() if not name.startswith("__")}
        found.append(RawSample(sample["__key__"], files))
    return found


def read_all(path):
    found = []
    try:
        for sample in read_samples(path):
            found.append(sample)
    except ShardError as error:
        return found, error
    return found, None


TARS = {
    "ustar": (samples(7), {"format": tarfile.USTAR_FORMAT}),
    "gnu": (samples(7), {"format": tarfile.GNU_FORMAT}),
    "pax with mtimes, as webdataset writes": (samples(40), {"mtime": 1234567890.123}),
    "ustar prefix": (samples(3, "f" * 90 + "/"), {"format": tarfile.USTAR_FORMAT}),
    "gnu long names after short": (samples(2) + samples(3, LONG), {"format": tarfile.GNU_FORMAT}),
    "pax long names": (samples(3, LONG) + samples(2, LONG + "/b/"), {"mtime": 0.5}),
    "pax names of more than a block": (samples(2) + samples(2, "y" * 700), {}),
    "pax utf-8 names": (samples(3, "bücher/日本-"), {}),
    "folders": ([("a", None), *samples(3, "a/"), ("b.c", None), *samples(2, "b.c/"), ("b.c/plain", b"x")], {}),
    "empty tar": ([], {}),
    "empty members": ([("0.jpg", b""), ("0.txt", b""), ("1.jpg", b"x"), ("2.txt", b"")], {}),
    "block sizes": ([(f"{i}.bin", bytes(size)) for i, size in enumerate((1, 511, 512, 513, 1024, 8192, 70000))], {}),
    "keys with dots, capitals": ([("a.seg.PNG", b"1"), ("a.JPG", b"2"), ("b.v1.jpg", b"3"), ("b.v2.jpg", b"4")], {}),
    "meta": ([("__meta__", b"x"), ("__index__/a.txt", b"x"), *samples(2), ("__url.txt", b"x")], {}),
    "no suffix": ([("README", b"x"), *samples(2), ("LICENSE", b"y")], {}),
    "files of one key apart": ([("0.jpg", b"a"), ("1.jpg", b"b"), ("0.txt", b"c"), ("1.txt", b"d")], {}),
}


@pytest.mark.parametrize("name", TARS)
def test_reads_and_counts_as_webdataset_does(tmp_path, name):
    members, options = TARS[name]
    path = write_tar(tmp_path / "a.tar", members, **options)
    expected = by_webdataset(path)
    assert list(read_samples(path)) == expected
    scan = scan_shard(path)
    assert scan.samples == len(expected)
    assert scan.bytes == os.path.getsize(path)
    assert scan.suffixes == Counter(suffix for sample in expected for suffix in sample.files)
    for start in range(len(expected) + 2):
        assert list(read_samples(path, start)) == expected[start:]


def read_packed(path):
    """By the other walk, which remembers nothing."""
    Path(path + ".gz").write_bytes(gzip.compress(Path(path).read_bytes(), 1))
    return list(read_samples(path + ".gz"))


LONG_TARS = {
    "plain": samples(200, image=10),
    "keys that come again": [(f"{i % 3}.txt", f"{i}".encode()) for i in range(300)],
    "suffixes that come again": [("a.txt", f"{i}".encode()) for i in range(300)],
    "folders and meta": [
        (n, c) for i in range(200) for n, c in ((f"{i}", None), ("__m__", b"x"), (f"{i}/a.txt", b"y"))
    ],
    "long names on the way": samples(150, image=10) + samples(150, LONG, image=10),
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", LONG_TARS)
def test_a_read_goes_on_from_where_one_has_been_and_finds_the_same(tmp_path: Path, name, format):
    path = write_tar(tmp_path / "a.tar", LONG_TARS[name], tarfile.PAX_FORMAT if "long" in name else format, mtime=0.5)
    expected = read_packed(path)
    for start in (100, 64, 63, 0, 130, len(expected) - 1, len(expected), 128, 199):
        assert list(read_samples(path, start)) == expected[start:], start
    other = write_tar(tmp_path / "b.tar", [("new.txt", b"x"), *LONG_TARS[name]], mtime=0.5)
    os.replace(shutil.copy(other, tmp_path / "c.tar"), path)
    assert list(read_samples(path, 130)) == read_packed(other)[130:]


def test_later_reads_from_the_middle_walk_few_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_tar(tmp_path / "a.tar", samples(200, image=10))
    seen: list[str] = []
    monkeypatch.setattr("vlcl.data.shard.split_name", lambda name: seen.append(name) or split_name(name))
    assert next(iter(read_samples(path, 190))).key == "00190"
    assert len(seen) > 3 * 190
    seen.clear()
    assert next(iter(read_samples(path, 195))).key == "00195"
    assert len(seen) <= 3 * (195 - 128 + 1) + 1


@pytest.mark.parametrize("name", TARS)
def test_fast_walk_gives_the_identical_result_to_tarfile(tmp_path: Path, name):
    members, options = TARS[name]
    path = write_tar(tmp_path / "a.tar", members, **options)
    with open(path, "rb") as plain, gzip.open(tmp_path / "a.tar.gz", "wb") as packed:
        packed.write(plain.read())
    compressed = str(tmp_path / "a.tar.gz")  # a stream: Python's tarfile alone reads it
    fast, slow = scan_shard(path), scan_shard(compressed)
    assert (fast.samples, fast.checksum, fast.suffixes) == (slow.samples, slow.checksum, slow.suffixes)
    assert list(scan_keys(path)) == list(scan_keys(compressed))
    assert list(read_samples(path)) == list(read_samples(compressed))


KEYS = st.sampled_from(["0", "00", "a", "A", "é", "x-1", "d/0", "d/e/0", "d.e/0", "D/0", "0 1"])
SUFFIXES = st.sampled_from(
    ["jpg", "JPG", "png", "txt", "json", "seg.png", "seg.PNG", "v1.jpg", "", ".txt", "tar", "_x"]
)
OTHERS = st.sampled_from(["README", "d/LICENSE", "__meta__", "__index__/a.txt", ".hidden", "d", "0"])
MEMBERS = st.lists(st.one_of(st.builds("{}.{}".format, KEYS, SUFFIXES), OTHERS), max_size=24)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(MEMBERS, min_size=1, max_size=3), st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]))
def test_rows_are_webdatasets_samples_one_after_another(shards: list[list[str]], format: int) -> None:
    """Any names, in any order: row r is the r-th sample that webdataset groups. Where a suffix comes twice in a sample,
    webdataset stops with an error, and a new sample starts here."""
    with tempfile.TemporaryDirectory() as folder:
        expected: list[RawSample] = []
        for number, names in enumerate(shards):
            path = f"{folder}/{number}.tar"
            write_tar(path, [(name, f"{number} {i}".encode()) for i, name in enumerate(names)], format)
            try:
                samples = by_webdataset(path)
            except ValueError:
                os.remove(path)
                continue
            assert scan_shard(path).samples == len(samples)
            expected += samples
        if not expected:
            return
        index_shards(folder, workers=1, progress=False)
        source = open_source(folder)
        offsets, found = source.manifest.offsets, {}
        for url, offset, shard in zip(source.urls, offsets, source.manifest.shards):
            for position, sample in read_run(url, 0, shard.samples):
                found[offset + position] = sample
        assert list(found.items()) == list(enumerate(expected))


def test_repeated_suffix_starts_a_new_sample(tmp_path):
    """webdataset raises here; open_clip begins a sample, and so do counting and reading."""
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"a"), ("0.txt", b"b"), ("0.jpg", b"c"), ("0.txt", b"d")])
    assert scan_shard(path).samples == 2
    assert [sample.files["jpg"] for sample in read_samples(path)] == [b"a", b"c"]


def test_hidden_files_do_not_split_a_sample(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("d/0.jpg", b"a"), ("d/._0.jpg", b"mac"), ("d/0.txt", b"b"), (".x.y", b"")])
    assert list(read_samples(path)) == [RawSample("d/0", {"jpg": b"a", "txt": b"b"})]
    assert split_name("d/.hidden.txt") is None


def test_sparse_and_linked_members_are_left_to_tarfile(tmp_path):
    with open(tmp_path / "0.bin", "wb") as file:
        file.write(b"start")
        file.truncate(1 << 20)
    (tmp_path / "0.txt").write_bytes(b"caption")
    os.symlink("0.txt", tmp_path / "0.link")
    (tmp_path / "1.txt").write_bytes(b"next")
    names = ["0.bin", "0.link", "0.txt", "1.txt"]
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", *names], cwd=tmp_path, check=True)
    first, second = read_samples(str(tmp_path / "a.tar"))
    assert first == RawSample("0", {"bin": b"start" + bytes((1 << 20) - 5), "txt": b"caption"})
    assert second == RawSample("1", {"txt": b"next"})


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", LONG])
def test_every_truncation_is_an_error_or_a_clean_end(tmp_path, format, prefix):
    """Cut at any place: ShardError, or, between two members, fewer samples; always a prefix of the whole."""
    if format == tarfile.USTAR_FORMAT and prefix:
        prefix = "f" * 90 + "/"
    members = samples(3, prefix, image=700)
    whole = write_tar(tmp_path / "a.tar", members, format, mtime=0.25 if format == tarfile.PAX_FORMAT else 0)
    expected = list(read_samples(whole))
    data = Path(whole).read_bytes()
    end = max(i for i in range(0, len(data), 512) if any(data[i : i + 512])) + 512
    cut = tmp_path / "cut.tar"
    clean = 0
    for length in [*range(0, end, 100), *range(0, end, 512)]:
        cut.write_bytes(data[:length])
        found, error = read_all(str(cut))
        if error:
            assert error.position == len(found)
            assert found == expected[: len(found)]
            with pytest.raises(ShardError):
                scan_shard(str(cut))
        else:
            clean += 1
            assert length % 512 == 0
            assert scan_shard(str(cut)).samples == len(found)
            assert found[:-1] == expected[: len(found)][:-1]
    assert clean == len(members) - 1  # cut after a member and before the next: a tar without an end marker


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>" + b"x" * 5000, "HTML"),
        (b"\0" * 100 + b"x" * 5000, "corrupt"),
        (NOISE, "corrupt"),
        (b"\x1f\x8b" + NOISE, "cannot be read"),
    ],
)
def test_what_is_no_tar_is_an_error(tmp_path, content, says):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=says):
        scan_shard(str(path))
    with pytest.raises(ShardError, match=says):
        list(read_samples(str(path)))


def test_corrupt_header_in_the_middle_is_an_error_after_the_samples_before(tmp_path):
    """tarfile and webdataset end there without a word."""
    path = tmp_path / "a.tar"
    expected = list(read_samples(write_tar(path, samples(6), tarfile.USTAR_FORMAT)))
    data = bytearray(path.read_bytes())
    place = data.index(b"00004.json")
    data[place : place + 4] = b"9999"
    path.write_bytes(data)
    assert len(by_webdataset(str(path))) < 6
    found, error = read_all(str(path))
    assert found == expected[:4]
    assert error
    assert error.position == 4
    assert str(path) in str(error)


def test_missing_file_and_pickled_error():
    with pytest.raises(ShardError, match="No such file") as raised:
        scan_shard("/nowhere/a.tar")
    copy = pickle.loads(pickle.dumps(raised.value))
    assert str(copy) == str(raised.value)
    assert copy.position == 0


def test_pipes_give_the_same_and_a_failing_command_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(5), mtime=0.5)
    pipe = f"pipe:cat {path}"
    assert list(read_samples(pipe)) == list(read_samples(path)) == list(read_samples(f"file:{path}"))
    assert list(read_samples(pipe, 3)) == list(read_samples(path, 3))
    scan = scan_shard(pipe)
    assert (scan.samples, scan.bytes, scan.mtime_ns) == (5, None, None)
    assert scan.checksum == scan_shard(path).checksum
    with pytest.raises(ShardError):
        scan_shard(f"pipe:cat {path}; exit 3")
    with pytest.raises(ShardError):
        scan_shard("pipe:cat /nowhere")
    next(read_samples(pipe))  # a reader that leaves early is no error


def test_checksum_depends_on_names_sizes_and_order_only(tmp_path):
    members = samples(3)
    checksum = scan_shard(write_tar(tmp_path / "a.tar", members)).checksum
    assert scan_shard(write_tar(tmp_path / "b.tar", members, tarfile.GNU_FORMAT)).checksum == checksum
    assert scan_shard(write_tar(tmp_path / "c.tar", members[::-1])).checksum != checksum
    assert scan_shard(write_tar(tmp_path / "d.tar", [*members[:-1], ("00002.txt", b"longer")])).checksum != checksum
    assert scan_shard(write_tar(tmp_path / "e.tar", [*members[:-1], ("2.txt", members[-1][1])])).checksum != checksum


def test_scan_does_not_read_image_bytes(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(50, image=200_000))
    script = (
        "import sys; from vlcl.data.shard import scan_shard\n"
        "read = lambda: int(open('/proc/self/io').readline().split()[1])\n"
        "before = read(); assert scan_shard(sys.argv[1]).samples == 50; print(read() - before)"
    )
    if not os.path.exists("/proc/self/io"):
        pytest.skip("needs Linux's /proc")
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.1 * os.path.getsize(path)


def test_import_is_cheap():
    script = (
        "import sys, vlcl.data.manifest, vlcl.data.decode; "
        "print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
