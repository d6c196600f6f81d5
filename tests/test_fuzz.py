"""Files of others that are nearly right: whatever is in them, the answer is theirs or one clear error.

`make fuzz` runs each target for 10 minutes with inputs of chance; here it is the same few hundred in seconds.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz import (
    TEXTS,
    Change,
    answer,
    bounded_memory,
    byte_changes,
    changed_bytes,
    changed_document,
    document_changes,
    fuzz,
    places,
    values,
)
from hypothesis import strategies as st
from shards import add, make_shards, picture

from vlcl.config import Config, dump_config, load_config
from vlcl.config.file import shipped_configs
from vlcl.data.archive import StreamTar
from vlcl.data.manifest import Manifest, Shard, open_source, read_manifest
from vlcl.data.reader import read_run
from vlcl.data.shard import (
    RawSample,
    ShardError,
    Wanted,
    _grouped,
    locate_files,
    read_samples,
    scan_keys,
    scan_shard,
)


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    with bounded_memory():
        yield


# Tars


def tar_of(kind: int, names: list[str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name in names:
            add(tar, f"{name}.png", picture(7))
            add(tar, f"{name}.txt", b"a caption")
            add(tar, f"{name}.json", b'{"caption": "a"}')
    return file.getvalue()


def sparse_tar() -> bytes:
    """As GNU tar --sparse writes: 2 of 4096 bytes are there."""
    info = tarfile.TarInfo("0.bin")
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % 4096
    return checked(bytes(header)) + b"x" * 512 + tar_of(tarfile.GNU_FORMAT, ["1"])


def checked(header: bytes) -> bytes:
    """With the checksum that it should have."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


PLAIN = [f"{i:04d}" for i in range(4)]
TARS = [
    tar_of(tarfile.USTAR_FORMAT, PLAIN), tar_of(tarfile.GNU_FORMAT, [*PLAIN, "n" * 120 + "/x"]),
    tar_of(tarfile.PAX_FORMAT, ["é" * 3, "n" * 120, "a/b.c", *PLAIN]), sparse_tar(),
]  # fmt: skip
FIELDS = [
    (0, 100),
    (100, 8),
    (124, 12),
    (136, 12),
    (148, 8),
    (156, 1),
    (157, 100),
    (257, 8),
    (345, 155),
    (386, 24),
    (483, 12),
]
FIELD_VALUES = [
    b"", b"\0", b"7" * 12, b"77777777777\0", b"-1", b"\x80" + b"\xff" * 11, b"\xff" * 12,
    b"\x80" + b"\0" * 10 + b"\x10", b"a.PNG",
    b"x", b"g", b"L", b"K", b"S", b"5", b"1", b"7", b"V", b" ", b"a/../b.png", b"\xff\xfe.png", b"__x__/a.b", b".png",
    b"00000001000\0", b"9", b"0x10", b"1_0", b"path", b"GNU.sparse.map",
]  # fmt: skip
tar_changes = st.lists(
    st.one_of(
        st.tuples(st.just("field"), places, st.sampled_from(FIELDS), st.sampled_from(FIELD_VALUES), st.booleans()),
        st.tuples(st.just("block"), places, places),
    ),
    min_size=0, max_size=4,
)  # fmt: skip


def changed_tar(data: bytes, changes: list[Change]) -> bytes:
    """Header fields with other values, with the right checksum or without; blocks of other tars between."""
    blocks = [data[i : i + 512] for i in range(0, len(data) - 2048, 512)]
    others = [tar[i : i + 512] for tar in TARS for i in range(0, 4096, 512)]
    for kind, place, *more in changes:
        headers = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
        if kind == "field" and headers:
            (start, length), value, right = more
            at = headers[place % len(headers)]
            block = blocks[at]
            value = value[:length].ljust(length, b"\0")
            block = block[:start] + value + block[start + length :]
            blocks[at] = checked(block) if right else block
        elif kind == "block":
            blocks.insert(place % (len(blocks) + 1), others[more[0] % len(others)])
    return b"".join(blocks) + bytes(2048)


def whole_samples(path: str) -> list[RawSample]:
    return list(read_samples(path))


def the_same_rows(path: str) -> None:
    """However a shard is read, its samples have the same positions, or it is told to be broken."""
    scan = answer(scan_shard, path, error=ShardError)
    keys = answer(lambda: list(scan_keys(path)), error=ShardError)
    found = answer(whole_samples, path, error=ShardError)
    answer(lambda: list(locate_files(path)), error=ShardError)
    assert (scan is None) == (keys is None)
    samples = scan.samples if scan else 20
    if found is not None and scan is not None:
        assert len(found) == scan.samples == len({position for position, _, _ in keys})
        assert [sample.key for sample in found] == list({position: key for position, key, _ in keys}.values())
    runs = [list(read_run(path, start, samples, Wanted(max_bytes=10_000))) for start in (0, samples // 2)]
    assert [position for position, _ in runs[0]] == list(range(samples))
    for (_, one), (_, other) in zip(runs[0][samples // 2 :], runs[1], strict=True):
        if isinstance(one, RawSample) and isinstance(other, RawSample):
            assert one == other
    with open(path, "rb") as file:  # as over http
        there = answer(lambda: list(_grouped(StreamTar(path, file, None))), error=ShardError)
    if there is not None and keys is not None:
        assert [(position, key, suffix) for position, key, suffix, _ in there] == keys


def test_tars(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    def target(base: int, changes: list[Change], of_bytes: list[Change], zipped: bool) -> None:
        data = changed_tar(TARS[base % len(TARS)], changes)
        if zipped:
            data = gzip.compress(data, 1)
        path.write_bytes(changed_bytes(data, of_bytes[:2] if not changes or zipped else of_bytes[:0]))
        the_same_rows(str(path))

    fuzz(
        target,
        500,
        base=places,
        changes=tar_changes,
        of_bytes=byte_changes,
        zipped=st.sampled_from([False] * 5 + [True]),
    )


# Manifests


def test_manifests(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", (3, 4))
    path = folder / "manifest.json"
    document = json.loads(path.read_text())

    def target(changes: list[Change], of_bytes: list[Change], honest: bool) -> None:
        found = changed_document(document, changes)
        if honest and isinstance(found, dict):  # as other tools would write it
            found["digest"] = digest_of(found.get("shards"))
        path.write_bytes(changed_bytes(json.dumps(found).encode(), of_bytes))
        manifest = answer(read_manifest, str(path))
        if manifest is not None:
            assert all(0 <= row <= manifest.num_samples for row in manifest.offsets)
        answer(open_source, str(folder))

    of_bytes = st.one_of(st.just([]), byte_changes)
    fuzz(target, 500, changes=document_changes, of_bytes=of_bytes, honest=st.booleans())


def digest_of(shards: Any) -> str:
    try:
        return Manifest(tuple(Shard(**entry) for entry in shards)).digest
    except (TypeError, AttributeError, ValueError):
        return ""


# Settings

YAML = ["{a: 1}", "[1, [2]]", "!!set {a}", "? ", "'", '"', "2024-01-01", "1e999", "0x1F"]


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    shipped = [yaml.safe_load(file.read_text()) for file in shipped_configs().values()]
    whole = yaml.safe_load(dump_config(load_config(None, ["data.train=x"])))
    from vlcl.config.errors import keys_of

    keys = [key.path for key in keys_of(Config)]
    overrides = st.lists(
        st.builds(
            lambda key, equals, value: key + equals + value,
            st.sampled_from([*keys, *keys, "data", "loss", "", "x.y", "data.train.x", "trian.steps"]),
            st.sampled_from(["="] * 6 + ["", "==", ": "]),
            st.one_of(st.sampled_from([*TEXTS, *YAML]),
                      values.map(lambda value: json.dumps(value)[:300])),
        ),
        max_size=3,
    )  # fmt: skip

    def target(base: int, changes: list[Change], of_bytes: list[Change], more: list[str]) -> None:
        document = changed_document(whole if base % 3 == 0 else shipped[base % len(shipped)], changes)
        text = json.dumps(document) if base % 2 else yaml.safe_dump(document, allow_unicode=True)
        path.write_bytes(changed_bytes(text.encode("utf-8", "surrogatepass"), of_bytes))
        config = answer(load_config, path, more)
        if config is not None:
            path.write_text(dump_config(config), encoding="utf-8")
            assert dump_config(load_config(path)) == dump_config(config)

    fuzz(
        target,
        250,
        base=places,
        changes=document_changes,
        of_bytes=st.one_of(st.just([]), byte_changes),
        more=overrides,
    )
