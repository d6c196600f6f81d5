"""How many bytes `vlcl data index` fetches of a shard in a store, by the size of its pictures and of the requests.

    python benchmarks/remote_index.py [--samples 1000]

Makes shards as webdataset's TarWriter does (jpg, json of 1 kB, txt; a pax header for every member's fractional mtime).
Pictures are random bytes, between half and one and a half times as many as the first column says. The store is fsspec's
memory: the figure is about bytes and requests, which are the same for s3. No network, so no time either.
"""

import io
import os
import random
import tarfile
from typing import Annotated

import fsspec
import typer

from vlcl.data.shard import scan_shard
from vlcl.data.stores import StoreFile

URL = "memory://benchmark/shard.tar"


def make_shard(samples: int, picture: int) -> bytes:
    out, rng, pool = io.BytesIO(), random.Random(0), os.urandom(2 * picture)
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(samples):
            image = pool[: int(picture * rng.uniform(0.5, 1.5))]
            for suffix, content in (("jpg", image), ("json", bytes(1000)), ("txt", bytes(80))):
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size, info.mtime = len(content), 1.7e9 + i / 7
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def main(samples: Annotated[int, typer.Option(help="Samples of the shard, three files each.")] = 1000) -> None:
    """Print a row for each size of picture and request."""
    store = fsspec.filesystem("memory")
    asked: list[int] = []
    ask = StoreFile.open
    StoreFile.open = lambda self, start, stop: asked.append(start) or ask(self, start, stop)
    print("picture, kB | shard, MB | request, KiB | fetched, MB | share | requests a sample")
    for picture in (25_000, 120_000, 500_000):
        store.pipe_file(URL, shard := make_shard(samples, picture))
        for window in (StoreFile.window, 1 << 16, 1 << 20):
            before = len(asked)
            scan = scan_shard(URL, window)
            assert scan.samples == samples
            print(
                f"{picture / 1000:g} | {len(shard) / 1e6:.0f} | {window >> 10} | {scan.fetched / 1e6:.1f} | "
                f"{scan.fetched / len(shard):.1%} | {(len(asked) - before) / samples:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
