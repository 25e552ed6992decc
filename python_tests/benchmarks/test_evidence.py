"""The trainings that test the papers' claims: their plans, their records, and the tables."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import glue
from benchmarks.evidence import encoders, measure, plans, runs, tables
from benchmarks.evidence.__main__ import left_table
from benchmarks.evidence.plans import SIX, Training
from benchmarks.evidence.results import RESULTS, mixed, stored
from earlyexit_cli import build_parser
from earlyexit_kernels.data import toy
from earlyexit_kernels.data.rows import Split
from earlyexit_kernels.methods import METHODS


def test_plans_have_unique_names_and_arguments_that_the_command_takes():
    trainings = plans.all_trainings()
    by_name: dict[str, Training] = {}
    for experiment in plans.EXPERIMENTS.values():
        for training in experiment.trainings:
            assert by_name.setdefault(training.name, training) == training
            assert training.start is None or training.start.name in trainings
    for training in trainings.values():
        parsed = build_parser().parse_args(training.arguments("ENCODER", "OUTPUT"))
        assert str(plans.ROWS[training.task]) in str(parsed.data) and parsed.seed == training.seed
    for task in plans.ROWS:
        compared = {METHODS[t.method] for t in plans.EXPERIMENTS[f"methods_{task}"].trainings}
        expected = {"stsb": plans.REGRESSION, "rte": ("joint",)}.get(task, METHODS)
        assert compared == {METHODS[name] for name in expected}


def test_committed_results_are_of_planned_trainings_with_their_present_arguments():
    trainings = plans.all_trainings()
    results = stored(RESULTS)
    assert len(results) == 225
    for name, result in results.items():
        command = " ".join(["earlyexit", *trainings[name].arguments("ENCODER", "OUTPUT")])
        assert result.document["command"] == command, name


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """``tiny(training, ...)``: train and measure tiny models on few generated rows; returns the file of results."""
    splits = toy.write_splits(train_rows=96, dev_rows=24, test_rows=0)
    rows = {name: Split([s.text for s in split], [s.label for s in split]) for name, split in splits.items()}
    monkeypatch.setattr(glue, "read_split", lambda task, split: rows[split])
    monkeypatch.setitem(glue.TASKS, "toy", glue.Task())
    monkeypatch.setattr(plans, "ROWS", {"toy": 32})
    monkeypatch.setattr(plans, "HOLDOUT", 24)
    monkeypatch.setattr(plans, "EXIT_EPOCHS", 0.5)
    monkeypatch.setattr(measure, "NOISE_DRAWS", 1)
    toy.toy_model(0, layers=3, hidden=16).save_pretrained(tmp_path / "base")
    toy.toy_tokenizer().save_pretrained(tmp_path / "base")

    def run(*group):
        threads = torch.get_num_threads()
        try:
            names = runs.run_group(group, {SIX: str(tmp_path / "base")}, tmp_path / "work", tmp_path / "results.jsonl")
        finally:
            torch.set_num_threads(threads)
        assert names == [training.name for training in group]
        return tmp_path / "results.jsonl"

    return run


@pytest.mark.thorough
def test_training_that_starts_from_another_is_measured_after_it(tiny, tmp_path):
    joint = Training("toy", "joint", 0, epochs=(0.5,))
    dact = Training("toy", "dact", 0, {"start": None}, start=joint, epochs=(0.5,))
    results = tiny(joint, dact)
    assert [p.name for p in sorted((tmp_path / "work").glob("toy-*")) if p.is_dir()] == [], "models are removed"
    found = stored(results)[dact.name]
    bound = found.columns("bound")
    assert len(bound["score"]) == 2 and bound["macs"][0] > 0
    assert len(found.columns("sampled_exit")["score"]) == measure.DRAWS
    assert runs.groups([joint, dact], results) == []
    results.write_text("".join(line for line in results.read_text().splitlines(True) if dact.name not in line))
    assert runs.groups([joint, dact], results) == [(dact,)]
    tiny(dact)
    again = stored(results)[dact.name]
    assert again.records == found.records, "a start that is gone is trained again, alike"


def test_skips_are_measured_beside_exits_alone(tiny):
    results = tiny(Training("toy", "smartbert", 0, {"soft_epochs": 0.25}, own_form=True, epochs=(0.5, 0.5)))
    (found,) = stored(results).values()
    both, alone = found.columns("skips and exits"), found.columns("exits alone")
    assert alone["score"][0] == pytest.approx(found.full_depth), "the first threshold is 0"
    assert alone["macs"][0] > 1 and both["layers"][0] <= alone["layers"][0]


def test_noise_and_records_of_exits(tiny):
    results = tiny(Training("toy", "joint", 0, epochs=(0.5,), noise=True))
    (found,) = stored(results).values()
    exits, noise = found.record("exits"), found.record("noise")
    assert len(exits["neighbours_agree"]) == 2 and exits["oracle"] >= found.full_depth
    assert len(noise["patience"]) == 2
    patience = found.columns("patience")
    assert patience["layers"][-1] == 3 and patience["score"][-1] == pytest.approx(found.full_depth)
    assert patience["random"][-1] == pytest.approx(found.full_depth, abs=1e-3)
    assert json.dumps(found.document), "finite"


def test_mix_meets_the_share_with_the_best_two_settings_of_the_held_out_rows():
    tuning = {"score": [0.5, 0.55, 0.8, 0.9], "macs": [0.2, 0.4, 0.6, 1.0], "layers": [1.0, 2.0, 3.0, 6.0]}
    reporting = {name: [value + 0.01 for value in values] for name, values in tuning.items()}
    found = mixed(tuning, reporting, 0.4)
    assert found.score == pytest.approx(0.66) and found.macs == pytest.approx(0.41), "the second setting is below"
    assert mixed(tuning, reporting, 0.1) is None and mixed(tuning, reporting, 1.1) is None
    assert mixed(tuning, reporting, 1.0).score == pytest.approx(0.91)
    rng = np.random.default_rng(0)
    for _ in range(50):
        macs = np.sort(rng.random(6))
        columns = {"score": rng.random(6).tolist(), "macs": macs.tolist(), "layers": macs.tolist()}
        share = float(rng.uniform(macs[0], macs[-1]))
        best = max(
            (columns["score"][i] * (macs[j] - share) + columns["score"][j] * (share - macs[i])) / (macs[j] - macs[i])
            for i in range(6)
            for j in range(i + 1, 6)
            if macs[i] <= share <= macs[j]
        )
        assert mixed(columns, columns, share).score == pytest.approx(best)


def test_every_table_is_made_from_results(tmp_path):
    """A copy of one invented result in place of each training fills every cell."""
    rule = {"score": [0.5, 0.7, 0.8], "layers": [1.0, 3.0, 6.0], "macs": [0.1, 0.5, 1.0], "random": [0.4, 0.6, 0.8]}
    names = {"entropy", "patience", "voting", "q_exit", "dact", "learned", "sampled_exit", "expectation", "bound"}
    records = [
        {"kind": "layers", "metric": "accuracy", "tuning": [0.5] * 5 + [0.8], "reporting": [0.5] * 5 + [0.8]},
        {"kind": "exits", "neighbours_agree": [0.9] * 5, "disagreement": 0.1, "oracle": 0.9, "overthinking": 0.1},
        {"kind": "noise", "share": 0.2, "full_depth": 0.7, "patience": [0.4, 0.6, 0.7]},
    ]
    for name in (*names, "skips and exits", "exits alone"):
        settings = [{"name": name, "q": q} for q in (0.5, 0.7, 0.9)]
        records.append({"kind": "rule", "rule": name, "settings": settings, "tuning": rule, "reporting": rule})
    results = tmp_path / "results.jsonl"
    lines = (json.dumps({"name": name, "records": records}) for name in plans.all_trainings())
    results.write_text("".join(f"{line}\n" for line in lines))
    for name, table in tables.TABLES.items():
        lines = table(results=results).splitlines()
        cells = [cell.strip() for line in lines[2:] for cell in line.strip("|").split("|")]
        empty = sum(not cell for cell in cells)
        assert len(lines) > 2 and "seeds" not in "".join(lines), name
        assert not empty, (name, cells)
    assert " 0 |" in left_table(results)
    assert tables.methods("trec", results=tmp_path / "none") == tables.NOT_MEASURED


def test_encoders_grown_from_another_start_from_its_layers():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
    base = BertModel(BertConfig(**sizes, num_hidden_layers=2)).eval()
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.no_grad():
        hidden = base(ids, output_hidden_states=True).hidden_states
        twelve = encoders.twice_in_place(base).eval()
        assert len(twelve.encoder.layer) == 4
        again = base.encoder.layer[0](hidden[1])
        torch.testing.assert_close(twelve(ids, output_hidden_states=True).hidden_states[2], again)
        shared = encoders.shared_layer(base).eval()(ids, output_hidden_states=True).hidden_states
        assert len(shared) == 13
        torch.testing.assert_close(shared[1], hidden[1])
        torch.testing.assert_close(shared[2], again)
    assert math.isfinite(float(shared[-1].sum()))
