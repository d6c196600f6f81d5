"""How long a stream takes to find its place again when a run is resumed: by arrays, and a sample at a time as before.

    python benchmarks/resume_speed.py [--samples 6000000] [--share 0.9]

The order alone, in CPU seconds, on one core; reading what is still in the shuffle buffer comes on top.
"""

import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Annotated

import numpy as np
import typer

from vlcl.data.order import Run, ShuffleBuffer


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(
    samples: Annotated[int, typer.Option(help="Of the stream, in shards of 10,000.")] = 6_000_000,
    share: Annotated[float, typer.Option(help="Of the epoch that is done.")] = 0.9,
    repeats: Annotated[int, typer.Option(help="Rounds; medians are shown.")] = 3,
) -> None:
    runs, done = [Run(shard, 0, 10_000) for shard in range(samples // 10_000)], int(samples * share)

    def buffer() -> ShuffleBuffer:
        return ShuffleBuffer(runs, 8192, np.random.default_rng(0))

    ways = {
        "by arrays": lambda: buffer().skip(done),
        "a sample at a time": lambda: list(islice(buffer(), done - 1, done)),
    }
    rounds = [{name: cpu_seconds(way) for name, way in ways.items()} for _ in range(repeats)]
    print(f"{samples:,} samples a stream, {share:.0%} of them done, median of {repeats}")
    for name in ways:
        print(f"{name:20} {statistics.median(r[name] for r in rounds):.3f} CPU s")


if __name__ == "__main__":
    typer.run(main)
