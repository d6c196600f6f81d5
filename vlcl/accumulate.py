"""The towers' forward and backward in one piece, or in chunks that give the gradients of one piece.

A contrastive loss needs all pairs of the batch at once, the towers do not. So with k chunks (Gao et al., GradCache,
2021): features of all chunks without gradient; the loss on them, its gradient to the features; then each chunk again,
with gradient, backward from its part of the features' gradient. The generators are put back before the second pass:
patch dropout and dropout see the same masks. logit_scale gets its gradient once, from the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

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
    """

    def __init__(
        self,
        model: nn.Module,
        chunks: int,
        backward_fn: Callable[[Tensor], None],
        no_sync: Callable[[nn.Module], AbstractContextManager[object]],
    ) -> None:
        self.model, self.chunks, self._backward, self._no_sync = model, chunks, backward_fn, no_sync

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
        )
        return self._features

    def backward(self, loss: Tensor) -> None:
        if self.chunks == 1:
            self._backward(loss)
            return
        features = self._features
        leaves = (features.image_BD, features.text_BD, features.logit_scale)
        image_BD, text_BD, scale = torch.autograd.grad(loss, leaves)
        pieces = zip(self._parts, self._states, image_BD.chunk(self.chunks), text_BD.chunk(self.chunks))
        for number, ((images, tokens), state, image_grad, text_grad) in enumerate(pieces):
            last = number == len(self._parts) - 1
            if last:
                self._piece(images, tokens, state, image_grad, text_grad, scale)
            else:
                with self._no_sync(self.model):
                    self._piece(images, tokens, state, image_grad, text_grad, torch.zeros_like(scale))

    def _piece(
        self, images: Tensor, tokens: Tensor, state: list[Tensor], image_grad: Tensor, text_grad: Tensor, scale: Tensor
    ) -> None:
        now = random_state(images.device)
        set_random_state(state, images.device)
        part = self.model(images, tokens)
        set_random_state(now, images.device)
        # A scalar whose gradient is the chain rule's next factor.
        self._backward((part.image_BD * image_grad).sum() + (part.text_BD * text_grad).sum() + part.logit_scale * scale)
