"""The batched heads against real torch modules trained one setting at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vlcl_eval.elevater.metrics import accuracy, eleven_point_map
from vlcl_eval.elevater.probe import HeadStart, Task, Trained, batch_order, language_head, random_head, train_heads
from vlcl_eval.elevater.search import LEARNING_RATES, Setting, search
from vlcl_eval.elevater.tasks import Train, Trainer

C, D = 4, 12


def problem(multilabel: bool, num: int = 130, seed: int = 0) -> tuple[Task, HeadStart]:
    """Clusters that overlap, so that settings differ. 130 = two batches of 64 and one of 2."""
    generator = torch.Generator().manual_seed(seed)
    centre_CD = torch.randn(C, D, generator=generator, dtype=torch.float64)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        label = torch.randint(C, (count,), generator=generator)
        x = 3 * centre_CD[label] + 5 * torch.randn(count, D, generator=generator, dtype=torch.float64) + 1
        if not multilabel:
            return x, label
        return x, (F.one_hot(label, C) | (torch.rand(count, C, generator=generator) < 0.2)).long()

    train, test = draw(num), draw(90)
    score = eleven_point_map if multilabel else accuracy
    return Task(*train, *test, score), language_head(F.normalize(centre_CD, dim=1).T)


def one_run(task: Task, start: HeadStart, setting: Setting, epochs: int) -> tuple[list[float], list[Tensor]]:
    """The protocol with torch's own layers, optimizer and loader: scores and probabilities after each epoch."""
    norm = nn.BatchNorm1d(D, affine=False, dtype=torch.float64)
    linear = nn.Linear(D, C, dtype=torch.float64)
    linear.weight.data, linear.bias.data = start.weight_CD.clone(), start.bias_C.clone()
    optimizer = torch.optim.SGD(linear.parameters(), lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay)
    data = TensorDataset(task.train_ND, task.train_target)
    loader = DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    multilabel = task.train_target.ndim == 2
    scores, probabilities = [], []
    for _ in range(epochs):
        norm.train()
        for x, y in loader:
            if len(x) == 1:
                continue
            logits = linear(norm(x))
            loss = F.binary_cross_entropy_with_logits(logits, y.double()) if multilabel else F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        norm.eval()
        with torch.no_grad():
            probabilities.append(linear(norm(task.test_ND)).softmax(1))
        scores.append(task.score(probabilities[-1], task.test_target))
    return scores, probabilities


SETTINGS = [Setting(lr, wd) for lr in (1e-3, 1e-1) for wd in (1e-6, 1e-2, 10.0)]


@pytest.mark.parametrize("num", [130, 129, 20])
@pytest.mark.parametrize("multilabel", [False, True])
def test_heads_train_as_modules_do(multilabel: bool, num: int) -> None:
    """129 = two batches of 64 and one of 1, which is skipped."""
    task, start = problem(multilabel, num)
    together = train_heads(task, start, SETTINGS, epochs=4)
    for k, setting in enumerate(SETTINGS):
        scores, probabilities = one_run(task, start, setting, epochs=4)
        assert [epoch[k] for epoch in together.scores] == pytest.approx(scores, abs=1e-12)
        alone = train_heads(task, start, [setting], epochs=4)
        torch.testing.assert_close(alone.last_NC, probabilities[-1], rtol=1e-9, atol=1e-12)
        best = max(range(4), key=scores.__getitem__)
        torch.testing.assert_close(alone.best_NC, probabilities[best], rtol=1e-9, atol=1e-12)
    assert len({tuple(scores) for scores in zip(*together.scores)}) > 2  # settings do differ


@pytest.mark.parametrize("multilabel", [False, True])
def test_batched_search_chooses_as_one_run_at_a_time(multilabel: bool) -> None:
    task, _ = problem(multilabel, num=60)
    start = random_head(D, C, seed=0)  # from class names all settings would do equally well
    start = HeadStart(start.weight_CD.double(), start.bias_C.double())

    def train(settings: Sequence[Setting], part: str, epochs: int) -> Trained:
        return train_heads(task, start, settings, epochs)

    found = search(Trainer(train).scores)
    slow = search(lambda settings: [max(one_run(task, start, s, 10)[0]) for s in settings])
    assert found.best == slow.best
    assert found.score == pytest.approx(slow.score, abs=1e-12)
    assert found.scores.keys() == slow.scores.keys()
    for setting, score in slow.scores.items():
        assert found.scores[setting] == pytest.approx(score, abs=1e-12)
    assert len(set(slow.scores.values())) > 5


def test_order_is_the_loaders() -> None:
    loader = DataLoader(TensorDataset(torch.arange(200)), 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    expected = [[batch[0].tolist() for batch in loader] for _ in range(3)]
    assert [[index.tolist() for index in epoch] for epoch in batch_order(200, 3)] == expected
    assert expected[0] != expected[1]


def test_a_diverged_setting_harms_no_other() -> None:
    task, start = problem(False)
    wild = Setting(0.1, 1e6)  # overflows float64 after some 60 steps
    together = train_heads(task, start, [SETTINGS[0], wild, SETTINGS[1]], epochs=30)
    alone = train_heads(task, start, [SETTINGS[1]], epochs=30)
    assert together.diverged_K == [False, True, False]
    assert [epoch[2] for epoch in together.scores] == [epoch[0] for epoch in alone.scores]
    share = float((task.test_target == 0).double().mean())
    assert together.scores[-1][1] == pytest.approx(share)  # NaN everywhere: class 0, as numpy's argmax says


def failing(limit: int, bad: Setting | None, train: Train) -> Train:
    def wrapped(settings: Sequence[Setting], part: str, epochs: int) -> Trained:
        if len(settings) > limit or bad in settings:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return train(settings, part, epochs)

    return wrapped


def test_out_of_memory_halves_and_a_setting_that_never_fits_is_recorded() -> None:
    task, start = problem(False, num=60)
    train = partial(_train, task, start)
    whole = search(Trainer(train).scores)
    small = Trainer(failing(5, None, train))
    assert search(small.scores).scores == pytest.approx(whole.scores)
    assert small.failed == []
    bad = whole.best
    short = Trainer(failing(5, bad, train))
    found = search(short.scores)
    assert math.isnan(found.scores[bad])
    assert found.best != bad
    assert short.failed == [{"lr": bad.lr, "weight_decay": bad.weight_decay, "why": "out of memory"}]


def _train(task: Task, start: HeadStart, settings: Sequence[Setting], part: str, epochs: int) -> Trained:
    return train_heads(task, start, settings, epochs)


def test_other_errors_are_not_hidden() -> None:
    def broken(settings: Sequence[Setting], part: str, epochs: int) -> Trained:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        Trainer(broken).scores([Setting(LEARNING_RATES[0], 1.0)])


def test_random_head_is_torchs_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    head = random_head(D, C, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(0)
    linear = nn.Linear(D, C)
    assert torch.equal(head.weight_CD, linear.weight)
    assert torch.equal(head.bias_C, linear.bias)
