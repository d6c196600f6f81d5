"""Zero-shot on wds folders: the numbers of CLIP_benchmark's own code, resumed, on any number of ranks."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification
from clip_benchmark.models.open_clip import load_open_clip
from PIL import Image
from ranks import on_ranks
from safetensors.torch import save_file
from shards import add, picture, tiny_model
from sklearn.metrics import average_precision_score
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from vlcl.checkpoint import load_model
from vlcl.cli import app
from vlcl.errors import UserError
from vlcl.zeroshot import zeroshot_folder
from vlcl_eval.clip_benchmark.zeroshot import FILE, evaluate_wds, mean_average_precision, open_folder, scores
from vlcl_eval.models import load

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
LENGTH = 16  # of texts, in tokens


@pytest.fixture(autouse=True)
def _new_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP_benchmark calls float(array of one number), which NumPy has stopped taking."""
    as_float = lambda x: float(x.item() if hasattr(x, "item") else x)  # noqa: E731
    monkeypatch.setattr(zeroshot_classification, "float", as_float, raising=False)


@pytest.fixture(scope="module")
def wds_digits(digits: Path) -> Path:
    return digits / "wds_mnist"


def write_open_clip(folder: Path, seed: int = 0) -> Path:
    tiny_model(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"context_length": LENGTH, "width": 64, "layers": 2, "heads": 4}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    clip: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    spread(clip, 2)
    save_file({name: x.contiguous() for name, x in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def spread(model: torch.nn.Module, factor: float) -> None:
    """Larger weights: with those of the start all images are nearest to one class."""
    for weight in model.parameters():
        weight.data *= factor if weight.ndim > 1 else 1


def write_transformers(folder: Path, words: list[str]) -> Path:
    """A CLIPModel of random weights, with a tokenizer of whole words."""
    names = ["<pad>", "<start>", "<end>", "<unknown>", *words]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unknown>"
    ).save_pretrained(folder)
    towers: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                              "num_attention_heads": 2}  # fmt: skip
    tokens = {"vocab_size": len(names), "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 1,
              "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(1)
    images = {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=towers | tokens, vision_config=towers | images, projection_dim=16))
    spread(model, 4)
    model.save_pretrained(folder)
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3,
                "image_mean": MEAN, "image_std": STD}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


class AsOpenClip(torch.nn.Module):
    """A transformers model as CLIP_benchmark calls one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = CLIPModel.from_pretrained(folder).eval()

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=images).pooler_output)

    def encode_text(self, batch: Any) -> Tensor:
        return self.model.text_projection(self.model.text_model(**batch).pooler_output)


def reference(folder: Path) -> tuple[Any, Any, Any]:
    """(model, transform, tokenizer) as CLIP_benchmark wants them, built without vlcl."""
    if (folder / "open_clip_config.json").is_file():
        model, transform, tokenizer = load_open_clip(f"local-dir:{folder}", pretrained="")
        return model.eval(), transform, tokenizer
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    transform = transforms.Compose([
        transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip

    def tokenize(texts: list[str]) -> Any:
        batch = words(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
        batch.pop("token_type_ids", None)
        return batch

    return AsOpenClip(folder), transform, tokenize


def clip_benchmark(model_folder: Path, data_folder: Path) -> tuple[dict[str, float], Tensor, Tensor]:
    """CLIP_benchmark's metrics, logits and labels, as its command line makes them, without amp."""
    model, transform, tokenizer = reference(model_folder)
    data = build_dataset(f"wds/{data_folder.name}", root=str(data_folder), transform=transform, split="test")
    classes, templates = data.classes, data.templates
    loader: Any = DataLoader(data.batched(50), batch_size=None)
    loader.dataset.classes = classes
    metrics = zeroshot_classification.evaluate(model, loader, tokenizer, classes, templates, "cpu", amp=False)
    classifier = zeroshot_classification.zero_shot_classifier(model, tokenizer, classes, templates, "cpu", amp=False)
    return metrics, *zeroshot_classification.run_classification(model, classifier, loader, "cpu", amp=False)


def evaluate(model: Path, folder: Path, tmp: Path, **more: Any) -> dict[str, Any]:
    records, problems = evaluate_wds(
        str(model), [folder], output=tmp / "out", cache=tmp / "cache", say=lambda text: None, **more
    )
    assert not problems, problems
    return records[0]


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_same_numbers_as_clip_benchmark(wds_digits: Path, kind: str, tmp_path: Path) -> None:
    words = sorted(set((wds_digits / "zeroshot_classification_templates.txt").read_text().replace("{c}", " ").split()))
    numbers = (wds_digits / "classnames.txt").read_text().split()
    write = write_open_clip if kind == "open_clip" else lambda folder: write_transformers(folder, words + numbers)
    model = write(tmp_path / "model")
    expected, logits, labels = clip_benchmark(model, wds_digits)
    found = evaluate(model, wds_digits, tmp_path)
    assert found["sizes"] == {"images": 1000, "classes": 10, "templates": 1}
    assert len(set(logits.argmax(dim=1).tolist())) > 1  # else every metric would be a constant
    # Where two logits are this near, the last bit decides, and another machine may decide otherwise.
    top = logits.topk(6, dim=1).values
    near = int(((top[:, :-1] - top[:, 1:]).min(dim=1).values < 1e-4).sum())
    assert near <= 2
    slack = {"acc1": near / 1000, "acc5": near / 1000, "mean_per_class_recall": near / 100 / 10}
    for name, value in expected.items():
        assert found["metrics"][name] == pytest.approx(value, abs=slack[name] + 1e-9), name
    assert scores(logits, labels, multilabel=False) == pytest.approx(expected, abs=1e-9)


def test_features_are_those_that_clip_benchmark_sees(wds_digits: Path, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "model", ["a", "photo", "0", "1"])
    theirs, transform, tokenizer = reference(folder)
    ours = load(str(folder))
    image = Image.effect_noise((40, 28), 90).convert("RGB")
    with torch.no_grad():
        torch.testing.assert_close(
            ours.image(ours.transform(None)(image)[None]),
            theirs.encode_image(transform(image)[None]),
            rtol=0,
            atol=1e-5,
        )
        texts = ["a photo 0", "a 1 photo of no word"]
        torch.testing.assert_close(ours.texts(texts), theirs.encode_text(tokenizer(texts)), rtol=0, atol=1e-5)


def write_wds(folder: Path, images: list[bytes], labels: list[Any], classes: list[str], suffix: str = "cls") -> Path:
    (folder / "test").mkdir(parents=True)
    half = len(images) // 2
    for number, rows in enumerate((range(half), range(half, len(images)))):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as tar:
            for i in rows:
                add(tar, f"s{i:07d}.png", images[i])
                out = io.BytesIO()
                np.save(out, np.asarray(labels[i]))
                add(tar, f"s{i:07d}.{suffix}", str(labels[i]).encode() if suffix == "cls" else out.getvalue())
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}. \n{c}, a colour\n")
    if suffix == "npy":
        (folder / "dataset_type.txt").write_text("multilabel\n")
    return folder


COLOURS = ["red ", "green", "blue", "grey"]  # CLIP_benchmark strips the space


def test_several_labels_an_image(tmp_path: Path) -> None:
    """With a class that no image has, and images that have none."""
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 4)) < 0.3).astype(np.int64)
    labels[:, 2], labels[:7] = 0, 0
    images = [picture(3 * i) for i in range(60)]
    folder = write_wds(tmp_path / "wds_many", images, list(labels), COLOURS, "npy")
    model = write_open_clip(tmp_path / "model")
    expected, logits, _ = clip_benchmark(model, folder)
    assert logits.unique().numel() == logits.numel()  # no ties, which CLIP_benchmark leaves to chance
    found = evaluate(model, folder, tmp_path)["metrics"]
    assert found == pytest.approx(expected, abs=1e-5)
    assert 0.1 < found["mean_average_precision"] < 0.9


def test_average_precision_does_not_saturate() -> None:
    """Scores of +-100, as a confident model has them, and ties taken together: scikit-learn's value."""
    rng = np.random.default_rng(1)
    score = (20 + np.round(rng.random((200, 3)) * 80, 1)).astype(np.float32)
    target = (rng.random((200, 3)) < 0.2).astype(np.int64)
    expected = average_precision_score(target, score)
    assert mean_average_precision(torch.tensor(score), torch.tensor(target)) == pytest.approx(expected, abs=1e-6)


def test_few_classes_and_absent_classes() -> None:
    logits = torch.tensor([[3.0, 1, 0, 0], [0, 3, 1, 0], [0, 0, 1, 3], [4, 3, 2, 1]])
    found = scores(logits, torch.tensor([0, 1, 1, 2]), multilabel=False)
    assert found == {"acc1": 0.5, "acc5": None, "mean_per_class_recall": (1 + 0.5 + 0) / 3}


def colours(folder: Path, images: list[bytes] | None = None) -> Path:
    images = images or [picture(5 * i) for i in range(24)]
    return write_wds(folder, images, [i % 4 for i in range(len(images))], COLOURS)


def lines(tmp: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp / "out" / FILE).read_text().splitlines() if line.startswith("{")]


def test_measured_once_until_the_folder_changes(tmp_path: Path) -> None:
    folder, model = colours(tmp_path / "wds_colours"), write_open_clip(tmp_path / "model")
    first = evaluate(model, folder, tmp_path)
    path = tmp_path / "out" / FILE
    with open(path, "a") as file:
        file.write('{"half": ')  # of a run that was killed
    assert evaluate(model, folder, tmp_path) == first
    (folder / "classnames.txt").write_text("red\nlime\nblue\ngrey\n")
    other = evaluate(model, folder, tmp_path)
    assert other["fingerprint"] != first["fingerprint"]
    assert evaluate(write_open_clip(tmp_path / "stranger", seed=3), folder, tmp_path)["weights"] != first["weights"]
    whole = [line for line in path.read_text().splitlines() if line != '{"half": ']
    assert [json.loads(line)["fingerprint"] for line in whole] == [first["fingerprint"], *2 * [other["fingerprint"]]]
    assert (first["dataset"], first["split"], first["model"]) == ("wds_colours", "test", "model")


def test_a_bad_image_is_named_counted_and_left_out(tmp_path: Path) -> None:
    images = [picture(5 * i) for i in range(24)]
    images[5] = b"no image at all"
    folder, model = colours(tmp_path / "wds_bad", images), write_open_clip(tmp_path / "model")
    said: list[str] = []
    records, problems = evaluate_wds(
        str(model), [folder], output=tmp_path / "out", cache=tmp_path / "cache", say=said.append
    )
    assert not problems
    assert (records[0]["bad_images"], records[0]["sizes"]["images"]) == (1, 23)
    assert "s0000005.png: not an image" in said[0]
    rest = [i for i in range(24) if i != 5]
    good = write_wds(tmp_path / "wds_good", [images[i] for i in rest], [i % 4 for i in rest], COLOURS)
    assert evaluate(model, good, tmp_path)["metrics"] == records[0]["metrics"]


def test_the_same_on_two_ranks(tmp_path: Path) -> None:
    folder, model = colours(tmp_path / "wds_colours"), write_open_clip(tmp_path / "model")
    expected = evaluate(model, folder, tmp_path / "one")["metrics"]
    run = partial(evaluate_wds, output=tmp_path / "out", cache=tmp_path / "cache")
    for records, problems in on_ranks(2, run, str(model), [folder, tmp_path / "none"]):
        assert [record["metrics"] for record in records] == [expected]
        assert list(problems) == [str(tmp_path / "none")]
    assert len(lines(tmp_path)) == 1


def test_weights_that_are_no_numbers_have_no_score(tmp_path: Path) -> None:
    folder, model = colours(tmp_path / "wds_colours"), write_open_clip(tmp_path / "model")
    clip: Any = open_clip.create_model(f"local-dir:{model}")
    broken = {
        name: torch.full_like(x, torch.nan) if "visual.proj" in name else x for name, x in clip.state_dict().items()
    }
    save_file({name: x.contiguous() for name, x in broken.items()}, model / "open_clip_model.safetensors")
    records, problems = evaluate_wds(
        str(model), [folder], output=tmp_path / "out", cache=tmp_path / "cache", say=lambda text: None
    )
    assert not records
    assert "no finite numbers" in problems[str(folder)]
    assert (tmp_path / "out" / FILE).read_text() == ""


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "split", "words"),
    [
        (shutil.rmtree, "test", ["is no folder", "classnames.txt"]),
        (remove("classnames.txt"), "test", ["is no wds folder", "classnames.txt", "vlcl eval retrieval"]),
        (write("classnames.txt", "one\n"), "test", ["classnames.txt", "at least two"]),
        (write("zeroshot_classification_templates.txt", "\n"), "test", ["templates.txt is empty"]),
        (lambda folder: None, "train", ["--split 'train'", "it has test"]),
        (remove("test/1.tar"), "test", ["1.tar", "do not exist"]),
        (write("classnames.txt", "red\ngreen\nblue\n"), "test", ["label 3 is out of range", "0..2"]),
        (write("dataset_type.txt", "Retrieval\n"), "test", ["vlcl eval retrieval"]),
        (write("test/1.tar", "x" * 600), "test", ["1.tar", "fetch the shard again"]),
    ],
)
def test_mistakes_are_named(damage: Any, split: str, words: list[str], tmp_path: Path) -> None:
    folder = colours(tmp_path / "wds_colours")
    damage(folder)
    with pytest.raises(UserError) as caught:
        open_folder(folder, split).read(split)
    assert str(folder) in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_command_goes_on_after_a_folder_that_fails(tmp_path: Path) -> None:
    folder, model = colours(tmp_path / "wds_colours"), write_open_clip(tmp_path / "model")
    options = ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--workers", "0"]
    done = CliRunner().invoke(app, ["eval", "zeroshot", str(model), str(tmp_path / "none"), str(folder), *options])
    assert done.exit_code == 1
    assert f"{tmp_path / 'none'}: error: " in done.output
    assert "wds_colours test" in done.output
    assert lines(tmp_path)[0]["metrics"]["acc5"] is None
    done = CliRunner().invoke(app, ["eval", "zeroshot", str(model), str(folder), *options])
    assert done.exit_code == 0
    assert "measured before" in done.output
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("place", [".", "test"])
def test_a_folder_of_classes_has_the_score_that_training_gives_it(tmp_path: Path, place: str) -> None:
    model = write_open_clip(tmp_path / "model")
    root, rng = tmp_path / "classes" / place, np.random.default_rng(0)
    for name in ("red_cup", "n01440764", "old chair"):
        (root / name).mkdir(parents=True)
        for i in range(7):
            Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    record = evaluate(model, tmp_path / "classes", tmp_path)
    built = load_model(str(model))
    trained = zeroshot_folder(built.encoder, built, str(root), ["a photo of a {}."], 8, torch.device("cpu"))
    assert record["metrics"]["acc1"] == pytest.approx(trained["zeroshot_top1"])
    assert record["sizes"] == {"images": 21, "classes": 3, "templates": 1}
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="no folder of pictures a class"):
        open_folder(tmp_path / "empty", "test")
