"""Bytes that a rank sends a step for its loss: the collectives that are really called, counted, beside open_clip's.

    python benchmarks/loss_bytes.py [--ranks 8] [--batch 32768] [--width 512]

Starts that many gloo processes on this machine, each with a slice of the batch, counts every call of torch.distributed
in forward and backward, and takes the bytes of a ring algorithm: an all-gather or a scatter of n bytes in all sends
n (W-1)/W a rank, an all-reduce 2 n (W-1)/W. open_clip: ClipLoss(local_loss=True,
gather_with_grad=True), the setting that its maintainers recommend. Logits are not computed at full size: with
--counted-batch smaller than --batch the counts, which are exactly proportional to it, are scaled.
"""

import os
import socket
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Annotated, Any

import open_clip
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import typer
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from vlcl import distributed
from vlcl.batch import Features
from vlcl.loss_state import LossState
from vlcl.losses import build_loss

NUM_PAIRS = 1_000_000


class Count(TorchDispatchMode):
    """Adds up the bytes of each c10d operation that passes."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world
        self.sent: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            kind = name.removeprefix("c10d::").rstrip("_").split(".")[0]
            self.sent[kind] += self.bytes_of(kind, args)
        return func(*args, **(kwargs or {}))

    def bytes_of(self, kind: str, args: Any) -> float:
        """args[0]: the output of a gather or scatter, the tensor of an all-reduce."""
        total = sum(x.numel() * x.element_size() for x in tensors_of(args[0]))
        share = (self.world - 1) / self.world
        if "allreduce" in kind:
            return 2 * total * share
        if "scatter" in kind:  # gloo has no reduce-scatter: torch does each rank's part by a scatter, and adds up
            return sum(x.numel() * x.element_size() for x in tensors_of(args[1])) * share
        if "gather" in kind:
            return total * share
        raise SystemExit(f"a collective that this script does not know: {kind}")


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in tensors_of(item)] if isinstance(value, (list, tuple)) else []


def ours(name: str, settings: dict[str, Any], image: torch.Tensor, text: torch.Tensor, row: torch.Tensor) -> None:
    loss = build_loss(name, num_pairs=NUM_PAIRS, **settings)
    state = LossState(loss, NUM_PAIRS, image.shape[1])
    features = Features(image, text, torch.tensor(20.0, requires_grad=True))
    peers = distributed.gather_peers(features, row)
    out = loss(features, peers, state.read(peers.row_G))
    out.loss.backward()
    state.write(peers.row_G, out.aux)


def theirs(image: torch.Tensor, text: torch.Tensor, rank: int, world: int) -> None:
    loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    loss(image, text, torch.tensor(20.0, requires_grad=True)).backward()


def work(rank: int, world: int, port: int, batch: int, width: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the peer's use of an older gather
    dist.init_process_group("gloo", rank=rank, world_size=world)
    g = torch.Generator().manual_seed(rank)
    image, text = (F.normalize(torch.randn(batch // world, width, generator=g), dim=1).requires_grad_() for _ in "ab")
    row = torch.arange(batch // world) + rank * (batch // world)
    runs: dict[str, Callable[[], None]] = {
        "open_clip ClipLoss": lambda: theirs(image, text, rank, world),
        "em, order after": lambda: ours("em", {}, image, text, row),
        "em, order before": lambda: ours("em", {"order": "before"}, image, text, row),
        "infonce": lambda: ours("infonce", {}, image, text, row),
    }
    for name, run in runs.items():
        with Count(world) as count:
            run()
        if rank == 0:
            results[name] = dict(count.sent)
    dist.destroy_process_group()


def main(
    ranks: Annotated[int, typer.Option(help="W.")] = 8,
    batch: Annotated[int, typer.Option(help="G, over all ranks.")] = 32768,
    width: Annotated[int, typer.Option(help="D.")] = 512,
    counted_batch: Annotated[int, typer.Option(help="G that is really run; counts are scaled up to --batch.")] = 4096,
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        spawn(work, args=(ranks, port, counted_batch, width, results), nprocs=ranks)
        counts = {name: {kind: n * batch / counted_batch for kind, n in sent.items()} for name, sent in results.items()}
    peer = sum(counts["open_clip ClipLoss"].values())
    print(
        f"W = {ranks}, G = {batch}, D = {width}, float32; bytes that a rank sends a step (run at G = {counted_batch})"
    )
    for name, sent in counts.items():
        parts = ", ".join(f"{kind} {n / 2**20:.1f}" for kind, n in sent.items())
        print(f"{name:20} {sum(sent.values()) / 2**20:8.1f} MiB  {sum(sent.values()) / peer:.3f} x   ({parts})")


if __name__ == "__main__":
    typer.run(main)
