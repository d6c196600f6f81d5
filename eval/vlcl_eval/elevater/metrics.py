"""The benchmark's four metrics, as shares of 1, on softmax probabilities (multilabel data too: so does the benchmark).

torchmetrics where it is equal: accuracy, ROC-AUC. Our own where it is not: the mean per class counts only classes that
occur among the targets, and the 11-point mAP has a quirk of its own.
Letters: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy

Metric = Callable[[Tensor, Tensor], float]


def accuracy(prob_NC: Tensor, target_N: Tensor) -> float:
    """Share of images whose most probable class is the right one; of equal ones the first counts.

    A row of NaN counts as class 0, as with numpy's argmax.
    """
    return float(multiclass_accuracy(prob_NC.argmax(dim=1), target_N, prob_NC.shape[1], "micro", validate_args=False))


def mean_per_class(prob_NC: Tensor, target_N: Tensor) -> float:
    """Mean of the recalls of the classes present in `target_N`; absent classes cannot be predicted either."""
    present_K = target_N.unique()
    guess_N = present_K[prob_NC[:, present_K].argmax(dim=1)]
    right_N = (guess_N == target_N).double()
    return float(torch.stack([right_N[target_N == k].mean() for k in present_K]).mean())


def roc_auc(prob_NC: Tensor, target_N: Tensor) -> float:
    """Area under the ROC curve of class 1 of two. 0 where it is undefined: NaN, or one class only."""
    if not bool(torch.isfinite(prob_NC).all()) or len(target_N.unique()) < 2:
        return 0.0
    return float(binary_auroc(prob_NC[:, 1], target_N, thresholds=None))


def eleven_point_map(prob_NC: Tensor, target_NC: Tensor, quirk: bool = True) -> float:
    """Mean over classes with a positive of the 11-point interpolated average precision.

    For r = 0, 0.1 .. 1: the highest precision at a recall of at least r. `quirk`: as in the ELEVATER toolkit, whose
    curve starts at recall 0 with precision 1, so that the first of the eleven is always 1. 0 where a score is NaN.
    """
    if not bool(torch.isfinite(prob_NC).all()):
        return 0.0
    positive_C = target_NC.sum(dim=0) > 0
    values = [_eleven_points(prob_NC[:, c], target_NC[:, c], quirk) for c in positive_C.nonzero()[:, 0].tolist()]
    return sum(values) / len(values) if values else 0.0


def _eleven_points(score_N: Tensor, target_N: Tensor, quirk: bool) -> float:
    order_N = score_N.argsort(descending=True, stable=True)
    score_N, hit_N = score_N[order_N], target_N[order_N].double()
    hits_N = hit_N.cumsum(0)
    precision_N = hits_N / torch.arange(1, len(hit_N) + 1, device=hit_N.device)
    recall_N = hits_N / hits_N[-1]
    last_of_tie_N = torch.cat([score_N[1:] != score_N[:-1], score_N.new_ones(1, dtype=torch.bool)])
    precision_N, recall_N = precision_N[last_of_tie_N], recall_N[last_of_tie_N]  # equal scores are taken together
    total = 0.0
    for tenth in range(11):
        reached = precision_N[recall_N >= tenth / 10]
        total += 1.0 if quirk and tenth == 0 else float(reached.max()) if len(reached) else 0.0
    return total / 11


def metric_of(name: str, mode: str) -> Metric:
    """The metric `name` in mode "elevater" or "strict" (the 11-point mAP without its quirk)."""
    if name == "11point_map":
        return lambda prob, target: eleven_point_map(prob, target, quirk=mode == "elevater")
    return {"accuracy": accuracy, "mean_per_class": mean_per_class, "roc_auc": roc_auc}[name]
