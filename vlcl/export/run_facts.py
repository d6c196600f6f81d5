"""What a run folder tells about the model in it: settings, data, curves, held-out scores, and pairs to check on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vlcl.checkpoint import step_of
from vlcl.data.captions import captions_from
from vlcl.data.decode import (
    BACKGROUND,
    IMAGE_KEY,
    TEXT_KEY,
    BadSample,
    Keys,
    decode_image,
    image_bytes_from,
    wanted_files,
)
from vlcl.data.manifest import expand_shards, split_sources
from vlcl.data.shard import ShardError, read_samples
from vlcl.errors import UserError
from vlcl.export.check import Pairs
from vlcl.logs import METRICS_FILE, parse_records, read_metrics
from vlcl.metrics import is_held_out
from vlcl.report.page import setting

PAIRS = 16  # to check an export on


@dataclass(frozen=True)
class RunFacts:
    """`config`, `data`, `environment`: the run's files as they are; `records`: its metrics up to `step`."""

    run: Path
    step: int
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    records: list[dict[str, Any]]

    def setting(self, key: str) -> Any:
        """`setting("optim.lr")`, None where the run's config lacks it."""
        return setting(self.config, key)

    def scores(self) -> dict[str, float]:
        """The held-out metrics that were logged at this very step."""
        found = {}
        for record in self.records:
            if record["step"] == self.step:
                found |= {
                    name: value
                    for name, value in record.items()
                    if is_held_out(name) and isinstance(value, int | float)
                }
        return found

    def evaluations(self, weights: str) -> list[dict[str, Any]]:
        """What `vlcl eval elevater` recorded in the run's folder of the very model with this fingerprint."""
        path = self.run / "eval" / "results.jsonl"
        records = (
            parse_records(path.read_text(encoding="utf-8", errors="replace").splitlines()) if path.is_file() else []
        )
        wanted = {"dataset", "metric", "method", "shots", "mode", "seed", "score"}
        return [record for record in records if record.get("weights") == weights and wanted <= record.keys()]

    @property
    def background(self) -> str:
        """What transparent parts of the run's pictures show."""
        return self.setting("data.background") or BACKGROUND

    @property
    def keys(self) -> Keys:
        """Where the run's pictures and captions are in their samples."""
        data = self.config["data"]
        text, in_json = (
            tuple(x) if isinstance(x, list) else x for x in (data.get("text_key"), data.get("json_text_key"))
        )
        return Keys(data.get("image_key") or IMAGE_KEY, text or TEXT_KEY, in_json, data.get("text_lines") is not False)

    def pairs(self) -> Pairs | None:
        """Held-out pairs of the run, or else training pairs; None where its shards are not there any more."""
        for key in ("data.val", "data.train"):
            if patterns := self.setting(key):
                with_captions = self.setting("model.kind") != "views"
                images, captions = _read_pairs(patterns, self.keys, self.background, with_captions)
                if images:
                    where = "held-out" if key == "data.val" else "training"
                    return Pairs(images, captions, f"the first of the run's {where} pairs")
        return None


def read_run(folder: Path | None) -> RunFacts | None:
    """The run that the step folder `folder` is of; None where it is of none."""
    if folder is None or step_of(folder) < 0 or not (folder.absolute().parent / "config.yaml").is_file():
        return None
    run, step = folder.absolute().parent, step_of(folder)
    records = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    return RunFacts(
        run, step, _read(run / "config.yaml"), _read(run / "data.json"), _read(run / "environment.json"),
        [record for record in records if record["step"] <= step],
    )  # fmt: skip


def _read(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON file; nothing where it is damaged or not there: the export goes on without what it says."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_pairs(patterns: Any, keys: Keys, background: str, with_captions: bool) -> tuple[list[Image.Image], list[str]]:
    images, captions = [], []
    try:
        url = expand_shards(split_sources(patterns)[0], "here")[0]
        for sample in islice(read_samples(url, wanted=wanted_files(keys)), 4 * PAIRS):
            if len(images) == PAIRS:
                break
            try:
                files = sample.files
                caption = captions_from(files, keys).texts[0] if with_captions else ""
                image = decode_image(image_bytes_from(files, keys), background=background)
            except BadSample:
                continue
            images.append(image)
            captions.append(caption)
    except (UserError, ShardError, OSError):
        pass  # what could be read is enough, or there is none
    return images, captions
