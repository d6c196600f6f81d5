"""Faults outside the run itself: full disks, servers that misbehave, several who write the same."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from eval_data import samples, write_model, write_native
from shards import make_shards
from test_remote import Server

from chaos.training import Found, Place, gone_on, judged
from chaos.victims import Fault, command, start, wait
from vlcl.data.manifest import Manifest, Shard, write_manifest


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}  # fmt: skip


def full_disk_training(place: Place, folder: Path, rng: random.Random, try_: int) -> Found:
    """No file of more bytes than so many: from the settings to the weights."""
    run, half = folder / "run", place.whole(1) / "step-00000006"
    shutil.copytree(half, run / half.name)
    for name in ("config.yaml", "data.json", "environment.json", "metrics.jsonl"):
        shutil.copy(place.whole(1) / name, run / name)
    before = bytes_of(run / half.name)
    sizes = sorted(path.stat().st_size for path in place.whole(1).rglob("*") if path.is_file())
    most = max(1, rng.choice(sizes) - rng.randrange(1, 400))
    arguments = place.arguments(run, "resume=latest", "checkpoint.keep=9")
    first = command(folder, arguments, fault=Fault(most_bytes=most))
    if first.hang or first.traceback or first.codes not in ([2], [0]):
        said = f"{most} bytes: codes {first.codes}: {first.said[-400:]}"
        return Found(said, "its order", first.hang, first.traceback)
    if bytes_of(run / half.name) != before:
        return Found(f"{most} bytes", "the checkpoint before it")
    return gone_on(
        place, folder, 1, first, "one error; the checkpoint before is whole; resumed to the same bits", clear=True
    )


@cache
def things(root: Path) -> dict[str, Path]:
    """A data set, a model, a folder of pictures with captions: what commands other than train read."""
    folder = root / "things"
    if not (folder / "pictures").exists():
        write_native(folder / "data", "mnist", train=samples(10, 8, 0), test=samples(10, 5, 1))
        write_model(folder / "model")
        from shards import picture

        (folder / "pictures").mkdir()
        for i in range(12):
            (folder / "pictures" / f"{i}.png").write_bytes(picture(i))
            (folder / "pictures" / f"{i}.txt").write_text(f"picture {i}")
    return {name: folder / name for name in ("data", "model", "pictures")}


def _commands(place: Place, out: Path) -> dict[str, list[str]]:
    there = things(place.root)
    return {
        "data index": ["data", "index", str(place.shards), "--output", str(out / "m.json"), "--workers", "1"],
        "data pack": ["data", "pack", str(there["pictures"]), str(out / "packed")],
        "export": ["export", str(place.whole(1)), str(out / "export")],
        "eval elevater": ["eval", "elevater", str(there["model"]), "--data-root", str(there["data"]), "--datasets",
                          "mnist", "--shots", "0", "--output", str(out / "scores"), "--cache", str(out / "cache")],
        "bias": ["bias", str(place.whole(1)), "--batch-sizes", "8,16", "--output", str(out / "bias")],
        "data verify": ["data", "verify", str(place.shards), "--output", str(out / "problems.tsv"), "--workers", "1"],
        "eval retrieval": ["eval", "retrieval", str(there["model"]), str(place.shards), "--output",
                           str(out / "scores"), "--workers", "0"],
        "linear probe": ["eval", "elevater", str(there["model"]), "--data-root", str(there["data"]), "--datasets",
                         "mnist", "--shots", "2", "--output", str(out / "scores"), "--cache", str(out / "cache")],
        "compare": ["compare", str(place.config), "--loss", "em", "--batch-size", "10", "--seeds", "1", "--output",
                    str(out / "grid"), "--results", str(out / "results.jsonl"), f"data.val={place.shards}",
                    *(x for x in place.arguments(out)[2:] if not x.startswith("train.output"))],
        "data show": ["data", "show", str(place.shards), "--output", str(out / "show.html")],
        "data stats": ["data", "stats", str(place.shards), "--output", str(out / "stats.html")],
    }  # fmt: skip


# Of each command, the bytes of a file between which one of its writes fails.
LIMITS = {
    "data index": (1, 200),
    "data pack": (1, 9000),
    "export": (1, 500_000),
    "eval elevater": (1, 1500),
    "bias": (1, 800),
    "data verify": (1, 30),
    "eval retrieval": (1, 600),
    "linear probe": (1, 1500),
    "compare": (1, 60_000),
    "data show": (1, 20_000),
    "data stats": (1, 5_000),
}
WRITERS = ("data index", "data pack", "export", "eval elevater", "bias")
MORE_WRITERS = ("data verify", "compare", "linear probe", "eval retrieval")
PAGES = ("data show", "data stats")


def full_disk_elsewhere(
    place: Place, folder: Path, rng: random.Random, try_: int, names: Sequence[str] = WRITERS
) -> Found:
    """Other commands that write: each again without the limit, in the same place."""
    name = sorted(names)[try_ % len(names)]
    out = folder / "out"
    out.mkdir(parents=True)
    arguments = _commands(place, out)[name]
    most = rng.randrange(*LIMITS[name])
    first = command(folder, arguments, fault=Fault(most_bytes=most), limit=120)
    again = command(folder / "again", arguments, limit=120)
    if first.codes == [0] or first.traceback or first.hang or again.codes != [0]:
        said = f"{name}, {most} bytes: codes {first.codes}, then {again.codes}: {first.said[-400:]} {again.said[-200:]}"
        return Found(said, "" if again.codes == [0] else "a second try", first.hang or again.hang, first.traceback)
    return Found("one error; the same command does it later")


def _serving(place: Place) -> Server:
    server = Server()
    for path in sorted(place.shards.glob("*.tar")):
        server.files[f"/{path.name}"] = path.read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


HTTP = ("stalls", "resets", "breaks off", "redirects", "503", "lies about lengths")
QUICK = {"vlcl.data.remote.TIMEOUT": 0.4, "vlcl.data.remote.PAUSE": 0.01}


def http(place: Place, folder: Path, rng: random.Random, try_: int, train: bool) -> Found:
    """A loopback server that goes wrong at a third of the requests; lies go on for as long as it is asked."""
    kind = HTTP[try_ % len(HTTP)]
    server = _serving(place)
    if kind == "lies about lengths":
        server.announced = 300
    else:
        server.wrong = [kind, *(rng.choice([kind, "", ""]) for _ in range(60))]
    urls = server.url("/{00000..00001}.tar")
    try:
        return (_trained if train else _indexed)(place, folder, urls, kind)
    finally:
        server.shutdown()
        server.server_close()


def _indexed(place: Place, folder: Path, urls: str, kind: str) -> Found:
    manifest = folder / "m.json"
    arguments = ["data", "index", urls, "--output", str(manifest), "--workers", "1"]
    ended = command(folder, arguments, fault=Fault(patches=QUICK))
    if kind == "lies about lengths":
        right = ended.codes == [2] and not manifest.exists() and "error:" in ended.said
        return Found("a lie is one error, and nothing is written" if right else ended.said[-300:],
                     "" if right else "the truth", ended.hang, ended.traceback)  # fmt: skip
    if ended.codes != [0]:
        return Found(ended.said[-300:], "the index", ended.hang, ended.traceback)
    here, there = (json.loads(path.read_text())["shards"] for path in (place.shards / "manifest.json", manifest))
    same = [(x["samples"], x["checksum"]) for x in here] == [(x["samples"], x["checksum"]) for x in there]
    return Found("the same index", "" if same else "samples", traceback=ended.traceback)


def _trained(place: Place, folder: Path, urls: str, kind: str) -> Found:
    folder.mkdir(parents=True)
    content = json.loads((place.shards / "manifest.json").read_text())
    base = urls.partition("{")[0]
    remote = {"bytes": None, "mtime_ns": None}
    shards = tuple(Shard(**entry | remote | {"name": base + entry["name"]}) for entry in content["shards"])
    write_manifest(str(folder / "m.json"), Manifest(shards))
    arguments = place.arguments(folder / "run", f"data.train={urls}", f"data.manifest={folder / 'm.json'}")
    ended = command(folder, arguments, fault=Fault(patches=QUICK))
    if kind == "lies about lengths":
        right = ended.codes == [0] and "00000.tar: cannot be read as a tar file to its end" in ended.said
        return Found("a lie costs the last sample of a shard, which is named and counted" if right else
                     ended.said[-300:], "" if right else "the truth", ended.hang, ended.traceback)  # fmt: skip
    if ended.codes != [0]:
        return Found(ended.said[-300:], "the run", ended.hang, ended.traceback)
    losses = [[json.loads(line).get("train/loss") for line in (run / "metrics.jsonl").open()]
              for run in (folder / "run", place.whole(1))]  # fmt: skip
    return Found("the same losses as from the disk", "" if losses[0] == losses[1] else "other losses",
                 traceback=ended.traceback)  # fmt: skip


def three_indexers(place: Place, folder: Path, rng: random.Random, try_: int) -> Found:
    """The same shards, the same manifest."""
    shards = make_shards(folder / "shards", (40,) * 6)
    wanted = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").unlink()
    all_three = [start(folder / str(i), 1, ["data", "index", str(shards), "--workers", "1"]) for i in range(3)]
    ended = [wait(folder / str(i), processes, 60) for i, processes in enumerate(all_three)]
    there = json.loads((shards / "manifest.json").read_text())
    left = [path.name for path in shards.iterdir() if path.name.startswith(".")]
    right = there == wanted and not left and all(one.codes == [0] for one in ended)
    found = Found("one whole manifest" if right else f"{[one.codes for one in ended]} {left}")
    return judged(found, ended, "" if right else "a manifest")


def two_evaluations(place: Place, folder: Path, rng: random.Random, try_: int) -> Found:
    """The same model and data set into the same folder: one measures, the other waits or is refused."""
    arguments = _commands(place, folder)["eval elevater"]
    both = [start(folder / name, 1, arguments) for name in "ab"]
    ended = [wait(folder / name, processes, 90) for name, processes in zip("ab", both)]
    again = command(folder / "again", arguments, limit=90)
    path = folder / "scores" / "results.jsonl"
    records: list[Any] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    codes = sorted(str(one.codes[0]) for one in ended)
    keys = [tuple(record[key] for key in ("model", "dataset", "method", "mode", "shots", "seed")) for record in records]
    right = codes[0] == "0" and codes[1] in ("0", "1", "2") and again.codes == [0] and len(set(keys)) == len(keys) > 0
    found = Found("one measures at a time; each score once" if right else f"{codes} {again.codes} {keys}")
    return judged(found, ended, "" if right else "scores")
