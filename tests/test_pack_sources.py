"""`vlcl data pack` from lists as people have them: encodings, blanks, several files, folders, globs, JSON, data sets of
Hugging Face; and lists of addresses, which are answered with what to type."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import typer
from test_pack import captions_in, image_bytes, write_list
from typer.testing import CliRunner

from vlcl.errors import UserError
from vlcl_data_prep.pack import pack, pack_shards

TEXTS = [f"café, naïve {i}" for i in range(6)]
ROWS = "".join(f"img/{i}.jpg;{text}\n" for i, text in enumerate(TEXTS))


def pack_command(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(pack)
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("name", ["list.csv", "list.csv.gz", "list.json"])
def test_encodings_are_seen_or_named(tmp_path: Path, encoding: str, name: str) -> None:
    text = f"filepath;title\n{ROWS}"
    if name == "list.json":
        text = json.dumps([{"image": f"img/{i}.jpg", "caption": t} for i, t in enumerate(TEXTS)], ensure_ascii=False)
    source = write_list(tmp_path, name, "")
    source.write_bytes(gzip.compress(text.encode(encoding)) if name.endswith(".gz") else text.encode(encoding))
    assert pack_shards(source, tmp_path / "out", encoding=encoding if encoding == "cp1252" else None).skipped == {}
    assert captions_in(tmp_path / "out") == TEXTS


def test_another_encoding_is_named_with_what_to_type(tmp_path: Path) -> None:
    source = write_list(tmp_path, "list.csv", "")
    source.write_bytes(f"filepath;title\n{ROWS}".encode("cp1252"))
    with pytest.raises(UserError, match=r"6 caption is not UTF-8.*--encoding cp1252"):
        pack_shards(source, tmp_path / "out")
    good = "".join(f"img/{i}.jpg;a cup {i}\n" for i in range(6))
    source.write_bytes(f"filepath;title\n{good}".encode() + b"img/0.jpg;caf\xe9\n")
    assert "skipped.tsv. If the list is not UTF-8" in pack_command(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"is not ascii: .*name another with --encoding"):
        pack_shards(source, tmp_path / "again", encoding="ascii")
    with pytest.raises(UserError, match=r"--encoding 'klingon' is none that Python knows"):
        pack_shards(source, tmp_path / "again", encoding="klingon")


def test_a_blank_after_the_comma_belongs_to_no_field(tmp_path: Path) -> None:
    rows = "".join(f'img/{i}.jpg, "a cup, red", {i}\n' for i in range(5)) + "img/5.jpg,  plain, 5\n"
    pack_shards(write_list(tmp_path, "list.csv", f"filepath, title, id\n{rows}"), tmp_path / "out")
    assert captions_in(tmp_path / "out") == ["a cup, red"] * 5 + ["plain"]
    kept = "".join(f"img/{i}.jpg, a cup\n" for i in range(6))  # the header has none: theirs are text
    pack_shards(write_list(tmp_path, "kept.csv", f"filepath,title\n{kept}"), tmp_path / "kept")
    assert captions_in(tmp_path / "kept") == [" a cup"] * 6


def part(folder: Path, name: str, numbers: range) -> Path:
    """A list of some pictures beside it, in the kind that its name says; captions "NAME i"."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image": f"{i}.jpg", "caption": f"{name.partition('.')[0]} {i}"} for i in numbers]
    for i in numbers:
        (folder / f"{i}.jpg").write_bytes(image_bytes(size=(40 + i, 30)))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if ".csv" in name:
        text = "image,caption\n" + "".join(f"{row['image']},{row['caption']}\n" for row in rows)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    else:
        (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder / name


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_several_lists_and_globs_and_folders_of_them(tmp_path: Path, kind: str) -> None:
    """Each with its pictures beside it, in folders within folders."""
    lists = [part(tmp_path / "s" / name, f"{name}{kind}", range(3 * n, 3 * n + 3)) for n, name in enumerate("ab")]
    expected = ["a 0", "a 1", "a 2", "b 3", "b 4", "b 5"]
    folder = [tmp_path / "s"] if kind != ".json" else []  # one beside each picture, it might be
    for number, sources in enumerate(
        [lists, [tmp_path / "s" / "*" / f"*{kind}"], [tmp_path / "s" / "**" / f"?{kind}"], folder]
    ):
        if sources:
            out = tmp_path / f"out{number}"
            assert "caption from 'caption', of 2 lists" in pack_command(*sources, out)
            assert captions_in(out) == expected
    assert pack_shards(lists[::-1], tmp_path / "turned").pairs == 6
    assert captions_in(tmp_path / "turned")[0] == "b 3"
    with pytest.raises(UserError, match=r"nothing matches '.*\*\.tsv'"):
        pack_shards(tmp_path / "s" / "*.tsv", tmp_path / "none")


def test_lists_with_other_columns_are_refused(tmp_path: Path) -> None:
    first = part(tmp_path, "a.csv", range(3))
    (tmp_path / "b.csv").write_text("image,words\n0.jpg,x\n")
    with pytest.raises(UserError, match=r"b\.csv has no column 'caption', which a\.csv has"):
        pack_shards([first, tmp_path / "b.csv"], tmp_path / "out")


def test_texts_beside_pictures_as_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "src" / "deep" / "er").mkdir(parents=True)
    names = {
        "a.jpg": "a.txt",
        "B.JPG": "B.TXT",
        "c.jpg": "c.jpg.txt",
        "deep/er/d.png": "deep/er/D.Txt",
        "e.jpeg": "E.JPEG.TXT",
    }
    for number, (picture, text) in enumerate(names.items()):
        kind = "PNG" if picture.endswith("png") else "JPEG"
        (tmp_path / "src" / picture).write_bytes(image_bytes(kind, size=(40 + number, 30)))
        (tmp_path / "src" / text).write_text(f"{picture}\n")
    assert pack_shards(tmp_path / "src", tmp_path / "out").skipped == {}
    assert sorted(captions_in(tmp_path / "out")) == sorted(names)


@pytest.fixture
def data_set() -> datasets.Dataset:
    rows = {"image": [{"bytes": image_bytes(size=(40 + i, 30)), "path": None} for i in range(6)], "text": TEXTS}
    return datasets.Dataset.from_dict(
        rows, features=datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    )


def test_a_folder_of_save_to_disk(tmp_path: Path, data_set: datasets.Dataset) -> None:
    data_set.save_to_disk(str(tmp_path / "one"))
    assert pack_shards(tmp_path / "one", tmp_path / "out").taken == "image from 'image', caption from 'text'"
    assert captions_in(tmp_path / "out") == TEXTS
    both = datasets.DatasetDict({"first": data_set, "second": data_set.select([4, 5])})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"no split 'train'; it has: first, second\. Name one with --split"):
        pack_shards(tmp_path / "both", tmp_path / "none")
    pack_command(tmp_path / "both", tmp_path / "second", "--split", "second")
    assert captions_in(tmp_path / "second") == TEXTS[4:]


def test_parquet_exports_and_names_of_the_hub(
    tmp_path: Path, data_set: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "export" / "data").mkdir(parents=True)
    data_set.to_parquet(str(tmp_path / "export" / "data" / "train-00000-of-00001.parquet"))
    (tmp_path / "export" / "README.md").write_text("card")
    pack_shards(tmp_path / "export", tmp_path / "out")
    assert captions_in(tmp_path / "out") == TEXTS
    asked = []

    def load(path: str, config: str | None) -> datasets.DatasetDict:
        asked.append((path, config))
        return datasets.DatasetDict({"train": data_set})

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load)
        pack_shards("hf:someone/pairs:small", tmp_path / "hub")
    assert asked == [("someone/pairs", "small")]
    assert captions_in(tmp_path / "hub") == TEXTS
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="hf:x cannot be opened: ZeroDivisionError"):
        pack_shards("hf:x", tmp_path / "none")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'vlcl\[hf\]'"):
        pack_shards("hf:x", tmp_path / "none")


def test_addresses_are_answered_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    list_ = tmp_path / "my list.csv"
    for header in ("URL,TEXT", "image,caption"):
        list_.write_text(f"{header}\nhttps://a.org/1.jpg,a cup\n")
        column, caption = header.split(",")
        with pytest.raises(UserError, match="which pack does not fetch") as error:
            pack_shards(list_, tmp_path / "out")
        words = shlex.split(str(error.value).splitlines()[-1])
        assert words[:5] == ["img2dataset", "--url_list", str(list_), "--input_format", "csv"]
        assert words[5:9] == ["--url_col", column, "--caption_col", caption]
        assert words[-4:] == ["vlcl", "data", "index", "SHARDS"]
    pyarrow.parquet.write_table(pyarrow.table({"url": ["http://a/1.jpg"], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"--input_format parquet --url_col url --caption_col caption"):
        pack_shards(tmp_path / "a.parquet", tmp_path / "out")


def test_a_list_without_a_header_is_told_how_to_get_one(tmp_path: Path) -> None:
    """CC3M's: the command that is printed is run, and what it makes is answered with the one printed with it."""
    list_ = tmp_path / "cc3m.tsv"
    list_.write_text('a very "typical" bus\thttp://a.org/1.jpg\nit\'s a cup\thttps://b.org/2.jpg?x=1&y=2\n')
    with pytest.raises(UserError, match="has no line with the names of its columns") as error:
        pack_shards(list_, tmp_path / "out")
    _, put, fetch = str(error.value).splitlines()
    subprocess.run(put, shell=True, check=True)
    headed = tmp_path / "headed-cc3m.tsv"
    assert headed.read_text() == f"caption\turl\n{list_.read_text()}"
    with pytest.raises(UserError, match="which pack does not fetch") as again:
        pack_shards(headed, tmp_path / "out")
    assert str(again.value).splitlines()[-1].strip() == fetch.strip()
    assert "--input_format tsv --url_col url --caption_col caption" in fetch
    plain = write_list(tmp_path, "plain.csv", "".join(f"img/{i}.jpg,a cup {i}\n" for i in range(6)))
    with pytest.raises(UserError, match=r"vlcl data pack .*headed-plain\.csv OUT") as told:
        pack_shards(plain, tmp_path / "out")
    subprocess.run(str(told.value).splitlines()[1], shell=True, check=True)
    assert pack_shards(tmp_path / "headed-plain.csv", tmp_path / "out").pairs == 6
