"""When does memory pay? `em` less `dcl`, from docs/evidence/results.jsonl: docs/evidence/memory.png, and its table.

    python benchmarks/evidence/draw_memory.py

`dcl` is `em` without a memory: the same loss, each batch's own normalizers. Seed by seed, R@1 on the fourth vendor,
each at the learning rate that OpenMoji's R@10 chose with seed 0 where several were tried.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from vlcl.config.by_batch import form_of, gain_of
from vlcl.config.losses import default_settings
from vlcl.report.style import COLOURS, INK, MARKERS, MUTED, style_axes

DOCS = Path(__file__).parents[2] / "docs" / "evidence"
ICONS = 19_850
PAIRS = {"230add7c": 11_355, "ea30f317": 3_786, "1d2dd3a1": 948, "702bfe63": ICONS}  # by the training data's digest
TOWERS = {
    "local-dir:benchmarks/evidence/model": "both towers train",
    "local-dir:benchmarks/evidence/locked": "image tower locked",
}
EPOCHS = (5, 8, 15, 24, 40, 45, 120)  # that were asked for; whole batches make them a little shorter
SHOWN = ("test/image_to_text_R@1", "test/text_to_image_R@1")
CHOOSES = "val/text_to_image_R@10"


@dataclass(frozen=True)
class Point:
    """em less dcl in percentage points, a number a seed; `level`: the mean of dcl, in %."""

    tower: str
    pairs: int
    epochs: int
    batch_size: int
    gains: tuple[float, ...]
    level: float


def points(lines: Sequence[dict[str, Any]]) -> Iterator[Point]:
    cells: dict[tuple[str, int, int, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        tower, pairs = TOWERS.get(line["settings"]["model.name"]), PAIRS.get(line["data"]["train"][:8])
        if tower and pairs and (loss := loss_of(line)):
            epochs = min(EPOCHS, key=lambda asked: abs(asked - line["samples"] / pairs))
            cells[tower, pairs, epochs, line["batch_size"]][loss].append(line)
    for (tower, pairs, epochs, batch_size), of_loss in sorted(cells.items()):
        scores = {loss: at_the_best_rate(found) for loss, found in of_loss.items()}
        em, dcl = scores.get("em", {}), scores.get("dcl", {})
        if seeds := sorted(em.keys() & dcl.keys()):
            gains = tuple(em[seed] - dcl[seed] for seed in seeds)
            yield Point(tower, pairs, epochs, batch_size, gains, mean(dcl[seed] for seed in seeds))


def loss_of(line: dict[str, Any]) -> str | None:
    """dcl, or em as it is by default at this batch size, under whatever label it ran; none with other settings."""
    name, batch, settings = line["settings"]["loss.name"], line["batch_size"], line["settings"]
    usual = default_settings(name) | ({"gamma": gain_of(batch), "form": form_of(batch)} if name == "em" else {})
    expected = {f"loss.{key}": value for key, value in usual.items()} | {"loss.same_caption": "negative"}
    expected["optim.logit_scale_ratio"] = 0.2 * math.sqrt(min(batch / 256, 1))
    same = all(is_same(settings.get(key, value), value) for key, value in expected.items())
    return name if same and name in ("em", "dcl") else None


def is_same(given: Any, expected: Any) -> bool:
    """Numbers: but for a rule's rounding."""
    if isinstance(given, float) and isinstance(expected, float):
        return math.isclose(given, expected, abs_tol=1e-3)
    return bool(given == expected)


def at_the_best_rate(lines: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Score by seed, in %."""
    first = [line for line in lines if line["seed"] == 0]
    if not first:
        return {}
    rate = max(first, key=lambda line: line["metrics"][CHOOSES])["lr"]
    return {x["seed"]: 100 * mean(x["metrics"][name] for name in SHOWN) for x in lines if x["lr"] == rate}


def draw(found: Sequence[Point]) -> None:
    figure = Figure(figsize=(9.6, 5.0), facecolor="white")
    left, right = (figure.add_axes((x, 0.115, 0.4, 0.57)) for x in (0.075, 0.575))
    curves = sorted({(p.tower, p.pairs) for p in found}, key=lambda c: (c[0], -c[1]))
    for place, (tower, pairs) in enumerate(curves):
        label = f"{pairs:,} {'icons' if pairs == ICONS else 'pairs'}, {tower}"
        curve(
            left, [(p.epochs, p) for p in found if (p.tower, p.pairs, p.batch_size) == (tower, pairs, 16)], place, label
        )
    lengths = sorted({(p.tower, p.pairs, p.epochs) for p in found if p.batch_size != 16})
    for place, (tower, pairs, epochs) in enumerate(lengths):
        of_length = [p for p in found if (p.tower, p.pairs, p.epochs) == (tower, pairs, epochs)]
        label = f"{epochs} epochs{' of icons' if pairs == ICONS else ''}, {tower}"
        curve(right, [(p.batch_size, p) for p in of_length], place, label)
    ends = (left, "epochs, at batch 16", (5, 15, 45, 120)), (right, "batch size", (16, 32, 64, 256))
    for axes, what, ticks in ends:
        axes.axhline(0, color=MUTED, linewidth=1, zorder=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"{what} (logarithmic)", color=MUTED, fontsize=10)
        style_axes(axes, size=10, pad=5)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False, fontsize=8.5, labelcolor=INK)
    left.set_ylabel("em less dcl, R@1, points", color=MUTED, fontsize=10)
    figure.text(
        0.02,
        0.945,
        "What the memory brings: em less dcl, seed by seed (rings) and their mean",
        color=INK,
        fontsize=12.5,
    )
    figure.savefig(DOCS / "memory.png", dpi=150)


def curve(axes: Axes, at: Sequence[tuple[int, Point]], place: int, label: str) -> None:
    if not at:
        return
    aside, colour = 2 ** (0.05 * (place - 2)), COLOURS[place % len(COLOURS)]
    axes.plot([x * aside for x, _ in at], [mean(p.gains) for _, p in at], color=colour, linewidth=1.7,
              marker=MARKERS[place % len(MARKERS)], markersize=6, label=label, zorder=4)  # fmt: skip
    for x, point in at:
        axes.scatter([x * aside] * len(point.gains), point.gains, s=16, facecolors="white", edgecolors=colour, zorder=3)


def main() -> None:
    found = list(points([json.loads(line) for line in (DOCS / "results.jsonl").read_text().splitlines()]))
    draw(found)
    print("| | pairs | epochs | batch size | dcl, R@1 in % | em less dcl, seed by seed |\n|---|---|---|---|---|---|")
    for p in found:
        gains = ", ".join(f"{gain:+.1f}" for gain in p.gains)
        print(f"| {p.tower} | {p.pairs:,} | {p.epochs} | {p.batch_size} | {p.level:.1f} | {gains} |")


if __name__ == "__main__":
    main()
