"""What a checkpoint of sharded towers (FSDP2) costs each rank: host memory beyond that of training, and time.

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/save_memory.py [--no-background]

The real trainer, two steps and a save after each, of a model of about 400 MB of weights with an average of them (1.6 GB
a checkpoint). The step loop waits for the whole save, so that the peak is the save's alone: what is free is given back
before it, and the process's VmHWM set back. Its second save finds the copies of the first (`checkpoint.async_save`).
Linux with glibc only.
"""

import ctypes
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from save_speed import write_model
from train_step import write_shards

import vlcl.train
from vlcl import distributed
from vlcl.config import load_config

MB = 1e6


def of_this_process(name: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(
    width: Annotated[int, typer.Option(help="Of the image tower, 12 layers: 768 makes 400 MB of weights.")] = 768,
    background: Annotated[bool, typer.Option(help="checkpoint.async_save.")] = True,
) -> None:
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    save, found = vlcl.train.save, []

    def measured(run: Any) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        distributed.barrier()
        before, start = of_this_process("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM
        save(run)
        run.saver.finish()
        found.append((before, of_this_process("VmHWM") - before, time.perf_counter() - start))

    vlcl.train.save = measured
    distributed.start()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(distributed.broadcast(temporary))
        if distributed.rank() == 0:
            (folder / "shards").mkdir()
            write_shards(folder / "shards", 16)
            write_model(folder / "model", width)
        distributed.barrier()
        vlcl.train.train(load_config(None, [
            f"data.train={folder / 'shards'}", f"model.name=local-dir:{folder / 'model'}", "train.ema=0.9",
            f"train.output={folder / 'run'}", "train.steps=2", "train.batch_size=4", "checkpoint.every=1",
            f"checkpoint.async_save={str(background).lower()}", "data.workers=0", "data.augment=none",
            "log.trackers=[]", "train.log_every=1000",
        ]))  # fmt: skip
        step = max((folder / "run").glob("step-*"))
        size = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
        for number, (before, more, seconds) in enumerate(found, 1):
            print(
                f"rank {distributed.rank()}, save {number}: {before / MB:,.0f} MB before, {more / MB:,.0f} MB more at "
                f"its peak ({more / size:.2f} of the checkpoint's {size / MB:,.0f}), {seconds:.1f} s",
                flush=True,
            )
        distributed.barrier()


if __name__ == "__main__":
    typer.run(main)
