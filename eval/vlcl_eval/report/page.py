"""`vlcl eval report`: report.md, the same as report.html, report.png, and the tables on the terminal, from the records
of results.jsonl.

A cell is the mean over seeds and their standard deviation (n - 1 in the denominator). An average over data sets is
that of their means, and its deviation that of the averages of those seeds that every data set has. Misuse: comparing
a sample of a test split, or the mean of a few data sets, with published averages. Both are marked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlcl.errors import UserError, reason
from vlcl.files import replace_text, replacing_file
from vlcl.report.text import markdown_table
from vlcl_eval.datasets.registry import benchmarks
from vlcl_eval.report.figure import draw
from vlcl_eval.report.html import as_html
from vlcl_eval.report.scores import (
    METHODS,
    Cell,
    Column,
    Model,
    Record,
    Score,
    as_text,
    average,
    averaged,
    has_score,
    in_order,
    mode_title,
    models_of,
)
from vlcl_eval.report.terminal import console, print_table
from vlcl_eval.results import read_results, why_incomplete

TEXT_COLUMNS = 2  # data set and metric
SCORES = TEXT_COLUMNS + 1  # where the scores begin, behind chance
SAMPLE, UNLIKE, OTHER_FORM = "†", "‡", "§"
LEGEND = (
    "Scores in percent: mean ± standard deviation over seeds (n - 1 in the denominator), with the number of seeds "
    "where it is not 3. The ± of a mean over data sets is the deviation of the means of those n seeds that all its "
    "k data sets have. The number behind a method is that of training images per class; full: all of them.\n\n"
    "Mode elevater keeps to the benchmark, which reports the best epoch by its score on the test set: that looks "
    "better than it is. Mode strict reports the last epoch, without the quirks of the benchmark's prompts and metrics."
)


@dataclass(frozen=True)
class Table:
    """`rows[0]` is the head; a cell in `**` is bold."""

    title: str
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write report.md, report.html and report.png of the results in `folders`, print the tables, and return the path of
    report.md.

    The folders may be of several models, or of one; where two hold the same measurement, the later folder counts.
    `output`: the folder to write to, by default the first of `folders`. Raises UserError where there are no results,
    or where the files cannot be written.
    """
    records = [record for folder in folders for record in read_results(Path(folder))]
    return write_report(records, Path(output or folders[0]))


def write_report(records: Sequence[Record], output: Path) -> Path:
    """As `report`, from the records."""
    models = models_of(records)
    if not models:
        raise UserError(
            f"of the results, {len(records)} in number, none has a score: there is nothing to report. "
            "Evaluate a model first: vlcl eval elevater MODEL --data-root DIR"
        )
    path, figure = output / "report.md", output / "report.png"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replacing_file(figure) as temporary:
            draw(models, temporary)
            text = page(models, records)
            replace_text(path, text)
            replace_text(path.with_suffix(".html"), as_html(text, temporary.read_bytes()))
    except OSError as error:
        raise UserError(
            f"{output} could not be written: {reason(error)}; give another --output, or make room"
        ) from None
    _print([table for model in models for table in model_tables(model)] if len(models) == 1 else comparison(models))
    print(f"report: {path}\nfigure: {figure}")
    return path


def page(models: Sequence[Model], records: Sequence[Record]) -> str:
    """report.md."""
    blocks = ["# ELEVATER evaluation", LEGEND, "![The scores over the number of shots](report.png)"]
    if len(models) > 1:
        blocks += ["## Comparison", *map(_as_markdown, comparison(models))]
    for model in models:
        blocks += [f"## {model.label}", f"Weights `{model.records[0]['weights']}`."]
        blocks += map(_as_markdown, model_tables(model))
    blocks += ["## Protocol", "\n".join(f"- {line}" for line in _protocols(models))]
    blocks += ["## Notes", "\n".join(f"- {line}" for line in _notes(models, records))]
    return "\n\n".join(blocks) + "\n"


def _as_markdown(table: Table) -> str:
    grid = markdown_table(table.rows, numbers=range(TEXT_COLUMNS, len(table.rows[0])))
    return "\n\n".join([f"### {table.title}", grid, *table.notes])


def model_tables(model: Model) -> list[Table]:
    """The scores of one model, a table for each mode."""
    tables = []
    for mode in sorted({column.mode for column in model.columns}):
        columns = [column for column in model.columns if column.mode == mode]
        datasets = in_order(dataset for dataset, column in model.cells if column in columns)
        rows, notes = [["data set", "metric", "chance", *(column.title for column in columns)]], []
        for name in datasets:
            cells = [model.cells.get((name, column)) for column in columns]
            sign, note = _marks(name, cells)
            notes += note
            texts = [_text(cell.score, column) if cell else "-" for cell, column in zip(cells, columns)]
            rows.append([name + sign, *_metric(cells), *texts])
        if len(averaged(datasets)) > 1:
            rows += _mean_rows(model, columns, averaged(datasets))
        tables.append(Table(f"{model.label}, {mode_title([model], columns)}", rows, notes))
    return tables


def _mean_rows(model: Model, columns: Sequence[Column], names: Sequence[str]) -> list[list[str]]:
    """A row of averages for the columns with all of the benchmark's data sets, one of means for the others."""
    found = [{name: cell for name, cell in model.of_column(column).items() if name in names} for column in columns]
    counts = {len(cells) for cells in found if cells and not _is_whole(cells)}
    sample = any(cell.sample for cells in found for cell in cells.values())
    averages, means = ["**Average**", f"of all {len(benchmarks())}", ""], [_mean_name(names, counts, sample), "", ""]
    for cells, column in zip(found, columns):
        score, whole = average(cells.values()) if cells else None, _is_whole(cells)
        averages.append(f"**{_text(score, column)}**" if score and whole else "-")
        means.append(_text(score, column, len(cells) * (len(counts) > 1)) if score and not whole else "-")
    return [averages] * any(map(_is_whole, found)) + [means] * bool(counts)


def _is_whole(cells: Mapping[str, Cell]) -> bool:
    """Whether these are all of the benchmark's data sets, each with its whole test split."""
    return set(cells) == {one.name for one in benchmarks()} and not any(cell.sample for cell in cells.values())


def _mean_name(names: Sequence[str], counts: Set[int], sample: bool) -> str:
    ours = [benchmark.name for benchmark in benchmarks()]
    k = min(counts) if len(counts) == 1 else "k"
    return f"mean of {k}" + f" of {len(ours)}" * (names[0] in ours) + f" {SAMPLE}" * sample


def _text(score: Score, column: Column, datasets: int = 0) -> str:
    """61.25 ± 0.31, and behind it (n=2) where that is not 3, and k, the number of `datasets`, where one is given."""
    text = f"{score.mean:.2f}" + (f" ± {score.sd:.2f}" if score.sd is not None else "")
    seeds = 3 if column.method == "zeroshot" else len(score.by_seed)  # zero-shot has none
    numbers = [f"n={seeds}"] * (seeds != 3) + [f"k={datasets}"] * (datasets > 0)
    return f"{text} ({', '.join(numbers)})" if numbers else text


def _metric(cells: Iterable[Cell | None]) -> list[str]:
    """Its name, and the score of guesses."""
    cell = next(cell for cell in cells if cell)
    return [cell.metric, f"{cell.chance:.2f}" if cell.chance else "-"]


def _marks(name: str, cells: Iterable[Cell | None]) -> tuple[str, list[str]]:
    """The signs and notes of a data set of which a cell is a sample, or few-shot in a form that is not the benchmark's;
    else nothing."""
    records = [record for cell in cells if cell for record in cell.records.values()]
    notes = {}
    if short := why_incomplete(records):
        notes[SAMPLE] = f"a sample: {short}; not comparable with published figures."
    forms = sorted({record["form"] for record in records if record["method"] != "zeroshot"} - {"native"})
    if forms:
        notes[OTHER_FORM] = f"read from {' and '.join(forms)}, so the training subsets are not the benchmark's."
    return "".join(f" {sign}" for sign in notes), [f"{sign} {name}: {note}" for sign, note in notes.items()]


def comparison(models: Sequence[Model]) -> list[Table]:
    """A table for each column that several models have, and one of their means."""
    columns = {column: None for model in models for column in model.columns}
    tables, means = [], []
    for column in sorted(columns, key=lambda column: column.place):
        having = [model for model in models if column in model.columns]
        if len(having) > 1:
            table, mean_row = _compared(having, column)
            tables.append(table)
            if mean_row:
                means.append((table.title, mean_row[0], dict(zip(table.rows[0][SCORES:], mean_row[SCORES:]))))
    heads = list(dict.fromkeys(head for _, _, texts in means for head in texts))
    rows = [[title, over.strip("*"), *(texts.get(head, "-") for head in heads)] for title, over, texts in means]
    return [*tables, Table("Means over data sets", [["scores", "data sets", *heads], *rows])] if rows else tables


def _compared(models: Sequence[Model], column: Column) -> tuple[Table, list[str]]:
    """The table of one column, and its last row, of means; that is empty for less than two that can be compared."""
    first, *others = models
    cells_of = [model.of_column(column) for model in models]
    heads = [*(model.label for model in models), *(f"{other.label} − {first.label}" for other in others)]
    rows, notes, alike = [["data set", "metric", "chance", *heads]], [], []
    for name in in_order(name for cells in cells_of for name in cells):
        cells = [found.get(name) for found in cells_of]
        sign, note = _marks(name, cells)
        comparable = len(_fingerprints(cells)) == 1
        if not comparable:
            sign, note = (
                f"{sign} {UNLIKE}",
                [*note, f"{UNLIKE} {name}: other test images, labels or class names; not compared."],
            )
        elif all(cells):
            alike.append(name)
        notes += note
        rows.append([name + sign, *_metric(cells), *_row([cell and cell.score for cell in cells], column, comparable)])
    mean_row = []
    if len(names := averaged(alike)) > 1:
        chosen = [{name: found[name] for name in names} for found in cells_of]
        whole = all(_is_whole(cells) for cells in chosen)
        sample = any(cell.sample for cells in chosen for cell in cells.values())
        label = "**Average**" if whole else _mean_name(names, {len(names)}, sample)
        mean_row = [label, "", "", *_row([average(cells.values()) for cells in chosen], column, True)]
    title = f"{column.title}, {mode_title(models, [column])}"
    return Table(title, [*rows, mean_row] if mean_row else rows, notes), mean_row


def _row(scores: Sequence[Score | None], column: Column, comparable: bool) -> list[str]:
    """The scores, the best of several in bold where it is one, and the differences to the first."""
    texts = [_text(score, column) if score else "-" for score in scores]
    shown = [f"{score.mean:.2f}" if score else "" for score in scores]
    best = shown.index(f"{max(score.mean for score in scores if score):.2f}")
    if comparable and len(list(filter(None, shown))) > 1 and shown.count(shown[best]) == 1:
        texts[best] = f"**{texts[best]}**"
    first, *others = scores
    for other in others:
        change = other.minus(first) if comparable and first and other else None
        deviation = f" ± {change.sd:.2f}" if change and change.sd is not None else ""
        texts.append(f"{change.mean:+.2f}{deviation}" if change else "-")
    return texts


def _fingerprints(cells: Iterable[Cell | None]) -> set[str]:
    return {record["fingerprints"]["test"] for cell in cells if cell for record in cell.records.values()}


def _protocols(models: Sequence[Model]) -> list[str]:
    """What each model's results of a method keep to."""
    lines = []
    for model in models:
        for method, title in METHODS.items():
            found = [record["protocol"] for record in model.records if record["method"] == method]
            if found:
                settings = ", ".join(f"{key}={as_text(value)}" for key, value in found[-1].items())
                lines.append(f"{model.label}, {title}: {settings or 'no settings'}")
    return lines


def _notes(models: Sequence[Model], records: Sequence[Record]) -> list[str]:
    """What happened on the way: searches, divergence, image forwards, test splits that changed, missing scores."""
    lines = []
    for model in models:
        lines += [line for method in METHODS if (line := _searches(model, method))]
        lines += _diverged(model)
        lines += _forwards(model)
        for name in in_order(name for name, _ in model.cells):
            if len(_fingerprints(cell for (dataset, _), cell in model.cells.items() if dataset == name)) > 1:
                lines.append(f"{model.label}, {name}: the results are not all of the same test images.")
    if lost := sum(not has_score(record) for record in records):
        lines.append(f"Results without a finite score, which are left out: {lost}.")
    return lines


def _once(model: Model, key: str, method: str | None = None) -> list[dict[str, Any]]:
    """Values of the records' `key`, once for the two modes of a measurement, which share its work."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in model.records:
        if record[key] and method in (None, record["method"]):
            found.setdefault(tuple(record[part] for part in ("dataset", "method", "shots", "seed")), record[key])
    return list(found.values())


def _searches(model: Model, method: str) -> str:
    searches = _once(model, "search", method)
    if not searches:
        return ""
    reasons = Counter(failure["why"] for search in searches for failure in search["failed"])
    runs, diverged = (sum(search[key] for search in searches) for key in ("runs", "diverged"))
    failed = ", ".join(f"{count:,} failed ({why})" for why, count in reasons.most_common()) or "none failed"
    return f"{model.label}, {METHODS[method]}: {runs:,} settings searched, {diverged:,} diverged, {failed}."


def _diverged(model: Model) -> list[str]:
    """Final trainings that ended in weights that are no numbers, once for the modes that share one."""
    found: dict[tuple[str, str], set[int]] = {}
    for (dataset, column), cell in model.cells.items():
        seeds = {seed for seed, record in cell.records.items() if record["settings"].get("diverged")}
        found.setdefault((dataset, column.title), set()).update(seeds)
    return [
        f"{model.label}, {dataset}, {title}: the final training diverged, seed {', '.join(map(str, sorted(seeds)))}."
        for (dataset, title), seeds in found.items()
        if seeds
    ]


def _forwards(model: Model) -> list[str]:
    images = [one for one in _once(model, "images") if one["reference"] is not None]  # None: not the benchmark's method
    forwards, cached, reference = (sum(one[key] for one in images) for key in ("forwards", "cached", "reference"))
    if not reference:
        return []
    times = f", {reference / forwards:,.0f} times as many" if forwards else ""
    return [
        f"{model.label}: {forwards:,} image forwards, {cached:,} images from the cache; the benchmark's own procedure "
        f"takes {reference:,} forwards for the same scores{times}."
    ]


def _print(tables: Sequence[Table]) -> None:
    out = console()
    for table in tables:
        out.print(f"\n{table.title}", style="bold", markup=False, highlight=False)
        print_table(out, table.rows, TEXT_COLUMNS)
        for note in table.notes:
            out.print(note, markup=False, highlight=False)
