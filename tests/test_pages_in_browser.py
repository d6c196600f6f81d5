"""The pages that people open, in a real browser: no console error, nothing sticks out, letters that can be read, at the
widths of a phone and of a laptop. Skipped, with a word, where there is no Chromium."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from browser import NAMES, WIDTHS, Seen, find_browser, look
from odd_shards import make_odd
from test_eval_report import record, zeroshot
from test_report import examples, make_run

from vlcl.report.page import save_examples, write_report
from vlcl_data_prep import show, stats, stats_page
from vlcl_data_prep.samples import open_samples
from vlcl_data_prep.tokens import Inputs
from vlcl_eval.report.page import write_report as write_evaluation

PAGES = ("report", "show", "stats", "evaluation")
SMALLEST = 8.0  # CSS pixels of the letters


def make_pages(folder: Path) -> dict[str, str]:
    """Each page in its full length, with the longest words that it may have to show."""
    name = "a_run_with_a_name_that_has_no_place_to_break_and_goes_on_for_longer_than_a_phone_is_wide"
    run = make_run(folder / name, loss={f"setting_{n}": n / 7 for n in range(24)})
    save_examples(run, *examples())
    pages = {"report": write_report(run).read_text()}
    samples = open_samples([str(make_odd(folder / "shards"))])
    show.write_page(str(folder / "show.html"), samples, samples.indexed(), range(15), "all")
    found = stats.stats_of(samples.config, samples.urls(), 1, tokens=False, progress=False)
    found.tally.tokens = Counter({9: 3, 77: 2})
    found.tally.truncated = 2
    found = dataclasses.replace(found, inputs=Inputs(224, 77, "shortest"))
    stats_page.write_page(str(folder / "stats.html"), samples, found)
    pages |= {name: (folder / f"{name}.html").read_text() for name in ("show", "stats")}
    shots = (5, 20, 50, "full")
    records = [
        record(dataset, 50.0 + seed + len(model), shots=count, seed=seed, model=model)
        for model in ("emoji", "a-model-with-a-long-name/of-an-organization")
        for dataset in ("mnist", "dtd", "oxford-iiit-pets")
        for count in shots
        for seed in range(3)
    ]
    write_evaluation([*records, zeroshot(), zeroshot("dtd")], folder / "evaluation")
    return pages | {"evaluation": (folder / "evaluation" / "report.html").read_text()}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Seen]:
    browser = find_browser()
    if browser is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(NAMES)}")
    folder = tmp_path_factory.mktemp("pages")
    return look(browser, make_pages(folder), folder)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read(seen: Mapping[str, Seen], name: str, width: int) -> None:
    page = seen[f"{name} {width}"]
    assert page.errors == []
    assert page.wide == []
    assert width - 20 <= page.width <= width  # a scroll bar
    assert page.scroll_width <= page.width
    assert page.height > 900
    assert page.images
    assert not page.broken
    assert page.small >= SMALLEST, page.small_text


def test_what_is_wrong_with_a_page_is_seen(tmp_path: Path) -> None:
    """So that the test above can fail."""
    browser = find_browser()
    if browser is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(NAMES)}")
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:">'
    pages = {
        "wide": '<div style="width:700px">out of it</div>',
        "scrolls": '<div style="overflow-x:auto"><div style="width:700px">inside</div></div>',
        "script": f"{policy}<script>document.title = 'x'</script>words",
        "small": '<p style="font-size:5px">for ants</p>',
        "broken": '<img src="data:image/png;base64,AAAA">',
    }
    found = look(browser, pages, tmp_path, (400,))
    assert found["wide 400"].scroll_width == 700 + 8
    assert found["wide 400"].wide == ["DIV: out of it"]
    assert found["scrolls 400"].scroll_width <= 400
    assert found["scrolls 400"].wide == []
    assert any("Content Security Policy" in line for line in found["script 400"].errors)
    assert (found["small 400"].small, found["small 400"].small_text) == (5, "for ants")
    assert found["broken 400"].broken == 1
