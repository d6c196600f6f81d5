"""What a loss costs on features, forward and backward, beside open_clip's, in time and in memory beyond its inputs.

    python benchmarks/loss_cost.py                     B = 4096, D = 512, float32: time and memory, ratios to ClipLoss
    python benchmarks/loss_cost.py --only-memory --batch 32768      extra memory as a share of one B x B matrix

Times: all losses in turn in one process, median of --repeats rounds, ratios within a round. Memory: a fresh process a
loss, the peak resident memory of one forward and backward (on a GPU: of the allocator) less what was there before; the
gradients of the features (two B x D) are in it, for the peer as well. On a GPU, everything runs there; --dtype bfloat16
gives features of that type (vlcl's losses make them float32, open_clip's do not).
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import open_clip
import torch
import torch.nn.functional as F
import typer

from vlcl.batch import Aux, Features, Peers
from vlcl.losses import build_loss

NUM_PAIRS = 1_000_000
LOSSES = {
    "open_clip ClipLoss": None,
    "em, order before": ("em", {"order": "before"}),
    "em, order after": ("em", {"order": "after"}),
    "infonce": ("infonce", {}),
    "dcl": ("dcl", {}),
    "fastclip-v3": ("fastclip-v3", {}),
    "open_clip SigLipLoss": None,
    "siglip": ("siglip", {}),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_step(name: str, batch: int, width: int, dtype: str = "float32") -> Callable[[], None]:
    """One forward and backward of a loss on the same features."""
    g = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    image, text = (F.normalize(torch.randn(batch, width, generator=g), dim=1).to(DEVICE, kind) for _ in range(2))
    image.requires_grad_()
    text.requires_grad_()
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    bias = torch.tensor(-10.0, device=DEVICE, requires_grad=True)
    row = torch.arange(batch, device=DEVICE)
    settings = LOSSES[name]
    if settings is None:
        peer = open_clip.ClipLoss() if "Clip" in name and "Sig" not in name else open_clip.loss.SigLipLoss()
        arguments = (image, text, scale) if "Sig" not in name else (image, text, scale, bias)

        def value() -> torch.Tensor:
            return peer(*arguments)
    else:
        loss = build_loss(settings[0], num_pairs=NUM_PAIRS, total_steps=10, **settings[1])
        rows = {column: torch.zeros(batch, 2, device=DEVICE) - 5 for column in loss.columns}
        shared = {key: x.to(DEVICE) for key, x in loss.initial(width).items()}
        if "level" in shared:  # as after a step: nothing is predicted before
            shared["level"] = torch.ones_like(shared["level"])
        aux = Aux(rows, torch.ones_like(row), shared)
        peers = Peers(image.detach(), text.detach(), row)

        def value() -> torch.Tensor:
            return loss(Features(image, text, scale, bias), peers, aux, 5).loss

    def step() -> None:
        image.grad = text.grad = scale.grad = bias.grad = None
        value().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()  # Linux only
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _extra_memory(name: str, batch: int, width: int, dtype: str, queue: "multiprocessing.Queue[int]") -> None:
    torch.set_num_threads(2)
    make_step(name, 64, width, dtype)()  # libraries' own buffers are there from here on
    step = make_step(name, batch, width, dtype)
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        queue.put(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    step()
    queue.put(_status("VmHWM") - before)


def extra_memory(name: str, batch: int, width: int, dtype: str) -> int:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[int] = context.Queue()
    process = context.Process(target=_extra_memory, args=(name, batch, width, dtype, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} at B = {batch} failed (exit {process.exitcode}): not enough memory?")
    return queue.get()


def seconds_of(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main(
    batch: Annotated[int, typer.Option(help="B.")] = 4096,
    width: Annotated[int, typer.Option(help="D.")] = 512,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 7,
    dtype: Annotated[str, typer.Option(help="Of the features: float32 or bfloat16.")] = "float32",
    only_memory: Annotated[
        bool, typer.Option("--only-memory", help="No times; peers that hold B x B left out.")
    ] = False,
) -> None:
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    matrix = batch * batch * 4
    print(f"{device}; B = {batch}, D = {width}, {dtype}; one float32 B x B matrix: {matrix / 2**20:,.0f} MiB")
    names = [name for name in LOSSES if not (only_memory and LOSSES[name] is None)]
    memory = {name: extra_memory(name, batch, width, dtype) for name in names}
    if only_memory:
        for name in names:
            print(f"{name:22} extra memory {memory[name] / 2**20:8.1f} MiB = {memory[name] / matrix:.4f} of the matrix")
        return
    steps = {name: make_step(name, batch, width, dtype) for name in names}
    rounds = [{name: seconds_of(step) for name, step in steps.items()} for _ in range(repeats + 1)][1:]
    peer = "open_clip ClipLoss"
    for name in names:
        middle = 1e3 * statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r[name] / r[peer] for r in rounds)
        share = memory[name] / memory[peer]
        print(f"{name:22} {middle:8.1f} ms {ratio:6.2f} x    {memory[name] / 2**20:8.1f} MiB {share:6.2f} x")


if __name__ == "__main__":
    typer.run(main)
