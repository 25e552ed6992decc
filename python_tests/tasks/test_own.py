"""A user's own files as a task: what their labels are, and which files are refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from earlyexit_kernels.tasks.own import Columns, OwnData, load_own, read_own
from earlyexit_kernels.tasks.sources import Split


def csv_of(folder, labels, name="train.csv"):
    path = folder / name
    path.write_text("text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels)), "utf-8")
    return path


@pytest.mark.parametrize(
    ("labels", "names", "kind", "found"),
    [
        (["good", "bad", " good "], ("bad", "good"), "single_label_classification", [1, 0, 1]),
        (["10", "2", "2", "10", "+2"], ("2", "10"), "single_label_classification", [1, 0, 0, 1, 0]),
        (["1", "2.5", "-1"], ("label",), "regression", [1.0, 2.5, -1.0]),
        (["True", "False", "False", "True"], ("False", "True"), "single_label_classification", [1, 0, 0, 1]),
    ],
)
def test_labels_are_classes_or_numbers(tmp_path, labels, names, kind, found):
    own, task = read_own(csv_of(tmp_path, labels), None, Columns())
    assert (task.label_names, task.problem_type, task.split("train").labels) == (names, kind, found)
    again = OwnData.from_dict(json.loads(json.dumps(asdict(own))))
    assert again == own and load_own(again) == load_own(own) and load_own(own).splits == task.splits


def json_lines(path, rows):
    pytest.importorskip("datasets", reason="JSON lines require the extra 'train'")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_lines_have_typed_labels_and_pairs(tmp_path):
    path = json_lines(tmp_path / "train.jsonl", [{"a": "x", "b": f"y{i}", "c": i % 2 == 0} for i in range(4)])
    _, task = read_own(path, None, Columns("a", "b", "c"))
    assert task.split("train") == Split([("x", f"y{i}") for i in range(4)], [1, 0, 1, 0])
    assert task.label_names == ("False", "True")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a", "1", "a", "1"], "names or numbers, got both: 'a' in {path}, line 2 and 1 in {path}, line 3"),
        (["a", "", "b"], "line 3: expected a label, a name or a finite number, got none: the cell is empty"),
        (["1.5", "nan", "2.5"], "line 3: expected a label, a name or a finite number, got nan"),
        (["1", "1e999", "2"], "line 3: expected a label"),
        (["a", "a"], "at least two different labels"),
        (["2.5", "2.5"], "at least two different labels"),
        (["0", "-1", "1", "0"], "line 3: -1 stands for a hidden label"),
        (["a", "b", "c", "d"], "4 different labels in 4 rows"),
        (["1", "9" * 5000, "2"], "line 3: expected a label"),
    ],
)
def test_unusable_labels_are_refused(tmp_path, labels, words):
    path = csv_of(tmp_path, labels)
    with pytest.raises(ValueError) as error:
        read_own(path, None, Columns())
    assert words.format(path=path) in str(error.value)


@pytest.mark.parametrize("rows", [[{"text": "a", "label": "x"}, {"text": "b"}], [{"text": None, "label": "x"}] * 2])
def test_missing_values_are_refused(tmp_path, rows):
    path = json_lines(tmp_path / "train.jsonl", [*rows, {"text": "c", "label": "y"}] * 2)
    with pytest.raises(ValueError, match=r"train.jsonl, line [12]: expected a (label|text)"):
        read_own(path, None, Columns())


def test_missing_columns_name_those_there_are(tmp_path):
    path = csv_of(tmp_path, ["a", "b"] * 2)
    for columns, option in ((Columns(text="x"), "--text-column"), (Columns(label="x"), "--label-column")):
        with pytest.raises(ValueError, match=rf"has no column 'x' \({option}\); it has \['text', 'label'\]"):
            read_own(path, None, columns)
    with pytest.raises(ValueError, match=r"no columns 'x' \(--text-column\) and 'y' \(--pair-column\)"):
        read_own(path, None, Columns(text="x", pair="y"))


def test_dev_labels_are_those_of_train(tmp_path):
    train = csv_of(tmp_path, ["bad", "good"] * 2)
    _, task = read_own(train, csv_of(tmp_path, ["good"], "dev.csv"), Columns())
    assert task.split("dev").labels == [1] and task.evaluation == "dev"
    with pytest.raises(ValueError, match=r"dev.csv, line 3: expected a label of the train file, bad, good; got 'fair'"):
        read_own(train, csv_of(tmp_path, ["good", "fair"], "dev.csv"), Columns())
    numbers = csv_of(tmp_path, ["1.5", "2.5"], "numbers.csv")
    with pytest.raises(ValueError, match=r"dev.csv, line 2: expected a number as label, as in the train file"):
        read_own(numbers, csv_of(tmp_path, ["good"], "dev.csv"), Columns())
    with pytest.raises(ValueError, match=r"--dev: expected other rows than those of --train"):
        read_own(train, train, Columns())


def test_files_that_are_gone_or_changed_are_refused_unless_others_are_given(tmp_path):
    train = csv_of(tmp_path, ["bad", "good"] * 2)
    own, _ = read_own(train, None, Columns())
    other = csv_of(tmp_path, ["good"], "other.csv")
    csv_of(tmp_path, ["good", "bad"] * 2)
    with pytest.raises(ValueError, match=r"train.csv has changed since the model was trained.*--dev"):
        load_own(own)
    train.unlink()
    with pytest.raises(FileNotFoundError, match=r"train.csv.* is gone; give a file .* with --dev"):
        load_own(own)
    task = load_own(own, dev=other)
    assert task.split("dev").labels == [1] and "train" not in task.splits
