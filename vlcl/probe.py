"""What features are worth to a classifier: weighted nearest neighbours, and a linear map trained on them.

Letters: N pictures of the bank (those with known labels), Q questions, D width, C classes, L learning rates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlcl import distributed
from vlcl.batch import Batch

MOST_SCORES = 1 << 24  # similarities at a time


@dataclass(frozen=True)
class Labelled:
    """Features (as the tower gives them, float32) and labels of all ranks' pictures, on every rank, in row order."""

    feature_ND: Tensor
    label_N: Tensor
    row_N: Tensor
    skipped: int = 0


@torch.no_grad()
def encode_labelled(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    autocast: Callable[..., AbstractContextManager[object]] = nullcontext,
) -> Labelled:
    """encode: pictures [B, C, H, W] -> [B, D], in eval mode. batches: this rank's, with labels in place of tokens (a
    collective)."""
    features, labels, rows, skipped = [], [], [], Counter[str]()
    for batch in batches:
        skipped.update(batch.skipped)
        if len(batch):
            with autocast():
                features.append(encode(batch.images_BCHW.to(device, non_blocking=True)).float())
            labels.append(batch.tokens_BL.to(device))
            rows.append(batch.row_B.to(device))
    width = max(distributed.gather_objects(features[0].shape[1] if features else 0))
    none = torch.empty(0, dtype=torch.long, device=device)
    feature_ND = distributed.gather_uneven(torch.cat([torch.empty(0, width, device=device), *features]))
    label_N, row_N = (distributed.gather_uneven(torch.cat([none, *x])) for x in (labels, rows))
    order = row_N.argsort()
    total = sum(distributed.gather_objects(sum(skipped.values())))
    return Labelled(feature_ND[order], label_N[order], row_N[order], total)


def nearest(bank_ND: Tensor, query_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The cosines [Q, k] and the places [Q, k] of the nearest in the bank, best first; all k that there are."""
    bank_ND, k = F.normalize(bank_ND, dim=1), min(k, len(bank_ND))
    found = [
        (F.normalize(part_QD, dim=1) @ bank_ND.T).topk(k, dim=1)
        for part_QD in query_QD.split(max(1, MOST_SCORES // max(len(bank_ND), 1)))
    ]
    return torch.cat([x.values for x in found]), torch.cat([x.indices for x in found])


@torch.no_grad()
def knn_accuracy(bank: Labelled, queries: Labelled, k: int = 20, tau: float = 0.07) -> float:
    """Share of the queries whose class has the most weight among their k nearest in the bank, all ranks sharing the
    queries (a collective). Of equal weights the smaller class number wins.

    for each query: votes[label of j] += exp(cos(query, j) / tau) for its k nearest j
    """
    mine = torch.arange(distributed.rank(), len(queries.label_N), distributed.world_size(), device=bank.label_N.device)
    classes = int(bank.label_N.max()) + 1
    cosine_QK, place_QK = nearest(bank.feature_ND, queries.feature_ND[mine], k)
    weight_QK = torch.exp((cosine_QK - cosine_QK[:, :1]) / tau)  # the largest is 1: the same votes, and none overflows
    votes_QC = torch.zeros(len(mine), classes, device=weight_QK.device)
    votes_QC.scatter_add_(1, bank.label_N[place_QK], weight_QK)
    hits = (votes_QC.argmax(dim=1) == queries.label_N[mine]).sum()
    return float(distributed.all_sum(hits.double())) / max(len(queries.label_N), 1)


@dataclass(frozen=True)
class LinearProtocol:
    """SGD on fixed features: `epochs` passes in batches of `batch_size`, momentum 0.9, no weight decay, each learning
    rate of `lrs` (at a batch of 256; scaled linearly) falling to 0 along a cosine. The rate is chosen on a tenth of the
    training pictures, the classifier then trained on all of them."""

    epochs: int = 90
    batch_size: int = 1024
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    seed: int = 0


@dataclass(frozen=True)
class LinearResult:
    """lr: the chosen one. chosen_on: accuracies on the tenth that it was chosen on, by learning rate. accuracies: of
    each set of queries."""

    lr: float
    chosen_on: dict[float, float]
    accuracies: list[float]


def linear_accuracy(
    train: Labelled, queries: Sequence[Labelled], protocol: LinearProtocol | None = None,
    crops: Sequence[Tensor] = (),
) -> LinearResult:  # fmt: skip
    """Accuracy of a linear classifier of the features on each set of queries (on one rank; no collective). Features are
    standardized by the training pictures' mean and standard deviation, as a BatchNorm without weights would. crops:
    other features [N, D] of the same training pictures, which are trained on instead, an epoch each in turn."""
    protocol = protocol or LinearProtocol()
    std_D, mean_D = torch.std_mean(train.feature_ND.float(), dim=0)
    scale_D = std_D.clamp(min=1e-6 * float(std_D.max()) + 1e-12)

    def standard(x_ND: Tensor) -> Tensor:
        return (x_ND.float() - mean_D) / scale_D

    classes = 1 + max(int(x.label_N.max()) for x in (train, *queries) if len(x.label_N))
    x_ND, label_N = standard(train.feature_ND), train.label_N
    trained = [standard(x) for x in crops] or [x_ND]
    order = torch.randperm(len(label_N), generator=torch.Generator().manual_seed(protocol.seed)).to(label_N.device)
    held, rest = order[: max(len(order) // 10, 1)], order[max(len(order) // 10, 1) :]
    heads = _train([x[rest] for x in trained], label_N[rest], classes, protocol.lrs, protocol)
    found = {lr: _accuracy(head, x_ND[held], label_N[held]) for lr, head in zip(protocol.lrs, heads)}
    best = max(found, key=lambda lr: (found[lr], -lr))
    (head,) = _train(trained, label_N, classes, (best,), protocol)
    return LinearResult(best, found, [_accuracy(head, standard(x.feature_ND), x.label_N) for x in queries])


def _accuracy(head: nn.Module, x_ND: Tensor, label_N: Tensor) -> float:
    with torch.no_grad():
        return float((head(x_ND).argmax(dim=1) == label_N).double().mean())


@torch.enable_grad()
def _train(
    crops: Sequence[Tensor], label_N: Tensor, classes: int, lrs: Sequence[float], how: LinearProtocol
) -> list[nn.Linear]:
    """A classifier for each learning rate, all on the same batches."""
    heads = [nn.Linear(crops[0].shape[1], classes, device=label_N.device) for _ in lrs]
    for head in heads:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    size = min(how.batch_size, len(label_N))
    groups = [{"params": list(head.parameters()), "peak_lr": lr * size / 256} for lr, head in zip(lrs, heads)]
    optimizer = torch.optim.SGD(groups, lr=lrs[0], momentum=0.9)
    generator, total, step = torch.Generator().manual_seed(how.seed), how.epochs * (len(label_N) // size), 0
    for epoch in range(how.epochs):
        x_ND = crops[epoch % len(crops)]
        order = torch.randperm(len(label_N), generator=generator).to(label_N.device)
        for batch in order[: len(order) // size * size].split(size):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * 0.5 * (1 + math.cos(math.pi * step / total))
            x_BD, label_B = x_ND[batch], label_N[batch]
            optimizer.zero_grad()
            torch.stack([F.cross_entropy(head(x_BD), label_B) for head in heads]).sum().backward()
            optimizer.step()
            step += 1
    return heads
