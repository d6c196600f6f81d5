"""What comes after training on pictures alone: export, linear classifier, few-shot ELEVATER, bias, a CLIP from it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eval_data import samples, write_native
from safetensors.torch import load_file
from shards import make_shards
from test_views_run import data, settings, trained

from vlcl.batch import Aux, Features, Keys, Peers
from vlcl.checkpoint import load_model
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.export.command import export_model
from vlcl.gradient_bias.batches import Pairs, batch_gradients, exact_gradient
from vlcl.gradient_bias.command import main as bias
from vlcl.losses import ContrastiveLoss
from vlcl.train import train
from vlcl_eval.elevater.command import evaluate
from vlcl_eval.elevater.search import Setting
from vlcl_eval.elevater.work import Protocol
from vlcl_eval.linear import evaluate_linear

__all__ = ["data", "trained"]  # fixtures


def test_an_export_is_for_timm_and_transformers(trained: Path, tmp_path: Path) -> None:
    import timm
    from transformers import AutoImageProcessor

    made = export_model(str(trained), tmp_path / "out", say=lambda text: None)
    assert set(made.findings.errors) == {"timm image", "TimmWrapperModel image"}
    visual = load_model(str(trained)).encoder.clip.visual
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), visual(x), rtol=1e-4, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out", local_files_only=True) is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "val/knn_top1" in card
    assert "Checked" in card
    with pytest.raises(UserError, match="exists already; give another folder, or --overwrite"):
        export_model(str(trained), tmp_path / "out", say=lambda text: None)
    export_model(str(trained), tmp_path / "out", overwrite=True, half=True, say=lambda text: None)
    assert load_file(tmp_path / "out" / "model.safetensors")["cls_token"].dtype == torch.float16


def test_a_plain_vit_is_a_vit_model_too(data: dict[str, Path], tmp_path: Path) -> None:
    from transformers import ViTModel

    more = ("model.name=timm/vit_tiny_patch16_224", "model.image_size=32", "train.steps=1", "views.linear_epochs=0")
    train(load_config(None, settings(data, tmp_path / "run", *more)))
    made = export_model(str(tmp_path / "run"), tmp_path / "out", say=lambda text: None)
    assert set(made.findings.errors) == {"timm image", "TimmWrapperModel image", "ViTModel image"}
    assert made.findings.pictures is not None
    assert made.findings.pictures < 0.05  # its image processor resizes by other code
    model = ViTModel.from_pretrained(tmp_path / "out" / "vit", local_files_only=True, add_pooling_layer=False)
    assert model.config.num_attention_heads == 3


def test_an_export_with_other_weights_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vlcl.export.views as views

    true = views._timm_weights

    def wrong(visual: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {
            name: x + 0.1 * (name == "blocks.0.mlp.fc2.bias") * torch.randn_like(x) for name, x in true(visual).items()
        }

    monkeypatch.setattr(views, "_timm_weights", wrong)
    with pytest.raises(UserError, match="timm computes other features"):
        export_model(str(trained), tmp_path / "out", say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_clip_training_starts_from_the_tower(data: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    pairs = make_shards(tmp_path / "pairs", (24,))
    clip = [f"data.train={pairs}", f"model.name=local-dir:{data['model']}", f"train.output={tmp_path / 'clip'}",
            "train.steps=1", "train.batch_size=8", "data.workers=0", "log.trackers=[]", "train.precision=fp32",
            "model.lock_image=true"]  # fmt: skip
    train(load_config(None, [*clip, f"model.pretrained_image={trained}"]))
    tower, got = (load_model(str(x)).encoder.clip.visual.state_dict() for x in (trained, tmp_path / "clip"))
    assert set(got) - set(tower) == {"proj"}
    assert all(torch.equal(got[name], x) for name, x in tower.items())
    with pytest.raises(UserError, match=r"model\.pretrained_image=.*another image tower.*class_embedding is \[32\]"):
        train(load_config(None, [*clip, "model.name=ViT-Pico-8-32", f"model.pretrained_image={trained}"]))
    with pytest.raises(UserError, match="no weights there"):
        train(load_config(None, [*clip, f"model.pretrained_image={tmp_path / 'nothing'}"]))


def test_a_linear_classifier_of_a_run(data: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    said: list[str] = []
    record = evaluate_linear(str(trained), data["folder"], output=tmp_path, epochs=20, crops=2, say=said.append)
    assert record["linear"] > 80
    assert (record["train"], record["test"], record["split"]) == (48, 12, "test")
    assert json.loads((tmp_path / "linear.jsonl").read_text())["linear"] == record["linear"]
    assert "linear" in said[0]
    again = evaluate_linear(str(trained), data["folder"], output=tmp_path, epochs=20, crops=2, say=said.append)
    assert (again["linear"], again["chosen_on"]) == (record["linear"], record["chosen_on"])
    with pytest.raises(UserError, match="is no folder: DIR should have train/"):
        evaluate_linear(str(trained), tmp_path, output=tmp_path)


def test_few_shot_has_a_random_head_and_zero_shot_a_reason(trained: Path, tmp_path: Path) -> None:
    write_native(tmp_path / "root", "mnist", train=samples(10, 8, 0), test=samples(10, 3, 1))
    few = {"shots": (5,), "seeds": (0,), "modes": ("strict",), "setting": Setting(0.1, 0.0)}
    for protocol, reason in (
        (Protocol(shots=(0, 5)), r"no text tower, which --shots 0 \(zero-shot\) and --init language need"),
        (Protocol(**few), r"which --init language needs. .*--init random --shots 5"),
    ):
        with pytest.raises(UserError, match=reason):
            evaluate(str(trained), tmp_path / "root", ["mnist"], protocol, output=tmp_path / "x", cache=tmp_path / "c")
    records, problems = evaluate(
        str(trained), tmp_path / "root", ["mnist"], Protocol(**few, init="random"), output=tmp_path / "out",
        cache=tmp_path / "c", say=lambda text: None,
    )  # fmt: skip
    assert problems == {}
    assert [(r["method"], r["shots"], r["protocol"]["init"]) for r in records] == [("linear_probe", 5, "random")]


def test_bias_measures_queries_against_keys(trained: Path, tmp_path: Path) -> None:
    bias(str(trained), batch_sizes="4,8", permutations=4, pairs=48, estimators="infonce,dcl,exact,table", weights=None,
         weight_pairs=16, data=None, output=str(tmp_path), seed=0)  # fmt: skip
    found = json.loads((tmp_path / "bias.json").read_text())
    assert any("keys" in note for note in found["notes"])
    names = {record["estimator"] for record in found["records"]}
    assert {"infonce", "table as trained"} <= names


def test_gradients_of_batches_with_keys_are_the_losses_own() -> None:
    """`batch_gradients` has batched products of its own; autograd through the loss is the reference."""
    g = torch.Generator().manual_seed(0)
    q1, q2, k1, k2 = (F.normalize(torch.randn(8, 5, generator=g, dtype=torch.float64), dim=1) for _ in range(4))
    keys, index_JB = Keys(k1, k2), torch.tensor([[0, 3, 5, 6], [7, 1, 2, 4]])
    pairs = Pairs.of(q1, q2, 6.0, keys=keys)
    for loss in (ContrastiveLoss(), ContrastiveLoss(positive=False), ContrastiveLoss(form="absolute")):
        got, _, _ = batch_gradients(loss, pairs, index_JB, Aux(), 0, torch.Generator())
        for j, index in enumerate(index_JB):
            leaves = [x[index].clone().requires_grad_() for x in (q1, q2)]
            scale = torch.tensor(math.log(6.0), dtype=torch.float64, requires_grad=True)
            own = Keys(k1[index], k2[index])
            unit = [F.normalize(x, dim=1) for x in leaves]  # the part along the sphere
            peers = Peers(unit[0].detach(), unit[1].detach(), index, keys=own)
            value = loss(Features(unit[0], unit[1], scale.exp(), keys=own), peers).loss
            expected = torch.autograd.grad(value, [*leaves, scale])
            for a, b in zip((got.image_JBD[j], got.text_JBD[j], got.log_scale_J[j]), expected):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    whole = exact_gradient(pairs)
    every, _, _ = batch_gradients(ContrastiveLoss(), pairs, torch.arange(8)[None], Aux(), 0, torch.Generator())
    torch.testing.assert_close(whole.text_JBD, every.text_JBD, rtol=1e-9, atol=1e-11)
