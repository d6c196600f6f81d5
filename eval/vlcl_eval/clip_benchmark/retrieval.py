"""`vlcl eval retrieval`: recall of images by captions and of captions by images, with CLIP_benchmark's numbers.

    image_retrieval_recall@k   share of captions whose own image is among the k images nearest to them
    text_retrieval_recall@k    share of images that have a caption of their own among the k nearest captions

Pairs come from image-text shards, as `data.val` of a training run names them, or from a `wds_*` retrieval folder of
CLIP_benchmark. An image may have several captions, read as in training: lines of its .txt, or a list in its .json.
Candidates with exactly the same score are ordered at random, in expectation. Shards are read as streams by all ranks;
features are kept, images are not, and scores of all captions with all images are never in memory at once. Misuse: a
comparison of recalls over different numbers of images and captions, which decide how hard the task is.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlcl import distributed
from vlcl.checkpoint import find_model
from vlcl.data import decode
from vlcl.data.captions import captions_from
from vlcl.data.decode import DEFAULT_KEYS, DEFAULT_LIMITS, BadSample, Keys, Limits
from vlcl.data.manifest import expand_shards, split_sources
from vlcl.data.shard import RawSample, ShardError, read_samples
from vlcl.data.urls import without_secrets
from vlcl.errors import UserError
from vlcl.export.run_facts import read_run
from vlcl.zeroshot import KS, recalls_both_ways
from vlcl_eval.clip_benchmark.zeroshot import Record, aligned, left_out, save
from vlcl_eval.datasets.folders import dataset_type, wds_shards
from vlcl_eval.features import shown
from vlcl_eval.models import EvalModel, check_finite, load
from vlcl_eval.results import make_folder

FILE = "retrieval.jsonl"

# Letters: N images, T captions, D width.


@dataclass(frozen=True)
class Sample:
    """`row`: shard and position in one number. `image`: None if the sample is left out. `problems`: reason, place."""

    row: int
    image: Tensor | None
    captions: list[str]
    digest: str
    problems: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Pairs:
    """All ranks' pairs on every rank, in the order of the shards, features of unit length. `count_N`: captions of each
    image; its captions are one after another in `text_TD`."""

    image_ND: Tensor
    text_TD: Tensor
    count_N: Tensor
    problems: list[tuple[str, str]]
    fingerprint: str


def evaluate_retrieval(
    model: str, shards: str, split: str = "test", *, output: str | Path, keys: Keys = DEFAULT_KEYS,
    limits: Limits = DEFAULT_LIMITS, averaged: bool = False, precision: str = "fp32", batch_size: int = 64,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> Record:  # fmt: skip
    """Measure, append the record to OUTPUT/retrieval.jsonl and return it (a collective).

    `shards`: a folder, glob or pattern of shards, several joined by `::`, or a wds folder, whose `split` is read.
    Samples without a readable image and captions that cannot be used are named, counted and left out. UserError where
    there are no shards, a shard is damaged, or nothing is left.
    """
    device, started = distributed.start(), time.perf_counter()
    urls = find_shards(shards, split)
    loaded = load(model, averaged).to(device)
    make_folder(Path(output), FILE)
    say_once = say if distributed.rank() == 0 else lambda text: None
    if note := other_keys(model, keys):
        say_once(note)
    part = distributed.rank(), distributed.world_size()
    stream = SampleStream(urls, loaded.transform(None), *part, keys, limits)
    pairs = encode(loaded, stream, device, precision, batch_size, workers)
    reasons = Counter(reason for reason, _ in pairs.problems)
    if reasons:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        say_once(left_out(f"left out: {counts}", [f"{place}: {reason}" for reason, place in pairs.problems]))
    if not len(pairs.image_ND):
        raise UserError(
            f"{without_secrets(shards)}: no sample has both an image and a caption; see --image-key, --text-key and "
            "its like"
        )
    check_finite(loaded, pairs.image_ND, pairs.text_TD)
    record: Record = {
        "task": "retrieval", "model": loaded.label, "weights": loaded.weights, "dataset": without_secrets(shards),
        "split": split if is_wds(Path(shards), split) else "", "fingerprint": pairs.fingerprint,
        "preprocess": repr(loaded.preprocess), "precision": precision, "metrics": recalls(pairs),
        "sizes": {"images": len(pairs.image_ND), "captions": len(pairs.text_TD), "shards": len(urls)},
        "left_out": dict(reasons),
    }  # fmt: skip
    record = save(Path(output) / FILE, record, started)
    say_once(as_table(record))
    return record


def other_keys(model: str, keys: Keys) -> str:
    """A note where the model is of a run that took its captions from elsewhere; "" where it is not."""
    try:
        run = read_run(find_model(model))
    except UserError:  # a folder of transformers
        return ""
    if run is None or "data" not in run.config or options_of(run.keys) == options_of(keys):
        return ""
    return (
        f"note: captions are read by {options_of(keys)}, and {run.run / 'config.yaml'} says {options_of(run.keys)}: "
        "with these options the recalls are those that training logged"
    )


def options_of(keys: Keys) -> str:
    """The options of the command line that say where captions are."""
    option = "--json-text-key" if keys.json_text else "--text-key"
    lines = " --no-text-lines" if not (keys.lines or keys.json_text) else ""
    return " ".join(f"{option} {shlex.quote(place)}" for place in keys.places) + lines


def as_table(record: Record) -> str:
    """A line a way, in percent."""
    rows = [["in percent", *(f"R@{k}" for k in KS)]]
    for way, metric in (("caption to image", "image_retrieval_recall"), ("image to caption", "text_retrieval_recall")):
        rows.append([f"{way} ({metric})", *(f"{100 * record['metrics'][f'{metric}@{k}']:.2f}" for k in KS)])
    sizes = record["sizes"]
    return f"{record['dataset']}: {sizes['images']:,} images, {sizes['captions']:,} captions\n{aligned(rows)}"


def is_wds(folder: Path, split: str) -> bool:
    return (folder / "dataset_type.txt").is_file() or (folder / split / "nshards.txt").is_file()


def find_shards(shards: str, split: str) -> list[str]:
    """The shards that `evaluate_retrieval` reads, in order. UserError where there are none."""
    folder = Path(shards)
    if not is_wds(folder, split):
        return [url for source in split_sources(shards) for url in expand_shards(source, "run")]
    if dataset_type(folder) != "retrieval":
        raise UserError(
            f"{folder} holds classes, not captions: vlcl eval zeroshot MODEL {folder}. If its shards do hold captions, "
            f"name them: {folder / split}"
        )
    if not (folder / split).is_dir():
        there = sorted(path.parent.name for path in folder.glob("*/nshards.txt"))
        raise UserError(f"--split {split!r}: {folder} has no such folder; it has {', '.join(there) or 'no split'}")
    found = [str(path) for path in wds_shards(folder, split)]
    if not found:
        raise UserError(
            f"{folder / split / 'nshards.txt'} says 0: there are no shards to read; fetch the data set again"
        )
    return found


class SampleStream(IterableDataset):
    """This reader's samples. With no more readers than shards each reads whole shards of its own; else the readers of a
    shard share its samples. A damaged shard is a str that says so, as an exception would come with a traceback."""

    def __init__(
        self, urls: Sequence[str], transform: Callable[[Any], Tensor], rank: int, world_size: int,
        keys: Keys = DEFAULT_KEYS, limits: Limits = DEFAULT_LIMITS,
    ) -> None:  # fmt: skip
        self.urls, self.transform, self.keys, self.limits = urls, transform, keys, limits
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Sample | str]:
        worker = get_worker_info()
        num_workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, num_readers = self.rank * num_workers + number, self.world_size * num_workers
        for shard, part, parts in shares(len(self.urls), reader, num_readers):
            url = self.urls[shard]
            try:
                wanted = decode.wanted_files(self.keys, self.limits)
                for position, raw in enumerate(read_samples(url, wanted=wanted)):
                    if position % parts == part:
                        row = (shard << 32) + position
                        yield read_sample(raw, row, url, self.transform, self.keys, self.limits)
            except (ShardError, OSError) as error:
                yield str(error) if isinstance(error, ShardError) else without_secrets(f"{url}: {error}")


def shares(num_shards: int, reader: int, num_readers: int) -> Iterator[tuple[int, int, int]]:
    """(shard, part, parts): what one reader of many reads; together they read each sample once."""
    for shard in range(reader % num_shards, num_shards, num_readers):
        first = shard % num_readers
        yield shard, (reader - first) // num_shards, len(range(first, num_readers, num_shards))


def read_sample(
    raw: RawSample, row: int, url: str, transform: Callable[[Any], Tensor], keys: Keys, limits: Limits
) -> Sample:
    place = f"{without_secrets(url)}, sample {raw.key}"
    try:
        data = decode.image_bytes_from(raw.files, keys)
        captions = captions_from(raw.files, keys, limits)
        digest = hashlib.sha256(data + "\0".join(["", *captions.texts]).encode()).hexdigest()
        image = transform(decode.decode_image(data, limits))
        return Sample(row, image, list(captions.texts), digest, [_problem(bad, place) for bad in captions.left_out])
    except BadSample as bad:
        return Sample(row, None, [], "", [_problem(bad, place)])


def _problem(bad: BadSample, place: str) -> tuple[str, str]:
    return bad.reason, f"{place} ({bad.detail})" if bad.detail else place


@torch.no_grad()
def encode(
    model: EvalModel, stream: SampleStream, device: torch.device, precision: str, batch_size: int, workers: int
) -> Pairs:
    """Features of this rank's samples, then of all ranks. Raises UserError, on all ranks, for a damaged shard."""
    loader = DataLoader(
        stream, batch_size=batch_size, num_workers=workers, generator=torch.Generator(), collate_fn=_collate
    )
    images, samples, damaged = [], [], []
    for images_BCHW, batch, failures in shown(loader, "reading batches", None, batch_size):
        damaged += failures
        samples += batch
        if images_BCHW is not None:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                features_BD = model.image(images_BCHW.to(device, non_blocking=True))
            images.append(F.normalize(features_BD.float(), dim=1))
    damaged = sorted({text for texts in distributed.gather_objects(damaged) for text in texts})
    if damaged:
        raise UserError(f"{left_out('damaged shards', damaged)}\nFetch them again, or name the whole ones alone")
    listed = list(chain.from_iterable(distributed.gather_objects(samples)))
    width = max(distributed.gather_objects(images[0].shape[1] if images else 0))
    image_ND = distributed.gather_uneven(torch.cat([torch.empty(0, width, device=device), *images]))
    # Images come in the order of those samples of `listed` that have one.
    place = {row: n for n, row in enumerate(row for row, captions, _, _ in listed if captions)}
    listed.sort(key=lambda sample: sample[0])
    kept = [sample for sample in listed if sample[1]]
    order = torch.tensor([place[row] for row, _, _, _ in kept], dtype=torch.long, device=device)
    texts = [text for _, captions, _, _ in kept for text in captions]
    return Pairs(
        image_ND[order],
        encode_texts(model, texts, width, device),
        torch.tensor([len(captions) for _, captions, _, _ in kept], dtype=torch.long, device=device),
        [problem for _, _, _, problems in listed for problem in problems],
        hashlib.sha256("".join(digest for _, _, digest, _ in kept).encode()).hexdigest()[:16],
    )


def encode_texts(model: EvalModel, texts: Sequence[str], width: int, device: torch.device) -> Tensor:
    """[T, D] unit features (a collective). Each different text once, so that equal captions score exactly the same."""
    different = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = list(different)[rank::world_size]
    own_UD = F.normalize(model.texts(mine), dim=1) if mine else torch.empty(0, width, device=device)
    found_UD = distributed.gather_uneven(own_UD)
    starts = [0]
    for r in range(world_size):
        starts.append(starts[-1] + len(range(r, len(different), world_size)))
    place = [starts[different[text] % world_size] + different[text] // world_size for text in texts]
    return found_UD[torch.tensor(place, dtype=torch.long, device=device)]


def _collate(items: list[Sample | str]) -> tuple[Tensor | None, list[tuple[Any, ...]], list[str]]:
    """The images that are there; (row, captions, digest, problems) of each sample; damaged shards."""
    samples = [item for item in items if isinstance(item, Sample)]
    images = [sample.image for sample in samples if sample.image is not None]
    rest = [(sample.row, sample.captions, sample.digest, sample.problems) for sample in samples]
    return torch.stack(images) if images else None, rest, [item for item in items if isinstance(item, str)]


def recalls(pairs: Pairs, chunk: int = 1024) -> dict[str, float]:
    """`image_retrieval_recall@k` and `text_retrieval_recall@k`, as shares of 1 (a collective)."""
    to_text, to_image = recalls_both_ways(pairs.image_ND, pairs.text_TD, pairs.count_N, KS, chunk)
    both = {"image_retrieval_recall": to_image, "text_retrieval_recall": to_text}
    return {f"{name}@{k}": value for name, values in both.items() for k, value in zip(KS, values)}
