"""The loss family as slow loops over pairs in float64, and small batches to try it on. Written from the formulas of
docs/losses.md, not from the code: plain Python numbers, one pair after another, no tiles and no log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcl.batch import Aux, Features, Keys, Peers
from vlcl.losses import LossOutput

G, D, N = 12, 5, 40


def make_pairs(
    seed: int = 0, duplicates: bool = False, dtype: torch.dtype = torch.float64, pairs: int = G, width: int = D
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(pairs, width, generator=g, dtype=dtype), dim=1) for _ in range(2))
    row = torch.randperm(max(N, pairs), generator=g)[:pairs]
    if duplicates:
        row[7 % pairs] = row[2 % pairs]
    return image, text, row


def make_aux(row: Tensor, loss: Any = None, seed: int = 1, width: int = D) -> Aux:
    """What a loss might remember: every third row was never written; values as a row of each name has them."""
    g = torch.Generator().manual_seed(seed)
    names = ("residual",) if loss is None else loss.columns
    visits = torch.randint(1, 5, (max(N, len(row)),), generator=g)
    visits[::3] = 0
    rows = {}
    for name in names:
        values = torch.randn(len(visits), 2, generator=g, dtype=torch.float64)
        if name == "tau":
            values = 0.03 + 0.1 * torch.rand(len(visits), 2, generator=g, dtype=torch.float64)
        if name == "tau_square":
            values = values.square()
        values[::3] = torch.nan
        rows[name] = values[row]
    shared = {} if loss is None else loss.initial(width)
    return Aux(rows, visits[row], shared)


def one_rank(
    loss: Any, image: Tensor, text: Tensor, row: Tensor, aux: Aux | None, scale: float = 7.0, step: int = 0,
    bias: float | None = None, caption: Tensor | None = None, keys: Keys | None = None,
) -> tuple[LossOutput, list[Tensor]]:  # fmt: skip
    """Loss output and gradients (image, text, log of the scale, and the bias where there is one) on a world of one."""
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    log_scale = torch.tensor(math.log(scale), dtype=image.dtype, requires_grad=True)
    leaves = [image, text, log_scale]
    logit_bias = None
    if bias is not None:
        logit_bias = torch.tensor(bias, dtype=image.dtype, requires_grad=True)
        leaves.append(logit_bias)
    peers = Peers(image.detach(), text.detach(), row, caption_G=caption, keys=keys)
    out: LossOutput = loss(Features(image, text, log_scale.exp(), logit_bias, keys), peers, aux, step)
    return out, list(torch.autograd.grad(out.loss, leaves))


def remembered(out: LossOutput) -> Aux:
    """What the loss returned to be remembered; it must have."""
    assert out.aux is not None
    return out.aux


def gradients_of(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves))


def assert_same(got: Any, expected: Any, tolerance: float = 1e-11) -> None:
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


@dataclass
class Spec:
    """What a preset is said to be, in the words of the docs."""

    rate: Any = None  # None: the batch; else gamma(a_old, visits, step)
    sgd: bool = False
    positive: bool = False
    order: str = "after"
    form: str = "relative"
    epsilon: float = 0.0
    num_pairs: int | None = N
    temperature: str = "learned"
    rho: float = 0.0
    tau: float = 0.05
    move: Any = None  # pair temperatures: (tau, gradient, aux of the pair, visits) -> named new values
    max_log_weight: float = 50.0
    bank: Sequence[Tensor] | None = None  # images, texts, rows, and perhaps captions
    bank_negatives: bool = False
    a_of: dict[tuple[int, int], float] = field(default_factory=dict)  # fixed a per (pair, direction), e.g. a prediction


def oracle(
    spec: Spec, image: Tensor, text: Tensor, row: Tensor, aux: Aux | None, scale: float = 7.0, step: int = 0,
    caption: Tensor | None = None, keys: Keys | None = None,
):  # fmt: skip
    """Value, gradients (image, text, log scale) and the new rows (by name) of the loss that `spec` describes. caption:
    pairs of one caption are not each other's negatives. keys: what anchors are compared with, their own pair and all
    others; constants."""
    caption = torch.arange(len(row)) if caption is None else caption
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    log_scale = torch.tensor(math.log(scale), dtype=image.dtype, requires_grad=True)
    pairs, value, surrogate = len(row), 0.0, torch.zeros((), dtype=image.dtype)
    new_rows: dict[str, Tensor] = {}
    pulls: list[tuple[float, float, Tensor]] = []  # of the positives: right if rows are, what negatives push, kappa cos
    bank = spec.bank or (image[:0], text[:0], row[:0])
    others = (image, text) if keys is None else (keys.image, keys.text)
    for k, (x, y, old) in enumerate([(image, others[1], bank[1]), (text, others[0], bank[0])]):
        for i in range(pairs):
            known = {} if aux is None else {name: values[i, k].item() for name, values in aux.rows.items()}
            visits = 0 if aux is None or aux.visits_G is None else int(aux.visits_G[i])
            tau_i = known.get("tau", math.nan)
            tau_i = spec.tau if math.isnan(tau_i) else tau_i
            kappa = log_scale.exp() if spec.temperature in ("learned", "rho") else log_scale.exp().detach()
            kappa = torch.tensor(1 / tau_i, dtype=image.dtype) if spec.temperature == "pair" else kappa
            own = kappa * (x[i] @ y[i])
            reference = own if spec.form == "relative" else 0.0 * own
            others = [j for j in range(pairs) if row[j] != row[i]]
            batch = [kappa * (x[i] @ y[j]) - reference for j in others if caption[j] != caption[i]]
            older = [n for n, r in enumerate(bank[2]) if r not in (row[i], -1)]
            kept = [n for n in older if len(bank) < 4 or bank[3][n] != caption[i]]
            banked = [kappa * (x[i] @ old[n]) - reference for n in kept]
            seen = batch + banked
            a_hat = math.log(spec.epsilon + sum(math.exp(h.item()) for h in seen) / len(seen))
            a_old = known.get("residual", math.nan)
            a_new = a_hat
            if spec.rate is not None and not math.isnan(a_old):
                gamma = spec.rate(a_old, visits, step)
                a_new = math.log((1 - gamma) * math.exp(a_old) + gamma * math.exp(a_hat))
                if spec.sgd:
                    a_new = a_old - gamma * (1 - math.exp(a_hat - a_old))
                    a_new = min(a_new, a_hat) if a_hat > a_old else a_new
            a_new = spec.a_of.get((i, k), a_new)
            a = a_old if spec.order == "before" and not math.isnan(a_old) else a_new
            left = len(seen) / (len(others) + len(older))
            negatives = len(seen) if spec.num_pairs is None else (spec.num_pairs - 1) * left
            positive = math.exp(own.item() - reference.item()) if spec.positive else 0.0
            weighted = seen if spec.bank_negatives else batch
            u = negatives / (positive + negatives * math.exp(a)) / len(weighted)
            tau = {"rho": 1 / kappa.item(), "pair": tau_i}.get(spec.temperature, 1.0)
            sum_wh = push = 0.0
            for h in weighted:
                w = min(u * math.exp(h.item()), math.exp(spec.max_log_weight) / tau)
                surrogate = surrogate + tau * w * h / (2 * pairs)
                sum_wh, push = sum_wh + w * h.item(), push + w
            if spec.form != "relative":
                right = 1 - u * len(weighted) / negatives * positive
                pulls.append((right, push, tau * own))
                sum_wh -= right * own.item()  # for temperatures of pairs, which no test has in balanced form
            a_relative = a_new - (own.item() - reference.item())
            log_z = math.log(spec.positive + negatives * math.exp(a_relative)) if spec.positive else a_relative
            if spec.temperature == "rho":
                value += tau * (log_z + spec.rho) / (2 * pairs)
                surrogate = surrogate + (log_z + spec.rho) / kappa / (2 * pairs)
            else:
                value += math.log(1 + negatives * math.exp(a_relative)) / (2 * pairs)
            found = {"residual": a_new} if spec.rate is not None else {}
            if spec.move is not None:
                found |= spec.move(tau_i, log_z + spec.rho - sum_wh, known, visits)
            for name, number in found.items():
                new_rows.setdefault(name, torch.zeros(pairs, 2, dtype=torch.float64))[i, k] = number
    ratio = sum(push for _, push, _ in pulls) / sum(right for right, _, _ in pulls) if spec.form == "balanced" else 1.0
    surrogate = surrogate - sum(ratio * right * own for right, _, own in pulls) / (2 * pairs)
    gradients = gradients_of(surrogate + 0.0 * log_scale, [image, text, log_scale])
    return value, gradients, new_rows
