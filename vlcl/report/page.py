"""The report of a training run: one self-contained HTML page, made from the run folder alone.

`write_report(run_dir)` needs metrics.jsonl; config.yaml, environment.json and examples/ are used where they are
there, so a run that was interrupted, or never evaluated, has a report too. The page loads nothing and runs nothing:
figures are inline SVG, pictures inline PNG. Every text from outside is escaped.
"""

from __future__ import annotations

import base64
import json
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vlcl.anomalies import FOLDER, MEANING
from vlcl.data.urls import without_secrets
from vlcl.environment import ENVIRONMENT_FILE
from vlcl.files import replace_text
from vlcl.logs import read_metrics
from vlcl.metrics import (
    ANOMALIES,
    ANOMALIES_OF,
    FIGURES,
    GROUPS,
    HELD_OUT,
    INFONCE,
    LOSS,
    SAMPLES_PER_SECOND,
    SKIPPED,
    SKIPPED_FOR,
    Figure,
    short_number,
)
from vlcl.report.figures import draw, points_of
from vlcl.report.pictures import (
    Hit,
    ImageExample,
    RetrievalExample,
    examples_as_text,
    load_examples,
    png_bytes,
    retrieval_grid,
    save_examples,
)
from vlcl.report.template import CSS, PAGE

__all__ = [
    "Hit",
    "ImageExample",
    "RetrievalExample",
    "examples_as_text",
    "retrieval_grid",
    "save_examples",
    "write_report",
]

REPORT_FILE = "report.html"
Records = Sequence[Mapping[str, Any]]


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and return its path. UserError where the folder has no metrics.jsonl."""
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    config_text = without_secrets(_read(run_dir / "config.yaml"))
    config = yaml.safe_load(config_text) if config_text else {}
    environment_text = _read(run_dir / ENVIRONMENT_FILE)
    environment = json.loads(environment_text) if environment_text else {}
    name = run_dir.resolve().name
    body = [
        _header(name, records, config, environment),
        _tiles(records, environment),
        *(_figure_group(group, records) for group in GROUPS),
        _skipped(records),
        _anomalies(records, run_dir),
        *_examples(run_dir),
        _commands(run_dir, environment),
        _folded("Resolved configuration", config_text),
        _folded("Environment", environment_text),
    ]
    page = PAGE.format(title=escape(name), css=CSS, body="\n".join(body))
    replace_text(run_dir / REPORT_FILE, page)
    return run_dir / REPORT_FILE


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def setting(config: Mapping[str, Any], key: str) -> Any:
    """`setting(config, "optim.lr")` of a run's config.yaml; None where it has no such key."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


_WIDE = ' class="wide"'  # a row of its own


def _header(name: str, records: Records, config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    loss = setting(config, "loss") or {}
    settings = [(key, value) for key, value in loss.items() if key != "name" and value is not None]
    shards = setting(config, "data.train")
    facts = {
        "Model": setting(config, "model.name"),
        "Parameters": _count(environment.get("parameters")),
        "Loss": loss.get("name"),
        "Training pictures" if "val_pictures" in environment else "Training pairs": _count(environment.get("pairs")),
        "Training data": ", ".join(shards) if isinstance(shards, list) else shards,
        "Batch size": _count(setting(config, "train.batch_size")),
        "Devices": _devices(environment),
        "First to last step": _when(records),
    }
    rows = "".join(
        f"<div{_WIDE if len(str(value)) > 90 else ''}><dt>{key}</dt><dd>{escape(str(value))}</dd></div>"
        for key, value in facts.items()
        if value
    )
    if settings:
        cells = "".join(f"<span>{escape(key)} <b>{escape(_shown(value))}</b></span>" for key, value in settings)
        rows += f'<div{_WIDE}><dt>Loss settings</dt><dd class="settings">{cells}</dd></div>'
    return (
        f'<header><p class="kicker">vlcl training report</p><h1>{escape(name)}</h1>{_status(records)}'
        f'<dl class="facts">{rows}</dl></header>'
    )


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _devices(environment: Mapping[str, Any]) -> str:
    ranks = environment.get("world_size", 1)
    gpus = environment.get("gpus")
    if gpus is None:
        return ""
    return f"{ranks} × {gpus[0] if gpus else 'CPU'}"


def _when(records: Records) -> str:
    times = [datetime.fromisoformat(record["time"]) for record in records if "time" in record]
    if not times:
        return ""
    minutes, seconds = divmod(round((times[-1] - times[0]).total_seconds()), 60)
    length = f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {seconds:02d} s"
    return f"{times[0]:%Y-%m-%d %H:%M} UTC, {length}"


def _status(records: Records) -> str:
    if not records:
        return '<p class="status">no step logged yet</p>'
    step, total = max(record["step"] for record in records), records[-1].get("total_steps")
    if total and step >= total:
        return f'<p class="status done">finished · {total:,} steps</p>'
    return f'<p class="status">step {step:,}{f" of {total:,}" if total else ""}</p>'


def _tiles(records: Records, environment: Mapping[str, Any]) -> str:
    tiles = [_quality_tile(records, figure) for figure in FIGURES if figure.group == HELD_OUT]
    note = ""
    if not any(tiles):
        note = "<p class='note'>No held-out evaluation in this run so far. Give <code>data.val</code> to have one.</p>"
    elif candidates := pairs_in_words(environment):
        what = "R@k among" if "val_pictures" not in environment else "kNN and linear classifiers on"
        note = f"<p class='note'>{what} {candidates}. {chance_in_words(environment)}</p>"
    elif chance := chance_in_words(environment):
        note = f"<p class='note'>{chance}</p>"
    if losses := points_of(records, LOSS.name)[1]:
        infonce = points_of(records, INFONCE.name)[1]
        tiles.append(_tile("Loss", f"{losses[-1]:.3f}", f"{INFONCE.label} {infonce[-1]:.3f}" if infonce else ""))
    if speeds := points_of(records, SAMPLES_PER_SECOND.name)[1]:
        tiles.append(_tile("Throughput", short_number(statistics.median(speeds)), "samples / s, median"))
    return f'<section class="tiles">{"".join(tiles)}</section>{note}'


def pairs_in_words(environment: Mapping[str, Any]) -> str:
    """Among how many pairs the recalls of a run are: "1,260 held-out pairs and 2,000 test pairs"; "" where unknown.
    Of a run on pictures alone, how many pictures were judged."""
    kinds = [
        (split, kind, of) for of in ("pairs", "pictures") for split, kind in (("val", "held-out"), ("test", "test"))
    ]
    counts = [(environment.get(f"{split}_{of}"), f"{kind} {of}") for split, kind, of in kinds]
    return " and ".join(f"{count:,} {kind}" for count, kind in counts if isinstance(count, int))


def chance_in_words(environment: Mapping[str, Any]) -> str:
    """What guesses would score: "Guesses score 0.08% (R@1), 10% (zero-shot top-1)."; "" where unknown."""
    shares = []
    if isinstance(count := environment.get("val_pairs"), int) and count:
        shares.append((1 / count, "R@1"))
    sets = environment.get("zeroshot_classes")
    if isinstance(sets, dict) and sets and all(isinstance(x, int) and x > 0 for x in sets.values()):
        shares.append((sum(1 / x for x in sets.values()) / len(sets), "zero-shot top-1"))
    words = ", ".join(f"{100 * share:.2g}% ({what})" for share, what in shares)
    return f"Guesses score {words}." if words else ""


def _quality_tile(records: Records, figure: Figure) -> str:
    """The last value of a held-out metric, its relatives, and the best one where that was earlier; "" without any."""
    metric, *others = figure.metrics
    steps, values = points_of(records, metric.name)
    if not values:
        return ""
    below = [f"{other.label} {points[-1]:.1%}" for other in others if (points := points_of(records, other.name)[1])]
    best = max(values, key=metric.merit)
    if metric.merit(best) > metric.merit(values[-1]):
        below.append(f"best {best:.1%} at step {steps[values.index(best)]:,}")
    lines = " ".join(f"<span>{text}</span>" for text in below)
    title = f"{figure.short or figure.title}, {metric.label}"
    return _tile(title, f"{100 * values[-1]:.1f}<small>%</small>", lines, kind="tile quality")


def _tile(label: str, value: str, below: str, kind: str = "tile") -> str:
    return f'<div class="{kind}"><h3>{label}</h3><p class="value">{value}</p><p class="below">{below}</p></div>'


def _figure_group(group: str, records: Records) -> str:
    drawn = [(figure, draw(figure, records)) for figure in FIGURES if figure.group == group]
    cards = [
        f"<figure><figcaption><h3>{figure.title}</h3><p>{figure.explained}</p></figcaption>{svg}</figure>"
        for figure, svg in drawn
        if svg
    ]
    return f'<section><h2>{group}</h2><div class="figures">{"".join(cards)}</div></section>' if cards else ""


def _skipped(records: Records) -> str:
    """Samples left out of training, by reason: counts since the start of the run."""
    prefix = SKIPPED_FOR.name
    names = sorted({name for record in records for name in record if name.startswith(prefix)})
    counts = {name.removeprefix(prefix): points[-1] for name in names if (points := points_of(records, name)[1])}
    totals = points_of(records, SKIPPED.name)[1]
    total = totals[-1] if totals else sum(counts.values())
    if not totals and not counts:
        text = "<p>The run logged no count of skipped samples.</p>"
    elif not total:
        text = "<p>None: every sample read was used.</p>"
    else:
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        rows = "".join(f"<tr><td>{escape(reason)}</td><td>{count:,.0f}</td></tr>" for reason, count in ordered if count)
        text = (
            "<table><thead><tr><th>Reason</th><th>Samples</th></tr></thead>"
            f"<tbody>{rows}</tbody><tfoot><tr><td>all</td><td>{total:,.0f}</td></tr></tfoot></table>"
        )
    return f"<section><h2>Skipped samples</h2>{text}</section>"


def _anomalies(records: Records, run_dir: Path) -> str:
    """Steps with an anomaly, by kind, and where the rows of their batches are."""
    if not points_of(records, ANOMALIES.name)[1]:  # a run of another version
        return ""
    counts = {kind: points[-1] for kind in MEANING if (points := points_of(records, f"{ANOMALIES_OF.name}{kind}")[1])}
    files = sorted((run_dir / FOLDER).glob("step-*.json"))
    text = "<p>None.</p>" if not files else ""
    if counts:
        rows = "".join(f"<tr><td>{MEANING[kind]}</td><td>{count:,.0f}</td></tr>" for kind, count in counts.items())
        text = f"<table><thead><tr><th>Anomaly</th><th>Steps</th></tr></thead><tbody>{rows}</tbody></table>"
    if files:
        command = shlex.join(["vlcl", "data", "show", str(files[-1])])
        text += f"<p class='note'>The batch of the last such step, in pictures:</p><pre>{escape(command)}</pre>"
    return f"<section><h2>Anomalies</h2>{text}</section>"


def _examples(run_dir: Path) -> Iterable[str]:
    text_examples, image_examples = load_examples(run_dir)
    if text_examples:
        cards = "".join(_text_example(example) for example in text_examples)
        title, note = (
            ("Pictures for a caption", "The held-out pictures nearest to each held-out caption, with cosine "
             "similarity. The right one has a green frame.") if text_examples[0].query is None else
            ("Pictures next to a picture", "The labelled pictures nearest to each held-out one, which comes first, "
             "with cosine similarity. Those of its class have a green frame.")
        )  # fmt: skip
        yield f"<section><h2>{title}</h2><p class='note'>{note}</p>{cards}</section>"
    if image_examples:
        cards = "".join(_image_example(example) for example in image_examples)
        yield (
            "<section><h2>Captions for a picture</h2><p class='note'>The held-out captions nearest to each held-out "
            f"picture, with cosine similarity.</p><div class='figures'>{cards}</div></section>"
        )


def _text_example(example: RetrievalExample) -> str:
    cells = [_cell(example.query, example.caption, "", False, "apart")] if example.query else []
    cells += [_cell(hit.image, hit.caption, f"{hit.score:.2f}", hit.is_true) for hit in example.hits]
    if example.true_image and not any(hit.is_true for hit in example.hits):
        cells.append(_cell(example.true_image, example.caption, f"rank {example.true_rank:,}", True, "apart"))
    rank = f'<span class="rank{" good" if example.true_rank == 1 else ""}">rank {example.true_rank:,}</span>'
    title = f"<h3>{escape(example.caption)} {rank}</h3>"
    return f'<article class="card">{title}<div class="hits">{"".join(cells)}</div></article>'


def _cell(image: Image.Image, caption: str, below: str, is_true: bool, kind: str = "") -> str:
    classes = " ".join(word for word in ("hit", "good" if is_true else "", kind) if word)
    return f'<div class="{classes}">{_picture(image, caption)}<span>{below}</span></div>'


def _picture(image: Image.Image, caption: str) -> str:
    data = base64.b64encode(png_bytes(image)).decode("ascii")
    text = escape(caption)
    return f'<img src="data:image/png;base64,{data}" alt="{text}" title="{text}">'


def _image_example(example: ImageExample) -> str:
    rows = "".join(
        f'<li class="{"good" if is_true else ""}"><span>{escape(caption)}</span><b>{score:.2f}</b></li>'
        for caption, score, is_true in example.hits
    )
    missed = (
        "" if any(hit[2] for hit in example.hits) else f'<p class="note">Its own: {escape(example.true_caption)}</p>'
    )
    picture = _picture(example.image, example.true_caption)
    return f'<article class="card query"><div class="hit">{picture}</div><div><ol>{rows}</ol>{missed}</div></article>'


def _commands(run_dir: Path, environment: Mapping[str, Any]) -> str:
    run = shlex.quote(str(run_dir))
    ranks = environment.get("world_size", 1)
    train = f"accelerate launch --num_processes {ranks} -m vlcl.train" if ranks > 1 else "vlcl train"
    config = shlex.quote(str(run_dir / "config.yaml"))
    lines = (
        ("Go on from the newest checkpoint", f"{train} {config} train.output={run} resume=latest"),
        ("Evaluate zero- and few-shot", f"vlcl eval elevater {run} --data-root DIR --shots 0,5,20,50,full"),
        ("Export for transformers, open_clip and sentence-transformers", f"vlcl export {run} OUT"),
    )
    items = "".join(f"<p>{text}</p><pre>{escape(command)}</pre>" for text, command in lines)
    return f"<section><h2>What next</h2>{items}</section>"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>" if text else ""
