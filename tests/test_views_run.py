"""Pictures alone, end to end: from shards without captions to a report; resume to the bit; 2 ranks; what follows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_data import png
from PIL import Image
from ranks import on_ranks
from safetensors.torch import load_file
from shards import make_shards, tiny_model

from vlcl.batch import Batch
from vlcl.checkpoint import load_model
from vlcl.config import load_config
from vlcl.data.stages import Sample
from vlcl.data.views import ViewAugmentation, make_view_reader
from vlcl.errors import UserError
from vlcl.from_config import open_sources, picture_decoder_of, train_pipeline
from vlcl.logs import read_metrics
from vlcl.probe import Labelled, LinearProtocol, knn_accuracy, linear_accuracy
from vlcl.train import train
from vlcl.views.build import build_views
from vlcl.views.vit import positions_2d

CLASSES = 3
TOWERS = ("views.projector_hidden=24", "views.projector_width=12", "views.predictor_hidden=24")


def only_labelled(i: int, files: dict[str, bytes]) -> None:
    """A picture of noise in the colour of its class, and no caption."""
    noise = np.random.default_rng(i).integers(0, 120, (20, 26, 3), dtype=np.uint8)
    noise[:, :, i % CLASSES] += 100
    files.clear()
    files |= {"png": png(Image.fromarray(noise)), "cls": str(i % CLASSES).encode()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    found = {name: make_shards(folder / name, counts, only_labelled)
             for name, counts in (("train", (30, 18)), ("val", (15,)), ("test", (12,)))}  # fmt: skip
    return found | {"model": folder / "model", "folder": folder}


def settings(data: dict[str, Path], output: Path, *more: str) -> list[str]:
    return [
        "model.kind=views", f"data.train={data['train']}", f"data.val={data['val']}", f"data.test={data['test']}",
        f"model.name={tiny_model(data['model'])}", *TOWERS, "views.linear_epochs=20", f"train.output={output}",
        "train.steps=8", "train.batch_size=12", "train.log_every=1", "optim.warmup=2", "optim.lr=1e-3",
        "optim.logit_scale_lr=0", "checkpoint.every=2", "checkpoint.keep=4", "eval.every=4", "eval.batch_size=8",
        "data.workers=0", "data.streams=2", "data.shuffle=16", "log.trackers=[]", "train.precision=fp32",
        "eval.examples=2", *more,
    ]  # fmt: skip


def run(data: dict[str, Path], output: Path, *more: str) -> dict[str, float]:
    return train(load_config(None, settings(data, output, *more)))


@pytest.fixture(scope="module")
def trained(data: dict[str, Path]) -> Path:
    run(data, data["folder"] / "run")
    return data["folder"] / "run"


def final(folder: Path) -> dict[str, torch.Tensor]:
    step = max(folder.glob("step-*"))
    files = sorted(step.rglob("*.safetensors"))
    return {f"{path.relative_to(step)}/{name}": x for path in files for name, x in load_file(path).items()}


def test_from_pictures_to_a_report(trained: Path) -> None:
    records = read_metrics(trained)
    evaluated = [record["step"] for record in records if "val/knn_top1" in record]
    assert evaluated == [4, 8]
    last = {name: value for record in records if record["step"] == 8 for name, value in record.items()}
    assert all(0 <= last[f"{split}/{name}_top1"] <= 1 for split in ("val", "test") for name in ("knn", "linear"))
    assert last["test/linear_top1"] > 0.9  # a class is a colour
    assert last["train/logit_scale"] == pytest.approx(5.0)
    assert last["train/first_visits"] == 0.0  # rows are of pictures, and 8 x 12 is two passes
    page = (trained / "report.html").read_text()
    assert "Nearest neighbours" in page
    assert "Pictures next to a picture" in page
    assert "kNN and linear classifiers on " in page
    assert "Training pictures" in page
    assert "R@k among" not in page
    assert (trained / "retrieval.png").is_file()


def test_a_resumed_run_ends_with_the_same_bits(data: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "again")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "again" / f"step-{step:08d}")
    run(data, tmp_path / "again", "resume=latest")
    whole, again = final(trained), final(tmp_path / "again")
    assert whole.keys() == again.keys()
    assert any("momentum.visual" in name for name in whole)
    assert any("running_var" in name for name in whole)
    assert all(torch.equal(again[name], x) for name, x in whole.items())


def run_on_rank(data: dict[str, Path], output: Path) -> dict[str, float]:
    return run(data, output)


def test_two_ranks_train_and_judge_alike(data: dict[str, Path], tmp_path: Path) -> None:
    first, second = on_ranks(2, run_on_rank, data, tmp_path / "two")
    assert first == second
    assert {"test/knn_top1", "test/linear_top1"} <= first.keys()
    assert len(list((tmp_path / "two").glob("step-*"))) == 4


def test_the_momentum_copy_is_between_start_and_now(trained: Path) -> None:
    clip = load_model(str(trained)).encoder.clip
    both = zip(clip.projector.parameters(), clip.momentum["projector"].parameters())
    assert all(0 < float((own - slow).abs().max().detach()) < 0.1 for own, slow in both)
    assert not any(x.requires_grad for x in clip.momentum.parameters())


def test_a_view_depends_on_seed_epoch_row_and_view(data: dict[str, Path]) -> None:
    config = load_config(None, settings(data, Path("none")))
    sources, decoder = open_sources(str(data["train"])), picture_decoder_of(config.data)

    def views(seed: int, epoch: int, row: int) -> list[torch.Tensor]:
        reader = make_view_reader(sources, decoder, ViewAugmentation(), 32, "bilinear", seed)
        ((_, sample),) = reader.read(0, row, row + 1)
        return reader.prepare(sample, epoch, row)  # pyright: ignore[reportArgumentType]

    one, two = views(0, 1, 5)
    assert one.shape == two.shape == (3, 32, 32)
    assert not torch.equal(one, two)
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip((one, two), views(0, 1, 5)))
    for other in (views(1, 1, 5), views(0, 2, 5)):
        assert not torch.equal(other[0], one)


def test_batches_are_pixels_that_stages_may_choose_and_the_model_normalizes(data: dict[str, Path]) -> None:
    config = load_config(None, settings(data, Path("none")))
    built = build_views(config.model.name, towers=config.views.only(config.views.OF_TOWERS))
    taken: list[int] = []

    def of_one_class(samples: Iterator[Sample]) -> Iterator[Sample]:
        """Decodes the pictures itself."""
        for sample in samples:
            if sample["cls"] == b"1":
                taken.append(sample["__row__"])
                yield sample | {"png": Image.open(BytesIO(sample["png"]))}

    batch = next(iter(train_pipeline(config, built, [of_one_class])))
    plain = next(iter(train_pipeline(config, built)))
    assert isinstance(batch, Batch)
    assert isinstance(plain, Batch)
    assert set(batch.row_B.tolist()) <= set(taken)
    assert set(plain.row_B.tolist()) - set(taken)
    both = [batch.images_BCHW, batch.tokens_BL]
    assert {x.dtype for x in both} == {torch.uint8}
    normalize: Any = built.preprocess_eval
    floats = [normalize.transforms[-1](x / 255) for x in both]
    encoder = built.encoder.eval()
    with torch.no_grad():
        got, wanted = encoder(*both), encoder(*floats)
    assert torch.allclose(got.image_BD, wanted.image_BD, atol=1e-6)
    assert torch.allclose(got.keys.text, wanted.keys.text, atol=1e-6)


def test_view_two_alone_is_solarized() -> None:
    plain: dict[str, Any] = {"crop_scale": (1.0, 1.0), "flip_prob": 0.0, "color_jitter": None, "gray_scale_prob": 0.0}
    how = ViewAugmentation(**plain, blur_prob=(0.0, 0.0), solarize_prob=(0.0, 1.0))
    picture = Image.new("RGB", (8, 8), (200, 100, 0))
    one, two = (how.of_view(view, 8, "bilinear")(picture)[:, 0, 0].tolist() for view in (0, 1))
    assert (one, two) == ([200, 100, 0], [55, 100, 0])


def test_positions_are_their_loop() -> None:
    got, dim = positions_2d(2, 3, 8), 8
    for y in range(2):
        for x in range(3):
            wanted = []
            for axis in (x, y):
                angles = [axis * 10000 ** (-k / (dim // 4)) for k in range(dim // 4)]
                wanted += [*np.sin(angles), *np.cos(angles)]
            assert got[3 * y + x].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "open_clip"])
def test_a_vit_has_fixed_positions_and_frozen_patches(name: str, data: dict[str, Path]) -> None:
    towers = load_config(None, settings(data, Path("none"))).views
    name = tiny_model(data["model"]) if name == "open_clip" else name
    visual = build_views(name, towers=towers.only(towers.OF_TOWERS), image_size=32).encoder.clip.visual
    patches = visual.patch_embed.proj if "timm" in name else visual.conv1
    positions = (visual.pos_embed if "timm" in name else visual.positional_embedding).view(-1, patches.out_channels)
    assert not patches.weight.requires_grad
    assert not positions.requires_grad
    assert torch.equal(positions[1:], positions_2d(2, 2, patches.out_channels))
    assert not positions[0].any()


@pytest.mark.skipif(os.environ.get("VLCL_TEST_EVERYTHING") != "1", reason="make test-all")
def test_a_step_of_vit_s_at_224_runs_as_the_config_has_it(data: dict[str, Path], tmp_path: Path) -> None:
    config = load_config(
        Path(__file__).parents[1] / "configs" / "mocov3.yaml",
        [f"data.train={data['train']}", "data.val=null", f"train.output={tmp_path / 'run'}", "train.steps=1",
         "train.batch_size=2", "train.precision=fp32", "data.workers=0", "log.trackers=[]", "optim.warmup=0"],
    )  # fmt: skip
    train(config)
    (record,) = [x for x in read_metrics(tmp_path / "run") if "train/loss" in x]
    assert record["train/loss"] > 0


def test_knn_is_its_loop() -> None:
    g = torch.Generator().manual_seed(0)
    bank = Labelled(torch.randn(30, 4, generator=g), torch.randint(0, 3, (30,), generator=g), torch.arange(30))
    asked = Labelled(torch.randn(11, 4, generator=g), torch.randint(0, 3, (11,), generator=g), torch.arange(11))
    hits = 0
    for x, label in zip(asked.feature_ND, asked.label_N):
        cosines = [float(x @ y / x.norm() / y.norm()) for y in bank.feature_ND]
        votes = [0.0] * 3
        for j in sorted(range(30), key=lambda j: -cosines[j])[:5]:
            votes[int(bank.label_N[j])] += float(np.exp(cosines[j] / 0.07))
        hits += votes.index(max(votes)) == int(label)
    assert 0 < hits < 11
    assert knn_accuracy(bank, asked, 5, 0.07) == pytest.approx(hits / 11)


def test_a_linear_classifier_finds_what_is_linear() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(240, 6, generator=g)
    label = (x[:, :3] * 100).argmax(dim=1)
    parts = [Labelled(x[part], label[part], torch.arange(240)[part]) for part in (slice(200), slice(200, 240))]
    found = linear_accuracy(parts[0], [parts[1]], LinearProtocol(60, 32))
    assert found.accuracies[0] > 0.85
    assert found.chosen_on[found.lr] == max(found.chosen_on.values())
    noise = linear_accuracy(parts[0], [parts[1]], LinearProtocol(60, 32), [torch.randn(200, 6, generator=g)])
    assert noise.accuracies[0] < 0.7  # crops, where there are some, are what is trained on


def test_what_goes_together_is_checked(data: dict[str, Path], tmp_path: Path) -> None:
    for more, message in (
        ("train.accumulate=2", "train.accumulate=2 with model.kind=views"),
        ("data.crop_scale=[0.5,1.0]", "data.crop_scale means nothing with model.kind=views"),
        ("model.pretrained=somewhere", "take model.pretrained_image"),
        ("loss.warm=1", "loss.warm with model.kind=views"),
        ("train.ema=0.9", "the momentum copy is one"),
        ("loss.same_caption=ignore", "loss.same_caption means nothing with model.kind=views"),
        ("optim.text_lr=1", "the tower at optim.image_lr"),
        ("data.decode=fast", "data.decode means nothing"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(None, settings(data, tmp_path, more))
    with pytest.raises(UserError, match=r"views\.momentum needs model\.kind=views; it is clip"):
        load_config(None, [f"data.train={data['train']}", "views.momentum=0.5"])
    with pytest.raises(UserError, match=r"model\.name='timm/vit_tinny'"):
        run(data, tmp_path / "x", "model.name=timm/vit_tinny")
    assert not (tmp_path / "x").exists()


def test_pictures_without_labels_are_told(data: dict[str, Path], tmp_path: Path) -> None:
    bare = make_shards(tmp_path / "bare", (20,), lambda i, files: None)
    run(data, tmp_path / "run", f"data.train={bare}", "data.val=null", "data.test=null", "train.steps=2")
    with pytest.raises(UserError, match=r"views\.knn: none of the pictures has a label"):
        run(data, tmp_path / "other", f"data.train={bare}", "train.steps=2")


def test_the_neighbours_may_be_a_folder_of_classes(data: dict[str, Path], tmp_path: Path) -> None:
    for label in range(CLASSES):
        for n in range(3):
            files: dict[str, bytes] = {}
            only_labelled(label + CLASSES * n, files)
            path = tmp_path / "bank" / f"class {label}" / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files["png"])
    found = run(data, tmp_path / "run", f"views.knn={tmp_path / 'bank'}", "views.knn_neighbours=3", "train.steps=2")
    assert found["test/knn_top1"] > 0.5
