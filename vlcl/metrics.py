"""The metrics of a run, a record each: all that logs, report, comparison, model card and docs know of them.

A new metric is computed in one place (a loss, vlcl/train.py, vlcl/zeroshot.py) and has its record here, in `METRICS`.
The order of `METRICS` is that of a log line, of the figures within a group of the report, and of the docs.
`python -m vlcl.metrics` prints the table of docs/training.md. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

HELD_OUT, TRAINING, TABLE, SPEED = "Held-out quality", "Training", "Pair table", "Speed"
GROUPS = (HELD_OUT, TRAINING, TABLE, SPEED)  # of the report's figures, in its order


@dataclass(frozen=True)
class Figure:
    """A figure of the report, over optimizer steps. One whose metrics were not logged is left out.

    axis: what its vertical axis says. explanation: stands below the title; "": the meaning of its metrics, which is
    the same then. short: the title where there is little room; "": the title.
    """

    group: str
    title: str
    axis: str
    explanation: str = ""
    short: str = ""
    percent: bool = False
    from_zero: bool = True
    noisy: bool = False  # then a running mean is drawn over the values

    @property
    def explained(self) -> str:
        return self.explanation or self.metrics[0].meaning

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(metric for metric in METRICS if metric.figure is self)


@dataclass(frozen=True)
class Metric:
    """name: in metrics.jsonl. tail: what stands for the rest of the name where that varies ("data/skipped/" + REASON).

    direction: which values are the better ones. line, bar: how a value is shown in a log line and in the progress bar;
    None: not there. label, colour: of its line in `figure`, the colour being a CSS variable of the report.
    compare_needs: the setting that makes a run log it, where `vlcl compare` may choose it; None: it may not. kind: the
    `model.kind` that it needs for that.
    """

    name: str
    meaning: str
    unit: str
    direction: Literal["higher", "lower", "none"]
    tail: str = ""
    line: Callable[[float], str] | None = None
    bar: Callable[[float], str] | None = None
    figure: Figure | None = None
    label: str = ""
    colour: str = "--s1"
    compare_needs: Literal["data.val", "data.test", "eval.zeroshot"] | None = None
    kind: Literal["clip", "views"] = "clip"

    def merit(self, value: float) -> float:
        """The value, turned round where lower is better: the best has the highest merit."""
        return -value if self.direction == "lower" else value


def short_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


IMAGE_TO_TEXT = Figure(HELD_OUT, "Image to text", "pictures", percent=True)
TEXT_TO_IMAGE = Figure(HELD_OUT, "Text to image", "captions", percent=True)
TEST_IMAGE_TO_TEXT = Figure(HELD_OUT, "Image to text, test", "pictures", percent=True)
TEST_TEXT_TO_IMAGE = Figure(HELD_OUT, "Text to image, test", "captions", percent=True)
VAL_INFONCE = Figure(TRAINING, "Held-out loss", "InfoNCE (nats)", from_zero=False)
TEST_INFONCE = Figure(TRAINING, "Held-out loss, test", "InfoNCE (nats)", from_zero=False)
ZEROSHOT = Figure(HELD_OUT, "Zero-shot classification", "pictures", short="Zero-shot", percent=True)
_FEATURES = "Pictures whose class is found from features: by the nearest labelled pictures, by a linear classifier."
KNN = Figure(HELD_OUT, "Nearest neighbours", "pictures", _FEATURES, "Features", percent=True)
TEST_KNN = Figure(HELD_OUT, "Nearest neighbours, test", "pictures", _FEATURES, "Features, test", percent=True)
LOSSES = Figure(
    TRAINING, "Losses", "nats",
    "Generalized: against all training pairs, estimated. In-batch InfoNCE: against the batch alone, so it grows with "
    "the batch.", from_zero=False, noisy=True,
)  # fmt: skip

EPOCH = Metric("epoch", "Passes over the training data so far.", "passes", "none", line="epoch {:.2f}".format)
LOSS = Metric(
    "train/loss", "Estimate of the generalized loss over all N pairs; for `infonce`, the in-batch loss.",
    "nats", "lower", line="loss {:.3f}".format, bar="loss {:.3f}".format, figure=LOSSES, label="generalized",
)  # fmt: skip
INFONCE = Metric(
    "train/infonce", "InfoNCE of the batch, the same for every loss: what to compare across losses at one batch size.",
    "nats", "lower", line="infonce {:.3f}".format, figure=LOSSES, label="in-batch InfoNCE", colour="--s2",
)  # fmt: skip
SAMPLES_PER_SECOND = Metric(
    "speed/samples_per_second", "Training pairs per second, over all ranks.", "pairs / s", "higher",
    line=lambda value: f"{short_number(value)} samples/s", bar=lambda value: f"{short_number(value)}/s",
    figure=Figure(SPEED, "Throughput", "samples / s", noisy=True),
)  # fmt: skip
PER_DEVICE = Metric(
    "speed/samples_per_second_per_device", "Training pairs per second of each device: those of all over their number.",
    "pairs / s", "higher", line=lambda value: f"{short_number(value)} a device",
)  # fmt: skip
SKIPPED = Metric(
    "data/skipped", "Training samples left out so far, over all ranks.", "samples", "lower",
    line="skipped {:.0f}".format,
)  # fmt: skip
SKIPPED_FOR = Metric(
    "data/skipped/", "Training samples left out for this reason so far, over all ranks.", "samples", "lower",
    tail="REASON",
)  # fmt: skip
ANOMALIES = Metric("train/anomalies", "Anomalies of steps so far, of all kinds.", "steps", "lower")
ANOMALIES_OF = Metric(
    "train/anomalies/", "Steps with this anomaly so far: `loss`, `gradient` (not finite), `spike`, `clip`, `scale`, "
    "`drift`.", "steps", "lower", tail="KIND",
)  # fmt: skip
VAL_SKIPPED = Metric("val/skipped", "Held-out samples left out of this evaluation.", "samples", "lower")
TEST_SKIPPED = Metric("test/skipped", "Test samples left out of their evaluation.", "samples", "lower")


def _recalls(split: Literal["val", "test"], figures: tuple[Figure, Figure], pairs: str) -> list[Metric]:
    """Retrieval among the pairs of `data.val` or `data.test`, both ways."""
    before = "" if split == "val" else f"{split} "  # of the name in a log line
    ways = (
        ("image_to_text", f"{pairs} pictures with a caption of their own among the k nearest captions."),
        ("text_to_image", f"{pairs} captions whose own picture is among the k nearest pictures."),
    )
    return [
        Metric(
            f"{split}/{way}_R@{k}", meaning, "share", "higher", figure=figure, label=f"R@{k}", colour=f"--r{k}",
            line=f"{before}{way.replace('_', '-')} R@1 {{:.1%}}".format if k == 1 else None,
            compare_needs="data.val" if split == "val" else "data.test",
        )
        for figure, (way, meaning) in zip(figures, ways)
        for k in (1, 5, 10)
    ]  # fmt: skip


_RECALLS = _recalls("val", (IMAGE_TO_TEXT, TEXT_TO_IMAGE), "Held-out")
_TEST_RECALLS = _recalls("test", (TEST_IMAGE_TO_TEXT, TEST_TEXT_TO_IMAGE), "Test")
_VIEW_SPLITS: tuple[tuple[str, Figure, Literal["data.val", "data.test"]], ...] = (
    ("val", KNN, "data.val"), ("test", TEST_KNN, "data.test")
)  # fmt: skip
_VIEW_METRICS = [
    Metric(f"{split}/{name}_top1", meaning, "share", "higher", figure=figure, label=label, colour=colour,
           line=f"{'test ' * (split == 'test')}{label} top-1 {{:.1%}}".format, compare_needs=needs, kind="views")
    for split, figure, needs in _VIEW_SPLITS
    for name, label, colour, meaning in (
        ("knn", "kNN", "--r1", f"Pictures of `data.{split}` whose class the nearest labelled pictures vote for."),
        ("linear", "linear", "--r5", f"Pictures of `data.{split}` whose class a linear classifier finds."),
    )
]  # fmt: skip
_ZEROSHOT_MEANING = (
    "Pictures whose class is the nearest, or among the nearest five; of several sets the mean over sets."
)
_ZEROSHOT_OF_A_SET = "The same of each set, where `eval.zeroshot` has several."


def _infonce(split: Literal["val", "test"], figure: Figure, pairs: str) -> Metric:
    return Metric(
        f"{split}/infonce", f"InfoNCE of the {pairs} pairs (a picture, its first caption) in batches of "
        "`train.batch_size`: the held-out loss, to be compared with `train/infonce`.", "nats", "lower",
        line=f"{split} infonce {{:.3f}}".format, figure=figure, label="InfoNCE",
        compare_needs="data.val" if split == "val" else "data.test",
    )  # fmt: skip


METRICS = (
    EPOCH,
    LOSS,
    INFONCE,
    Metric("train/logit_scale", "What cosine similarities are multiplied by: 1 / temperature.", "factor", "none",
           line="scale {:.1f}".format, figure=Figure(TRAINING, "Logit scale", "scale κ", from_zero=False)),
    Metric("train/pair_scale", "Mean 1/τ of the batch's pairs, for losses with a temperature a pair.", "factor",
           "none"),
    Metric("train/lr", "Learning rate of the towers' weights, by warm-up and schedule.", "step size", "none",
           figure=Figure(TRAINING, "Learning rate", "learning rate", "Warm-up and decay, as the optimizer saw them.")),
    Metric("train/grad_norm", "Norm of the gradient of all parameters, before clipping.", "L2 norm", "none",
           figure=Figure(TRAINING, "Gradient norm", "L2 norm", "Of all parameters, before clipping.", noisy=True)),
    Metric("train/drift", "Mean change of a row's log-normalizer since its last visit: how stale the table's memory "
           "is.", "nats", "lower", figure=Figure(TABLE, "Normalizer drift", "nats", noisy=True)),
    Metric("train/first_visits", "Rows of a batch that the table had never seen: none after the first epoch.", "share",
           "none", figure=Figure(TABLE, "First visits", "rows", percent=True)),
    Metric("train/effective_negatives", "How many of a batch's negatives carry the gradient, 1 / sum p². Near the "
           "batch size: all.", "pairs", "none",
           figure=Figure(TABLE, "Effective negatives", "pairs", "How many pairs carry the weight of a normalizer. The "
                         "table can help only where the batch is not far above it.", noisy=True)),
    Metric("train/gamma", "Weight of the present batch in a row's running average; 1 is no memory.", "share", "none",
           figure=Figure(TABLE, "Gamma", "weight γ")),
    ANOMALIES,
    ANOMALIES_OF,
    SAMPLES_PER_SECOND,
    PER_DEVICE,
    Metric("speed/memory", "Most memory that a rank has held so far: of its GPU, as torch reserves it; on a CPU, of "
           "its process.", "GiB", "lower", line="memory {:.1f} GiB".format,
           figure=Figure(SPEED, "Memory", "GiB")),
    Metric("speed/data_wait", "Share of a step spent waiting for data; near zero, reading is not the bottleneck.",
           "share", "lower", line="data wait {:.0%}".format, bar="wait {:.0%}".format,
           figure=Figure(SPEED, "Data wait", "step time", percent=True, noisy=True)),
    Metric("speed/tflops_per_device", "Arithmetic of the towers' forward and backward passes, as torch counts it, "
           "without what is computed twice to save memory (GPUs).", "1e12 FLOP / s", "higher"),
    Metric("speed/mfu", "The same over what the GPU's data sheet promises in half precision: model FLOPs utilization "
           "(bf16 and fp16, GPUs that vlcl knows).", "share", "higher", line="MFU {:.0%}".format),
    Metric("speed/collectives", "Share of a step spent gathering features and rows of the table, the wait for the "
           "slowest rank included. Gradients travel during the backward pass, and are not in it.", "share", "lower"),
    Metric("speed/loss", "Share of a step spent in the E-step and the forward pass of the loss.", "share", "lower"),
    Metric("speed/checkpoint", "Share of the time that training waited for checkpoints; what is written in the "
           "background is not in it.", "share", "lower"),
    SKIPPED,
    SKIPPED_FOR,
    Metric("data/repeated", "Training samples used again in their epoch so far, over all ranks.", "samples", "lower"),
    Metric("data/truncated", "Training captions cut to the model's context length so far, over all ranks: their ends "
           "were not seen.", "captions", "lower"),
    *_RECALLS,
    _infonce("val", VAL_INFONCE, "held-out"),
    Metric("val/zeroshot_top1", _ZEROSHOT_MEANING, "share", "higher", line="zero-shot top-1 {:.1%}".format,
           figure=ZEROSHOT, label="top-1", colour="--r1", compare_needs="eval.zeroshot"),
    Metric("val/zeroshot_top5", _ZEROSHOT_MEANING, "share", "higher", figure=ZEROSHOT, label="top-5", colour="--r5",
           compare_needs="eval.zeroshot"),
    Metric("val/zeroshot_top1/", _ZEROSHOT_OF_A_SET, "share", "higher", tail="SET"),
    Metric("val/zeroshot_top5/", _ZEROSHOT_OF_A_SET, "share", "higher", tail="SET"),
    *_VIEW_METRICS,
    VAL_SKIPPED,
    *_TEST_RECALLS,
    _infonce("test", TEST_INFONCE, "test"),
    TEST_SKIPPED,
)  # fmt: skip

HEADLINE = tuple(metric for metric in _RECALLS if metric.label == "R@1")  # the quality of a run in two numbers
TEST_HEADLINE = tuple(metric for metric in _TEST_RECALLS if metric.label == "R@1")
COMPARABLE = tuple(metric for metric in METRICS if metric.compare_needs)
FIGURES = tuple(dict.fromkeys(metric.figure for metric in METRICS if metric.figure))

_BY_NAME = {metric.name: metric for metric in METRICS if not metric.tail}


def produced(settings: object, test: bool) -> list[str]:
    """Names of the COMPARABLE metrics that a run with these settings logs; `test`: those of data.test as well."""
    kind, linear = attrgetter("model.kind", "views.linear_epochs")(settings)
    made = [
        m.name
        for m in COMPARABLE
        if m.compare_needs and m.kind == kind and attrgetter(m.compare_needs)(settings)
        if linear or not m.name.endswith("linear_top1")
    ]
    return [name for name in made if test or not is_test(name)]


def headline(settings: object) -> tuple[Metric, ...]:
    """The metrics that a comparison of runs with these settings shows, where it is not told which."""
    test = bool(attrgetter("data.test")(settings))
    if attrgetter("model.kind")(settings) == "views":
        return tuple(m for m in _VIEW_METRICS if m.name == f"{'test' if test else 'val'}/knn_top1")
    return TEST_HEADLINE if test else HEADLINE


def metric_of(name: str) -> Metric | None:
    """The record of a name in metrics.jsonl, None where the table lacks it."""
    tailed = (metric for metric in METRICS if metric.tail and name.startswith(metric.name) and name != metric.name)
    return _BY_NAME.get(name) or next(tailed, None)


def is_held_out(name: str) -> bool:
    """Whether the name is of a metric of an evaluation, not of training."""
    return name.startswith(("val/", "test/"))


def is_test(name: str) -> bool:
    """Whether the name is of a metric of `data.test`, on which nothing is chosen."""
    return name.startswith("test/")


def on_val(name: str) -> str:
    """The name of the same metric on `data.val`; of one that is not of `data.test`, the name itself."""
    return f"val/{name.removeprefix('test/')}" if is_test(name) else name


def docs_table() -> str:
    """The table of docs/training.md, in Markdown: a row for the names that have one meaning."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for metric in METRICS:
        better = "" if metric.direction == "none" else metric.direction
        rows.setdefault((metric.meaning, metric.unit, better), []).append(f"`{metric.name}{metric.tail}`")
    lines = ["| name | unit | better | meaning |", "|---|---|---|---|"]
    lines += [f"| {', '.join(names)} | {unit} | {better} | {text} |" for (text, unit, better), names in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(docs_table())
