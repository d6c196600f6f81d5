"""The report of a run, from real run folders. Run: pytest tests/test_report.py"""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

from vlcl.errors import UserError
from vlcl.logs import RunLog
from vlcl.report.page import (
    Hit,
    ImageExample,
    RetrievalExample,
    examples_as_text,
    retrieval_grid,
    save_examples,
    write_report,
)
from vlcl.report.pictures import load_examples

NASTY = '<script>alert("x")</script> & a cat'
GREEN = (0x17, 0x8A, 0x4C)


def picture(color, size=(72, 72)):
    return Image.new("RGB", size, color)


def examples():
    hits = [Hit(picture(c), f"{c} square", 0.9 - 0.1 * i, c == "blue") for i, c in enumerate(["red", "blue", "gray"])]
    found = RetrievalExample(NASTY, 2, picture("blue"), hits)
    missed = RetrievalExample('an "orange" square', 1284, picture("orange"), [h for h in hits if not h.is_true])
    query = ImageExample(
        picture("navy", (640, 200)), "a wide navy bar", [(NASTY, 0.7, False), ("a wide navy bar", 0.6, True)]
    )
    return [found, missed], [query]


def make_run(run_dir, total=40, last=40, loss=None):
    config = {
        "data": {"train": "shards/{0000..0331}.tar"}, "model": {"name": "ViT-Ti-16-64"},
        "loss": {"name": "em", "gamma": 0.8, **(loss or {})}, "train": {"batch_size": 256, "output": str(run_dir)},
    }  # fmt: skip
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    (run_dir / "environment.json").write_text(
        json.dumps({"pairs": 11342, "val_pairs": 1260, "gpus": ["<H100>"] * 8, "world_size": 8})
    )
    with RunLog(run_dir, [], config, total, enabled=True) as log:
        for step in range(10, last + 1, 10):
            log.metrics(step, {
                "train/loss": 9 - step / 10, "train/infonce": 5 - step / 10, "train/logit_scale": 14.3,
                "train/lr": 1e-3, "train/drift": 0.1, "train/first_visits": 0.0,
                "speed/samples_per_second": 400.0 + step,
                "speed/data_wait": 0.03, "data/skipped": 7, "data/skipped/broken <image>": 5,
                "data/skipped/no caption": 2,
            })  # fmt: skip
            recall = 0.5 if step == 20 else 0.4
            log.metrics(
                step, {"val/image_to_text_R@1": recall, "val/image_to_text_R@5": 0.6, "val/zeroshot_top1": 0.333}
            )
    return run_dir


class Page(HTMLParser):
    """Tags and visible text of a page; fails on a tag that is closed wrongly."""

    VOID = ("meta", "img", "path", "use", "rect")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.sources, self.alts = [], [], [], [], []
        self.feed(text)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        self.alts += [value for name, value in attrs if name == "alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def test_the_numbers_of_a_finished_run_are_on_the_page(tmp_path):
    run = make_run(tmp_path / "cc3m-em")
    page = Page(write_report(run).read_text())
    for text in (
        "cc3m-em", "ViT-Ti-16-64", "11,342", "shards/{0000..0331}.tar", "gamma 0.8", "8 × <H100>",
        "finished · 40 steps", "40.0 %", "R@5 60.0%", "best 50.0% at step 20", "33.3 %", "among 1,260 held-out pairs",
        "5.000", "in-batch InfoNCE 1.000", "425 samples / s, median", "Normalizer drift", "First visits",
        "broken <image> 5 no caption 2 all 7",
        f"accelerate launch --num_processes 8 -m vlcl.train {run}/config.yaml train.output={run} resume=latest",
        f"vlcl eval elevater {run} --data-root DIR",
    ):  # fmt: skip
        assert text in page.text, text
    assert page.tags.count("svg") == 9  # one each: recall, zero-shot, losses, scale, lr, drift, visits, speed, wait


def test_the_page_loads_and_runs_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    save_examples(run, *examples())
    text = write_report(run).read_text()
    page = Page(text)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert "#0101" not in text  # every colour of a figure became one of the page


def test_captions_are_escaped_and_examples_shown(tmp_path):
    run = make_run(tmp_path / "run")
    save_examples(run, *examples())
    text = write_report(run).read_text()
    page = Page(text)
    assert "<script" not in text
    assert NASTY + " rank 2" in page.text
    assert 'an "orange" square rank 1,284' in page.text
    assert page.alts[5:] == ['an "orange" square', "a wide navy bar"]
    assert page.tags.count("img") == 3 + 2 + 1 + 1  # hits, hits, the missed picture, the query picture
    assert text.count('class="hit good"') == 1
    assert text.count('class="hit good apart"') == 1
    assert '<li class="good"><span>a wide navy bar</span><b>0.60</b></li>' in text


def test_examples_come_back_from_the_folder_as_small_pictures(tmp_path):
    text_examples, image_examples = examples()
    save_examples(tmp_path, text_examples, image_examples)
    loaded_texts, loaded_images = load_examples(tmp_path)
    assert [(e.caption, e.true_rank) for e in loaded_texts] == [(NASTY, 2), ('an "orange" square', 1284)]
    assert [(h.caption, h.score, h.is_true) for h in loaded_texts[0].hits] == [
        (h.caption, h.score, h.is_true) for h in text_examples[0].hits
    ]
    assert loaded_texts[0].hits[1].image.getpixel((5, 5)) == (0, 0, 255)
    assert loaded_images[0].image.size == (128, 40)
    assert loaded_images[0].hits == image_examples[0].hits
    stored = {path.name for path in (tmp_path / "examples").glob("*.png")}
    assert len(stored) == 5  # red, blue, gray, orange, navy: each once
    save_examples(tmp_path, [], image_examples)
    assert len(list((tmp_path / "examples").glob("*.png"))) == 1


def test_grid_frames_the_right_picture_in_green(tmp_path):
    text_examples, _ = examples()
    save_examples(tmp_path, text_examples, [])
    with Image.open(tmp_path / "retrieval.png") as both:
        retrieval_grid(text_examples[:1], tmp_path / "one.png", "title")
        with Image.open(tmp_path / "one.png") as one:
            assert both.height > one.height
            assert both.width > one.width  # a column for the right picture that was missed
            middle = [one.getpixel((x, 280)) for x in range(one.width)]
    blue = [x for x, color in enumerate(middle) if color == (0, 0, 255)]
    green = [x for x, color in enumerate(middle) if color == GREEN]
    assert len(blue) == 192  # an icon of 72 px fills its cell
    assert green
    assert min(green) < min(blue) < max(blue) < max(green)
    assert max(green) - min(green) < 230  # one frame, round the blue picture alone


def test_transparent_and_odd_pictures_and_captions_draw(tmp_path):
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    thin = Image.new("L", (3, 900), 128)
    example = RetrievalExample(
        "word" * 60 + "\x1b[31m\n" + "много слов " * 40, 1, None, [Hit(clear, "", 1.0, False), Hit(thin, "", 0, True)]
    )
    save_examples(tmp_path, [example], [ImageExample(clear, "", [])])
    loaded, _ = load_examples(tmp_path)
    assert loaded[0].hits[0].image.getpixel((0, 0)) == (255, 255, 255)
    assert (tmp_path / "retrieval.png").is_file()


def test_text_version_names_the_right_one_and_cannot_steer_a_terminal():
    text_examples, image_examples = examples()
    text = examples_as_text([*text_examples, RetrievalExample("a\x1b[2J\nb", 1, None, [])], image_examples)
    assert "  ->  1. red square 0.90  2. blue square 0.80 [right]  3. gray square 0.70" in text
    assert "(right one: rank 1284)" in text
    assert "[a wide navy bar]  ->" in text
    assert "2. a wide navy bar 0.60 [right]" in text
    assert "\x1b" not in text
    assert len(text.splitlines()) == 2 + 3 + 1
    assert examples_as_text([], []) == ""


def test_a_chart_of_one_step_has_one_number_below(tmp_path):
    from vlcl.metrics import IMAGE_TO_TEXT
    from vlcl.report.figures import draw

    chart = draw(IMAGE_TO_TEXT, [{"step": 3330, "val/image_to_text_R@1": 0.1}])
    assert chart
    assert chart.count("3,330") == 1
    assert len(re.findall(r">[\d,]{3,}<", chart)) == 1


def test_no_number_stands_twice_beside_a_chart():
    """Where a run logged one step, or hardly changed."""
    from vlcl.metrics import FIGURES
    from vlcl.report.figures import draw

    by_title = {figure.title: figure for figure in FIGURES}
    for title, values in (
        ("Logit scale", [1000.1, 1000.4]), ("Losses", [123456.7]), ("Image to text", [0.1]), ("Gradient norm", [0.0]),
        ("Throughput", [425.0]), ("Learning rate", [1e-5]),
    ):  # fmt: skip
        name = by_title[title].metrics[0].name
        chart = draw(by_title[title], [{"step": 99_999 + n, name: value} for n, value in enumerate(values)])
        assert chart
        numbers = re.findall(r'text-anchor: end[^>]*x="[\d.]+"[^>]*>([^<]+)<', chart)
        assert len(numbers) > 2
        assert len(set(numbers)) == len(numbers), (title, numbers)


def test_many_settings_of_a_loss_stand_in_columns(tmp_path):
    run = make_run(tmp_path / "run", loss={"eps": 1e-08, "rate": 1 / 7, "order": "after", "nothing": None})
    text = write_report(run).read_text()
    assert '<div class="wide"><dt>Loss settings</dt><dd class="settings"><span>eps <b>1e-08</b></span>' in text
    assert "gamma 0.8 order after rate 0.142857" in Page(text).text  # without those that are null
    assert "nothing" not in text.partition("<details")[0]


def test_the_numbers_beside_a_chart_have_room(tmp_path):
    """They end where the axes begin; the longer, the further to the right."""
    from vlcl.metrics import FIGURES
    from vlcl.report.figures import draw

    for figure in FIGURES:
        for high in (1e-5, 1.0, 123456.0):
            chart = draw(figure, [{"step": n, figure.metrics[0].name: high * n / 9} for n in range(1, 10)])
            assert chart
            places = re.findall(r'text-anchor: end[^>]*x="([\d.]+)"[^>]*>([^<]+)<', chart)
            assert len(places) > 2
            for x, text in places:
                assert float(x) - 6.2 * len(text) > 16, (figure.title, text, x)  # points; the words beside take 16


def test_a_run_with_one_line_and_nothing_else_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "train/loss": 3.5, "train/infonce": null}\n{"step": 20, "tr')
    page = Page(write_report(tmp_path).read_text())
    assert "step 10" in page.text
    assert "No held-out evaluation" in page.text
    assert "no count of skipped samples" in page.text
    assert page.tags.count("svg") == 1


def test_an_interrupted_run_says_how_far_it_came(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run", total=1300, last=20)).read_text())
    assert "step 20 of 1,300" in page.text
    assert "finished" not in page.text


def test_no_skipped_samples_is_said(tmp_path):
    with RunLog(tmp_path, [], {}, 10, enabled=True) as log:
        log.metrics(10, {"data/skipped": 0})
    assert "None: every sample read was used." in Page(write_report(tmp_path).read_text()).text


def test_a_long_run_makes_a_small_page(tmp_path):
    lines = (json.dumps({"step": step, "train/loss": step % 7, "train/lr": 1e-3}) for step in range(1, 20001))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert write_report(tmp_path).stat().st_size < 150_000


def test_no_metrics_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
