"""Public tasks from a folder: their published sizes, labels and splits, and the files that trainings read."""

from __future__ import annotations

import os

import pytest

from benchmarks import glue
from benchmarks.machine import DATA_VARIABLE, NotMeasuredError
from earlyexit_kernels.data.rows import Split
from earlyexit_kernels.data.table import read_table
from earlyexit_kernels.tuning.metrics import METRICS

#: Published numbers of rows of train and dev (TREC: test).
PUBLISHED = {
    "sst2": (67349, 872),
    "trec": (5452, 500),
    "cola": (8551, 1043),
    "mrpc": (3668, 408),
    "rte": (2490, 277),
    "stsb": (5749, 1500),
    "wnli": (635, 71),
    "qnli": (None, 5463),
}


@pytest.mark.data
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_row_counts(name):
    if not os.environ.get(DATA_VARIABLE):
        pytest.skip(f"{DATA_VARIABLE} is not set")
    for split, rows in zip(("train", "dev"), PUBLISHED[name], strict=True):
        assert rows is None or len(glue.read_split(name, split)) == rows
    assert glue.TASKS[name].metric in METRICS


def test_files_of_a_training(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(NotMeasuredError, match=r"a folder with rte/train.tsv"):
        glue.read_split("rte", "train")
    (tmp_path / "rte").mkdir()
    for name, rows in (("train", 20), ("dev", 3)):
        lines = "".join(f"{i}\t{i % 2}\tfirst {i}\tsecond {i}\n" for i in range(rows))
        (tmp_path / "rte" / f"{name}.tsv").write_text(f"idx\tlabel\tsentence1\tsentence2\n{lines}")
    assert glue.read_split("rte", "dev") == Split([(f"first {i}", f"second {i}") for i in range(3)], [0, 1, 0])
    files = glue.write_files("rte", tmp_path / "rows", rows=10, holdout=6, seed=1)
    tables = {name: read_table(file).columns for name, file in files.items()}
    assert [len(table["text"]) for table in tables.values()] == [10, 6, 3]
    assert set(tables["train"]) == {"text", "pair", "label"}
    assert not set(tables["train"]["text"]) & set(tables["tuning"]["text"])
    (tmp_path / "rte" / "train.tsv").unlink()
    assert glue.write_files("rte", tmp_path / "rows", rows=10, holdout=6, seed=1) == files, "files are kept"
