"""`vlcl data show`: the page has every caption, and pictures as training's decoder gives them."""

import base64
import io
import json
import re
import sys

import pytest
from odd_shards import LONG, NASTY, make_odd
from PIL import Image
from test_report import Page
from typer.testing import CliRunner

from vlcl import cli
from vlcl.data.decode import decode_image
from vlcl.errors import UserError
from vlcl_data_prep.pages import share
from vlcl_data_prep.samples import open_samples
from vlcl_data_prep.show import draw_rows, parse_rows, split_arguments


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return make_odd(tmp_path_factory.mktemp("odd") / "shards")


def show(*arguments):
    # a mistake is the exception itself: run_command would end this process
    return CliRunner().invoke(cli.app, ["data", "show", *map(str, arguments)], catch_exceptions=True)


def articles(text):
    return re.findall(r"<article.*?</article>", text, re.DOTALL)


def test_all_captions_of_all_samples_are_shown_and_the_bad_with_their_reasons(odd, tmp_path):
    done = show(odd, "0-14", "--output", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert "15 of 15 samples, 4 that training leaves out" in done.output
    text = (tmp_path / "page.html").read_text()
    cards = [Page(card).text for card in articles(text)]
    assert [card.count("row ") for card in cards] == [1] * 15
    assert all(card.startswith(f"row {row} {row:04d} ") for row, card in enumerate(cards) if row not in (11, 12, 14))
    for row, words in {
        0: ["640 × 480", "JPEG, RGB", "00000.tar at 0", "a disc on a gradient"],
        2: [NASTY, "PNG, RGBA", "transparency laid on white"],
        3: ["CMYK made RGB", "ein Bild für den Druck"],
        4: ["100 × 200", "turned by its EXIF orientation", "turned standing upright a third caption"],
        5: [LONG],
        7: ["with .seg.png, .txt"],
        8: ["the caption that is left", "left out: caption too long (30,000 > 20,000 characters)"],
        11: ["broken image", "row 11", "cut short"],
        12: ["not an image (starts with b'<html>404</html>')", "a page"],
        13: ["no caption (has jpg, json; looked for txt)", "640 × 480"],
        14: ["no image", "a caption alone"],
    }.items():
        for word in words:
            assert word in cards[row], (row, word)
    assert {"script", "link", "iframe"}.isdisjoint(Page(text).tags)


def test_pictures_are_those_of_trainings_decoder(odd, tmp_path):
    from odd_shards import odd_samples

    assert show(odd, "2,4", "--set", "data.background=black", "--output", tmp_path / "p.html").exit_code == 0
    samples = list(odd_samples())
    for card, data in zip(articles((tmp_path / "p.html").read_text()), (samples[2]["png"], samples[4]["jpg"])):
        shown = Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([^\"]+)", card)[0]))).convert("RGB")
        right = decode_image(data, background="black")
        right.thumbnail((224, 224), Image.Resampling.LANCZOS)
        assert shown.size == right.size
        difference = [abs(a - b) for a, b in zip(shown.resize((8, 8)).tobytes(), right.resize((8, 8)).tobytes())]
        assert max(difference) <= 6  # JPEG


def test_a_run_is_shown_by_its_config_and_rows_come_from_a_file(odd, tmp_path):
    run = tmp_path / "run"
    (run / "anomalies").mkdir(parents=True)
    (run / "config.yaml").write_text(f"data: {{train: {odd}, val: {odd}, json_text_key: caption, text_lines: true}}\n")
    (run / "anomalies" / "step-00000012.json").write_text(json.dumps({"step": 12, "rows": [13, 0]}))
    done = show(run, run / "anomalies" / "step-00000012.json")
    assert done.exit_code == 0, done.output
    first, second = (Page(card).text for card in articles((run / "show.html").read_text()))  # in the file's order
    assert "elsewhere" in first
    assert "no caption (has jpg, txt; looked for json)" in second
    assert show(run, "--split", "val", "3").exit_code == 0
    with pytest.raises(UserError, match=r"has no data\.test; choose another with --split"):
        open_samples([str(run)], "test")


def test_a_random_sample_is_the_seeds(odd, tmp_path):
    rows = draw_rows(1000, 20, seed=3)
    assert rows == draw_rows(1000, 20, seed=3) == sorted(set(rows))
    assert rows != draw_rows(1000, 20, seed=4)
    assert draw_rows(5, 20, seed=0) == [0, 1, 2, 3, 4]
    done = show(odd, "--count", "3", "--output", tmp_path / "p.html")
    assert "3 of 15 samples" in done.output
    assert len(articles((tmp_path / "p.html").read_text())) == 3


def test_rows_as_people_write_them(tmp_path):
    assert parse_rows("0-3,9,2", 20) == [0, 1, 2, 3, 9]
    assert parse_rows("5,17", 20) == [5, 17]
    for text, message in (
        ("20", "row 20 of '20' is not there: rows are 0 to 19"),
        ("9-3", "is no row and no range"),
        ("3--5", "is no row and no range"),
        ("0-6000", "at most 5,000"),
    ):
        with pytest.raises(UserError, match=message):
            parse_rows(text, 20)
    for content, message in (
        ("[1, 2", "is not JSON"),
        ('{"rows": []}', "has no list of rows"),
        ('{"rows": [1.5]}', "must look like"),
        ('{"rows": [true]}', "must look like"),
    ):
        (tmp_path / "rows.json").write_text(content)
        with pytest.raises(UserError, match=message):
            parse_rows(str(tmp_path / "rows.json"), 20)
    with pytest.raises(UserError, match="cannot be read"):
        parse_rows(str(tmp_path / "none.json"), 20)


def test_what_is_there_is_no_list_of_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_arguments(["a", "5"]) == (["a"], "5")
    (tmp_path / "5").mkdir()
    assert split_arguments(["a", "5"]) == (["a", "5"], "")
    assert split_arguments(["5"]) == (["5"], "")
    assert split_arguments(["a.tar", "b.tar"]) == (["a.tar", "b.tar"], "")


def test_a_shard_that_breaks_off_is_told_on_the_card(tmp_path):
    folder = make_odd(tmp_path / "shards")
    whole = (folder / "00001.tar").read_bytes()
    samples = open_samples([str(folder)])
    rows = samples.indexed()
    (folder / "00001.tar").write_bytes(whole[:1024])
    found = dict(rows.read([0, 8, 14], wanted_for(samples)))
    assert getattr(found[0], "key", None) == "0000"
    assert [getattr(found[row], "reason", None) for row in (8, 14)] == ["unreadable shard"] * 2


def wanted_for(samples):
    from vlcl.config.samples import keys_of, limits_of
    from vlcl.data.decode import wanted_files

    return wanted_files(keys_of(samples.config.data), limits_of(samples.config.data))


def test_rows_apart_in_one_shard_are_found(tmp_path):
    """Far ones are looked for anew, near ones read past."""
    from shards import make_shards

    samples = open_samples([str(make_shards(tmp_path / "many", (300, 40)))])
    wanted = [0, 1, 70, 199, 299, 300, 339]
    found = list(samples.indexed().read(wanted, wanted_for(samples)))
    assert [(row, getattr(sample, "key", None)) for row, sample in found] == [(row, f"{row:06d}") for row in wanted]


def test_mistakes_are_told(odd, tmp_path):
    for arguments, message in (
        ([tmp_path / "none"], "no shards match"),
        ([odd, "--set", "data.bakground=black"], "data.bakground"),
        ([odd, "--output", tmp_path / "no" / "x.html"], "give --output HTML"),
        ([odd, "--limit", "max_pixel=3"], "max_pixels"),
    ):
        done = show(*arguments)
        assert done.exit_code == 2, done.output
        assert message in done.output, done.output
        assert "Traceback" not in done.output


def test_no_torch_is_needed():
    """In a process of its own: this one may have it."""
    import subprocess

    code = "import sys, vlcl_data_prep.show; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_shares_say_neither_none_of_some_nor_all_of_most():
    assert [share(n, 10_000) for n in (0, 1, 1234, 5000, 9999, 10_000)] == [
        "0%", "<0.1%", "12.3%", "50.0%", ">99.9%", "100%"
    ]  # fmt: skip
    assert share(0, 0) == "0%"
