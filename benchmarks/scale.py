"""What vlcl's own bookkeeping costs at 12 M, 400 M and 5 B pairs on 8, 64 and 512 GPUs: the figures of docs/scale.md.

    python benchmarks/scale.py [--shards 500000] [--ranks 512] [--files 20000]

Made up: a manifest of so many shards of 10,000 pairs, and empty files in place of shards. Simulated: the layout of each
of the ranks, one after another in this process. Real: the code that reads, lays out, saves, indexes and verifies. Lines
say whether a figure is measured or computed; times are CPU seconds on one core, medians of three where that is cheap.
A few minutes, about 2 GB of memory, 300 MB of disk.
"""

import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from vlcl.data.manifest import Manifest, Shard, open_source, read_manifest, shard_name, write_manifest
from vlcl.data.order import Layout, Run, ShuffleBuffer, shard_order
from vlcl.data.shard import scan_shard
from vlcl.pair_table import PairTable
from vlcl_data_prep.verify import Rules, _check_shard, _repeated

PAIRS = (12_000_000, 400_000_000, 5_000_000_000)
GPUS = (8, 64, 512)
OF_A_SHARD = 10_000
GLOBAL_BATCH, WIDTH, PARAMETERS = 32_768, 512, 151_277_313  # ViT-B-32
CORES = 16  # of the machine that hours are computed for
SIDE, PICTURES = 256, 400  # of the shard that is indexed and verified
HASHES = 40_000_000
MEMORY = """
import sys
from vlcl.data.manifest import read_manifest
def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1]) / 1e6
before = resident()
manifest = read_manifest(sys.argv[1])
print(resident() - before)
"""  # of a manifest, in a process of its own


def cpu_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def show(measured: bool, what: str, figures: str) -> None:
    print(f"{'measured' if measured else 'computed'}  {what:52} {figures}", flush=True)


def of_manifest(folder: Path, shards: int) -> None:
    entries = (
        Shard(f"{i // 1000:05d}/{i:09d}.tar", OF_A_SHARD, 650_000_000 + i, 1795473293094029775 + i, f"{i:064x}")
        for i in range(shards)
    )
    path = str(folder / "manifest.json")
    found = [Manifest(tuple(entries))]
    write = cpu_seconds(lambda: write_manifest(path, found[0]), 1)
    place = "/laion/manifest.json"
    names = cpu_seconds(lambda: [shard_name(f"/laion/{shard.name}", place) for shard in found[0].shards])
    found.clear()
    read = cpu_seconds(lambda: read_manifest(path))
    size, kept = os.path.getsize(path), float(subprocess.check_output([sys.executable, "-c", MEMORY, path], text=True))
    for pairs in PAIRS:
        share = pairs / OF_A_SHARD / shards
        what = f"manifest of {round(share * shards):,} shards ({pairs / 1e6:,.0f} M pairs)"
        figures = f"{share * size / 1e6:.1f} MB, written in {share * write:.2f} s, read in {share * read:.2f} s"
        figures += f", {share * kept:.0f} MB of memory; names compared in {share * names:.2f} s"
        show(share == 1, what, figures)


def of_start(folder: Path, files: int) -> None:
    """`open_source`: what each rank does with the shards before the first step."""
    entries = []
    for i in range(files):
        path = folder / f"{i:09d}.tar"
        path.touch()
        entries.append(Shard(path.name, OF_A_SHARD, 0, path.stat().st_mtime_ns, f"{i:064x}"))
    write_manifest(str(folder / "manifest.json"), Manifest(tuple(entries)))
    seconds = cpu_seconds(lambda: open_source(str(folder)), 1)
    show(
        True,
        f"start of a rank with {files:,} shards on a local disk",
        f"{seconds:.2f} s, {1e6 * seconds / files:.0f} us each",
    )
    for pairs in PAIRS[1:]:
        show(False, f"the same with {pairs // OF_A_SHARD:,}", f"{seconds / files * pairs / OF_A_SHARD:.1f} s a rank")


def of_order(shards: int, ranks: int) -> None:
    """All ranks of a layout: how long one takes at the start of an epoch, and that nothing is read twice or left."""
    counts, streams = (OF_A_SHARD,) * shards, 2
    times, parts = [], []
    for rank in range(ranks):
        layout = Layout(counts, GLOBAL_BATCH // ranks, rank, ranks, streams, slices=ranks)
        shard_order.cache_clear()
        start = time.process_time()
        for own in layout.own_slices:
            for phase in range(streams):
                runs = layout.segment(3, own * streams + phase)
                parts.append(np.array([(run.shard * OF_A_SHARD + run.start, len(run)) for run in runs]))
        times.append(time.process_time() - start)
    line = np.concatenate(parts)
    line = line[np.argsort(line[:, 0])]
    assert (line[1:, 0] == line[:-1].sum(axis=1)).all(), "a sample is read twice, or by nobody"
    assert line[0, 0] == 0
    assert line[-1].sum() == shards * OF_A_SHARD
    what = f"order of an epoch of {shards * OF_A_SHARD / 1e6:,.0f} M pairs, {ranks} ranks x {streams} streams"
    show(True, what, f"{statistics.median(times):.3f} s a rank (most {max(times):.3f}); every pair once")
    of_stream = shards * OF_A_SHARD // (8 * streams)
    runs = [Run(shard, 0, OF_A_SHARD) for shard in range(of_stream // OF_A_SHARD)]
    seconds = cpu_seconds(lambda: ShuffleBuffer(runs, 8192, np.random.default_rng(0)).skip(int(0.9 * of_stream)), 1)
    show(True, f"resume at 90 % of a stream of {of_stream / 1e6:.0f} M (8 ranks)", f"{seconds:.2f} s")


def of_table(folder: Path) -> None:
    """A rank's share, as a table of its own; shares above 150 MB are computed from the largest below."""
    rate = 0.0
    for pairs, gpus in sorted(((n, w) for n in PAIRS for w in GPUS), key=lambda x: x[0] / x[1]):
        rows = -(-pairs // gpus)
        what = f"table of {pairs / 1e6:,.0f} M pairs, {gpus} ranks: a rank's share"
        if rows * 12 > 150e6:
            show(False, what, f"{rows * 12 / 1e6:,.0f} MB, saved in {rows / rate:.1f} s")
            continue
        table = PairTable(rows)
        nbytes = table._values.nbytes + table._visits.nbytes
        row_G = torch.randint(rows, (GLOBAL_BATCH,))
        table.write(row_G, torch.zeros(GLOBAL_BATCH, 2))
        save = cpu_seconds(lambda t=table, w=gpus: t.save(folder / str(w)))
        step = cpu_seconds(lambda t=table, row=row_G: t.write(row, t.read(row)[0]))
        rate = rows / save
        show(
            True,
            what,
            f"{nbytes / 1e6:,.1f} MB, saved in {save:.2f} s; read + write of {GLOBAL_BATCH:,} rows {1e3 * step:.1f} ms",
        )


def of_network() -> None:
    for gpus in GPUS:
        share = (gpus - 1) / gpus
        gradients, features, rows = (x * share for x in (8 * PARAMETERS, 8 * GLOBAL_BATCH * WIDTH, 24 * GLOBAL_BATCH))
        parts = f"gradients {gradients / 1e6:,.0f}, features {features / 1e6:.0f}, rows {rows / 1e6:.2f}"
        total = (gradients + features + rows) / 1e6
        show(False, f"sent by a rank each step, {gpus} ranks, ViT-B-32", f"{total:,.0f} MB: {parts}")
    for pairs in PAIRS:
        show(
            False,
            f"checkpoint, {pairs / 1e6:,.0f} M pairs, ViT-B-32 with AdamW",
            f"{(12 * PARAMETERS + 12 * pairs) / 1e9:.1f} GB",
        )


def picture(number: int) -> bytes:
    """Smooth colours with some noise: a JPEG of about the bytes that a photograph of this size has."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def of_shards(folder: Path) -> None:
    path, nbytes = folder / "pictures.tar", 0
    with tarfile.open(path, "w") as tar:
        for i in range(PICTURES):
            image = picture(i)
            nbytes += len(image)
            for suffix, content in (("jpg", image), ("json", b"{}"), ("txt", b"a caption of some words")):
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index = cpu_seconds(lambda: scan_shard(str(path)), 9) / PICTURES
    verify = cpu_seconds(lambda: _check_shard(str(path), Rules())) / PICTURES
    kilobytes = nbytes / PICTURES / 1e3
    show(True, f"index, a pair of jpg ({SIDE} px, {kilobytes:.0f} kB), json, txt", f"{1e6 * index:.1f} us on a core")
    show(True, "verify, the same", f"{1e3 * verify:.2f} ms on a core")
    for pairs in PAIRS:
        hours = (seconds * pairs / 3600 / CORES for seconds in (index, verify))
        figures = "index {:.3f}, verify {:.1f}".format(*hours)
        show(False, f"hours of a machine of {CORES} cores, {pairs / 1e6:,.0f} M pairs", figures)


def of_keys() -> None:
    hashes = [
        array("Q", x.tobytes()) for x in np.random.default_rng(0).integers(0, 1 << 64, (400, HASHES // 400), np.uint64)
    ]
    seconds = cpu_seconds(lambda: _repeated(hashes), 1)
    show(
        True,
        f"keys of {HASHES / 1e6:.0f} M pairs compared (end of verify)",
        f"{seconds:.1f} s, {8 * HASHES / 1e6:.0f} MB",
    )
    for pairs in PAIRS:
        figures = f"{8 * pairs / 1e9:.1f} GB, {seconds * pairs / HASHES / 60:.1f} min"
        show(False, f"the same for {pairs / 1e6:,.0f} M", figures)


def main(
    shards: Annotated[int, typer.Option(help="Of the made-up manifest, and of the order.")] = 500_000,
    ranks: Annotated[int, typer.Option(help="Of the simulated layout.")] = 512,
    files: Annotated[int, typer.Option(help="Empty ones, for the start.")] = 20_000,
) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        of_keys()
        of_manifest(folder, shards)
        (folder / "files").mkdir()
        of_start(folder / "files", files)
        of_order(shards, ranks)
        of_table(folder)
        of_shards(folder)
    of_network()


if __name__ == "__main__":
    typer.run(main)
