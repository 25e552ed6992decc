"""Tasks: folders, the hub, hidden labels, holdout, encoding and metrics."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import DataCollatorWithPadding

from earlyexit_kernels.data import toy
from earlyexit_kernels.tasks import hub, sources
from earlyexit_kernels.tasks.load import TASK_NAMES, encode, holdout, load_task
from earlyexit_kernels.tasks.sources import DATA_VARIABLE, Split
from earlyexit_kernels.tuning import metrics

#: Published numbers of rows of train, dev and test; None if a split does not exist.
PUBLISHED = {
    "sst2": (67349, 872, 1821),
    "trec": (5452, None, 500),
    "cola": (8551, 1043, 1063),
    "mrpc": (3668, 408, 1725),
    "rte": (2490, 277, 3000),
    "stsb": (5749, 1500, 1379),
    "wnli": (635, 71, None),
    "qnli": (None, 5463, None),
}


@pytest.fixture(autouse=True)
def hub_answers(monkeypatch):
    """Let the hub answer without a request."""
    monkeypatch.setattr(hub, "unreachable_reason", lambda: "")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")

    return write


@pytest.mark.data
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_row_counts(name):
    if not os.environ.get(DATA_VARIABLE):
        pytest.skip(f"{DATA_VARIABLE} is not set; it names a folder with {name}/*.tsv")
    splits = load_task(name).splits
    assert tuple(len(splits[s]) if s in splits else None for s in ("train", "dev", "test")) == PUBLISHED[name]


HEADER, PAIRS = "idx\tlabel\tsentence\n", "idx\tlabel\tsentence1\tsentence2\n"


def test_files_of_a_folder_are_read_without_quoting(folder):
    folder("sst2/train.tsv", HEADER + '0\t1\ta "fine film\n1\t0\té dull "\n')
    folder("stsb/dev.tsv", PAIRS + "0\t2.5\ta b\tc\n")
    folder("trec/train.tsv", HEADER + "0\t5\thow far ?\n")
    folder("trec/test.tsv", HEADER + "0\t4\twhere ?\n")
    task = load_task("sst2")
    assert task.splits["train"] == Split(['a "fine film', 'é dull "'], [1, 0])
    assert task.num_labels == 2 and task.metric == "accuracy"
    task = load_task("stsb")
    assert task.splits["dev"] == Split([("a b", "c")], [2.5])
    assert (task.num_labels, task.problem_type, task.metric) == (1, "regression", "pearson")
    assert load_task("trec").evaluation == "test", "it has no dev split"


#: Task, a file of it and its text, and words of the refusal.
REFUSED = [
    ("sst2", "sst2/dev.tsv", "idx\tsentence\n0\tfine\n", r"expected a header with idx, label and sentence"),
    ("sst2", "sst2/dev.tsv", HEADER + "0\tgood\tfine\n", r"dev.tsv, line 2: expected a number as label, got 'good'"),
    ("sst2", "sst2/dev.tsv", HEADER + "0\t2\tfine\n", r"line 2: expected a label in \[-1, 1\], got '2'"),
    ("sst2", "sst2/dev.tsv", HEADER + "0\t1\tfine\n1\t1\n", r"line 3: expected 3 columns, got 2"),
    ("sst2", "sst2/dev.tsv", "", r"expected a header"),
    ("cola", "cola/test.tsv", HEADER + "0\t-1\tfine .\n", r"labels of the 'test' split of task 'cola' are hidden"),
    ("cola", "cola/dev.tsv", HEADER + "0\t1\tfine .\n", r"has no 'test' split"),
    ("sst3", "sst2/dev.tsv", HEADER, r"expected one of \['toy', 'sst2'.*got 'sst3'"),
]


@pytest.mark.parametrize(("name", "file", "text", "words"), REFUSED)
def test_what_a_folder_lacks_is_named(folder, name, file, text, words):
    folder(file, text)
    with pytest.raises(ValueError, match=words):
        load_task(name).split("test")


def raising(path, config, revision):
    raise OSError("no route")


@pytest.mark.parametrize(
    ("variable", "datasets", "error", "words"),
    [
        ("/nowhere", None, FileNotFoundError, r"nowhere.*sst2.*EARLYEXIT_DATA"),
        ("", None, ImportError, r"pip install datasets.*EARLYEXIT_DATA"),
        (
            "",
            SimpleNamespace(load_dataset=raising),
            ConnectionError,
            r"nyu-mll/glue .*\(OSError: no route\).*EARLYEXIT_DATA",
        ),
    ],
)
def test_without_a_folder_or_a_hub_the_cure_is_named(monkeypatch, variable, datasets, error, words):
    monkeypatch.setenv(DATA_VARIABLE, variable)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    with pytest.raises(error, match=words):
        load_task("sst2")


class _HubRows(dict):
    """Rows of a split as returned by `datasets`: columns by name, and the names of the classes."""

    def __init__(self, names: list[str], **columns) -> None:
        super().__init__(columns)
        self.features = dict.fromkeys(columns, SimpleNamespace(names=names))


def test_hub_classes_are_renumbered(monkeypatch):
    names = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
    rows = _HubRows(names, text=["why ?", "who ?", "cd ?"], coarse_label=[2, 3, 0])
    calls = []

    def load_dataset(path, config, revision):
        calls.append((path, config, revision))
        return {"train": rows}

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = load_task("trec")
    assert calls == [("CogComp/trec", "default", "refs/convert/parquet")]
    assert [task.label_names[label] for label in task.splits["train"].labels] == ["DESC", "HUM", "ABBR"]


def test_hub_pairs_and_hidden_labels(monkeypatch):
    rows = _HubRows(["entailment", "not_entailment"], question=["q"], sentence=["s"], label=[-1])
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    loader = SimpleNamespace(load_dataset=lambda path, config, revision: {"validation": rows})
    monkeypatch.setitem(sys.modules, "datasets", loader)
    assert load_task("qnli").splits == {"dev": Split([("q", "s")], [-1])}


def test_every_task_has_known_metrics():
    for name in TASK_NAMES[1:]:
        assert set(sources.TASK_INFOS[name].metrics) <= set(metrics.METRICS)


def test_holdout_is_reproducible():
    split = Split([f"s{i}" for i in range(20)], list(range(20)), [1] * 20)
    rest, held_out = holdout(split, 6, seed=3)
    assert (rest, held_out) == holdout(split, 6, seed=3)
    assert sorted([*rest.labels, *held_out.labels]) == list(range(20)) and len(held_out) == 6
    assert held_out != holdout(split, 6, seed=4)[1]
    assert all(s == f"s{label}" for s, label in zip(held_out.sentences, held_out.labels, strict=True))


def test_holdout_draw_is_pinned():
    """A model stores the seed of its held-out rows, not the rows, so the draw must never change."""
    split = Split([""] * 10, list(range(10)))
    assert holdout(split, 4, seed=0)[1].labels == [3, 7, 5, 2]


@pytest.mark.parametrize("rows", [-1, 3, 4])
def test_holdout_refuses_invalid_number_of_rows(rows):
    with pytest.raises(ValueError, match=r"expected rows in \[0, 2\]"):
        holdout(Split(["a", "b", "c"], [0, 1, 0]), rows)


def test_encode_does_not_pad():
    tokenizer = toy.toy_tokenizer()
    data = encode(Split(["the plot was dull .", "the cast was not very witty ."], [0, 1]), tokenizer)
    assert [len(row["input_ids"]) for row in data] == [7, 9]
    batch = DataCollatorWithPadding(tokenizer)(list(data))
    assert batch["input_ids"].shape == (2, 9) and batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [7, 9]


def test_encode_joins_and_truncates_pairs():
    tokenizer = toy.toy_tokenizer()
    data = encode(Split([("the plot was dull", "the cast was witty")], [1.5]), tokenizer, max_length=8)
    assert len(data[0]["input_ids"]) == 8 and data[0]["labels"] == 1.5


@pytest.mark.parametrize(
    ("name", "predictions", "labels", "value"),
    [
        ("accuracy", [0, 1, 2, 2], [0, 1, 1, 2], 0.75),
        # TP 2, TN 1, FP 1, FN 0: (2 * 1 - 0) / sqrt(3 * 2 * 2 * 1)
        ("matthews", [1, 1, 1, 0], [1, 1, 0, 0], 2 / np.sqrt(12)),
        ("matthews", [1, 1], [1, 0], 0.0),
        # precision 2/3, recall 1
        ("f1", [1, 1, 1, 0], [1, 1, 0, 0], 0.8),
        ("f1", [0, 0], [0, 0], 0.0),
        ("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
        ("pearson", [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], 0.5),
        ("spearman", [1.0, 10.0, 100.0], [3.0, 4.0, 5.0], 1.0),
        # ranks 1.5 1.5 3 4 against 1 2 3 4; with three values any rank of the tie would do
        ("spearman", [7.0, 7.0, 8.0, 9.0], [1.0, 2.0, 3.0, 4.0], np.sqrt(0.9)),
    ],
)
def test_metrics_match_worked_examples(name, predictions, labels, value):
    assert metrics.METRICS[name](predictions, labels) == pytest.approx(value)


def test_score_of_classes_and_of_regression():
    assert metrics.score(("accuracy",), np.array([[1.0, 1.0], [0.0, 2.0]]), [0, 1]) == {"accuracy": 1.0}
    assert metrics.score(("pearson",), np.array([[1.0], [3.0]]), [0.0, 5.0])["pearson"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"metrics: expected names among .*got \['bleu'\]"):
        metrics.score(("bleu",), np.zeros((1, 2)), [0])


@pytest.mark.parametrize(("predictions", "labels"), [([], []), ([1], [1, 0]), ([[1]], [1])])
def test_metrics_refuse_wrong_shapes(predictions, labels):
    with pytest.raises(ValueError, match=r"expected predictions and labels of one shape"):
        metrics.accuracy(predictions, labels)
