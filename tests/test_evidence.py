"""The trainings behind docs/evidence.md: their studies can be run, and no line of their results was edited by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
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


def test_the_locked_trunk_computes_patch_features() -> None:
    """Layer by layer what it is said to be: filters, rectified, averaged over a grid, components, both signs."""
    script: dict[str, Any] = runpy.run_path(str(FOLDER / "make_patches.py"))
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = F.avg_pool2d(images, 3, 1, 1)  # neighbours have something in common
    weight, bias = script["filters_of"](images, torch.Generator().manual_seed(1))
    mean, components = script["components_of"](script["pooled"](images, weight, bias))
    trunk = timm.create_model(f"local-dir:{FOLDER / 'locked' / 'trunk'}", pretrained=False).eval()
    script["write_into"](trunk, weight, bias, mean, components)
    found = trunk(images[:5])
    for image, feature_F in zip(images, found):
        whole = F.pad(image, (3, 3, 3, 3))
        seen = torch.stack([  # filters at every second pixel, one by one
            torch.stack([(whole[:, y : y + 7, x : x + 7] * weight).sum((1, 2, 3)) for x in range(0, 32, 2)])
            for y in range(0, 32, 2)
        ])  # fmt: skip
        most = F.max_pool2d((seen.permute(2, 0, 1) + bias[:, None, None]).relu()[None], 3, 2, 1)
        grid = F.avg_pool2d(most, 2)[0]
        component_C = (components * (grid - mean)).sum((1, 2, 3))
        expected_F = torch.cat([component_C, -component_C]).relu()
        torch.testing.assert_close(feature_F, expected_F, rtol=1e-2, atol=1e-2 * float(expected_F.std()))


def test_what_memory_brings_is_taken_at_the_rate_that_was_chosen() -> None:
    script: dict[str, Any] = runpy.run_path(str(FOLDER / "draw_memory.py"))

    def line(
        label: str,
        lr: float,
        seed: int,
        shown: float,
        chooses: float,
        gamma: float = 0.5,
        ratio: float = 0.05,
        form: str = "absolute",
        **others: str,
    ) -> dict[str, Any]:
        metrics = dict.fromkeys(script["SHOWN"], shown) | {script["CHOOSES"]: chooses}
        settings = {"model.name": "local-dir:benchmarks/evidence/model", "loss.gamma": gamma}
        settings |= {"optim.logit_scale_ratio": ratio, "loss.name": label.partition(":")[0]}
        settings |= {"loss.form": form} if settings["loss.name"] == "em" else {}
        settings |= {f"loss.{key}": value for key, value in others.items()}
        return {"label": label, "lr": lr, "seed": seed, "metrics": metrics, "settings": settings, "batch_size": 16,
                "samples": 168_960, "data": {"train": "230add7c..."}}  # fmt: skip

    lines = [
        line("dcl", 1e-3, 0, 0.05, 0.2), line("dcl", 2e-3, 0, 0.09, 0.1), line("dcl", 1e-3, 1, 0.06, 0.1),
        line("em", 1e-3, 0, 0.01, 0.1), line("em:form=absolute", 2e-3, 0, 0.07, 0.2), line("em", 2e-3, 1, 0.05, 0.3),
        line("em", 4e-3, 0, 0.5, 0.9, gamma=0.9), line("infonce", 1e-3, 0, 0.5, 0.9),
        line("em", 4e-3, 0, 0.5, 0.9, ratio=0.2),  # of the default before
        line("em", 4e-3, 0, 0.5, 0.9, form="relative"),  # of another
        line("em", 4e-3, 0, 0.5, 0.9, mode="sample"), line("dcl", 4e-3, 0, 0.5, 0.9, same_caption="ignore"),
    ]  # fmt: skip
    (point,) = script["points"](lines)
    assert (point.pairs, point.epochs, point.batch_size) == (11_355, 15, 16)
    assert point.gains == pytest.approx((2.0, -1.0))
    assert point.level == pytest.approx(5.5)
