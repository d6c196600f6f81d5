"""What a checkpoint costs the step loop: written while it waits, and in the background (`checkpoint.async_save`).

    python benchmarks/save_speed.py [--width 768] [--every 50] [--saves 3]

The real trainer, on a model of about 400 MB of weights (1.2 GB a checkpoint, with AdamW's two moments) and pictures so
small that a step takes little longer than its update: with larger ones the share is smaller. The cost of a save is what
the steps that it touches, from the one that begins it to the last during which it is written, take longer than as many
steps at the median of the others. Its share is of `every` such steps. Beside the time by the clock there is that of the
CPU in the loop's own thread: on a machine whose cores are all busy, the writing thread takes time from the loop that it
would not take elsewhere. (Waiting for the disk is in the first alone.)
"""

import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from train_step import write_shards

import vlcl.train
from vlcl.config import load_config

Step = tuple[float, float, bool]  # seconds by the clock, of the CPU, and whether a save began in it or was on its way


def write_model(folder: Path, width: int) -> None:
    folder.mkdir()
    content = {
        "model_cfg": {
            "embed_dim": 512,
            "vision_cfg": {"image_size": 64, "layers": 12, "width": width, "patch_size": 32},
            "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 2},
        },
        "preprocess_cfg": {"size": [64, 64]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def steps_of(settings: list[str]) -> tuple[list[Step], int]:
    """The steps of a run, its first and last apart, and the bytes of its weights."""
    times: list[tuple[float, float, bool]] = []
    step, save = vlcl.train.train_step, vlcl.train.save
    size = 0

    def timed(run: Any, batch: Any) -> Any:
        nonlocal size
        size = sum(x.numel() * x.element_size() for x in run.state.built.encoder.parameters())
        times.append((time.perf_counter(), time.thread_time(), run.saver.busy))
        return step(run, batch)

    def noted(run: Any) -> None:
        times[-1] = (*times[-1][:2], True)  # this step
        save(run)

    vlcl.train.train_step, vlcl.train.save = timed, noted
    try:
        vlcl.train.train(load_config(None, settings))
    finally:
        vlcl.train.train_step, vlcl.train.save = step, save
    found = [(after[0] - now[0], after[1] - now[1], now[2]) for now, after in pairwise(times)]
    return found[3:], size


def main(
    width: Annotated[int, typer.Option(help="Of the image tower, 12 layers: 768 makes 400 MB of weights.")] = 768,
    batch: Annotated[int, typer.Option(help="B.")] = 16,
    every: Annotated[int, typer.Option(help="Steps between saves.")] = 50,
    saves: Annotated[int, typer.Option(help="Saves that are measured, each way.")] = 3,
) -> None:
    shares = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "shards").mkdir()
        write_shards(folder / "shards", 4 * batch)
        write_model(folder / "model", width)
        for name, way in (("sync", "false"), ("async", "true")):
            steps, size = steps_of([
                f"data.train={folder / 'shards'}", f"model.name=local-dir:{folder / 'model'}",
                f"train.output={folder / name}", f"train.steps={every * saves + every // 2 + 1}",
                f"train.batch_size={batch}", f"checkpoint.every={every}", "checkpoint.keep=1",
                f"checkpoint.async_save={way}", "data.workers=0", "data.cache=memory", "data.augment=none",
                "log.trackers=[]", "train.log_every=1000",
            ])  # fmt: skip
            for place, clock in enumerate(("by the clock", "CPU of the loop")):
                plain = statistics.median(one[place] for one in steps if not one[2])
                cost = sum(one[place] - plain for one in steps if one[2]) / saves
                shares[name, clock] = cost / (every * plain)
                print(
                    f"{name:6} {clock:16} a step {1e3 * plain:7.1f} ms, a save {cost:6.2f} s, over "
                    f"{sum(one[2] for one in steps) / saves:.1f} steps: {shares[name, clock]:6.2%} of {every} steps"
                )
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU thread(s)"
    ratio = shares["async", "by the clock"] / shares["sync", "by the clock"]
    print(f"{size / 1e6:.0f} MB of weights, {where}; by the clock, async costs {ratio:.2f} of sync")


if __name__ == "__main__":
    typer.run(main)
