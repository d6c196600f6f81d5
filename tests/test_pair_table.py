"""The pair table: one meaning on any number of ranks, saved and loaded across world sizes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from vlcl import distributed
from vlcl.pair_table import PairTable

ROWS = 11  # uneven on 2 ranks (6, 5) and on 3 (4, 4, 3)


def work(folder: str | None = None) -> tuple[Tensor, Tensor, list[int]]:
    """Three steps of reads and writes with a duplicate; every rank writes the whole global batch."""
    table = PairTable(ROWS)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        row_G = torch.randperm(ROWS, generator=g)[:6]
        row_G[5] = row_G[0]
        table.write(row_G, torch.randn(6, 2, generator=g))
        table.read(row_G)
    if folder is not None:
        table.save(Path(folder))
    values_GK, visits_G = table.read(torch.arange(ROWS))
    return values_GK, visits_G, [table.rows_written, len(distributed.own_rows(ROWS))]


def load_all(folder: str, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    table = PairTable(rows)
    table.load(Path(folder))
    return table.read(torch.arange(rows))


def test_a_row_written_twice_in_a_batch_keeps_the_last_and_counts_one_visit() -> None:
    table = PairTable(4)
    table.write(torch.tensor([2, 0, 2]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    values_GK, visits_G = table.read(torch.tensor([2, 0, 1]))
    assert values_GK[:2].tolist() == [[5.0, 6.0], [3.0, 4.0]]
    assert values_GK[2].isnan().all()
    assert visits_G.tolist() == [1, 1, 0]
    assert table.rows_written == 2


def test_ranks_hold_the_table_of_one_and_load_each_others(tmp_path: Path) -> None:
    values, visits, (written, _) = work(str(tmp_path / "1"))
    for world in (2, 3):
        results = on_ranks(world, work, str(tmp_path / f"{world}"))
        for got_values, got_visits, (got_written, _) in results:
            torch.testing.assert_close(got_values, values, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(got_visits, visits)
            assert got_written == written
        assert sum(owned for _, _, (_, owned) in results) == ROWS
    for saved, world in [("2", 3), ("3", 2), ("1", 2)]:
        for got_values, got_visits in on_ranks(world, load_all, str(tmp_path / saved)):
            torch.testing.assert_close(got_values, values, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(got_visits, visits)
    got_values, _ = load_all(str(tmp_path / "3"))  # a plain process
    torch.testing.assert_close(got_values, values, rtol=0, atol=0, equal_nan=True)


def test_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    work(str(tmp_path / "t"))
    with pytest.raises(ValueError, match=f"has {ROWS} rows, the table {ROWS + 1}"):
        load_all(str(tmp_path / "t"), ROWS + 1)


def test_a_table_of_other_columns_or_with_rows_missing_is_refused(tmp_path: Path) -> None:
    on_ranks(3, work, str(tmp_path / "t"))
    with pytest.raises(ValueError, match="has 2 columns, the table 3"):
        PairTable(ROWS, 3).load(tmp_path / "t")
    first, second, third = sorted((tmp_path / "t").iterdir())
    (tmp_path / "t" / "rows-000000000004-000000000009.safetensors").touch()
    with pytest.raises(ValueError, match="has files of two tables"):
        load_all(str(tmp_path / "t"))
    (tmp_path / "t" / "rows-000000000004-000000000009.safetensors").unlink()
    second.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"lacks the rows 4 \.\. 7"):
        load_all(str(tmp_path / "t"))
    third.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=f"has 4 rows, the table {ROWS}"):
        load_all(str(tmp_path / "t"))
    second = tmp_path / "t" / "rows-000000000004-000000000011.safetensors"
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="has 4 rows: not what its name says"):
        load_all(str(tmp_path / "t"))
    second.unlink()
    first.write_bytes(b"no table")
    with pytest.raises(ValueError, match="cannot be read"):
        load_all(str(tmp_path / "t"))


def test_more_ranks_than_rows(tmp_path: Path) -> None:
    on_ranks(3, save_two_rows, str(tmp_path / "t"))
    table = PairTable(2)
    table.load(tmp_path / "t")
    assert table.read(torch.tensor([0, 1]))[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def save_two_rows(folder: str) -> None:
    table = PairTable(2)
    table.write(torch.tensor([0, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    table.save(Path(folder))


@pytest.mark.parametrize("row", [-1, ROWS])
def test_rows_that_the_table_does_not_have_are_refused(row: int) -> None:
    table = PairTable(ROWS)
    with pytest.raises(ValueError, match=r"are not all rows of the table \(0 \.\. 10\): .*vlcl data index"):
        table.read(torch.tensor([3, row]))
    with pytest.raises(ValueError, match="are not all rows of the table"):
        table.write(torch.tensor([3, row]), torch.zeros(2, 2))
