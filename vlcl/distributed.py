"""The only file that calls torch.distributed, FSDP apart (vlcl/sharding.py). One code path: a world of one is the case
where `gather(x)` is `x`.

Nothing here but `all_mean_to_train` carries a gradient: vlcl's losses need peers' features as constants only (see
vlcl/losses/mstep.py).
Every function is a collective: all ranks must call it, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from vlcl.batch import Features, Keys, Peers
from vlcl.errors import UserError, first_line

Value = TypeVar("Value")


def start() -> torch.device:
    """Join the processes that torchrun or `accelerate launch` started, where there are several; this rank's device."""
    use_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in (
        "1",
        "true",
        "yes",
    )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not initialized():
        # A rank may wait for hours while another fine-tunes.
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(days=2))
    return device


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if initialized() else 1


def rank() -> int:
    return dist.get_rank() if initialized() else 0


def shutdown() -> None:
    if initialized():
        dist.destroy_process_group()


@contextmanager
def lost_ranks_told() -> Iterator[None]:
    """A UserError where a collective within fails as another rank, or the network, is gone. gloo says so in the text of
    a RuntimeError alone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) and "gloo/transport" not in str(error):
            raise
        raise UserError(
            f"another rank, or the network to it, has gone ({first_line(error)[:200]}). What that rank said tells why. "
            "Go on with resume=auto"
        ) from None


def barrier() -> None:
    if initialized():
        dist.barrier()


# torch's newer name for it; the older one warns
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """[B, ...] of each rank -> [G, ...] in rank order; every rank must bring the same shape."""
    x = x.detach()
    if world_size() == 1:
        return x
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    _all_gather(out, x.contiguous())
    return out


@torch.no_grad()
def gather_uneven(x: Tensor) -> Tensor:
    """[n_r, ...] of each rank -> [sum of n_r, ...] in rank order; n_r may differ, and may be 0."""
    x = x.detach()
    if world_size() == 1:
        return x
    counts = gather(torch.tensor([x.shape[0]], device=x.device)).tolist()
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: x.shape[0]] = x
    parts = gather(padded).split(max(counts)) if max(counts) else [padded] * len(counts)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


@torch.no_grad()
def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks; may change `x` in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


@torch.no_grad()
def all_mean(x: Tensor) -> Tensor:
    return all_sum(x.detach().clone()) / world_size()


class _AllMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_mean(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_mean(grad_output)


def all_mean_to_train(x: Tensor) -> Tensor:
    """`all_mean` with a gradient: each rank's loss depends on every rank's x, so that the backward pass is a collective
    as well."""
    return _AllMean.apply(x) if world_size() > 1 else x


def gather_objects(value: Value) -> list[Value]:
    """Each rank's small picklable object, in rank order."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Value) -> Value:
    """Rank 0's small picklable object, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def together(part: Callable[[], Value]) -> list[Value]:
    """What `part()` gives on each rank, in rank order; a UserError of one rank is raised on all of them.

    A rank that went on alone would meet the others in another collective, or never.
    """
    value, problem = None, ""
    try:
        value = part()
    except UserError as error:
        problem = str(error)
    gathered = gather_objects((value, problem))
    if problem := next((text for _, text in gathered if text), ""):
        raise UserError(problem)
    return cast(list[Value], [value for value, _ in gathered])


def on_first(part: Callable[[], None]) -> None:
    """Call `part()` on rank 0, while the others wait for its end; its UserError is raised on all ranks."""
    together(lambda: part() if rank() == 0 else None)


def gather_peers(features: Features, row_B: Tensor, even: bool = True, caption_B: Tensor | None = None) -> Peers:
    """All ranks' features, rows and, where they are given, hashes of captions.

    `even`: every rank brings the same number of pairs, as vlcl's loader does. False allows any numbers, at the price of
    one more collective and a wait for the device.
    """
    join = gather if even else gather_uneven
    num_own = row_B.shape[0]
    start = rank() * num_own if even else sum(gather_objects(num_own)[: rank()])
    caption_G = None if caption_B is None else join(caption_B)
    keys = None if features.keys is None else Keys(join(features.keys.image), join(features.keys.text))
    parts = join(features.image_BD), join(features.text_BD), join(row_B)
    return Peers(*parts, start, world_size(), join, all_mean, caption_G, keys)


def own_rows(num_rows: int) -> range:
    """The rows of a `num_rows` table that this rank owns: equal chunks in rank order, the last ones may be short."""
    chunk = -(-num_rows // world_size())
    start = min(rank() * chunk, num_rows)
    return range(start, min(start + chunk, num_rows))
