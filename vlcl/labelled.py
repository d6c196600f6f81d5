"""Pictures with labels, which classifiers of features are asked about: shards, or a folder of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from vlcl import distributed
from vlcl.batch import Batch
from vlcl.config import Config
from vlcl.data.decode import BadSample
from vlcl.data.manifest import Reach
from vlcl.data.preprocess import seed_generators
from vlcl.data.reader import Sources, read_run
from vlcl.data.remote import AS_DEFAULT, Fetching
from vlcl.data.stream import EvalStream, make_loader
from vlcl.data.views import LabelledReader, PictureDecoder
from vlcl.errors import UserError
from vlcl.from_config import how_far, open_sources, picture_decoder_of


class LabelledPictures:
    """Pictures with labels: shards with a `cls` file a sample, or FOLDER/CLASS/*.jpg, whose classes are numbered in the
    order of their names. UserError where they are neither."""

    def __init__(
        self, name: str, where: str | list[str] | Sources, decoder: PictureDecoder, reach: Reach = "fetch",
        fetching: Fetching = AS_DEFAULT,
    ) -> None:  # fmt: skip
        """name: the setting or argument that names them, for messages."""
        self.name, self.decoder = name, decoder
        self.folder: ImageFolder | None = None
        if isinstance(where, str) and is_class_folder(Path(where)):
            self.folder = ImageFolder(where, loader=self._read)
        self.sources = where if isinstance(where, Sources) else None
        if self.folder is None and not isinstance(where, Sources):
            self.sources = open_sources(where, None, reach, fetching)

    def __len__(self) -> int:
        return len(self.folder) if self.folder is not None else self.sources.num_samples if self.sources else 0

    @property
    def class_names(self) -> list[str]:
        return [] if self.folder is None else self.folder.classes

    def batches(
        self, preprocess: Callable[[Image.Image], Tensor], size: int, workers: int, device: torch.device,
        seed: int | None = None, pixels: bool = False,
    ) -> Iterator[Batch]:  # fmt: skip
        """This rank's share, as `encode_labelled` takes it. seed: of a preprocessing that is random (it seeds the
        global generators before each picture). pixels: those of shards may be uint8, for a model that normalizes."""
        rank, world = distributed.rank(), distributed.world_size()
        if self.sources is not None:
            reader = LabelledReader(self.sources, self.decoder, preprocess, seed, pixels)
            yield from make_loader(EvalStream(self.sources, size, reader, rank, world), workers, device)
            return
        assert self.folder is not None
        mine = range(len(self.folder) * rank // world, len(self.folder) * (rank + 1) // world)
        for start in range(mine.start, mine.stop, size):
            rows = range(start, min(start + size, mine.stop))
            pictures, labels = [], []
            for row in rows:
                image, label = self.folder[row]
                if seed is not None:
                    seed_generators(seed, row)
                pictures.append(preprocess(image))
                labels.append(label)
            yield Batch(torch.stack(pictures), torch.tensor(labels), torch.tensor(rows))

    def picture(self, row: int) -> tuple[Image.Image, str]:
        """A picture and what its class is called. Raises BadSample."""
        if self.folder is not None:
            image, label = self.folder[row]
            return image, self.folder.classes[label]
        assert self.sources is not None
        shard = int(np.searchsorted(self.sources.offsets, row, side="right")) - 1
        place = row - self.sources.offsets[shard]
        ((_, sample),) = read_run(self.sources.urls[shard], place, place + 1, fetching=self.sources.fetching)
        if isinstance(sample, BadSample):
            raise sample
        return self.decoder.image(sample.files), f"class {self.decoder.label(sample.files)}"

    def _read(self, path: str) -> Image.Image:
        try:
            return self.decoder.image({"png": Path(path).read_bytes()})
        except BadSample as bad:
            raise UserError(f"{self.name}: {path}: {bad}; replace the picture or remove it") from None


def is_class_folder(folder: Path) -> bool:
    """Whether it has folders of pictures, and no shards."""
    if not folder.is_dir() or any(folder.glob("*.tar")):
        return False
    return any(path.is_dir() and not any(path.glob("*.tar")) for path in folder.iterdir())


def open_bank(config: Config, train: Sources) -> LabelledPictures | None:
    """The neighbours of a run; None where nothing is asked of them."""
    if config.model.kind != "views" or not (config.data.val or config.data.test):
        return None
    decoder, how = picture_decoder_of(config.data), how_far(config.data)
    return LabelledPictures("views.knn", config.views.knn or train, decoder, *how)
