"""The experiments on real text: their plans, that they continue when interrupted, and the tables from their JSON."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks.accuracy import experiments, robustness, runs, tables
from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.runs import Budget, Run
from earlyexit_cli import build_parser
from earlyexit_kernels.cli.train import objective_from
from earlyexit_kernels.objectives import OBJECTIVES, from_dict
from earlyexit_kernels.tasks import load, toy


def planned(name, tmp_path=Path()) -> list[Run]:
    return list(experiments.planned(name, str(tmp_path / "base"), tmp_path / "trained"))


def test_plans_have_the_names_of_the_committed_results():
    names = {run.name for name in EXPERIMENTS for run in planned(name)}
    assert names == {path.stem for path in runs.RESULTS.glob("*-seed*.json")}
    assert {OBJECTIVES[run.method] for run in planned("methods")} == set(OBJECTIVES.values())


def test_plans_train_with_the_settings_of_the_committed_results():
    for run in (run for name in EXPERIMENTS for run in planned(name)):
        recorded = json.loads((runs.RESULTS / f"{run.name}.json").read_text())["recipe"]["method"]
        parsed = build_parser().parse_args([*runs.train_arguments(run, 32), "--output", "x"])
        settings = objective_from(parsed.method, parsed.set).to_dict()
        assert settings == pytest.approx(from_dict(recorded).to_dict()), run.name


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """``tiny(experiment, method)``: a run of a tiny model on few generated rows, and a folder for results."""
    monkeypatch.setattr(load, "toy_splits", partial(load.toy_splits, train_rows=96, dev_rows=24, test_rows=0))
    monkeypatch.setattr(robustness, "SHARES", (0.5,))
    toy.toy_model(0, layers=3, hidden=16).save_pretrained(tmp_path / "base")
    toy.toy_tokenizer().save_pretrained(tmp_path / "base")
    few = Budget(train_rows=32, holdout=24, epochs=0.5, frozen_epochs=0.25, batch_size=16, points=8)

    def run_of(experiment, method):
        run = next(run for run in planned(experiment, tmp_path) if run.method == method)
        return dataclasses.replace(run, task="toy", settings={}, budget=few), tmp_path / "results"

    return run_of


@pytest.mark.parametrize("method", ["deebert", "dact", "smartbert"])
def test_run_is_measured_once_and_appears_in_the_table(tiny, method, capsys):
    run, results = tiny("methods", method)
    experiments.write(run, results)
    path = results / f"{run.name}.json"
    document = json.loads(path.read_text())
    parsed = build_parser().parse_args([*runs.train_arguments(run, 32), "--output", "x"])
    assert parsed.epochs == ([0.5] if method == "dact" else [0.5, 0.25]), "a frozen phase has its own epochs"
    assert run.model not in path.read_text() and document["arguments"]["model"].endswith("/base")
    near = [record for record in document["records"] if record["kind"] == "near"]
    assert [record["target"] for record in near] == [1.5, 2.0]
    for record in near:
        assert record["measured"]["scores"]["accuracy"] == pytest.approx(record["reporting"]["scores"]["accuracy"])
        assert record["measured"]["mean_layers_run"] == pytest.approx(record["reporting"]["mean_layers_run"], abs=0.1)
        assert record["measured"]["macs_share"] > 0
    answers = [record for record in document["records"] if record["kind"] == "answer_truncation"]
    assert len(answers) == (3 if method == "dact" else 0)
    (row,) = tables.methods("toy", results=results).splitlines()[2:3]
    assert row.startswith(f"| {method}") and row.count("|") == 13
    before = path.stat().st_mtime_ns
    experiments.write(run, results)
    assert path.stat().st_mtime_ns == before and "skipped, exists" in capsys.readouterr().out
    path.unlink()
    with pytest.raises(ValueError, match="trained with other arguments"):
        experiments.write(dataclasses.replace(run, budget=dataclasses.replace(run.budget, lr=1e-2)), results)


def test_smartbert_experiment(tiny):
    run, results = tiny("smartbert", "smartbert")
    experiments.write(run, results)
    lines = tables.smartbert(results=results).splitlines()[2:]
    rules = [line.split("|")[2].strip() for line in lines]
    assert rules[:3] == ["most frequent class", "full depth", "skips alone"] and len(rules) == 7


def test_robustness_experiment(tiny):
    run, results = tiny("robustness", "joint")
    experiments.write(run, results)
    found = json.loads((results / f"{run.name}.json").read_text())["records"]
    assert {(r["noise"], r["share"]) for r in found} == {("clean", 0.0), ("typos", 0.5), ("word_drop", 0.5)}
    assert {r["rule"] for r in found} == {"full depth", "patience 1", "entropy, 1.5x", "entropy, 2x"}
    assert [len(r["draws"]) for r in found if r["rule"] == "full depth"] == [1, 3, 3]
    lines = tables.robustness(results=results).splitlines()
    assert len(lines) == 2 + 3 and lines[3].startswith("| typos, 50% of the words")
