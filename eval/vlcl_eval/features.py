"""Images -> features, once for each image, model and way of preparing images, on all ranks; kept in a RowStore.

Rows are positions in the split's index. Only the rows that are asked for are computed: a 5-shot run reads 5 images a
class and the test split, whatever the size of the training split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlcl import distributed
from vlcl.errors import UserError
from vlcl_eval.datasets.images import ImageRows
from vlcl_eval.datasets.records import DataSet, Split
from vlcl_eval.models import EvalModel
from vlcl_eval.row_store import RowStore

CHUNK = 1024  # images a chunk file: what an interruption can cost a rank


@dataclass(frozen=True)
class Extractor:
    """How images become tensors. `crop`: "elevater" or "model" (its own transform). `precision`: fp32 or bf16.
    `variant`: what is done to the tower beside its weights."""

    model: EvalModel
    cache: Path
    device: torch.device
    crop: str = "elevater"
    precision: str = "fp32"
    batch_size: int = 64
    workers: int = 0
    variant: str = ""
    say: Callable[[str], None] = print

    def transform(self, data: DataSet) -> Callable[[Any], Tensor]:
        return self.model.transform(data.center_crop if self.crop == "elevater" else None)

    def features(self, data: DataSet, split: Split, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
        """[len(rows), D] float32 on the CPU, and the rows that went through the tower for it (a collective)."""

        @torch.no_grad()
        def encode(images_BCHW: Tensor) -> Tensor:
            images_BCHW = images_BCHW.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                return self.model.image(images_BCHW).float().cpu()

        self.model.image.model.eval()
        key = self._key(data, split) | {"weights": self.model.weights, "variant": self.variant}
        key["precision"] = self.precision
        return self._rows("features", key, data, split, rows, self.transform(data), encode)

    def pixels(self, data: DataSet, split: Split, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
        """[len(rows), 3, S, S] uint8, resized and cropped, for training the tower; rows read now (a collective)."""
        full = self.transform(data)
        steps: Any = full.transforms[:-1]  # pyright: ignore[reportFunctionMemberAccess]  # all but the normalisation

        def prepare(image: Any) -> Tensor:
            for step in steps:
                image = step(image)
            return (image * 255).round().to(torch.uint8)

        return self._rows("pixels", self._key(data, split), data, split, rows, prepare, lambda images: images)

    def _key(self, data: DataSet, split: Split) -> dict[str, str]:
        preprocess = self.model.preprocess
        way = self.crop if self.crop == "model" else "center crop" if data.center_crop else "squash"
        return {
            "data": data.name,
            "split": split.name,
            "index": split.fingerprint,
            "way": way,
            "image": repr(preprocess),
            "rows": "good images",  # older caches have rows of bad ones, which are zeros
        }

    def _rows(
        self, kind: str, key: dict[str, str], data: DataSet, split: Split, rows: Sequence[int],
        transform: Callable[[Any], Tensor], compute: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, list[int]]:  # fmt: skip
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        store = RowStore(self.cache, f"{kind}-{data.name}-{split.name}-{digest}", key)
        # Rank 0 looks: a chunk that another rank has just written must not change what is left to do.
        stored = store.rows() if distributed.rank() == 0 else {}
        missing = distributed.broadcast([row for row in dict.fromkeys(rows) if row not in stored])
        for line in store.dropped:
            self.say(f"cache: {line}")
        reasons: dict[int, str] = {}
        if missing:
            mine = missing[distributed.rank() :: distributed.world_size()]
            what = f"{data.name} {split.name}: {kind}"
            for bad in distributed.together(lambda: self._compute(store, split, mine, transform, compute, what)):
                reasons |= bad
        if reasons:
            first = min(reasons)
            raise BadImages(data.name, split, reasons, f"{split.refs[first]}: {reasons[first]}")
        values: list[Tensor] = []
        distributed.together(lambda: values.append(store.load(rows)))  # a rank that lacks some must not stop alone
        return values[0], missing

    def _compute(
        self, store: RowStore, split: Split, rows: Sequence[int], transform: Callable[[Any], Tensor],
        compute: Callable[[Tensor], Tensor], what: str,
    ) -> dict[int, str]:  # fmt: skip
        """Store the good rows; what is wrong with the others, which are tried again the next time."""
        images = ImageRows(split.refs, rows, transform, self.model.image_size)
        loader = DataLoader(
            images, batch_size=self.batch_size, num_workers=min(self.workers, len(rows) // self.batch_size),
            generator=torch.Generator(), collate_fn=_collate,
        )  # fmt: skip
        done: list[int] = []
        parts: list[Tensor] = []
        reasons: dict[int, str] = {}
        for batch_rows, images_BCHW, batch_reasons in shown(loader, what, len(rows), self.batch_size):
            good = [place for place, row in enumerate(batch_rows) if row not in batch_reasons]
            done += [batch_rows[place] for place in good]
            parts.append(compute(images_BCHW)[good])
            reasons |= batch_reasons
            if len(done) >= CHUNK:
                store.save(done, torch.cat(parts))
                done, parts = [], []
        if done:
            store.save(done, torch.cat(parts))
        return reasons


class BadImages(UserError):
    """Images that cannot be decoded: `reasons` by row."""

    def __init__(self, name: str, split: Split, reasons: dict[int, str], first: str) -> None:
        super().__init__(
            f"{name}: {len(reasons)} of the {split.name} images cannot be read, the first: {first}. The benchmark "
            "counts every image: mend them, or leave them out with --mode strict"
        )
        self.reasons = reasons


def _collate(samples: list[tuple[int, Tensor, str]]) -> tuple[list[int], Tensor, dict[int, str]]:
    rows, images, reasons = zip(*samples)
    return list(rows), torch.stack(images), {row: why for row, why in zip(rows, reasons) if why}


def shown(loader: Iterable[Any], what: str, total: int | None, batch_size: int) -> Iterator[Any]:
    """The batches, with a bar on a terminal, on rank 0; without an end where `total`, of images, is not known."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if distributed.rank() or not console.is_terminal or (total is not None and total < 4 * batch_size):
        yield from loader
    else:
        batches = None if total is None else -(-total // batch_size)
        yield from track(loader, what, total=batches, console=console, transient=True)
