"""The builder of the icon sets, on small packages of the real layout that lie in its cache."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from shards import read_members, write_npm_package
from typer.testing import CliRunner

from vlcl.data.manifest import open_source
from vlcl.errors import UserError
from vlcl_data_prep import icons as module
from vlcl_data_prep.icon_sets import LICENCES, SPLITS, TEST, TRAIN, VAL
from vlcl_data_prep.icons import Naming, build_icons, caption_of, list_icons, naming_of
from vlcl_data_prep.npm import AT_A_TIME, fetch_packages
from vlcl_data_prep.shards import replacing

SQUARE = '<path fill="currentColor" d="M4 4h16v16H4z"/>'
BAR = '<path stroke="currentColor" stroke-width="4" d="M4 12h16"/>'
RED = '<path fill="#f00" d="M4 4h16v16H4z"/>'
NOTHING = "<g></g>"
SMALL_SPLITS = {"train": {"alpha": "1.0.0", "beta": "1.0.0"}, "val": {"gamma": "1.0.0"}, "test": {"delta": "2.0.0"}}
DRAWN = {
    "alpha": {"home": SQUARE, "home-outline": BAR, "arrow-left": BAR, "empty": NOTHING},
    "beta": {"house": SQUARE, "home-24-filled": RED},
    "gamma": {"home": BAR, "empty": SQUARE, "never-seen": SQUARE},
    "delta": {"arrow-left-2": SQUARE, "house-sharp": BAR},
}


def package_of(drawn: dict[str, str], **collection) -> dict:
    icons = {name: {"body": body} for name, body in drawn.items()}
    info = {
        "name": "A Set",
        "author": {"name": "A. Hand", "url": "https://example.org"},
        "license": {"title": "MIT", "spdx": "MIT"},
    }
    return {"icons": {"icons": icons, "width": 24, "height": 24, **collection}, "info": info, "metadata": {}}


def write_package(cache: Path, name: str, version: str, without: str = "") -> None:
    files = {f"{member}.json": json.dumps(content).encode() for member, content in package_of(DRAWN[name]).items()}
    files.pop(without, None)
    write_npm_package(cache / f"iconify-json-{name}-{version}.tgz", files)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "SPLITS", SMALL_SPLITS)
    for sets in SMALL_SPLITS.values():
        for name, version in sets.items():
            write_package(tmp_path / "cache", name, version)
    return tmp_path / "cache"


def pairs_of(folder: Path) -> list[tuple[str, str, str]]:
    """Set, name and caption, sorted."""
    found = []
    for sample in read_members(folder).values():
        about = json.loads(sample["json"])
        found.append((about["set"], about["name"], sample["txt"].decode()))
    return sorted(found)


def test_held_out_sets_have_the_captions_of_training(tmp_path: Path, cache: Path):
    summary = build_icons(tmp_path / "set", cache=cache, workers=1)
    assert pairs_of(tmp_path / "set" / "train") == [
        ("alpha", "arrow-left", "arrow left"),
        ("alpha", "home", "home"),
        ("beta", "home-24-filled", "home"),
        ("beta", "house", "house"),
    ]
    assert pairs_of(tmp_path / "set" / "val") == [("gamma", "home", "home")]  # training's "empty" shows nothing
    assert pairs_of(tmp_path / "set" / "test") == [
        ("delta", "arrow-left-2", "arrow left"),
        ("delta", "house-sharp", "house"),
    ]
    assert (summary.unseen, summary.undrawable) == (2, 1)
    for split, pairs in {"train": 4, "val": 1, "test": 2}.items():
        assert open_source(str(tmp_path / "set" / split)).manifest.num_samples == summary.pairs(split) == pairs


def test_pictures_are_black_on_white_or_have_their_colours(tmp_path: Path, cache: Path):
    build_icons(tmp_path / "set", size=48, cache=cache, workers=1)
    samples = read_members(tmp_path / "set" / "train").values()
    pictures = {json.loads(one["json"])["name"]: Image.open(io.BytesIO(one["png"])) for one in samples}
    for picture in pictures.values():
        assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (48, 48), (255, 255, 255))
    assert pictures["home"].getpixel((24, 24)) == (0, 0, 0)
    assert pictures["home-24-filled"].getpixel((24, 24)) == (255, 0, 0)


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path, cache: Path):
    for workers in (1, 2):
        build_icons(tmp_path / str(workers), cache=cache, workers=workers)
    for split in SMALL_SPLITS:
        one, two = ([path.read_bytes() for path in sorted((tmp_path / w / split).glob("*.tar"))] for w in "12")
        assert one == two


def test_a_wide_icon_lies_in_the_middle_of_a_square():
    package = package_of({"bar": '<path fill="currentColor" d="M0 0h48v24H0z"/>'}, width=48)
    (icon,) = list_icons("alpha", package)
    from vlcl_data_prep.svg import draw_svg

    png = draw_svg(icon.svg, 64)
    assert png is not None
    picture = Image.open(io.BytesIO(png))
    assert [picture.getpixel((32, y)) for y in (8, 32, 56)] == [(255,) * 3, (0,) * 3, (255,) * 3]
    assert picture.getpixel((1, 32)) == picture.getpixel((62, 32)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("heart-rounded-24-outline", "heart"),
        ("arrow-left-2", "arrow left"),
        ("user-02", "user"),
        ("chart-24px", "chart"),
        ("dice-6", "dice 6"),
        ("battery-10-24-outline", "battery 10"),
        ("battery-24-outline", "battery"),
        ("number-3-filled", "number 3"),
        ("brand-github", "github"),
        ("github-logo-fill", "github"),
        ("logo", "logo"),
        ("24-hours", "24 hours"),
        ("outline", "outline"),
        ("2", "2"),
        ("baseline-home", "home"),
        ("baseline", "baseline"),
        ("home-baseline", "home baseline"),
    ],
)
def test_captions(name: str, caption: str):
    naming = naming_of(
        ["home-fill"], {"suffixes": {"24-outline": "24"}, "prefixes": {"baseline": "Filled", "": "Other"}}
    )
    assert caption_of(name, naming) == caption


def test_a_word_that_may_be_content_is_a_style_where_the_set_uses_it_so():
    content = ["traffic-light", *(f"thing-{number}" for number in range(30))]
    assert "light" not in naming_of(content, {}).styles
    assert "light" in naming_of(content, {"suffixes": {"24-light": "24px light"}}).styles
    assert "light" in naming_of([*content, "home-light-24"], {}).styles
    assert "outline" in Naming().styles


def test_of_several_drawings_with_one_caption_the_plainest_name_is_taken():
    names = ["home", "home-outline", "bell-16-filled", "bell-24-filled", "bell-24-regular", "box-2", "box-3-solid"]
    icons = list_icons("alpha", package_of(dict.fromkeys(names, SQUARE)))
    assert [(icon.caption, icon.name) for icon in icons] == [
        ("bell", "bell-24-regular"),
        ("box", "box-2"),
        ("home", "home"),
    ]


def test_aliases_hidden_and_animated_icons_are_no_pairs():
    package = package_of({"home": SQUARE, "old": SQUARE, "spin": '<path d="M4 4h9"><animate dur="1s"/></path>'})
    package["icons"]["icons"]["old"]["hidden"] = True
    package["icons"]["aliases"] = {"house": {"parent": "home"}}
    assert [icon.caption for icon in list_icons("alpha", package)] == ["home"]


def test_authors_and_licences_lie_beside_the_shards(tmp_path: Path, cache: Path):
    build_icons(tmp_path / "set", cache=cache, workers=1)
    lines = (tmp_path / "set" / "test" / "ATTRIBUTION.txt").read_text().splitlines()
    assert lines[-1].split("\t") == [
        "A Set", "@iconify-json/delta 2.0.0", "2", "A. Hand", "MIT", "https://example.org"
    ]  # fmt: skip
    assert "alpha" in (tmp_path / "set" / "train" / "ATTRIBUTION.txt").read_text()


def test_a_failure_leaves_all_three_as_they_were(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    build_icons(tmp_path / "set", cache=cache, workers=1)
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--overwrite"):
        build_icons(tmp_path / "set", cache=cache, workers=1)
    write_package(cache, "delta", "2.0.0", without="info.json")
    with pytest.raises(UserError, match=r"no info\.json; delete it"):
        build_icons(tmp_path / "set", cache=cache, workers=1, overwrite=True)
    write_package(cache, "delta", "2.0.0")

    def fail_at_test(sets: list) -> str:
        if sets[0].name == "delta":
            raise OSError("disk full")
        return ""

    monkeypatch.setattr(module, "_attribution", fail_at_test)
    with pytest.raises(UserError, match="disk full; nothing there has changed"):
        build_icons(tmp_path / "set", size=32, cache=cache, workers=1, overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()} == before


def test_wrong_values_and_a_missing_renderer_are_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="--size 4"):
        build_icons(tmp_path / "set", size=4)
    with pytest.raises(UserError, match="--workers 0"):
        build_icons(tmp_path / "set", workers=0)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"pip install 'vlcl\[demo\]'"):
        build_icons(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_packages_are_fetched_some_at_a_time_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packages = [(f"@iconify-json/set{number}", "1.0.0") for number in range(AT_A_TIME + 3)]
    calls, npm = tmp_path / "calls", tmp_path / "npm"
    # pack SPEC... --pack-destination FOLDER; the network is down for set12
    npm.write_text(f"""#!/bin/sh
shift
echo "$@" >> {calls}
for folder; do :; done
while [ "$1" != --pack-destination ]; do
    name=${{1#@iconify-json/}}
    [ "$name" = set12@1.0.0 ] && {{ echo "npm error network is down" >&2; exit 1; }}
    echo > "$folder/iconify-json-${{name%@1.0.0}}-1.0.0.tgz"
    shift
done
""")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"set12@1\.0\.0` failed.*network is down"):
        list(fetch_packages(packages, tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == AT_A_TIME
    found = list(fetch_packages(packages[:-1], tmp_path / "cache"))
    assert [path.name for path in found] == [f"iconify-json-set{number}-1.0.0.tgz" for number in range(AT_A_TIME + 2)]
    assert [line.count("@1.0.0") for line in calls.read_text().splitlines()] == [AT_A_TIME, 3, 2]
    npm.unlink()
    with pytest.raises(UserError, match=r"npm is not on PATH and .*set12-1\.0\.0\.tgz is absent"):
        list(fetch_packages(packages, tmp_path / "cache"))


def test_a_set_of_another_licence_is_not_taken(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LICENCES", LICENCES - {"MIT"})
    with pytest.raises(AssertionError, match="alpha is under MIT"):
        build_icons(tmp_path / "set", cache=cache, workers=1)


def test_the_real_sets_are_many_and_on_one_side_each():
    assert len(TRAIN) >= 40
    names = [name for sets in SPLITS.values() for name in sets]
    assert len(names) == len(set(names))
    assert not {"lucide", "feather", "meteor-icons"} & set(names)  # near to the sets of val and test
    assert len(VAL) == len(TEST) == 1


def test_the_command_says_what_it_made(tmp_path: Path, cache: Path):
    import typer

    app = typer.Typer()
    app.command()(module.icons)
    result = CliRunner().invoke(app, [str(tmp_path / "set"), "--cache", str(cache)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "train: 4 pairs of 2 sets in" in result.stdout
    assert "test:  2 pairs of delta in" in result.stdout
    assert "2 of val and test whose caption is not in train, 1 blank" in result.stdout
    assert "MIT 4" in result.stdout


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_a_file_in_the_way_of_the_folder_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"/file is a file; give a folder"), replacing(tmp_path / name, overwrite=True):
        pytest.fail("nothing may be made")
    assert (tmp_path / "file").read_text() == "not a folder"
