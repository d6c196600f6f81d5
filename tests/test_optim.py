"""Which parameters decay and how fast each learns; the schedule."""

from __future__ import annotations

import math
import re
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from vlcl.config import OptimConfig, load_config
from vlcl.errors import UserError
from vlcl.model import build_model
from vlcl.optim import OF_THE_STEP, build_optimizer, rate_factor
from vlcl.parameter_groups import Rates, layer_numbers, parameter_groups


def test_decay_is_for_matrices_and_the_scale_has_its_own_rate() -> None:
    encoder = build_model("ViT-Nano-8-64").encoder
    names = {id(p): name for name, p in encoder.named_parameters()}
    decay, plain, scale = parameter_groups(encoder, Rates(1e-3, 1e-3, 1e-4), 0.2)
    assert [names[id(p)] for p in scale["params"]] == ["clip.logit_scale"]
    assert (scale["peak_lr"], scale["weight_decay"], plain["weight_decay"]) == (1e-4, 0.0, 0.0)
    assert all(p.ndim >= 2 and not names[id(p)].endswith("bias") for p in decay["params"])
    assert any("ln_1.weight" in names[id(p)] for p in plain["params"])
    assert sum(len(g["params"]) for g in (decay, plain, scale)) == len(names)
    assert len(parameter_groups(encoder, Rates(1e-3, 1e-3, 0.0), 0.2)) == 2
    assert not encoder.clip.logit_scale.requires_grad


def rates_of(encoder: nn.Module, *overrides: str) -> dict[str, tuple[float, float]]:
    """Peak rate and decay of each parameter, by name."""
    settings = load_config(None, ["data.train=x", "optim.lr=1e-3", *overrides]).optim
    given: dict[str, Any] = settings.model_dump(exclude=OF_THE_STEP) | {"logit_scale_ratio": 0.2}
    groups = build_optimizer(encoder, **given).param_groups
    found = {id(p): (group["peak_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return {name: found[id(p)] for name, p in encoder.named_parameters()}


def test_early_layers_of_each_tower_learn_more_slowly() -> None:
    encoder = build_model("ViT-Nano-8-64").encoder
    rates = rates_of(encoder, "optim.image_lr=1e-4", "optim.image_layer_decay=0.5", "optim.text_layer_decay=0.9")
    depths = len(encoder.clip.visual.transformer.resblocks), len(encoder.clip.transformer.resblocks)
    for name, (rate, _) in rates.items():
        number = re.search(r"resblocks\.(\d+)", name)
        lr, decay, blocks = (1e-4, 0.5, depths[0]) if "visual" in name else (1e-3, 0.9, depths[1])
        if name == "clip.logit_scale":
            expected = 2e-4
        elif number:
            expected = lr * decay ** (blocks - int(number[1]))
        elif re.search(r"ln_post|ln_final|proj$|text_projection", name):
            expected = lr
        else:  # embeddings
            expected = lr * decay ** (blocks + 1)
        assert rate == pytest.approx(expected), name


TOWERS = {  # names in the order of depth, from the last
    "timm's stages": (
        ["clip.visual.trunk.stem.0.weight", "clip.visual.trunk.stages.0.blocks.1.conv_dw.weight",
         "clip.visual.trunk.stages.1.downsample.0.weight", "clip.visual.trunk.stages.1.blocks.0.mlp.fc1.weight",
         "clip.visual.trunk.stages.1.blocks.10.gamma", "clip.visual.head.proj.weight"],
        [5, 4, 3, 2, 1, 0],
    ),
    "ResNet": (
        ["clip.visual.conv1.weight", "clip.visual.layer1.0.conv1.weight", "clip.visual.layer2.0.downsample.0.weight",
         "clip.visual.layer2.1.bn3.weight", "clip.visual.attnpool.positional_embedding"],
        [4, 3, 2, 1, 0],
    ),
    "transformers": (
        ["clip.text.transformer.embeddings.word_embeddings.weight", "clip.text.transformer.encoder.layer.0.output.bias",
         "clip.text.transformer.encoder.layer.11.attention.self.query.weight", "clip.text.proj.weight"],
        [3, 2, 1, 0],
    ),
    "stages within the embedding": (
        ["clip.visual.trunk.patch_embed.backbone.stages.1.blocks.2.norm.weight", "clip.visual.trunk.blocks.0.norm1",
         "clip.visual.trunk.blocks.1.norm1.weight", "clip.visual.trunk.fc_norm.weight"],
        [3, 2, 1, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOWERS)
def test_layers_are_counted_from_the_end(case: str) -> None:
    names, expected = TOWERS[case]
    assert list(layer_numbers(names).values()) == expected


def test_a_tower_without_known_blocks_is_refused() -> None:
    encoder = nn.Module()
    encoder.visual = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"optim.image_layer_decay=0.5: vlcl does not know .*visual.weight"):
        parameter_groups(encoder, Rates(1, 1, 1, decay_image=0.5), 0.1)


def test_names_may_be_left_out_of_the_decay() -> None:
    encoder = build_model("ViT-Nano-8-64").encoder
    usual, other = rates_of(encoder), rates_of(encoder, "optim.no_decay=['*embedding*']")
    changed = {name for name in usual if usual[name] != other[name]}
    assert changed == {name for name in usual if "embedding" in name and usual[name][1] > 0}
    assert all(other[name] == (1e-3, 0.0) for name in changed)
    with pytest.raises(UserError, match=r"no parameter's name fits '\*embeding\*'; they are such as clip"):
        rates_of(encoder, "optim.no_decay=['*embeding*']")


def test_a_table_of_biases_is_a_bias_as_in_open_clip() -> None:
    encoder = nn.Module()
    encoder.visual = nn.Module()
    encoder.visual.relative_position_bias_table = nn.Parameter(torch.zeros(3, 2))
    encoder.visual.proj = nn.Parameter(torch.zeros(3, 2))
    groups = parameter_groups(encoder, Rates(1, 1, 1), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[1]["params"] == [encoder.visual.relative_position_bias_table]


@pytest.mark.parametrize("name", ["timm/muon", "timm/lamb", "timm/lion", "timm/lars"])
def test_timm_s_optimizers_take_the_groups(name: str) -> None:
    encoder = build_model("ViT-Nano-8-64").encoder
    settings = load_config(None, ["data.train=x", f"optim.name={name}", "optim.image_layer_decay=0.8"]).optim
    given: dict[str, Any] = settings.model_dump(exclude=OF_THE_STEP) | {"logit_scale_ratio": 0.2}
    optimizer = build_optimizer(encoder, **given)
    before = {n: p.clone() for n, p in encoder.named_parameters()}
    tokens = open_clip.get_tokenizer("ViT-B-32")(["a", "b"])[:, : encoder.clip.context_length]
    features = encoder(torch.randn(2, 3, 64, 64), tokens)
    ((features.image_BD - features.text_BD).square().sum() * features.logit_scale).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) and p.isfinite().all() for n, p in encoder.named_parameters()
               if p.grad is not None and p.grad.any())  # fmt: skip


def factors(*overrides: str) -> list[float]:
    optim = load_config(None, ["data.train=x", "optim.lr=1.0", "optim.warmup=10", *overrides]).optim
    return [rate_factor(step, 100, optim) for step in range(101)]


def test_the_rate_warms_up_and_falls_to_its_floor() -> None:
    rates = factors("optim.lr_min=0.1")
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert factors("optim.schedule=constant")[99] == 1.0


@pytest.mark.parametrize(
    ("shape", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)], ids=lambda x: str(x)[:6]
)
def test_warm_up_stable_decay(shape: str, half: float) -> None:
    rates = factors("optim.schedule=wsd", "optim.cooldown=0.4", f"optim.cooldown_shape={shape}", "optim.lr_min=0.2")
    assert set(rates[9:61]) == {1.0}
    assert rates[61] < 1.0
    assert rates[80] == pytest.approx(0.2 + 0.8 * half)
    assert rates[100] == pytest.approx(0.2)
    assert rates[60:] == sorted(rates[60:], reverse=True)


def test_a_cooldown_of_the_whole_run_begins_after_the_warm_up() -> None:
    optim = OptimConfig(schedule="wsd", cooldown=1.0, cooldown_shape="linear", warmup=50)
    assert rate_factor(50, 100, optim) == 1.0
    assert rate_factor(75, 100, optim) == pytest.approx(0.5)
