"""The linear probe: a batch norm without weights and a linear layer on frozen features, many settings side by side.

Each of K settings (learning rate, weight decay) is a head of its own; they see the same batches, so the batch norm is
the same for all and one product trains them together. The loop, for one setting (SGD, momentum 0.9, decay on weight and
bias, constant rate):

    for epoch: for batch in the loader's order (a batch of one is skipped):
        h = (x - mean(x)) / sqrt(var(x) + 1e-5)           running mean and variance kept for evaluation
        g = gradient of cross_entropy(h W' + b, y), or of the binary one for multilabel data
        momentum = 0.9 momentum + g + weight_decay * (W, b);   (W, b) -= lr * momentum
        after each epoch: score of softmax(h_val W' + b), h_val by the running statistics

Letters: N images, B of a batch, D width, C classes, K settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from vlcl_eval.elevater.search import Setting

MOMENTUM = 0.9
BN_EPS, BN_MOMENTUM = 1e-5, 0.1
BATCH_SIZE = 64
LOGITS_AT_ONCE = 1 << 26  # elements


@dataclass(frozen=True)
class HeadStart:
    """Where every head starts. weight [C, D], bias [C]."""

    weight_CD: Tensor
    bias_C: Tensor


def language_head(class_DC: Tensor) -> HeadStart:
    """The zero-shot classifier: unit text embeddings as weights, no bias."""
    return HeadStart(class_DC.T.contiguous(), class_DC.new_zeros(class_DC.shape[1]))


def random_head(width: int, num_classes: int, seed: int) -> HeadStart:
    """nn.Linear's own initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = torch.nn.Linear(width, num_classes)
    return HeadStart(linear.weight.detach(), linear.bias.detach())


def batch_order(num_images: int, epochs: int, batch_size: int = BATCH_SIZE) -> Iterator[list[Tensor]]:
    """The batches of each epoch as a DataLoader(shuffle=True) with a generator of seed 0 deals them."""
    loader = DataLoader(
        range(num_images),  # pyright: ignore[reportArgumentType]
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=torch.tensor,
    )
    for _ in range(epochs):
        yield list(loader)


class Heads:
    """K heads and their batch norm. All tensors have the dtype and device of `start`."""

    def __init__(self, start: HeadStart, settings: Sequence[Setting]) -> None:
        num, (num_classes, width) = len(settings), start.weight_CD.shape
        like = start.weight_CD
        self.weight_KCD = like.expand(num, num_classes, width).clone()
        self.bias_KC = start.bias_C.expand(num, num_classes).clone()
        self.momenta = [torch.zeros_like(self.weight_KCD), torch.zeros_like(self.bias_KC)]
        self.lr_K = like.new_tensor([setting.lr for setting in settings])
        self.decay_K = like.new_tensor([setting.weight_decay for setting in settings])
        self.mean_D, self.var_D = like.new_zeros(width), like.new_ones(width)

    def normalize(self, x_BD: Tensor) -> Tensor:
        """Training mode: by the batch's statistics, which enter the running ones."""
        return F.batch_norm(x_BD, self.mean_D, self.var_D, training=True, momentum=BN_MOMENTUM, eps=BN_EPS)

    def step(self, x_BD: Tensor, target: Tensor) -> None:
        h_BD = self.normalize(x_BD)
        logit_KBC = torch.baddbmm(self.bias_KC[:, None], h_BD.expand(len(self.lr_K), -1, -1), self.weight_KCD.mT)
        slope_KBC = logit_gradient(logit_KBC, target)
        grads = [slope_KBC.mT @ h_BD, slope_KBC.sum(dim=1)]
        for parameter, momentum, grad in zip((self.weight_KCD, self.bias_KC), self.momenta, grads):
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            momentum.mul_(MOMENTUM).add_(grad).addcmul_(parameter, self.decay_K.view(shape))
            parameter.addcmul_(momentum, self.lr_K.view(shape), value=-1)

    def probabilities(self, x_ND: Tensor) -> Iterator[Tensor]:
        """[N, C] for each setting in turn: softmax, evaluation mode."""
        h_ND = F.batch_norm(x_ND, self.mean_D, self.var_D, training=False, eps=BN_EPS)
        at_once = max(1, LOGITS_AT_ONCE // max(1, len(x_ND) * self.bias_KC.shape[1]))
        for k in range(0, len(self.lr_K), at_once):
            weight, bias = self.weight_KCD[k : k + at_once], self.bias_KC[k : k + at_once]
            logit = torch.baddbmm(bias[:, None], h_ND.expand(len(weight), -1, -1), weight.mT)
            yield from logit.softmax(dim=-1)


def logit_gradient(logit_KBC: Tensor, target: Tensor) -> Tensor:
    """Of the mean cross entropy (target [B], class indices) or binary cross entropy (target [B, C], 0 or 1)."""
    if target.ndim == 1:
        slope = logit_KBC.softmax(dim=-1)
        slope[:, torch.arange(len(target)), target] -= 1
        return slope / len(target)
    return (logit_KBC.sigmoid() - target) / target.numel()


@dataclass(frozen=True)
class Task:
    """Features and targets of training and of what is scored after each epoch. `score` of ([N, C], target)."""

    train_ND: Tensor
    train_target: Tensor
    test_ND: Tensor
    test_target: Tensor
    score: Callable[[Tensor, Tensor], float]


@dataclass
class Trained:
    """`scores[e][k]` of setting k after epoch e; `best` and `last`: probabilities of setting 0 at those epochs."""

    scores: list[list[float]]
    best_NC: Tensor
    last_NC: Tensor
    diverged_K: list[bool]


def train_heads(task: Task, start: HeadStart, settings: Sequence[Setting], epochs: int) -> Trained:
    """Train a head for each setting. Raises what torch raises where memory is short."""
    heads = Heads(start, settings)
    scores: list[list[float]] = []
    best_NC = last_NC = task.test_ND.new_empty(0)
    for batches in batch_order(len(task.train_ND), epochs):
        for index_B in batches:
            if len(index_B) > 1:
                heads.step(task.train_ND[index_B], task.train_target[index_B])
        values = []
        for k, prob_NC in enumerate(heads.probabilities(task.test_ND)):
            values.append(task.score(prob_NC, task.test_target))
            if k == 0:
                last_NC = prob_NC.clone()
                if not scores or values[0] > max(epoch[0] for epoch in scores):
                    best_NC = last_NC
        scores.append(values)
    diverged_K = [not bool(torch.isfinite(weight).all()) for weight in heads.weight_KCD]
    return Trained(scores, best_NC, last_NC, diverged_K)
