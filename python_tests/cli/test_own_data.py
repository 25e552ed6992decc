"""`train`, `calibrate`, `eval` and `predict` on a user's own files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import error_of
from support.own_files import NAMES, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import earlyexit_kernels as ee
from earlyexit_cli import main
from earlyexit_kernels.cli import calibrate
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.data.table import read_table, write_table
from earlyexit_kernels.tasks.load import encode
from earlyexit_kernels.tuning.calibrate import split_indices
from earlyexit_kernels.tuning.traces import collect_trace


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# train


def test_train_records_files_columns_and_classes(trained, files):
    recipe = Recipe.load(trained)
    assert recipe.task is None and recipe.data is not None and recipe.data.train == str(files / "train.csv")
    assert (recipe.holdout, recipe.train_rows, recipe.evaluation_split) == (120, 120, "held-out")
    assert recipe.data.label_names == NAMES and recipe.data.columns.text == "review"
    loaded = AutoModelForSequenceClassification.from_pretrained(trained, local_files_only=True)
    assert loaded.config.id2label == dict(enumerate(NAMES)) and loaded.criterion is None
    tokenizer = AutoTokenizer.from_pretrained(trained, local_files_only=True)
    assert recipe.max_length == tokenizer.model_max_length == 48, "a Scorer and a pipeline cut where training did"
    card = (trained / "README.md").read_text()
    assert "train.csv" in card and str(files) not in card and "import earlyexit_kernels" in card
    assert card.count("| ") > 3 and "no criterion" in card.lower()


@pytest.mark.parametrize(("dev", "holdout", "split"), [(False, 20, "held-out"), (True, 0, "dev")])
def test_a_fifth_of_the_rows_is_held_out_unless_there_is_a_dev_file(base, tmp_path, capsys, dev, holdout, split):
    write_rows(tmp_path / "train.csv", 100)
    write_rows(tmp_path / "dev.csv", 30, seed=1)
    given = ["--dev", str(tmp_path / "dev.csv")] if dev else []
    arguments = ["--train", str(tmp_path / "train.csv"), *given, "--output", str(tmp_path / "out"), "--epochs", "1"]
    assert main(["train", "--model", str(base), *arguments]) == 0
    recipe = Recipe.load(tmp_path / "out")
    assert (recipe.holdout, recipe.train_rows, recipe.evaluation_split) == (holdout, 100 - holdout, split)
    assert "2 classes (bad, good)" in capsys.readouterr().out
    assert main(["eval", "--model", str(tmp_path / "out"), "--points", "8", "--drop", "1"]) == 0
    half = 15 if dev else 10
    kind = "dev rows" if dev else "held-out train rows"
    assert f"Chosen on {half} {kind} " in capsys.readouterr().out


def test_numbers_are_predicted_by_regression(base, tmp_path, capsys):
    rows = [(f"the plot {i} was dull .", i / 10) for i in range(60)]
    write_table(tmp_path / "train.tsv", {"text": [t for t, _ in rows], "stars": [n for _, n in rows]})
    arguments = ["--train", str(tmp_path / "train.tsv"), "--label-column", "stars", "--output", str(tmp_path / "out")]
    assert main(["train", "--model", str(base), *arguments, "--epochs", "1"]) == 0
    assert "numbers (regression)" in capsys.readouterr().out
    assert main(["predict", "--model", str(tmp_path / "out"), "--text", "the plot was dull ."]) == 0
    assert capsys.readouterr().out.startswith("stars (")
    write_table(tmp_path / "in.tsv", {"text": ["the plot was dull ."] * 3})
    out = ["--input", str(tmp_path / "in.tsv"), "--output", str(tmp_path / "out.tsv")]
    assert main(["predict", "--model", str(tmp_path / "out"), *out]) == 0
    assert set(read_table(tmp_path / "out.tsv").columns["label"]) == {"stars"}
    message = error_of(capsys, ["calibrate", "--model", str(tmp_path / "out"), "--max-drop", "0.5", "--metric", "f1"])
    assert "--metric: expected a metric of this task, pearson, spearman, got f1" in message


def test_pairs_of_texts(base, tmp_path, capsys):
    rows = [("the plot was dull .", f"the cast was {('witty', 'weak')[i % 2]} .", i % 2) for i in range(40)]
    columns = {name: [row[at] for row in rows] for at, name in enumerate(("a", "b", "same"))}
    write_table(tmp_path / "train.csv", columns)
    names = ["--text-column", "a", "--pair-column", "b", "--label-column", "same"]
    arguments = ["--train", str(tmp_path / "train.csv"), *names, "--output", str(tmp_path / "out"), "--epochs", "1"]
    assert main(["train", "--model", str(base), *arguments]) == 0
    assert '"text_pair"' in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert "pairs of texts" in error_of(capsys, ["predict", "--model", str(tmp_path / "out"), "--text", "a"])
    out = ["--input", str(tmp_path / "train.csv"), "--output", str(tmp_path / "out.csv")]
    assert main(["predict", "--model", str(tmp_path / "out"), *out]) == 0
    assert rows_of(tmp_path / "out.csv")[0].keys() == {"a", "b", "same", "label", "score", "exit_layer"}


def test_own_labels_are_kept_beside_the_answers(model, tmp_path, capsys):
    write_table(tmp_path / "test.csv", {"review": ["the plot was dull ."] * 2, "label": ["bad", "good"]})
    arguments = ["predict", "--model", str(model), "--input", str(tmp_path / "test.csv")]
    assert main([*arguments, "--output", str(tmp_path / "out.csv")]) == 0
    assert "answers are in predicted_label, predicted_score, predicted_exit_layer" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out.csv")
    assert [row["label"] for row in rows] == ["bad", "good"] and rows[0]["predicted_label"]
    write_table(tmp_path / "twice.csv", {"review": ["a"], "label": ["x"], "predicted_score": ["1"]})
    arguments[-1] = str(tmp_path / "twice.csv")
    assert "has a column 'predicted_score'" in error_of(capsys, [*arguments, "--output", str(tmp_path / "o.csv")])


def test_calibration_on_the_train_file_warns(model, tmp_path, capsys):
    train = Path(json.loads((model / "earlyexit_task.json").read_text())["data"]["train"])
    assert main(["calibrate", "--model", str(model), "--max-drop", "0.1", "--dev", str(train)]) == 0
    assert "is the file that the model was trained on" in capsys.readouterr().out
    other = tmp_path / "other.csv"
    other.write_text(train.read_text() + train.read_text().splitlines()[1] + "\n")
    assert main(["calibrate", "--model", str(model), "--max-drop", "0.1", "--dev", str(other)]) == 0
    assert "was trained on" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["report", "calibrate", "eval"])
def test_files_of_others_are_not_overwritten(model, tmp_path, capsys, command):
    given = {"report": [], "calibrate": ["--max-drop", "0.1"], "eval": []}[command]
    file = tmp_path / ("page.html" if command == "report" else "numbers.json")
    file.write_text('{"mine": 1}')
    arguments = [command, "--model", str(model), *given, "--output", str(file)]
    assert "was not written by earlyexit" in error_of(capsys, arguments)
    assert file.read_text() == '{"mine": 1}'
    file.unlink()
    assert main(arguments) == 0 and main(arguments) == 0, "its own results are replaced"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "toy", "--dev", "dev.csv"], "--dev: expected --train FILE"),
        (["--task", "toy", "--text-column", "text", "--label-column", "x"], "--text-column, --label-column: expected"),
        (["--task", "toy", "--train", "train.csv"], "--train: not allowed with argument --task"),
        ([], "one of the arguments --task --train is required"),
        (["--train", "train.csv", "--text-column", "x"], "train.csv has no column 'x' (--text-column); it has"),
        (["--train", "train.csv", "--holdout", "0"], "expected at least one row to report on, or a file with --dev"),
        (["--train", "train.csv", "--holdout", "40"], "expected fewer rows"),
        (["--train", "nowhere.csv"], "nowhere.csv"),
        (["--train", "folder.csv"], "folder.csv"),
        (["--train", "train.csv", "--dev", "train.csv"], "--dev: expected other rows than those of --train"),
    ],
)
def test_train_refuses(base, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("train.csv"), 40)
    Path("folder.csv").mkdir()
    message = error_of(capsys, ["train", "--model", str(base), *arguments, "--output", "out"])
    assert words in message and not Path("out").exists()


def test_train_does_not_replace_a_readme_of_others(base, tmp_path, capsys):
    write_rows(tmp_path / "train.csv", 40)
    (tmp_path / "README.md").write_text("mine")
    rows = ["--train", str(tmp_path / "train.csv"), "--output", str(tmp_path)]
    message = error_of(capsys, ["train", "--model", str(base), *rows])
    assert "README.md is not a model card" in message and (tmp_path / "README.md").read_text() == "mine"


# calibrate


def test_calibrate_prints_every_rule_and_changes_nothing(model, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    output = tmp_path / "found.json"
    assert main(["calibrate", "--model", str(model), "--speed-up", "1.5", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "chosen on half of 120 held-out train rows" in out and "| entropy " in out and "--apply auto" in out
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    records = json.loads(output.read_text())["records"]
    found = {record["rule"]: record.get("calibration") for record in records}
    assert found["entropy"]["layer_speed_up"] > 1 and found["patience"] is None
    assert "patience cannot reach the target; the nearest is patience, patience 1, with a layer speed-up of" in out


def test_apply_changes_the_config_and_the_card_only(model, capsys):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in model.iterdir()}
    card = model / "README.md"
    card.write_text(card.read_text().replace("## Use", "My words.\n\n## Use"))
    assert main(["calibrate", "--model", str(model), "--max-drop", "0.2", "--apply", "entropy"]) == 0
    assert "Entropy(threshold=" in capsys.readouterr().out
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in model.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"config.json", "README.md"}
    text = card.read_text()
    assert "My words." in text and "mean exit layer" in text and "No criterion" not in text
    loaded = AutoModelForSequenceClassification.from_pretrained(model, local_files_only=True)
    assert loaded.criterion.name == "entropy" and ee.Calibration.of(loaded).target == {"name": "max_drop", "drop": 0.2}
    assert main(["calibrate", "--model", str(model), "--max-drop", "0.2", "--apply", "auto"]) == 0
    assert card.read_text().count("## Calibration") == 1 and "My words." in card.read_text()


PIPELINE = """
import json, sys
import earlyexit_kernels
from transformers import pipeline

folder, texts = sys.argv[1], json.loads(sys.stdin.read())
layers = {}
for size in (1, 32):
    classify = pipeline("text-classification", model=folder, truncation=True, max_length=64)
    found = layers[size] = []
    classify.model.register_forward_hook(lambda module, args, out: found.extend(out.exit_layer.tolist()))
    answers = classify(texts, batch_size=size)
print(json.dumps(layers))
"""


@pytest.mark.thorough
def test_a_new_process_exits_where_the_replay_said(model, tmp_path):
    arguments = ["calibrate", "--model", str(model), "--max-drop", "0.02"]
    assert main([*arguments, "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["records"]
    shares = {one["rule"]: min(one["calibration"]["exit_shares"]) for one in found if "calibration" in one}
    assert main([*arguments, "--apply", max(shares, key=shares.__getitem__)]) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(model, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    recipe = Recipe.load(model)
    rows, _ = recipe.unseen_rows(recipe.load_data())
    data = encode(rows, tokenizer, max_length=64)
    trace, _ = collect_trace(loaded, data, collate_fn=DataCollatorWithPadding(tokenizer))
    expected = ee.replay(trace, loaded.criterion)[1].tolist()
    assert set(expected) == {1, 2}, "the test needs rows that leave at different layers"
    run = subprocess.run(
        [sys.executable, "-c", PIPELINE, str(model)],
        input=json.dumps(list(rows.sentences)),
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == {"1": expected, "32": expected}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of the arguments --max-drop --speed-up --latency-ms --risk is required"),
        (["--max-drop", "0.1", "--speed-up", "2"], "not allowed with"),
        (["--max-drop", "-1"], "--max-drop"),
        (["--max-drop", "0.6"], "--max-drop: expected a finite number in [0, 0.5]"),
        (["--speed-up", "0.5"], "--speed-up: expected a finite number in [1, 1000]"),
        (["--risk", "1"], "--risk: expected a finite number in (0, 1)"),
        (["--latency-ms", "0"], "--latency-ms"),
        (["--max-drop", "0.1", "--epsilon", "0.1"], "--epsilon: expected beside --risk"),
        (["--max-drop", "0.1", "--against", "labels"], "--against: expected beside --risk"),
        (["--max-drop", "0.1", "--latency-batch-size", "2"], "--latency-batch-size: expected beside --latency-ms"),
        (["--max-drop", "0.1", "--metric", "pearson"], "--metric: expected a metric of this task, accuracy,"),
        (["--max-drop", "0.1", "--apply", "magic"], "--apply: expected one of ('auto', 'entropy',"),
        (["--max-drop", "0.1", "--apply", "learned"], "--apply: expected auto or a criterion of this model"),
        (["--speed-up", "1000", "--apply", "entropy"], "no setting reaches SpeedUp(speed_up=1000.0); the nearest is"),
        (["--speed-up", "1000", "--apply", "auto"], "no setting reaches SpeedUp(speed_up=1000.0); the nearest is"),
        (["--risk", "0.001"], "expected at least 2995 check rows"),
    ],
)
def test_calibrate_refuses_and_leaves_the_model(model, capsys, arguments, words):
    before = (model / "config.json").read_bytes()
    assert words in error_of(capsys, ["calibrate", "--model", str(model), *arguments])
    assert (model / "config.json").read_bytes() == before


def test_a_criterion_of_other_exits_is_refused_before_the_rows_run(model, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "encoded", None)
    error = error_of(capsys, ["calibrate", "--model", str(model), "--max-drop", "0.1", "--apply", "learned"])
    assert "--apply: expected auto or a criterion of this model" in error


def test_risk_and_latency_are_shown(model, capsys, monkeypatch):
    pytest.importorskip("mapie", reason="Risk requires the extra 'tuning'")
    monkeypatch.setattr(calibrate, "settings", lambda *args, **named: {"entropy": []})
    assert main(["calibrate", "--model", str(model), "--risk", "0.3", "--against", "full_depth"]) == 0
    assert "risk (at most 0.3)" in capsys.readouterr().out
    assert main(["calibrate", "--model", str(model), "--latency-ms", "10000", "--apply", "entropy"]) == 0
    assert "ms a batch" in capsys.readouterr().out and "| latency" in (model / "README.md").read_text()


def test_a_failed_write_leaves_the_model(model, capsys, monkeypatch):
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("earlyexit_kernels.hf.saving._flush", full)
    message = error_of(capsys, ["calibrate", "--model", str(model), "--max-drop", "0.1", "--apply", "entropy"])
    assert f"{model} could not be written: No space left on device" in message
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_other_rows_replace_those_of_training(model, files, capsys):
    moved = files / "train.csv"
    moved.rename(files / "away.csv")
    try:
        for command in (["calibrate", "--max-drop", "0.5"], ["eval", "--points", "8"]):
            message = error_of(capsys, [*command, "--model", str(model)])
            assert "train.csv" in message and "is gone" in message and "--dev" in message
            assert main([*command, "--model", str(model), "--dev", str(files / "other.csv")]) == 0
            assert "rows of other.csv" in capsys.readouterr().out
    finally:
        (files / "away.csv").rename(moved)


def test_report_is_of_other_rows_than_calibrate_chose_on(model):
    recipe = Recipe.load(model)
    task = recipe.load_data()
    (chosen_on, _), (others, _) = recipe.both_rows(task)
    rows, _ = recipe.unseen_rows(task)
    tuning, checked = split_indices(len(rows))
    assert list(chosen_on.sentences) == [rows.sentences[i] for i in tuning]
    assert list(others.sentences) == [rows.sentences[i] for i in checked]


def test_target_that_no_criterion_reaches_is_an_error(model, capsys):
    message = error_of(capsys, ["calibrate", "--model", str(model), "--speed-up", "1000"])
    assert "no criterion of this model reaches SpeedUp(speed_up=1000.0)" in message


# eval


@pytest.mark.thorough
def test_eval_shows_the_metrics_asked_for(model, capsys):
    pytest.importorskip("sklearn", reason="macro_f1 and auroc require the extra 'tuning'")
    assert main(["eval", "--model", str(model), "--points", "8", "--metric", "macro_f1", "auroc", "ece"]) == 0
    out = capsys.readouterr().out
    assert "| macro_f1 (reporting) | auroc (reporting) | ece (reporting) |" in out
    assert "ece is an error" in error_of(capsys, ["eval", "--model", str(model), "--metric", "ece"])
    assert "--metric: expected" in error_of(capsys, ["eval", "--model", str(model), "--metric", "pearson"])
