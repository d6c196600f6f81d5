"""`vlcl eval linear`: a linear classifier, and nearest neighbours, on the frozen features of an image tower.

The protocol is that of self-supervised image learning: SGD with momentum 0.9 and no weight decay, 90 epochs, the
learning rate falling along a cosine, chosen from several on a tenth of the training pictures. Features are computed
once: of the middle of each picture, or of `crops` random parts of it, which the epochs take in turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from vlcl import distributed
from vlcl.data.decode import BACKGROUND, DEFAULT_KEYS, DEFAULT_LIMITS
from vlcl.data.preprocess import own_generators
from vlcl.data.views import PictureDecoder
from vlcl.errors import UserError
from vlcl.labelled import LabelledPictures
from vlcl.probe import Labelled, LinearProtocol, LinearResult, encode_labelled, knn_accuracy, linear_accuracy
from vlcl_eval import results
from vlcl_eval.models import EvalModel, check_finite, load

FILE = "linear.jsonl"
Record = dict[str, Any]


def evaluate_linear(
    model: str, data: str | Path, split: str | None = None, *, output: str | Path, epochs: int = 90,
    lrs: Sequence[float] = LinearProtocol.lrs, crops: int = 0, neighbours: int = 20, seed: int = 0,
    precision: str = "fp32", batch_size: int = 64, workers: int = 0, say: Callable[[str], None] = print,
) -> Record:  # fmt: skip
    """Accuracy on DATA/`split` (None: test, or else val) of classifiers of DATA/train (a collective), in percent; the
    record is appended to OUTPUT/linear.jsonl. UserError where one of them is no set of labelled pictures."""
    device, started = distributed.start(), time.perf_counter()
    train, test = _open(Path(data), "train"), _open(Path(data), _split(Path(data), split))
    if train.class_names != test.class_names:
        raise UserError(f"{data}: the classes of train and of {test.name} are not the same; they are numbered by name")
    loaded = load(model).to(device)
    results.make_folder(Path(output), FILE)
    context = partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext

    def encode(pictures: LabelledPictures, preprocess: Callable[..., Tensor], seed: int | None = None) -> Labelled:
        batches = pictures.batches(preprocess, batch_size, workers, device, seed)
        found = encode_labelled(loaded.image, batches, device, context)
        if not len(found.label_N):
            raise UserError(f"{pictures.name}: none of its pictures has a label that can be read")
        check_finite(loaded, found.feature_ND)
        return found

    own = loaded.transform(None)
    of_train, of_test = encode(train, own), encode(test, own)
    with own_generators():
        copies = [encode(train, _random_crop(loaded), seed * 1000 + copy).feature_ND for copy in range(crops)]
    knn = knn_accuracy(of_train, of_test, neighbours)
    how = LinearProtocol(epochs, lrs=tuple(lrs), seed=seed)
    found: LinearResult | None = None
    if distributed.rank() == 0:
        found = linear_accuracy(of_train, [of_test], how, copies)
    found = distributed.broadcast(found)
    assert found is not None
    record = {
        "model": loaded.label, "weights": loaded.weights, "data": str(data), "split": Path(test.name).name,
        "linear": round(100 * found.accuracies[0], 4), "knn": round(100 * knn, 4), "lr": found.lr,
        "chosen_on": {f"{lr:g}": round(100 * value, 4) for lr, value in found.chosen_on.items()},
        "epochs": epochs, "batch_size": how.batch_size, "crops": crops, "neighbours": neighbours, "seed": seed,
        "precision": precision, "train": len(of_train.label_N), "test": len(of_test.label_N),
        "skipped": of_train.skipped + of_test.skipped, **results.stamp(started),
    }  # fmt: skip
    if distributed.rank() == 0:
        with open(Path(output) / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        say(
            f"{loaded.label} on {test.name}, {record['test']:,} pictures: linear {record['linear']:.2f} % (rate "
            f"{found.lr:g}, {epochs} epochs), kNN {record['knn']:.2f} % (k = {neighbours})"
        )
        if len(lrs) > 1 and found.lr in (min(lrs), max(lrs)):
            say(f"note: the rate {found.lr:g} stands at the end of --lrs; try more beyond it")
    return record


def _open(data: Path, split: str) -> LabelledPictures:
    folder = data / split
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder: DIR should have {split}/ with shards and a manifest.json (vlcl data index), or "
            "with a folder of pictures for each class"
        )
    return LabelledPictures(str(folder), str(folder), PictureDecoder(DEFAULT_KEYS, DEFAULT_LIMITS, BACKGROUND))


def _split(data: Path, split: str | None) -> str:
    return split or next((name for name in ("test", "val") if (data / name).is_dir()), "test")


def _random_crop(model: EvalModel) -> Callable[..., Tensor]:
    """A random part of the picture, mirrored or not, as such classifiers are trained on."""
    pictures = model.preprocess
    return Compose([
        RandomResizedCrop(model.image_size), RandomHorizontalFlip(), ToTensor(), Normalize(pictures.mean, pictures.std)
    ])  # fmt: skip
