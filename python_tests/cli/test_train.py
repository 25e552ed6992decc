"""`earlyexit train`: what it saves, chooses and says, and what it refuses before training."""

from __future__ import annotations

import errno
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import error_of
from support.own_files import NAMES, write_rows
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from earlyexit_cli import build_parser, main
from earlyexit_kernels import EarlyExitForSequenceClassification
from earlyexit_kernels.cli import train
from earlyexit_kernels.cli.saved import HELD_OUT, RECORD, Record
from earlyexit_kernels.data import toy
from earlyexit_kernels.data.rows import Split, hold_out
from earlyexit_kernels.data.table import read_table
from earlyexit_kernels.methods import METHODS

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of 60 rows."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.csv", 60)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A folder with an encoder that has no classifier."""
    folder, classifier = tmp_path_factory.mktemp("encoder"), tmp_path_factory.mktemp("classifier")
    toy.toy_model(0, layers=3, hidden=16).save_pretrained(classifier)
    AutoModel.from_pretrained(classifier).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def no_work(monkeypatch):
    """Fail a test that starts training."""
    monkeypatch.setattr(train, "_train_phase", lambda *_: pytest.fail("work started"))


def command(model, rows, output, *more: str) -> list[str]:
    return ["train", str(model), "--data", str(rows), "--output", str(output), "--epochs", "0.5", *more]


def pooling_of(folder: Path) -> str | None:
    return json.loads((folder / CONFIG).read_text())["heads"]["pooling"]


# what is saved


def test_model_tokenizer_record_card_and_held_out_rows(trained, files):
    model = AutoModelForSequenceClassification.from_pretrained(trained, local_files_only=True)
    assert isinstance(model, EarlyExitForSequenceClassification) and model.criterion is None
    assert model.config.id2label == dict(enumerate(NAMES))
    assert AutoTokenizer.from_pretrained(trained).model_max_length == 48, "other programs cut where training did"
    record = Record.load(trained)
    assert (record.data, record.rows, record.unseen_rows, record.seed) == ("train.csv", 120, 120, 0)
    assert record.columns.text == "review" and record.unseen == "held-out rows of train.csv" and len(record.scores) == 2
    rates = {"lr": 5e-3, "head_lr": 1e-3, "gate_lr": 5e-3}
    assert record.phases == [{"name": "joint", "epochs": 16.0, **rates, "rows": 120}]
    kept, data = (read_table(path).columns for path in (trained / HELD_OUT, files / "train.csv"))
    pairs = set(zip(data["review"], data["opinion"], strict=True))
    assert len(kept["review"]) == 120 and set(zip(kept["review"], kept["opinion"], strict=True)) < pairs
    card = (trained / "README.md").read_text()
    assert "train.csv" in card and str(files) not in card and "import earlyexit_kernels" in card
    assert card.count("| ") > 3 and "no criterion" in card.lower() and "heldout.parquet, texts included" in card


@pytest.mark.parametrize("dev", [False, True])
def test_unseen_rows_are_a_fifth_or_the_dev_file(base, rows, tmp_path, capsys, dev):
    other = write_rows(tmp_path / "dev.csv", 30, seed=1)
    assert main(command(base, rows, tmp_path / "out", *(["--dev", str(other)] if dev else []))) == 0
    record, kept = Record.load(tmp_path / "out"), read_table(tmp_path / "out" / HELD_OUT).columns
    assert (record.rows, record.unseen_rows) == ((60, 30) if dev else (48, 12))
    assert (kept["text"] == read_table(other).columns["text"]) == dev
    out = capsys.readouterr().out
    assert "2 classes (bad " in out and f"heldout.parquet there the {30 if dev else 12} " in out


def test_rows_are_not_kept_if_not_wanted(base, rows, tmp_path, capsys):
    assert main(command(base, rows, tmp_path)) == 0 and (tmp_path / HELD_OUT).is_file()
    assert main(command(base, rows, tmp_path, "--no-keep-rows", "--overwrite")) == 0
    assert not (tmp_path / HELD_OUT).exists() and "texts included" not in (tmp_path / "README.md").read_text()
    assert "--data FILE" in capsys.readouterr().out.splitlines()[-1]
    message = error_of(capsys, ["calibrate", str(tmp_path), "--max-drop", "0.1"])
    assert "has no heldout.parquet" in message and "--data" in message


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_saves(base, rows, tmp_path, method):
    assert main(command(base, rows, tmp_path, "--method", method, "--batch-size", "16")) == 0
    model, record = AutoModelForSequenceClassification.from_pretrained(tmp_path), Record.load(tmp_path)
    assert [phase["name"] for phase in record.phases] == [spec.name for spec in model.method.phases]
    assert model.method.name == METHODS[method].name and len(record.scores) == 2
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "folders of phases are left"


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["dact", "smartbert", "ensemble"])
def test_bfloat16_rounds_products_and_keeps_weights_in_float32(base, rows, tmp_path, method):
    weights = []
    for more in ([], ["--bf16"]):
        folder = tmp_path / f"with{len(more)}"
        assert main(command(base, rows, folder, "--method", method, "--epochs", "1", "--batch-size", "8", *more)) == 0
        assert Record.load(folder).bf16 == bool(more)
        parts = load_file(folder / WEIGHTS).values()
        assert {part.dtype for part in parts} == {torch.float32}
        weights.append(torch.cat([part.flatten() for part in parts]))
    assert 0 < (weights[0] - weights[1]).abs().max() < 0.01


def test_seed_makes_a_training_repeatable_and_a_model_is_replaced_only_on_request(base, rows, tmp_path, capsys):
    more = ["--epochs", "2", "--lr", "1e-3", "--batch-size", "16", "--seed"]
    for name in ("first", "second"):
        assert main(command(base, rows, tmp_path / name, *more, "3")) == 0
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("first", "second"))
    assert all(first[name].equal(second[name]) for name in first)
    assert "has a model already" in error_of(capsys, command(base, rows, tmp_path / "first", *more, "1"))
    assert main(command(base, rows, tmp_path / "first", *more, "1", "--overwrite")) == 0
    third = load_file(tmp_path / "first" / WEIGHTS)
    assert not all(first[name].equal(third[name]) for name in first)


def test_phases_have_epochs_and_rates_of_their_own(base, rows, tmp_path, capsys):
    numbers = ["--epochs", "1", "2", "--lr", "1e-3", "1e-4", "--head-lr", "same", "--method", "fastbert"]
    assert main(command(base, rows, tmp_path, *numbers)) == 0
    phases = Record.load(tmp_path).phases
    assert [(p["epochs"], p["lr"], p["head_lr"]) for p in phases] == [(1.0, 1e-3, 1e-3), (2.0, 1e-4, 1e-4)]
    assert "Phase 2 of 2: exits, epochs 2, lr 0.0001, head_lr 0.0001, rows 48" in capsys.readouterr().out


def test_phases_have_the_epochs_and_rates_of_the_method_by_default():
    words = ["train", "base", "--data", "rows.csv", "--output", "out", "--method"]
    args = build_parser().parse_args([*words, "fastbert"])
    plans = train.phase_plans(train.method_from(args.method, args.set), args)
    assert [(p["epochs"], p["lr"], p["head_lr"]) for p in plans] == [(3.0, 2e-5, 1e-3), (5.0, 2e-4, 1e-3)]
    assert [p["gate_lr"] for p in plans] == [2e-5, 2e-4], "the encoder's"
    args = build_parser().parse_args([*words, "smartbert", "--gate-lr", "5e-5"])
    assert {p["gate_lr"] for p in train.phase_plans(train.method_from(args.method, args.set), args)} == {5e-5}


def test_phase_with_rows_of_its_own(base, rows, tmp_path, monkeypatch):
    """PALBERT's halting head learns from a fifth of the train rows, which no other phase has seen."""
    seen = []
    monkeypatch.setattr(train, "_train_phase", lambda phase, plan, base, rows, collate: seen.append(rows))
    assert main(command(base, rows, tmp_path, "--method", "palbert", "--set", "halting_phase=true")) == 0
    assert [list(part.indices) for part in seen] == [list(range(38)), list(range(38, 48))]
    specs = train.method_from("palbert", ["halting_phase=true"]).phases
    with pytest.raises(ValueError, match=r"at least 2 train rows, .* got 1"):
        train.rows_of_phases(specs, range(1))


@pytest.mark.thorough
def test_model_with_exits_is_trained_by_another_method(base, rows, tmp_path, capsys):
    """From the encoder and the exits of the first method, without steps that change them."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(command(base, rows, first)) == 0
    frozen = ["--lr", "1e-30", "--head-lr", "1e-30", "--method", "dact"]
    assert main(command(first, rows, second, *frozen)) == 0
    before, after = (EarlyExitForSequenceClassification.from_pretrained(folder) for folder in (first, second))
    assert (before.method.name, after.method.name) == ("joint", "dact")
    for name, weight in before.heads.out.state_dict().items():
        assert torch.equal(weight, after.heads.out.state_dict()[name])
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"words {i},{'abc'[i % 3]}\n" for i in range(30)))
    message = error_of(capsys, command(first, tmp_path / "rows.csv", tmp_path / "o"))
    assert f"MODEL: {first} " in message and "['a', 'b', 'c']" in message and "stock model" in message


# what is chosen and said


def test_encoder_without_a_classifier_gets_exits_that_read_the_mean(encoder, base, rows, tmp_path, capsys):
    assert main(command(encoder, rows, tmp_path / "mean")) == 0
    said = capsys.readouterr()
    assert pooling_of(tmp_path / "mean") == "mean" and "no trained classifier" in said.out
    assert "LOAD REPORT" not in said.out + said.err and "gate_lr" not in said.out
    assert main(command(base, rows, tmp_path / "own")) == 0
    assert pooling_of(tmp_path / "own") is None and "no trained classifier" not in capsys.readouterr().out
    assert main(command(encoder, rows, tmp_path / "family", "--pooling", "family")) == 0
    assert pooling_of(tmp_path / "family") is None


def test_progress_without_a_terminal_has_rate_and_time_left(base, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "TOLD", 0.0)
    assert main(command(base, rows, tmp_path, "--epochs", "2", "--batch-size", "24")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 4 and lines[1].startswith("step 2 of 4, ") and lines[-1].endswith(" a second, 0 s left")


@pytest.mark.parametrize(
    ("bad", "pooling", "words"),
    [
        ((1, 2), None, "exits 1, 2. Rows cannot leave there; --pooling mean often helps"),
        ((1,), "mean", "exits 1. Rows cannot leave there; give more rows or --epochs"),
        ((1, 3), None, "The last exit is no better than chance"),
    ],
)
def test_exits_at_chance_are_named_with_a_remedy(bad, pooling, words):
    rows = SimpleNamespace(trace=SimpleNamespace(depth=3), is_chance=lambda layer: layer in bad)
    assert words in train._advice(rows, pooling)
    assert train._advice(SimpleNamespace(trace=rows.trace, is_chance=lambda layer: False), pooling) is None


# what is refused


TWO = [f"the plot {i} was dull .,{'ab'[i % 2]}" for i in range(40)]
#: With which the last of 41 rows is one of 20 held out.
SEED = next(str(seed) for seed in range(50) if 40 in hold_out(Split([""] * 41, [0] * 41), 20, seed=seed)[1])
#: Contents of the train file, options, and words of the error.
DATA = {
    "missing column": (TWO, ["--text-column", "x"], "rows.csv has no column 'x' (--text-column); it has"),
    "one class": ([row[:-1] + "a" for row in TWO], [], "at least two different labels"),
    "everything held out": (TWO, ["--holdout", "40"], "--holdout: expected fewer than the 40 rows"),
    "one class left": ([*["the plot .,a"] * 39, "the plot .,b"], ["--holdout", "39"], "all have one label"),
    "class only held out": (
        [*TWO, "the plot was dull .,c"],
        ["--holdout", "20", "--seed", SEED],
        "no row to train on has the label c",
    ),
    "empty text": ([*TWO, ",a"], [], "line 42: expected a text, got an empty one"),
    "no classes for the method": (
        [row[:-1] + f"{i}.5" for i, row in enumerate(TWO)],
        ["--method", "ensemble"],
        "'ensemble' is defined for",
    ),
    "unknown option": (TWO, ["--method", "dact", "--set", "pondering=1"], "with an option of 'dact', start, ponder"),
    "no value": (TWO, ["--method", "dact", "--set", "ponder"], "--set ponder: expected KEY=VALUE"),
    "a name": (TWO, ["--method", "dact", "--set", "name=joint"], "--set name=joint: expected KEY=VALUE"),
    "out of range": (TWO, ["--method", "dact", "--set", "ponder=-1"], "expected a finite number at least 0, got -1"),
    "not a number": (TWO, ["--method", "dact", "--set", "ponder=much"], "got 'much'"),
    "nested": (TWO, ["--method", "palbert", "--set", f"beta={'[' * 9000}"], "beta"),
    "phases": (TWO, ["--method", "dact", "--epochs", "1", "2", "3"], "one for each of the 2 phases of 'dact'"),
    "no room": (TWO, ["--max-length", "2"], "--max-length: expected at least 3 for this tokenizer"),
    "other language": ([f"ein ganz langer film,{'ab'[i % 2]}" for i in range(40)], [], "made for other text"),
    "import": (TWO, ["--import", "no_such_module"], "--import: no_such_module cannot be imported"),
}


@pytest.mark.parametrize("case", DATA)
def test_invalid_rows_and_options_are_refused_before_training(case, base, tmp_path, capsys, no_work):
    lines, more, words = DATA[case]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    assert words in error_of(capsys, command(base, tmp_path / "rows.csv", tmp_path / "out", *more))


def test_train_file_is_not_the_dev_file(base, rows, tmp_path, capsys, no_work):
    message = error_of(capsys, command(base, rows, tmp_path / "out", "--dev", str(rows)))
    assert "--dev: expected other rows than those of --data" in message


def test_folder_without_a_tokenizer_is_refused(rows, tmp_path, capsys, no_work):
    toy.toy_model(layers=2, hidden=16).save_pretrained(tmp_path / "stock")
    message = error_of(capsys, command(tmp_path / "stock", rows, tmp_path / "out"))
    assert "It knows no words, as the folder has no files of a tokenizer" in message


def test_checkpoint_without_an_encoder_weight_is_refused(base, rows, tmp_path, capsys, no_work):
    toy.toy_tokenizer().save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_bytes((base / CONFIG).read_bytes())
    weights = load_file(base / WEIGHTS)
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    message = error_of(capsys, command(tmp_path, rows, tmp_path / "out"))
    assert "1 weight(s) of the encoder" in message and "layer.1.output.dense.weight" in message


def test_gpu_that_fails_is_reported_in_one_line(base, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # where torch cannot make tensors
    message = error_of(capsys, command(base, rows, tmp_path / "out"))
    assert "torch finds a GPU but cannot use it" in message and "set CUDA_VISIBLE_DEVICES= to run on the CPU" in message


# saves that fail


def test_disk_without_room_is_refused_before_training(base, rows, tmp_path, capsys, monkeypatch, no_work):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert "MB of free disk in" in error_of(capsys, command(base, rows, tmp_path / "out"))


def test_full_disk_does_not_lose_the_model(base, rows, tmp_path, capsys, monkeypatch):
    output = tmp_path / "output"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def save(self, folder):
        if output in folder.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(self, folder)

    saved = Record.save
    assert main(command(base, rows, output)) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert {CONFIG, WEIGHTS, RECORD, HELD_OUT, "tokenizer.json"} <= before.keys()
    monkeypatch.setattr(Record, "save", save)
    line = error_of(capsys, command(base, rows, output, "--seed", "1", "--overwrite"))
    rescued = next((tmp_path / "temporary").glob("earlyexit-*"))
    assert "No space left" in line and f"the trained model is in {rescued}" in line
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert EarlyExitForSequenceClassification.from_pretrained(rescued).depth == 2 and Record.load(rescued).seed == 1


def test_diverged_weights_are_refused(base, rows, tmp_path, capsys, monkeypatch):
    def diverge(phase, *_):
        with torch.no_grad():
            phase.model.heads.out[0].weight.fill_(math.nan)

    monkeypatch.setattr(train, "_train_phase", diverge)
    line = error_of(capsys, command(base, rows, tmp_path / "out"))
    assert "heads.out.0.weight" in line and "lower learning rate" in line and not any((tmp_path / "out").iterdir())
