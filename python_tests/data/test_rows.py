"""Labelled rows of a table: what their labels are, which are refused, and how rows are held out and tokenised."""

from __future__ import annotations

import json

import pytest
from transformers import DataCollatorWithPadding

from earlyexit_kernels.data import toy
from earlyexit_kernels.data.rows import (
    CLASSES,
    NUMBERS,
    Columns,
    Labels,
    Split,
    check_columns,
    encode,
    hold_out,
    labels_in,
    read_rows,
)
from earlyexit_kernels.data.table import read_table

GROUPED = Columns(group="query")


def table_of(folder, labels, **more):
    path = folder / "rows.jsonl"
    rows = [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)]
    for name, values in more.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_table(path)


@pytest.mark.parametrize(
    ("labels", "problem", "names", "kind", "found"),
    [
        (["good", "bad", " good "], None, ("bad", "good"), CLASSES, [1, 0, 1]),
        (["10", "2", "2", "10", "+2"], None, ("2", "10"), CLASSES, [1, 0, 0, 1, 0]),
        ([True, False, False, True], None, ("False", "True"), CLASSES, [1, 0, 0, 1]),
        (["0.0", "1.0", "0", 1.0], None, ("0", "1"), CLASSES, [0, 1, 0, 1]),
        (["1", "2.5", "-1"], None, ("label",), NUMBERS, [1.0, 2.5, -1.0]),
        (["1", "5", "3", "-1"], NUMBERS, ("label",), NUMBERS, [1.0, 5.0, 3.0, -1.0]),
        (["refund", "Refunds", "refund", "Refunds"], None, ("Refunds", "refund"), CLASSES, [1, 0, 1, 0]),
        (["item 1", "item 2", "item 2"], None, ("item 1", "item 2"), CLASSES, [0, 1, 1]),
    ],
)
def test_labels_are_classes_or_numbers(tmp_path, labels, problem, names, kind, found):
    table = table_of(tmp_path, labels)
    assert labels_in(table, Columns(), problem=problem) == Labels(names, kind)
    assert read_rows(table, Columns(), Labels(names, kind)).labels == found


@pytest.mark.parametrize(
    ("labels", "problem", "words"),
    [
        (["a", "1", "a", "1"], None, "names or numbers, got both: 'a' in {path}, line 1 and 1 in {path}, line 2"),
        (["a", "", "b"], None, "line 2: expected a label, a name or a finite number, got none: the cell is empty"),
        (["a", None, "b"], None, "line 2: expected a label, a name or a finite number, got none: the cell is empty"),
        (["1.5", "nan", "2.5"], None, "line 2: expected a label, a name or a finite number, got nan"),
        (["1", "1e999", "2"], None, "line 2: expected a label"),
        (["1", "9" * 5000, "2"], None, "line 2: expected a label"),
        ([["a"], "b", "a"], None, "line 1: expected a label"),
        (["a", "a"], None, "at least two different labels in {path}, all 2 are 'a'"),
        (["2.5", "2.5"], None, "at least two different labels"),
        (["0", "-1", "1", "0"], None, "line 2: -1 stands for a hidden label"),
        (["a", "b", "c", "d"], None, "4 different labels in 4 rows; give --problem regression"),
        (
            ["0"] * 20 + ["1"] * 20 + ["1.5"],
            None,
            "line 41: expected a whole number as label, as in 40 other rows",
        ),
        (["1.5", "2.5", "1.5"], CLASSES, "line 1: expected a whole number as label"),
        (["good", "bad"] * 2, NUMBERS, "expected numbers, since --problem regression is given; got 'good'"),
        (["positive", "negative"] * 9 + ["positve"], None, "line 19: expected a label that occurs in other rows, got"),
        (["positive", "negative"] * 9 + ["Positve"], None, "'Positve', which is close to 'positive'; correct it, or"),
    ],
)
def test_unusable_labels_are_refused(tmp_path, labels, problem, words):
    table = table_of(tmp_path, labels)
    with pytest.raises(ValueError) as error:
        labels_in(table, Columns(), problem=problem)
    assert words.format(path=table.path) in str(error.value)


@pytest.mark.parametrize(
    ("labels", "texts", "words"),
    [
        (["good", "fair"], ["a", "b"], "line 2: expected a label of the model, bad, good; got 'fair'"),
        (["good", "bad"], ["a", "  "], "line 2: expected a text, got an empty one; leave the row out"),
        (["good", "bad"], ["a", 3], "line 2: expected a text in column 'text', got 3"),
        (["good", "bad"], ["a", None], "line 2: expected a text in column 'text', got none: the cell is empty"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused(tmp_path, labels, texts, words):
    with pytest.raises(ValueError, match=words):
        read_rows(table_of(tmp_path, labels, text=texts), Columns(), Labels(("bad", "good"), CLASSES))


def test_numbers_and_default_names_of_classes(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: expected a number as label, as the model predicts, got 'good'"):
        read_rows(table_of(tmp_path, ["good"]), Columns(), Labels(("label",), NUMBERS))
    labels = Labels(("LABEL_0", "LABEL_1"), CLASSES)
    assert read_rows(table_of(tmp_path, [1, "0", "LABEL_1"]), Columns(), labels).labels == [1, 0, 1]


def test_missing_columns_are_named_together(tmp_path):
    table = table_of(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=r"has no column 'x' \(--group-column\); it has \['text', 'label'\]"):
        check_columns(table, Columns(group="x"))
    with pytest.raises(ValueError, match=r"no columns 'x' \(--text-column\) and 'y' \(--pair-column\)"):
        read_rows(table, Columns(text="x", pair="y"), Labels(("a", "b"), CLASSES))


def test_pairs(tmp_path):
    table = table_of(tmp_path, ["a", "b"], more=["x", "y"])
    split = read_rows(table, Columns(pair="more"), Labels(("a", "b"), CLASSES))
    assert split == Split([("text 0", "x"), ("text 1", "y")], [0, 1]) and list(split.rows) == [1, 2]
    assert split.take([1]) == Split([("text 1", "y")], [1]) and split.take([1]).rows == [2]


def test_relevance_of_the_rows_of_queries(tmp_path):
    table = table_of(tmp_path, [0, "2", 1, 0], query=["b", "a", " b ", 3])
    assert labels_in(table, GROUPED) == Labels(("label",), NUMBERS)
    assert read_rows(table, GROUPED, Labels(("label",), NUMBERS)) == Split(
        [f"text {row}" for row in range(4)], [0.0, 2.0, 1.0, 0.0], [0, 1, 0, 2]
    )
    for labels, queries, words in (
        ([0, -1], ["a", "a"], "line 2: expected as label the relevance of a document to its query, a number of at lea"),
        ([0, "x"], ["a", "a"], "since --group-column is given; got 'x'"),
        ([0, 1], ["a", " "], "line 2: expected the name or number of a query in column 'query', got ' '"),
        ([0, 1], ["a", None], "got none: the cell is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            read_rows(table_of(tmp_path, labels, query=queries), GROUPED, Labels(("label",), NUMBERS))


def test_rows_are_held_out_by_the_seed():
    split = Split([f"s{i}" for i in range(20)], list(range(20)))
    rest, held = hold_out(split, 6, seed=3)
    assert (rest, held) == hold_out(split, 6, seed=3) != hold_out(split, 6, seed=4)
    assert sorted([*rest, *held]) == list(range(20)) and len(held) == 6
    assert split.take(held).texts == [f"s{i}" for i in held]


def test_queries_are_held_out_whole():
    split = Split([""] * 30, [0.0] * 30, [row // 3 for row in range(30)])
    rest, held = hold_out(split, 10, seed=1)
    assert len(held) == 12 and len(rest) == 18
    assert not set(split.take(rest).groups) & set(split.take(held).groups)
    with pytest.raises(ValueError, match="the queries of 6 rows are all that there are"):
        hold_out(Split([""] * 6, [0.0] * 6, [0] * 6), 1)


@pytest.mark.parametrize("rows", [-1, 3, 4])
def test_more_rows_than_there_are_cannot_be_held_out(rows):
    with pytest.raises(ValueError, match=r"--holdout: expected fewer than the 3 rows that there are"):
        hold_out(Split(["a", "b", "c"], [0, 1, 0]), rows)


def test_encoded_rows_are_cut_and_not_padded():
    tokenizer = toy.toy_tokenizer()
    data = encode(Split(["the plot was dull .", "the cast was not very witty ."], [0, 1]), tokenizer)
    assert [len(row["input_ids"]) for row in data] == [7, 9]
    batch = DataCollatorWithPadding(tokenizer)(data)
    assert batch["attention_mask"].sum(1).tolist() == [7, 9] and batch["labels"].tolist() == [0, 1]
    pairs = encode(Split([("the plot was dull", "the cast was witty")], [1.5]), tokenizer, max_length=8)
    assert len(pairs[0]["input_ids"]) == 8 and pairs[0]["labels"] == 1.5
