"""The towers as the gradient-bias diagnostic needs them: embeddings with what goes into the projection heads, and the
embeddings of a few pairs with their graph back to chosen weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlcl.batch import Batch, Features, Keys
from vlcl.errors import UserError
from vlcl.gradient_bias.batches import Heads, Weights, taken
from vlcl.model import DualEncoder

TOWERS = ("image", "text")


@dataclass(frozen=True)
class Embedded:
    """Unit embeddings of N pairs in row order; for each tower (0 image, 1 text) that ends in a linear head, what went
    into it and the length of what came out. `skipped`: bad samples by reason; `notes`: what a user should know."""

    image_ND: Tensor
    text_ND: Tensor
    row_N: Tensor
    inputs: dict[int, Tensor]
    lengths: dict[int, Tensor]
    scale: float
    skipped: dict[str, int]
    notes: list[str]
    keys: Keys | None = None

    def take(self, index: Tensor) -> Embedded:
        inputs, lengths = ({k: x[index] for k, x in parts.items()} for parts in (self.inputs, self.lengths))
        return replace(
            self, image_ND=self.image_ND[index], text_ND=self.text_ND[index], row_N=self.row_N[index], inputs=inputs,
            lengths=lengths, keys=taken(self.keys, index),
        )  # fmt: skip

    @property
    def heads(self) -> Heads | None:
        return Heads(self.inputs, self.lengths) if self.inputs else None


@dataclass(frozen=True)
class Head:
    """A tower's last linear map: attribute `name` of `owner`."""

    owner: nn.Module
    name: str

    def __call__(self, x_BW: Tensor) -> Tensor:
        head = getattr(self.owner, self.name)
        return head(x_BW) if isinstance(head, nn.Linear) else x_BW @ head

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within it, the tower gives what would go into its head (open_clip's towers allow for none)."""
        head = getattr(self.owner, self.name)
        setattr(self.owner, self.name, None)
        try:
            yield
        finally:
            setattr(self.owner, self.name, head)


def find_heads(clip: nn.Module) -> dict[int, Head]:
    """The heads of open_clip's own towers, `visual.proj` and `text_projection`; other towers have none here."""
    places = [(0, getattr(clip, "visual", None), "proj"), (1, clip, "text_projection"),
              (1, getattr(clip, "text", None), "text_projection")]  # fmt: skip
    return {
        tower: Head(owner, name)
        for tower, owner, name in places
        if isinstance(getattr(owner, name, None), nn.Parameter | nn.Linear)
    }


@torch.no_grad()
def embed(encoder: DualEncoder, batches: Iterable[Batch], device: torch.device) -> Embedded:
    """All pairs of `batches`, without gradient, in float32. `encoder` in eval mode, on `device`."""
    heads = find_heads(encoder.clip)
    outputs: tuple[list[Tensor], list[Tensor]] = [], []
    inputs: dict[int, list[Tensor]] = {tower: [] for tower in heads}
    rows, skipped = [], Counter[str]()
    for batch in batches:
        skipped.update(batch.skipped)
        if not len(batch):
            continue
        rows.append(batch.row_B)
        for tower, x in enumerate((batch.images_BCHW, batch.tokens_BL)):
            x = x.to(device)
            if tower in heads and not inputs[tower] and not _reproduces(encoder, tower, heads[tower], x):
                del heads[tower], inputs[tower]
            if tower not in heads:
                outputs[tower].append(_encode(encoder, tower, x))
                continue
            with heads[tower].left_out():
                inputs[tower].append(_encode(encoder, tower, x))
            outputs[tower].append(heads[tower](inputs[tower][-1]))
    if not rows:
        raise UserError(f"none of the pairs can be read: {dict(skipped)}; see `vlcl data verify SHARDS`")
    row_N, order_N = torch.cat(rows).sort()
    order_N = order_N.to(device)
    embedded = [torch.cat(parts)[order_N] for parts in outputs]
    lengths = {tower: embedded[tower].norm(dim=1) for tower in heads}
    image_ND, text_ND = (F.normalize(x_ND, dim=1) for x_ND in embedded)
    notes = [f"the {TOWERS[k]} tower does not end in a linear head: none is measured" for k in (0, 1) if k not in heads]
    scale = float(encoder.clip.logit_scale.exp())
    joined = {tower: torch.cat(parts)[order_N] for tower, parts in inputs.items()}
    return Embedded(image_ND, text_ND, row_N.to(device), joined, lengths, scale, dict(skipped), notes)


@torch.no_grad()
def embed_views(encoder: DualEncoder, batches: Iterable[Batch], device: torch.device) -> Embedded:
    """`embed` of two views a picture: queries, and the momentum encoder's keys that they are compared with."""
    parts, rows, skipped = [], [], Counter[str]()
    for batch in batches:
        skipped.update(batch.skipped)
        if len(batch):
            found: Features = encoder(batch.images_BCHW.to(device), batch.tokens_BL.to(device))
            assert found.keys is not None
            parts.append((found.image_BD, found.text_BD, found.keys.image, found.keys.text))
            rows.append(batch.row_B)
    if not rows:
        raise UserError(f"none of the pictures can be read: {dict(skipped)}; see `vlcl data verify SHARDS`")
    row_N, order_N = torch.cat(rows).sort()
    one, two, key_one, key_two = (torch.cat(x)[order_N.to(device)] for x in zip(*parts))
    notes = ["pictures alone: queries of two views (of epoch 0) against the momentum encoder's keys of the other view, "
             "which have no gradient; BatchNorm as in evaluation; heads and theory are left out"]  # fmt: skip
    scale = float(encoder.clip.logit_scale.exp())
    keys = Keys(key_one, key_two)
    return Embedded(one, two, row_N.to(device), {}, {}, scale, dict(skipped), notes, keys)


def _encode(encoder: DualEncoder, tower: int, x: Tensor) -> Tensor:
    """A tower's output before it is made unit, in float32 at least."""
    out = (encoder.clip.encode_image if tower == 0 else encoder.clip.encode_text)(x)
    return out.to(torch.promote_types(out.dtype, torch.float32))


def _reproduces(encoder: DualEncoder, tower: int, head: Head, x: Tensor) -> bool:
    """Whether the tower without its head, then the head, is the tower."""
    whole = _encode(encoder, tower, x)
    with head.left_out():
        part = _encode(encoder, tower, x)
    width = getattr(head.owner, head.name)
    width = width.in_features if isinstance(width, nn.Linear) else width.shape[0]
    return part.ndim == 2 and part.shape[1] == width and torch.allclose(head(part), whole, rtol=1e-3, atol=1e-3)


def encoder_weights(
    encoder: DualEncoder, images_SCHW: Tensor, tokens_SL: Tensor, pattern: str
) -> tuple[Weights, Tensor, Tensor]:
    """A target for the weights whose names match `pattern` (`visual.transformer.resblocks.0.*`), and the unit
    embeddings of the S pairs that it is for. The graph of the S pairs stays in memory. UserError where none match."""
    encoder.requires_grad_(False)
    chosen = {name: x for name, x in encoder.clip.named_parameters() if fnmatchcase(name, pattern) and x.ndim}
    for x in chosen.values():
        x.requires_grad_(True)
    with torch.enable_grad():
        image_SD, text_SD = encoder.image(images_SCHW), encoder.text(tokens_SL)
        ends = [x for x in (image_SD, text_SD) if x.requires_grad]
        reached = torch.autograd.grad(
            [x.sum() for x in ends], list(chosen.values()), retain_graph=True, allow_unused=True
        ) if ends else []  # fmt: skip
    names = [name for (name, _), gradient in zip(chosen.items(), reached) if gradient is not None]
    if not names:
        some = [name for name, x in encoder.clip.named_parameters() if x.ndim][:6]
        raise UserError(f"--weights={pattern!r} matches no weight of the towers; there are {', '.join(some)}, ...")
    target = Weights(image_SD, text_SD, [chosen[name] for name in names], f"weights {pattern}")
    return target, image_SD.detach(), text_SD.detach()
