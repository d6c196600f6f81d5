"""Few-shot subsets and validation splits, against the vectors of vision-datasets 0.2.17 and slow loops."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vlcl_eval.elevater.sampling import few_shot_subset, train_val_split

EIGHTEEN = [(i // 6,) for i in range(18)]

VECTORS = {
    0: ([11, 9, 0, 16, 2, 15, 10, 3, 5, 17, 14, 6, 7, 4, 13], {11, 0, 16}),
    1: ([10, 5, 16, 17, 9, 0, 15, 14, 3, 6, 11, 13, 7, 1, 2], {10, 5, 16}),
    2: ([14, 12, 7, 17, 6, 0, 8, 3, 9, 4, 10, 15, 13, 5, 2], {14, 7, 0}),
}


@pytest.mark.parametrize("seed", VECTORS)
def test_subset_and_split_of_the_reference(seed: int) -> None:
    subset = few_shot_subset(EIGHTEEN, 3, 5, seed)
    assert subset == VECTORS[seed][0]
    train, val = train_val_split([EIGHTEEN[i] for i in subset], 3, multilabel=False)
    assert {subset[i] for i in val} == VECTORS[seed][1]
    assert sorted(train + val) == list(range(15))


def test_python_still_shuffles_as_it_did() -> None:
    order = list(range(10))
    random.Random(0).shuffle(order)
    assert order == [7, 8, 1, 5, 3, 4, 2, 0, 9, 6]


def test_one_class_an_image_gives_exactly_so_many_of_each() -> None:
    rng = random.Random(3)
    labels = [(rng.choice([0, 0, 0, 1, 1, 2]),) for _ in range(300)]
    sizes = [sum(label == (c,) for label in labels) for c in range(4)]
    subset = few_shot_subset(labels, 4, 70, seed=5)
    assert len(set(subset)) == len(subset)
    assert [sum(labels[i] == (c,) for i in subset) for c in range(4)] == [min(70, size) for size in sizes]


def test_multilabel_subset_keeps_rare_classes_and_some_negatives() -> None:
    rng = random.Random(0)
    labels = [tuple(c for c in range(5) if rng.random() < (0.5, 0.2, 0.2, 0.1, 0.05)[c]) for _ in range(2000)]
    assert any(not label for label in labels)
    subset = few_shot_subset(labels, 5, 10, seed=1)
    counts = [sum(c in labels[i] for i in subset) for c in range(5)]
    assert min(counts) >= 10  # enough of each
    assert max(counts) <= 20  # and of a frequent one not many more (it alone has about 1,000)
    assert sum(not labels[i] for i in subset) <= 10


def test_validation_takes_the_first_fifth_rounded_up() -> None:
    labels = [(0,)] * 6 + [(1,)] * 5 + [(2,)] + [(0,)]
    train, val = train_val_split(labels, 3, multilabel=False)
    assert val == [0, 1, 6, 11]  # ceil(7/5), ceil(5/5), ceil(1/5)
    assert train == [i for i in range(13) if i not in val]


def test_two_shots_iterate_the_training_half_as_a_set_does() -> None:
    """The benchmark makes a list of a set; for few survivors among many numbers that is not ascending."""
    labels = [(i // 2,) for i in range(100)]
    train, val = train_val_split(labels, 50, multilabel=False)
    assert val == list(range(0, 100, 2))
    assert train == list(set(range(100)) - set(val))


def slow_multilabel_val(targets: np.ndarray) -> list[int]:
    """While a class still needs images, the lowest such class takes the first one left that has it."""
    left, val = targets.copy(), []
    need = np.ceil(0.2 * targets.sum(axis=0))
    while (need > 0).any():
        c = int(np.argmax(need > 0))
        image = int(np.argmax(left[:, c] > 0))
        val.append(image)
        need -= left[image]
        left[image] = 0
    return val


@pytest.mark.parametrize("seed", range(5))
def test_multilabel_validation_against_the_slow_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = (rng.random((120, 6)) < rng.uniform(0.05, 0.5, 6)).astype(int)
    labels = [tuple(np.flatnonzero(row).tolist()) for row in targets]
    train, val = train_val_split(labels, 6, multilabel=True)
    assert val == slow_multilabel_val(targets)
    assert sorted(train + val) == list(range(120))
