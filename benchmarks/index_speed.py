"""How fast `vlcl data index` is against untarring the same shards, and against listing them, in one run, alternating.

    python benchmarks/index_speed.py [--shards 1000] [--samples 50] [--repeats 3] [--folder DIR]

Makes shards of random bytes as webdataset's TarWriter does (jpg of 20-30 kB, json, txt; a pax header for every member's
fractional mtime) in a temporary folder, about 1.5 GB, and as much again for what is untarred. Files lie in the page
cache for all. Untarring writes to the disk, indexing does not: that is the point, and the figure says no more. CPU
seconds are those of all processes; listing is what reads as little as the index does: `tar t` of all shards by one
shell, and the names by Python's tarfile.
"""

import io
import os
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from vlcl.data.shard import scan_shard
from vlcl_data_prep.index import index_shards


def make_shards(folder: Path, shards: int, samples: int) -> list[Path]:
    """Random bytes, cut to 20-30 kB for an image."""
    pool = os.urandom(30_000)
    paths = [folder / f"{number:05d}.tar" for number in range(shards)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(samples):
                image = pool[: 20_000 + (number * samples + i) * 197 % 10_000]
                caption = f"caption of sample {i}".encode()
                for suffix, content in (
                    ("jpg", image),
                    ("json", b'{"caption": "' + caption * 8 + b'"}'),
                    ("txt", caption),
                ):
                    info = tarfile.TarInfo(f"{number:05d}{i:04d}.{suffix}")
                    info.size, info.mtime = len(content), time.time()
                    tar.addfile(info, io.BytesIO(content))
    return paths


def untar_with_python(paths: list[Path], target: Path) -> None:
    for path in paths:
        with tarfile.open(path) as tar:
            tar.extractall(target, filter="data")


def untar_with_tar(paths: list[Path], target: Path) -> None:
    for path in paths:
        subprocess.run(["tar", "xf", path, "-C", target], check=True)


def list_with_tar(folder: Path) -> None:
    subprocess.run('for shard in *.tar; do tar tf "$shard"; done > /dev/null', shell=True, cwd=folder, check=True)


def list_with_python(paths: list[Path]) -> None:
    for path in paths:
        with tarfile.open(path) as tar:
            tar.getnames()


def seconds_of(action: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and CPU seconds with those of child processes."""
    begin, cpu = time.perf_counter(), sum(os.times()[:4])
    action()
    return time.perf_counter() - begin, sum(os.times()[:4]) - cpu


def untar_seconds(untar: Callable[[list[Path], Path], None], paths: list[Path], folder: Path) -> tuple[float, float]:
    """Into a fresh folder; emptying it is not timed."""
    target = folder / "untarred"
    target.mkdir()
    seconds = seconds_of(lambda: untar(paths, target))
    shutil.rmtree(target)
    return seconds


def read_share(paths: list[Path]) -> float | None:
    """Bytes that a scan in this process asks the system for, over the bytes in the shards (Linux only)."""
    counter = Path("/proc/self/io")
    if not counter.exists():
        return None
    before = int(counter.read_text().split()[1])
    for path in paths:
        scan_shard(str(path))
    return (int(counter.read_text().split()[1]) - before) / sum(path.stat().st_size for path in paths)


def main(
    shards: Annotated[int, typer.Option(help="Number of shards.")] = 1000,
    samples: Annotated[int, typer.Option(help="Samples a shard, three files each.")] = 50,
    repeats: Annotated[int, typer.Option(help="Rounds; medians are printed.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the temporary folder is made.")] = None,
    untar: Annotated[bool, typer.Option(help="Untar them, too; it takes the longest.")] = True,
) -> None:
    """Time indexing against Python's tarfile and against tar."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        data = Path(name) / "shards"
        data.mkdir()
        paths = make_shards(data, shards, samples)
        size = sum(path.stat().st_size for path in paths)
        print(
            f"{shards:,} shards, {shards * samples:,} samples, {size / 1e9:.2f} GB, {os.cpu_count()} cores", flush=True
        )
        actions: dict[str, Callable[[], tuple[float, float]]] = {
            "vlcl data index": lambda: seconds_of(lambda: index_shards(str(data), progress=False)),
            "vlcl data index, 1 process": lambda: seconds_of(
                lambda: index_shards(str(data), workers=1, progress=False)
            ),
            "tar t": lambda: seconds_of(lambda: list_with_tar(data)),
            "tarfile.getnames": lambda: seconds_of(lambda: list_with_python(paths)),
        }
        untarring: dict[str, Callable[[], tuple[float, float]]] = {
            "tar xf": lambda: untar_seconds(untar_with_tar, paths, Path(name)),
            "tarfile.extractall": lambda: untar_seconds(untar_with_python, paths, Path(name)),
        }
        actions |= untarring if untar else {}
        times: dict[str, list[tuple[float, float]]] = {label: [] for label in actions}
        for number in range(repeats):
            for label, action in actions.items():
                times[label].append(action())
                wall, cpu = times[label][-1]
                print(f"round {number + 1}: {label:28} {wall:8.2f} s {cpu:8.2f} CPU s", flush=True)
        print("\nmedians; CPU against one process of the index, which starts none")
        for label, values in times.items():
            wall, cpu = (statistics.median(value[n] for value in values) for n in (0, 1))
            slower = statistics.median(x[0] / y[0] for x, y in zip(values, times["vlcl data index"]))
            dearer = statistics.median(x[1] / y[1] for x, y in zip(values, times["vlcl data index, 1 process"]))
            print(f"{label:28} {wall:8.2f} s {slower:6.1f} x the index   {cpu:8.2f} CPU s {dearer:6.2f} x the index")
        share = read_share(paths)
        if share is not None:
            print(f"bytes read by the index: {share:.1%} of the bytes in the shards")


if __name__ == "__main__":
    typer.run(main)
