"""What a small batch saves: a pair's time and a step's memory, beside the two ways to a large batch's gradient.

    OMP_NUM_THREADS=1 python benchmarks/small_batch.py [--model ViT-Nano-8-64] [--large 256] [--small 16] [--rounds 5]

Three trainings by vlcl's own `train_step`, on batches at hand: InfoNCE at the large batch in one piece; InfoNCE at the
large batch in chunks of the small one (`train.accumulate`: GradCache, the gradients of one piece); `em` at the small
batch. Each in a process of its own; rounds take turns, a ratio is within a round, its median is shown. Time: the
process's CPU seconds a pair. Memory: the process's peak beyond what it had before the first step, which includes the
optimizer's moments; Linux only. What the losses are worth at these sizes is told in docs/evidence.md, not here.
"""

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from save_memory import of_this_process
from train_step import write_shards

from vlcl.batch import Batch
from vlcl.config import load_config
from vlcl.run import build
from vlcl.train import train_step

WAYS = ("infonce, whole", "infonce, in chunks", "em, small batch")


def run(way: str, model: str, large: int, small: int, pairs: int, folder: str) -> tuple[float, float]:
    """(CPU seconds a pair, bytes) of a training over `pairs` pairs, after a step to warm up."""
    batch_size = small if way.startswith("em") else large
    built = build(load_config(None, [
        f"data.train={folder}", f"model.name={model}", f"train.batch_size={batch_size}", "train.steps=1000000",
        f"train.output={folder}/{batch_size}", "train.overwrite=true", "train.precision=fp32", "log.trackers=[]",
        f"loss.name={way.split(',')[0]}", f"train.accumulate={large // small if way.endswith('chunks') else 1}",
        "data.workers=0",
    ]))  # fmt: skip
    built.lock.release()
    height, width = built.state.built.encoder.clip.visual.image_size
    length, words = built.state.built.encoder.clip.context_length, built.state.built.encoder.clip.vocab_size
    rows = torch.arange(batch_size)
    batch = Batch(torch.randn(batch_size, 3, height, width), torch.randint(1, words, (batch_size, length)), rows)
    gc.collect()
    before, steps = of_this_process("VmRSS"), -(-pairs // batch_size)
    train_step(built, batch)
    start = time.process_time()
    for step in range(1, 1 + steps):
        built.state.step = step
        train_step(built, batch)
    seconds = (time.process_time() - start) / (steps * batch_size)
    return seconds, of_this_process("VmHWM") - before


def main(
    model: Annotated[str, typer.Option(help="An open_clip architecture.")] = "ViT-Nano-8-64",
    large: Annotated[int, typer.Option(help="Pairs of the large batch.")] = 256,
    small: Annotated[int, typer.Option(help="Pairs of the small batch, and of a chunk.")] = 16,
    pairs: Annotated[int, typer.Option(help="Pairs that are timed, in each training.")] = 1024,
    rounds: Annotated[int, typer.Option(help="How often the three take turns.")] = 5,
) -> None:
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), large)
        for number in range(rounds):
            for way in WAYS[number % 3 :] + WAYS[: number % 3]:
                arguments = json.dumps([way, model, large, small, pairs, folder])
                told = subprocess.run(
                    [sys.executable, __file__, "--alone", arguments], check=True, capture_output=True, text=True
                )
                found[way].append(json.loads(told.stdout.splitlines()[-1]))
    print(f"{model}, batch {large} and {small}, {rounds} rounds of {pairs:,} pairs; ratios are to `{WAYS[0]}`")
    for way in WAYS:
        seconds, peak = (statistics.median(x) for x in zip(*found[way]))
        times, sizes = ([a[i] / b[i] for a, b in zip(found[way], found[WAYS[0]])] for i in (0, 1))
        print(f"{way:20}  {1e3 * seconds:8.3f} ms a pair  x {statistics.median(times):.2f} ({min(times):.2f} to "
              f"{max(times):.2f})   {peak / 1e6:8.0f} MB  x {statistics.median(sizes):.2f}")  # fmt: skip


if __name__ == "__main__":
    if "--alone" in sys.argv:
        print(json.dumps(run(*json.loads(sys.argv[-1]))))
    else:
        typer.run(main)
