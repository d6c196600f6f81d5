"""SigLIP: every pair of a batch is a yes-or-no question (Zhai et al., ICCV 2023).

    loss = 1/G sum over i, j of softplus(-y_ij (kappa cos_ij + b)),      y_ii = 1, y_ij = -1

In the family's terms: one learned log-normalizer -b for all pairs, absolute form, softplus in place of exp; far from
the decision (kappa cos + b << 0) the two are the same. The pairs j of the same row as i are left out, and
those of the same caption with `same_caption="ignore"`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcl.batch import Aux, Features, Peers
from vlcl.losses.mstep import LARGEST_LOG_WEIGHT, LossOutput, at_least_float32
from vlcl.losses.pairs import Candidates, Kernels, Weighing, captions_of, named, own_cosines_to_train
from vlcl.losses.pairwise import pair_statistics, weighted_sum

MONITORED = 256  # pairs of a rank that its InfoNCE value is estimated from: a metric is not worth a matrix product


@dataclass(frozen=True)
class SigLIPLoss:
    """Features (with logit_bias), peers -> LossOutput. As a loop, on a world of one:

    for i in range(B):
        loss += softplus(-(kappa * v[i] @ t[i] + b)) / B
        for j in range(B):
            if row[j] != row[i]:
                loss += softplus(kappa * v[i] @ t[j] + b) / B
    """

    columns: tuple[str, ...] = ()
    meaning_of_rows: str = "plain"
    kernels: Kernels = "auto"
    same_caption: str = "negative"

    def initial(self, width: int) -> dict[str, Tensor]:
        return {}

    def __call__(self, features: Features, peers: Peers, aux: Aux | None = None, step: int = 0) -> LossOutput:
        del aux, step  # nothing is remembered
        if features.logit_bias is None:
            raise ValueError("the SigLIP loss needs features.logit_bias: a model with a learned bias (logit_bias_init)")
        with torch.autocast(features.image_BD.device.type, enabled=False):
            image_BD, text_BD = at_least_float32(features.image_BD), at_least_float32(features.text_BD)
            num_own, num_all = image_BD.shape[0], len(peers.row_G)
            row_G = named(peers.row_G, captions_of(peers, self.same_caption))
            row_B = row_G[peers.start : peers.start + num_own]
            compared, with_keys = peers.candidates, peers.keys is not None
            candidates = Candidates(
                compared.image.to(image_BD), compared.text.to(text_BD), row_G, peers.start, num_all, with_keys
            )
            keys = candidates.keys_of(num_own)
            scale, bias = features.logit_scale.to(image_BD), features.logit_bias.reshape(()).to(image_BD)
            weighing = Weighing(
                row_B, candidates, scale.detach().expand(num_all, 2), (-bias).detach().expand(num_all, 2),
                LARGEST_LOG_WEIGHT, kind="softplus", kernels=self.kernels,
            )  # fmt: skip
            scale_BK, offset_BK = (x.expand(num_own, 2).contiguous() for x in (scale, -bias))
            negatives, _ = weighted_sum(image_BD, text_BD, scale_BK, offset_BK, weighing)
            own_BK = own_cosines_to_train(image_BD, text_BD, keys)
            positives = F.softplus(-(scale * own_BK + bias)).mean(dim=1).sum()
            # Each question is asked from both of its sides over all ranks, hence the half.
            loss = (positives + negatives / 2) * peers.world / num_all
            return LossOutput(
                loss, metrics={"loss": loss.detach(), **self._monitor(image_BD, text_BD, candidates, scale)}
            )

    @torch.no_grad()
    def _monitor(self, image_BD: Tensor, text_BD: Tensor, candidates: Candidates, scale: Tensor) -> dict[str, Tensor]:
        image_BD, text_BD = image_BD[:MONITORED].detach(), text_BD[:MONITORED].detach()
        num_own = image_BD.shape[0]
        row_B = candidates.row_C[candidates.start : candidates.start + num_own]
        scale_BK = scale.detach().expand(num_own, 2).contiguous()
        keys = candidates.keys_of(num_own)
        found = pair_statistics(image_BD, text_BD, row_B, candidates, scale_BK, self.kernels)
        own_BK = scale.detach() * own_cosines_to_train(image_BD, text_BD, keys)
        infonce = torch.logaddexp(found.log_sum_BK - own_BK, own_BK.new_zeros(())).mean()
        effective = torch.exp(2 * found.log_sum_BK - found.log_square_BK).nan_to_num(0.0).mean()
        return {"infonce": infonce, "effective_negatives": effective}
