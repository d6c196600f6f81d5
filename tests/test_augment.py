"""data.augment's settings and model.image_*: each does what torchvision does by hand and nothing else, in whole runs,
from a cache, and in what a model is exported to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torchvision.transforms as T
from export_models import card_of, export
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from safetensors.torch import load_file
from shards import make_shards, tiny_model
from test_cache import change, noise, preprocess
from test_data import assert_same_batches, sources_of, take
from torchvision.transforms import functional

from vlcl.checkpoint import load_model
from vlcl.compare.cell import settings_of
from vlcl.compare.results import defaults_of, that_count
from vlcl.config import Config, load_config
from vlcl.config.sections import AUGMENTATION
from vlcl.data.preprocess import Augmentation, augmented, own_generators, seed_generators
from vlcl.data.room import MEMORY
from vlcl.data.stream import Position, TrainStream
from vlcl.errors import UserError
from vlcl.from_config import augmentation_of, make_layout, make_reader
from vlcl.model import build_model
from vlcl.train import train

F: Any = functional  # it takes pictures, which its types do not say
JITTER = (0.32, 0.32, 0.32, 0.08)
EVERYTHING = [
    "data.crop_scale=[0.5,0.9]", "data.crop_ratio=[1,1]", "data.flip_prob=0.5", "data.rand_augment=[2,9]",
    f"data.color_jitter={list(JITTER)}", "data.color_jitter_prob=0.8", "data.gray_scale_prob=0.2", "data.blur_prob=0.5",
    "data.blur_sigma=[0.2,1]",
]  # fmt: skip
PICTURES: dict[str, Any] = {
    "image_mean": [0.1, 0.4, 0.7], "image_std": [0.2, 0.3, 0.5], "image_interpolation": "bilinear",
    "image_resize_mode": "squash",
}  # fmt: skip
CROP = T.RandomResizedCrop(32, (0.9, 1.0), interpolation=T.InterpolationMode.BICUBIC)
Step = Callable[[Image.Image], Image.Image]


def seen(how: Augmentation, index: int) -> torch.Tensor:
    """[3, 32, 32] of 0 to 1: what training sees of a picture."""
    transform = augmented(preprocess(train=True, mean=(0.0,) * 3, std=(1.0,) * 3), how)
    with own_generators():
        seed_generators(7, index)
        return transform(noise(index))


def by_hand(index: int, *steps: Step) -> torch.Tensor:
    with own_generators():
        seed_generators(7, index)
        image = noise(index)
        for step in steps:
            image = step(image)
        return F.to_tensor(image)


def _middle(image: Image.Image) -> Image.Image:
    side, (width, height) = min(image.size), image.size
    return F.crop(image, (height - side) // 2, (width - side) // 2, side, side)


ALONE: dict[str, tuple[dict[str, Any], tuple[Step, ...]]] = {
    "nothing": ({}, (CROP,)),
    "scale": ({"crop_scale": (0.1, 0.3)}, (T.RandomResizedCrop(32, (0.1, 0.3), interpolation=CROP.interpolation),)),
    "ratio": (
        {"crop_ratio": (0.3, 0.4)},
        (T.RandomResizedCrop(32, (0.9, 1.0), (0.3, 0.4), interpolation=CROP.interpolation),),
    ),
    "the middle": (
        {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)},
        (_middle, lambda x: F.resize(x, [32, 32], CROP.interpolation)),
    ),
    "flip": ({"flip_prob": 1.0}, (CROP, ImageOps.mirror)),
    "RandAugment": ({"rand_augment": (3, 20)}, (CROP, T.RandAugment(3, 20))),
    "jitter": ({"color_jitter": JITTER}, (CROP, lambda x: (torch.rand(1), T.ColorJitter(*JITTER)(x))[1])),
    "grey": ({"gray_scale_prob": 1.0}, (CROP, lambda x: F.to_grayscale(x, 3))),
    "blur": (
        {"blur_prob": 1.0, "blur_sigma": (1.2, 1.2)},
        (CROP, lambda x: F.gaussian_blur(x, [9, 9], [1.2, 1.2])),
    ),
    "a wide blur": (
        {"blur_prob": 1.0, "blur_sigma": (40.0, 40.0)},
        (CROP, lambda x: F.gaussian_blur(x, [63, 63], [40.0, 40.0])),
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_each_setting_is_torchvisions_step_after_the_same_crop(name: str) -> None:
    settings, steps = ALONE[name]
    for index in (0, 2, 3, 4):  # pictures that are far from square
        got = seen(Augmentation(**settings), index)
        assert torch.equal(got, by_hand(index, *steps))
        assert torch.equal(got, seen(Augmentation(), index)) == (name == "nothing")


def test_all_of_them_come_in_their_order() -> None:
    how = Augmentation((0.5, 0.9), (1.0, 1.0), 1.0, (2, 9), JITTER, 1.0, 1.0, 1.0, (1.0, 1.0))
    crop = T.RandomResizedCrop(32, (0.5, 0.9), (1.0, 1.0), interpolation=CROP.interpolation)

    def after_a_draw(step: Step) -> Step:  # whether the step is taken is drawn even where it always is
        return lambda x: (torch.rand(1), step(x))[1]

    steps = [T.RandAugment(2, 9), *map(after_a_draw, [T.ColorJitter(*JITTER), lambda x: F.to_grayscale(x, 3)])]
    blur = after_a_draw(lambda x: F.gaussian_blur(x, [7, 7], [1.0, 1.0]))
    for index in range(4):
        assert torch.equal(seen(how, index), by_hand(index, crop, after_a_draw(ImageOps.mirror), *steps, blur))


@pytest.mark.parametrize("name", ["flip_prob", "gray_scale_prob", "blur_prob", "color_jitter_prob"])
def test_a_share_of_the_pictures_changes_and_the_others_stay(name: str) -> None:
    more: dict[str, Any] = {"color_jitter": JITTER} if name == "color_jitter_prob" else {}
    some, none = Augmentation(**{**more, name: 0.25}), Augmentation(**{**more, name: 0.0})
    same = [torch.equal(seen(some, i), seen(Augmentation(), i)) for i in range(120)]
    assert 15 <= same.count(False) <= 45  # three standard deviations either way
    assert torch.equal(seen(none, 1), seen(Augmentation(), 1))


@pytest.mark.filterwarnings("ignore:Unused augmentation cfg items")  # it says so of what it uses, too
def test_the_names_of_open_clip_mean_what_they_do_there() -> None:
    names = {"scale": (0.4, 0.8), "color_jitter": JITTER, "color_jitter_prob": 1.0, "gray_scale_prob": 1.0}
    theirs: Any = image_transform_v2(PreprocessCfg(size=32, mean=(0.0,) * 3, std=(1.0,) * 3), True, dict(names))
    ours = {"crop_scale" if key == "scale" else key: value for key, value in names.items()}
    draws = Augmentation(**ours)
    assert [type(x) for x in draws.steps(32)] == [T.RandomApply, T.RandomGrayscale]
    with own_generators():
        seed_generators(3)
        expected = theirs.transforms[0](noise(5))
        torch.rand(1)  # theirs draws the share from another generator
        expected = F.to_tensor(theirs.transforms[3](theirs.transforms[2](expected)))
        seed_generators(3)
        got = augmented(preprocess(train=True, mean=(0.0,) * 3, std=(1.0,) * 3), draws)(noise(5))
    assert torch.equal(got, expected)


def test_a_setting_that_would_do_nothing_is_a_mistake() -> None:
    assert set(AUGMENTATION) == {field.name for field in fields(Augmentation)}
    assert augmentation_of(load_config(None, ["data.train=x"]).data) == Augmentation()
    for setting in EVERYTHING:
        if "_prob=0.8" not in setting and "sigma" not in setting:
            load_config(None, ["data.train=x", setting])
        with pytest.raises(UserError, match=rf"{setting.split('=')[0]} needs data.augment=crop"):
            load_config(None, ["data.train=x", "data.augment=none", setting])
    for setting, text in (
        ("data.color_jitter_prob=0.5", "needs data.color_jitter, as"),
        ("data.blur_sigma=[1,2]", "needs data.blur_prob"),
        ("data.crop_scale=[0.9,0.5]", r"got \[0.9, 0.5\]; allowed: two numbers > 0 and <= 1, the smaller first"),
        ("data.crop_ratio=[0,1]", "two numbers > 0, the smaller first, or null"),
        ("data.color_jitter=0.4", "four numbers >= 0, the fourth <= 0.5, or null"),
        ("data.color_jitter=[0,0,0,0.6]", "the fourth <= 0.5"),
        ("data.rand_augment=[2,31]", "operations >= 1, strength >= 0 and <= 30"),
        ("data.rand_augment=[0,9]", "operations >= 1"),
        ("model.image_mean=[123.7,116.3,103.5]", "three numbers >= 0 and <= 1: red, green, blue"),
        ("model.image_std=[0,1,1]", "three numbers > 0 and <= 1"),
        ("data.scale=[0.9,1]", "did you mean 'data.crop_scale'"),
    ):
        with pytest.raises(UserError, match=text):
            load_config(None, ["data.train=x", setting])


def test_results_from_before_these_settings_are_still_of_their_cells() -> None:
    lines = (Path(__file__).parents[1] / "docs" / "evidence" / "results.jsonl").read_text().splitlines()
    found = {line["loss"]: line for line in map(json.loads, lines) if "data.flip_prob" not in line["settings"]}
    assert found
    for line in found.values():
        values: dict[str, Any] = {"data": {"train": "x", "val": "y"}}
        for key, value in line["settings"].items():
            section, _, name = key.rpartition(".")
            values.setdefault(section, {})[name] = value
        now = Config.model_validate(values)
        old = {**defaults_of(now), **line["settings"]}
        assert that_count(old) == that_count(settings_of(now))


# ---- whole runs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards", (20, 13, 9), change)


def settings(shards: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"data.train={shards}", f"data.val={shards}", f"model.name={tiny_model(folder / 'model')}", "train.steps=8",
        "train.batch_size=8", "optim.lr=1e-3", "optim.warmup=2", "checkpoint.every=4", "data.workers=0",
        "data.streams=2", "data.shuffle=8", "log.trackers=[]", "train.precision=fp32", "eval.examples=0",
        "data.max_bad_share=0.5", *more,
    ]  # fmt: skip


def test_batches_are_the_same_from_workers_a_cache_and_after_a_break(shards: Path, tmp_path: Path) -> None:
    """And a cache is one for all ways to augment."""
    sources, built = sources_of(shards), build_model(tiny_model(tmp_path / "model"))

    def batches(count: int, workers: int, cache: Path | str, start: Position, *more: str) -> list[Any]:
        config = load_config(None, settings(shards, tmp_path, f"data.cache={cache}", *more))
        reader = make_reader("data.train", config, sources, built)
        return take(TrainStream(sources, make_layout(config, sources), reader, 8, start), count, workers)

    expected = batches(10, 0, "null", Position(), *EVERYTHING)
    assert_same_batches(batches(10, 2, "null", Position(), *EVERYTHING), expected)
    position = Position()
    for batch in expected[:7]:
        position = position.after(batch)
    for cache in (MEMORY, tmp_path / "cache"):
        assert_same_batches(batches(10, 0, cache, Position(), *EVERYTHING), expected)
        assert_same_batches(batches(3, 2, cache, position, *EVERYTHING), expected[7:])
    plain = batches(10, 0, tmp_path / "cache", Position())
    assert all(torch.equal(a.row_B, b.row_B) for a, b in zip(plain, expected))
    assert not any(torch.equal(a.images_BCHW, b.images_BCHW) for a, b in zip(plain, expected))
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1


def weights(run: Path, step: int = 8) -> dict[str, torch.Tensor]:
    return load_file(run / f"step-{step:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with all of the settings of this file."""
    folder = tmp_path_factory.mktemp("run")
    own = [f"model.{key}={json.dumps(value)}" for key, value in PICTURES.items()]
    train(load_config(None, settings(shards, folder, f"train.output={folder / 'all'}", *EVERYTHING, *own)))
    return folder / "all"


def test_a_run_with_all_of_them_is_resumed_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    recorded = load_config(run / "config.yaml")
    assert augmentation_of(recorded.data).crop_scale == (0.5, 0.9)
    output = tmp_path / "again"
    again = [f"train.output={output}", f"resume={run / 'step-00000004'}"]
    train(load_config(run / "config.yaml", again))
    for name, value in weights(run).items():
        assert torch.equal(weights(output)[name], value), name
    train(load_config(run / "config.yaml", [*again, "train.overwrite=true", "data.flip_prob=0"]))
    assert not all(torch.equal(weights(output)[name], value) for name, value in weights(run).items())


def test_the_models_pictures_are_those_of_the_settings(run: Path, tmp_path: Path) -> None:
    written = json.loads((run / "step-00000008" / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert {f"image_{key}": written[key] for key in ("mean", "std", "interpolation", "resize_mode")} == PICTURES
    image = F.resize(noise(3), [32, 32], T.InterpolationMode.BILINEAR)
    expected = F.normalize(F.to_tensor(image), PICTURES["image_mean"], PICTURES["image_std"])
    assert torch.equal(load_model(str(run)).preprocess_eval(noise(3)), expected)
    plain: Any = build_model(tiny_model(tmp_path / "model"))
    assert plain.config["preprocess_cfg"]["interpolation"] == "bicubic"
    assert plain.preprocess_train.transforms[0].interpolation == T.InterpolationMode.BICUBIC
    own: Any = build_model(tiny_model(tmp_path / "model"), image_interpolation="bilinear", image_std=[0.5, 0.5, 0.5])
    assert own.preprocess_train.transforms[0].interpolation == T.InterpolationMode.BILINEAR
    assert own.preprocess_train.transforms[-1].std == [0.5, 0.5, 0.5]
    assert own.config["preprocess_cfg"]["mean"] == plain.config["preprocess_cfg"]["mean"]


def test_an_export_makes_the_same_pixels_everywhere(run: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    made = export(run, tmp_path / "out")
    assert made.form == "CLIPModel"
    ours = load_model(str(run)).preprocess_eval(noise(3))
    theirs: Any = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(theirs[2](noise(3)), ours)
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(images=[noise(3)], return_tensors="pt").pixel_values[0]

    def levels_off(other: torch.Tensor) -> float:
        return float(((pixels - other).abs() * torch.tensor(PICTURES["image_std"]).view(3, 1, 1) * 255).max())

    assert levels_off(ours) <= 1.01  # another library rounds otherwise
    for wrong in ({"image_interpolation": "bicubic"}, {"image_resize_mode": "shortest"}, {"image_mean": [0.1] * 3}):
        changed: dict[str, Any] = {**PICTURES, **wrong}
        other = build_model(f"local-dir:{tmp_path / 'out'}", **changed)
        assert levels_off(other.preprocess_eval(noise(3))) > 10
    _, card = card_of(tmp_path / "out")
    assert "resized (bilinear, resize_mode=squash) and normalized with mean 0.1, 0.4, 0.7 and standard" in card
    assert (
        "| augmentation | crop, crop_scale=[0.5, 0.9], crop_ratio=[1.0, 1.0], flip_prob=0.5, rand_augment=[2, 9]"
        in card
    )


def test_what_transformers_cannot_do_is_left_to_open_clip(run: Path, shards: Path, tmp_path: Path) -> None:
    more = ["model.image_resize_mode=longest", "model.image_mean=null", "train.steps=1", "eval.every=null"]
    train(load_config(run / "config.yaml", [f"train.output={tmp_path / 'run'}", "resume=null", *more]))
    made = export(tmp_path / "run", tmp_path / "out")
    assert made.form is None
    assert "no image processor there pads pictures (resize_mode=longest)" in str(made.reason)
    theirs: Any = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(theirs[2](noise(3)), load_model(str(tmp_path / "run")).preprocess_eval(noise(3)))
