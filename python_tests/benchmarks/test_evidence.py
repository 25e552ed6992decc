"""The trainings that test the papers' claims: their plans, their records, and the tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import glue
from benchmarks.evidence import encoders, measure, plans, runs
from benchmarks.evidence.kept import FOLDER, DamagedError, Kept, load, packed_logits
from benchmarks.evidence.plans import SIX, Training
from earlyexit_cli import build_parser
from earlyexit_kernels.cli.train import method_from
from earlyexit_kernels.data import toy
from earlyexit_kernels.data.rows import Split
from earlyexit_kernels.tuning import flops


def test_plans_have_unique_names_and_arguments_that_the_command_takes():
    trainings = plans.all_trainings()
    by_name: dict[str, Training] = {}
    for experiment in plans.EXPERIMENTS.values():
        for training in experiment.trainings:
            assert by_name.setdefault(training.name, training) == training
    for training in (*trainings.values(), *(t.start for t in trainings.values() if t.start)):
        parsed = build_parser().parse_args(training.arguments("ENCODER", "OUTPUT"))
        assert str(plans.ROWS[training.task]) in str(parsed.data) and parsed.seed == training.seed
        phases = method_from(training.method, parsed.set or []).phases
        assert len(parsed.epochs) == len(phases)
        trained = sum(e for e, phase in zip(parsed.epochs, phases, strict=True) if "backbone" in phase.trains)
        assert trained == plans.EPOCHS[training.task], "the encoder learns alike in all"
    for task in plans.ROWS:
        compared = {t.method for t in plans.EXPERIMENTS[f"methods_{task}"].trainings}
        assert compared == set(plans.SOME.get(task, plans.METHODS))


def test_kept_answers_are_of_planned_trainings_with_their_present_arguments():
    trainings = plans.all_trainings()
    for path in FOLDER.glob("*.npz"):
        found = load(path)
        assert path.stem == found.name and not found.environment["commit"].endswith("+")
        assert found.command == " ".join(["earlyexit", *trainings[found.name].arguments("ENCODER", "OUTPUT")])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """``tiny(training, ...)``: train and measure tiny models on few generated rows; returns the file of results."""
    splits = toy.write_splits(train_rows=96, dev_rows=24, test_rows=0)
    rows = {name: Split([s.text for s in split], [s.label for s in split]) for name, split in splits.items()}
    monkeypatch.setattr(glue, "read_split", lambda task, split: rows[split])
    monkeypatch.setitem(glue.TASKS, "toy", glue.Task())
    monkeypatch.setattr(plans, "ROWS", {"toy": 32})
    monkeypatch.setattr(plans, "HOLDOUT", 24)
    monkeypatch.setitem(plans.EPOCHS, "toy", 0.5)
    monkeypatch.setattr(measure, "DRAWS", 1)
    toy.toy_model(0, layers=3, hidden=16).save_pretrained(tmp_path / "base")
    toy.toy_tokenizer().save_pretrained(tmp_path / "base")

    def run(*group):
        threads = torch.get_num_threads()
        try:
            names = runs.run_group(group, {SIX: str(tmp_path / "base")}, tmp_path / "work", tmp_path / "results")
        finally:
            torch.set_num_threads(threads)
        assert names == [training.name for training in group]
        return tmp_path / "results"

    return run


@pytest.mark.thorough
def test_training_that_starts_from_another_is_measured_after_it(tiny, tmp_path):
    joint = Training("toy", "joint", 0)
    dact = Training("toy", "dact", 0, {"start": None}, start=joint)
    results = tiny(joint, dact)
    assert [p.name for p in sorted((tmp_path / "work").glob("toy-*")) if p.is_dir()] == [], "models are removed"
    found = load(results / f"{dact.name}.npz")
    assert found.trace("tuning").aux["halting"].shape == (24, 3) and runs.groups([joint, dact], results) == []
    (results / f"{dact.name}.npz").unlink()
    assert runs.groups([joint, dact], results) == [(dact,)]
    tiny(dact)
    again = load(results / f"{dact.name}.npz")
    for name, values in found.arrays.items():
        assert np.array_equal(again.arrays[name], values), "a start that is gone is trained again, alike"


def test_skips_are_kept_beside_exits_alone(tiny):
    training = Training("toy", "smartbert", 0, {"soft_epochs": 0.25}, form="attention")
    results = tiny(training)
    found = load(results / f"{training.name}.npz")
    for split in ("tuning", "reporting"):
        trace = found.trace(split)
        for arm in ("skips and exits", "exits alone"):
            answers, layers, run = (found.arrays[f"{split}_{arm}_{n}"] for n in ("answers", "exit_layer", "layers_run"))
            assert len(answers) == len(found.arms[arm]) > 1 and (run <= layers).all()
            assert (layers[0] == 3).all(), "the first threshold is 0"
        assert np.array_equal(answers[0], trace.logits[:, -1].argmax(-1)) and (run == layers).all()
    assert found.costs.of(found.costs.gate, found.tokens("tuning")).min() > 0


def test_answers_are_kept_as_a_model_gives_them(tiny, tmp_path, monkeypatch):
    """Differences of logits, multiply-adds, and the rows with changed words."""
    kept, models = [], []
    write, of_model = Kept.save, measure.costs_of
    monkeypatch.setattr(Kept, "save", lambda self, folder: kept.append(self) or write(self, folder))
    monkeypatch.setattr(measure, "costs_of", lambda model: models.append(model) or of_model(model))
    training = Training("toy", "palbert", 0, noise=True)
    results = tiny(training)
    (before,), (model,), found = kept, models, load(results / f"{training.name}.npz")
    assert found.arrays.keys() == before.arrays.keys() and found.costs == before.costs and found.depth == 3
    trace, tokens = found.trace("reporting"), torch.from_numpy(found.tokens("reporting").astype(np.int64))
    assert trace.logits[..., 0].eq(0).all() and trace.aux["halting"].shape == (24, 3)
    layers = torch.arange(24) % 3 + 1
    for needs in ("", "halting"):
        expected = flops.encoder_macs(model, tokens, layers) + layers * flops.exit_macs(model, tokens, needs or None)
        costs = found.costs
        each = costs.of(costs.layer, tokens.numpy()) + costs.of(costs.exits[needs], tokens.numpy())
        got = costs.of(costs.embedding, tokens.numpy()) + layers.numpy() * each
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-9)
    assert found.draws("reporting", "typos") == ["typos0"] and found.draws("reporting", "swaps") == ["swaps0"]
    assert not torch.equal(found.trace("reporting", "typos0").logits, trace.logits)
    assert set(found.data) == {"tuning", "reporting"} and found.seconds["training"] >= 0
    for cut in (0, 10, 2000):
        path = tmp_path / "cut.npz"
        path.write_bytes((results / f"{training.name}.npz").read_bytes()[:cut])
        with pytest.raises(DamagedError, match=r"cut\.npz is damaged .*delete it"):
            load(path)


def test_logits_are_kept_up_to_a_constant():
    logits = torch.randn(5, 2, 3)
    kept = packed_logits(logits, "single_label_classification")
    assert kept.shape == (5, 2, 2) and kept.dtype == np.float16
    numbers = packed_logits(logits[..., :1], "regression")
    assert np.array_equal(numbers, logits[..., :1].half().numpy())


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
