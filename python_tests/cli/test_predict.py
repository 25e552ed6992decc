"""`earlyexit predict`: files and texts, answers that are missing, criteria of one's own, and what is refused."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from support.commands import error_of
from support.own_files import NAMES, write_rows
from support.registered_rules import RULE_IN_A_MODULE

import earlyexit_kernels as ee
from earlyexit_cli import main
from earlyexit_kernels.data.table import read_table, write_table


def test_answers_are_the_rows_with_three_more_columns(model, tmp_path, capsys):
    assert main(["calibrate", str(model), "--max-drop", "0.05", "--criterion", "entropy"]) == 0
    for name in ("in.csv", "in.tsv", "in.jsonl", "in.parquet"):
        write_rows(tmp_path / name, 40, seed=2, text="review", label="truth")
        out = tmp_path / f"out-{name}"
        assert main(["predict", str(model), str(tmp_path / name), "--output", str(out)]) == 0
        before, after = read_table(tmp_path / name).columns, read_table(out).columns
        assert list(after) == ["review", "truth", "label", "score", "exit_layer"]
        assert all(list(after[column]) == list(before[column]) for column in before)
        assert set(after["label"]) <= set(NAMES) and {int(layer) for layer in after["exit_layer"]} <= {1, 2}
    assert "40 rows, mean exit layer" in capsys.readouterr().out


def test_columns_of_the_input_are_kept_beside_the_answers(model, tmp_path, capsys):
    write_table(tmp_path / "test.csv", {"review": ["the plot was dull ."] * 2, "label": ["bad", "good"]})
    out = ["--output", str(tmp_path / "out.csv")]
    assert main(["predict", str(model), str(tmp_path / "test.csv"), *out]) == 0
    assert "answers are in predicted_label, predicted_score, predicted_exit_layer" in capsys.readouterr().out
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["bad", "good"] and rows[0]["predicted_label"]
    write_table(tmp_path / "twice.csv", {"review": ["a"], "label": ["x"], "predicted_score": ["1"]})
    words = ["predict", str(model), str(tmp_path / "twice.csv"), "--output", str(tmp_path / "o.csv")]
    assert "has a column 'predicted_score'" in error_of(capsys, words)


def test_texts_are_answered_on_the_terminal(model, capsys):
    assert main(["predict", str(model), "--text", "the plot was dull .", "--text", "zzz " * 200]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("exit layer 2: the plot was dull .") and "exit layer" in second


def test_long_rows_are_cut_or_left_without_an_answer(model, tmp_path, capsys):
    write_table(tmp_path / "in.csv", {"review": ["the plot was dull .", "the plot was dull " * 20]})
    for options, words in (([], "2 rows, mean"), (["--no-truncate"], "shorten it, or leave out --no-truncate)")):
        out = ["--output", str(tmp_path / f"out{len(options)}.csv"), *options]
        assert main(["predict", str(model), str(tmp_path / "in.csv"), *out]) == 0
        assert words in capsys.readouterr().out
    assert read_table(tmp_path / "out1.csv").columns["label"][1] == ""


def test_rows_without_an_answer_are_counted_and_left_empty(model, tmp_path, capsys):
    write_table(tmp_path / "in.csv", {"review": ["the plot was dull .", "", "the cast was witty ."], "id": "abc"})
    for name in ("out.csv", "out.jsonl"):
        out = ["--output", str(tmp_path / name), "--max-tokens", "4"]
        assert main(["predict", str(model), str(tmp_path / "in.csv"), *out]) == 0
        where = f"{tmp_path / 'in.csv'}, line 3"
        said = f"3 rows, mean exit layer 2.00 of 2, 1 without an answer ({where}: expected some text"
        assert said in capsys.readouterr().out
        columns = read_table(tmp_path / name).columns
        empty = "" if name == "out.csv" else None
        assert [columns[column][1] for column in ("label", "score", "exit_layer")] == [empty] * 3
        assert {columns["label"][0], columns["label"][2]} <= set(NAMES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text-column", "x"], "in.csv has no column 'x'"),
        (
            ["--pair-column", "truth"],
            "the model was trained on one text a row, got a second one, 'truth'",
        ),
    ],
)
def test_refusals_write_nothing(model, tmp_path, capsys, options, words):
    write_rows(tmp_path / "in.csv", 4, text="review", label="truth")
    out = ["--output", str(tmp_path / "new.csv"), *options]
    assert words in error_of(capsys, ["predict", str(model), str(tmp_path / "in.csv"), *out])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out"]


def test_answers_are_written_whole_or_not_at_all(model, tmp_path, capsys, monkeypatch):
    write_rows(tmp_path / "in.csv", 4, text="review", label="truth")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    out = ["--output", str(tmp_path / "new.csv")]
    message = error_of(capsys, ["predict", str(model), str(tmp_path / "in.csv"), *out])
    assert f"{tmp_path / 'new.csv'} could not be written: No space left on device" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out"]


def test_a_criterion_of_ones_own_is_imported(model, tmp_path, capsys, monkeypatch):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"criterion": {"name": "imported_rule"}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["predict", str(model), "--text", "the plot was dull ."]
    assert "imported_rule" in error_of(capsys, words)
    Path("my_rules.py").write_text(RULE_IN_A_MODULE)
    try:
        assert main([*words, "--import", "my_rules"]) == 0
        assert "exit layer 1" in capsys.readouterr().out
    finally:
        for table in (ee.criteria.CRITERIA, ee.criteria.RULES):
            table.pop("imported_rule", None)
        sys.modules.pop("my_rules", None)
