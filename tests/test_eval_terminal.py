"""Tables on a terminal of any width."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from eval_data import samples, write_native
from rich.console import Console

from vlcl_eval.datasets import check
from vlcl_eval.report.terminal import fitting, print_table


def test_columns_that_do_not_fit_a_terminal_come_below_with_the_names_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    head = ["data set", "metric", "a" * 10, "b" * 10, "c" * 10]
    rows = [head, ["mnist", "accuracy", "**1**", "2", "[3]"]]
    assert fitting(rows, 500, 2) == [[0, 1, 2, 3, 4]]
    assert fitting(rows, 10 + 10 + 12 + 12, 2) == [[0, 1, 2, 3], [0, 1, 4]]
    assert fitting(rows, 5, 2) == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    print_table(Console(width=80), rows, 2)
    assert capsys.readouterr().out.split()[-5:] == ["mnist", "accuracy", "1", "2", "[3]"]


def test_the_list_of_data_sets_fits_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_native(tmp_path, "voc-2007-classification", test=[])
    write_native(tmp_path, "mnist", train=samples(10, 3, 0), test=samples(10, 2, 1))
    monkeypatch.setattr(check, "console", lambda: Console(width=80))
    with pytest.raises(typer.Exit):
        check.elevater(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    mnist = [line for line in lines if line.startswith("mnist")]
    assert mnist[0].split(maxsplit=1)[1].startswith("sample   native")
    assert "30 / 60,000" in mnist[0]
    assert "20 / 10,000" in mnist[0]
    assert mnist[1] == "mnist: 10 classes, same order"
    assert all(len(line) <= 80 for line in lines if not line.startswith("voc-2007-classification: "))
