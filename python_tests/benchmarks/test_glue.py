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


def write_pairs(path, numbers):
    lines = "".join(f"{i}\t{i % 2}\tfirst {i}\tsecond {i}\n" for i in numbers)
    path.write_text(f"idx\tlabel\tsentence1\tsentence2\n{lines}")


@pytest.mark.parametrize(("task", "numbers"), [("mrpc", [20, 21, 30, 31]), ("rte", [20, 21])])
def test_reported_rows_have_labels_and_do_not_stand_in_train(task, numbers, tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    (tmp_path / task).mkdir()
    for name, rows in (("train", range(20)), ("dev", [20, 3, 21]), ("test", [30, 31, 4])):
        write_pairs(tmp_path / task / f"{name}.tsv", rows)
    expected = Split([(f"first {i}", f"second {i}") for i in numbers], [i % 2 for i in numbers])
    assert glue.reported_rows(task) == expected


def test_files_of_a_training(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(NotMeasuredError, match=r"a folder with rte/train.tsv"):
        glue.read_split("rte", "train")
    (tmp_path / "rte").mkdir()
    write_pairs(tmp_path / "rte" / "train.tsv", range(20))
    write_pairs(tmp_path / "rte" / "dev.tsv", range(20, 23))
    assert glue.read_split("rte", "dev") == Split([(f"first {i}", f"second {i}") for i in range(20, 23)], [0, 1, 0])
    files = glue.write_files("rte", tmp_path / "rows", rows=10, holdout=6, seed=1)
    tables = {name: read_table(file).columns for name, file in files.items()}
    assert [len(table["text"]) for table in tables.values()] == [10, 6, 3]
    assert set(tables["train"]) == {"text", "pair", "label"}
    assert not set(tables["train"]["text"]) & set(tables["tuning"]["text"])
    (tmp_path / "rte" / "train.tsv").unlink()
    assert glue.write_files("rte", tmp_path / "rows", rows=10, holdout=6, seed=1) == files, "files are kept"
