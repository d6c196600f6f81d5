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
from vlcl.data.reader import Decoder, Sources, captioned_at
from vlcl.errors import UserError
from vlcl.model import Built, DualEncoder
from vlcl.paths import check_class_folder
from vlcl.report.page import Hit, ImageExample, RetrievalExample

WORDNET_ID = re.compile(r"n\d{8}")

KS = (1, 5, 10)
MOST_SCORES = 1 << 26  # numbers in a chunk of scores: 256 MiB

# Letters here: N pictures, T captions, M captions of a picture at most, Q queries of a chunk, C candidates, D width.


@dataclass(frozen=True)
class EncodedPairs:
    """All ranks' pictures and captions on every rank, in row order. count_N: captions of each picture, at least one,
    one after another in text_TD."""

    image_ND: Tensor
    text_TD: Tensor
    count_N: Tensor
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
    images, texts, keys, counts, rows = [], [], [], [], []
    skipped: Counter[str] = Counter()
    for batch in batches:
        skipped.update(batch.skipped)
        if not len(batch):
            continue
        first, *rest = batch.tokens_BL.to(device, non_blocking=True).split(len(batch))
        with autocast():
            features = encoder(batch.images_BCHW.to(device, non_blocking=True), first)
            texts += [features.text_BD, *(encoder.text(tokens) for tokens in rest)]
        images.append(features.image_BD)
        keys.append(_hashed(batch.tokens_BL).to(device))
        counts.append((torch.ones_like(batch.row_B) if batch.count_B is None else batch.count_B).to(device))
        rows.append(batch.row_B.to(device))
    total: Counter[str] = Counter()
    for of_rank in distributed.gather_objects(dict(skipped)):
        total.update(of_rank)
    width = distributed.gather_objects(images[0].shape[1] if images else 0)
    empty, none = torch.empty(0, max(width), device=device), torch.empty(0, dtype=torch.long, device=device)
    row_N, count_N, key_T = (distributed.gather_uneven(torch.cat([none, *x])) for x in (rows, counts, keys))
    image_ND, text_TD = (distributed.gather_uneven(torch.cat([empty, *x])) for x in (images, texts))
    order = row_N.argsort()
    order_T = order.argsort().repeat_interleave(count_N).argsort(stable=True)
    text_TD = text_TD[_first_of_equals(key_T)][order_T]
    return EncodedPairs(image_ND[order], text_TD, count_N[order], row_N[order], dict(total))


def _hashed(tokens_TL: Tensor) -> Tensor:
    """[T] a number for each caption, the same for equal ones and, but for one chance in 2^63, no others."""
    generator = torch.Generator().manual_seed(0)
    factor_L = torch.randint(-(1 << 63), (1 << 63) - 1, (tokens_TL.shape[1],), generator=generator)
    return (tokens_TL.long() * (2 * factor_L + 1)).sum(dim=1)


def _first_of_equals(key_T: Tensor) -> Tensor:
    """For each place the first with the same key: features of equal captions are to be equal to the bit, and are not
    where they were in batches of other sizes."""
    _, group_T = key_T.unique(return_inverse=True)
    place_T = torch.arange(len(key_T), device=key_T.device)
    first_U = torch.full_like(place_T, len(key_T)).scatter_reduce(0, group_T, place_T, "amin")
    return first_U[group_T]


def recall_at_k(query_ND: Tensor, candidate_ND: Tensor, ks: Sequence[int] = KS, chunk: int = 1024) -> list[float]:
    """Share of queries i whose candidate i is among their k best: see `recall_of_sets`."""
    return recall_of_sets(query_ND, candidate_ND, lambda index_Q: index_Q[:, None], ks, chunk)


@torch.no_grad()
def recall_of_sets(
    query_ND: Tensor,
    candidate_CD: Tensor,
    own: Callable[[Tensor], Tensor],
    ks: Sequence[int] = KS,
    chunk: int = 1024,
) -> list[float]:
    """Share of queries with one of their own candidates among their k best, all ranks sharing the queries; NxC is never
    held. NaN where a query's score is.

    own: [Q] queries -> [Q, M] places of their candidates, at least one, -1 where a query has fewer than M. Candidates
    with exactly the same score are ordered at random, in expectation: a model that gives every pair one score gets k/N,
    not 1. Of E candidates that share the best own score, e are own; with b candidates above it, p = k - b places are
    left for them:

        P(hit) = 1 - (E-e)/E * (E-e-1)/(E-1) * ... * (E-e-p+1)/(E-p+1)
    """
    hits_K = torch.zeros(len(ks), dtype=torch.float64)
    rows = max(1, min(chunk, MOST_SCORES // max(len(candidate_CD), 1)))
    mine = torch.arange(distributed.rank(), len(query_ND), distributed.world_size(), device=query_ND.device)
    for index_Q in mine.split(rows):
        with torch.autocast(query_ND.device.type, enabled=False):  # scores in bf16 would tie
            score_QC = query_ND[index_Q] @ candidate_CD.T
        own_QM = own(index_Q)
        own_score_QM = score_QC.gather(1, own_QM.clamp(min=0)).masked_fill(own_QM < 0, -torch.inf)
        best_Q1 = own_score_QM.max(dim=1, keepdim=True).values
        better_Q = (score_QC > best_Q1).sum(dim=1).cpu()
        equal_Q = (score_QC == best_Q1).sum(dim=1).cpu()
        own_Q = (own_score_QM == best_Q1).sum(dim=1).cpu()
        known_Q = best_Q1[:, 0].isfinite().cpu()
        for place, k in enumerate(ks):
            miss_Q = torch.ones(len(index_Q), dtype=torch.float64)
            for j in range(k):
                left_Q = (equal_Q - own_Q - j).clamp(min=0).double() / (equal_Q - j).clamp(min=1)
                miss_Q *= torch.where(better_Q + j < k, left_Q, 1.0)
            hits_K[place] += torch.where(known_Q, 1 - miss_Q, torch.nan).sum()
    return (distributed.all_sum(hits_K.to(query_ND.device)) / max(len(query_ND), 1)).tolist()


def recalls_both_ways(
    image_ND: Tensor, text_TD: Tensor, count_N: Tensor, ks: Sequence[int] = KS, chunk: int = 1024
) -> tuple[list[float], list[float]]:
    """Image to text: share of pictures with a caption of their own among the k best; text to image: share of captions
    whose own picture is. Picture n has count_N[n] captions, at least one, one after another in text_TD."""
    start_N = count_N.cumsum(0) - count_N
    place_M = torch.arange(int(count_N.max()) if len(count_N) else 1, device=count_N.device)
    image_T = torch.arange(len(image_ND), device=count_N.device).repeat_interleave(count_N)
    assert len(image_T) == len(text_TD)

    def captions_of(index_Q: Tensor) -> Tensor:
        return torch.where(place_M < count_N[index_Q, None], start_N[index_Q, None] + place_M, -1)

    return (
        recall_of_sets(image_ND, text_TD, captions_of, ks, chunk),
        recall_of_sets(text_TD, image_ND, lambda index_Q: image_T[index_Q, None], ks, chunk),
    )


def retrieval(pairs: EncodedPairs) -> dict[str, float]:
    """`image_to_text_R@k` and `text_to_image_R@k` for k = 1, 5, 10, as shares."""
    both = recalls_both_ways(pairs.image_ND, pairs.text_TD, pairs.count_N)
    ways = ("image_to_text", "text_to_image")
    return {f"{way}_R@{k}": value for way, values in zip(ways, both) for k, value in zip(KS, values)}


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
    """Of the picture i and its first caption."""
    first_N = pairs.count_N.cumsum(0) - pairs.count_N
    first = int(first_N[i])
    score_N = pairs.image_ND @ pairs.text_TD[first]
    best = score_N.topk(min(shown, len(score_N))).indices.tolist()
    (image, own), *found = captioned_at(sources, [int(pairs.row_N[j]) for j in (i, *best)], decoder)
    hits = [Hit(picture, texts[0], float(score_N[j]), j == i) for j, (picture, texts) in zip(best, found)]
    for_caption = RetrievalExample(own[0], int((score_N > score_N[i]).sum()) + 1, image, hits)
    score_T = pairs.text_TD @ pairs.image_ND[i]
    best = score_T.topk(min(shown, len(score_T))).indices
    owners = (torch.searchsorted(first_N, best, right=True) - 1).tolist()
    found = captioned_at(sources, [int(pairs.row_N[n]) for n in owners], decoder)
    captions = [
        (texts[t - int(first_N[n])], float(score_T[t]), n == i)
        for t, n, (_, texts) in zip(best.tolist(), owners, found)
    ]
    return for_caption, ImageExample(image, own[0], captions)


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

    check_class_folder(folder)
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
