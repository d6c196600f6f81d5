"""`vlcl data pack`: every kind of source gives the same pairs, and no bad row is lost without a word."""

import csv
import gzip
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import typer
from PIL import Image
from shards import content_of, read_members
from typer.testing import CliRunner

from vlcl import cli
from vlcl.data import decode
from vlcl.data.decode import DEFAULT_LIMITS
from vlcl.data.manifest import open_source
from vlcl.errors import UserError
from vlcl_data_prep.pack import pack, pack_shards

CAPTIONS = [
    "a plain one",
    'with "quotes", commas; and\ta tab',
    "two\nlines\r\nand a third",
    "日本語のキャプション — naïve café 🐈‍⬛",
    "  spaces kept  ",
    "'",
]


def image_bytes(kind: str = "JPEG", size: tuple[int, int] = (40, 30), mode: str = "RGB", **save) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind, **save)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> list[bytes]:
    """src/img/0.jpg ..., one a caption, each different."""
    (tmp_path / "src" / "img").mkdir(parents=True)
    contents = [image_bytes(size=(40 + i, 30)) for i in range(len(CAPTIONS))]
    for i, content in enumerate(contents):
        (tmp_path / "src" / "img" / f"{i}.jpg").write_bytes(content)
    return contents


def write_table(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def packed(folder: Path) -> list[tuple[str, str, bytes, str]]:
    """(key, extension, image, caption) in order."""
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = [(member.name, content_of(tar, member)) for member in tar]
        for (name, image), (text_name, text) in zip(members[::2], members[1::2]):
            key, _, extension = name.partition(".")
            assert text_name == f"{key}.txt"
            found.append((key, extension, image, text.decode()))
    return found


def as_packed(
    images: list[bytes], captions: list[str] = CAPTIONS, as_they_are: bool = False
) -> list[tuple[str, str, bytes, str]]:
    """In a list, a line break within a caption becomes a space: in a shard a line is a caption."""
    texts = [caption if as_they_are else " ".join(caption.splitlines()) for caption in captions]
    return [(f"{i:09d}", "jpg", image, text) for i, (image, text) in enumerate(zip(images, texts))]


def test_csv_tsv_jsonl_and_parquet_give_exactly_the_same_pairs(tmp_path: Path, images: list[bytes]):
    rows = [{"filepath": f"img/{i}.jpg", "other": "x", "title": caption} for i, caption in enumerate(CAPTIONS)]
    src = tmp_path / "src"
    (src / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), src / "a.parquet")
    sources = [write_table(src / "a.csv", rows), write_table(src / "a.tsv", rows, "\t")]
    for source in (*sources, src / "a.jsonl", src / "a.parquet"):
        out = tmp_path / f"out{source.suffix}"
        summary = pack_shards(source, out, samples_per_shard=4)
        assert packed(out) == as_packed(images)
        assert (summary.pairs, summary.shards, dict(summary.skipped)) == (6, 2, {})
        assert summary.taken == "image from 'filepath', caption from 'title'"
        assert open_source(str(out)).manifest.num_samples == 6
        assert {path.name for path in out.iterdir()} == {"00000.tar", "00001.tar", "manifest.json"}


def test_a_folder_of_images_with_text_files(tmp_path: Path, images: list[bytes]):
    src = tmp_path / "src"
    for i, caption in enumerate(CAPTIONS):
        (src / "img" / f"{i}.txt").write_bytes(caption.encode() + b"\n")
    (src / "z").mkdir()
    (src / "z" / "alone.png").write_bytes(image_bytes("PNG"))
    summary = pack_shards(src, tmp_path / "out")
    assert packed(tmp_path / "out") == as_packed(images, as_they_are=True)
    assert dict(summary.skipped) == {"no .txt beside the image": 1}
    assert (tmp_path / "out" / "skipped.tsv").read_text().splitlines()[1] == "6\tno .txt beside the image\tz/alone.png"


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_with_images_inside(tmp_path: Path, images: list[bytes], as_struct: bool):
    column = [{"bytes": image, "path": None} if as_struct else image for image in images]
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "text": CAPTIONS}), tmp_path / "a.parquet")
    pack_shards(tmp_path / "a.parquet", tmp_path / "out")
    assert packed(tmp_path / "out") == as_packed(images)


def test_absolute_paths_and_named_columns(tmp_path: Path, images: list[bytes]):
    rows = [{"where": str(tmp_path / "src" / "img" / f"{i}.jpg"), "words": text} for i, text in enumerate(CAPTIONS)]
    source = write_table(tmp_path / "elsewhere.csv", rows, "|")
    pack_shards(source, tmp_path / "out", image_key="where", caption_key="words", separator="|")
    assert packed(tmp_path / "out") == as_packed(images)


def test_bad_rows_are_skipped_counted_and_listed_and_keep_their_number(tmp_path: Path, images: list[bytes]):
    src = tmp_path / "src"
    (src / "img" / "bad.jpg").write_bytes(b"<html>not found</html>")
    good = "".join(f"img/{i}.jpg,good {i}\n" for i in range(6))
    bad = 'img/none.jpg,gone\nimg/bad.jpg,broken\nimg/0.jpg,"  \n"\nimg/0.jpg,too,many\n,nothing\n'
    (src / "a.csv").write_bytes(b"\xef\xbb\xbffilepath,title\n" + bad.encode() + b"img/0.jpg,caf\xe9\n" + good.encode())
    summary = pack_shards(src / "a.csv", tmp_path / "out")
    assert dict(summary.skipped) == {
        "missing file": 1,
        "not an image": 1,
        "empty caption": 1,
        "wrong number of fields": 1,
        "no image": 1,
        "caption is not UTF-8": 1,
    }
    assert [(key, caption) for key, _, _, caption in packed(tmp_path / "out")] == [
        (f"{6 + i:09d}", f"good {i}") for i in range(6)
    ]
    listed = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    assert listed[:3] == ["row\treason\timage", "0\tmissing file\timg/none.jpg", "1\tnot an image\timg/bad.jpg"]
    assert len(listed) == 7


def test_bad_json_lines_are_skipped(tmp_path: Path, images: list[bytes]):
    lines = ['{"image": "img/0.jpg", "caption": "fine"}', "{", "[1]", '{"image": "img/1.jpg"}', ""]
    lines += ['{"image": "img/1.jpg", "caption": 3}', r'{"image": "img/1.jpg", "caption": "\ud800"}']
    lines += [f'{{"image": "img/{i}.jpg", "caption": "fine"}}' for i in range(1, 6)]
    (tmp_path / "src" / "a.jsonl").write_text("\n".join(lines))
    assert dict(pack_shards(tmp_path / "src" / "a.jsonl", tmp_path / "out").skipped) == {
        "not a JSON object": 2,
        "column missing in this row": 1,
        "caption is not text": 1,
        "caption is not UTF-8": 1,
    }
    assert len(packed(tmp_path / "out")) == 6


def test_mostly_bad_writes_nothing_and_keeps_the_old_set(tmp_path: Path, images: list[bytes]):
    rows = [{"filepath": f"img/{i}.jpg", "title": "x"} for i in range(20)]
    source = write_table(tmp_path / "src" / "a.csv", rows)
    with pytest.raises(UserError, match=r"(?s)14 of 20 rows .* \(14 missing file\); nothing was written.*img/6\.jpg"):
        pack_shards(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    pack_shards(write_table(tmp_path / "src" / "good.csv", rows[:6]), tmp_path / "out")
    before = packed(tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        pack_shards(tmp_path / "src" / "good.csv", tmp_path / "out")
    with pytest.raises(UserError, match="nothing was written"):
        pack_shards(source, tmp_path / "out", overwrite=True)
    assert packed(tmp_path / "out") == before
    pack_shards(write_table(tmp_path / "src" / "good.csv", rows[:2]), tmp_path / "out", overwrite=True)
    assert packed(tmp_path / "out") == [(key, extension, image, "x") for key, extension, image, _ in before[:2]]


def test_half_bad_is_still_packed(tmp_path: Path, images: list[bytes]):
    rows = [{"filepath": f"img/{i}.jpg", "title": "x"} for i in range(12)]
    assert pack_shards(write_table(tmp_path / "src" / "a.csv", rows), tmp_path / "out").pairs == 6


@pytest.mark.parametrize(
    ("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "png"), ("BMP", "png")]
)
def test_the_extension_follows_the_content_and_what_training_reads_is_kept(tmp_path: Path, kind: str, extension: str):
    content = image_bytes(kind)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "misnamed.jpg").write_bytes(content)
    (tmp_path / "src" / "misnamed.txt").write_text("x")
    pack_shards(tmp_path / "src", tmp_path / "out")
    [(_, found, stored, _)] = packed(tmp_path / "out")
    assert found == extension
    if kind in ("GIF", "BMP"):
        assert Image.open(io.BytesIO(stored)).convert("RGB").tobytes() == (
            Image.open(io.BytesIO(content)).convert("RGB").tobytes()
        )
    else:
        assert stored == content


def test_resize(tmp_path: Path):
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side: the camera was turned
    contents = {
        "0 large": image_bytes(size=(80, 40)),
        "1 small": image_bytes(size=(50, 20)),
        "2 turned": image_bytes(size=(80, 40), exif=turned),
        "3 png": image_bytes("PNG", (40, 80), "LA"),
        "4 webp": image_bytes("WEBP", (80, 40), "RGBA"),
        "5 larger": image_bytes(size=(163, 201), exif=turned),  # decoded at a part of its size
    }
    (tmp_path / "src").mkdir()
    for name, content in contents.items():
        (tmp_path / "src" / f"{name}.jpg").write_bytes(content)
        (tmp_path / "src" / f"{name}.txt").write_text(name)
    pack_shards(tmp_path / "src", tmp_path / "out", resize=20)
    stored = [(extension, Image.open(io.BytesIO(image)), image) for _, extension, image, _ in packed(tmp_path / "out")]
    assert [(extension, image.format, image.size) for extension, image, _ in stored] == [
        ("jpg", "JPEG", (40, 20)),
        ("jpg", "JPEG", (50, 20)),
        ("jpg", "JPEG", (20, 40)),
        ("png", "PNG", (20, 40)),
        ("jpg", "JPEG", (40, 20)),
        ("jpg", "JPEG", (25, 20)),
    ]
    assert stored[1][2] == contents["1 small"]
    assert stored[3][1].mode == "RGBA"


def test_sources_stream(tmp_path: Path, images: list[bytes]):
    """The first shard is on disk before the source's last rows were asked for."""
    from vlcl_data_prep import pack as module
    from vlcl_data_prep.pack_part import pack_part
    from vlcl_data_prep.rows import Row, Source

    def rows():
        for number in range(400):
            if number == 300:
                assert (tmp_path / "out" / "00000.tar").exists()
            yield Row(images[0], "x")

    (tmp_path / "out").mkdir()
    parts = module._parts(Source(rows(), tmp_path, ""), 100, listed=False)
    assert [pack_part(part, str(tmp_path / "out"), None, DEFAULT_LIMITS).pairs for part in parts] == [100] * 4


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            "url,title\nx,y\n",
            {},
            r"none of the usual columns filepath, .*it has: url, title\. Name one with --image-key",
        ),
        ("filepath,words\nx,y\n", {}, "Name one with --caption-key"),
        ("filepath,title\nx,y\n", {"image_key": "img"}, r"no column 'img'; it has: filepath, title"),
        ("filepath#title\nx#y\n", {}, r"or the separator with --separator"),
        ("filepath,title\nx,y\n", {"separator": "::"}, "one character"),
        ("filepath,title\n", {}, "no rows"),
        ("", {}, "no rows"),
        ("filepath,title\nx,y\n", {"resize": 0}, "--resize 0"),
        ("filepath,title\nx,y\n", {"samples_per_shard": 0}, "--samples-per-shard 0"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str, options: dict, message: str):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        pack_shards(tmp_path / "a.csv", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_sources_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, message in [
        ("none.csv", "does not exist"),
        ("a.xlsx", "unknown kind '.xlsx'"),
        ("a.parquet", "not a Parq"),
    ]:
        if name != "none.csv":
            (tmp_path / name).write_bytes(b"PK junk, longer than a footer")
        with pytest.raises(UserError, match=message):
            pack_shards(tmp_path / name, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no rows"):
        pack_shards(tmp_path / "empty", tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'vlcl\[parquet\]'"):
        pack_shards(tmp_path / "a.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packing_into_the_source_folder_is_refused(tmp_path: Path, images: list[bytes]):
    with pytest.raises(UserError, match="left alone"):
        pack_shards(tmp_path / "src", tmp_path / "src", overwrite=True)
    assert len(list((tmp_path / "src" / "img").iterdir())) == 6


def test_the_command_says_what_was_taken_and_what_is_next(tmp_path: Path, images: list[bytes]):
    rows = [{"image": f"img/{i}.jpg", "caption": "x"} for i in range(7)]
    source = write_table(tmp_path / "src" / "a.csv", rows)
    app = typer.Typer()
    app.command()(pack)
    result = CliRunner().invoke(app, [str(source), str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0
    assert "image from 'image', caption from 'caption'" in result.stdout
    assert "packed: 6 pairs in 1 shard in" in result.stdout
    assert "skipped: 1 missing file" in result.stdout
    assert f"data.train={tmp_path / 'out'}" in result.stdout


STRAY = ('"Hi," says the sign', '"open quote', "a red cup", '9" plate', 'cup "big', "the last")


def captions_in(folder: Path) -> list[str]:
    return [files["txt"].decode() for _, files in sorted(read_members(folder).items())]


def write_list(folder: Path, name: str, text: str) -> Path:
    """A list beside six pictures."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for i in range(6):
        (folder / "img" / f"{i}.jpg").write_bytes(image_bytes(size=(40 + i, 30)))
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / name


def test_stray_quotes_in_a_table_with_tabs_are_text(tmp_path: Path) -> None:
    rows = "".join(f"img/{i}.jpg\t{text}\n" for i, text in enumerate(STRAY))
    source = write_list(tmp_path, "list.tsv", "filepath\ttitle\n" + rows)
    assert pack_shards(source, tmp_path / "out").skipped == {}
    assert captions_in(tmp_path / "out") == list(STRAY)


@pytest.mark.parametrize("name", ["list.csv.gz", "list.TSV.gz", "list.jsonl.gz"])
def test_lists_may_be_compressed(tmp_path: Path, name: str) -> None:
    tab = "\t" if "tsv" in name.lower() else ","
    text = "".join(f"img/{i}.jpg{tab}text {i}\n" for i in range(6))
    if "jsonl" in name:
        text = "".join(json.dumps({"image": f"img/{i}.jpg", "caption": f"text {i}"}) + "\n" for i in range(6))
    else:
        text = f"filepath{tab}title\n{text}"
    source = write_list(tmp_path, name, text)
    assert pack_shards(source, tmp_path / "out").pairs == 6
    assert captions_in(tmp_path / "out") == [f"text {i}" for i in range(6)]
    source.write_bytes(source.read_bytes()[:-12])
    with pytest.raises(UserError, match="is damaged; nothing was written"):
        pack_shards(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_another_separator_is_seen_in_the_first_line(tmp_path: Path, separator: str) -> None:
    rows = "".join(f"img/{i}.jpg{separator}a cup, number {i}\n" for i in range(6))
    source = write_list(tmp_path, "list.csv", f"filepath{separator}title\n{rows}")
    pack_shards(source, tmp_path / "out")
    assert captions_in(tmp_path / "out") == [f"a cup, number {i}" for i in range(6)]


def test_a_folder_of_parquet_parts_is_one_table(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for part in range(3):
        rows = range(2 * part, 2 * part + 2)
        images = [{"bytes": image_bytes(size=(40 + i, 30)), "path": f"{i}.jpg"} for i in rows]
        table = pyarrow.table({"image": images, "caption": [f"text {i}" for i in rows]})
        pyarrow.parquet.write_table(table, tmp_path / "parts" / f"train-{part:05d}.parquet")
    pack_shards(tmp_path / "parts", tmp_path / "out")
    assert captions_in(tmp_path / "out") == [f"text {i}" for i in range(6)]
    pyarrow.parquet.write_table(pyarrow.table({"other": [1]}), tmp_path / "parts" / "train-00009.parquet")
    with pytest.raises(UserError, match=r"train-00009\.parquet has no column '(caption|image)'"):
        pack_shards(tmp_path / "parts", tmp_path / "again")


def test_a_picture_too_large_for_pillow_is_too_large_and_warns_of_nothing(tmp_path: Path, recwarn) -> None:
    """Over its limit Pillow warns, over twice its limit it raises: either way the reason is the one of training."""
    for number, side in enumerate((9_600, 14_000)):
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        (tmp_path / f"{number}.png").write_bytes(png + struct.pack(">I", 0) + b"IDAT")
    (tmp_path / "2.png").write_bytes(image_bytes("PNG"))
    rows = [{"image": f"{name}.png", "caption": "x"} for name in (0, 1, 2, 2)]
    source = write_table(tmp_path / "list.csv", rows)
    decode._pillow.cache_clear()  # which turns Pillow's warning off, once a process: pytest has turned it on again
    assert pack_shards(source, tmp_path / "out").skipped == {"image too large": 2}
    assert [str(one.message) for one in recwarn] == []


def test_captions_in_a_json_are_told_with_what_to_type(tmp_path: Path, images: list[bytes], caplog) -> None:
    """pack says it itself, so the index beneath it has no doubts; verify says so where it was not told the key."""
    rows = [{"image": f"img/{i}.jpg", "title": f"a {i}", "keywords": "cup, red"} for i in range(6)]
    source = write_table(tmp_path / "src" / "a.csv", rows)
    app = typer.Typer()
    app.command()(pack)
    keys = ["--caption-key", "title", "--caption-key", "keywords"]
    result = CliRunner().invoke(app, [str(source), str(tmp_path / "out"), *keys], catch_exceptions=False)
    assert caplog.messages == []
    assert f"look: vlcl data show {tmp_path / 'out'} --json-text-key title --json-text-key keywords\n" in result.stdout
    command = ["data", "verify", str(tmp_path / "out"), "--workers", "1"]
    said = CliRunner().invoke(cli.app, command)
    assert said.exit_code == 1
    assert "captions in a .json are read with --json-text-key KEY" in said.output
    said = CliRunner().invoke(cli.app, [*command, "--json-text-key", "title", "--json-text-key", "keywords"])
    assert (said.exit_code, "1 shard, 0 problems" in said.output) == (0, True)
    assert "are read with" not in said.output
