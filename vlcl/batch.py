"""The records that cross module borders, with their shapes.

Shape letters, here and wherever maths happens: B pairs of this rank, G pairs of all ranks together (rank r owns
B*r .. B*(r+1)), D embedding width, K columns a pair (in a loss the two directions: 0 image to text, 1 text to image),
L tokens, C, H, W image channels, height, width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

OF_PAIRS = ("images_BCHW", "tokens_BL", "row_B", "caption_B")  # of a Batch of training: an entry a pair


@dataclass(frozen=True)
class Batch:
    """What a rank trains on in one step, or evaluates.

    `images_BCHW`: normalized, or uint8 pixels, which the model normalizes (`DualEncoder.normalized`).
    `row_B` names each pair for good: offset of its shard in the manifest + position in the shard. In evaluation a
    picture may have several captions, `count_B` each, one after another in `tokens_BL`, which is then longer; None: one
    each. `epoch` and `consumed` (of each stream that it is from, the samples used in this epoch) are the loader's own
    cursor (see vlcl/data/stream.py); `skipped` counts, by reason, the bad samples that this batch has others in place
    of, `repeated` the samples that this epoch may have used already, `truncated` the captions that were cut to the
    context length. `caption_B`: 64-bit hashes of the captions' tokens, where `loss.same_caption=ignore` asks for them.
    """

    images_BCHW: Tensor
    tokens_BL: Tensor
    row_B: Tensor
    epoch: int = 0
    consumed: dict[int, int] = field(default_factory=dict)
    repeated: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    count_B: Tensor | None = None
    truncated: int = 0
    caption_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row_B)

    def chunk(self, number: int) -> list[Batch]:
        """`number` batches of as nearly equal size as can be; the cursor stays that of the whole."""
        names = [name for name in OF_PAIRS if getattr(self, name) is not None]
        pieces = zip(*(getattr(self, name).chunk(number) for name in names))
        return [replace(self, **dict(zip(names, piece))) for piece in pieces]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: getattr(self, name) for name in OF_PAIRS}
        return replace(self, **{name: fn(x) for name, x in tensors.items() if x is not None})

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:  # DataLoader's pinning thread calls this by name
        return self._map(lambda x: x.pin_memory())


@dataclass(frozen=True)
class Features:
    """Unit-length embeddings in float32 (or float64), and the scale kappa = exp(logit_scale), a scalar tensor.

    `logit_bias`: the scalar that SigLIP adds to its logits; None where the model has none. `keys`: what the other side
    is compared with, where that is not its embedding: the momentum encoder's for two views of a picture, which stand
    for image and text. No gradient.
    """

    image_BD: Tensor
    text_BD: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    keys: Keys | None = None


@dataclass(frozen=True)
class Keys:
    """Unit-length embeddings of the momentum encoder, of both sides: [B, D], or [G, D] of all ranks. No gradient."""

    image: Tensor
    text: Tensor

    def other(self, direction: int) -> Tensor:
        """What anchors of a direction are compared with."""
        return self.text if direction == 0 else self.image


def alone(x: Tensor) -> Tensor:
    """What a collective does in a world of one."""
    return x


@dataclass(frozen=True)
class Peers:
    """Embeddings of all ranks' pairs, without gradient, in rank order; ours are `start` .. `start + B`.

    `world`: number of ranks. `gather` joins the ranks' [B, ...] tensors into [G, ...] in the same order, `mean`
    averages a tensor over the ranks; both without gradient, both the identity in a world of one. A loss needs them for
    the few floats a pair that depend on all of a rank's logits. `caption_G`: as `Batch.caption_B`. `keys`: of all
    ranks, where features have some.
    """

    image_GD: Tensor
    text_GD: Tensor
    row_G: Tensor
    start: int = 0
    world: int = 1
    gather: Callable[[Tensor], Tensor] = alone
    mean: Callable[[Tensor], Tensor] = alone
    caption_G: Tensor | None = None
    keys: Keys | None = None

    @property
    def candidates(self) -> Keys:
        """What anchors are compared with: keys, or the other side's embeddings."""
        return self.keys or Keys(self.image_GD, self.text_GD)


@dataclass(frozen=True)
class Aux:
    """What a loss remembers, by name, as it is read before a step and returned after it.

    `rows`: [G, 2] a name, a value for each pair of the global batch and direction (0: image to text, 1: text to image),
    NaN where a row was never written. `visits_G`: how often each row was written. `shared`: tensors that belong to no
    row and are the same on all ranks.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    visits_G: Tensor | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
