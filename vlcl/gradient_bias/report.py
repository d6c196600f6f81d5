"""What `vlcl bias` shows: the advice before it measures, tables for a terminal, bias.json and bias.png.

All of it is drawn from the content of bias.json: `write(folder, json.loads(...))` draws the figure anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlcl.errors import UserError, reason
from vlcl.report.style import INK, MARKERS, MUTED, style_axes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Report = Mapping[str, Any]
Row = Mapping[str, Any]  # a Record of vlcl/gradient_bias/measure.py as a dict

OWN = ("#d1495b", "#e8985e")  # a batch's own normalizer
COLOURS = {
    "infonce": OWN[0], "dcl": OWN[1], "exact a": "#1f5f99", "sampled u": "#6aaed6", "table as trained": "#2a8a5e",
    "table converged": "#7cc39b",
}  # fmt: skip
SHOWN = {"infonce": "InfoNCE", "dcl": "DCL"}
STALE = ("#7a4fa3", "#b79bd0", "#555555")


def make_folder(folder: Path) -> Path:
    """`folder`, made if it is not there; UserError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={folder}: the folder cannot be made ({error.strerror})") from None
    return folder


def write(folder: Path, report: Report) -> None:
    """bias.json and bias.png; UserError where they cannot be written."""
    try:
        text = json.dumps(report, indent=1, allow_nan=False)
        (folder / "bias.json").write_text(text + "\n", encoding="utf-8")
        draw(report, folder / "bias.png")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {reason(error)}. Choose another place with --output") from None


def percent(x: float) -> str:
    """Two digits: 0.3 %, 12 %, 160 %."""
    return f"{100 * x:.1f} %" if abs(x) < 0.0995 else f"{100 * x:.0f} %"


def advice(report: Report) -> str:
    """Go or no-go for a table, from the effective number of negatives and the first-order bias, before measuring."""
    kappa, effective = report["kappa"], report["effective_negatives"]
    median, size = kappa["p50"], report["train_batch_size"]
    lines = [
        f"{report['pairs']:,} of {report['pairs_of_the_data']:,} pairs; {report['checkpoint']}, epoch "
        f"{report['epoch']:.2g}, loss {report['loss']['name']}, logit scale {report['logit_scale']:.1f}",
        f"effective number of negatives N/kappa: median {effective['p50']:,.0f} of {report['pairs'] - 1:,} (5 % of the "
        f"anchors have fewer than {effective['p5']:,.0f}, 5 % more than {effective['p95']:,.0f})",
        f"kappa, the batch that bias is measured in: median {median:,.1f}, 95 % {kappa['p95']:,.1f}",
    ]
    predicted = [p for p in report["predictions"] if p["target"] == report["predictions"][0]["target"]]
    if predicted:
        lines.append(f"predicted bias of a batch's own normalizer / |G|, with respect to {predicted[0]['target']}:")
    for row in predicted:
        ratio = row["batch_size"] / median
        doubt = "  (B below 10 kappa: an over-estimate)" if ratio < 10 else ""
        lines.append(
            f"  {row['estimator']} with B = {row['batch_size']:<6,} kappa/B = {1 / ratio:<8.2g} bias "
            f"{percent(row['bias'])}{doubt}"
        )
    lines.append(verdict(size, median))
    if error := report["table_error"]:
        absolute = error["absolute"]
        lines.append(
            f"stored a against exact a: |error| median {absolute['p50']:.2f}, 95 % {absolute['p95']:.2f} nats, mean "
            f"{error['mean_signed']:+.2f}; {error['rows_written']:.0%} of rows written"
        )
    return "\n".join(lines)


def verdict(size: int, kappa: float) -> str:
    """What a table can bring at a batch size: at most, the bias of the batch's own normalizer goes away."""
    ratio = size / kappa
    if ratio < 10:
        text = "go: a batch's own normalizer is biased here; a table can remove at most that, for more variance"
    elif ratio < 100:
        text = "unsure: the bias is small; a table can bring at most that, for more variance"
    else:
        text = "no-go: kappa/B is below 1 %; do not expect a table to bring anything"
    return f"the run's batch of {size:,} is {ratio:.2g} kappa: {text}"


def as_text(report: Report) -> str:
    """The tables: an estimator a row, a batch size a column."""
    parts = []
    for target in dict.fromkeys(row["target"] for row in report["records"]):
        rows = [row for row in report["records"] if row["target"] == target]
        norm = rows[0]["gradient_norm"]
        parts.append(
            f"\nwith respect to {target}: |G| = {norm:.3g}\n"
            + _table("relative bias (<: below the noise floor, at most)", rows, _bias_cell)
            + _table("cosine of mean gradient and G, noise taken off", rows, lambda r: f"{r['cosine_corrected']:.4f}")
            + _table("length along G (1: all of it)", rows, lambda r: f"{r['along']:.3f}")
            + _table("standard deviation of one batch's gradient / |G|", rows, lambda r: _number(r["sd_batch"]))
            + _table("standard deviation of one permutation's mean / |G|", rows, lambda r: _number(r["sd_permutation"]))
        )
    rows = [row for row in report["records"] if row["target"] == report["records"][0]["target"]]
    parts.append(_break_even_line(rows))
    cell: Callable[[Row], str] = lambda r: f"{r['a_error']:+.2f} ({r['a_error_abs']:.2f})"  # noqa: E731
    parts.append("\n" + _table("a in use - exact a, nats: mean (mean of |.|)", rows, cell))
    parts += [f"note: {note}\n" for note in report["notes"]]
    return "".join(parts)


def break_even(rows: list[Row]) -> dict[int, float]:
    """By batch size, after how many independent batches a mean of InfoNCE's gradients is as far from G as one of exact
    a's: the bias stays, and the noise that it saves averages out. Where both are known and InfoNCE's bias is seen."""
    by_size = {name: {r["batch_size"]: r for r in rows if r["estimator"] == name} for name in ("infonce", "exact a")}
    found = {}
    for size, own in by_size["infonce"].items():
        exact = by_size["exact a"].get(size)
        if exact and own["detected"] and own["sd_batch"] is not None:
            found[size] = max(exact["sd_batch"] ** 2 - own["sd_batch"] ** 2, 0.0) / own["bias"] ** 2
    return found


def _break_even_line(rows: list[Row]) -> str:
    found = break_even(rows)
    if not found:
        return ""
    text = ", ".join(f"{n:,.0f} with B = {size:,}" for size, n in found.items())
    return (
        f"\nbatches to average until the bias of infonce outweighs the noise that it saves over exact a, for the "
        f"{rows[0]['target']}:\n  {text}\n"
    )


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


def _bias_cell(row: Row) -> str:
    return f"{row['bias']:.3f} ±{row['bias_se']:.3f}" if row["detected"] else f"< {row['bias_high']:.3f}"


def _table(title: str, rows: list[Row], cell: Callable[[Row], str]) -> str:
    sizes = sorted({row["batch_size"] for row in rows})
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    found = {(row["estimator"], row["batch_size"]): cell(row) for row in rows}
    lines = [f"  {title}", "    " + " " * 18 + "".join(f"{f'B={size}':>16}" for size in sizes)]
    for name in names:
        lines.append(f"    {name:<18}" + "".join(f"{found.get((name, size), ''):>16}" for size in sizes))
    return "\n".join(lines) + "\n"


def draw(report: Report, path: Path) -> None:
    """Bias and noise against batch size, an estimator a line, with respect to the first target."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    target = report["records"][0]["target"]
    rows = [row for row in report["records"] if row["target"] == target]
    sizes = sorted({row["batch_size"] for row in rows})
    styles = _styles(rows)
    with rc_context({"font.family": "sans-serif", "font.size": 10.5, "text.color": INK, "axes.labelcolor": INK}):
        canvas = Canvas(figsize=(11, 5.4), dpi=150, layout="constrained")
        canvas.get_layout_engine().set(w_pad=0.12, h_pad=0.06)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
        left, right = canvas.subplots(1, 2, sharex=True)
        for name, (colour, marker) in styles.items():
            own = sorted((row for row in rows if row["estimator"] == name), key=lambda row: row["batch_size"])
            _draw_bias(left, own, colour, marker)
            noise = [(row["batch_size"], row["sd_batch"] or row["sd_permutation"]) for row in own]
            right.plot(*zip(*noise), color=colour, marker=marker, markersize=6, linewidth=1.8)
        theory = _draw_theory(left, report, target, sizes)
        each = "batch" if rows[0]["sd_batch"] is not None else "permutation"
        _style(left, sizes, "bias / |G|", "Bias: the mean gradient against the exact one, G")
        _style(right, sizes, "standard deviation / |G|", f"Noise: one {each}'s gradient around its mean")
        left.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
        floor = _draw_floor(left, rows)
        _draw_kappa(left, report["kappa"]["p50"], sizes)
        canvas.legend(handles=[*_keys(styles), *theory, *floor], loc="outside lower center", ncols=5, frameon=False)
        canvas.suptitle(_headline(report, target), x=0.012, ha="left", fontsize=10.5, color=MUTED)
        canvas.savefig(path)


def _headline(report: Report, target: str) -> str:
    return (
        f"{report['pairs']:,} training pairs, weights of epoch {report['epoch']:.2g} frozen, "
        f"{report['settings']['permutations']} permutations of the data, gradients of the {target}. Bars: two standard "
        "errors.\nHollow: the bias is not told from zero, and is at most this."
    )


def _styles(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each estimator, the same in every figure for those of a known name."""
    names = dict.fromkeys(row["estimator"] for row in rows)
    others = [name for name in names if name not in COLOURS]
    colours = COLOURS | {name: STALE[n % len(STALE)] for n, name in enumerate(others)}
    return {name: (colours[name], MARKERS[n % len(MARKERS)]) for n, name in enumerate(names)}


def _keys(styles: Mapping[str, tuple[str, str]]) -> list[Artist]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=colour, marker=marker, markersize=6, linewidth=1.8, label=SHOWN.get(name, name))
        for name, (colour, marker) in styles.items()
    ]


def _draw_bias(axes: Axes, rows: list[Row], colour: str, marker: str) -> None:
    """A line through the biases that stand out of the noise, with two standard errors; upper limits of the others."""
    height = [row["bias"] if row["detected"] else row["bias_high"] for row in rows]
    line = "-" if any(row["detected"] for row in rows) else (0, (1, 2))
    width = 1.8 if any(row["detected"] for row in rows) else 1.0
    axes.plot([row["batch_size"] for row in rows], height, color=colour, linewidth=width, linestyle=line)
    seen = [row for row in rows if row["detected"]]
    bars = [row["bias"] - row["bias_low"] for row in seen], [row["bias_high"] - row["bias"] for row in seen]
    axes.errorbar([row["batch_size"] for row in seen], [row["bias"] for row in seen], bars, color=colour,
                  marker=marker, markersize=6, linestyle="none", capsize=2.5)  # fmt: skip
    limits = [row for row in rows if not row["detected"]]
    axes.plot([row["batch_size"] for row in limits], [row["bias_high"] for row in limits], color=colour, marker=marker,
              markersize=6, markerfacecolor="white", linestyle="none", zorder=3)  # fmt: skip


def _draw_theory(axes: Axes, report: Report, target: str, sizes: list[int]) -> list[Artist]:
    points = [
        (p["batch_size"], p["bias"])
        for p in report["predictions"]
        if p["target"] == target and p["estimator"] == "infonce" and min(sizes) <= p["batch_size"] <= max(sizes)
    ]
    if not points or any(value <= 0 for _, value in points):
        return []
    return list(axes.plot(*zip(*points), color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label="InfoNCE, first order"))


def _draw_floor(axes: Axes, rows: list[Row]) -> list[Artist]:
    """The region that the noise of exact a hides."""
    own = sorted((row for row in rows if row["estimator"] == "exact a"), key=lambda row: row["batch_size"])
    if not own:
        return []
    bottom = axes.get_ylim()[0]
    sizes, floors = [row["batch_size"] for row in own], [row["noise_floor"] for row in own]
    band = axes.fill_between(sizes, bottom, floors, color=COLOURS["exact a"], alpha=0.10, linewidth=0,
                             label="noise floor of exact a")  # fmt: skip
    axes.set_ylim(bottom=bottom)
    return [band]


def _draw_kappa(axes: Axes, kappa: float, sizes: list[int]) -> None:
    """Where the batch is kappa, and 10 kappa: below that first-order theory over-predicts."""
    for factor, name in ((1, "κ"), (10, "10 κ")):
        if sizes[0] < factor * kappa < sizes[-1]:
            axes.axvline(factor * kappa, color=MUTED, linewidth=0.9, linestyle=(0, (1, 3)))
            side = "right" if factor * kappa > sizes[-1] / 2 else "left"
            axes.annotate(name, (factor * kappa, 0.985), xycoords=("data", "axes fraction"),
                          xytext=(-3 if side == "right" else 3, 0), textcoords="offset points", ha=side, va="top",
                          fontsize=9.5, color=MUTED)  # fmt: skip


def _style(axes: Axes, sizes: list[int], label: str, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(_minor) if decades < 3.2 else NullFormatter())
    axes.set_title(title, loc="left", fontsize=12, pad=8)
    axes.set_xlabel("batch size B")
    axes.set_ylabel(label)
    style_axes(axes, size=10.5, rules="both", spines=("left", "bottom"), marks=True)


def _minor(y: float, _: object) -> str:
    """Label 2 and 5 of a decade."""
    digit = round(y / 10 ** math.floor(math.log10(y)), 3)
    return f"{y:g}" if digit in (2, 5) else ""
