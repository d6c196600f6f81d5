"""A fast linear probe that is not ELEVATER's: multinomial logistic regression by L-BFGS on frozen features.

What CLIP reports (Radford et al. 2021, appendix A.3): the strength of the L2 penalty is looked for between 1e-6 and 1e6
by its score on validation images, from 7 values on, halving the step around the best; then one fit on all training
images, scored once on the test split.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from vlcl.errors import UserError
from vlcl_eval.elevater.probe import Task
from vlcl_eval.elevater.search import SPANS, STARTS, WEIGHT_DECAYS

MAX_ITERATIONS = 1000


def fit(train_ND: Tensor, target: Tensor, test_ND: Tensor, num_classes: int, strength: float) -> Tensor:
    """[N_test, C] probabilities with the L2 penalty `strength`; a class without training images gets 0."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier
    except ImportError:
        raise UserError("the logistic probe needs scikit-learn: pip install 'vlcl[eval]'") from None
    if target.ndim == 1 and len(target.unique()) < 2:
        raise UserError("the logistic probe needs training images of two classes at least; take more shots")
    logistic: Any = LogisticRegression(C=1 / strength, max_iter=MAX_ITERATIONS)
    model = logistic if target.ndim == 1 else OneVsRestClassifier(logistic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="Label .* is present in all training examples")
        model.fit(train_ND.numpy(), target.numpy())
    found = torch.tensor(model.predict_proba(test_ND.numpy()), dtype=torch.float32)
    if target.ndim == 2:
        return found
    probability_NC = torch.zeros(len(test_ND), num_classes)
    probability_NC[:, torch.as_tensor(model.classes_)] = found
    return probability_NC


def search_strength(task: Task, num_classes: int) -> tuple[float, float, int]:
    """(strength, validation score, fits): the penalty with the best score on `task.test_ND`, here validation."""
    scores: dict[int, float] = {}

    def score(place: int) -> float:
        if place not in scores:
            probability = fit(task.train_ND, task.train_target, task.test_ND, num_classes, WEIGHT_DECAYS[place])
            scores[place] = task.score(probability, task.test_target)
        return scores[place]

    peak = max(STARTS, key=score)
    for span in SPANS:
        around = [place for place in (peak, peak - span, peak + span) if 0 <= place < len(WEIGHT_DECAYS)]
        peak = max(around, key=score)  # of equal ones the first
    return WEIGHT_DECAYS[peak], scores[peak], len(scores)
