"""The towers' forward and backward: in one piece, in chunks that give the gradients of one piece, or in parts, each
with negatives of its own.

A contrastive loss needs all pairs of the batch at once, the towers do not. So with k chunks (Gao et al., GradCache,
2021): features of all chunks without gradient; the loss on them, its gradient to the features; then each chunk again,
with gradient, backward from its part of the features' gradient. The generators are put back before the second pass:
patch dropout and dropout see the same masks. logit_scale and logit_bias get their gradients once, from the loss.

A loss that is decomposable needs none of that: the gradients of parts add up in one pass, each pair against its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from vlcl.batch import Batch, Features


def random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda" and len(state) > 1:  # a state saved on a CPU has none of a GPU
        torch.cuda.set_rng_state(state[1], device)


class Towers:
    """`features = forward(batch)`, a loss of them, `backward(loss)`: gradients are in the parameters.

    model: the DualEncoder, wrapped or not. backward_fn: what differentiates a scalar (`accelerator.backward`: it scales
    for fp16). no_sync: a context in which the wrapper leaves gradients of this rank alone (`accelerator.no_sync`).
    alone: the chunks are `parts`, each a batch of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        chunks: int,
        backward_fn: Callable[[Tensor], None],
        no_sync: Callable[[nn.Module], AbstractContextManager[object]],
        alone: bool = False,
    ) -> None:
        self.model, self._backward, self._no_sync = model, backward_fn, no_sync
        self.parameters = list(model.parameters())  # once: to walk the modules costs as much as to clip small gradients
        self.chunks, self.num_parts = (1, chunks) if alone else (chunks, 1)

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """What `forward` and `backward` are called with, one after another; gradients meet the other ranks' with the
        last."""
        pieces = batch.chunk(self.num_parts)
        for piece in pieces:
            with nullcontext() if piece is pieces[-1] else self._no_sync(self.model):
                yield piece

    def forward(self, batch: Batch) -> Features:
        if self.chunks == 1:
            return self.model(batch.images_BCHW, batch.tokens_BL)
        self._parts = list(zip(batch.images_BCHW.chunk(self.chunks), batch.tokens_BL.chunk(self.chunks)))
        self._states, parts = [], []
        with torch.no_grad():
            for images, tokens in self._parts:
                self._states.append(random_state(images.device))
                parts.append(self.model(images, tokens))
        self._features = Features(
            torch.cat([part.image_BD for part in parts]).requires_grad_(),
            torch.cat([part.text_BD for part in parts]).requires_grad_(),
            parts[0].logit_scale.detach().clone().requires_grad_(),
            None if parts[0].logit_bias is None else parts[0].logit_bias.detach().clone().requires_grad_(),
        )
        return self._features

    def backward(self, loss: Tensor) -> None:
        if self.chunks == 1:
            self._backward(loss / self.num_parts)
            return
        features = self._features
        scalars = [x for x in (features.logit_scale, features.logit_bias) if x is not None]
        image_BD, text_BD, *slopes = torch.autograd.grad(
            loss, [features.image_BD, features.text_BD, *scalars], allow_unused=True, materialize_grads=True
        )
        pieces = zip(self._parts, self._states, image_BD.chunk(self.chunks), text_BD.chunk(self.chunks))
        for number, ((images, tokens), state, image_grad, text_grad) in enumerate(pieces):
            last = number == len(self._parts) - 1
            if last:
                self._piece(images, tokens, state, image_grad, text_grad, slopes)
            else:
                with self._no_sync(self.model):
                    self._piece(images, tokens, state, image_grad, text_grad, [torch.zeros_like(x) for x in slopes])

    def _piece(
        self, images: Tensor, tokens: Tensor, state: list[Tensor], image_grad: Tensor, text_grad: Tensor,
        slopes: list[Tensor],
    ) -> None:  # fmt: skip
        now = random_state(images.device)
        set_random_state(state, images.device)
        part = self.model(images, tokens)
        set_random_state(now, images.device)
        # A scalar whose gradient is the chain rule's next factor.
        product = (part.image_BD * image_grad).sum() + (part.text_BD * text_grad).sum()
        scalars = [x for x in (part.logit_scale, part.logit_bias) if x is not None]
        self._backward(product + sum(x * slope for x, slope in zip(scalars, slopes)))
