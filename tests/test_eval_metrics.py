"""The benchmark's metrics against hand-made vectors and scikit-learn, which the benchmark itself uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, precision_recall_curve, roc_auc_score

from vlcl_eval.elevater.metrics import accuracy, eleven_point_map, mean_per_class, metric_of, roc_auc


def probabilities(num: int, classes: int, seed: int, sharp: float = 2) -> torch.Tensor:
    return (sharp * torch.randn(num, classes, generator=torch.Generator().manual_seed(seed))).softmax(1)


def test_eleven_points_of_the_reference() -> None:
    """y = 0 0 1 0 1 by falling score: 0.454545 with the quirk at recall 0, 0.4 without."""
    target = torch.tensor([[0], [0], [1], [0], [1]])
    score = torch.tensor([[0.9], [0.8], [0.7], [0.2], [0.1]])
    assert eleven_point_map(score, target) == pytest.approx(0.454545, abs=1e-6)
    assert eleven_point_map(score, target, quirk=False) == pytest.approx(0.4)
    assert metric_of("11point_map", "strict")(score, target) == pytest.approx(0.4)


def slow_eleven_points(target: np.ndarray, score: np.ndarray) -> float:
    """For r = 1, 0.9 .. 0: the highest precision at a recall of at least r, on scikit-learn's curve."""
    precision, recall, _ = precision_recall_curve(target, score)
    return sum(max(precision[recall >= r - 1e-12]) for r in np.linspace(1, 0, 11)) / 11


@pytest.mark.parametrize("seed", range(8))
def test_eleven_points_against_the_curve(seed: int) -> None:
    """With ties, and a class without positives, which does not count."""
    rng = np.random.default_rng(seed)
    target = (rng.random((200, 5)) < 0.2).astype(int)
    target[:, 3] = 0
    score = torch.tensor(rng.integers(0, 30, (200, 5)) / 30)
    expected = np.mean([slow_eleven_points(target[:, c], score[:, c].numpy()) for c in (0, 1, 2, 4)])
    assert eleven_point_map(score, torch.tensor(target)) == pytest.approx(expected, abs=1e-9)
    assert average_precision_score(target[:, 0], score[:, 0]) != pytest.approx(expected)  # another metric


def test_accuracy() -> None:
    prob = torch.tensor([[0.2, 0.4, 0.4], [0.5, 0.3, 0.2], [torch.nan] * 3, [0.1, 0.1, 0.8]])
    assert accuracy(prob, torch.tensor([1, 0, 1, 2])) == 0.75  # of equal ones the first; NaN is class 0
    assert accuracy(prob, torch.tensor([2, 1, 0, 0])) == 0.25


@pytest.mark.parametrize("seed", range(4))
def test_mean_per_class_is_balanced_accuracy_over_present_classes(seed: int) -> None:
    prob = probabilities(300, 7, seed)
    target = torch.tensor(np.random.default_rng(seed).choice([0, 1, 1, 1, 2, 4, 6], 300))  # 3 and 5 are absent
    present = [0, 1, 2, 4, 6]
    guess = np.array(present)[prob[:, present].argmax(1).numpy()]
    assert mean_per_class(prob, target) == pytest.approx(balanced_accuracy_score(target.numpy(), guess))


def test_mean_per_class_weighs_classes_alike() -> None:
    prob = torch.eye(2)[[0, 0, 0, 0, 0]].float()
    assert mean_per_class(prob, torch.tensor([0, 0, 0, 0, 1])) == 0.5
    assert accuracy(prob, torch.tensor([0, 0, 0, 0, 1])) == pytest.approx(0.8)


def test_roc_auc() -> None:
    prob = probabilities(200, 2, 1)
    target = torch.tensor(np.random.default_rng(0).integers(0, 2, 200))
    assert roc_auc(prob, target) == pytest.approx(roc_auc_score(target.numpy(), prob[:, 1].numpy()), abs=1e-6)
    assert roc_auc(torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1])) == 0
    assert roc_auc(prob, torch.zeros(200, dtype=torch.long)) == 0


def test_nan_scores_make_the_map_zero() -> None:
    assert eleven_point_map(torch.full((4, 2), torch.nan), torch.ones(4, 2, dtype=torch.long)) == 0
