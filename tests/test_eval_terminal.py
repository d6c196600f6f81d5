"""Tables on a terminal of any width."""

from __future__ import annotations

import pytest
from rich.console import Console

from vlcl_eval.terminal import fitting, print_table


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
