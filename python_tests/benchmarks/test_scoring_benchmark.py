"""The benchmark of many files: its rows and its table."""

import pytest

pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

from benchmarks import harness, scoring, tables
from earlyexit_kernels.tuning.tables import environment


def test_rows_are_numbered_and_repeat_the_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "FILE", 4)
    scoring.write_rows(tmp_path / "rows", ["a", "b", "c"], 10)
    files = sorted((tmp_path / "rows").iterdir())
    found = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert len(files) == 3 and scoring.rows_in(tmp_path / "rows") == 10
    assert [row["id"] for row in found] == list(range(10))
    assert {len({row["text"] for row in found[n : n + 3]}) for n in range(2)} == {3}


@pytest.mark.parametrize(("once", "words"), [(True, "every row once"), (False, "rows lost or doubled")])
def test_table(monkeypatch, once, words):
    record = {"rows": 1000, "seconds": 2.0, "rows_per_second": 500.0, "loop_rows_per_second": [490.0, 510.0]}
    found = [harness.Measured("m", environment(), [record | {"ratio": 1.0, "every_row_once": once}])]
    monkeypatch.setattr(tables, "measured", lambda suite, results: found)
    table = tables.TABLES["scoring"]()
    assert words in table and "| 1,000 |" in table.replace("  ", " ")
