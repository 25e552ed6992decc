"""The experiments on real text: their plans, that they continue when interrupted, and the tables from their JSON."""

from __future__ import annotations

import argparse
import json
from functools import partial

import pytest
import torch

from benchmarks.accuracy import lambda_ablation, methods, robustness, runs, smartbert, tables
from benchmarks.accuracy.runs import Run
from earlyexit_cli import build_parser
from earlyexit_kernels.objectives import OBJECTIVES
from earlyexit_kernels.tasks import load, toy
from earlyexit_kernels.tuning.report import write_json


@pytest.fixture(autouse=True)
def denormals_as_before():
    """Runs flush denormals, which other tests rely on not happening."""
    yield
    torch.set_flush_denormal(False)


def arguments(*given: str, **more) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    runs.add_arguments(parser)
    args = parser.parse_args(["--model", "encoder", *given])
    return argparse.Namespace(**{**vars(args), **more})


def test_plan_has_every_method_and_each_ponder_cost_of_dact():
    plan = list(methods.planned(arguments(task=["sst2", "trec"], methods=methods.METHODS, ponder=methods.PONDERS)))
    assert {OBJECTIVES[run.method] for run in plan} == set(OBJECTIVES.values())
    assert len({run.name for run in plan}) == len(plan) == 2 * (8 + 2)


def test_ablation_shares_the_default_model_with_methods():
    args = arguments(task=["sst2"], halting_input=lambda_ablation.INPUTS, halting_layers=lambda_ablation.LAYERS)
    plan = list(lambda_ablation.planned(args))
    (default,) = [run for run in plan if not run.settings]
    assert len(plan) == 6 and default.model_name == "sst2-palbert-seed0" and default.label == "concat, 3"


def test_command_line_settings_win_and_defaults_are_dropped():
    args = arguments("--set", "dact.ponder=0.2", "--set", "palbert.beta=0.5", "--epochs", "5")
    assert runs.settings_of(args, "dact", ponder=0.1) == {"ponder": 0.2}
    assert runs.settings_of(args, "palbert", halting_input="diff") == {"halting_input": "diff"}
    assert runs.settings_of(args, "smartbert") == {}  # 3 of 5 epochs with soft gates are its own


def test_frozen_phases_have_their_own_epochs():
    run = Run("methods", "sst2", "deebert", {})
    given = runs.train_arguments(run, arguments("--epochs", "2", "--frozen-epochs", "1"), 10)
    parsed = build_parser().parse_args([*given, "--output", "x"])
    assert parsed.epochs == [2.0, 1.0] and parsed.train_rows == 10 and parsed.pooling == "mean"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A tiny stock model on disk, and the generated task with few rows."""
    monkeypatch.setattr(load, "toy_splits", partial(load.toy_splits, train_rows=96, dev_rows=24, test_rows=0))
    toy.toy_model(0, layers=3, hidden=16).save_pretrained(tmp_path / "base")
    toy.toy_tokenizer().save_pretrained(tmp_path / "base")
    few = ("--train-rows", "32", "--holdout", "24", "--batch-size", "16", "--points", "8", "--epochs", "0.5")
    folders = ("--trained", str(tmp_path / "trained"), "--results", str(tmp_path / "results"))
    return arguments("--model", str(tmp_path / "base"), *few, "--frozen-epochs", "0.5", *folders)


@pytest.mark.parametrize("method", ["joint", "dact", "smartbert"])
def test_run_is_measured_once_and_appears_in_the_table(base, method, capsys):
    run = Run("methods", "toy", method, runs.settings_of(base, method))
    runs.write_runs([run], base)
    path = base.results / f"{run.name}.json"
    document = json.loads(path.read_text())
    assert str(base.model) not in path.read_text() and document["arguments"]["model"].endswith("/base")
    near = [record for record in document["records"] if record["kind"] == "near"]
    assert [record["target"] for record in near] == [1.5, 2.0]
    for record in near:
        assert record["measured"]["scores"]["accuracy"] == pytest.approx(record["reporting"]["scores"]["accuracy"])
        assert record["measured"]["mean_layers_run"] == pytest.approx(record["reporting"]["mean_layers_run"], abs=0.1)
        assert record["measured"]["macs_share"] > 0
    answers = [record for record in document["records"] if record["kind"] == "answer_truncation"]
    assert len(answers) == (3 if method == "dact" else 0)
    (row,) = tables.methods("toy", results=base.results).splitlines()[2:3]
    assert row.startswith(f"| {method}") and row.count("|") == 13
    before = path.stat().st_mtime_ns
    runs.write_runs([run], base)
    assert path.stat().st_mtime_ns == before and "skipped, exists" in capsys.readouterr().out
    path.unlink()
    with pytest.raises(ValueError, match="trained with other arguments"):
        runs.write_runs([run], argparse.Namespace(**{**vars(base), "lr": 1e-2}))


def test_smartbert_experiment(base):
    (run,) = smartbert.planned(argparse.Namespace(**vars(base), task=["toy"]))
    runs.write_runs([run], base, smartbert.records)
    lines = tables.smartbert(results=base.results).splitlines()[2:]
    rules = [line.split("|")[2].strip() for line in lines]
    assert rules[:3] == ["most frequent class", "full depth", "skips alone"] and len(rules) == 7


def test_robustness_experiment(base):
    run = Run("methods", "toy", "joint", {})
    model = runs.Trained(runs.trained_model(run, base), batch_size=16)
    found = list(robustness.records(model, (0.5,), draws=2))
    assert {(r["noise"], r["share"]) for r in found} == {("clean", 0.0), ("typos", 0.5), ("word_drop", 0.5)}
    assert {r["rule"] for r in found} == {"full depth", "patience 1", "entropy, 1.5x", "entropy, 2x"}
    assert [len(r["draws"]) for r in found if r["rule"] == "full depth"] == [1, 2, 2]
    recipe = {"scores": [{"accuracy": 0.5}]}
    write_json(base.results / "robustness-toy-x.json", found, run={"method": "joint"}, recipe=recipe)
    lines = tables.robustness(results=base.results).splitlines()
    assert len(lines) == 2 + 3 and lines[3].startswith("| typos, 50% of the words")


def test_tables_without_results(tmp_path):
    readers = (partial(tables.methods, "sst2"), tables.lambda_ablation, tables.smartbert, tables.robustness)
    assert [reader(results=tmp_path) for reader in readers] == [tables.NOT_MEASURED] * 4
