"""The model card of an exported folder: what was trained on what, how good it is, how to use it, how it was checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from vlcl import __version__
from vlcl.config.sections import AUGMENTATION, DataConfig
from vlcl.data.manifest import split_sources
from vlcl.export.check import TOLERANCE
from vlcl.export.format import Format, Job
from vlcl.export.formats import FORMATS
from vlcl.export.run_facts import RunFacts
from vlcl.fingerprint import fingerprint_of
from vlcl.metrics import EPOCH, IMAGE_TO_TEXT, LOSSES, TEST_SKIPPED, VAL_SKIPPED, ZEROSHOT, metric_of
from vlcl.report.figures import points_of
from vlcl.report.page import pairs_in_words
from vlcl.report.text import markdown_table
from vlcl.start_weights import architectures

README, CURVE = "README.md", "training_curve.png"
CITATION = """```bibtex
@inproceedings{chen2022largebatch,
  title     = {Why do We Need Large Batchsizes in Contrastive Learning? {A} Gradient-Bias Perspective},
  author    = {Chen, Changyou and Zhang, Jianyi and Xu, Yi and Chen, Liqun and Duan, Jiali and Chen, Yiran and
               Tran, Son and Zeng, Belinda and Chilimbi, Trishul},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}
```"""


@dataclass(frozen=True)
class Card:
    """All that a card tells. `name`: the folder, or REPO on a hub; `formats`: those that were written."""

    name: str
    job: Job
    formats: Sequence[Format]
    averaged: bool
    license: str | None
    facts: RunFacts | None

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Records of `vlcl eval elevater` that are of these very weights."""
        return self.facts.evaluations(fingerprint_of(self.job.built)) if self.facts else []

    @cached_property
    def shown(self) -> list[Format]:
        """The formats in the card's order."""
        return sorted(self.formats, key=lambda x: x.card_place)


def write_card(folder: Path, card: Card) -> None:
    """README.md and, of a run that logged something, the training curve."""
    curve = card.facts is not None and draw_curve(card.facts.records, folder / CURVE)
    parts = [
        _front_matter(card), f"# {card.name.split('/')[-1]}", _summary(card), "## Use it", *_usage(card),
        *_training(card, curve), *_evaluation(card), "## How the files were checked", *_checks(card), "## Citation",
        _citation(card),
    ]  # fmt: skip
    (folder / README).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(card: Card) -> str:
    fields = {
        "license": card.license or "unknown",
        "library_name": card.shown[0].name,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["vlcl", "clip", *(x.tag for x in card.shown if x.tag)],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _summary(card: Card) -> str:
    built = card.job.built
    parameters = sum(p.numel() for p in built.encoder.clip.parameters()) / 1e6
    pictures = built.config["preprocess_cfg"]
    side = pictures["size"] if isinstance(pictures["size"], int) else pictures["size"][0]
    name = " or ".join(f"`{name}`" for name in architectures(built.config)) or "an architecture of its own"
    weights = "the moving average of the weights" if card.averaged else "the trained weights"
    lines = [
        f"A dual encoder of images and texts ({name}, {parameters:.1f} million parameters): pictures of {side} x "
        f"{side} pixels and texts of up to {card.job.length} tokens become vectors of "
        f"{built.config['model_cfg']['embed_dim']} numbers, near each other where they belong together. Pictures are "
        f"resized ({pictures['interpolation']}, resize_mode={pictures['resize_mode']}) and normalized with mean "
        f"{_colours(pictures['mean'])} and standard deviation {_colours(pictures['std'])}. Exported by "
        f"vlcl {__version__} from {weights}"
        + (f" at step {card.facts.step:,}" if card.facts else "")
        + (", stored as float16." if card.job.half else ".")
    ]
    if card.license is None:
        lines.append("No licence was stated by who exported it.")
    lines += [remark for x in FORMATS if (remark := x.remark(card.job))]
    if note := built.note or (card.facts and card.facts.environment.get("start_note")):
        lines.append(f"Of its start weights: {note}.")
    return "\n".join(lines)


def _colours(value: float | Sequence[float]) -> str:
    return ", ".join(f"{x:.4g}" for x in ([value] if isinstance(value, int | float) else value))


def _usage(card: Card) -> list[str]:
    where = "" if "/" in card.name else f" Run this from the folder that holds `{card.name}`."
    return [f"`picture.jpg` is any picture of yours.{where}",
            *(part for x in card.shown for part in x.usage(card.name, card.job))]  # fmt: skip


def _training(card: Card, curve: bool) -> list[str]:
    if card.facts is None:
        return []
    facts, pairs = card.facts, card.facts.data.get("pairs")
    total = facts.records[-1].get("total_steps") if facts.records else None
    rows = {
        "pairs": f"{pairs:,}" if isinstance(pairs, int) else None,
        "shards": _shards(facts.setting("data.train")),
        "passes over the data": _last(facts, EPOCH.name),
        "steps": f"{facts.step:,}" + (f" of {total:,}" if isinstance(total, int) and total > facts.step else ""),
        "batch": facts.setting("train.batch_size"),
        "loss": facts.setting("loss.name"),
        "learning rate": facts.setting("optim.lr"),
        "precision": facts.setting("train.precision"),
        "augmentation": _augmentation(facts),
        "start": facts.setting("model.pretrained") or "random weights",
    }
    shown = [(name, str(value)) for name, value in rows.items() if value is not None]
    table = markdown_table([("", ""), *shown], numbers=[])
    return ["## Training", table, *([f"![Loss and held-out recall over steps]({CURVE})"] if curve else [])]


def _augmentation(facts: RunFacts) -> str | None:
    """What was done to training pictures: the kind, and the settings of it that are not their defaults."""
    kind, parts = facts.setting("data.augment"), []
    for key in AUGMENTATION if kind == "crop" else ():
        value = facts.setting(f"data.{key}")
        if value is not None and value != DataConfig.model_fields[key].get_default(call_default_factory=True):
            parts.append(f"{key}={value}")
    return None if kind is None else ", ".join([str(kind), *parts])


def _shards(patterns: Any) -> str | None:
    """The shards' names without what is nobody's business: commands, keys in addresses, folders of this machine."""
    if not isinstance(patterns, str | list):
        return None
    names = []
    for pattern in split_sources(patterns):
        text = pattern if isinstance(pattern, str) else ", ".join(pattern)
        if text.startswith("pipe:"):
            names.append("(a command)")
        elif "://" in text:
            parts = urlsplit(text)
            names.append(f"{parts.scheme}://{parts.hostname}{parts.path}")
        else:
            names.append("/".join(Path(text).parts[-2:]))
    return " :: ".join(names)


def _last(facts: RunFacts, name: str) -> str | None:
    _, values = points_of(facts.records, name)
    return f"{values[-1]:.3g}" if values else None


def _evaluation(card: Card) -> list[str]:
    scores = card.facts.scores() if card.facts else {}
    skipped = (VAL_SKIPPED.name, TEST_SKIPPED.name)
    rows = [(_metric(name), _score(name, value)) for name, value in scores.items() if name not in skipped]
    parts = []
    if rows and card.facts is not None:
        held_out = pairs_in_words(card.facts.environment)
        text = "Measured in training at this step" + (f", on {held_out}" if held_out else "")
        if card.facts.setting("train.ema") and not card.averaged:
            text += "; of the moving average of the weights, which this is not"
        parts += [f"{text}.", markdown_table([("metric", "score"), *rows], numbers=[1])]
    return ["## Evaluation", *parts, *_elevater(card.evaluations)] if parts or card.evaluations else []


def _elevater(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row a data set, method and number of shots: means over seeds, by mode."""
    if not records:
        return []
    groups: dict[tuple[str, ...], dict[str, dict[Any, float]]] = {}
    cut = False
    for record in records:
        sample = "" if record.get("complete") else " †"
        cut = cut or bool(sample)
        place = (f"{record['dataset']}{sample}", str(record["metric"]), str(record["method"]), str(record["shots"]))
        groups.setdefault(place, {}).setdefault(record["mode"], {})[record["seed"]] = record["score"]
    rows = [
        (*place, *(_mean(modes.get(mode, {}).values()) for mode in ("elevater", "strict")))
        for place, modes in groups.items()
    ]
    head = ("data set", "metric", "method", "shots", "elevater", "strict")
    text = (
        "Image classification by `vlcl eval elevater`, of these very weights; percent, means over seeds. elevater: the "
        "best epoch on the test set, as the benchmark has it; strict: the last epoch."
    )
    note = ["† Not the benchmark's whole data set: not comparable with published figures."] if cut else []
    return [text, markdown_table([head, *rows], numbers=[4, 5]), *note]


def _mean(scores: Collection[float]) -> str:
    return f"{sum(scores) / len(scores):.2f}" if scores else ""


def _score(name: str, value: float) -> str:
    metric = metric_of(name)
    return f"{100 * value:.2f} %" if metric is None or metric.unit == "share" else f"{value:.3f} {metric.unit}"


def _metric(name: str) -> str:
    return name.removeprefix("val/").replace("/", " ").replace("_", " ")


def _checks(card: Card) -> list[str]:
    found = card.job.found
    rows = [(library, f"{errors['image']:.1e}", f"{errors['text']:.1e}")
            for library, errors in found.by_library().items()]  # fmt: skip
    parts = [
        f"Each of these libraries loaded the files and computed the features of {found.images} pictures and "
        f"{found.texts} texts ({found.origin}, and odd texts). Largest difference from the model that was exported, "
        f"of vectors of length 1 (allowed: {TOLERANCE:.0e}), from the same pixels and tokens:",
        markdown_table([("", "image tower", "text tower"), *rows], numbers=[1, 2]),
    ]
    if found.half is not None:
        parts.append(
            "That is against the model with its weights rounded to float16, which changes features by "
            f"{found.half:.1e}" + "".join(f"; {x.half_note}" for x in FORMATS if x.half_note) + "."
        )
    as_they_are = ", ".join(f"{library} {error:.1e}" for library, error in found.transparent.items())
    parts.append(
        f"Transparent parts of a picture show {card.job.background}, as in training: the snippets above see to it. Of "
        f"transparent pictures that a library gets as they are, features differ by up to: {as_they_are}."
    )
    return [*parts, *(note for x in card.formats for note in x.check_notes(found))]


def _citation(card: Card) -> str:
    loss = card.facts.setting("loss.name") if card.facts else None
    if loss == "em":
        return "The loss this model was trained with follows the idea of\n\n" + CITATION
    return "vlcl was made for the loss of\n\n" + CITATION


def draw_curve(records: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Training losses and held-out recall over steps; False, and no file, where neither was logged."""
    from matplotlib.figure import Figure

    panels = {
        "Losses (nats)": LOSSES,
        "Held-out recall, image to text (%)": IMAGE_TO_TEXT,
        "Zero-shot accuracy (%)": ZEROSHOT,
    }
    drawn = [(title, {metric.label: points_of(records, metric.name) for metric in figure.metrics})
             for title, figure in panels.items()]  # fmt: skip
    drawn = [(title, {label: points for label, points in lines.items() if points[0]}) for title, lines in drawn]
    drawn = [(title, lines) for title, lines in drawn if lines]
    if not drawn:
        return False
    figure = Figure(figsize=(5 * len(drawn), 3.2), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn):
        for (label, (steps, values)), color in zip(lines.items(), ("#2a6fb5", "#d1762a", "#4a9a5b")):
            scale = 100 if "%" in title else 1
            axes.plot(steps, [scale * x for x in values], label=label, color=color, linewidth=1.6,
                      marker="o" if len(steps) <= 15 else None, markersize=4)  # fmt: skip
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("optimizer step")
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=10)
    figure.savefig(path, dpi=110)
    return True
