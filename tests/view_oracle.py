"""One training step of MoCo-v3 as its paper's pseudo-code has it (Chen, Xie and He, ICCV 2021, Algorithm 1), in
float64: plain torch on plain weights, no code of vlcl's in it.

    for x in loader:
        x1, x2 = aug(x), aug(x)
        q1, q2 = f_q(x1), f_q(x2)
        k1, k2 = f_k(x1), f_k(x2)
        loss = ctr(q1, k2) + ctr(q2, k1)
        loss.backward()
        update(f_q)
        f_k = m*f_k + (1-m)*f_q

    def ctr(q, k):
        logits = mm(q, k.t())
        labels = range(N)
        loss = CrossEntropyLoss(logits/tau, labels)
        return 2 * tau * loss
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """BatchNorm of a batch, by the statistics of all of it."""
    mean = sum(x[i] for i in range(len(x))) / len(x)
    var = sum((x[i] - mean) ** 2 for i in range(len(x))) / len(x)
    y = (x - mean) / torch.sqrt(torch.as_tensor(var) + 1e-5)
    return y if weight is None or bias is None else y * weight + bias


def tower(w: Weights, pictures: Tensor) -> Tensor:
    """A linear map, BatchNorm, ReLU: what tests/test_views.py takes for a tower."""
    return norm(pictures.flatten(1) @ w["visual.1.weight"].T, w["visual.2.weight"], w["visual.2.bias"]).relu()


def projector(w: Weights, x: Tensor) -> Tensor:
    x = norm(x @ w["projector.0.weight"].T, w["projector.1.weight"], w["projector.1.bias"]).relu()
    x = norm(x @ w["projector.3.weight"].T, w["projector.4.weight"], w["projector.4.bias"]).relu()
    return norm(x @ w["projector.6.weight"].T)


def predictor(w: Weights, x: Tensor) -> Tensor:
    x = norm(x @ w["predictor.0.weight"].T, w["predictor.1.weight"], w["predictor.1.bias"]).relu()
    return norm(x @ w["predictor.3.weight"].T)


def unit(x: Tensor) -> Tensor:
    return torch.stack([row / row.norm() for row in x])


def ctr(q: Tensor, k: Tensor, tau: float) -> Tensor:
    logits = q @ k.T / tau
    return 2 * tau * F.cross_entropy(logits, torch.arange(len(q)))


def losses(q: Weights, k: Weights, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q1, q2, k1, k2."""
    with torch.no_grad():
        k1, k2 = (unit(projector(k, tower(k, x))) for x in (x1, x2))
    q1, q2 = (unit(predictor(q, projector(q, tower(q, x)))) for x in (x1, x2))
    return q1, q2, k1, k2


def steps(start: Weights, views: list[tuple[Tensor, Tensor]], lr: float, tau: float, m: float, total: int):
    """Weights of f_q and f_k, and the losses, after plain gradient descent on these batches; m goes to 1 along a cosine
    over `total` steps, and stands at m before the first."""
    q = {name: x.clone().requires_grad_() for name, x in start.items()}
    k = {name: x.clone() for name, x in start.items() if not name.startswith("predictor")}
    values = []
    for number, (x1, x2) in enumerate(views):
        q1, q2, k1, k2 = losses(q, k, x1, x2)
        loss = ctr(q1, k2, tau) + ctr(q2, k1, tau)
        gradients = torch.autograd.grad(loss, list(q.values()))
        q = {name: (x - lr * g).detach().requires_grad_() for (name, x), g in zip(q.items(), gradients)}
        share = 1 - (1 - m) * (1 + math.cos(math.pi * (number + 1) / total)) / 2
        k = {name: share * x + (1 - share) * q[name].detach() for name, x in k.items()}
        values.append(float(loss.detach()))
    return {name: x.detach() for name, x in q.items()}, k, values
