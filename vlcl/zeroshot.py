"""Evaluation without training: retrieval recall on held-out pairs, and zero-shot accuracy on a folder of classes.

Every rank encodes its share, all ranks score: no rank waits for another's evaluation. Call on all ranks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

from vlcl import distributed
from vlcl.batch import Batch
from vlcl.data.decode import BadSample, decode_image
from vlcl.data.reader import Decoder, Sources, samples_at
from vlcl.errors import UserError
from vlcl.model import Built, DualEncoder
from vlcl.report.page import Hit, ImageExample, RetrievalExample

WORDNET_ID = re.compile(r"n\d{8}")

# Letters here: N pairs, Q queries of a chunk, D width.


@dataclass(frozen=True)
class EncodedPairs:
    """All ranks' pairs on every rank, in row order."""

    image_ND: Tensor
    text_ND: Tensor
    row_N: Tensor
    skipped: dict[str, int]


@torch.no_grad()
def encode_pairs(
    encoder: DualEncoder,
    batches: Iterable[Batch],
    device: torch.device,
    autocast: Callable[..., AbstractContextManager[object]] = nullcontext,
) -> EncodedPairs:
    """Features of this rank's `batches`, then of all ranks. `encoder` should be in eval mode."""
    images, texts, rows = [], [], []
    skipped: Counter[str] = Counter()
    for batch in batches:
        skipped.update(batch.skipped)
        if not len(batch):
            continue
        with autocast():
            features = encoder(*(x.to(device, non_blocking=True) for x in (batch.images_BCHW, batch.tokens_BL)))
        images.append(features.image_BD)
        texts.append(features.text_BD)
        rows.append(batch.row_B.to(device))
    total: Counter[str] = Counter()
    for counts in distributed.gather_objects(dict(skipped)):
        total.update(counts)
    width = distributed.gather_objects(images[0].shape[1] if images else 0)
    empty = torch.empty(0, max(width), device=device)
    row_N = distributed.gather_uneven(torch.cat(rows) if rows else torch.empty(0, dtype=torch.long, device=device))
    image_ND = distributed.gather_uneven(torch.cat(images) if images else empty)
    text_ND = distributed.gather_uneven(torch.cat(texts) if texts else empty)
    order = row_N.argsort()
    return EncodedPairs(image_ND[order], text_ND[order], row_N[order], dict(total))


@torch.no_grad()
def recall_at_k(
    query_ND: Tensor, candidate_ND: Tensor, ks: Sequence[int] = (1, 5, 10), chunk: int = 1024
) -> list[float]:
    """Share of queries i whose candidate i is among their k best, all ranks sharing the queries; NxN is never held.

    Candidates with exactly the same score as the right one are ordered at random, in expectation: a model that gives
    every pair one score gets k/N, not 1.
    """
    hits_K = torch.zeros(len(ks), dtype=torch.float64)
    count = query_ND.shape[0]
    mine = torch.arange(distributed.rank(), count, distributed.world_size(), device=query_ND.device)
    for index_Q in mine.split(chunk):
        with torch.autocast(query_ND.device.type, enabled=False):  # scores in bf16 would tie
            score_QN = query_ND[index_Q] @ candidate_ND.T
        own_Q1 = score_QN.gather(1, index_Q[:, None])
        better_Q = (score_QN > own_Q1).sum(dim=1)
        equal_Q = (score_QN == own_Q1).sum(dim=1)  # the right one is one of them, unless the score is NaN
        for place, k in enumerate(ks):
            hit_Q = ((k - better_Q) / equal_Q).clamp(0, 1)
            hits_K[place] += torch.where(own_Q1[:, 0].isfinite(), hit_Q, torch.nan).double().sum().cpu()
    device_hits = distributed.all_sum(hits_K.to(query_ND.device, torch.float32))
    return (device_hits / max(count, 1)).tolist()


def retrieval(pairs: EncodedPairs) -> dict[str, float]:
    """`image_to_text_R@k` and `text_to_image_R@k` for k = 1, 5, 10, as shares."""
    ks = (1, 5, 10)
    both = {
        "image_to_text": recall_at_k(pairs.image_ND, pairs.text_ND, ks),
        "text_to_image": recall_at_k(pairs.text_ND, pairs.image_ND, ks),
    }
    return {f"{way}_R@{k}": value for way, values in both.items() for k, value in zip(ks, values)}


def retrieval_examples(
    pairs: EncodedPairs, sources: Sources, decoder: Decoder, count: int, shown: int = 5
) -> tuple[list[RetrievalExample], list[ImageExample]]:
    """Both ways' best `shown` hits of `count` pairs spread evenly over the held-out rows (the same ones every time)."""
    total = len(pairs.row_N)
    chosen = [int((place + 0.5) * total / count) for place in range(min(count, total))]
    text_examples, image_examples = [], []
    for i in chosen:
        with suppress(BadSample, OSError):  # examples are for looking at; a shard that fails now costs one of them
            example = _example(i, pairs, sources, decoder, shown)
            text_examples.append(example[0])
            image_examples.append(example[1])
    return text_examples, image_examples


def _example(
    i: int, pairs: EncodedPairs, sources: Sources, decoder: Decoder, shown: int
) -> tuple[RetrievalExample, ImageExample]:
    shown = min(shown, len(pairs.row_N))
    score_N = pairs.image_ND @ pairs.text_ND[i]
    best = score_N.topk(shown).indices.tolist()
    (image, caption), *found = samples_at(sources, [int(pairs.row_N[j]) for j in (i, *best)], decoder)
    hits = [Hit(picture, text, float(score_N[j]), j == i) for j, (picture, text) in zip(best, found)]
    for_caption = RetrievalExample(caption, int((score_N > score_N[i]).sum()) + 1, image, hits)
    score_N = pairs.text_ND @ pairs.image_ND[i]
    best = score_N.topk(shown).indices.tolist()
    found = samples_at(sources, [int(pairs.row_N[j]) for j in best], decoder)
    captions = [(text, float(score_N[j]), j == i) for j, (_, text) in zip(best, found)]
    return for_caption, ImageExample(image, caption, captions)


def open_class_folder(
    folder: str,
    transform: Callable[[Image.Image], Tensor] | None = None,
    decode: Callable[[bytes], Image.Image] = decode_image,
) -> ImageFolder:
    """FOLDER/CLASS NAME/*.jpg as a data set; UserError where it is none, and when a picture of it cannot be read."""

    def read(path: str) -> Image.Image:
        try:
            return decode(Path(path).read_bytes())
        except BadSample as bad:
            raise UserError(f"eval.zeroshot: {path}: {bad}; replace the picture or remove it") from None

    if not Path(folder).is_dir():
        raise UserError(f"eval.zeroshot={folder!r} is not a folder; it should hold a folder of images for each class")
    try:
        images = ImageFolder(folder, transform=transform, loader=read)
    except FileNotFoundError as error:
        raise UserError(f"eval.zeroshot={folder!r}: {error}") from None
    if len(images.classes) < 2:
        raise UserError(f"eval.zeroshot={folder!r} holds one class, {images.classes[0]!r}; at least two are needed")
    try:
        class_names(images.classes)
    except UserError as error:
        raise UserError(f"eval.zeroshot={folder!r}: {error}") from None
    return images


def class_names(folders: Sequence[str]) -> list[str]:
    """What classes are called in prompts: as their folders, spaces for underscores. Folders called by ImageNet's
    WordNet ids (n01440764) get open_clip's names for them. UserError where an id has none."""
    ids = [name for name in folders if WORDNET_ID.fullmatch(name)]
    known = dict(zip(ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES)) if ids else {}
    if unknown := [name for name in ids if name not in known]:
        raise UserError(
            f"the folder {unknown[0]} is called by a WordNet id that is none of ImageNet's 1,000 classes: a "
            "prompt with an id means nothing. Rename the folder to what the class is called"
        )
    return [known.get(name) or name.replace("_", " ") for name in folders]


@torch.no_grad()
def zeroshot_folder(
    encoder: DualEncoder,
    built: Built,
    folder: str,
    templates: Sequence[str],
    batch_size: int,
    device: torch.device,
    autocast: Callable[..., AbstractContextManager[object]] = nullcontext,
    decode: Callable[[bytes], Image.Image] = decode_image,
    moved: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """`zeroshot_top1` and `zeroshot_top5` on FOLDER/CLASS NAME/*.jpg, class names as the folders are called. `moved` is
    called now and then, as long as it goes on."""
    from torchmetrics.classification import MulticlassAccuracy  # it loads scipy: a quarter of what a start takes

    images = open_class_folder(folder, built.preprocess_eval, decode)
    names = class_names(images.classes)

    def tokenize(texts: list[str]) -> Tensor:
        moved()
        return built.tokenize(texts)

    with autocast():
        classifier_DC = open_clip.build_zero_shot_classifier(
            encoder.clip, tokenize, names, list(templates), device=device
        )
    tops = {k: MulticlassAccuracy(len(names), top_k=min(k, len(names)), average="micro").to(device) for k in (1, 5)}
    mine = Subset(images, range(distributed.rank(), len(images), distributed.world_size()))
    for image_BCHW, label_B in DataLoader(mine, batch_size=batch_size, generator=torch.Generator()):
        moved()
        with autocast():
            image_BD = encoder.image(image_BCHW.to(device))
        score_BC = image_BD @ classifier_DC.float()
        for top in tops.values():
            top.update(score_BC, label_B.to(device))
    return {f"zeroshot_top{k}": float(top.compute()) for k, top in tops.items()}
