"""Train, calibrate, eval and predict on two classes, six named classes, pairs, numbers, and queries with documents."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.own_files import NAMES, write_documents
from transformers import BertForSequenceClassification

import earlyexit_kernels as ee
from earlyexit_cli import main
from earlyexit_kernels.cli.saved import HELD_OUT, Record
from earlyexit_kernels.data import toy
from earlyexit_kernels.data.table import read_table, write_table
from earlyexit_kernels.tuning.ranking import ndcg

KINDS = ("plot", "cast", "script", "music", "pace", "ending")
TEXTS = [
    f"the {kind} of the {thing} was {word} ." for kind in KINDS for thing in toy.THINGS for word in ("dull", "witty")
]
COLUMNS = ["--text-column", "a", "--pair-column", "b", "--label-column", "same"]


def two_classes(path: Path) -> Path:
    """Say whether a sentence praises."""
    texts = TEXTS * 3
    write_table(path, {"text": texts, "label": [NAMES["witty" in text] for text in texts]})
    return path


def six_classes(path: Path) -> Path:
    """Name what a sentence is about."""
    texts = TEXTS * 3
    write_table(path, {"text": texts, "label": [text.split()[1] for text in texts]})
    return path


def pairs(path: Path) -> Path:
    """Say whether the second sentence praises, in the columns a, b and same."""
    texts = TEXTS * 3
    same = [("no", "yes")["witty" in text] for text in texts]
    write_table(path, {"a": ["was the film superb ?"] * len(texts), "b": texts, "same": same})
    return path


def stars(path: Path) -> Path:
    """Give praise about 4 stars, and other sentences about 1."""
    texts = TEXTS * 3
    write_table(
        path, {"text": texts, "stars": [(4 if "witty" in text else 1) + i % 3 / 10 for i, text in enumerate(texts)]}
    )
    return path


#: Name -> what writes the file, its ending, options, the score and the answers.
RUNS = {
    "two classes": (two_classes, ".csv", [], "accuracy", set(NAMES)),
    "six classes": (six_classes, ".jsonl", [], "accuracy", set(KINDS)),
    "pairs": (pairs, ".tsv", COLUMNS, "accuracy", {"yes", "no"}),
    "numbers": (stars, ".csv", ["--label-column", "stars"], "pearson", {"stars"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_from_a_file_to_answers(name, tmp_path, capsys):
    write, ending, columns, metric, answers = RUNS[name]
    base, out, data = tmp_path / "base", tmp_path / "out", write(tmp_path / f"rows{ending}")
    toy.toy_model(0, layers=3, hidden=32).save_pretrained(base)
    toy.toy_tokenizer().save_pretrained(base)
    training = ["--output", str(out), "--epochs", "10", "--lr", "3e-3", "--pooling", "mean"]
    assert main(["train", str(base), "--data", str(data), *columns, *training]) == 0
    record, total = Record.load(out), len(read_table(data))
    assert record.scores[-1][metric] > 0.9 and record.rows + record.unseen_rows == total
    assert len(read_table(out / HELD_OUT)) == record.unseen_rows == total // 5
    capsys.readouterr()

    criterion = "hidden_cosine" if name == "numbers" else "entropy"
    assert main(["calibrate", str(out), "--max-drop", "0.3", "--criterion", criterion]) == 0
    said = capsys.readouterr().out
    assert f"chosen on half of {total // 5} held-out rows of {data.name}" in said and f"| {criterion} " in said
    model = ee.EarlyExitForSequenceClassification.from_pretrained(out)
    assert model.criterion.name == criterion and ee.Calibration.of(model).metric == metric

    page = tmp_path / "page.html"
    assert main(["eval", str(out), "--report", str(page)]) == 0
    said = capsys.readouterr().out
    summary = json.loads(page.with_suffix(".json").read_text())["summary"]
    assert f"{metric} {summary['score']:.4f} (full depth {summary['full_depth']:.4f})" in said, "one number on both"
    assert summary["rows"] == record.unseen_rows - record.unseen_rows // 2 or summary["rows"] == record.unseen_rows // 2

    predictions = tmp_path / f"predictions{ending}"
    assert main(["predict", str(out), str(data), "--output", str(predictions)]) == 0
    table = read_table(predictions).columns
    label = "predicted_label" if "label" in read_table(data).columns else "label"
    assert set(table[label]) == answers and len({*table[label.replace("label", "exit_layer")]}) >= 1
    if metric == "accuracy":
        truth = table[columns[-1] if columns else "label"]
        right = np.mean([a == b for a, b in zip(table[label], truth, strict=True)])
        capsys.readouterr()
        assert main(["eval", str(out), "--data", str(data)]) == 0
        said = capsys.readouterr().out
        assert f"accuracy {right:.4f} (full depth" in said, "eval measures what predict answers, on all rows"
        assert "is the file that the model was trained on" in said


def test_queries_with_documents(tmp_path, capsys):
    stock, out, data = tmp_path / "stock", tmp_path / "out", write_documents(tmp_path / "train.csv")
    config = toy.toy_model(layers=3, hidden=32).config
    config.num_labels = 1
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(stock)
    toy.toy_tokenizer().save_pretrained(stock)
    columns = "--text-column query --pair-column document --label-column relevance --group-column id".split()
    training = "--holdout 401 --epochs 24 --lr 5e-3 --batch-size 16 --pooling mean".split()
    assert main(["train", str(stock), "--data", str(data), *columns, "--output", str(out), *training]) == 0
    record, kept = Record.load(out), read_table(out / HELD_OUT).columns
    assert "relevance to 140 queries, column 'id'" in capsys.readouterr().out
    assert record.unseen_rows == 405, "whole queries"
    assert list(record.scores[-1]) == ["ndcg", "mrr"] and record.scores[-1]["ndcg"] > 0.8

    model = ee.EarlyExitForSequenceClassification.from_pretrained(out)
    scores = ee.Scorer(model, toy.toy_tokenizer())(list(zip(kept["query"], kept["document"], strict=True)))["score"]
    assert record.scores[-1]["ndcg"] == pytest.approx(ndcg(scores, kept["relevance"], kept["id"]).mean(), abs=2e-3)

    assert main(["calibrate", str(out), "--max-drop", "0.5", "--criterion", "patience"]) == 0
    assert " ndcg |" in capsys.readouterr().out
    calibration = ee.Calibration.of(ee.EarlyExitForSequenceClassification.from_pretrained(out))
    assert calibration.metric == "ndcg"
    page = tmp_path / "page.html"
    assert main(["eval", str(out), "--report", str(page), "--metric", "mrr", "spearman"]) == 0
    said = capsys.readouterr().out
    assert "| all rows leave at layer |    mrr | spearman |" in said and "| patience *" in said
    assert json.loads(page.with_suffix(".json").read_text())["summary"]["metric"] == "mrr"
    assert "was the film superb ?" in page.read_text()

    other = write_documents(tmp_path / "other.jsonl", 60, seed=1, id=[row // 5 for row in range(300)])
    assert main(["eval", str(out), "--data", str(other)]) == 0
    assert "on 300 rows of other.jsonl" in capsys.readouterr().out
    answers = tmp_path / "answers.csv"
    assert main(["predict", str(out), str(other), "--output", str(answers)]) == 0
    with answers.open(newline="") as file:
        found = list(csv.DictReader(file))
    scores, truth = ([float(row[name]) for row in found] for name in ("score", "relevance"))
    assert ndcg(scores, truth, [int(row["id"]) for row in found]).mean() > 0.75


def test_a_model_trained_in_python(tmp_path, capsys):
    """Without a record: rows and columns by option, and classes without names by their numbers."""
    model = ee.to_early_exit(toy.toy_model(layers=2, hidden=16))
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    model.save_pretrained(tmp_path / "model")
    toy.toy_tokenizer().save_pretrained(tmp_path / "model")
    rows = toy.write_splits(train_rows=0, dev_rows=120, test_rows=0)["dev"]
    write_table(tmp_path / "rows.csv", {"words": [r.text for r in rows], "truth": [r.label for r in rows]})
    folder, data = (
        str(tmp_path / "model"),
        ["--data", str(tmp_path / "rows.csv"), "--text-column", "words", "--label-column", "truth"],
    )
    assert main(["calibrate", folder, "--max-drop", "0.4", *data, "--criterion", "entropy"]) == 0
    assert "chosen on half of 120 rows of rows.csv" in capsys.readouterr().out
    assert main(["eval", folder, *data, "--report", str(tmp_path / "page.html")]) == 0
    assert "Saved criterion Entropy(" in capsys.readouterr().out and (tmp_path / "page.html").is_file()
    assert main(["predict", folder, "--text", "the plot was dull ."]) == 0
    assert "LABEL_" in capsys.readouterr().out
