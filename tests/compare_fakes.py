"""Cells of `vlcl compare` that are not trained: their folders are those of finished runs, by a formula. No torch."""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from multiprocessing import get_start_method
from pathlib import Path

from vlcl.compare.cell import Ran
from vlcl.compare.grid import Cell
from vlcl.config import dump_config
from vlcl.stop import Stop

WAYS = ("image_to_text", "text_to_image")


def noise(loss: str, seed: int) -> float:
    return zlib.crc32(f"{loss} {seed}".encode()) % 100 / 1e4


def recall(cell: Cell, split: str) -> float:
    """Best at a rate of 4e-3 on val; on test at the least rate, so that who chooses on test is found out. em is better
    than infonce by 0.02, and by a little noise of the seed."""
    steps = math.log2(cell.lr / 4e-3)
    loss = 0.02 if cell.loss.startswith("em") else 0
    return 0.5 + loss + noise(cell.loss, cell.seed) - (0.04 * abs(steps) if split == "val" else steps / 99)


def finish(cell: Cell, splits: tuple[str, ...] = ("val", "test")) -> Ran:
    """What a training leaves in its folder, as far as it is read."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "config.yaml").write_text(dump_config(cell.config))
    values = {f"{split}/{way}_R@1": recall(cell, split) for split in splits for way in WAYS}
    lines = [{"step": cell.steps, "train/loss": 1.5, "train/logit_scale": 14.5}, {"step": cell.steps, **values}]
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    step = cell.folder / f"step-{cell.steps:08d}"
    step.mkdir(exist_ok=True)
    (step / "meta.json").write_text("{}")
    return Ran(None, 2.5, 3.5, 0, "2.9", int(os.environ.get("OMP_NUM_THREADS", "1")), "cpu")


def work(cell: Cell) -> Ran:
    """For workers: by the loss of the cell. Who ran it, with what, is in its folder."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    about = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    (cell.folder / "worker.json").write_text(
        json.dumps({"pid": os.getpid(), **about, "start_method": get_start_method()})
    )
    if cell.loss == "dies":
        os.kill(os.getpid(), 9)
    if cell.loss == "exits":
        os._exit(3)
    if cell.loss == "raises":
        raise ZeroDivisionError("by nobody")
    if cell.loss == "waits":
        with Stop() as stop:  # as a training does
            while stop.asked is None:
                time.sleep(0.1)
        (cell.folder / "stopped").write_text(stop.asked.name)
        raise SystemExit(128 + stop.asked)
    time.sleep(0.3)  # so that the other worker gets some, too
    return Ran(seconds=cell.lr)


def folders(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.is_dir())
