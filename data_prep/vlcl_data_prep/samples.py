"""What `vlcl data show` and `vlcl data stats` look at: shards, or the data of a run, read by the settings of training.

Shards that are typed, and options such as --text-key, become the same `Config` that a run has, so that both are read
alike; rows are those of the manifests.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlcl.config import Config, load_config
from vlcl.data.archive import local_path
from vlcl.data.decode import BadSample, readable_formats
from vlcl.data.manifest import Reach, common_folder, expand_shards, open_source, show_pattern, split_sources
from vlcl.data.shard import RawSample, ShardError, Wanted, read_samples
from vlcl.errors import UserError
from vlcl_data_prep.index import check_writable, named_sources

Split = Literal["train", "val", "test"]
UNREADABLE = "unreadable shard"
NEAR = 64  # samples between two wanted ones that are read rather than looked for anew

SplitOption = Annotated[Split, typer.Option(help="Of a RUN: the pairs of data.train, data.val or data.test.")]
ImageKeyOption = Annotated[
    str | None, typer.Option(help="Suffixes of the image, first that is there: data.image_key.", show_default=False)
]
TextKeyOption = Annotated[
    list[str] | None, typer.Option(help="Suffix of the captions: data.text_key; for a list, again for each.")
]
JsonTextKeyOption = Annotated[
    list[str] | None,
    typer.Option(help="Take captions from this key of the sample's .json: data.json_text_key; again for each."),
]
TextLinesOption = Annotated[
    bool | None,
    typer.Option("--text-lines/--no-text-lines", help="Each line of the file is a caption.", show_default=False),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, as data.background=black.")
]


@dataclass(frozen=True)
class Samples:
    """Shards and how training reads them."""

    name: str
    """what was typed, for headings"""
    folder: str
    """where a page about them lies by default"""
    config: Config
    patterns: tuple[str | Sequence[str], ...]
    """a source each"""
    manifests: tuple[str | None, ...]
    reach: Reach

    def urls(self) -> list[str]:
        """All shards, in row order. Raises UserError."""
        return [url for pattern in self.patterns for url in expand_shards(pattern, self.reach)]

    def indexed(self) -> "Rows":
        """Shards with the rows of their manifests. Raises UserError where there are none."""
        sources = [open_source(pattern, path, self.reach) for pattern, path in zip(self.patterns, self.manifests)]
        return Rows(
            [url for source in sources for url in source.urls],
            [shard.samples for source in sources for shard in source.manifest.shards],
        )


class Rows:
    """Rows of shards, counted through, and where they are. counts: samples of each shard."""

    def __init__(self, urls: Sequence[str], counts: Sequence[int]) -> None:
        self.urls, self.offsets = urls, [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self.offsets[-1]

    def shard_of(self, row: int) -> int:
        """The number of the shard that has the row."""
        return bisect_right(self.offsets, row) - 1

    def read(self, rows: Sequence[int], wanted: Wanted) -> Iterator[tuple[int, RawSample | BadSample]]:
        """(row, sample) of sorted rows; BadSample where the shard cannot be read. Near ones in one go."""
        at = 0
        while at < len(rows):
            shard, last = self.shard_of(rows[at]), at
            near = NEAR if local_path(self.urls[shard]) else len(self)  # a stream is read from its start
            while last + 1 < len(rows) and rows[last + 1] < min(self.offsets[shard + 1], rows[last] + near):
                last += 1
            yield from self._of_shard(shard, rows[at : last + 1], wanted)
            at = last + 1

    def _of_shard(self, shard: int, rows: Sequence[int], wanted: Wanted) -> Iterator[tuple[int, RawSample | BadSample]]:
        first, left = self.offsets[shard], list(reversed(rows))
        start, stop = rows[0] - first, rows[-1] - first + 1
        problem = BadSample(UNREADABLE, f"{self.urls[shard]} has fewer samples than its manifest says")
        try:
            for row, sample in enumerate(islice(read_samples(self.urls[shard], start, wanted), stop - start), rows[0]):
                if row == left[-1]:
                    left.pop()
                    yield row, sample
        except (ShardError, OSError) as error:
            problem = BadSample(UNREADABLE, str(error))
        for row in reversed(left):
            yield row, problem


def open_samples(what: Sequence[str], split: Split = "train", **options: Any) -> Samples:
    """SHARDS, or the RUN folder or config file that `what` is alone. `options`: see `overrides`. Raises UserError."""
    if config_file := _config_file(what):
        config = load_config(config_file, overrides(**options))
        pattern, manifest = (getattr(config.data, key) for key in _keys_of_split(split))
        if pattern is None:
            raise UserError(f"{config_file} has no data.{split}; choose another with --split")
        reach: Reach = "run" if config.data.allow_pipe else "fetch"
        patterns = split_sources(pattern)
        manifests = [manifest] if isinstance(manifest, str) else manifest or [None] * len(patterns)
        folder = os.path.dirname(config_file) if os.path.isdir(what[0]) else ""
        return Samples(f"{what[0]}, data.{split}", folder, config, tuple(patterns), tuple(manifests), reach)
    patterns = named_sources(what)
    if "" in patterns:
        raise UserError("the name of the shards is empty; name a folder, a glob, or NAME-{0000..0099}.tar")
    config = load_config(None, [f"data.train={json.dumps(list(what))}", *overrides(**options)])
    urls = [url for pattern in patterns for url in expand_shards(pattern, "run")]
    folder = common_folder(urls) if all(map(local_path, urls)) else ""
    return Samples(show_pattern(what), folder, config, tuple(patterns), (None,) * len(patterns), "run")


def overrides(
    *,
    image_key: str | None = None,
    text_key: Sequence[str] | None = None,
    json_text_key: Sequence[str] | None = None,
    text_lines: bool | None = None,
    limit: Sequence[str] | None = None,
    settings: Sequence[str] | None = None,
) -> list[str]:
    """The options of a command as settings of a config."""
    values: dict[str, object] = {"image_key": image_key, "text_lines": text_lines}
    values["text_key"] = list(text_key) if text_key else None
    values["json_text_key"] = list(json_text_key) if json_text_key else None
    found = [f"data.{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
    return [*found, *(f"data.{limit}" for limit in limit or []), *(settings or [])]


def output_path(given: str | None, samples: Samples, name: str) -> str:
    """Where a page is written. UserError now, before the work, where it cannot be."""
    path = given or os.path.join(samples.folder, name)
    check_writable(path, "--output HTML")
    return path


def _config_file(what: Sequence[str]) -> str | None:
    """The settings of the run or the YAML file that was typed; None for shards."""
    if len(what) != 1:
        return None
    path = Path(what[0]).expanduser()
    if path.is_dir() and (path / "config.yaml").is_file():
        return str(path / "config.yaml")
    return str(path) if path.suffix in (".yaml", ".yml") else None


def _keys_of_split(split: Split) -> tuple[str, str]:
    return split, "manifest" if split == "train" else f"{split}_manifest"


@dataclass(frozen=True)
class PictureFile:
    """What the header of a picture says. width, height: as stored, in pixels, before it is turned."""

    format: str
    mode: str
    width: int
    height: int
    changes: tuple[str, ...]
    """what the decoder does to it (vlcl/data/decode.py), in words"""


def look_at(data: bytes, background: str) -> PictureFile | None:
    """The header of a picture that can be decoded; None where Pillow cannot read it."""
    import io

    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=readable_formats())
        turned = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow's plugins raise nearly any type on damaged files
        return None
    changes = [f"{image.mode} made RGB"] * (image.mode != "RGB")
    if image.mode.startswith("I") or image.mode == "F":
        changes = [f"{image.mode} scaled to 8 bits"]
    if image.has_transparency_data:
        changes.append(f"transparency laid on {background}")
    if turned in range(2, 9):
        changes.append("turned by its EXIF orientation")
    if getattr(image, "is_animated", False):
        changes.append("the first of several pictures")
    if image.info.get("icc_profile"):
        changes.append("ICC profile not applied")
    return PictureFile(image.format or "?", image.mode, image.width, image.height, tuple(changes))
