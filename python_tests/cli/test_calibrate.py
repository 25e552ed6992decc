"""`earlyexit calibrate`: the table, what is saved, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from support.commands import error_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import earlyexit_kernels as ee
from earlyexit_cli import main
from earlyexit_kernels.cli import calibrate
from earlyexit_kernels.cli.saved import HELD_OUT
from earlyexit_kernels.data.rows import Split, encode
from earlyexit_kernels.data.table import read_table
from earlyexit_kernels.tuning.traces import collect_trace


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_rule_is_shown_and_a_dry_run_changes_nothing(model, tmp_path, capsys):
    before, output = contents(model), tmp_path / "found.json"
    words = ["calibrate", str(model), "--speed-up", "1.5", "--output", str(output)]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "chosen on half of 120 held-out rows of train.csv" in out and "| entropy " in out and "Not saved" in out
    assert contents(model) == before
    found = {record["rule"]: record.get("calibration") for record in json.loads(output.read_text())["records"]}
    assert found["entropy"]["layer_speed_up"] > 1 and found["patience"] is None
    assert "patience cannot reach the target; the nearest is patience, patience 1, with a layer speed-up of" in out
    assert main(words) == 0, "its own results are replaced"


def test_the_config_and_the_card_are_saved_and_nothing_else(model, capsys):
    before, card = contents(model), model / "README.md"
    card.write_text(card.read_text().replace("## Use", "My words.\n\n## Use"))
    assert main(["calibrate", str(model), "--max-drop", "0.2", "--criterion", "entropy"]) == 0
    assert "Saved in" in (out := capsys.readouterr().out) and "Entropy(threshold=" in out
    after = contents(model)
    assert {name for name in after if after[name] != before.get(name)} == {"config.json", "README.md"}
    text = card.read_text()
    assert "My words." in text and "mean exit layer" in text and "No criterion" not in text
    loaded = AutoModelForSequenceClassification.from_pretrained(model, local_files_only=True)
    assert loaded.criterion.name == "entropy" and ee.Calibration.of(loaded).target == {"name": "max_drop", "drop": 0.2}
    assert main(["calibrate", str(model), "--max-drop", "0.2"]) == 0
    assert card.read_text().count("## Calibration") == 1 and "My words." in card.read_text()
    assert "auto chose " in capsys.readouterr().out


def test_per_layer_and_temperature(model):
    before = contents(model)["model.safetensors"]
    assert main(["calibrate", str(model), "--max-drop", "0.2", "--criterion", "margin", "--per-layer"]) == 0
    rule = ee.EarlyExitForSequenceClassification.from_pretrained(model).criterion
    assert contents(model)["model.safetensors"] == before and rule.name == "margin"
    options = ["--max-drop", "0.2", "--criterion", "entropy", "--temperature"]
    assert main(["calibrate", str(model), *options]) == 0
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained(model)
    assert contents(model)["model.safetensors"] != before and len(ee.Calibration.of(loaded).temperatures) == 2


def test_a_drop_that_the_check_rows_exceed_is_said(model, capsys, monkeypatch):
    usual = calibrate.calibrate
    monkeypatch.setattr(calibrate, "calibrate", lambda *a, **named: replace(usual(*a, **named), drop=0.25))
    assert main(["calibrate", str(model), "--max-drop", "0.2"]) == 0
    assert "note         on the check rows the drop is 0.2500; the target is met" in capsys.readouterr().out


def test_rows_of_training_are_warned_of(model, files, tmp_path, capsys):
    words = ["calibrate", str(model), "--max-drop", "0.1", "--dry-run", "--data"]
    assert main([*words, str(files / "train.csv")]) == 0
    assert "is the file that the model was trained on" in capsys.readouterr().out
    assert main([*words, str(files / "other.csv")]) == 0
    assert "was trained on" not in (out := capsys.readouterr().out) and "half of 60 rows of other.csv" in out


#: Options -> words of the error.
REFUSED = {
    "--max-drop 0.1 --epsilon 0.1": "--epsilon: expected beside --risk",
    "--max-drop 0.1 --against labels": "--against: expected beside --risk",
    "--max-drop 0.1 --latency-batch-size 2": "--latency-batch-size: expected beside --latency-ms",
    "--max-drop 0.1 --metric pearson": "--metric: expected a metric of these rows, accuracy,",
    "--max-drop 0.1 --metric ndcg": "got ndcg, which ranks the rows of a query; name their column with --group-column",
    "--max-drop 0.1 --metric ece": "--metric: expected a metric of these rows",
    "--max-drop 0.1 --criterion magic": "--criterion: expected auto or a criterion of this model, entropy,",
    "--max-drop 0.1 --criterion learned": "--criterion: expected auto or a criterion of this model",
    "--speed-up 1000 --criterion entropy": "no setting reaches SpeedUp(speed_up=1000.0); the nearest is",
    "--speed-up 1000": "no setting reaches SpeedUp(speed_up=1000.0); the nearest is",
    "--risk 0.001": "expected at least 2995 check rows",
    "--latency-ms 9 --per-layer": "per_layer=True is for MaxDrop and SpeedUp",
    "--max-drop 0.1 --data few.csv": "expected at least 50 rows",
    "--max-drop 0.1 --pair-column opinion": "--pair-column: the model was trained on one text a row",
    "--max-drop 0.1 --label-column stars": "has no column 'stars' (--label-column)",
}


@pytest.mark.parametrize("options", REFUSED)
def test_refusals_leave_the_model(model, tmp_path, capsys, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.csv").write_text("review,opinion\n" + "the plot was dull .,bad\nthe cast was witty .,good\n" * 20)
    before = contents(model)
    assert REFUSED[options] in error_of(capsys, ["calibrate", str(model), *options.split()])
    assert contents(model) == before


def test_risk_and_latency_are_shown(model, capsys, monkeypatch):
    pytest.importorskip("mapie", reason="Risk requires the extra 'tuning'")
    monkeypatch.setattr(calibrate, "settings", lambda *args, **named: {"entropy": []})
    risk = ["--risk", "0.3", "--against", "full_depth", "--dry-run"]
    assert main(["calibrate", str(model), *risk]) == 0
    assert "risk (at most 0.3)" in (out := capsys.readouterr().out) and calibrate.RISK_NOTE in out
    assert main(["calibrate", str(model), "--latency-ms", "10000", "--criterion", "entropy"]) == 0
    assert "ms a batch" in capsys.readouterr().out and "| latency" in (model / "README.md").read_text()


def test_a_failed_write_leaves_the_model(model, capsys, monkeypatch):
    before = contents(model)

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("earlyexit_kernels.hf.saving._flush", full)
    message = error_of(capsys, ["calibrate", str(model), "--max-drop", "0.1", "--criterion", "entropy"])
    assert f"{model} could not be written: No space left on device" in message and contents(model) == before


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
    words = ["calibrate", str(model), "--max-drop", "0.02"]
    assert main([*words, "--output", str(tmp_path / "found.json"), "--dry-run"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["records"]
    shares = {one["rule"]: min(one["calibration"]["exit_shares"]) for one in found if "calibration" in one}
    assert main([*words, "--criterion", max(shares, key=shares.__getitem__)]) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(model, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    texts = read_table(model / HELD_OUT).columns["review"]
    data = encode(Split(texts, [0] * len(texts)), tokenizer)
    trace, _ = collect_trace(loaded, data, collate_fn=DataCollatorWithPadding(tokenizer))
    expected = ee.replay(trace, loaded.criterion)[1].tolist()
    assert set(expected) == {1, 2}, "the test needs rows that leave at different layers"
    run = subprocess.run(
        [sys.executable, "-c", PIPELINE, str(model)],
        input=json.dumps(texts),
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == {"1": expected, "32": expected}
