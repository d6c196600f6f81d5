"""Fine-tuning the tower against a plain loop on a copy of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eval_data import samples, write_model, write_native
from torch import nn

from vlcl_eval.elevater.command import evaluate
from vlcl_eval.elevater.finetune import Images, ImageTask, train_tower
from vlcl_eval.elevater.metrics import accuracy
from vlcl_eval.elevater.probe import batch_order, language_head
from vlcl_eval.elevater.search import Setting
from vlcl_eval.elevater.work import Protocol
from vlcl_eval.models import load


def problem() -> tuple[ImageTask, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(3, (70,), generator=generator)
    pixels = torch.randint(0, 200, (70, 3, 32, 32), dtype=torch.uint8, generator=generator)
    for c in range(3):
        pixels[target == c, c, 8:16] += 50
    class_DC = F.normalize(torch.randn(16, 3, generator=generator), dim=0)
    place = torch.randperm(70, generator=generator)
    train, test = (Images(pixels, rows, target[rows]) for rows in (place[:65], place[65:]))
    return ImageTask(train, test, accuracy), class_DC


@pytest.mark.parametrize("multilabel", [False, True])
def test_tower_and_head_train_as_a_plain_loop_does(tmp_path: Path, multilabel: bool) -> None:
    """65 images: a batch of 64 and one of 1, which is skipped."""
    task, class_DC = problem()
    if multilabel:
        several = (Images(x.pixels, x.place_N, F.one_hot(x.target, 3)) for x in (task.train, task.test))
        task = ImageTask(next(several), next(several), lambda p, y: float(p[0, 0]))
    model = load(write_model(tmp_path))
    before = copy.deepcopy(model.image.model.state_dict())
    setting = Setting(0.05, 1e-3)
    found = train_tower(model, task, language_head(class_DC), setting, epochs=3)

    clip: Any = copy.deepcopy(model.image.model)
    clip.visual.requires_grad_(True)
    norm, head = nn.BatchNorm1d(16, affine=False), nn.Linear(16, 3)
    head.weight.data, head.bias.data = class_DC.T.clone(), torch.zeros(3)
    optimizer = torch.optim.SGD(
        [*clip.visual.parameters(), *head.parameters()], lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay
    )
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.preprocess.mean, model.preprocess.std))
    train, test = ((part.pixels[part.place_N] / 255 - mean) / std for part in (task.train, task.test))
    scores, prob = [], torch.empty(0)
    for batches in batch_order(65, 3):
        clip.visual.train()
        norm.train()
        for index in batches:
            if len(index) == 1:
                continue
            logits = head(norm(clip.encode_image(train[index])))
            y = task.train.target[index]
            loss = F.binary_cross_entropy_with_logits(logits, y.float()) if multilabel else F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        clip.visual.eval()
        norm.eval()
        with torch.no_grad():
            prob = head(norm(clip.encode_image(test))).softmax(1)
        scores.append(task.score(prob, task.test.target))
    torch.testing.assert_close(found.last_NC, prob, atol=1e-5, rtol=1e-4)
    assert [epoch[0] for epoch in found.scores] == pytest.approx(scores, abs=1e-5)
    assert not torch.allclose(clip.visual.state_dict()["proj"], before["visual.proj"], atol=1e-4)  # it did train
    after = model.image.model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())  # and the model is as it was


def test_fine_tune_records(tmp_path: Path) -> None:
    write_native(tmp_path / "data", "kitti-distance", train=samples(4, 3, 2), test=samples(4, 5, 3))
    model = write_model(tmp_path / "model")
    protocol = Protocol(shots=(2,), seeds=(0,), methods=("linear_probe", "finetune"), setting=Setting(0.01, 1e-4))
    records, problems = evaluate(
        model, tmp_path / "data", ["kitti-distance"], protocol, output=tmp_path / "out", cache=tmp_path / "cache"
    )
    assert problems == {}
    probe, tuned = (next(r for r in records if r["method"] == m and r["mode"] == "elevater") for m in protocol.methods)
    tower = load(model).num_visual
    assert tuned["params"]["trainable"] - probe["params"]["trainable"] == tower
    assert tuned["images"]["forwards"] == tuned["images"]["reference"] == 50 * (8 + 20)
    assert probe["weights"] == tuned["weights"]
    assert 0 <= tuned["score"] <= 100


def test_fine_tune_searches_as_the_probe_does(tmp_path: Path) -> None:
    """The whole search on a few images: up to 90 runs of 10 epochs, each from the model's own weights."""
    write_native(tmp_path / "data", "kitti-distance", train=samples(4, 2, 2), test=samples(4, 2, 3))
    model = write_model(tmp_path / "model")
    protocol = Protocol(shots=(2,), seeds=(0,), methods=("finetune",), modes=("strict",))
    (record,), _ = evaluate(
        model, tmp_path / "data", ["kitti-distance"], protocol, output=tmp_path / "out", cache=tmp_path / "cache"
    )
    assert 42 < record["search"]["runs"] <= 90
    assert record["search"]["failed"] == []
    assert record["predictions"] is None
