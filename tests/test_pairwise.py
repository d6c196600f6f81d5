"""The tiled sums over pairs against one explicit B x C matrix in float64, and as an autograd function: gradcheck, a
second backward pass, torch.compile, autocast."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracle import N, assert_same, make_aux, make_pairs
from pair_problem import Problem, make_problem
from torch import Tensor

from vlcl.batch import Features, Peers
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.from_config import kernels_asked_for, make_loss
from vlcl.losses import build_loss, pairwise
from vlcl.losses.pairs import Candidates, Statistics, Sums, Weighing, log_count
from vlcl.losses.pairwise import weighted_sum


def dense(p: Problem, leaves: list[Tensor]) -> tuple[Tensor, Tensor, Sums]:
    """The total, something whose gradient is the total's, and the sums: from the whole matrix, without a tile.

    The gradient is that of all anchors' sums, ours with their gradient to the anchor, everybody's to our features as
    candidates."""
    image, text, scale, offset = leaves
    end = len(p.row_C) if p.with_bank else p.pairs
    row_C, row_G, row_B = p.row_C[:end], p.row_C[: p.pairs], p.row_C[p.ours]
    total, objective, sums = torch.zeros(()).double(), torch.zeros(()).double(), []
    for k, (x_BD, x_CD, y_BD, y_CD) in enumerate(
        [(image, p.image_CD, text, p.text_CD), (text, p.text_CD, image, p.image_CD)]
    ):
        negative_BC = (row_B[:, None] != row_C) & (row_C >= 0)
        cos_BC = x_BD @ y_CD[:end].T
        own_B1 = p.relative * (x_BD * y_BD).sum(1, keepdim=True)
        x_BC = scale[:, k, None] * (cos_BC - own_B1) - offset[:, k, None]
        value_BC, w_BC, linear_BC = functions(p, x_BC)
        total = total + (value_BC * negative_BC).sum()
        objective = objective + (linear_BC * negative_BC).sum()
        w_BC = w_BC * negative_BC
        sums.append(torch.stack([w_BC.sum(1), (w_BC * cos_BC).sum(1), w_BC.square().sum(1)]).detach())
        negative_GB = row_G[:, None] != row_B
        own_G1 = p.relative * (x_CD * y_CD)[: p.pairs].sum(1, keepdim=True)
        x_GB = p.scale_GK[:, k, None] * (x_CD[: p.pairs] @ y_BD.T - own_G1) - p.offset_GK[:, k, None]
        objective = objective + (functions(p, x_GB)[2] * negative_GB).sum()
    return total.detach(), objective, Sums(*torch.stack(sums, dim=2))


def functions(p: Problem, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The value, the weight, and what has the weight for its derivative."""
    if p.kind == "softplus":
        value = torch.logaddexp(x, torch.zeros_like(x))
        return value, torch.sigmoid(x), value
    w = x.clamp(max=p.cap).exp()
    return w, w.detach(), w.detach() * x


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    def count(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    kind = draw(st.sampled_from(["exp", "exp", "softplus"]))
    return make_problem(
        own=count(1, 7), left=count(0, 6), right=count(0, 6), bank=count(0, 9), width=count(1, 6), names=count(1, 20),
        seed=count(0, 1 << 30), scale=draw(st.sampled_from([1.0, 20.0, 100.0])),
        cap=draw(st.sampled_from([-1.0, 2.0, 50.0])), kind=kind, with_bank=draw(st.booleans()),
        relative=kind == "exp" and draw(st.booleans()),
    )  # fmt: skip


@given(problem=problems(), tile=st.integers(1, 60), width=st.integers(1, 9))
@settings(max_examples=120, deadline=None)
def test_tiles_are_the_dense_matrix(problem: Problem, tile: int, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairwise, "TILE", {"cpu": tile})
        patch.setattr(pairwise, "WIDTH", {"cpu": width})
        leaves = problem.leaves()
        total, sums = problem.weighted_sum(*leaves)
        grads = torch.autograd.grad(total, leaves)
        found = problem.statistics()
    expected, objective, expected_sums = dense(problem, leaves)
    # e^50 may be among what is summed up
    for got, wanted in zip([total, *vars(sums).values()], [expected, *vars(expected_sums).values()]):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * max(1.0, sums.weight_BK.max().item()))
    scale = max(1.0, *(g.abs().max().item() for g in grads))
    for got, wanted in zip(grads, torch.autograd.grad(objective, leaves)):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * scale)
    assert_statistics(problem, found)


def assert_statistics(p: Problem, found: Statistics) -> None:
    negative_BC = (p.row_C[p.ours, None] != p.row_C) & (p.row_C >= 0)
    count_B = log_count(p.row_C[p.ours], p.row_C).exp()
    assert_same([count_B], [negative_BC.sum(1).clamp(min=1)])
    for k, (x, y) in enumerate([(p.image_CD, p.text_CD), (p.text_CD, p.image_CD)]):
        s_BC = (p.scale_GK[p.ours, k, None] * (x[p.ours] @ y.T)).masked_fill(~negative_BC, -torch.inf)
        assert_same([found.log_sum_BK[:, k], found.log_square_BK[:, k]], [s_BC.logsumexp(1), (2 * s_BC).logsumexp(1)])


@pytest.mark.parametrize("options", [{}, {"relative": True}, {"kind": "softplus"}], ids=["exp", "relative", "softplus"])
def test_gradcheck(options: dict[str, Any]) -> None:
    """A world of one, where the total is the whole double sum once the candidates move with the features."""
    p = make_problem(own=4, width=3, names=3, **options)
    softplus = p.kind == "softplus"

    def total(image: Tensor, text: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        scale, offset = scale.expand(4, 2), offset.expand(4, 2)
        moved = Candidates(image.detach(), text.detach(), p.row_C, 0, 4)
        weighing = Weighing(p.row_C, moved, scale.detach(), offset.detach(), p.cap, p.kind, False, p.relative)
        return weighted_sum(image, text, scale, offset, weighing)[0]

    scale, offset = (x[:1, :1] if softplus else x for x in (p.scale_GK / 4, p.offset_GK))
    leaves = [x.clone().requires_grad_() for x in (p.image_CD, p.text_CD, scale, offset)]
    assert torch.autograd.gradcheck(total, leaves)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"relative": True}, {"kind": "softplus"}], ids=["exp", "relative", "softplus"])
def test_a_second_backward_pass_gives_the_same_gradients(options: dict[str, Any], autocast: bool) -> None:
    """The first scales what the forward pass left, in place; the second computes it anew."""
    p = make_problem(own=6, left=2, right=3, **options)
    p = p.to(torch.float32)
    leaves = p.leaves()
    total = 3 * p.weighted_sum(*leaves)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first = [x.clone() for x in torch.autograd.grad(total, leaves, retain_graph=True)]
        second = torch.autograd.grad(total, leaves, retain_graph=True)
        third = torch.autograd.grad(total / 3, leaves)
    assert_same(second, first, 0.0)
    assert_same(third, [x / 3 for x in first], 1e-6)


def test_backward_passes_add_up_in_grad() -> None:
    p = make_problem(own=6)
    leaves = p.leaves()
    total, _ = p.weighted_sum(*leaves)
    once = [x.clone() for x in torch.autograd.grad(total, leaves, retain_graph=True)]
    for _ in range(2):
        total.backward(retain_graph=True)
    assert_same([x.grad for x in leaves], [2 * x for x in once])


def test_gradients_of_gradients_are_refused() -> None:
    p = make_problem(own=6)
    leaves = p.leaves()
    total, sums = p.weighted_sum(*leaves)
    assert not sums.weight_BK.requires_grad
    for value, message in ((total.square(), "differentiate twice"), (total, "does not require grad")):
        first = torch.autograd.grad(value, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            first[0].sum().backward()


def run_step(name: str, settings: dict[str, Any], how: Any = lambda step: step, times: int = 1) -> list[Tensor]:
    """Loss and gradients of a step, which `how` may change, of the last of `times` backward passes."""
    loss = build_loss(name, num_pairs=N, **settings)
    image, text, row = make_pairs(duplicates=True, dtype=torch.float32)
    aux = make_aux(row, loss)

    def step(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor | None) -> Tensor:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        peers = Peers(image.detach(), text.detach(), row)
        return loss(Features(image, text, log_scale.exp(), bias), peers, aux).loss

    leaves = [x.clone().requires_grad_() for x in (image, text, torch.tensor(2.0), torch.tensor(-3.0))]
    used = leaves if name == "siglip" else leaves[:3]
    value = how(step)(*leaves[:3], leaves[3] if name == "siglip" else None)
    for _ in range(times - 1):
        torch.autograd.grad(value, used, retain_graph=True)
    return [value.detach(), *torch.autograd.grad(value, used)]


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("infonce", {}),
    ("siglip", {}),
    ("em", {}),
    ("em", {"order": "before"}),  # asks for a value in between
]


@pytest.mark.parametrize(("call", "backend"), [(0, "eager"), (0, "aot_eager"), (1, "aot_eager")])
def test_compiled_it_is_the_same_and_one_graph(call: int, backend: str) -> None:
    torch.compiler.reset()
    compiled = run_step(*CALLS[call], how=lambda step: torch.compile(step, backend=backend, fullgraph=True))
    assert_same(compiled, run_step(*CALLS[call]), 1e-5)


@pytest.mark.parametrize("most", [0, N * N])
@pytest.mark.parametrize(("name", "settings"), [*CALLS, ("em", {"bank": 5})])
def test_kept_similarities_change_no_bit(
    name: str, settings: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a second backward pass neither, which finds them overwritten."""
    expected, taken = run_step(name, settings), []
    weigh = pairwise.weigh_tile

    def spy(cos_RC: Tensor, *rest: Any) -> Tensor:
        taken.append(cos_RC.data_ptr())
        return weigh(cos_RC, *rest)

    kept: list[int] = []
    statistics = pairwise.pair_statistics

    def keeping(*arguments: Any) -> Statistics:
        found = statistics(*arguments)
        kept.extend(x.data_ptr() for x in found.cosines)
        return found

    monkeypatch.setattr(pairwise, "KEPT", {"cpu": most})
    monkeypatch.setattr(pairwise, "weigh_tile", spy)
    monkeypatch.setattr("vlcl.losses.contrastive.pair_statistics", keeping)
    assert_same(run_step(name, settings), expected, 0.0)
    keeps = most > 0 and name != "siglip" and "bank" not in settings
    assert bool(kept) == keeps
    assert set(kept) <= set(taken)
    assert_same(run_step(name, settings, times=2), expected, 0.0)


@pytest.mark.parametrize(("name", "settings"), CALLS)
def test_autocast_does_not_touch_it(name: str, settings: dict[str, Any]) -> None:
    expected = run_step(name, settings)
    with torch.autocast("cpu", torch.bfloat16):
        got = run_step(name, settings)
    assert_same(got, expected, 0.0)


def test_an_unknown_choice_of_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_asked_for() == "auto"
    monkeypatch.setenv("VLCL_KERNELS", "cuda")
    with pytest.raises(UserError, match=r"VLCL_KERNELS='cuda' in the environment: allowed are auto, torch, triton"):
        kernels_asked_for()


@pytest.mark.parametrize("name", ["em", "siglip"])
def test_a_run_gives_its_loss_the_kernels_that_the_environment_asks_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(None, ["data.train=x", f"loss.name={name}"])
    for value in ("torch", "triton"):
        monkeypatch.setenv("VLCL_KERNELS", value)
        loss: Any = make_loss(config, N, 10, 5)
        assert loss.kernels == value


def test_the_triton_kernels_are_for_float32_on_cuda_and_say_when_triton_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = make_problem()
    expected = p.statistics()
    monkeypatch.setenv("VLCL_KERNELS", "triton")
    monkeypatch.setitem(sys.modules, "triton", None)  # an import raises ImportError
    monkeypatch.delitem(sys.modules, "vlcl.losses.pairwise_triton", raising=False)
    monkeypatch.delattr("vlcl.losses.pairwise_triton", raising=False)
    p.kernels = "triton"
    found = p.statistics()
    assert_same([found.log_sum_BK, found.log_square_BK], [expected.log_sum_BK, expected.log_square_BK], 0.0)
    on_cuda: Any = SimpleNamespace(is_cuda=True, dtype=torch.float64, device=torch.device("cpu"))
    assert pairwise._on_tiles("triton", on_cuda) is pairwise
    on_cuda.dtype = torch.float32
    assert pairwise._on_tiles("torch", on_cuda) is pairwise
    pairwise._kernels_run.cache_clear()
    assert pairwise._on_tiles("auto", on_cuda) is pairwise
    with pytest.raises(ImportError, match="triton"):
        pairwise._on_tiles("triton", on_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="VLCL_KERNELS=triton in the environment needs the package triton"):
        kernels_asked_for()


def test_kernels_that_do_not_run_here_are_told_once_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("vlcl.losses.pairwise_triton", reason="triton is not installed")
    calls = []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nenvironment variable")

    on_cuda: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr(kernels, "sum_tile", fail)
    pairwise._kernels_run.cache_clear()
    with pytest.warns(UserWarning, match=r"without its kernels, as Triton fails here: Failed to find C compiler"):
        assert pairwise._on_tiles("auto", on_cuda) is pairwise
    assert pairwise._on_tiles("auto", on_cuda) is pairwise
    assert len(calls) == 1
    assert pairwise._on_tiles("triton", on_cuda) is kernels  # asked for by name, it fails where it stands
    monkeypatch.setattr(kernels, "sum_tile", lambda *_: None)
    pairwise._kernels_run.cache_clear()
    assert pairwise._on_tiles("auto", on_cuda) is kernels
    assert pairwise._on_tiles("auto", on_cuda, captions=True) is pairwise  # they compare rows alone
    pairwise._kernels_run.cache_clear()
