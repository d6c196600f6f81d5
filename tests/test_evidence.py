"""The trainings behind docs/evidence.md: their studies can be run, and no line of their results was edited by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from vlcl.compare.grid import Grid, check_grid, make_cells, with_length
from vlcl.compare.results import ResultsFile, fingerprint_of
from vlcl.config import load_config

FOLDER = Path(__file__).parents[1] / "benchmarks" / "evidence"
RUN = runpy.run_path(str(FOLDER / "run.py"))
LINES = RUN["RESULTS"].read_text().splitlines() if RUN["RESULTS"].exists() else []


@pytest.mark.parametrize("name", RUN["STUDIES"])
def test_a_study_has_no_mistake(name: str) -> None:
    study = RUN["STUDIES"][name]
    config = str(FOLDER / study.config)
    grid = Grid(
        config, study.losses, study.batch_sizes, tuple(range(study.seeds)), RUN["RATES"], None, None, study.overrides
    )
    check_grid(grid)
    assert len(make_cells(grid, load_config(config, study.overrides))) >= len(study.losses) * len(study.lrs)


def test_every_result_is_of_the_settings_that_it_names() -> None:
    assert LINES
    for line in LINES:
        found = json.loads(line)
        assert fingerprint_of(found["settings"], found["data"]) == found["fingerprint"], found["cell"]
        shown = [name for name in found["metrics"] if name.startswith("test/") and name.endswith(("R@1", "knn_top1"))]
        assert shown, found["cell"]
        scores = [found["metrics"][name] for name in shown]
        assert all(0 <= score <= 1 for score in scores), found["cell"]


def test_what_has_run_is_found_by_its_study() -> None:
    """Whatever has become a setting since, or has another default where it does not count."""
    study = RUN["STUDIES"]["gain"]
    base = load_config(str(FOLDER / study.config), study.overrides)
    grid = Grid(
        str(FOLDER / study.config), study.losses, study.batch_sizes, (0, 1, 2), study.lrs, None, None, study.overrides,
        scale_lr="sqrt",
    )  # fmt: skip
    line = json.loads(LINES[0])
    cells = [with_length(cell, base, 450_560) for cell in make_cells(grid, base)]
    file = ResultsFile(RUN["RESULTS"], cells, line["data"], "fp32")
    found = [file.result(cell, ("test/image_to_text_R@1",), ("test/image_to_text_R@1",)).is_over for cell in cells]
    assert found == [True] * 9


def test_an_emoji_has_one_number_whoever_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script: dict[str, Any] = runpy.run_path(str(FOLDER / "label_emoji.py"))
    drawn = {vendor: ["b", "a", "c"][number % 2 :] for number, vendor in enumerate(script["VENDORS"])}
    for vendor, keys in drawn.items():
        (folder := tmp_path / script["SOURCE"] / vendor).mkdir(parents=True)
        with TarWriter(str(folder / "00000.tar")) as tar:
            for key in keys:
                tar.write({"__key__": key, "png": f"{key} by {vendor}".encode(), "txt": key})
    monkeypatch.chdir(tmp_path)
    script["main"]()
    for vendor, keys in drawn.items():
        [shard] = (tmp_path / script["TARGET"] / vendor).glob("*.tar")
        found = {x["__key__"]: (x["png"].decode(), int(x["cls"])) for x in WebDataset(str(shard), shardshuffle=False)}
        assert found == {key: (f"{key} by {vendor}", "abc".index(key)) for key in keys}
        assert (shard.parent / "manifest.json").is_file()


def test_the_end_of_a_text_has_the_largest_id() -> None:
    """open_clip's text tower takes the features there."""
    maker: dict[str, Any] = runpy.run_path(str(FOLDER / "make_tokenizer.py"))
    tokenizer = maker["make"](["grinning face", "face with tears of joy"])
    ids = tokenizer("face")["input_ids"]
    assert ids[-1] == len(tokenizer) - 1 == max(ids)
