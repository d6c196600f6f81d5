"""The settings of `em` that go with the batch size where they are null: rules from trainings (docs/evidence.md)."""

from __future__ import annotations

import math


def gain_of(pairs: int = 16) -> float:
    """The default `loss.gamma` for estimates over so many pairs: the gain of a filter in its steady state,
    gain^2 / (1 - gain) = drift / noise (docs/losses.md), noise falling as 1 / pairs, and a half at 16 pairs. Not above
    what it is at 256, the largest batch that it was measured with. Two digits: it is no more than a rule."""
    ratio = min(pairs, 256) / 32
    return round((math.sqrt(ratio * ratio + 4 * ratio) - ratio) / 2, 2)


def form_of(pairs: int = 16, order: str = "after", prediction: str | None = "drift") -> str:
    """The default `loss.form` for estimates over so many pairs: a rule from trainings at 16 to 256 (docs/evidence.md),
    which were of the default order and prediction."""
    if (order, prediction) != ("after", "drift"):
        return "relative"
    return "absolute" if pairs <= 32 else "balanced"
