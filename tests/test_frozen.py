"""A locked image tower is computed once where data.cache keeps pictures that do not change: the same training, and no
step asks the tower.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from shards import TINY_MODEL, make_shards, tiny_model
from torch import Tensor

from vlcl.batch import Features
from vlcl.checkpoint import complete_steps
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.flops import flops_of_pair
from vlcl.from_config import make_reader, open_splits
from vlcl.frozen import keep_features, why_not
from vlcl.model import DualEncoder, build_model
from vlcl.train import train

Capture = pytest.CaptureFixture[str]
TIMM = "test_efficientnet"  # its BatchNorms have the activation in them


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")

    def damage(i: int, files: dict[str, bytes]) -> None:
        if i in (0, 17, 30):
            files["png"] = b"<html>"

    vision = {"image_size": 32, "timm_model_name": TIMM, "timm_pool": "avg", "timm_proj": "linear"}
    (folder / "timm").mkdir()
    config = {"model_cfg": TINY_MODEL["model_cfg"] | {"vision_cfg": vision}, "preprocess_cfg": {"size": [32, 32]}}
    (folder / "timm" / "open_clip_config.json").write_text(json.dumps(config))
    tiny_model(folder / "vit")
    return {
        "train": make_shards(folder / "train", (30, 7, 22), damage), "val": make_shards(folder / "val", (9, 10)),
        "vit": folder / "vit", "timm": folder / "timm",
    }  # fmt: skip


def settings(data: dict[str, Path], model: str, output: Path, *more: str) -> list[str]:
    return [
        f"data.train={data['train']}", f"data.val={data['val']}", f"model.name=local-dir:{data[model]}",
        f"train.output={output}", "train.steps=12", "train.batch_size=12", "train.log_every=1", "optim.warmup=2",
        "optim.lr=1e-2", "eval.batch_size=8", "eval.every=6", "data.workers=0", "data.streams=2", "data.shuffle=16",
        "log.trackers=[]", "train.precision=fp32", "eval.examples=0", "data.augment=none", "model.lock_image=true",
        "checkpoint.every=4", "checkpoint.keep=3", *more,
    ]  # fmt: skip


def run(data: dict[str, Path], model: str, output: Path, *more: str) -> dict[str, Tensor]:
    train(load_config(None, settings(data, model, output, *more)))
    return weights_of(output)


def weights_of(output: Path) -> dict[str, Tensor]:
    return load_file(complete_steps(output)[-1] / "model.safetensors")


def val_of(output: Path) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["val/infonce"] for line in lines if "val/infonce" in line]


@pytest.mark.parametrize("model", ["vit", "timm"])
def test_a_training_is_the_one_with_the_tower_in_every_step(
    data: dict[str, Path], tmp_path: Path, model: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: the tower has seen other batches. With averaged weights, chunks and evaluations."""
    more = ("train.ema=0.9", "train.accumulate=3")
    expected = run(data, model, tmp_path / "pictures", *more)
    seen: list[int] = []
    whole = DualEncoder.normalized

    def counted(encoder: DualEncoder, images_BCHW: Tensor) -> Tensor:
        seen.append(len(images_BCHW))
        return whole(encoder, images_BCHW)

    monkeypatch.setattr(DualEncoder, "normalized", counted)
    capsys.readouterr()
    got = run(data, model, tmp_path / "features", "data.cache=memory", *more)
    assert sum(seen) == 59 - 3 + 19 + 2  # each good picture once, of two splits, and one more to learn the width
    assert "data.train: features of the locked image tower, 59 x" in capsys.readouterr().out
    assert set(got) == set(expected)
    moved = 0
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=1e-3)  # each of 12 steps is of 1e-2
        moved += name.startswith("visual.head") and bool(x.abs().sum())
    assert moved == (model == "timm")
    assert val_of(tmp_path / "features") == pytest.approx(val_of(tmp_path / "pictures"), rel=1e-4)


def test_a_folder_has_them_for_every_run_and_rank(data: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    first = run(data, "timm", tmp_path / "first", cache)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("features-*.npy")}
    assert len(files) == 2
    capsys.readouterr()
    again = run(data, "timm", tmp_path / "again", cache)
    assert "features" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("features-*.npy")} == files
    assert all(torch.equal(again[name], x) for name, x in first.items())
    for name, place in (("pictures", "data.cache=null"), ("ranks", cache)):
        on_ranks(2, run, data, "timm", tmp_path / name, place)
    assert val_of(tmp_path / "ranks") == pytest.approx(val_of(tmp_path / "pictures"), rel=1e-3)
    run(data, "timm", tmp_path / "other", cache, "train.seed=1")  # another tower, as nothing is pretrained
    assert len(list((tmp_path / "cache").rglob("features-*.npy"))) == 4


def test_other_activations_have_other_features(data: dict[str, Path], tmp_path: Path) -> None:
    """Though the weights are the same."""
    cache = f"data.cache={tmp_path / 'cache'}"
    for name, quick in (("gelu", False), ("quick", True)):
        (tmp_path / name).mkdir()
        config = json.loads((data["vit"] / "open_clip_config.json").read_text())
        config["model_cfg"]["quick_gelu"] = quick
        (tmp_path / name / "open_clip_config.json").write_text(json.dumps(config))
        run(data | {name: tmp_path / name}, name, tmp_path / f"run-{name}", cache)
    gelu, quick = (weights_of(tmp_path / f"run-{name}") for name in ("gelu", "quick"))
    assert torch.equal(gelu["visual.conv1.weight"], quick["visual.conv1.weight"])
    assert len(list((tmp_path / "cache").rglob("features-*.npy"))) == 4


def test_a_file_that_is_damaged_is_named(data: dict[str, Path], tmp_path: Path) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    run(data, "vit", tmp_path / "first", cache)
    for file in (tmp_path / "cache").rglob("features-*.npy"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"features-.*npy is damaged .* rm /"):
        run(data, "vit", tmp_path / "again", cache)


def test_where_there_is_no_room(data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vlcl.data.room
    import vlcl.frozen

    config = load_config(None, settings(data, "vit", tmp_path, "data.cache=memory"))
    real = vlcl.frozen.keep_features

    def later(*arguments: Any, **more: Any) -> Any:  # pictures have found room by then
        monkeypatch.setattr(vlcl.data.room, "free_memory", lambda: 59 * 16 * 4)
        return real(*arguments, **more)

    monkeypatch.setattr("vlcl.run.keep_features", later)
    with pytest.raises(UserError, match=r"data\.cache=memory: the 59 pairs of data\.train need about 3\.78 kB"):
        train(config)


def test_a_run_goes_on_with_the_same_bits(data: dict[str, Path], tmp_path: Path) -> None:
    whole = run(data, "timm", tmp_path / "whole", "data.cache=memory")
    cut = f"resume={tmp_path / 'whole' / 'step-00000004'}"
    again = run(data, "timm", tmp_path / "again", "data.cache=memory", cut)
    assert all(torch.equal(again[name], x) for name, x in whole.items())


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([], None),
        (["data.cache=null"], ""),
        (["model.lock_image=false"], ""),
        (["data.augment=crop"], "data.augment=crop makes other pictures"),
        (["model.patch_dropout=0.5"], "model.patch_dropout=0.5 leaves out others"),
        (["model.lock_image_unlocked_groups=1"], "a part of that tower trains"),
    ],
)
def test_what_is_in_the_way(data: dict[str, Path], tmp_path: Path, more: list[str], reason: str | None) -> None:
    config = load_config(None, settings(data, "vit", tmp_path, "data.cache=memory", *more))
    groups = config.model.lock_image_unlocked_groups
    encoder = build_model(
        config.model.name, lock_image=config.model.lock_image, lock_image_unlocked_groups=groups
    ).encoder
    found = why_not(config, encoder, sharded=False)
    assert found == reason or (reason and found and found.startswith(reason))
    if reason is None:
        assert why_not(config, encoder, sharded=True) == "the towers are in pieces over the ranks (FSDP)"


def test_a_run_says_what_is_in_the_way(data: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    run(data, "vit", tmp_path / "run", "data.cache=memory", "data.augment=crop")
    assert "note: data.cache keeps pictures, and not what the locked image tower gives" in capsys.readouterr().out


def test_a_trunk_that_gives_a_map_keeps_pictures(data: dict[str, Path], tmp_path: Path) -> None:
    """Its pooling trains: there is no vector before it."""
    config = json.loads((data["timm"] / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= {"timm_pool": "abs_attn", "timm_proj": ""}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(config))
    built = build_model(f"local-dir:{tmp_path / 'model'}", lock_image=True)
    assert built.encoder.image_is_frozen
    assert built.encoder.frozen_image(torch.rand(2, 3, 32, 32)) is None
    settings_of_it = load_config(None, settings(data, "timm", tmp_path, "data.cache=memory"))
    reader = make_reader("data.train", settings_of_it, open_splits(settings_of_it.data)[0], built)
    said: list[str] = []
    kept = keep_features(settings_of_it, {"train": reader}, built, torch.device("cpu"), 1, nullcontext, said.append)
    assert kept == {"train": reader}
    assert said == ["note: data.train: pictures are kept: what is frozen of the image tower gives no vectors"]


def test_flops_are_those_of_what_is_computed(data: dict[str, Path]) -> None:
    built = build_model(f"local-dir:{data['vit']}", lock_image=True)
    whole, kept = (flops_of_pair(built.encoder, built.config, kept=kept) for kept in (False, True))
    assert whole is not None
    assert kept is not None
    assert 0 < kept < whole
    open_tower = build_model(f"local-dir:{data['vit']}")
    assert flops_of_pair(open_tower.encoder, open_tower.config, kept=True) == pytest.approx(
        flops_of_pair(open_tower.encoder, open_tower.config)
    )


def test_features_in_place_of_pictures(data: dict[str, Path]) -> None:
    for model in ("vit", "timm"):
        encoder = build_model(f"local-dir:{data[model]}", lock_image=True).encoder.eval()
        images, tokens = torch.rand(4, 3, 32, 32), torch.randint(1, 9, (4, 8))
        frozen = encoder.frozen_image(images)
        assert frozen is not None
        expected, got = encoder(images, tokens), encoder(frozen, tokens)
        assert isinstance(got, Features)
        assert torch.equal(got.image_BD, expected.image_BD)
        assert build_model(f"local-dir:{data[model]}").encoder.frozen_image(images) is None


@pytest.mark.parametrize("tower", ["test_efficientnet", "test_byobnet", "test_resnet", "test_convnext"])
def test_a_locked_trunk_of_timm_gives_what_it_gave(tower: str, tmp_path: Path) -> None:
    """Activations that are a part of a BatchNorm stay; its statistics do not move, those of an open tower do."""
    config: dict[str, Any] = {"model_cfg": {
        "embed_dim": 16, "vision_cfg": {"image_size": 64, "timm_model_name": tower, "timm_pool": "avg"},
        "text_cfg": TINY_MODEL["model_cfg"]["text_cfg"],
    }}  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    images_BCHW = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found, moved = [], []
    for lock in (False, True):
        torch.manual_seed(0)
        encoder = build_model(f"local-dir:{tmp_path}", lock_image=lock).encoder
        with torch.no_grad():
            found.append(encoder.eval().image(images_BCHW))
            encoder.train().image(images_BCHW)
            moved.append(not torch.equal(encoder.eval().image(images_BCHW), found[-1]))
    assert torch.equal(*found)
    assert moved == [tower != "test_convnext", False]
