"""The check that stands between an export and its folder, and models that transformers has no class for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from export_models import Exports, card_of, export, families, write_folder
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from vlcl.checkpoint import load_model
from vlcl.errors import UserError
from vlcl.hf import forms, processor


@pytest.fixture
def run(exports: Exports) -> Path:
    return exports.run


def test_a_wrong_activation_is_caught_and_placed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "activation", lambda config: "quick_gelu")
    with pytest.raises(
        UserError, match=r"image tower as transformers loads it .* first at vision_model.encoder.layers.0"
    ):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "image .* first at vision_model.encoder.layers.0 "),
        ("vision_model.pre_layrnorm.weight", "image .* first at vision_model.pre_layrnorm "),
        ("visual_projection.weight", "image .* after its last layer"),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", "text .* first at text_model.encoder.layers.0 "),
        ("text_projection.weight", "text .* after its last layer"),
    ],
)
def test_a_wrong_weight_is_caught_and_placed(
    tensor: str, place: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = forms.Form.weights

    def wrong(self: forms.Form, clip: Any) -> dict[str, torch.Tensor]:
        weights = true(self, clip)
        return weights | {tensor: weights[tensor] + 0.05 * torch.randn_like(weights[tensor])}

    monkeypatch.setattr(forms.Form, "weights", wrong)
    with pytest.raises(UserError, match=f"the {place}.*Nothing was written"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_diverged_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", next(iter(families("clip").values())))
    file = tmp_path / "in" / "open_clip_model.safetensors"
    save_file({name: x * float("nan") for name, x in load_file(file).items()}, file)
    with pytest.raises(UserError, match="no finite numbers"):
        export(source, tmp_path / "out")


NO_FORM = {
    "RN50": ({"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, {}, "ResNets of CLIP"),
    "CLIPA": (
        {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 24, "no_ln_pre": True},
        {}, "vision_cfg.no_ln_pre=True",
    ),
    "layer scale": (
        {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 24}, {"ls_init_value": 1e-4},
        "text_cfg.ls_init_value=0.0001",
    ),
    "ConvNeXt": (
        {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64}, {},
        "timm's test_convnext has no class there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FORM)
def test_what_transformers_has_no_class_for_is_open_clip_only(name: str, tmp_path: Path) -> None:
    vision, more, reason = NO_FORM[name]
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2} | more
    source = write_folder(tmp_path / "in", {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text})
    made = export(source, tmp_path / "out")
    assert made.form is None
    assert reason in made.reason
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "open_clip_config.json", "open_clip_model.safetensors",
    }  # fmt: skip
    front, card = card_of(tmp_path / "out")
    assert front["library_name"] == "open_clip"
    assert reason in card
    assert "from transformers" not in card
    expected, got = (load_model(str(folder)) for folder in (source, tmp_path / "out"))
    tokens = expected.tokenize(["a cat"])
    assert torch.equal(expected.encoder.eval().text(tokens), got.encoder.eval().text(got.tokenize(["a cat"])))


def test_a_bias_that_clip_models_lack_is_told(tmp_path: Path) -> None:
    config = next(iter(families("clip").values())) | {"init_logit_bias": -10}
    export(write_folder(tmp_path / "in", config), tmp_path / "out")
    assert "trained with a bias of the logits, which `CLIPModel` has no place for" in card_of(tmp_path / "out")[1]


def test_transparent_pictures_are_checked(exports: Exports) -> None:
    """transformers puts them on white as training does, open_clip drops the transparency: the card says both."""
    made = exports.of("run").made
    found = made.findings.transparent
    assert found["transformers"] < 0.02 < found["open_clip"]
    assert f"open_clip {found['open_clip']:.1e}" in card_of(made.folder)[1]


def test_texts_that_become_other_tokens_are_counted(exports: Exports) -> None:
    """ftfy's mending of broken encodings has no place in a tokenizer; HTML entities and curly quotes have."""
    made = exports.of("run").made
    assert "schÃ¶n" in made.findings.other_tokens
    assert not {"salt &amp; pepper", "it’s a “test”", "", "wow! " * 200} & set(made.findings.other_tokens)
    card = card_of(made.folder)[1]
    assert f"{len(made.findings.other_tokens)} of the {made.findings.texts} texts" in card
    assert "- `schÃ¶n`" in card


def test_shards_that_are_gone_are_replaced_by_drawn_pictures(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "tiny"
    moved.mkdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"train": "gone/{0..3}.tar", "val": "s3://nowhere/0.tar"}
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    (moved / "step-00000008").symlink_to(run / "step-00000008")
    made = export(moved, tmp_path / "out")
    assert made.findings.origin == "drawn pictures"


def test_a_wrong_activation_does_not_hide_behind_half_precision(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "activation", lambda config: "quick_gelu")
    with pytest.raises(UserError, match="image tower as transformers loads it"):
        export(run, tmp_path / "out", half=True)


@pytest.mark.parametrize(
    "wrong",
    [{"image_mean": [0.0] * 3}, {"resample": 2, "size": {"shortest_edge": 40}}, {"do_center_crop": False}],
)
def test_a_wrong_image_processor_is_caught(
    wrong: dict, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = processor.image_processor
    monkeypatch.setattr(processor, "image_processor", lambda *given: true(*given) | wrong)
    with pytest.raises((UserError, ValueError), match=r"image processor|same size"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "vision", "reason"),
    [
        ({"tokenizer_kwargs": {"additional_special_tokens": ["<foo>"]}, "vocab_size": 49409}, {}, "additional_special"),
        ({"norm_kwargs": {"bias": False}}, {}, "text_cfg.norm_kwargs"),
        ({}, {"norm_kwargs": {"elementwise_affine": False}}, "vision_cfg.norm_kwargs"),
        ({"no_causal_mask": True}, {}, "text_cfg.no_causal_mask"),
        ({}, {"image_size": [24, 48]}, "is no square"),
    ],
)
def test_settings_that_the_classes_have_no_place_for(text: dict, vision: dict, reason: str, tmp_path: Path) -> None:
    config = next(iter(families("clip").values()))
    config = config | {"text_cfg": config["text_cfg"] | text, "vision_cfg": config["vision_cfg"] | vision}
    made = export(write_folder(tmp_path / "in", config), tmp_path / "out")
    assert made.form is None
    assert reason in str(made.reason)


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_the_tokenizer_of_every_way_of_cleaning(clean: str) -> None:
    """On random printable ASCII: all but what an HTML entity or a special token could be."""
    ours: Any = SimpleTokenizer(context_length=77, clean=clean)
    theirs = processor.bpe_tokenizer(ours, clean, pad_row=False)
    random = np.random.default_rng(0)
    words = ["DON'T", "It's", "we'LL", "a_b", "C3PO", "24/7", "e-mail", "(ok)", "x", "THE", "cat's", "wow!!", "$5.00"]
    letters = [chr(i) for i in range(32, 127) if chr(i) not in "&<|"]
    for _ in range(400):
        text = " ".join(random.choice(words, 4)) + " " + "".join(random.choice(letters, 12))
        assert theirs.encode(text).ids == [ours.sot_token_id, *ours.encode(text), ours.eot_token_id], text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), ("", "is damaged"), ('{"model_cfg": {"embed_dim": 8}}', "no config of an open_clip model")],
)
def test_a_damaged_config_is_told(content: str, message: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", next(iter(families("clip").values())))
    (tmp_path / "in" / "open_clip_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        export(source, tmp_path / "out")


def test_settings_unknown_to_open_clip_are_told(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", next(iter(families("clip").values())))
    path = tmp_path / "in" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["from_the_future"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="from_the_future"):
        export(source, tmp_path / "out")


def test_no_average_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run, and has no moving average"):
        export("ViT-Nano-8-64:weights.safetensors", tmp_path / "out", averaged=True)


def test_the_card_tells_what_crops_of_every_remainder_cost(exports: Exports) -> None:
    """Where what is cut off is odd, or 3 more than a multiple of 4, transformers cuts a pixel beside torchvision."""
    from transformers import AutoModel, AutoProcessor

    made = exports.of("run").made
    built: Any = load_model(str(made.folder))
    model: Any = AutoModel.from_pretrained(made.folder).eval()
    processor: Any = AutoProcessor.from_pretrained(made.folder)
    side, rng = built.preprocess_eval(Image.new("RGB", (9, 9))).shape[-1], np.random.default_rng(5)
    cost = []
    for more in range(1, 9):
        blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(blocks).resize((side + more, side), Image.Resampling.NEAREST)
        with torch.no_grad():
            theirs = model.get_image_features(**processor(images=picture, return_tensors="pt")).pooler_output
            ours = built.encoder.image(built.preprocess_eval(picture)[None])
        cost.append(float((torch.nn.functional.normalize(theirs, dim=1) - ours).abs().max()))
    said = made.findings.pictures
    assert said is not None
    assert f"features differ by up to {said:.1e}" in card_of(made.folder)[1]
    assert max(cost) <= 2 * said  # other pictures
    assert max(cost[2::4]) > 0.3 * said  # the card's figure is of these
    assert max(cost[1::4] + cost[3::4]) < 1e-5  # and of no others
