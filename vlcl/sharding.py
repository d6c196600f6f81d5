"""Towers in pieces: each rank keeps its share of the weights, their gradients, moments and average (torch's FSDP2; HSDP
on a mesh of two dimensions). A block's weights are gathered for its forward and its backward pass, and let go again.

Elsewhere a sharded tensor is a tensor, but where it is saved (`local`, `own_rows`) and loaded (`piece_of`), both of
which are no collectives, and in evaluations (`gathered`), whose ranks do not call the towers equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from vlcl import distributed
from vlcl.errors import UserError
from vlcl.parameter_groups import CONTAINERS
from vlcl.pieces import Stored


@dataclass(frozen=True)
class Sharding:
    """How towers are sharded, as the launcher asks for it.

    mesh: torch's DeviceMesh of [shards], or of [copies, shards]. reshard: whether a block's weights are let go between
    its forward and its backward pass. classes: of the modules that are gathered one by one; empty: the towers' blocks.
    dtype: what weights are gathered and multiplied in; None: as they are kept. autocast: for the forward pass, which
    accelerate gives to models that it wraps itself.
    """

    mesh: Any
    reshard: bool = True
    classes: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    autocast: Callable[[], AbstractContextManager[object]] = lambda: torch.autocast("cpu", enabled=False)


def mesh_of_all(device: torch.device) -> Any:
    """One piece a rank."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (distributed.world_size(),))


def is_sharded(encoder: nn.Module) -> bool:
    return hasattr(encoder, "sharding")


def shard(encoder: nn.Module, how: Sharding, device: torch.device) -> None:
    """Cut the weights, the same on every rank, into pieces (in place), and move them to `device`, block by block: it
    never holds them all.

    FSDP leaves scalars alone, logit_scale and logit_bias: their gradients are averaged as they come, in a sum of chunks
    as well, since the mean of what was averaged before is itself. Raises UserError where a class has no module.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    scalars = {p for p in encoder.parameters() if p.ndim == 0}
    # Gradients are summed in float32, as DDP's are; a block's input stays in the dtype that autocast gave it.
    precision = MixedPrecisionPolicy(how.dtype, torch.float32, cast_forward_inputs=False)
    settings: dict[str, Any] = {"mesh": how.mesh, "mp_policy": precision, "ignored_params": scalars}
    for block in blocks(encoder, how.classes):
        fully_shard(block, reshard_after_forward=how.reshard, **settings)
    encoder.forward = _within(how.autocast, encoder.forward)
    fully_shard(encoder, **settings)
    encoder.to(device)  # what is not sharded
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(_averaged_over_ranks)
    encoder.sharding = how  # pyright: ignore[reportArgumentType] (it is no part of the model)


def in_words(encoder: nn.Module) -> list[str]:
    """What a run says of it, a line each."""
    how: Sharding | None = getattr(encoder, "sharding", None)
    if how is None:
        return []
    *copies, pieces = how.mesh.shape
    many = f", {copies[0]} ranks have the same one" if copies else ""
    lines = [f"FSDP2: weights, gradients and moments in {pieces} pieces, one a rank{many}"]
    if not blocks(encoder, how.classes):
        lines.append(
            "note: vlcl does not know the blocks of this model: its weights are gathered all at once. Name their class "
            "in fsdp_transformer_layer_cls_to_wrap"
        )
    return lines


def blocks(encoder: nn.Module, classes: Sequence[str] = ()) -> list[nn.Module]:
    """The modules that are gathered one by one, inner ones first: those of `classes`, or the blocks that towers keep in
    order. UserError where there is none of a class."""
    modules = list(encoder.named_modules())
    for name in classes:
        if not any(type(module).__name__ == name for _, module in modules):
            known = sorted({type(module).__name__ for module in blocks(encoder)})
            raise UserError(
                f"the launcher's fsdp_transformer_layer_cls_to_wrap names {name}, of which this model has none; leave "
                f"it out (its blocks are of {', '.join(known) or 'no class that vlcl knows'})"
            )
    if classes:
        return [module for _, module in modules[::-1] if type(module).__name__ in classes]
    return [module for name, module in modules[::-1] if _is_block(name)]


def _is_block(name: str) -> bool:
    container, _, number = name.rpartition(".")
    return number.isdigit() and container.rpartition(".")[2] in CONTAINERS


def _within(context: Callable[[], AbstractContextManager[object]], forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def call(*args: Any) -> Any:
        with context():
            return forward(*args)

    return call


def _averaged_over_ranks(scalar: Tensor) -> None:
    assert scalar.grad is not None  # it has just been added to
    scalar.grad.copy_(distributed.all_mean(scalar.grad))


def whole(x: Tensor) -> Tensor:
    """All of `x` on every rank (a collective where `x` is in pieces)."""
    return x.full_tensor() if in_pieces(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def local(x: Tensor) -> Tensor:
    """This rank's piece, which shares its memory."""
    return x.to_local() if in_pieces(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def in_pieces(x: Tensor) -> bool:
    return hasattr(x, "full_tensor")  # a DTensor, whose module is not imported for runs that have none


def own_rows(x: Tensor) -> range:
    """Which rows of `x`, which is in pieces, this rank keeps: as torch.chunk deals them; the last may have none."""
    cut: Any = x
    assert cut.placements[-1].is_shard(0), cut.placements  # as FSDP2 cuts, where it is not told otherwise
    chunk = -(-x.shape[0] // cut.device_mesh.shape[-1])
    start = min(cut.device_mesh.get_coordinate()[-1] * chunk, x.shape[0])
    rows = range(start, min(start + chunk, x.shape[0]))
    assert len(rows) == local(x).shape[0]
    return rows


def piece_to_write(encoder: nn.Module) -> tuple[int, int] | None:
    """The number of this rank's pieces, and of how many; None where another rank has the same (HSDP) and writes it."""
    how = encoder.sharding
    assert isinstance(how, Sharding)
    *copy, piece = how.mesh.get_coordinate()
    return None if any(copy) else (piece, how.mesh.shape[-1])


def piece_of(full: Tensor | Stored, like: Tensor | None) -> Tensor:
    """`full`, of which every rank has all, or files have, in pieces as `like` is; no collective. It may be a view.
    ValueError where `like` has another shape."""
    if like is None or not in_pieces(like):
        return full if isinstance(full, Tensor) else full.whole()
    from torch.distributed.tensor import DTensor

    cut: Any = like
    if full.shape != like.shape:
        raise ValueError(f"a tensor of {list(full.shape)} where the model has one of {list(like.shape)}")
    rows = own_rows(like)
    own = full[rows.start : rows.stop].to(cut.device_mesh.device_type)
    return DTensor.from_local(own, cut.device_mesh, cut.placements, shape=like.shape, stride=like.stride())


@contextmanager
def gathered(encoder: nn.Module) -> Iterator[None]:
    """Within, each rank has all weights, in the dtype that they are multiplied in (a collective): no forward pass, of
    any part of the model, is one then. Not for training."""
    how: Sharding | None = getattr(encoder, "sharding", None)
    parts: list[Any] = [module for module in encoder.modules() if hasattr(module, "unshard")] if how else []
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            if how is not None and part is not encoder:  # the outermost one is wanted again at once
                part.set_reshard_after_forward(how.reshard, recurse=False)
