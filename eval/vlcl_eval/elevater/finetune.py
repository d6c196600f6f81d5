"""Fine-tuning the image tower with a head, by the rules of the linear probe: the same batches, optimizer and epochs.

The images are resized once and kept as uint8 in memory, 3 S S bytes each (150 KB at 224 pixels): the protocol has no
augmentation. Every run starts from the model's own weights and leaves them as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from open_clip.transformer import PatchDropout
from torch import Tensor, nn

from vlcl_eval.elevater.probe import BN_EPS, BN_MOMENTUM, MOMENTUM, HeadStart, Trained, batch_order
from vlcl_eval.elevater.search import Setting
from vlcl_eval.models import EvalModel

EVAL_BATCH = 256


@dataclass(frozen=True)
class Images:
    """The images `pixels[place_N]`, uint8 [3, S, S] each, and their targets [N] or [N, C]."""

    pixels: Tensor
    place_N: Tensor
    target: Tensor


@dataclass(frozen=True)
class ImageTask:
    """What is trained on, what is scored after each epoch, and how."""

    train: Images
    test: Images
    score: Callable[[Tensor, Tensor], float]


class Classifier(nn.Module):
    """linear(batch_norm(tower(image))). Logits [B, C]."""

    def __init__(self, model: EvalModel, start: HeadStart) -> None:
        super().__init__()
        num_classes, width = start.weight_CD.shape
        self.image = model.image
        self.norm = nn.BatchNorm1d(width, eps=BN_EPS, momentum=BN_MOMENTUM, affine=False)
        self.head = nn.Linear(width, num_classes)
        self.head.weight.data = start.weight_CD.clone()
        self.head.bias.data = start.bias_C.clone()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(model.preprocess.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(model.preprocess.std).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.norm(self.image((pixels.float() / 255 - self.mean) / self.std).float()))


@contextmanager
def borrowed(model: EvalModel) -> Iterator[nn.Module]:
    """The tower ready to train; its weights and modes come back afterwards."""
    tower = model.image.tower
    kept = {name: x.detach().clone() for name, x in tower.state_dict().items()}
    dropped = [(module, module.prob) for module in tower.modules() if isinstance(module, PatchDropout)]
    for module, _ in dropped:
        module.prob = 0.0  # the protocol sees all patches
    try:
        yield tower.train().requires_grad_(True)
    finally:
        for module, prob in dropped:
            module.prob = prob
        tower.load_state_dict(kept)
        tower.eval().requires_grad_(False)


def train_tower(
    model: EvalModel, task: ImageTask, start: HeadStart, setting: Setting, epochs: int, precision: str = "fp32"
) -> Trained:
    """Train tower and head with one setting; scores after each epoch. Raises torch's own error if memory is short."""
    device = next(model.image.parameters()).device
    multilabel = task.train.target.ndim == 2
    criterion = nn.BCEWithLogitsLoss() if multilabel else nn.CrossEntropyLoss()
    scores: list[list[float]] = []
    best_NC = last_NC = torch.empty(0)
    with borrowed(model) as tower:
        classifier = Classifier(model, start).to(device)
        parameters = [*tower.parameters(), *classifier.head.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=setting.lr, momentum=MOMENTUM, weight_decay=setting.weight_decay)
        for batches in batch_order(len(task.train.place_N), epochs):
            tower.train()
            classifier.norm.train()
            for index_B in batches:
                if len(index_B) == 1:
                    continue
                target = task.train.target[index_B].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    logit_BC = classifier(task.train.pixels[task.train.place_N[index_B]].to(device))
                loss = criterion(logit_BC.float(), target.float() if multilabel else target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            tower.eval()
            classifier.norm.eval()
            last_NC = _probabilities(classifier, task.test, device, precision)
            value = task.score(last_NC, task.test.target)
            if not scores or value > max(epoch[0] for epoch in scores):
                best_NC = last_NC
            scores.append([value])
        diverged = not all(bool(torch.isfinite(p).all()) for p in parameters)
    return Trained(scores, best_NC, last_NC, [diverged])


@torch.no_grad()
def _probabilities(classifier: Classifier, images: Images, device: torch.device, precision: str) -> Tensor:
    parts = []
    for place_B in images.place_N.split(EVAL_BATCH):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts.append(classifier(images.pixels[place_B].to(device)).float().softmax(dim=1).cpu())
    return torch.cat(parts)
