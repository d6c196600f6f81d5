"""What a sample costs in the training stream, against another checkout of vlcl (a plain loop before there were stages):

    git worktree add ../before COMMIT && python benchmarks/stages_speed.py ../before [--pairs 4096] [--rounds 9]

One process for each checkout, which take turns at reading as many pairs, without workers: from shards (JPEGs of 64
pixels, shown to a model of 32), and from `data.cache=memory` with `data.augment=none`, where a sample costs next to
nothing else. CPU seconds; the ratio is within a round, its median is shown. This checkout also with a stage that keeps
every sample, which has all of its files read and made a dict.
"""

import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

HERE = Path(__file__).parents[1]
BATCH = 64


def write_shards(folder: Path, pairs: int) -> None:
    for number in range(8):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(number, pairs, 8):
                picture = io.BytesIO()
                Image.linear_gradient("L").rotate(index % 360).resize((64, 64)).convert("RGB").save(picture, "JPEG")
                for suffix, content in (("jpg", picture.getvalue()), ("txt", f"a ramp, turned {index % 360}".encode())):
                    member = tarfile.TarInfo(f"{index:08d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def keep(samples: Iterator[Any]) -> Iterator[Any]:
    yield from samples


def streams(folder: str) -> dict[str, Any]:
    """What is read, by name, with the vlcl that is imported here."""
    from vlcl.config import load_config
    from vlcl.data.stream import Position, TrainStream
    from vlcl.from_config import make_layout, make_reader, open_splits
    from vlcl.model import build_model
    from vlcl_data_prep.index import index_shards

    index_shards(folder, progress=False)
    built, found = build_model("ViT-Pico-8-32"), {}
    for name, more in (("shards", []), ("cache", ["data.cache=memory", "data.augment=none"])):
        config = load_config(None, [f"data.train={folder}", f"train.batch_size={BATCH}", *more])
        sources, _, _ = open_splits(config.data)
        reader = make_reader("data.train", config, sources, built)
        found[name] = TrainStream(sources, make_layout(config, sources), reader, 1024, Position())
    if hasattr(TrainStream, "compose"):
        found["stage"] = found["shards"].compose(keep)
    return found


def child(folder: str) -> None:
    """Read a line, COUNT NAME, measure, answer with CPU seconds; "-" for what this checkout has not."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vlcl has to say
    open_streams = {name: iter(stream) for name, stream in streams(folder).items()}
    for line in sys.stdin:
        count, name = line.split()
        started = time.process_time()
        for _ in range(int(count) if name in open_streams else 0):
            next(open_streams[name])
        print(time.process_time() - started if name in open_streams else "-", file=out)


def started(root: Path, folder: str) -> "subprocess.Popen[str]":
    path = os.pathsep.join(str(root / part) for part in (".", "eval", "data_prep"))
    command = [sys.executable, __file__, "--child", folder]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process: "subprocess.Popen[str]", count: int, name: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{count} {name}\n")
    process.stdin.flush()
    answer = process.stdout.readline().strip()
    return float("nan") if answer == "-" else float(answer)


def main(
    before: Annotated[Path, typer.Argument(help="Another checkout of vlcl.")],
    pairs: Annotated[int, typer.Option(help="In the shards, and read a round.")] = 4096,
    rounds: int = 9,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), pairs)
        old, new = started(before, folder), started(HERE, folder)
        for name in ("shards", "stage", "cache"):
            count = pairs // BATCH * (10 if name == "cache" else 1)
            peer = "shards" if name == "stage" else name
            times = [(ask(old, count, peer), ask(new, count, name)) for _ in range(rounds + 1)][1:]
            before_us, now_us = (statistics.median(x) / count / BATCH * 1e6 for x in zip(*times))
            ratio = statistics.median(now / then for then, now in times)
            spread = sorted(now / then for then, now in times)
            print(f"{name:8} before {before_us:7.1f} us a sample, now {now_us:7.1f}: {ratio:.3f} "
                  f"({spread[0]:.3f} to {spread[-1]:.3f})", flush=True)  # fmt: skip
        for process in (old, new):
            process.communicate()


if __name__ == "__main__":
    child(sys.argv[2]) if sys.argv[1:2] == ["--child"] else typer.run(main)
