"""`vlcl data elevater DIR`: which of the benchmark's data sets are there, and whether they are whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vlcl.errors import UserError
from vlcl_eval.datasets.registry import Benchmark, benchmarks, registered
from vlcl_eval.report.terminal import console, print_table


@dataclass(frozen=True)
class Found:
    """One data set under the root. `problem` is empty where all is well."""

    name: str
    form: str
    train: str
    test: str
    classes: str
    problem: str

    @property
    def missing(self) -> bool:
        return not self.form


def check(root: Path, labels: str = "by-name") -> list[Found]:
    """The 20, then those that only the root's own vision_datasets.json lists."""
    own, known = registered(root), list(benchmarks())
    extra = [data for name, data in own.items() if name not in {benchmark.name for benchmark in known}]
    return [check_one(root, own.get(data.name, data), labels) for data in [*known, *extra]]


def check_one(root: Path, benchmark: Benchmark, labels: str) -> Found:
    from vlcl_eval.datasets.find import NotThere, find_data_set

    sizes = {name: files.num_images for name, files in benchmark.splits.items()}
    try:
        data = find_data_set(root, benchmark.name, labels)
    except NotThere:
        return Found(benchmark.name, "", f"- / {sizes.get('train', 0):,}", f"- / {sizes['test']:,}", "", "")
    except UserError as error:
        return Found(benchmark.name, "broken", "", "", "", str(error))
    counts, problems = {}, []
    for name in ("train", "test"):
        try:
            counts[name] = f"{len(data.train if name == 'train' else data.test):,}"
        except UserError as error:
            counts[name] = "-"
            problems.append(str(error))
        if data.expected.get(name):
            counts[name] += f" / {data.expected[name]:,}"
    classes = f"{len(data.classes)} classes, {data.class_order}"
    return Found(benchmark.name, data.form, counts["train"], counts["test"], classes, "; ".join(problems))


def elevater(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the data sets (the toolkit's DATASET.ROOT).")],
    labels: Annotated[str, typer.Option(help="Map a folder's classes by-name or by-position.")] = "by-name",
) -> None:
    """Check the data sets of the ELEVATER benchmark under DIR: what is there, sizes, order of the classes.

    A size is "found / what the benchmark has". Exit code 1 where a data set that is there has a problem.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds classification/ or wds_*/ folders")
    found = check(root, labels)
    rows = [["data set", "state", "form", "train", "test"]]
    for row in found:
        state = "missing" if row.missing else "problem" if row.problem else "sample" if _short(row) else "ok"
        rows.append([row.name, state, row.form, row.train, row.test])
    print_table(console(), rows, repeated=2)
    there = [row for row in found if not row.missing]
    print(f"{len(there)} of {len(found)} data sets are there.")
    for row in there:
        print(f"{row.name}: {row.problem.removeprefix(f'{row.name}: ') or row.classes}")
    if any(row.problem for row in there):
        raise typer.Exit(1)


def _short(row: Found) -> bool:
    return any(len(set(size.split(" / "))) == 2 for size in (row.train, row.test))
