"""The losses against the slow loops of their docstrings, in float64, and across 1, 2 and 3 gloo ranks."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn

from vlcl import distributed
from vlcl.batch import Aux, Features, Peers
from vlcl.losses import EMLoss, InfoNCELoss
from vlcl.losses.mstep import LossOutput

G, D, N = 12, 5, 40


def make_pairs(seed: int = 0, duplicates: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(G, D, generator=g, dtype=dtype), dim=1) for _ in range(2))
    row = torch.randperm(N, generator=g)[:G]
    if duplicates:
        row[7] = row[2]
    return image, text, row


def make_aux(row: Tensor, seed: int = 1) -> Aux:
    """A table in which every third row was never written."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(N, 2, generator=g, dtype=torch.float64)
    visits = torch.randint(1, 5, (N,), generator=g)
    values[::3], visits[::3] = torch.nan, 0
    return Aux(values[row], visits[row])


def one_rank(loss, image: Tensor, text: Tensor, row: Tensor, aux: Aux, scale: float = 7.0, step: int = 0):
    """Loss output and gradients (image, text, log of the scale) on a world of one."""
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    log_scale = torch.tensor(math.log(scale), dtype=image.dtype, requires_grad=True)
    peers = Peers(image.detach(), text.detach(), row, 0, lambda x: x)
    out: LossOutput = loss(Features(image, text, log_scale.exp()), peers, aux, step)
    out.loss.backward()
    return out, (image.grad, text.grad, log_scale.grad)


def loop_infonce(v: Tensor, t: Tensor, row: Tensor, kappa: Tensor) -> Tensor:
    loss = torch.zeros((), dtype=v.dtype)
    for i in range(G):
        keep = [j for j in range(G) if j == i or row[j] != row[i]]
        pos = torch.exp(kappa * (v[i] @ t[i]))
        image = -torch.log(pos / sum(torch.exp(kappa * (v[i] @ t[j])) for j in keep))
        text = -torch.log(pos / sum(torch.exp(kappa * (v[j] @ t[i])) for j in keep))
        loss = loss + (image + text) / (2 * G)
    return loss


def loop_em(v: Tensor, t: Tensor, row: Tensor, kappa: Tensor, aux: Aux, em: EMLoss, gammas: list[float]):
    """The docstring's loop for both directions: value, surrogate, new table values."""
    value, surrogate, a_new_all = 0.0, torch.zeros((), dtype=v.dtype), torch.zeros(G, 2, dtype=v.dtype)
    for direction, (x, y) in enumerate([(v, t), (t, v)]):
        for i in range(G):
            negatives = [j for j in range(G) if row[j] != row[i]]
            h = {j: kappa * (x[i] @ y[j] - x[i] @ y[i]) for j in negatives}
            n = len(negatives)
            a_hat = math.log(em.epsilon + sum(math.exp(h[j].item()) for j in negatives) / n)
            a_old, gamma = aux.values_GK[i, direction].item(), gammas[i]
            new = a_hat if math.isnan(a_old) else math.log((1 - gamma) * math.exp(a_old) + gamma * math.exp(a_hat))
            a = a_old if em.order == "before" and not math.isnan(a_old) else new
            z = em.positive + (em.num_pairs - 1) * math.exp(a)
            for j in negatives:
                w = (1 / z) * (em.num_pairs - 1) / n * math.exp(h[j].item())
                surrogate = surrogate + w * h[j] / (2 * G)
            value += math.log(1 + (em.num_pairs - 1) * math.exp(new)) / (2 * G)
            a_new_all[i, direction] = new
    return value, surrogate, a_new_all


def grads_of(scalar_fn, image: Tensor, text: Tensor, scale: float = 7.0):
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    log_scale = torch.tensor(math.log(scale), dtype=image.dtype, requires_grad=True)
    value = scalar_fn(image, text, log_scale.exp())
    value.backward()
    return value.item(), (image.grad, text.grad, log_scale.grad)


def assert_same(got, expected, tolerance: float = 1e-12) -> None:
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("duplicates", [False, True])
def test_infonce_is_its_loop(duplicates: bool) -> None:
    image, text, row = make_pairs(duplicates=duplicates)
    out, grads = one_rank(InfoNCELoss(), image, text, row, make_aux(row))
    value, expected = grads_of(lambda v, t, k: loop_infonce(v, t, row, k), image, text)
    assert out.loss.item() == pytest.approx(value, abs=1e-12)
    assert_same(grads, expected)


def test_infonce_is_open_clips() -> None:
    image, text, row = make_pairs()
    out, grads = one_rank(InfoNCELoss(), image, text, row, make_aux(row))
    value, expected = grads_of(open_clip.ClipLoss(), image, text)
    assert out.loss.item() == pytest.approx(value, abs=1e-12)
    assert_same(grads, expected)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "visits"])
def test_em_is_its_loop(order: str, positive: bool, schedule: str) -> None:
    image, text, row = make_pairs(duplicates=True)
    aux = make_aux(row)
    em = EMLoss(N, total_steps=10, order=order, gamma=0.3, gamma_schedule=schedule, positive=positive, epsilon=1e-3)
    gammas = {
        "constant": [0.3] * G,
        "cosine": [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.4))] * G,
        "visits": [1 / (n + 1) for n in aux.visits_G.tolist()],
    }[schedule]
    out, grads = one_rank(em, image, text, row, aux, step=4)
    captured = {}

    def surrogate(v: Tensor, t: Tensor, k: Tensor) -> Tensor:
        captured["value"], total, captured["a"] = loop_em(v, t, row, k, aux, em, gammas)
        return total

    _, expected = grads_of(surrogate, image, text)
    assert out.loss.item() == pytest.approx(captured["value"], abs=1e-12)
    assert_same(grads, expected)
    assert_same([out.aux_GK], [captured["a"]])


def test_em_is_infonce_when_the_batch_is_the_data() -> None:
    image, text, row = make_pairs()
    em = EMLoss(num_pairs=G, gamma=1.0, epsilon=0.0)
    for aux in (make_aux(row), Aux(torch.full((G, 2), torch.nan), torch.zeros(G, dtype=torch.long))):
        out, grads = one_rank(em, image, text, row, aux)
        expected_out, expected = one_rank(InfoNCELoss(), image, text, row, aux)
        assert out.loss.item() == pytest.approx(expected_out.loss.item(), abs=1e-12)
        assert_same(grads, expected)


def test_the_value_is_the_generalized_loss_when_the_table_is_exact() -> None:
    """With a_i exact over all N pairs, small batches' mean gradient is the full data's: no bias."""
    image, text, _ = make_pairs()
    row = torch.arange(G)
    full = EMLoss(num_pairs=G, gamma=1.0, epsilon=0.0)
    out, expected = one_rank(full, image, text, row, Aux(torch.full((G, 2), torch.nan), torch.zeros(G).long()))
    em = EMLoss(num_pairs=G, order="before", epsilon=0.0)
    total_image, pairs = torch.zeros_like(image), [(i, j) for i in range(G) for j in range(i)]
    for i, j in pairs:  # every batch of two
        keep = torch.tensor([i, j])
        _, grads = one_rank(em, image[keep], text[keep], row[keep], Aux(out.aux_GK[keep], torch.ones(2).long()))
        total_image[keep] += grads[0]
    assert_same([total_image * 2 / (G * (G - 1))], [expected[0]])


def test_sampled_u_averages_to_the_mean_and_depends_on_seed_and_step_alone() -> None:
    image, text, row = make_pairs()
    aux = make_aux(row)
    _, mean = one_rank(EMLoss(N), image, text, row, aux)
    sampled = [one_rank(EMLoss(N, mode="sample", seed=3), image, text, row, aux, step=s)[1][0] for s in range(3000)]
    again = one_rank(EMLoss(N, mode="sample", seed=3), image, text, row, aux, step=5)[1][0]
    assert torch.equal(again, sampled[5])
    assert not torch.equal(sampled[5], sampled[6])
    error = (torch.stack(sampled).mean(0) - mean[0]).norm() / mean[0].norm()
    assert error < 0.05


def test_scale_100_with_opposed_pairs_stays_finite() -> None:
    """s = 100 against s = -100: e^{200} must never be formed."""
    image, text, row = make_pairs(dtype=torch.float32)
    text = -image
    for loss in (InfoNCELoss(), EMLoss(N), EMLoss(N, order="before"), EMLoss(N, positive=False, order="before")):
        aux = Aux(torch.full((G, 2), -60.0), torch.ones(G, dtype=torch.long))
        out, grads = one_rank(loss, image, text, row, aux, scale=100.0)
        assert out.loss.isfinite()
        assert all(g.isfinite().all() for g in grads)


def test_the_cap_holds_the_weights() -> None:
    image, text, row = make_pairs()
    stale = Aux(torch.full((G, 2), -30.0, dtype=torch.float64), torch.ones(G, dtype=torch.long))
    _, free = one_rank(EMLoss(N, order="before", positive=False), image, text, row, stale)
    _, capped = one_rank(EMLoss(N, order="before", positive=False, max_log_weight=0.0), image, text, row, stale)
    assert free[0].norm() > 1e6 > 100 > capped[0].norm()


class Towers(nn.Module):
    """Two linear towers and a scale: enough to see what DDP averages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(6, D, dtype=torch.float64) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Features:
        return Features(F.normalize(self.image(x), dim=1), F.normalize(self.text(y), dim=1), self.log_scale.exp())


LOSS_CASES = {
    "infonce": InfoNCELoss(),
    "em-after": EMLoss(N, gamma=0.4),
    "em-before": EMLoss(N, gamma=0.4, order="before"),
    "em-sample": EMLoss(N, gamma=0.4, mode="sample", seed=9),
}


def ddp_gradients() -> dict[str, dict[str, Tensor]]:
    """One step of each loss on G pairs split over the ranks: averaged gradients, mean loss, new table values."""
    g = torch.Generator().manual_seed(5)
    x, y = (torch.randn(G, 6, generator=g, dtype=torch.float64) for _ in range(2))
    row = torch.randperm(N, generator=g)[:G]
    row[7] = row[2]  # a duplicate that lives on two ranks
    rank, world = distributed.rank(), distributed.world_size()
    part = slice(rank * G // world, (rank + 1) * G // world)
    results = {}
    for name, loss in LOSS_CASES.items():
        model = nn.parallel.DistributedDataParallel(Towers())
        features = model(x[part], y[part])
        peers = distributed.gather_peers(features, row[part])
        out = loss(features, peers, make_aux(peers.row_G), step=2)
        out.loss.backward()
        result = {key: p.grad for key, p in model.module.named_parameters()}
        result["loss"] = distributed.all_mean(out.loss)
        if out.aux_GK is not None:
            result["aux"] = out.aux_GK
        results[name] = result
    return results


def test_ranks_give_the_gradients_of_one() -> None:
    (expected,) = on_ranks(1, ddp_gradients)
    for world in (2, 3):
        for results in on_ranks(world, ddp_gradients):
            for name in LOSS_CASES:
                assert expected[name]["log_scale"].abs() > 1e-3
                assert_same(results[name].values(), expected[name].values(), tolerance=1e-10)
