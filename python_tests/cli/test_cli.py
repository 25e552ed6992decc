"""The command line: errors are one line with exit code 2, and the commands work on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.commands import error_of
from transformers import AutoModelForSequenceClassification

from earlyexit_cli import build_parser, main
from earlyexit_kernels import EarlyExitForSequenceClassification, to_early_exit
from earlyexit_kernels.cli import demo, train
from earlyexit_kernels.cli.recipe import RECIPE_FILE, Recipe
from earlyexit_kernels.data import toy
from earlyexit_kernels.methods import METHODS
from earlyexit_kernels.tasks.load import load_task
from earlyexit_kernels.tasks.sources import DATA_VARIABLE


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a stock model of three layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    toy.toy_model(0, layers=3, hidden=16).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Folder written by `earlyexit train`."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["train", "--model", base, "--task", "toy", "--output", str(folder), "--train-rows", "96"]
    method = ["--method", "palbert", "--set", "beta=0.25", "--set", "kl=posterior_prior"]
    assert main([*arguments, *method, "--holdout", "64", "--epochs", "1", "--lr", "1e-3", "--seed", "3"]) == 0
    return folder


def train_few(base: str, folder: Path, *arguments: str) -> Recipe:
    """Train on 32 rows of `small_task`, with 24 held out."""
    rows = ["--train-rows", "32", "--holdout", "24", "--batch-size", "16"]
    assert main(["train", "--model", base, "--task", "toy", "--output", str(folder), *rows, *arguments]) == 0
    return Recipe.load(folder)


def test_unknown_task_is_refused(capsys, base, tmp_path):
    message = error_of(capsys, ["train", "--model", base, "--task", "sst3", "--output", str(tmp_path)])
    assert "expected one of" in message and "'sst3'" in message


def test_missing_data_folder_is_refused(capsys, base, tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "nowhere"))
    message = error_of(capsys, ["train", "--model", base, "--task", "sst2", "--output", str(tmp_path)])
    assert str(tmp_path / "nowhere") in message


def test_missing_model_folder_is_refused(capsys, tmp_path):
    assert "expected a folder written by `earlyexit train`" in error_of(
        capsys, ["eval", "--model", str(tmp_path / "x")]
    )
    assert RECIPE_FILE in error_of(capsys, ["eval", "--model", str(tmp_path)])
    message = error_of(capsys, ["train", "--model", str(tmp_path / "x"), "--task", "toy", "--output", str(tmp_path)])
    assert str(tmp_path / "x") in message


def test_too_many_rows_are_refused_before_training(capsys, base, tmp_path):
    arguments = ["train", "--model", base, "--task", "toy", "--output", str(tmp_path), "--train-rows", "31500"]
    message = error_of(capsys, arguments)
    assert (
        "--train-rows 31500 and --holdout 1000 (the default)" in message and "has 32000 train rows in total" in message
    )
    assert message.endswith("; --holdout 500 would fit")


@pytest.mark.parametrize(
    ("rows", "fitting"),
    [
        ([], "--holdout 19"),
        (["--train-rows", "90"], "--holdout 6"),
        (["--train-rows", "99"], "--train-rows 77 --holdout 19"),
    ],
)
def test_default_holdout_of_a_small_data_set_says_what_would_fit(capsys, base, tmp_path, small_task, rows, fitting):
    arguments = ["train", "--model", base, "--task", "toy", "--output", str(tmp_path / "out"), *rows]
    message = error_of(capsys, arguments)
    assert "--holdout 1000 (the default): " in message and message.endswith(
        f"96 train rows in total; {fitting} would fit"
    )
    assert main([*arguments, *fitting.split(), "--epochs", "1"]) == 0


@pytest.mark.thorough
def test_model_with_exits_is_trained_by_another_method(capsys, trained, tmp_path, small_task):
    """From the encoder and the exits of the first method, without steps that change them."""
    arguments = ["--task", "toy", "--holdout", "16", "--epochs", "1", "--lr", "1e-30", "--head-lr", "1e-30"]
    assert main(["train", "--model", str(trained), "--method", "dact", "--output", str(tmp_path), *arguments]) == 0
    before, after = (EarlyExitForSequenceClassification.from_pretrained(f) for f in (trained, tmp_path))
    assert after.method.name == "dact" and before.method.name != "dact"
    for name, weight in before.heads.out.state_dict().items():
        assert torch.equal(weight, after.heads.out.state_dict()[name])
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"words {i},{'abc'[i % 3]}\n" for i in range(30)))
    message = error_of(
        capsys, ["train", "--model", str(trained), "--train", str(rows), "--output", str(tmp_path / "o")]
    )
    assert f"--model: {trained} " in message and "['a', 'b', 'c']" in message and "stock model" in message


def test_model_is_checked_before_the_rows(capsys, tmp_path, small_task):
    message = error_of(capsys, ["train", "--model", str(tmp_path / "x"), "--task", "toy", "--output", str(tmp_path)])
    assert "--model: expected a folder" in message and "--holdout" not in message


def test_too_large_holdout_is_refused_without_naming_train_rows(capsys, base, tmp_path, small_task):
    arguments = ["train", "--model", base, "--task", "toy", "--output", str(tmp_path), "--holdout", "96"]
    message = error_of(capsys, arguments)
    assert "error: --holdout 96: expected fewer rows" in message and "None" not in message


def test_unknown_method_is_refused(capsys, base, tmp_path):
    arguments = ["train", "--model", base, "--task", "toy", "--output", str(tmp_path), "--method", "magic"]
    assert "'magic'" in error_of(capsys, arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "pondering=1"], "with an option of 'dact', start, ponder, include_last, "),
        (["--set", "ponder"], "--set ponder: expected KEY=VALUE"),
        (["--set", "name=joint"], "--set name=joint: expected KEY=VALUE"),
        (["--set", "ponder=-1"], "Dact(ponder=...): expected a finite number at least 0, got -1"),
        (["--set", "ponder=much"], "got 'much'"),
        (["--epochs", "1", "2", "3"], "--epochs: expected one number, or one for each of the 2 phases of 'dact'"),
        (["--lr", "0"], "--lr: expected a finite number in (0, 1), got 0.0"),
    ],
)
def test_invalid_option_of_method_is_refused(capsys, base, tmp_path, arguments, words):
    argv = ["train", "--model", base, "--task", "toy", "--output", str(tmp_path), "--method", "dact", *arguments]
    assert words in error_of(capsys, argv)


def test_method_that_does_not_support_the_task_is_refused_before_training(capsys, base, tmp_path, monkeypatch):
    (tmp_path / "stsb").mkdir()
    lines = "".join(f"{i}\t{i % 6}\ta .\tb .\n" for i in range(9))
    for split in ("train", "dev"):
        (tmp_path / "stsb" / f"{split}.tsv").write_text(f"idx\tlabel\tsentence1\tsentence2\n{lines}", encoding="utf-8")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    arguments = ["train", "--model", base, "--task", "stsb", "--output", str(tmp_path / "out"), "--method", "ensemble"]
    message = error_of(capsys, arguments)
    assert "'ensemble' is defined for" in message and "berxit" in message


def test_debug_raises_the_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["--debug", "eval", "--model", str(tmp_path)])


def test_command_is_required_and_help_lists_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("demo", "train", "eval", "env"))


def test_env_shows_versions_and_backends(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and all(name in out for name in ("torch", "triton", "cpp", "usable"))


def test_env_refuses_another_value_of_the_self_test_before_it_prints(capsys, monkeypatch):
    monkeypatch.setenv("EARLYEXIT_SELF_TEST", "yes")
    assert main(["env"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "EARLYEXIT_SELF_TEST" in error and "got 'yes'" in error


def test_train_saves_model_tokenizer_and_recipe(trained):
    model = AutoModelForSequenceClassification.from_pretrained(trained, local_files_only=True)
    assert isinstance(model, EarlyExitForSequenceClassification) and model.depth == 3
    assert model.config.id2label == {0: "negative", 1: "positive"}
    recipe = Recipe.load(trained)
    assert (recipe.task, recipe.seed, recipe.holdout, recipe.train_rows) == ("toy", 3, 64, 96)
    assert recipe.evaluation_split == "dev" and len(recipe.scores) == 3
    assert (recipe.method["name"], recipe.method["beta"], recipe.method["kl"]) == ("palbert", 0.25, "posterior_prior")
    assert recipe.method == model.method.to_dict() and model.criterion is None
    rates = {"lr": 1e-3, "head_lr": 1e-3, "halting_lr": 1e-3, "gate_lr": 1e-3}
    assert recipe.phases == [{"name": "ponder", "epochs": 1.0, **rates, "rows": 96}]
    rows, held_out = recipe.train_splits(load_task("toy", seed=3))
    assert len(rows) == 96 and len(held_out) == 64 and not set(rows.sentences) & set(held_out.sentences)


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_saves(base, tmp_path, small_task, method):
    recipe = train_few(base, tmp_path, "--method", method, "--epochs", "1")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True)
    assert [phase["name"] for phase in recipe.phases] == [spec.name for spec in model.method.phases]
    assert recipe.method == model.method.to_dict() and len(recipe.scores) == 3
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "folders of phases are left"


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["dact", "smartbert", "ensemble"])
def test_bfloat16_rounds_products_and_keeps_weights_in_float32(base, tmp_path, small_task, method):
    recipes, weights = [], []
    for arguments in ([], ["--bf16"]):
        folder = tmp_path / f"with{len(arguments)}"
        recipes.append(train_few(base, folder, "--method", method, "--epochs", "1", *arguments))
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert [recipe.bf16 for recipe in recipes] == [False, True]
    difference = (weights[0] - weights[1]).abs().max()
    assert 0 < difference < 0.01


def test_phases_have_separate_epochs_and_rates(base, tmp_path, small_task, capsys):
    numbers = ["--epochs", "1", "2", "--lr", "1e-3", "1e-4", "--head-lr", "same"]
    recipe = train_few(base, tmp_path / "given", "--method", "fastbert", *numbers)
    assert [(p["epochs"], p["lr"], p["head_lr"]) for p in recipe.phases] == [(1.0, 1e-3, 1e-3), (2.0, 1e-4, 1e-4)]
    assert "Phase 2 of 2: exits, epochs 2, lr 0.0001, head_lr 0.0001" in capsys.readouterr().out


def test_phases_have_the_epochs_and_rates_of_the_method_by_default():
    required = ["--model", "base", "--task", "toy", "--output", "out"]
    args = build_parser().parse_args(["train", *required, "--method", "fastbert", "--halting-lr", "1e-4"])
    plans = train.phase_plans(train.method_from(args.method, args.set), args)
    assert [(p["epochs"], p["lr"], p["head_lr"]) for p in plans] == [(3.0, 2e-5, 1e-3), (5.0, 2e-4, 1e-3)]
    assert {p["halting_lr"] for p in plans} == {1e-4}
    assert [p["gate_lr"] for p in plans] == [2e-5, 2e-4], "the encoder's"
    args = build_parser().parse_args(["train", *required, "--method", "smartbert", "--gate-lr", "5e-5"])
    assert {p["gate_lr"] for p in train.phase_plans(train.method_from(args.method, args.set), args)} == {5e-5}


def test_phase_with_rows_of_its_own(base, tmp_path, small_task, monkeypatch):
    """PALBERT's halting head learns from a fifth of the train rows, which no other phase has seen."""
    seen = []
    monkeypatch.setattr(train, "_train_phase", lambda phase, plan, base, rows, collate: seen.append(rows))
    recipe = train_few(base, tmp_path, "--method", "palbert", "--set", "halting_phase=true", "--epochs", "1")
    assert [list(rows.indices) for rows in seen] == [list(range(26)), list(range(26, 32))]
    assert [phase["rows"] for phase in recipe.phases] == [26, 6] and recipe.train_rows == 32
    specs = train.method_from("palbert", ["halting_phase=true"]).phases
    with pytest.raises(ValueError, match=r"at least 2 train rows, .* got 1"):
        train.rows_of_phases(specs, range(1))
    assert [len(rows) for rows in train.rows_of_phases(specs[:1], range(9))] == [9]


@pytest.mark.thorough
def test_eval_of_several_models_marks_rule_of_each_method(base, tmp_path, small_task, capsys):
    pytest.importorskip("matplotlib")
    folders = [tmp_path / "gates", tmp_path / "ponder"]
    train_few(base, folders[0], "--method", "smartbert", "--epochs", "1", "--set", "skip_threshold=0.9")
    train_few(base, folders[1], "--method", "dact", "--epochs", "1")
    results = tmp_path / "results.json"
    arguments = ["--points", "8", "--drop", "1", "--output", str(results), "--plot", str(tmp_path / "curve.png")]
    capsys.readouterr()
    assert main(["eval", "--model", *map(str, folders), *arguments]) == 0
    of_gates, of_ponder = capsys.readouterr().out.split(f"{folders[1]}, method")
    first = of_gates[of_gates.index("| full depth") :].splitlines()[1]
    assert first.startswith("| skip_gate * ") and "exit entropy (threshold" in first
    assert "| dact * " in of_ponder and "| entropy " in of_ponder and "skip_gate" not in of_ponder
    assert (tmp_path / "curve-1.png").is_file() and (tmp_path / "curve-2.png").is_file()
    document = json.loads(results.read_text(encoding="utf-8"))
    assert {m["model"]: m["rule"] for m in document["models"]} == {
        str(folders[0]): "skip_gate",
        str(folders[1]): "dact",
    }
    points = [r for r in document["records"] if r["kind"] == "point"]
    skips = [r for r in points if r["criterion"]["name"] == "skip_gate"]
    assert {r["model"] for r in points} == set(map(str, folders)) and {r["model"] for r in skips} == {str(folders[0])}
    assert {r["criterion"]["threshold"] for r in skips} == {0.9, 1.0}
    running = [r["reporting"] for r in skips if r["criterion"]["threshold"] == 1.0]
    assert all(r["mean_layers_run"] == r["mean_exit_layer"] for r in running)


def test_eval_reports_what_train_stored(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, curve = tmp_path / "results.json", tmp_path / "curve.png"
    arguments = ["eval", "--model", str(trained), "--output", str(results), "--plot", str(curve), "--drop", "1"]
    assert main([*arguments, "--points", "8"]) == 0
    out = capsys.readouterr().out
    assert "| q_exit * " in out and "| expectation " in out and "random exit" in out and str(curve) in out
    document = json.loads(results.read_text(encoding="utf-8"))
    layers = [r["reporting"] for r in document["records"] if r["kind"] == "static_truncation"]
    assert layers == [pytest.approx(scores) for scores in Recipe.load(trained).scores]
    assert document["environment"]["flush_denormal"] is True and document["arguments"]["drop"] == 1.0
    assert curve.read_bytes().startswith(b"\x89PNG")


def test_eval_refuses_task_with_other_classes(trained, capsys, tmp_path, monkeypatch):
    (tmp_path / "trec").mkdir()
    lines = "".join(f"{i}\t{i % 6}\twhat ?\n" for i in range(200))
    (tmp_path / "trec" / "train.tsv").write_text(f"idx\tlabel\tsentence\n{lines}", encoding="utf-8")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    message = error_of(capsys, ["eval", "--model", str(trained), "--task", "trec"])
    assert "negative, positive; trec has DESC, ENTY, ABBR, HUM, LOC, NUM" in message


def _write_task(folder: Path, name: str, columns: str, rows: list[str]) -> None:
    (folder / name).mkdir()
    for split in ("train", "dev"):
        lines = "".join(f"{i}\t{i % 2}\t{row}\n" for i, row in enumerate(rows))
        (folder / name / f"{split}.tsv").write_text(f"idx\tlabel\t{columns}\n{lines}", encoding="utf-8")


def test_eval_refuses_task_with_other_labels_of_the_same_number(trained, capsys, tmp_path, monkeypatch):
    _write_task(tmp_path, "mrpc", "sentence1\tsentence2", ["the plot was dull .\tthe cast was witty ."] * 200)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    message = error_of(capsys, ["eval", "--model", str(trained), "--task", "mrpc"])
    assert "labels of the model" in message and "mrpc has not_equivalent, equivalent" in message


def test_eval_on_a_smaller_task_with_the_same_labels(trained, capsys, tmp_path, monkeypatch):
    _write_task(tmp_path, "sst2", "sentence", ["the plot was dull ."] * 40)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert main(["eval", "--model", str(trained), "--task", "sst2", "--points", "8", "--drop", "1"]) == 0
    assert "Chosen on 39 held-out train rows" in capsys.readouterr().out
    (tmp_path / "sst2" / "train.tsv").write_text("idx\tlabel\tsentence\n" + "0\t1\tein fader film\n" * 9, "utf-8")
    message = error_of(capsys, ["eval", "--model", str(trained), "--task", "sst2"])
    assert "tokens of the first 8 rows of the train split are unknown" in message


def test_damaged_recipe_is_refused(trained, tmp_path, capsys):
    (tmp_path / RECIPE_FILE).write_text('{"task": "toy"}', encoding="utf-8")
    assert "is not a recipe" in error_of(capsys, ["eval", "--model", str(tmp_path)])


@pytest.mark.parametrize("command", ["eval", "train"])
def test_gpu_that_fails_is_reported_in_one_line(command, trained, base, tmp_path, capsys, monkeypatch):
    arguments = {
        "eval": ["--model", str(trained)],
        "train": ["--model", base, "--task", "toy", "--output", str(tmp_path), "--train-rows", "32", "--holdout", "24"],
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # where torch cannot make tensors
    message = error_of(capsys, [command, *arguments[command]])
    assert "torch finds a GPU but cannot use it" in message
    assert "set CUDA_VISIBLE_DEVICES= to run on the CPU" in message


def test_demo_runs_and_writes_results(tmp_path, capsys, monkeypatch):
    """Also where torch finds a GPU and cannot use it: the demo stays on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pytest.importorskip("matplotlib")
    sizes = demo.Sizes(train_rows=64, rows=40, rounds=1, batches={1: 1, 32: 1})
    monkeypatch.setattr(demo, "QUICK", sizes)
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count(demo.QUICK_NOTE) == 1 and out.index(demo.QUICK_NOTE) < out.index("accuracy")
    assert all(sentence in out for sentence in demo.SENTENCES) and "patience 2" in out and "5 reported" in out
    records = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["records"]
    plain, full = (r for r in records if r.get("model") in (demo.PLAIN, "full depth"))
    assert plain["accuracy"] == full["accuracy"] and plain["time_ratio"]["1"]["median"] == 1.0
    assert (tmp_path / "curve.png").is_file() and (tmp_path / "model" / "config.json").is_file()


def test_tokenizer_that_does_not_fit_the_text_is_refused(tmp_path, capsys, small_task):
    toy.toy_model(layers=2, hidden=16).save_pretrained(tmp_path / "stock")
    arguments = ["--task", "toy", "--holdout", "24", "--output", str(tmp_path / "out")]
    message = error_of(capsys, ["train", "--model", str(tmp_path / "stock"), *arguments])
    assert "of the first 72 rows of the train split are unknown to the tokenizer of" in message
    assert "It knows no words, as the folder has no files of a tokenizer" in message
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_other_text_is_refused(base, tmp_path, capsys, monkeypatch):
    (tmp_path / "sst2").mkdir()
    for split in ("train", "dev"):
        lines = "".join(f"{i}\t{i % 2}\tein ganz wunderbar langweiliger film\n" for i in range(40))
        (tmp_path / "sst2" / f"{split}.tsv").write_text(f"idx\tlabel\tsentence\n{lines}", encoding="utf-8")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    arguments = ["--task", "sst2", "--holdout", "8", "--output", str(tmp_path / "out")]
    message = error_of(capsys, ["train", "--model", base, *arguments])
    tokens = len(toy.vocabulary())
    assert "80% of the tokens of the first 32 rows" in message
    assert f"It has {tokens} tokens, the model {tokens} embeddings" in message and "made for other text" in message
    assert "files of a tokenizer" not in message


def test_a_model_saved_in_python_predicts(tmp_path, capsys):
    to_early_exit(toy.toy_model(layers=2, hidden=16)).save_pretrained(tmp_path / "model")
    toy.toy_tokenizer().save_pretrained(tmp_path / "model")
    assert main(["predict", "--model", str(tmp_path / "model"), "--text", "the plot was dull ."]) == 0
    assert "tive (" in capsys.readouterr().out


def test_dev_is_refused_for_a_model_of_a_task(base, tmp_path, capsys, small_task):
    arguments = ["--task", "toy", "--holdout", "50", "--train-rows", "40", "--output", str(tmp_path), "--epochs", "1"]
    assert main(["train", "--model", str(base), *arguments]) == 0
    message = error_of(capsys, ["calibrate", "--model", str(tmp_path), "--max-drop", "0.5", "--dev", "x.csv"])
    assert "--dev: expected a model trained with --train" in message
    assert main(["calibrate", "--model", str(tmp_path), "--max-drop", "0.5"]) == 0
    assert "50 held-out train rows" in capsys.readouterr().out
