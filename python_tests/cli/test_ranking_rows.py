"""Rerankers: `train`, `eval`, `calibrate` and `report` on rows of queries and documents."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.commands import error_of
from transformers import BertForSequenceClassification

import earlyexit_kernels as ee
from earlyexit_cli import main
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.data import toy
from earlyexit_kernels.data.table import read_table, write_table
from earlyexit_kernels.tuning.calibrate import split_indices
from earlyexit_kernels.tuning.ranking import mrr, ndcg

COLUMNS = ["--text-column", "query", "--pair-column", "document", "--label-column", "relevance", "--group-column", "id"]
QUERIES, DOCUMENTS = 140, 5


def write_documents(path, queries=QUERIES, seed=0, **changes):
    """Write queries with five documents each, of which those that praise are relevant, 2 where they are short."""
    found = toy.write_splits(seed=seed, train_rows=0, dev_rows=queries * DOCUMENTS, test_rows=0)["dev"]
    columns = {
        "id": [f"q{row // DOCUMENTS}" for row in range(len(found))],
        "query": ["was the film superb ?"] * len(found),
        "document": [sentence.text for sentence in found],
        "relevance": [str(sentence.label * (1 + (sentence.level == 1))) for sentence in found],
    }
    write_table(path, {**columns, **changes})
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Folder with a reranker of one label and its tokenizer."""
    folder = tmp_path_factory.mktemp("stock")
    config = toy.toy_model(layers=3, hidden=32).config
    config.num_labels = 1
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(stock, tmp_path_factory):
    """Folder written by `earlyexit train --group-column`."""
    folder = tmp_path_factory.mktemp("ranking")
    rows = ["--train", str(write_documents(folder / "train.csv")), *COLUMNS, "--holdout", "401"]
    training = ["--epochs", "24", "--lr", "5e-3", "--batch-size", "16", "--pooling", "mean"]
    assert main(["train", "--model", str(stock), *rows, "--output", str(folder / "out"), *training]) == 0
    return folder / "out"


def held_out(folder):
    recipe = Recipe.load(folder)
    return recipe.held_out(recipe.load_data())


@pytest.mark.thorough
def test_queries_are_held_out_whole(trained):
    recipe = Recipe.load(trained)
    assert recipe.holdout == 405 and recipe.data.columns.group == "id" and recipe.data.problem_type == "regression"
    rest, kept = recipe.train_splits(recipe.load_data())
    assert not set(rest.groups) & set(kept.groups) and len(rest) + len(kept) == QUERIES * DOCUMENTS
    assert set(kept.labels) == {0.0, 1.0, 2.0}
    (chosen, _), (others, _) = recipe.both_rows(recipe.load_data())
    tuning, _ = split_indices(len(kept), groups=kept.groups)
    assert list(chosen.sentences) == [kept.sentences[i] for i in tuning]
    assert not set(chosen.groups) & set(others.groups)


def test_scores_of_the_exits_are_those_of_the_rows(trained):
    rows, recipe = held_out(trained), Recipe.load(trained)
    model = ee.EarlyExitForSequenceClassification.from_pretrained(trained)
    model.set_criterion(None)
    scores = ee.Scorer(model, toy.toy_tokenizer())(list(rows.sentences))["score"]
    last = recipe.scores[-1]
    assert list(last) == ["ndcg", "mrr"] and last["ndcg"] > 0.8, "the model has learned to rank"
    assert last["ndcg"] == pytest.approx(ndcg(scores, rows.labels, rows.groups).mean(), abs=2e-3)
    assert last["mrr"] == pytest.approx(mrr(scores, rows.labels, rows.groups).mean(), abs=2e-3)


def test_eval_calibrate_and_report(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="a report requires the extra 'plot'")
    model = ["--model", str(trained)]
    assert main(["eval", *model, "--points", "8", "--drop", "0.1", "--output", str(tmp_path / "eval.json")]) == 0
    out = capsys.readouterr().out
    assert "| static truncation to layer | ndcg (reporting) | mrr (reporting) |" in out and "| patience *" in out
    records = json.loads((tmp_path / "eval.json").read_text())["records"]
    layers = [record["reporting"]["ndcg"] for record in records if record["kind"] == "static_truncation"]
    assert len(layers) == 3 and all(0 < value <= 1 for value in layers)
    rules = {record["criterion"]["name"] for record in records if record["kind"] == "point"}
    assert rules <= {"patience", "hidden_cosine", "fixed_layer"}

    assert main(["eval", *model, "--points", "8", "--metric", "mrr", "spearman"]) == 0
    assert "| mrr (reporting) | spearman (reporting) |" in capsys.readouterr().out

    assert main(["calibrate", *model, "--max-drop", "0.5", "--apply", "patience"]) == 0
    assert " ndcg |" in capsys.readouterr().out
    calibration = ee.Calibration.of(ee.EarlyExitForSequenceClassification.from_pretrained(trained))
    assert calibration.metric == "ndcg" and calibration.drop == pytest.approx(
        calibration.full_depth - calibration.score
    )

    page = tmp_path / "page.html"
    assert main(["report", *model, "--output", str(page)]) == 0
    summary = json.loads(page.with_suffix(".json").read_text())["summary"]
    assert summary["metric"] == "ndcg" and 0 < summary["standard_error"] < 0.2
    assert "ndcg" in page.read_text() and "was the film superb ?" in page.read_text()


def test_other_rows_and_answers(trained, tmp_path, capsys):
    other = write_documents(
        tmp_path / "other.jsonl", 60, seed=1, id=[row // DOCUMENTS for row in range(60 * DOCUMENTS)]
    )
    assert main(["eval", "--model", str(trained), "--points", "8", "--dev", str(other)]) == 0
    assert "rows of other.jsonl" in capsys.readouterr().out
    output = tmp_path / "answers.csv"
    assert main(["predict", "--model", str(trained), "--input", str(other), "--output", str(output)]) == 0
    found = read_table(output).columns
    scores = np.array([float(value) for value in found["score"]])
    relevance = [float(value) for value in found["relevance"]]
    assert ndcg(scores, relevance, found["id"]).mean() > 0.75


def refused(stock, capsys, path, *more, columns=COLUMNS):
    return error_of(
        capsys, ["train", "--model", str(stock), "--train", str(path), *columns, "--output", f"{path}-out", *more]
    )


def test_train_refuses(stock, tmp_path, capsys):
    path = tmp_path / "train.csv"
    total = QUERIES * DOCUMENTS
    write_documents(path)
    message = refused(stock, capsys, path, columns=[*COLUMNS[:-1], "query_id"])
    assert "train.csv has no column 'query_id' (--group-column); it has" in message
    message = error_of(
        capsys, ["train", "--model", str(stock), "--task", "toy", "--group-column", "id", "--output", "x"]
    )
    assert "--group-column: expected --train FILE" in message
    for changes, words in [
        (
            {"id": [f"q{row}" for row in range(total)]},
            "of 140 queries 140 have one row, and 0 more have no relevant one",
        ),
        (
            {"relevance": ["0"] * (total - 1) + ["1"]},
            "expected at least 1 query with two or more rows, one of them rel",
        ),
        (
            {"id": ["q"] * (total - 1) + [" "]},
            f"line {total + 1}: expected the name or number of a query in column 'id'",
        ),
        ({"relevance": ["-1"] + ["1"] * (total - 1)}, "line 2: expected as label the relevance of a document to its"),
        (
            {"relevance": ["good", "bad"] * (total // 2)},
            "a number of at least 0, since --group-column is given; got 'good'",
        ),
        ({"relevance": ["1"] * total}, "expected at least two different labels"),
        ({"id": ["q"] * total}, "the queries of 700 rows are all that there are"),
    ]:
        path.unlink()
        write_documents(path, **changes)
        assert words in refused(stock, capsys, path), changes.keys()
    assert not (tmp_path / "train.csv-out").exists()


def test_metrics_of_rankings_require_the_column(trained, stock, tmp_path, capsys):
    write_documents(tmp_path / "train.csv", 40)
    columns = [*COLUMNS[:-2]]
    path = ["--train", str(tmp_path / "train.csv"), *columns, "--output", str(tmp_path / "classes"), "--epochs", "1"]
    assert main(["train", "--model", str(stock), *path]) == 0, "without the column 0, 1 and 2 are classes"
    for command in (["eval"], ["calibrate", "--max-drop", "0.1"]):
        message = error_of(capsys, [*command, "--model", str(tmp_path / "classes"), "--metric", "ndcg"])
        assert (
            "got ndcg, which ranks the rows of a query; name their column when you train, with --group-colu" in message
        )
    message = error_of(capsys, ["eval", "--model", str(trained), "--metric", "accuracy"])
    assert "expected a metric of this task, ndcg, mrr, pearson, spearman, got accuracy" in message


def test_calibrate_counts_queries(trained, tmp_path, capsys):
    few = write_documents(tmp_path / "few.csv", 30, seed=2)
    message = error_of(capsys, ["calibrate", "--model", str(trained), "--max-drop", "0.1", "--dev", str(few)])
    assert "expected at least 25 queries with two or more rows" in message
