"""What the gradient-bias diagnostic measures: estimators of a batch's gradient, the exact gradient, and with respect to
what. vlcl/gradient_bias/measure.py compares them.

Letters: N pairs measured, B pairs of a batch, J batches, D width, W width before the projection head, K directions (0
image to text), P numbers of a gradient, S pairs of a subset. Gradients of embeddings: the part along the sphere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcl.batch import Aux, Features, Keys, Peers
from vlcl.losses.contrastive import ContrastiveLoss
from vlcl.losses.estep import Context, in_use, log_exponential, log_mean
from vlcl.losses.mstep import largest_log_weight, log_normalizer, positive_share
from vlcl.losses.pairs import Candidates, log_count, own_cosines
from vlcl.losses.pairwise import pair_statistics

TILE = {"cpu": 1 << 22, "cuda": 1 << 26}  # similarities at a time


@dataclass(frozen=True)
class Pairs:
    """Unit embeddings of the N pairs that are measured, kappa = exp(logit_scale) as a number, and their row ids.
    `keys`: [N, D] each, what they are compared with, where that is not the other side (views; vlcl/batch.py)."""

    image_ND: Tensor
    text_ND: Tensor
    scale: float
    row_N: Tensor
    keys: Keys | None = None

    @classmethod
    def of(cls, image_ND: Tensor, text_ND: Tensor, scale: float, row_N: Tensor | None = None, keys: Keys | None = None):
        row_N = torch.arange(len(image_ND), device=image_ND.device) if row_N is None else row_N
        return cls(F.normalize(image_ND, dim=1), F.normalize(text_ND, dim=1), float(scale), row_N, keys)

    def __len__(self) -> int:
        return len(self.row_N)

    def subset(self, index: Tensor) -> Pairs:
        keys = taken(self.keys, index)
        return Pairs(self.image_ND[index], self.text_ND[index], self.scale, self.row_N[index], keys)

    def own(self) -> Tensor:
        """kappa cos_ii, [N, 2]."""
        return self.scale * own_cosines(self.image_ND, self.text_ND, self.keys).expand(-1, 2)

    def peers(self, index: Tensor | slice = slice(None)) -> Peers:
        row_N = torch.arange(len(self), device=self.row_N.device)[index]
        return Peers(self.image_ND[index], self.text_ND[index], row_N, keys=taken(self.keys, index))


def taken(keys: Keys | None, index: Tensor | slice) -> Keys | None:
    return None if keys is None else Keys(keys.image[index], keys.text[index])


@dataclass(frozen=True)
class Exact:
    """Over all N - 1 negatives of each pair, both directions: a = log of the mean of e^{h}, the sums that it comes
    from, and kappa = (N - 1) sum of p^2, p their softmax. (N - 1) / kappa is the effective number of negatives."""

    a_NK: Tensor
    kappa_NK: Tensor
    log_sum_NK: Tensor
    log_square_NK: Tensor


@dataclass(frozen=True)
class Gradients:
    """Gradients of the mean loss of J batches (J = 1: of all pairs) with respect to their unit embeddings, the part
    along the sphere (what the towers receive), and to log kappa. `index_JB`: the places of the batches' pairs."""

    image_JBD: Tensor
    text_JBD: Tensor
    log_scale_J: Tensor
    index_JB: Tensor


@dataclass(frozen=True)
class Estimator:
    """How the pairs of a batch get their log-normalizers: by the E-step, order, form and cap of `loss`.

    `memory`: what it starts from, rows [N, 2] a name and visits in the order of the pairs. `passes`: None, every
    permutation starts from that memory; a number: so many E-steps over all pairs before, then it goes on remembering,
    with `between` E-steps over all pairs from draw to draw (draws that follow each other repel: a row that has just met
    its hard negatives weighs them less). `step`: what a schedule of the rate goes by. `about`: a phrase for people.
    """

    name: str
    loss: ContrastiveLoss = field(default_factory=ContrastiveLoss)
    memory: Aux = field(default_factory=Aux)
    passes: int | None = None
    between: int = 0
    step: int = 0
    about: str = ""


class Target(Protocol):
    """What gradients are taken with respect to: a linear map of the gradients of the embeddings. J batches give the
    mean's gradient as one vector [P], and the squared norms [J] of their own (None: too much work)."""

    @property
    def name(self) -> str: ...

    def vector(self, gradients: Gradients) -> Tensor: ...

    def squares(self, gradients: Gradients) -> Tensor | None: ...


@dataclass(frozen=True)
class Embeddings:
    """All N x D x 2 numbers. A batch touches its own pairs' only."""

    num_pairs: int
    name: str = "embeddings"

    def vector(self, gradients: Gradients) -> Tensor:
        return torch.cat([x_ND.flatten() for x_ND in in_place(gradients, self.num_pairs)])

    def squares(self, gradients: Gradients) -> Tensor:
        return gradients.image_JBD.square().sum((1, 2)) + gradients.text_JBD.square().sum((1, 2))


@dataclass(frozen=True)
class Heads:
    """The towers' last linear maps, embedding = input @ weight: the chain rule on cached inputs, towers not run again.

    `inputs`: for each tower (0 image, 1 text) that has one, [N, W] features before it; `lengths`: [N], the norms of the
    embeddings before they are made unit.
    """

    inputs: Mapping[int, Tensor]
    lengths: Mapping[int, Tensor]
    name: str = "projection heads"

    def _parts(self, gradients: Gradients) -> Iterable[tuple[Tensor, Tensor]]:
        """input_JBW and the gradient at the head's output, [J, B, D]."""
        index = gradients.index_JB
        for tower, x_JBD in enumerate((gradients.image_JBD, gradients.text_JBD)):
            if tower in self.inputs:
                yield self.inputs[tower][index], x_JBD / self.lengths[tower][index][..., None]

    def vector(self, gradients: Gradients) -> Tensor:
        num = len(gradients.index_JB)
        return torch.cat([(f.flatten(0, 1).T @ g.flatten(0, 1) / num).flatten() for f, g in self._parts(gradients)])

    def squares(self, gradients: Gradients) -> Tensor:
        """|f' g|^2 is the sum over pairs of pairs of (f f') (g g'): no W x D matrix a batch."""
        parts = [((f @ f.mT) * (g @ g.mT)).sum((1, 2)) for f, g in self._parts(gradients)]
        return torch.stack(parts).sum(dim=0)


def in_place(gradients: Gradients, num_pairs: int) -> tuple[Tensor, Tensor]:
    """The mean over the J batches as [N, D] each for image and text, 0 where no batch has a pair."""
    num, index = len(gradients.index_JB), gradients.index_JB.flatten()
    zeros_ND = gradients.image_JBD.new_zeros(num_pairs, gradients.image_JBD.shape[2])
    image_ND = zeros_ND.index_copy(0, index, gradients.image_JBD.flatten(0, 1) / num)
    return image_ND, zeros_ND.index_copy(0, index, gradients.text_JBD.flatten(0, 1) / num)


@dataclass(frozen=True)
class Weights:
    """Chosen weights of the towers: `image_SD` and `text_SD` are unit embeddings of all pairs measured, with their
    graph, in evaluation mode; `weights` are leaves of it."""

    image_SD: Tensor
    text_SD: Tensor
    weights: Sequence[Tensor]
    name: str = "weights"

    def vector(self, gradients: Gradients) -> Tensor:
        given = zip((self.image_SD, self.text_SD), in_place(gradients, len(self.image_SD)))
        ends, slopes = zip(*(pair for pair in given if pair[0].requires_grad))  # a tower may have none of the weights
        with torch.enable_grad():
            found = torch.autograd.grad(ends, self.weights, slopes, retain_graph=True)
        return torch.cat([x.flatten() for x in found])

    def squares(self, gradients: Gradients) -> None:
        return None


@dataclass(frozen=True)
class LogScale:
    name: str = "logit_scale"

    def vector(self, gradients: Gradients) -> Tensor:
        return gradients.log_scale_J.mean()[None]

    def squares(self, gradients: Gradients) -> Tensor:
        return gradients.log_scale_J.square()


@torch.no_grad()
def exact_statistics(pairs: Pairs) -> Exact:
    """a, kappa and the sums they come from, tile by tile."""
    compared = pairs.peers().candidates
    candidates = Candidates(compared.image, compared.text, pairs.row_N, 0, len(pairs), pairs.keys is not None)
    scale_NK = pairs.image_ND.new_full((len(pairs), 2), pairs.scale)
    found = pair_statistics(pairs.image_ND, pairs.text_ND, pairs.row_N, candidates, scale_NK)
    log_n_N1 = log_count(pairs.row_N, pairs.row_N).to(scale_NK)[:, None]
    kappa_NK = torch.exp(found.log_square_BK - 2 * found.log_sum_BK + log_n_N1)
    return Exact(found.log_sum_BK - pairs.own() - log_n_N1, kappa_NK, found.log_sum_BK, found.log_square_BK)


def exact_gradient(pairs: Pairs) -> Gradients:
    """G: InfoNCE over all N pairs at once is the generalized loss; tile by tile."""
    image_ND, text_ND = pairs.image_ND.clone().requires_grad_(), pairs.text_ND.clone().requires_grad_()
    log_scale = image_ND.new_tensor(math.log(pairs.scale)).requires_grad_()
    with torch.enable_grad():
        features = Features(image_ND, text_ND, log_scale.exp(), keys=pairs.keys)
        loss = ContrastiveLoss()(features, replace(pairs.peers(), row_G=pairs.row_N)).loss
        found = torch.autograd.grad(loss, [image_ND, text_ND, log_scale])
    return over_all(found[0], found[1], found[2][None], pairs)


def over_all(image_ND: Tensor, text_ND: Tensor, log_scale_1: Tensor, pairs: Pairs) -> Gradients:
    """Gradients with respect to all embeddings as one batch."""
    index_1N = torch.arange(len(pairs), device=pairs.row_N.device)[None]
    image, text = _along(image_ND, pairs.image_ND), _along(text_ND, pairs.text_ND)
    return Gradients(image[None], text[None], log_scale_1, index_1N)


def _along(gradient: Tensor, unit: Tensor) -> Tensor:
    """The part of a gradient along the sphere: what passes through the normalization to length 1."""
    return gradient - (gradient * unit).sum(dim=-1, keepdim=True) * unit


@torch.no_grad()
def batch_gradients(
    loss: ContrastiveLoss, pairs: Pairs, index_JB: Tensor, memory: Aux, step: int, generator: torch.Generator
) -> tuple[Gradients, Aux, Tensor]:
    """Gradients of `loss` on J batches in a world of one, their new rows ([J * B, 2] a name), and a_JBK as used. As J
    calls of `loss` with autograd (tested), by J batched products. In relative form, as a loop over batches:

        h[i, j] = kappa (v[i] @ t[j] - v[i] @ t[i]);   w[i, j] = exp(h[i, j] - log(B - 1) - log_c[i])
        gradient += kappa / (2 B) * sum(w[i, j] * gradient of (v[i] @ t[j] - v[i] @ t[i]) for j != i), both directions

    M matrices of cosines: one, whose columns are the other direction's anchors; with keys one a direction."""
    size, cos_MJBB = index_JB.shape[1], _cosines(pairs, index_JB)
    of_image = 1 if pairs.keys is None else 2  # the dimension of that direction's candidates
    eye_BB = torch.eye(size, dtype=torch.bool, device=cos_MJBB.device)
    own_JBK = pairs.scale * cos_MJBB.diagonal(dim1=2, dim2=3).movedim(0, 2).expand(-1, -1, 2)
    s_MJBB = (pairs.scale * cos_MJBB).masked_fill_(eye_BB, -torch.inf)
    log_sum_JBK = torch.stack([s_MJBB[0].logsumexp(2), s_MJBB[-1].logsumexp(of_image)], dim=2)
    reference_JBK, log_n = loss.reference(own_JBK), math.log(size - 1)
    a_hat_JBK = log_mean(log_sum_JBK, log_n, reference_JBK, loss.epsilon)
    a_JBK, memory = _estep(loss, pairs, index_JB, a_hat_JBK, reference_JBK, memory, step)
    log_negatives = log_n if loss.num_pairs is None else math.log(loss.num_pairs - 1)
    log_c_JBK = log_normalizer(a_JBK, own_JBK, log_negatives, positive=loss.positive, relative=loss.relative)
    if loss.sample:
        log_c_JBK = log_c_JBK - log_exponential(log_c_JBK.shape, generator).to(log_c_JBK)
    offset_JBK = reference_JBK + log_n + log_c_JBK
    cap = largest_log_weight(loss.max_log_weight)
    to_text_JBB = (s_MJBB[0] - offset_JBK[:, :, None, 0]).clamp_(max=cap).exp_()
    to_image_JBB = (s_MJBB[-1] - offset_JBK[..., 1].unsqueeze(of_image)).clamp_(max=cap).exp_()
    own_weight_JBK = torch.stack([to_text_JBB.sum(2), to_image_JBB.sum(of_image)], dim=2)
    if not loss.relative:
        right_JBK = 1 - loss.positive * positive_share(own_JBK, log_c_JBK, log_negatives)
        push_J11, right_J11 = (x.sum((1, 2), keepdim=True) for x in (own_weight_JBK, right_JBK))
        ratio_J11 = push_J11 / right_J11.clamp(min=torch.finfo(right_J11.dtype).tiny)
        own_weight_JBK = right_JBK * (ratio_J11 if loss.form == "balanced" else 1)
    slope_MJBB, own_weight_MJB = torch.stack([to_text_JBB, to_image_JBB]), own_weight_JBK.movedim(2, 0)
    if pairs.keys is None:
        slope_MJBB, own_weight_MJB = slope_MJBB.sum(0, keepdim=True), own_weight_MJB.sum(0, keepdim=True)
    slope_MJBB.diagonal(dim1=2, dim2=3).copy_(-own_weight_MJB)  # d loss / d cos, but for the factor
    return _pull(slope_MJBB.mul_(pairs.scale / (2 * size)), cos_MJBB, pairs, index_JB), memory, a_JBK


def _cosines(pairs: Pairs, index_JB: Tensor) -> Tensor:
    image_JBD, text_JBD = pairs.image_ND[index_JB], pairs.text_ND[index_JB]
    if pairs.keys is None:
        return (image_JBD @ text_JBD.mT)[None]
    return torch.stack([image_JBD @ pairs.keys.text[index_JB].mT, text_JBD @ pairs.keys.image[index_JB].mT])


def _pull(slope_MJBB: Tensor, cos_MJBB: Tensor, pairs: Pairs, index_JB: Tensor) -> Gradients:
    """From d loss / d cos to the embeddings and log kappa."""
    image_JBD, text_JBD = pairs.image_ND[index_JB], pairs.text_ND[index_JB]
    slopes = slope_MJBB[0] @ text_JBD, slope_MJBB[0].mT @ image_JBD
    if pairs.keys is not None:
        slopes = slope_MJBB[0] @ pairs.keys.text[index_JB], slope_MJBB[1] @ pairs.keys.image[index_JB]
    image, text = _along(slopes[0], image_JBD), _along(slopes[1], text_JBD)
    return Gradients(image, text, (slope_MJBB * cos_MJBB).sum((0, 2, 3)), index_JB)


def _estep(
    loss: ContrastiveLoss, pairs: Pairs, index_JB: Tensor, a_hat_JBK: Tensor, reference_JBK: Tensor, memory: Aux,
    step: int,
) -> tuple[Tensor, Aux]:  # fmt: skip
    """The a that weigh the batches, and the memory after them. Without a prediction all batches go at once: a pair is
    in one of them only. A prediction learns from batch to batch."""
    if loss.bank:
        raise ValueError("an estimator with a bank of recent pairs is not measured")
    groups = index_JB[:, None] if loss.estep.predictor is not None else index_JB.flatten()[None, None]
    a_hat, reference = (x.reshape(len(groups), -1, 2) for x in (a_hat_JBK, reference_JBK))
    used, rows = [], []
    shared = memory.shared
    for g, index_1G in enumerate(groups):
        index_G = index_1G[0]
        peers = pairs.peers(index_G)
        scale_GK = torch.full_like(reference[g], pairs.scale)
        context = Context(peers, len(index_G), step, scale_GK, reference[g], loss.epsilon)
        visits_G = None if memory.visits_G is None else memory.visits_G[index_G]
        aux = Aux({name: x[index_G] for name, x in memory.rows.items()}, visits_G, shared)
        prior_GK = loss.estep.prior(aux, context)
        a_GK, update, _ = loss.estep.update(prior_GK, a_hat[g], aux, context)
        used.append(in_use(prior_GK, a_GK, loss.order))
        rows.append(update.rows)
        shared = {**shared, **update.shared}
    joined = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    return torch.stack(used).reshape(a_hat_JBK.shape), Aux(joined, shared=shared)


def remember(memory: Aux, index_JB: Tensor, new: Aux) -> Aux:
    """`memory` with the rows of a permutation's batches written."""
    index = index_JB.flatten()
    rows = {name: x.index_copy(0, index, new.rows[name].to(x)) for name, x in memory.rows.items() if name in new.rows}
    visits = memory.visits_G
    if visits is not None:
        visits = visits.index_add(0, index, torch.ones_like(index, dtype=visits.dtype))
    return replace(memory, rows={**memory.rows, **rows}, visits_G=visits, shared={**memory.shared, **new.shared})


@torch.no_grad()
def permutation_gradients(
    estimator: Estimator, pairs: Pairs, index_JB: Tensor, memory: Aux, generator: torch.Generator
) -> tuple[Gradients, Aux, Tensor]:
    """`batch_gradients` of all batches of a permutation, some at a time; the memory after it, and the a in use."""
    size = index_JB.shape[1]
    parts, used = [], []
    after = memory
    for chunk_JB in index_JB.split(max(1, TILE[index_JB.device.type] // size**2)):
        gradients, new, a_JBK = batch_gradients(estimator.loss, pairs, chunk_JB, after, estimator.step, generator)
        after = remember(after, chunk_JB, new)
        parts.append(gradients)
        used.append(a_JBK)
    joined = Gradients(
        torch.cat([part.image_JBD for part in parts]), torch.cat([part.text_JBD for part in parts]),
        torch.cat([part.log_scale_J for part in parts]), index_JB,
    )  # fmt: skip
    return joined, after, torch.cat(used)
