"""Small real shards: sample i is a picture whose colour says i, and the caption "picture i"."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from vlcl.data.manifest import Manifest, Source, expand_shards, open_source
from vlcl_data_prep.index import index_shards

TINY_MODEL = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"size": [32, 32]},
}


def colour_of(index: int) -> tuple[int, int, int]:
    return index % 16 * 16, index // 16 % 16 * 16, 128


def picture(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour_of(index)).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_npm_package(archive: Path, files: dict[str, bytes]) -> None:
    """A .tgz as `npm pack` makes it."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            add(tar, f"package/{name}", content)


def read_members(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key -> {extension: content} of all shards in `folder`."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = content_of(tar, member)
    return samples


def content_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # it is no folder
    return file.read()


def make_shards(
    folder: Path, counts: Sequence[int], change: Callable[[int, dict[str, bytes]], None] = lambda i, files: None
) -> Path:
    """Shards of `counts` samples with a manifest; `change(i, files)` may damage sample i."""
    folder.mkdir(parents=True, exist_ok=True)
    index = 0
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for _ in range(count):
                files = {"png": picture(index), "txt": f"picture {index}".encode()}
                change(index, files)
                for suffix, data in files.items():
                    add(tar, f"{index:06d}.{suffix}", data)
                index += 1
    index_shards(str(folder), progress=False)
    return folder


def tiny_model(folder: Path) -> str:
    """`model.name` of a model that trains in milliseconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_MODEL))
    return f"local-dir:{folder}"


def train_tiny_run(folder: Path) -> Path:
    """A run of 8 steps with held-out pairs and an average of the weights: RUN is FOLDER/tiny."""
    from vlcl.config import load_config
    from vlcl.train import train

    train(load_config(None, [
        f"data.train={make_shards(folder / 'train', (30, 20))}", f"data.val={make_shards(folder / 'val', (20,))}",
        f"model.name={tiny_model(folder / 'model')}", f"train.output={folder / 'tiny'}", "train.steps=8",
        "train.batch_size=10", "train.log_every=1", "train.ema=0.5", "optim.lr=1e-3", "optim.warmup=2",
        "checkpoint.every=4", "checkpoint.keep=2", "eval.batch_size=8", "data.workers=0", "data.streams=2",
        "data.shuffle=16", "log.trackers=[]", "train.precision=fp32",
    ]))  # fmt: skip
    return folder / "tiny"


def left_by_killed(target: Path, kind: str) -> Path:
    """The name of what a killed process of this machine left beside `target`; see vlcl/files.py."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    return target.with_name(f".{target.name}.{socket.gethostname()}-{gone.pid}.{kind}")


__all__ = ["Manifest", "Source", "expand_shards", "left_by_killed", "make_shards", "open_source", "tiny_model"]
