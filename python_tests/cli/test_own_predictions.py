"""`predict` on a user's own files."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import error_of
from support.own_files import NAMES, write_rows

from earlyexit_cli import main
from earlyexit_kernels.data.table import read_table, write_table


def test_predictions_are_the_rows_with_three_more_columns(model, tmp_path, files, capsys):
    assert main(["calibrate", "--model", str(model), "--max-drop", "0.05", "--apply", "entropy"]) == 0
    for name in ("in.csv", "in.tsv", "in.jsonl", "in.parquet"):
        write_rows(tmp_path / name, 40, seed=2, text="review", label="truth")
        out = tmp_path / f"out-{name}"
        assert main(["predict", "--model", str(model), "--input", str(tmp_path / name), "--output", str(out)]) == 0
        before, after = read_table(tmp_path / name).columns, read_table(out).columns
        assert list(after) == ["review", "truth", "label", "score", "exit_layer"]
        assert all(list(after[column]) == list(before[column]) for column in before)
        assert set(after["label"]) <= set(NAMES) and {int(layer) for layer in after["exit_layer"]} <= {1, 2}
    assert "40 rows, mean exit layer" in capsys.readouterr().out


def test_texts_are_answered_on_the_terminal(model, capsys):
    assert main(["predict", "--model", str(model), "--text", "the plot was dull .", "--text", "zzz " * 200]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("exit layer 2: the plot was dull .") and "exit layer" in second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of the arguments --input --text is required"),
        (["--input", "in.csv"], "expected --output FILE"),
        (["--text", "a", "--output", "new.csv"], "--output: expected beside --input"),
        (["--input", "in.csv", "--output", "in.csv"], "in.csv exists, and is not overwritten"),
        (["--input", "in.csv", "--output", "new.txt"], "expected a file name that ends in .csv"),
        (["--input", "in.csv", "--output", "new.csv", "--text-column", "x"], "in.csv has no column 'x'"),
        (
            ["--input", "in.csv", "--output", "new.csv", "--pair-column", "truth"],
            "--pair-column: the model was trained on one text a row, got a second one, 'truth'",
        ),
        (["--input", "no.csv", "--output", "new.csv"], "no.csv"),
        (["--input", "in.csv", "--output", "in.csv/new.csv"], "--output: expected a folder that can be written to"),
    ],
)
def test_predict_refuses_and_writes_nothing(model, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("in.csv"), 4, text="review", label="truth")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert words in error_of(capsys, ["predict", "--model", str(model), *arguments])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_predictions_are_written_whole_or_not_at_all(model, tmp_path, capsys, monkeypatch):
    write_rows(tmp_path / "in.csv", 4, text="review", label="truth")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    out = ["--input", str(tmp_path / "in.csv"), "--output", str(tmp_path / "new.csv")]
    message = error_of(capsys, ["predict", "--model", str(model), *out])
    assert f"{tmp_path / 'new.csv'} could not be written: No space left on device" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out"]


def test_rows_without_an_answer_are_counted_and_left_empty(model, tmp_path, capsys):
    write_table(tmp_path / "in.csv", {"review": ["the plot was dull .", "", "the cast was witty ."]})
    for name in ("out.csv", "out.jsonl"):
        out = ["--input", str(tmp_path / "in.csv"), "--output", str(tmp_path / name), "--max-tokens", "4"]
        assert main(["predict", "--model", str(model), *out]) == 0
        message = (
            f"3 rows, mean exit layer 2.00 of 2, 1 without an answer ({tmp_path / 'in.csv'}, line 3: expected some text"
        )
        assert message in capsys.readouterr().out
        columns = read_table(tmp_path / name).columns
        empty = "" if name == "out.csv" else None
        assert [columns[column][1] for column in ("label", "score", "exit_layer")] == [empty] * 3
        assert {columns["label"][0], columns["label"][2]} <= set(NAMES)
    assert main(["predict", "--model", str(model), "--text", ""]) == 0
    assert capsys.readouterr().out == "no answer, expected some text, got an empty one: \n"
