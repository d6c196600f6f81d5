"""A loss on features on a GPU, forward and backward: vlcl in torch and in Triton kernels beside open_clip's ClipLoss.

    python benchmarks/loss_gpu.py --batches 4096,16384,65536 --kind bf16

--kind: fp32 (products in full), tf32, or bf16 features. Medians of rounds in which all take turns, by the device's own
clock; "extra" is the peak memory beyond the inputs (the gradients of the features are in it). The share is of the rate
that this card reaches in a matrix product of 8,192 of that kind, for the fewest products that the loss can do with:
three of 2 B^2 D operations (similarities, two gradients), and one more where weights need all sums first.
"""

import statistics
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from loss_cost import LOSSES, make_step

CONTENDERS = {
    "open_clip ClipLoss": (None, None, 3),
    "em, torch": ("em", {"order": "after", "kernels": "torch"}, 4),
    "em, triton": ("em", {"order": "after", "kernels": "triton"}, 4),
    "em before, torch": ("em", {"order": "before", "kernels": "torch"}, 3),
    "em before, triton": ("em", {"order": "before", "kernels": "triton"}, 3),
    "infonce, torch": ("infonce", {"kernels": "torch"}, 4),
    "infonce, triton": ("infonce", {"kernels": "triton"}, 4),
}


def milliseconds(step: Callable[[], Any]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def peak_rate(kind: str) -> float:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    times = [milliseconds(lambda: x @ y) for _ in range(12)][2:]
    return 2 * 8192**3 / statistics.median(times) * 1e3


def extra_memory(step: Callable[[], None]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def fitting(batch: int, width: int, kind: str) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """The steps that the card has the memory for, by name, and their memory."""
    steps, memory = {}, {}
    dtype = "bfloat16" if kind == "bf16" else "float32"
    for name, (loss, settings, _) in CONTENDERS.items():
        LOSSES[name] = None if loss is None or settings is None else (loss, settings)
        step = make_step(name, batch, width, dtype)
        try:
            step()
            memory[name] = extra_memory(step)
            steps[name] = step
        except torch.OutOfMemoryError:
            print(f"{batch:7} {name:20} does not fit")
        torch.cuda.empty_cache()
    return steps, memory


def main(
    batches: Annotated[str, typer.Option(help="B, several joined by commas.")] = "4096,16384",
    width: Annotated[int, typer.Option(help="D.")] = 512,
    kind: Annotated[str, typer.Option(help="fp32, tf32 or bf16.")] = "bf16",
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 5,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU; on a CPU: python benchmarks/loss_cost.py")
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    limit = peak_rate(kind)
    print(f"{torch.cuda.get_device_name()}, {kind}, D = {width}; matrix product {limit / 1e12:.0f} TFLOP/s")
    for batch in map(int, batches.split(",")):
        steps, memory = fitting(batch, width, kind)
        rounds = [{name: milliseconds(step) for name, step in steps.items()} for _ in range(repeats + 1)][1:]
        peer = next(iter(steps))
        for name in steps:
            time = statistics.median(r[name] for r in rounds)
            ratio = statistics.median(r[name] / r[peer] for r in rounds)
            share = CONTENDERS[name][2] * 2 * batch**2 * width / (time / 1e3) / limit
            extra = memory[name] / 2**20
            of_peer = memory[name] / memory[peer]
            print(
                f"{batch:7} {name:20} {time:9.2f} ms {ratio:6.2f} x  {extra:9.1f} MiB {of_peer:6.3f} x"
                f"  {share:6.1%} of the limit"
            )


if __name__ == "__main__":
    typer.run(main)
