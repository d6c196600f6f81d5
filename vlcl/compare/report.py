"""What a comparison shows: compare.md, compare.json and compare.png, from the results of its cells."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from vlcl.compare.comparison import Comparison, Difference
from vlcl.compare.figure import draw
from vlcl.errors import UserError, reason
from vlcl.files import replace_text, replacing_file
from vlcl.metrics import is_test
from vlcl.report.text import markdown_table, upper_first


def show_value(comparison: Comparison, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}%" if comparison.percent else f"{value:.4g}"


def show_difference(comparison: Comparison, value: float | None) -> str:
    """With its sign; of shares in percentage points."""
    if value is None:
        return "-"
    return f"{100 * value:+.2f}" if comparison.percent else f"{value:+.4g}"


def write_all(comparison: Comparison, figure: bool = True) -> None:
    """compare.md, compare.json and, if `figure`, compare.png; a reader finds the old or the new one, never half of
    either."""
    folder = comparison.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "compare.md", page(comparison))
        replace_text(folder / "compare.json", json.dumps(as_json(comparison), indent=2) + "\n")
        if figure:
            with replacing_file(folder / "compare.png") as temporary:
                draw(comparison, temporary)
    except OSError as error:
        raise UserError(
            f"{folder} could not be written: {reason(error)}; give another --output, or make room"
        ) from None


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers: the points, and the cells with every held-out metric."""
    points = [
        {
            "loss": p.cell.loss, "batch_size": p.cell.batch_size, "lr": p.cell.lr, "best_lr": p.best, "mean": p.mean,
            "sd": p.sd, "n": len(p.values), "selection_mean": p.choice, "steps": p.cell.steps,
            "samples": p.cell.samples,
        }
        for p in comparison.points
    ]  # fmt: skip
    cells = [
        {
            "cell": r.cell.name, "loss": r.cell.loss, "batch_size": r.cell.batch_size, "lr": r.cell.lr,
            "seed": r.cell.seed, "steps": r.cell.steps, "samples": r.cell.samples, "value": r.value,
            "selection_value": r.chosen_by, "error": r.error, "metrics": r.metrics,
        }
        for r in comparison.results
    ]  # fmt: skip
    differences = [
        {
            "loss": d.point.cell.loss, "to": d.first.cell.loss, "batch_size": d.point.cell.batch_size,
            "lr": d.point.cell.lr, "lr_of_to": d.first.cell.lr, "mean": d.mean, "half_width_95": d.half_width,
            "n": len(d.values), "values": d.values,
        }
        for d in comparison.differences
    ]  # fmt: skip
    return {
        "command": comparison.command, "metric": comparison.metric, "select_on": comparison.select,
        "scale_lr": comparison.scale_lr, **dataclasses.asdict(comparison.data), "points": points,
        "differences": differences, "cells": cells,
    }  # fmt: skip


def page(comparison: Comparison) -> str:
    """compare.md."""
    results = comparison.results
    failed, over = sum(bool(result.error) for result in results), sum(result.is_over for result in results)
    state = f"{over - failed} of {len(results)} cells have a result, {failed} failed, {len(results) - over} not run yet"
    return "\n".join([
        f"# {upper_first(comparison.title)}", "", "```", comparison.command, "```", "",
        f"{state}. {_explanation(comparison)}", "", "![The figure of this table](compare.png)", "",
        means_table(comparison), "", *_differences(comparison), "## Every cell", "", cells_table(comparison), "",
    ])  # fmt: skip


def _explanation(comparison: Comparison) -> str:
    data, of_test = comparison.data, is_test(comparison.metric[0])
    pairs, kind = (data.test_pairs, "test") if of_test else (data.val_pairs, "held-out")
    held_out = f", {pairs:,} {kind} pairs" if pairs else ""
    return (
        f"{upper_first(_in_words(comparison.metric))} at the end of training{held_out}. "
        f"{data.samples:,} samples seen in every cell, as nearly as whole steps allow ({data.pairs:,} training pairs, "
        f"{data.samples / data.pairs:.1f} passes). sd: standard deviation over the n seeds (n - 1 in the denominator)."
    ) + _about_rates(comparison)


def _in_words(metric: Sequence[str]) -> str:
    names = " and ".join(f"`{name}`" for name in metric)
    return f"mean of {names}" if len(metric) > 1 else names


def _about_rates(comparison: Comparison) -> str:
    """How the learning rates were chosen."""
    said = []
    if comparison.scale_lr != "none":
        rule = {"sqrt": "the square root of the batch size", "linear": "the batch size"}[comparison.scale_lr]
        said.append(f"Learning rates grow with {rule}: those of --lr are for the batch size of the config.")
    if comparison.searched:
        said.append(
            "Rates were compared with the first seed, and beyond the given ones while the best stood at an end; the "
            "other seeds ran at the best rate."
        )
    if comparison.chosen_elsewhere:
        said.append(
            f"Bold: the learning rate that is best by {_in_words(comparison.select)} (of those with most finished "
            "seeds, over the seeds that all rates have). The column `selection` has that mean: it chose the rate, and "
            "is not what is shown."
        )
    elif comparison.num_rates > 1:
        said.append(
            "Bold: the best learning rate by its mean (of those with most finished seeds). It is chosen on the "
            "held-out data that it is shown for, and so looks a little too good."
        )
    return "".join(f" {text}" for text in said)


def means_table(comparison: Comparison) -> str:
    selection = ["selection"] * comparison.chosen_elsewhere
    rows = [["loss", "batch size", "lr", "steps", "samples seen", *selection, "mean", "sd", "n", ""]]
    for point in comparison.points:
        cell, failed = point.cell, sum(bool(result.error) for result in point.results)
        waiting = sum(not result.is_over for result in point.results)
        notes = [f"{failed} failed"] * (failed > 0) + [f"{waiting} not run"] * (waiting > 0)
        notes += ["one seed, no sd"] * (len(point.values) == 1)
        bold = point.best and comparison.num_rates > 1 and point.values
        notes += ["the best is at the end of the rates tried"] * bool(bold and comparison.searched and point.at_end)
        average = show_value(comparison, point.mean)
        selection = [show_value(comparison, point.choice)] * comparison.chosen_elsewhere
        rows.append([
            f"`{cell.loss}`", str(cell.batch_size), f"{cell.lr:g}", f"{cell.steps:,}", f"{cell.samples:,}",
            *selection, f"**{average}**" if bold else average, show_value(comparison, point.sd),
            str(len(point.values)), ", ".join(notes),
        ])  # fmt: skip
    return markdown_table(rows, numbers=range(1, 9 if comparison.chosen_elsewhere else 8))


def _differences(comparison: Comparison) -> list[str]:
    """The section of paired differences; none with one loss."""
    differences = comparison.differences
    if not differences:
        return []
    first = comparison.losses[0]
    unit = "percentage points" if comparison.percent else f"units of {_in_words(comparison.metric)}"
    text = (
        f"The loss less `{first}` at the same seed, mean over the n seeds that both have, in {unit}; 95 % confidence "
        "interval by Student's t over the seeds, n - 1 degrees of freedom. It holds for one comparison: of twenty "
        "intervals without a difference, one is expected to leave zero out. It knows nothing of other data sets"
        + (", nor of the choice of learning rates." if comparison.num_rates > 1 else ".")
    )
    return [f"## Differences from `{first}`", "", text, "", differences_table(comparison, differences), ""]


def differences_table(comparison: Comparison, differences: Sequence[Difference]) -> str:
    rows = [["loss", "batch size", "lr", f"lr of `{comparison.losses[0]}`", "difference", "95 % interval", "n"]]
    for found in differences:
        mean, half = found.mean, found.half_width
        ends = None if mean is None or half is None else (mean - half, mean + half)
        rows.append([
            f"`{found.point.cell.loss}`", str(found.point.cell.batch_size), f"{found.point.cell.lr:g}",
            f"{found.first.cell.lr:g}", show_difference(comparison, mean),
            " to ".join(show_difference(comparison, end) for end in ends) if ends else "-", str(len(found.values)),
        ])  # fmt: skip
    return markdown_table(rows, numbers=range(1, 7))


def cells_table(comparison: Comparison) -> str:
    parts = comparison.metric if len(comparison.metric) > 1 else ()
    rows = [["cell", "seed", *(f"`{name}`" for name in parts), "result"]]
    for point in comparison.points:
        for result in point.results:
            values = [show_value(comparison, result.metrics.get(name)) for name in parts]
            end = f"failed: {result.error}" if result.error else show_value(comparison, result.value)
            rows.append([result.cell.name, str(result.cell.seed), *values, end if result.is_over else "not run yet"])
    return markdown_table(rows, numbers=range(1, 2 + len(parts)))
