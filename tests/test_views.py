"""Pictures alone: one step against a slow reference on one rank and two, the loss family with keys, BatchNorm."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_oracle import G, N, assert_same, make_aux, make_pairs, one_rank, oracle, remembered
from ranks import on_ranks
from test_losses import CASES, PLAIN
from torch import Tensor, nn
from view_oracle import steps

from vlcl import distributed
from vlcl.accumulate import Towers
from vlcl.batch import Aux, Batch, Features, Keys
from vlcl.loss_state import LossState
from vlcl.losses import LossOutput, build_loss
from vlcl.losses.views import SymmetrizedLoss
from vlcl.train import train_step
from vlcl.views.norm import RankBatchNorm, over_ranks
from vlcl.views.towers import Momentum, ViewEncoder, ViewTowers, mlp

TAU, LR, M, TOTAL, PAIRS = 0.2, 0.05, 0.9, 4, 6


def make_encoder() -> ViewEncoder:
    """In float64: a linear tower with BatchNorm, 3-layer projector, 2-layer predictor, narrow."""
    torch.manual_seed(0)
    visual = nn.Sequential(nn.Flatten(), nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
    towers = ViewTowers(visual, mlp(3, 8, 10, 5, True), mlp(2, 5, 10, 5, True), TAU)
    with torch.no_grad():
        for x in (*towers.visual.parameters(), *towers.projector.parameters(), *towers.predictor.parameters()):
            x.add_(0.1 * torch.randn_like(x))  # no BatchNorm of weight 1
    for slow, own in zip(towers.momentum.parameters(), [*visual.parameters(), *towers.projector.parameters()]):
        slow.data.copy_(own.data)
    encoder = ViewEncoder(towers).double().train()
    encoder.clip.logit_scale.data.fill_(math.log(1 / TAU))
    return encoder


def own_weights(encoder: ViewEncoder) -> dict[str, Tensor]:
    names = ("visual", "projector", "predictor")
    return {name: x.detach().clone() for name, x in encoder.clip.named_parameters() if name.startswith(names)}


def slow_weights(encoder: ViewEncoder) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in encoder.clip.momentum.named_parameters()}


def make_views(count: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    return [tuple(torch.randn(PAIRS, 3, 2, 2, generator=g, dtype=torch.float64) for _ in (1, 2)) for _ in range(count)]  # pyright: ignore[reportReturnType]


def train_on(count: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float], dict[str, Tensor]]:
    """`count` steps of vlcl's own train_step on this rank's share, with gradient descent and DDP's mean."""
    rank, world = distributed.rank(), distributed.world_size()
    encoder = make_encoder()
    encoder.clip = over_ranks(encoder.clip, cuda=False)
    encoder.clip.logit_scale.requires_grad_(False)
    model = nn.parallel.DistributedDataParallel(encoder) if world > 1 else encoder
    trained = [x for x in encoder.parameters() if x.requires_grad]
    optimizer = torch.optim.SGD([{"params": trained, "peak_lr": LR}], lr=LR)
    loss = SymmetrizedLoss(build_loss("infonce", num_pairs=PAIRS))
    state = SimpleNamespace(memory=LossState(loss, PAIRS, 5), step=0, optimizer=optimizer, averaged=None,
                            built=SimpleNamespace(encoder=encoder),
                            meter=SimpleNamespace(part=lambda name: nullcontext()))  # fmt: skip
    momentum = Momentum(M, 1.0, TOTAL)
    encoder.follow(optimizer, lambda: momentum.at(state.step + 1))
    optim = SimpleNamespace(clip_norm=None, warmup=0, schedule="constant", lr_min=0.0, lr=LR)
    config = SimpleNamespace(
        optim=optim, model=SimpleNamespace(logit_scale_max=100.0), train=SimpleNamespace(on_anomaly="stop")
    )
    accelerator = SimpleNamespace(clip_grad_norm_=nn.utils.clip_grad_norm_)
    towers = Towers(model, 1, lambda x: x.backward(), lambda _: pytest.fail("one chunk"))
    values = []

    def told(*given: Any) -> LossOutput:
        out = loss(*given)
        values.append(float(distributed.all_mean(out.loss)))
        return out

    run: Any = SimpleNamespace(state=state, towers=towers, loss=told, config=config, total_steps=TOTAL,
                               accelerator=accelerator, stop=SimpleNamespace(asked=None),
                               saver=SimpleNamespace(written=True))  # fmt: skip
    for one, two in make_views(count):
        mine = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
        outcome = train_step(run, Batch(one[mine], two[mine], torch.arange(PAIRS)[mine]))
        assert outcome.read()["objective"] == pytest.approx(values[-1], rel=1e-6)
        state.step += 1
    buffers = {name: x.clone() for name, x in encoder.clip.named_buffers()}
    assert all(x.grad is None for x in encoder.clip.momentum.parameters())
    return own_weights(encoder), slow_weights(encoder), values, buffers


@pytest.mark.parametrize("world", [1, 2])
def test_steps_are_the_papers(world: int) -> None:
    own, slow, values = steps(own_weights(make_encoder()), make_views(3), LR, TAU, M, TOTAL)
    for got in [train_on(3)] if world == 1 else on_ranks(2, train_on, 3):
        assert got[0].keys() == own.keys()
        assert got[1].keys() == slow.keys()
        assert_same(got[0].values(), own.values(), 1e-9)
        assert_same(got[1].values(), slow.values(), 1e-9)
        assert got[2] == pytest.approx(values, rel=1e-9)
        start = slow_weights(make_encoder())
        assert any((got[1][name] - x).abs().max() > 1e-5 for name, x in start.items())


def test_two_ranks_leave_the_statistics_of_one() -> None:
    whole, (first, second) = train_on(2)[3], on_ranks(2, train_on, 2)
    assert whole.keys() == first[3].keys()
    assert any("running_var" in name for name in whole)
    for got in (first, second):
        assert_same(got[3].values(), whole.values(), 1e-9)


def test_batch_norm_over_ranks_is_torchs_in_a_world_of_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, 3)
    ours, theirs = RankBatchNorm(4), nn.BatchNorm2d(4)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)  # pyright: ignore
    with pytest.raises(ValueError, match="takes"):
        ours(x[:, 0, 0, 0])


def make_keys(seed: int = 8) -> Keys:
    return Keys(*make_pairs(seed)[:2])


@pytest.mark.parametrize("seen", ["some", "all"])  # all: order "before" needs one pass over the tiles only
@pytest.mark.parametrize("case", list(CASES))
def test_a_preset_with_keys_is_its_slow_loop(case: str, seen: str) -> None:
    """A row's normalizer is about its query against all keys of the other view; keys have no gradient."""
    name, settings, spec = CASES[case]
    loss = build_loss(
        name, num_pairs=N, total_steps=40, steps_per_epoch=10, **((PLAIN if name == "em" else {}) | settings)
    )
    (image, text, row), keys = make_pairs(duplicates=True), make_keys()
    aux = make_aux(row, loss)
    if seen == "all":
        assert aux.visits_G is not None
        aux = Aux({name: x.nan_to_num(0.06) for name, x in aux.rows.items()}, aux.visits_G + 1, aux.shared)
    out, grads = one_rank(loss, image, text, row, aux, step=13, keys=keys)
    value, expected, rows = oracle(spec, image, text, row, aux, step=13, keys=keys)
    assert out.loss.item() == pytest.approx(value, abs=1e-11)
    assert_same(grads, expected, 1e-10)
    assert_same([remembered(out).rows[key] for key in rows] if rows else [], rows.values())
    doubled, twice = one_rank(SymmetrizedLoss(loss), image, text, row, aux, step=13, keys=keys)
    factor = 4.0 if spec.temperature in ("rho", "pair") else 4.0 / 7.0  # 2 tau of the sum, which is twice the mean
    assert doubled.loss.item() == pytest.approx(factor * value, abs=1e-10)
    assert_same(twice, [factor * x for x in expected], 1e-9)


def test_siglip_with_keys_is_its_loop() -> None:
    (image, text, row), keys = make_pairs(duplicates=True), make_keys()
    out, grads = one_rank(build_loss("siglip", num_pairs=N), image, text, row, None, bias=-3.0, keys=keys)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    leaves += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (math.log(7.0), -3.0)]
    value = torch.zeros((), dtype=torch.float64)
    for query, key in ((leaves[0], keys.text), (leaves[1], keys.image)):
        for i in range(G):
            for j in range(G):
                if i == j or row[i] != row[j]:
                    logit = leaves[2].exp() * (query[i] @ key[j]) + leaves[3]
                    value = value + F.softplus(-logit if i == j else logit) / (2 * G)
    assert out.loss.item() == pytest.approx(value.item(), abs=1e-11)
    assert_same(grads, torch.autograd.grad(value, leaves), 1e-10)


def test_the_bank_is_of_keys() -> None:
    """MoCo's queue: what passed as keys is compared with again."""
    loss = build_loss("em", num_pairs=N, bank=20, bank_negatives=True)
    (image, text, row), keys = make_pairs(), make_keys()
    out, _ = one_rank(loss, image, text, row, make_aux(row, loss), keys=keys)
    assert_same([remembered(out).shared["bank_image"][:G]], [keys.image.float()], 0.0)


def test_views_without_keys_are_refused() -> None:
    image, text, row = make_pairs()
    with pytest.raises(ValueError, match="keys is None"):
        one_rank(SymmetrizedLoss(build_loss("dcl", num_pairs=N)), image, text, row, None)


RANK_CASES: dict[str, dict[str, Any]] = {
    "infonce": {}, "siglip": {}, "isogclr": {}, "em": {"gamma": 0.4},
    "neuclip": {"prototypes": 6, "prototype_steps": 2},
}  # fmt: skip


def keyed_gradients() -> dict[str, list[Tensor]]:
    """Of each loss, on this rank's share: DDP's mean of the gradients to a linear map, and the rows."""
    rank, world = distributed.rank(), distributed.world_size()
    mine = slice(rank * G // world, (rank + 1) * G // world)
    (image, text, row), keys = make_pairs(), make_keys()
    found = {}
    for name, settings in RANK_CASES.items():
        loss = build_loss(name, num_pairs=N, **settings)
        state = LossState(loss, N, image.shape[1])
        turn = torch.eye(image.shape[1], dtype=torch.float64, requires_grad=True)
        scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        own = Keys(keys.image[mine], keys.text[mine])
        for step in range(2):
            bias = torch.tensor(-2.0, dtype=torch.float64) if name == "siglip" else None
            features = Features(image[mine] @ turn, text[mine] @ turn, scale, bias, own)
            peers = distributed.gather_peers(features, row[mine])
            out = loss(features, peers, state.read(peers.row_G), step)
            state.write(peers.row_G, out.aux)
            gradients = torch.autograd.grad(out.loss, [turn, scale])
            found[name] = [distributed.all_mean(x) for x in (*gradients, out.loss)]  # of the last step
        found[name] += state.read(row).rows.values()
    return found


def test_ranks_share_keys_and_no_gradient_of_them() -> None:
    """Two ranks with half of the pairs each have the gradients of one with all."""
    whole, halves = keyed_gradients(), on_ranks(2, keyed_gradients)
    for got in halves:
        for name in RANK_CASES:
            assert_same(got[name], whole[name], 1e-6 if name == "neuclip" else 1e-9)
