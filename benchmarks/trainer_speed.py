"""The whole trainer beside open_clip_train (of the same open_clip, which brings it along), from the command on.

    pip install --target peer --no-deps webdataset==0.2.86      the one it pins: of later ones it reads no tar
    python benchmarks/trainer_speed.py --peer peer --model ViT-Nano-8-64 --batch 64 --steps 20 [--rounds 3]
    python benchmarks/trainer_speed.py --peer peer --model ViT-S-16 --batch 16 --steps 6

Both train on the same shards (those of loader_speed.py), in a process each, one thread, pictures read in that process
(no workers), fp32, the gradient clipped to 1. A hook that torch calls after every optimizer step reads the clock:

- start: CPU seconds from the process's first line to the end of the imports, and to the end of the first step,
- samples a CPU second from the end of the second step to that of the last, loader, loss and log lines included,
- rest: from the last step on (vlcl: checkpoint, report; open_clip_train: checkpoint).

Rounds take turns; a ratio is within a round, its median is shown. With --together the sides of a round run at the same
time, on a core each, and change cores with each round: where others use the machine, that is what both meet alike.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

NAMES = ("imports", "first step", "samples/CPU s", "rest")


def run(side: str, model: str, batch: int, steps: int, folder: str, fast: bool, peer: str) -> list[float]:
    """In a process of its own: train, and tell the CPU seconds at each point."""
    times: list[float] = []
    if side == "vlcl":
        from vlcl.cli import app
        from vlcl.environment import uncollected

        config = Path(folder, "config.yaml")
        config.write_text("{}\n")
        settings = [
            f"data.train={folder}/shards", f"model.name={model}", f"train.batch_size={batch}", f"train.steps={steps}",
            f"train.output={folder}/vlcl", "train.overwrite=true", "train.precision=fp32", "data.workers=0",
            "optim.clip_norm=1.0", f"data.decode={'fast' if fast else 'exact'}",
        ]  # fmt: skip
        with uncollected():  # as the command does it
            import_module("vlcl.train")
        begin = lambda: app(["train", str(config), *settings], standalone_mode=False)  # noqa: E731
    else:
        sys.path.insert(0, peer)
        import open_clip
        from open_clip_train.main import main as theirs

        import vlcl

        open_clip.add_model_config(Path(vlcl.__file__).parent / "model_configs")
        arguments = [
            "--train-data", f"{folder}/shards/00000.tar", "--dataset-type", "webdataset", "--model", model,
            "--train-num-samples", str(batch * steps), "--batch-size", str(batch), "--epochs", "1", "--workers", "0",
            "--precision", "fp32", "--device", "cpu", "--grad-clip-norm", "1.0", "--logs", f"{folder}/logs",
            "--report-to", "tensorboard", "--name", str(os.getpid()),
        ]  # fmt: skip
        begin = lambda: theirs(arguments)  # noqa: E731
    from torch.optim.optimizer import register_optimizer_step_post_hook

    times.append(time.process_time())
    register_optimizer_step_post_hook(lambda *_: times.append(time.process_time()))
    begin()
    assert len(times) == steps + 1
    return [times[0], times[1], batch * (steps - 2) / (times[-1] - times[2]), time.process_time() - times[-1]]


def start(arguments: Any, core: int | None) -> "subprocess.Popen[str]":
    """A process that does `run`, on one core alone if one is named."""
    command = [sys.executable, __file__, "--alone", json.dumps(arguments)]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    return process


def times_of(process: "subprocess.Popen[str]") -> list[float]:
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(said)
    return json.loads(said.splitlines()[-1])


def main(
    peer: Annotated[str, typer.Option(help="A folder with the webdataset that open_clip_train wants.")] = "",
    model: Annotated[str, typer.Option(help="An architecture.")] = "ViT-Nano-8-64",
    batch: Annotated[int, typer.Option(help="B.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps a run.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds of one run each.")] = 3,
    kind: Annotated[str, typer.Option(help="Pictures: a kind of loader_speed.py; by default that of the size.")] = "",
    fast: Annotated[bool, typer.Option(help="vlcl with data.decode=fast as well.")] = False,
    together: Annotated[bool, typer.Option(help="All sides at once, a core each.")] = False,
    alone: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time both trainers."""
    if alone:
        print("\n" + json.dumps(run(*json.loads(alone))))
        return
    import dataclasses

    from loader_speed import KINDS, write_shard

    from vlcl_data_prep.index import index_shards

    sides = {"open_clip_train": ("open_clip", False), "vlcl": ("vlcl", False)}
    if fast:
        sides["vlcl, fast"] = ("vlcl", True)
    cores = sorted(os.sched_getaffinity(0)) if together else []
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "shards")
        shards.mkdir()
        pictures = KINDS[kind or ("png64" if model == "ViT-Nano-8-64" else "jpeg500")]
        write_shard(shards / "00000.tar", dataclasses.replace(pictures, pictures=max(batch * steps, 128)))
        index_shards(str(shards), progress=False)
        found = []
        for number in range(rounds):
            job = (model, batch, steps, folder)
            started = {}
            for place, (name, (side, how)) in enumerate(sides.items()):
                core = cores[(place + number) % len(cores)] if together else None
                started[name] = start((side, *job, how, peer), core)
                if not together:
                    started[name].wait()
            found.append({name: times_of(process) for name, process in started.items()})
            for name, values in found[-1].items():
                told = "".join(f"   {what} {value:.2f}" for what, value in zip(NAMES, values))
                print(f"round {number + 1}: {name:16}{told}", flush=True)
    print(f"{model}, B = {batch}, {steps} steps, medians of {rounds} rounds; ratio to open_clip_train within a round")
    for name in sides:
        line = f"{name:16}"
        for n, what in enumerate(NAMES):
            ratio = statistics.median(r[name][n] / r["open_clip_train"][n] for r in found)
            line += f"   {what} {statistics.median(r[name][n] for r in found):.2f} ({ratio:.2f} x)"
        print(line)


if __name__ == "__main__":
    typer.run(main)
