"""Few-shot subsets and the validation split, draw for draw those of the benchmark (vision-datasets 0.2.17).

Both depend on the order of the images in the index file and on Python's random.Random.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

Labels = Sequence[tuple[int, ...]]

VAL_SHARE = 0.2


def few_shot_subset(labels: Labels, num_classes: int, shots: int, seed: int) -> list[int]:
    """Positions of about `shots` images of each class, in the order drawn.

    One class an image: exactly min(shots, size of the class). Several: an image is kept while its rarest class has
    fewer than `shots` and none of its classes gets far beyond; images without a label are kept up to `shots`.
    """
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    kept: list[int] = []
    counts = [0] * num_classes
    negatives = 0
    for i in order:
        if not labels[i]:
            if negatives < shots:
                negatives += 1
                kept.append(i)
            continue
        have = [counts[label] for label in labels[i]]
        if min(have) >= shots:
            continue
        if min(have) <= shots / 2 or max(have) <= 1.5 * shots:
            kept.append(i)
            for label in labels[i]:
                counts[label] += 1
        if min(counts) >= shots:
            break
    return kept


def train_val_split(labels: Labels, num_classes: int, multilabel: bool) -> tuple[list[int], list[int]]:
    """(train, val) positions; a fifth of each class, rounded up, is for validation: the first images of the class."""
    val = _multilabel_val(labels, num_classes) if multilabel else _first_of_each_class(labels)
    # Iterating over a set, as the benchmark does: the order of a set of small numbers is not always ascending.
    train = list(set(range(len(labels))) - set(val))
    return train, val


def _first_of_each_class(labels: Labels) -> list[int]:
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label[0], []).append(place)
    return [place for own in places.values() for place in own[: math.ceil(len(own) * VAL_SHARE)]]


def _multilabel_val(labels: Labels, num_classes: int) -> list[int]:
    """Greedy: for the lowest class that lacks images, the first remaining one that has it."""
    total = [0] * num_classes
    for label in labels:
        for c in set(label):
            total[c] += 1
    target = [math.ceil(count * VAL_SHARE) for count in total]
    remaining = [set(label) for label in labels]
    val: list[int] = []
    for c in range(num_classes):
        place = 0
        while target[c] > 0:
            place = next(i for i in range(place, len(remaining)) if c in remaining[i])
            val.append(place)
            for other in remaining[place]:
                target[other] -= 1
            remaining[place] = set()
    return val
