"""The training step on batches that lie on the device: vlcl's own `train_step` beside open_clip's, the same towers.

    python benchmarks/train_step.py --model ViT-B-32 --batch 1024
    python benchmarks/train_step.py --model ViT-Nano-8-64 --batch 64 --precision fp32      on a CPU

open_clip's step is that of its trainer: autocast, ClipLoss, clipping, AdamW, the clamp of logit_scale. Rounds of both
take turns; a ratio is within a round, its median is shown. On a CPU seconds are the process's CPU seconds: set
OMP_NUM_THREADS=1 where others use the machine. On a GPU also: share of the rate that this card reaches in a
bfloat16 matrix product of 8,192 (the floating-point operations being those of the towers and open_clip's logits, as
torch counts them), and the memory that a step takes beyond weights and optimizer.
"""

import io
import math
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import typer
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from vlcl.batch import Batch
from vlcl.config import Config, load_config
from vlcl.model import build_model
from vlcl.run import build
from vlcl.train import train_step
from vlcl_data_prep.index import index_shards

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write_shards(folder: Path, pairs: int) -> None:
    """Pairs that nobody looks at: a run wants to know how many there are."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for index in range(pairs):
            for suffix, content in (("png", picture.getvalue()), ("txt", b"a square")):
                member = tarfile.TarInfo(f"{index:08d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index_shards(str(folder), progress=False)


def vlcl_step(config: Config, batch: Batch) -> Callable[[], Any]:
    run = build(config)
    run.lock.release()

    def step() -> None:
        train_step(run, batch)
        run.state.step += 1

    return step


def open_clip_step(model_name: str, batch: Batch, precision: str, operations: list[int]) -> Callable[[], Any]:
    """`operations` gets the floating-point operations of the first step."""
    model: Any = open_clip.create_model(model_name).to(DEVICE).train()
    loss = open_clip.ClipLoss()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)

    def step() -> None:
        counter: Any = nullcontext() if operations else FlopCounterMode(display=False)
        with counter:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
                image, text, scale = model(batch.images_BCHW, batch.tokens_BL)
                value = loss(image, text, scale)
            value.backward()
        if not operations:
            operations.append(counter.get_total_flops())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


def seconds_of(step: Callable[[], Any], times: int) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    start = clock()
    for _ in range(times):
        step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / times


def peak_rate() -> float:
    """Floating-point operations a second of a large bfloat16 product."""
    x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds_of(lambda: x @ y, 5)
    return 2 * 8192**3 / statistics.median(seconds_of(lambda: x @ y, 5) for _ in range(5))


def main(
    model: Annotated[str, typer.Option(help="An architecture of open_clip or vlcl.")] = "ViT-B-32",
    batch: Annotated[int, typer.Option(help="B.")] = 1024,
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    rounds: Annotated[int, typer.Option(help="Rounds, after one to warm up.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps of each a round.")] = 5,
    compiled: Annotated[bool, typer.Option("--compiled", help="vlcl with train.compile=true as well.")] = False,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), batch)
        settings = [
            f"data.train={folder}", f"model.name={model}", f"train.batch_size={batch}", f"train.precision={precision}",
            f"train.output={folder}/run", "train.steps=1000", "data.workers=0", "log.trackers=[]",
            "train.overwrite=true",
        ]  # fmt: skip
        built = build_model(model)
        images = torch.randn(batch, 3, *built.encoder.clip.visual.image_size)
        data = Batch(images, built.tokenize(["a square"] * batch), torch.arange(batch)).to(DEVICE)
        operations: list[int] = []
        contenders = {
            "open_clip": open_clip_step(model, data, precision, operations),
            "vlcl": vlcl_step(load_config(None, settings), data),
        }
        if compiled:
            contenders["vlcl, compiled"] = vlcl_step(load_config(None, [*settings, "train.compile=true"]), data)
        memory = {}
        for name, step in contenders.items():
            step()
            if DEVICE == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                step()
                memory[name] = torch.cuda.max_memory_allocated() - before
        times = [{name: seconds_of(step, steps) for name, step in contenders.items()} for _ in range(rounds + 1)][1:]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    print(f"{model}, B = {batch}, {precision}, {device}; medians of {rounds} rounds of {steps} steps")
    limit = peak_rate() if DEVICE == "cuda" else math.nan
    for name in contenders:
        seconds = statistics.median(r[name] for r in times)
        ratio = statistics.median(r["open_clip"] / r[name] for r in times)
        line = f"{name:16} {1e3 * seconds:9.1f} ms {batch / seconds:9.0f} samples/s {ratio:6.3f} x"
        if DEVICE == "cuda":
            share = operations[0] / seconds / limit
            line += f"  {share:5.1%} of {limit / 1e12:.0f} TFLOP/s, step's memory {memory[name] / 2**30:.2f} GiB"
        print(line)


if __name__ == "__main__":
    typer.run(main)
