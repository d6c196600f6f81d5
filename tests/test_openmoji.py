"""The OpenMoji builder on a part of the real set, and the writing of shards that all builders share."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from shards import read_members

from vlcl.data.manifest import open_source
from vlcl.errors import UserError
from vlcl_data_prep.openmoji import base_of, build_openmoji, caption_of
from vlcl_data_prep.shards import even_shards, replacing, write_shards


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("openmoji") / "set"
    return out, build_openmoji(out, size=32, holdout=0.25, workers=2, limit=120)


def test_builds_both_splits_with_manifests(built):
    out, summary = built
    train, val = read_members(out / "train"), read_members(out / "val")
    assert (summary.train, summary.val) == (len(train), len(val))
    assert summary.train + summary.val == 120
    assert 30 <= summary.val <= 45  # a quarter, and at most one whole emoji more
    assert summary.unnamed > 500
    assert len(list((out / "train").glob("*.tar"))) == 8
    assert open_source(str(out / "train")).manifest.num_samples == len(train)
    assert open_source(str(out / "val")).manifest.num_samples == len(val)
    assert "CC BY-SA 4.0" in (out / "ATTRIBUTION.txt").read_text()


def test_pictures_are_drawn_on_white(built):
    out, _ = built
    for sample in read_members(out / "val").values():
        image = Image.open(io.BytesIO(sample["png"]))
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert len(image.getcolors(32 * 32) or []) > 1


def test_no_emoji_is_on_both_sides(built):
    out, _ = built
    bases = [
        {json.loads(sample["json"])["base"] for sample in read_members(out / split).values()}
        for split in ("train", "val")
    ]
    assert bases[0]
    assert bases[1]
    assert not bases[0] & bases[1]


def test_same_seed_same_bytes_other_seed_other_split(tmp_path: Path):
    build_openmoji(tmp_path / "a", size=16, seed=1, workers=1, limit=40)
    build_openmoji(tmp_path / "b", size=16, seed=1, workers=2, limit=40)
    build_openmoji(tmp_path / "c", size=16, seed=2, workers=2, limit=40)
    tars = [
        {name: data for name, data in files_of(tmp_path / one).items() if name.endswith(".tar")}
        for one in ("a", "b", "c")
    ]
    assert tars[0] == tars[1]
    assert tars[0] != tars[2]


@pytest.mark.parametrize(
    ("name", "codepoints", "caption", "base"),
    [
        ("thumbs_up_medium_skin_tone", [0x1F44D, 0x1F3FD], "thumbs up: medium skin tone", "thumbs up"),
        ("man_light_skin_tone_red_hair", [0x1F468, 0x1F3FB], "man red hair: light skin tone", "red hair"),
        ("kiss_woman_man", [0x1F469], "kiss: woman, man", "kiss"),
        (
            "couple_with_heart_man_man_light_skin_tone_medium-dark_skin_tone",
            [0x1F468],
            "couple with heart: man, man, light skin tone, medium-dark skin tone",
            "couple with heart",
        ),
        ("woman’s_hat", [0x1F452], "woman's hat", "woman’s hat"),
        ("man", [0x1F468], "man", "man"),
        ("Côte_d’Ivoire", [0x1F1E8, 0x1F1EE], "flag of Côte d'Ivoire", "Côte d’Ivoire"),
        ("Scotland", [0x1F3F4, 0xE0067, 0xE007F], "flag of Scotland", "Scotland"),
    ],
)
def test_captions_are_natural_text(name: str, codepoints: list[int], caption: str, base: str):
    assert caption_of(name, codepoints) == caption
    assert base_of(name) == base


@pytest.mark.parametrize(
    ("wrong", "text"), [({"size": 0}, "--size 0"), ({"holdout": 1.0}, "--holdout 1.0"), ({"workers": 0}, "--workers 0")]
)
def test_values_out_of_range_are_refused(tmp_path: Path, wrong: dict, text: str):
    with pytest.raises(UserError, match=text):
        build_openmoji(tmp_path / "set", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"pip install 'vlcl\[demo\]'"):
        build_openmoji(tmp_path / "set", limit=1)


# ---- shards


SAMPLES = [(f"{i:03d}", {"png": bytes([i]) * 10, "txt": f"caption {i}".encode()}) for i in range(10)]


def test_shards_hold_all_samples_in_order_with_constant_headers(tmp_path: Path):
    paths = write_shards(tmp_path / "a", iter(SAMPLES), 4, prefix="p-")
    assert [path.name for path in paths] == ["p-00000.tar", "p-00001.tar", "p-00002.tar"]
    assert list(read_members(tmp_path / "a").items()) == SAMPLES
    with tarfile.open(paths[0]) as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "", 0o644)}
    with pytest.raises(UserError, match="already holds shards"):
        write_shards(tmp_path / "a", SAMPLES, 4)


def test_samples_are_taken_one_at_a_time(tmp_path: Path):
    def samples():
        yield from SAMPLES[:4]
        assert [path.name for path in tmp_path.glob("*.tar")] == ["00000.tar"]
        yield from SAMPLES[4:]

    write_shards(tmp_path, samples(), 3)


def test_an_interrupted_build_leaves_the_old_data_set_and_nothing_else(tmp_path: Path):
    out = tmp_path / "set"
    with replacing(out, overwrite=False) as folder:
        write_shards(folder, SAMPLES, 2)
    before = files_of(tmp_path)

    def interrupted():
        yield from SAMPLES[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replacing(out, overwrite=True) as folder:
        write_shards(folder, interrupted(), 2)
    assert files_of(tmp_path) == before
    with replacing(out, overwrite=True) as folder:
        write_shards(folder, SAMPLES[:2], 2)
    assert list(files_of(tmp_path)) == ["set/00000.tar"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path):
    (tmp_path / "set" / "deep").mkdir(parents=True)
    (tmp_path / "set" / "00000.tar").touch()
    (tmp_path / "set" / "deep" / "thesis.doc").touch()
    with pytest.raises(UserError, match=r"thesis\.doc"), replacing(tmp_path / "set", overwrite=True):
        pass
    assert set(files_of(tmp_path)) == {"set/00000.tar", "set/deep/thesis.doc"}


@pytest.mark.parametrize(("samples", "shards"), [(1, 1), (7, 7), (8, 8), (395, 8), (3558, 9), (3786, 8)])
def test_small_sets_have_eight_shards_of_about_one_size(samples: int, shards: int):
    most = 480 if samples == 3786 else 400
    per_shard = even_shards(samples, most)
    assert -(-samples // per_shard) == shards
    assert per_shard <= most
