"""Small data sets in the forms that `vlcl eval` reads, with pictures that a label can be told from."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from shards import tiny_model

from vlcl_eval.datasets.class_names import class_names
from vlcl_eval.datasets.registry import Benchmark, find_benchmark

Sample = tuple[bytes, tuple[int, ...]]


def picture(labels: Sequence[int], seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A PNG: noise, with a bright bar for each label at a place of its own."""
    rng = np.random.default_rng([seed, *labels])
    pixels = rng.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
    for label in labels:
        column = label % size[0]
        pixels[:, column] = (255, 40 * (label % 6), 255 - 40 * (label % 5))
    return png(Image.fromarray(pixels))


def png(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def samples(num_classes: int, per_class: int, seed: int) -> list[Sample]:
    """In an order that is not by class."""
    order = np.random.default_rng(seed).permutation(num_classes * per_class)
    return [(picture((int(i) % num_classes,), seed * 100_000 + int(i)), (int(i) % num_classes,)) for i in order]


def many_labels(num_classes: int, num: int, seed: int) -> list[Sample]:
    """Several classes an image, some images without any, every class several times."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(num):
        labels = tuple(sorted({i % num_classes, *np.flatnonzero(rng.random(num_classes) < 0.08).tolist()}))
        labels = () if i % 17 == 5 else labels
        out.append((picture(labels, seed * 100_000 + i), labels))
    return out


def write_model(folder: Path, seed: int = 0) -> str:
    """A folder in open_clip's format with a tiny model of random weights."""
    tiny_model(folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["context_length"] = 24  # the prompts fit, knowledge does not
    path.write_text(json.dumps(config))
    torch.manual_seed(seed)
    clip = open_clip.create_model(f"local-dir:{folder}")
    save_file({name: x.contiguous() for name, x in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    return str(folder)


def write_native(root: Path, name: str, **splits: Sequence[Sample]) -> Path:
    """The benchmark's data set `name` with these images, in its own format; returns its folder."""
    benchmark = find_benchmark(name)
    folder = root / benchmark.root_folder
    folder.mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        write_split(folder, benchmark, split, images)
    if benchmark.labels:
        (folder / benchmark.labels).write_text("\n".join(class_names(name) or []) + "\n")
    return folder


def write_own(root: Path, name: str, sizes: dict[str, int] | None = None, **splits: Sequence[Sample]) -> Path:
    """A data set of one's own, of digits, in ROOT's registry; `sizes`: of splits, where the registry says others."""
    write_native(root, "mnist", **splits).rename(root / name)
    entry: dict[str, object] = {"name": name, "type": "classification_multiclass", "root_folder": name,
                                "labelmap": "labels.txt", "num_classes": 10}  # fmt: skip
    for split, images in splits.items():
        entry[split] = {"index_path": f"{split}.txt", "num_images": (sizes or {}).get(split, len(images))}
    (root / "vision_datasets.json").write_text(json.dumps([entry]))
    return root / name


def write_split(folder: Path, benchmark: Benchmark, split: str, images: Sequence[Sample]) -> None:
    files = benchmark.splits[split]
    archive = files.zips[0]
    entries = [f"some dir/{split} {i:04d}.png" for i in range(len(images))]
    with zipfile.ZipFile(folder / archive, "a") as out:  # some data sets have one zip for all splits
        for entry, (data, _) in zip(entries, images):
            out.writestr(entry, data)
    if benchmark.format == "iris":
        lines = [f"{archive}@{e} {','.join(map(str, labels))}".rstrip() for e, (_, labels) in zip(entries, images)]
        (folder / files.index).write_text("\n".join(lines) + "\n")
        return
    names = class_names(benchmark.name) or []
    index = {  # ids that are neither dense nor in order
        "images": [
            {"id": 10 + 2 * i, "file_name": entry}
            | ({"zip_file": archive} if i % 2 else {"file_name": f"{archive}@{entry}"})
            for i, entry in reversed(list(enumerate(entries)))
        ],
        "annotations": [
            {"id": i, "image_id": 10 + 2 * i, "category_id": 3 * label + 1}
            for i, (_, labels) in enumerate(images)
            for label in labels
        ],
        "categories": [{"id": 3 * c + 1, "name": name} for c, name in reversed(list(enumerate(names)))],
    }
    (folder / files.index).write_text(json.dumps(index))
