"""The search visits and chooses what the benchmark's loops, one run after another, visit and choose."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from vlcl_eval.elevater.search import LEARNING_RATES, STARTS, WEIGHT_DECAYS, Setting, search


def one_at_a_time(
    score: Callable[[float, float], float],
) -> tuple[tuple[float, float], float, set[tuple[float, float]]]:
    """The protocol's search as it is written down, a run at a time. Returns (lr, weight decay), score, visits."""
    decays = np.logspace(-6, 6, 97).tolist()
    visited: set[tuple[float, float]] = set()
    best, best_score = (0.0, 0.0), 0.0
    for lr in np.logspace(-6, -1, 6).tolist():

        def run(index: int, lr: float = lr) -> float:
            visited.add((lr, decays[index]))
            return score(lr, decays[index])

        peak, peak_score = -1, 0.0
        for index in (0, 16, 32, 48, 64, 80, 96):
            value = run(index)
            if value > peak_score:
                peak, peak_score = index, value
        for span in (8, 4, 2, 1):
            left, right = max(peak - span, 0), min(peak + span, 96)
            for index in [i for i in (left, right) if i != peak]:
                value = run(index)
                if value > peak_score:
                    peak, peak_score = index, value
        if peak_score > best_score:
            best, best_score = (lr, decays[peak]), peak_score
    return best, best_score, visited


def batched(score: Callable[[float, float], float]) -> tuple[Callable[[Sequence[Setting]], list[float]], list[int]]:
    sizes: list[int] = []

    def evaluate(settings: Sequence[Setting]) -> list[float]:
        assert len(set(settings)) == len(settings)
        sizes.append(len(settings))
        return [score(s.lr, s.weight_decay) for s in settings]

    return evaluate, sizes


def bumpy(seed: int, steps: int) -> Callable[[float, float], float]:
    """A landscape of few levels: many ties, as validation accuracies have."""
    rng = random.Random(seed)
    centre = {lr: rng.uniform(-7, 7) for lr in LEARNING_RATES}
    height = {lr: rng.uniform(0.2, 1) for lr in LEARNING_RATES}

    def score(lr: float, decay: float) -> float:
        value = height[lr] - 0.03 * abs(math.log10(decay) - centre[lr]) + 0.05 * math.sin(9 * math.log10(decay))
        return max(0, round(value * steps)) / steps

    return score


@pytest.mark.parametrize("steps", [3, 10, 1000])
@pytest.mark.parametrize("seed", range(20))
def test_same_choice_and_visits_as_one_at_a_time(seed: int, steps: int) -> None:
    score = bumpy(seed, steps)
    evaluate, sizes = batched(score)
    found = search(evaluate)
    best, best_score, visited = one_at_a_time(score)
    assert (found.best.lr, found.best.weight_decay) == best
    assert found.score == best_score
    assert {(s.lr, s.weight_decay) for s in found.scores} == visited
    assert len(visited) <= 90
    assert len(sizes) <= 5
    assert sizes[0] == 42
    assert all(size <= 12 for size in sizes[1:])


def test_ties_go_to_the_smallest_rate_and_the_decay_visited_first() -> None:
    found = search(batched(lambda lr, decay: 0.5)[0])
    assert found.best == Setting(LEARNING_RATES[0], WEIGHT_DECAYS[0])


def test_no_score_above_zero_chooses_no_training() -> None:
    """As the benchmark's code: learning rate 0. Every rate then looks around the grid's ends."""
    evaluate, _ = batched(lambda lr, decay: 0.0)
    found = search(evaluate)
    assert found.best == Setting(0.0, 0.0)
    assert {(s.lr, s.weight_decay) for s in found.scores} == one_at_a_time(lambda lr, decay: 0.0)[2]


def test_a_setting_without_a_score_is_never_chosen() -> None:
    score = bumpy(1, 10)
    winner = search(batched(score)[0]).best
    found = search(batched(lambda lr, d: math.nan if Setting(lr, d) == winner else score(lr, d))[0])
    assert found.best != winner
    assert math.isnan(found.scores[winner])


def test_grid() -> None:
    assert [WEIGHT_DECAYS[i] for i in STARTS] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]) == LEARNING_RATES
