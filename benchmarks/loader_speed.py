"""Images a second and core: vlcl's stream of training batches beside open_clip's pipeline, on the same shards.

    python benchmarks/loader_speed.py [--rounds 5] [--kinds jpeg500,jpeg2000,png64]

open_clip's is the pipeline of its trainer's data.py, as of 3.3 (webdataset's tar reader, shuffle, decode("pilrgb"), its
`image_transform` and tokenizer a sample at a time, batches); open_clip_train itself is not needed. Both run in this
process on one thread, so that CPU seconds are those of one core, and end in normalized float32 images and tokens. The
pictures are two photographs that come with scikit-learn, laid side by side until they fill the size, so that a large
picture has the detail of a photograph. Rounds take turns; a ratio is within a round, its median is shown.
"""

import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import webdataset
from open_clip.transform import image_transform
from PIL import Image
from sklearn.datasets import load_sample_images

from vlcl.config import Config, load_config
from vlcl.data.stream import Position, TrainStream
from vlcl.from_config import make_layout, make_reader, open_sources
from vlcl.model import Built, build_model
from vlcl_data_prep.index import index_shards


@dataclass(frozen=True)
class Kind:
    size: tuple[int, int]
    suffix: str
    model: str
    input: int
    pictures: int
    goal: float


KINDS = {
    "jpeg500": Kind((500, 375), "jpg", "ViT-B-32", 224, 192, 1.6),
    "jpeg2000": Kind((2000, 1500), "jpg", "ViT-B-32", 224, 32, 3.0),
    "png64": Kind((64, 64), "png", "ViT-Nano-8-64", 64, 1024, 1.6),
}
BATCH = 32
wds: Any = webdataset  # what it exports is found at run time


def picture(photos: list[Image.Image], size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A part of a wall of photographs; small pictures are whole photographs, scaled down."""
    if size[0] <= 500:
        photo = photos[rng.integers(len(photos))]
        x, y = (int(rng.integers(side // 8)) for side in photo.size)
        return photo.crop((x, y, photo.width, photo.height)).resize(size, Image.Resampling.LANCZOS)
    wall, shift = Image.new("RGB", size), rng.integers(200, size=2)
    for number, (x, y) in enumerate((x, y) for x in range(0, size[0] + 640, 640) for y in range(0, size[1] + 427, 427)):
        wall.paste(photos[number % len(photos)], (x - int(shift[0]), y - int(shift[1])))
    return wall


def write_shard(path: Path, kind: Kind) -> None:
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    with tarfile.open(path, "w") as tar:
        for number in range(kind.pictures):
            content, options = io.BytesIO(), {"quality": 90} if kind.suffix == "jpg" else {}
            picture(photos, kind.size, rng).save(content, "JPEG" if kind.suffix == "jpg" else "PNG", **options)
            words = " ".join(rng.choice(["a", "temple", "flower", "of", "red", "in", "China", "photo"], 9))
            for suffix, data in ((kind.suffix, content.getvalue()), ("txt", words.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def open_clip_batches(path: Path, kind: Kind, built: Built) -> Iterator[Any]:
    """One pass after another over the shard, for ever."""
    preprocess = image_transform(kind.input, is_train=True)
    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(path)] * 1000),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(64, initial=16),
        wds.select(lambda sample: "txt" in sample and kind.suffix in sample),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=preprocess, text=lambda text: built.tokenize([text])[0]),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    )
    return iter(pipeline)


def vlcl_batches(config: Config, built: Built) -> Iterator[Any]:
    sources = open_sources(config.data.train)
    reader = make_reader("data.train", config, sources, built)
    stream: Any = TrainStream(sources, make_layout(config, sources), reader, 64, Position())
    for batch in stream:
        yield built.encoder.normalized(batch.to("cpu").images_BCHW), batch.tokens_BL


def cost_of(batches: Iterator[Any], count: int) -> tuple[float, float]:
    """CPU and wall seconds an image."""
    begin = time.process_time(), time.perf_counter()
    for images, _ in islice(batches, count):
        assert images.dtype == torch.float32
    return (time.process_time() - begin[0]) / count / BATCH, (time.perf_counter() - begin[1]) / count / BATCH


def compare(kind: Kind, rounds: int) -> None:
    built = build_model(kind.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000.tar"
        write_shard(path, kind)
        index_shards(folder, progress=False)
        settings = [f"data.train={folder}", f"train.batch_size={BATCH}", "data.streams=1", "train.steps=1"]
        sides: dict[str, Callable[[], Iterator[Any]]] = {"open_clip": lambda: open_clip_batches(path, kind, built)}
        for how in ("exact", "fast"):
            config = load_config(None, [*settings, f"data.decode={how}"])
            sides[f"vlcl, {how}"] = lambda config=config: vlcl_batches(config, built)
        running = {name: make() for name, make in sides.items()}
        for batches in running.values():
            next(batches)
        count = max(kind.pictures // BATCH, 4)
        times = [{name: cost_of(batches, count) for name, batches in running.items()} for _ in range(rounds)]
    name = f"{kind.size[0]}x{kind.size[1]} {kind.suffix} -> {kind.input}"
    for side in sides:
        cpu, wall = (statistics.median(r[side][n] for r in times) for n in (0, 1))
        ratio, slower = (statistics.median(r["open_clip"][n] / r[side][n] for r in times) for n in (0, 1))
        told = "" if side == "open_clip" else f"   {ratio:.2f} x (wall {slower:.2f} x; goal {kind.goal} x)"
        print(f"{name:24} {side:12} {1 / cpu:7.0f} images/CPU s {1 / wall:7.0f} images/s{told}", flush=True)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds, in which all sides take turns.")] = 5,
    kinds: Annotated[str, typer.Option(help=f"Of {', '.join(KINDS)}.")] = ",".join(KINDS),
) -> None:
    """Time open_clip's pipeline and vlcl's stream."""
    torch.set_num_threads(1)
    for name in kinds.split(","):
        compare(KINDS[name], rounds)


if __name__ == "__main__":
    typer.run(main)
