"""The gradient-bias diagnostic: gradients of mini-batches against the exact gradient over all pairs.

What is estimated is the gradient G of the generalized loss over N pairs (vlcl/losses/mstep.py). A permutation of the
pairs is cut into disjoint batches of B, so that each pair is an anchor once; the mean of its batches' gradients is one
draw g_r. Over R permutations, with M the mean of the g_r and V their variance summed over coordinates,

    |bias|^2 = |M - G|^2 - V/R = mean over r != s of <g_r - G, g_s - G>          (noise is not read as bias)

`measure` needs embeddings alone: no run, no table, no config. vlcl/gradient_bias/command.py is the command. Letters
as in batches.py, R permutations, U units of the jackknife. Misuse: embeddings of training mode (dropout, augmentation),
and rows `a` of other pairs than those measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlcl.batch import Aux, Keys
from vlcl.gradient_bias.batches import (
    TILE,
    Embeddings,
    Estimator,
    Exact,
    Gradients,
    Pairs,
    Target,
    exact_gradient,
    exact_statistics,
    over_all,
    permutation_gradients,
)  # fmt: skip
from vlcl.losses.contrastive import ContrastiveLoss
from vlcl.losses.estep import EStep, Rate

MOST_UNITS = 16  # of the jackknife: so many gradients are held at a time
ROUNDING = 1e-5  # relative: a smaller difference is one of float32
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Record:
    """One estimator at one batch size, with respect to one target. All but `gradient_norm` (|G|) and `seconds` are
    without unit: gradients relative to |G|, log-normalizers in nats.

    bias: root of |bias|^2, negative where that estimate is (pure noise makes it so half of the time); bias_low and
    bias_high: two standard errors of |bias|^2 below and above; noise_floor: the bias that would stand two standard
    errors out; detected: whether this one does. along: <M, G> / |G|^2, the length of the mean gradient along G (1: all
    of it); cosine: of M and G, noise in M and all; cosine_corrected: of the expectation of M. sd_permutation, sd_batch:
    root of the summed variance of one permutation's and one batch's gradient. a_error, a_error_abs: mean of a - exact a
    in use, and of its absolute value.
    """

    estimator: str
    target: str
    batch_size: int
    permutations: int
    gradient_norm: float
    bias: float
    bias_se: float
    bias_low: float
    bias_high: float
    noise_floor: float
    detected: bool
    along: float
    along_se: float
    cosine: float
    cosine_corrected: float
    sd_permutation: float
    sd_batch: float | None
    a_error: float
    a_error_abs: float
    seconds: float


@dataclass
class Tally:
    """What is kept of R draws: U sums of consecutive ones, as differences from G, and sums of squares.

    Consecutive, so that draws which depend on the one before (an E-step that goes on remembering) fall into the same
    unit of the jackknife.
    """

    exact_P: Tensor
    draws: int
    unit_UP: Tensor = field(init=False)
    sizes: list[int] = field(init=False)
    square: float = 0.0
    batch_square: float | None = 0.0
    done: int = 0

    def __post_init__(self) -> None:
        units = min(self.draws, MOST_UNITS)
        self.unit_UP = self.exact_P.new_zeros(units, len(self.exact_P))
        self.sizes = [0] * units

    def add(self, draw_P: Tensor, batch_squares_J: Tensor | None) -> None:
        difference_P = draw_P - self.exact_P
        unit = self.done * len(self.sizes) // self.draws
        self.unit_UP[unit] += difference_P
        self.sizes[unit] += 1
        self.square += float(difference_P.double().square().sum())
        self.done += 1
        if batch_squares_J is None or self.batch_square is None:
            self.batch_square = None
        else:
            self.batch_square += float(batch_squares_J.double().mean())

    def summary(self) -> dict[str, Any]:
        """The fields of a Record that draws decide."""
        sizes_U = torch.tensor(self.sizes, dtype=torch.float64)
        unit_UP = self.unit_UP.double() if len(self.exact_P) < 1 << 16 else self.unit_UP
        gram_UU = (unit_UP @ unit_UP.T).double().cpu() / (sizes_U[:, None] * sizes_U)
        inner_U = (unit_UP @ self.exact_P.to(unit_UP)).double().cpu() / sizes_U
        exact_square = float(self.exact_P.double().square().sum())
        return summarize(gram_UU, inner_U, exact_square, self._variance(exact_square, sizes_U, inner_U, gram_UU))

    def _variance(
        self, exact_square: float, sizes_U: Tensor, inner_U: Tensor, gram_UU: Tensor
    ) -> tuple[float, float | None]:
        """Summed variance of one draw and of one batch's gradient."""
        share_U = sizes_U / sizes_U.sum()
        mean_square = float(share_U @ gram_UU @ share_U)  # |M - G|^2
        draw = max(self.square / self.done - mean_square, 0.0) * self.done / (self.done - 1)
        if self.batch_square is None:
            return draw, None
        expected = exact_square + 2 * float(share_U @ inner_U) + mean_square - draw / self.done  # |E g|^2
        return draw, max(self.batch_square / self.done - expected, 0.0)


def summarize(
    gram_UU: Tensor, inner_U: Tensor, exact_square: float, variance: tuple[float, float | None]
) -> dict[str, Any]:
    """From the inner products of U independent differences d_u = g_u - G among themselves and with G.

    Standard errors are the jackknife's over the units. Where there is no bias its variance of |bias|^2 is twice too
    large (the estimate is then degenerate): such errors are on the safe side by a factor of 1.4.
    """
    units = len(inner_U)
    norm = math.sqrt(exact_square)

    def estimates(keep: Tensor) -> Tensor:
        gram, inner, n = gram_UU[keep][:, keep], inner_U[keep], int(keep.sum())
        square = (gram.sum() - gram.trace()) / (n * (n - 1))
        return torch.stack([square / exact_square, 1 + inner.mean() / exact_square])

    everything = torch.ones(units, dtype=torch.bool)
    square, along = estimates(everything).tolist()
    left_out = torch.stack([estimates(torch.arange(units) != u) for u in range(units)])
    error = ((left_out - left_out.mean(dim=0)).square().sum(dim=0) * (units - 1) / units).sqrt().tolist()
    mean_square = exact_square * (1 + 2 * (along - 1)) + float(gram_UU.mean())  # |M|^2
    expected_square = exact_square * (1 + 2 * (along - 1) + square)
    root, tiny = math.sqrt(abs(square)), 1e-300
    return {
        "gradient_norm": norm, "bias": math.copysign(root, square),
        "bias_se": min(error[0] / max(2 * root, tiny), math.sqrt(error[0])),
        "bias_low": math.sqrt(max(square - 2 * error[0], 0.0)),
        "bias_high": math.sqrt(max(square, 0.0) + 2 * error[0]),
        "noise_floor": math.sqrt(2 * error[0]), "detected": square > max(2 * error[0], ROUNDING**2),
        "along": along, "along_se": error[1],
        "cosine": along * norm / math.sqrt(max(mean_square, tiny)),
        "cosine_corrected": min(max(along * norm / math.sqrt(max(expected_square, tiny)), -1.0), 1.0),
        "sd_permutation": math.sqrt(variance[0]) / norm,
        "sd_batch": None if variance[1] is None else math.sqrt(variance[1]) / norm,
    }  # fmt: skip


def standard_estimators(exact: Exact) -> list[Estimator]:
    """Those that need no run: the batch's own normalizer, with and without the positive, exact a, and u sampled."""
    return [
        Estimator("infonce", about="InfoNCE: the batch's own normalizer"),
        Estimator("dcl", ContrastiveLoss(positive=False), about="DCL: the same without the positive"),
        held("exact a", exact.a_NK, "each pair's exact log-normalizer a"),
        held("sampled u", exact.a_NK, "u ~ Exp(1) / Z of the exact Z", sample=True),
    ]


def held(name: str, a_NK: Tensor, about: str, sample: bool = False) -> Estimator:
    """An estimator whose rows stay at `a_NK` (relative form, log of the mean over all other pairs)."""
    loss = ContrastiveLoss(len(a_NK), EStep(Rate()), order="before", sample=sample)
    visits_N = torch.ones(len(a_NK), dtype=torch.long, device=a_NK.device)
    return Estimator(name, loss, Aux({"residual": a_NK}, visits_N), about=about)


def measure(
    image_ND: Tensor, text_ND: Tensor, scale: float, batch_sizes: Sequence[int], permutations: int = 32,
    estimators: Sequence[Estimator] | None = None, *, targets: Sequence[Target] | None = None, seed: int = 0,
    progress: Callable[[str], None] = lambda text: None, keys: Keys | None = None,
) -> list[Record]:  # fmt: skip
    """Bias and variance of each estimator at each batch size, with respect to each target.

    `image_ND`, `text_ND`: embeddings of N pairs, made unit here, in float32 or float64. `scale`: kappa = 1 /
    temperature. `keys`: unit vectors that the embeddings are compared with, if not with each other.
    `estimators`: None, `standard_estimators`. `targets`: None, the embeddings. Where B does not divide N,
    every permutation leaves out other N mod B pairs: no bias, a little more noise. All estimators that keep
    no memory see the same permutations. Raises ValueError for fewer than 3 permutations and batch sizes outside 2 .. N.

    >>> records = measure(torch.randn(64, 8), torch.randn(64, 8), 10.0, [8, 32], permutations=10)
    >>> [record.estimator for record in records[:4]]
    ['infonce', 'dcl', 'exact a', 'sampled u']
    """
    pairs = Pairs.of(image_ND, text_ND, scale, keys=keys)
    if permutations < 3:
        raise ValueError(f"permutations={permutations}: at least 3 are needed to tell bias from noise")
    if wrong := [size for size in batch_sizes if not 2 <= size <= len(pairs)]:
        raise ValueError(f"batch sizes {wrong} are not between 2 and the {len(pairs)} pairs")
    exact = exact_statistics(pairs)
    reference = exact_gradient(pairs)
    with_respect_to: Sequence[Target] = [Embeddings(len(pairs))] if targets is None else targets
    exact_P = [target.vector(reference) for target in with_respect_to]
    records = []
    for size in batch_sizes:
        for estimator in standard_estimators(exact) if estimators is None else estimators:
            begin = time.perf_counter()
            tallies = [Tally(x, permutations) for x in exact_P]
            error, error_abs = _draw(estimator, pairs, exact, size, with_respect_to, tallies, seed)
            seconds = time.perf_counter() - begin
            for target, tally in zip(with_respect_to, tallies):
                records.append(
                    Record(estimator.name, target.name, size, permutations, **tally.summary(),
                           a_error=error, a_error_abs=error_abs, seconds=seconds)
                )  # fmt: skip
            progress(f"B={size} {estimator.name}: {seconds:.1f} s")
    return records


def _draw(
    estimator: Estimator, pairs: Pairs, exact: Exact, size: int, targets: Sequence[Target], tallies: Sequence[Tally],
    seed: int,
) -> tuple[float, float]:  # fmt: skip
    """Fill the tallies; the mean error of a, and of its absolute value."""
    order, sampling = (torch.Generator().manual_seed(seed * 1_000_003 + size + k * 500_009) for k in (0, 1))
    num_batches = len(pairs) // size
    memory, errors = estimator.memory, [0.0, 0.0]
    permutations = tallies[0].draws
    a_NK = exact.a_NK if estimator.loss.relative else exact.a_NK + pairs.own()
    for number in range(permutations):
        rest = 0 if estimator.passes is None else estimator.between if number else estimator.passes
        for skipped in range(rest, -1, -1):  # E-steps alone, then the draw
            shuffled_N = torch.randperm(len(pairs), generator=order)[: num_batches * size]
            index_JB = shuffled_N.to(pairs.row_N.device).view(num_batches, size)
            gradients, after, used_JBK = permutation_gradients(estimator, pairs, index_JB, memory, sampling)
            memory = memory if estimator.passes is None else after
            if skipped:
                continue
            for target, tally in zip(targets, tallies):
                tally.add(target.vector(gradients), target.squares(gradients))
            error_JBK = used_JBK - a_NK[index_JB]
            errors[0] += float(error_JBK.mean()) / permutations
            errors[1] += float(error_JBK.abs().mean()) / permutations
    return errors[0], errors[1]


@torch.no_grad()
def predicted_bias(pairs: Pairs, exact: Exact, batch_size: int, positive: bool = True) -> Gradients:
    """The bias of the batch's own normalizer to first order in kappa / m, m = B - 1 negatives out of n = N - 1.

    With g the mean over all negatives of e^h, R = E_p[grad h] (p their softmax), R2 = E_{p^2}[grad h], and
    q_m = g / (g + 1/m) (1 without the positive), the delta method on sum_j e^{h_j} grad h_j / (1 + sum_j e^{h_j}) gives

        bias = (q_m - q_n) R + (1/m - 1/n) [ (q_m^3 (kappa - 1) + q_m^2) R - q_m^2 kappa R2 ]

    which is (kappa / m) (R - R2) where N is large and the positive is small; G itself is the mean of q_n R. It needs
    B >> kappa, and over-predicts below B of about 10 kappa.
    """
    m, n = batch_size - 1, len(pairs) - 1
    inverse_g_NK, kappa_NK = torch.exp(-exact.a_NK), exact.kappa_NK
    q_n_NK = 1 / (1 + inverse_g_NK / n)
    q_NK = 1 / (1 + inverse_g_NK / m) if positive else torch.ones_like(inverse_g_NK)
    rest = 1 / m - 1 / n
    first_NK = q_NK - q_n_NK + rest * (q_NK**3 * (kappa_NK - 1) + q_NK**2)
    second_NK = -rest * q_NK**2 * kappa_NK
    total_N = -(first_NK + second_NK).sum(dim=1)
    second_NK = second_NK * torch.exp(2 * exact.log_sum_NK - exact.log_square_NK)  # of p^2, made to sum to 1
    image_ND, text_ND, scale = pairs.image_ND, pairs.text_ND, pairs.scale
    slopes = torch.zeros_like(image_ND), torch.zeros_like(text_ND)
    log_scale = image_ND.new_zeros(1)
    rows = torch.arange(len(pairs), device=image_ND.device)
    for r in rows.split(max(1, TILE[image_ND.device.type] // len(pairs))):
        cos_RN = image_ND[r] @ text_ND.T
        p_RN = torch.exp(scale * cos_RN - exact.log_sum_NK[r, 0, None])
        w_RN = (first_NK[r, 0, None] + second_NK[r, 0, None] * p_RN) * p_RN
        p_RN = torch.exp(scale * cos_RN - exact.log_sum_NK[:, 1])
        w_RN += (first_NK[:, 1] + second_NK[:, 1] * p_RN) * p_RN
        w_RN[rows[: len(r)], r] = total_N[r]
        w_RN *= scale / (2 * len(pairs))
        slopes[0][r] = w_RN @ text_ND
        slopes[1].addmm_(w_RN.T, image_ND[r])
        log_scale += (w_RN * cos_RN).sum()
    return over_all(*slopes, log_scale, pairs)
