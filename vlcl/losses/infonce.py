"""InfoNCE, the loss of CLIP: every pair against the batch it happens to be in.

    loss = mean over pairs and both directions of  -log( e^{s_ii} / sum over j in the batch of e^{s_ij} )

It is the generalized loss with the batch's own normalizer in place of the full data's, hence biased for small batches:
E-step a = a-hat of the batch, N - 1 = n_i. Value and gradients equal open_clip's ClipLoss(local_loss=True,
gather_with_grad=True), which sends the features' gradients over ranks where this one sends two floats a pair.
"""

from __future__ import annotations

import torch

from vlcl.batch import Aux, Features, Peers
from vlcl.losses.estep import estimate_batch, generalized_loss, log_normalizer
from vlcl.losses.mstep import LossOutput, similarities, surrogate, with_value


class InfoNCELoss:
    """Features, peers -> LossOutput. As a loop, on a world of one:

    for i in range(B):
        image = -log(exp(s[i, i]) / sum(exp(s[i, j]) for j in range(B) if j == i or row[j] != row[i]))
        text = -log(exp(s[i, i]) / sum(exp(s[j, i]) for j in range(B) if j == i or row[j] != row[i]))
        loss += (image + text) / (2 * B)
    """

    num_columns = 0

    def __call__(self, features: Features, peers: Peers, aux: Aux | None = None, step: int = 0) -> LossOutput:
        del aux, step  # InfoNCE remembers nothing
        pair = similarities(features, peers)
        with torch.no_grad():
            a_hat_BK, log_n_B, metrics = estimate_batch(pair, epsilon=0.0)
            log_c_BK = log_normalizer(a_hat_BK, log_n_B[:, None], positive=True)
            log_c_GK, log_n_G = peers.gather(torch.cat([log_c_BK, log_n_B[:, None]], dim=1)).tensor_split([2], dim=1)
            value = generalized_loss(a_hat_BK, log_n_B[:, None]).mean()
        loss = with_value(value, surrogate(pair, log_c_GK, log_n_G[:, 0], peers))
        return LossOutput(loss, metrics={"loss": value, **metrics})
