"""The benchmark's search over learning rate and weight decay, many settings at a time.

For each of 6 learning rates: 7 weight decays a hundredfold apart, then four rounds that look 8, 4, 2 and 1 places to
the left and right of the best so far on a grid of 97. A later setting wins only by a strictly higher score, so ties go
to the smallest learning rate and to the weight decay visited first. The learning rates do not depend on each other:
what they all want next is evaluated together, 42 settings and then at most 12 a round, 5 passes in place of 90 runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

LEARNING_RATES: list[float] = np.logspace(-6, -1, num=6).tolist()
WEIGHT_DECAYS: list[float] = np.logspace(-6, 6, num=97).tolist()
STARTS = tuple(range(0, 97, 16))
SPANS = (8, 4, 2, 1)


@dataclass(frozen=True)
class Setting:
    lr: float
    weight_decay: float


# Scores of settings, in percent or shares; NaN where a setting could not be scored.
Evaluate = Callable[[Sequence[Setting]], Sequence[float]]


@dataclass
class Choice:
    """What a search found. `scores`: every setting that was evaluated, in the order of the visits of each pass."""

    best: Setting
    score: float
    scores: dict[Setting, float] = field(default_factory=dict)


@dataclass
class _Peak:
    """The best of one learning rate so far. `place` -1 (none scored above 0) counts as the benchmark's code does:
    as a list index, the last one."""

    lr: float
    place: int = -1
    score: float = 0.0

    def neighbours(self, span: int) -> list[int]:
        """Left and right of where the peak was when the round began."""
        left, right = max(self.place - span, 0), min(self.place + span, len(WEIGHT_DECAYS) - 1)
        return [place for place in (left, right) if place != self.place]


def search(evaluate: Evaluate) -> Choice:
    """The best setting by `evaluate`, which gets lists of distinct settings. lr 0 where none scores above 0."""
    peaks = [_Peak(lr) for lr in LEARNING_RATES]
    scores: dict[Setting, float] = {}
    for span in (None, *SPANS):
        wanted = [list(STARTS) if span is None else peak.neighbours(span) for peak in peaks]
        settings = [Setting(peak.lr, WEIGHT_DECAYS[i]) for peak, places in zip(peaks, wanted) for i in places]
        new = [setting for setting in dict.fromkeys(settings) if setting not in scores]
        if new:
            scores |= dict(zip(new, evaluate(new)))
        for peak, places in zip(peaks, wanted):
            for place in places:
                score = scores[Setting(peak.lr, WEIGHT_DECAYS[place])]
                if not math.isnan(score) and score > peak.score:
                    peak.place, peak.score = place, score
    best = Choice(Setting(0.0, 0.0), 0.0, scores)
    for peak in peaks:
        if peak.score > best.score:
            best.best, best.score = Setting(peak.lr, WEIGHT_DECAYS[peak.place]), peak.score
    return best
