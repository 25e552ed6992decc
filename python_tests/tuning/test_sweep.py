"""Sweeps: outcomes, random exit, the choice of thresholds, skipped layers and records."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding

from earlyexit_kernels import to_early_exit
from earlyexit_kernels.criteria import Entropy, Patience, SkipGate
from earlyexit_kernels.data import toy
from earlyexit_kernels.data.rows import Split, encode
from earlyexit_kernels.tuning import sweep as sweeps
from earlyexit_kernels.tuning.rows import Rows
from earlyexit_kernels.tuning.settings import settings
from earlyexit_kernels.tuning.traces import collect_trace
from earlyexit_kernels.types import ExitTrace

#: Predictions of exits 1 to 3 on four rows, and the labels.
PREDICTED = [[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 0]]
LABELS = np.array([0, 0, 1, 1])


@pytest.fixture
def small() -> ExitTrace:
    """Trace of three exits on four rows; the predicted class has logit 2, the other 0."""
    return ExitTrace(2.0 * torch.nn.functional.one_hot(torch.tensor(PREDICTED), 2).float())


def rows_of(split, *, metric: str = "accuracy") -> Rows:
    return Rows(*split, metric, "single_label_classification")


def random_split(
    rows: int, depth: int = 5, classes: int = 3, seed: int = 0, **aux: torch.Tensor
) -> tuple[ExitTrace, np.ndarray]:
    """Return a trace whose exits get more accurate and more confident with depth, and its labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, classes)[:, None] * torch.linspace(0.5, 4, depth)[:, None]
    logits = signal + torch.randn(rows, depth, classes, generator=generator)
    return ExitTrace(logits, aux), labels.numpy()


def test_worked_example(small):
    """Patience 1: rows 0 and 3 agree at layer 2 and leave there; rows 1 and 2 leave at 3, the last of 3 layers."""
    rows = rows_of((small, LABELS))
    assert [s["accuracy"] for s in rows.truncations(("accuracy",))] == [0.5, 1.0, 0.75]
    result = sweeps.outcome(rows, *rows.replay([Patience(patience=1)]), ("accuracy",))
    assert result.exit_shares == (0.0, 0.5, 0.5)
    assert result.scores == {"accuracy": 1.0}
    assert result.mean_exit_layer == result.mean_layers_run == 2.5 and result.layer_speed_up == 1.2
    assert result.layers_saved == pytest.approx(1 / 6)
    assert result.random_exit == pytest.approx(0.5 * 1.0 + 0.5 * 0.75)
    found = sweeps.sweep((small, LABELS), (small, LABELS))
    assert (found.oracle, found.overthinking) == (1.0, 0.25)


def test_random_exit_is_the_mean_over_draws():
    trace, labels = random_split(200)
    shares = (0.3, 0.3, 0.2, 0.1, 0.1)
    generator = np.random.default_rng(1)
    layers = np.repeat(np.arange(5), (np.array(shares) * 200).round().astype(int))
    predicted = trace.logits.argmax(-1).numpy()
    draws = [(predicted[np.arange(200), generator.permutation(layers)] == labels).mean() for _ in range(2000)]
    assert rows_of((trace, labels)).random_exit(shares) == pytest.approx(np.mean(draws), abs=3e-3)


def test_random_exit_of_other_metrics_is_sampled():
    rows = rows_of(random_split(300, classes=2), metric="matthews")
    alone = [layer["matthews"] for layer in rows.truncations(("matthews",))]
    assert rows.random_exit((0, 0, 1, 0, 0)) == pytest.approx(alone[2])
    assert 0 < rows.random_exit((0.5, 0, 0, 0, 0.5)) < alone[4]


def outcome_with(score: float, mean: float) -> sweeps.Outcome:
    return sweeps.Outcome({"accuracy": score}, 4.0, mean, 4 / mean, 1 - mean / 4, (), 0.0)


@pytest.mark.parametrize(
    ("outcomes", "full", "drop", "index"),
    [
        *(([(0.6, 1), (0.9, 3), (0.86, 2), (0.9, 3.5)], 0.9, drop, k) for drop, k in ((0.0, 1), (0.05, 2), (0.5, 0))),
        # ties go to the higher score, and there may be none
        ([(0.9, 2), (0.95, 2)], 0.9, 0.0, 1),
        ([(0.9, 2), (0.95, 2)], 0.99, 0.0, None),
    ],
)
def test_fastest_within_drop(outcomes, full, drop, index):
    found = [outcome_with(*each) for each in outcomes]
    assert sweeps.fastest_within_drop(found, full, metric="accuracy", drop=drop) == index


def test_sweep_chooses_the_fastest_setting_on_the_tuning_split_and_records_all():
    tuning, reporting = random_split(500, seed=1), random_split(500, seed=2)
    result = sweeps.sweep(tuning, reporting, drop=0.02, points=16)
    full = result.layers["tuning"][-1]["accuracy"]
    for name, points in result.points.items():
        chosen = result.chosen(name)
        assert sum(point.chosen for point in points) == (chosen is not None)
        if chosen is not None:
            assert chosen.tuning.scores["accuracy"] >= full - 0.02 - 1e-9
            rivals = [p for p in points if p.tuning.scores["accuracy"] >= full - 0.02]
            assert chosen.tuning.mean_exit_layer == min(p.tuning.mean_exit_layer for p in rivals)
        means = [point.reporting.mean_layers_run for point in points]
        assert means == sorted(means)
    assert all(len(result.points[name]) >= 8 for name in ("entropy", "max_probability", "margin"))
    assert result.chosen("entropy").reporting.scores["accuracy"] > result.chosen("entropy").reporting.random_exit
    records = json.loads(json.dumps(result.records()))
    kinds = [record["kind"] for record in records]
    assert kinds.count("static_truncation") == 5 and kinds.count("limits") == 1
    points = [record for record in records if record["kind"] == "point"]
    assert len(points) == sum(map(len, result.points.values()))
    assert {"criterion", "chosen", "tuning", "reporting"} <= set(points[0])


def test_regression_is_swept_by_patience():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(100, generator=generator) * 5
    noise = torch.randn(100, 4, generator=generator) * torch.tensor([1.0, 0.6, 0.3, 0.1])
    split = (ExitTrace((truth[:, None] + noise)[..., None]), truth.numpy())
    result = sweeps.sweep(split, split, metrics=("pearson", "spearman"), drop=0.05)
    assert result.oracle is None and result.chosen("patience").reporting.layer_speed_up > 1
    assert set(result.chosen("patience").reporting.scores) == {"pearson", "spearman"}


def test_several_labels_a_row_are_right_where_all_are():
    """An exit answers each label by the sign of its logit; the first exit is wrong on a label of half of the rows."""
    labels = np.array([[1, 0], [0, 1]] * 50)
    signs = torch.from_numpy(labels * 2.0 - 1).float()
    first = signs * torch.tensor([1.0, 1.0]).where(torch.arange(100)[:, None] % 4 < 2, torch.tensor([1.0, -1.0]))
    trace = ExitTrace(torch.stack([first, signs], dim=1), {"hidden_cosine": torch.rand(100, 2)})
    task = "multi_label_classification"
    result = sweeps.sweep((trace, labels), (trace, labels), drop=0.5, points=8, problem_type=task)
    assert [layer["accuracy"] for layer in result.layers["reporting"]] == [0.5, 1.0]
    assert (result.oracle, result.overthinking) == (1.0, 0.0) and "hidden_cosine" in result.points


def test_sweep_refuses_invalid_arguments():
    with pytest.raises(ValueError, match=r"same exits and classes, got \[9, 5, 3\] and \[9, 4, 3\]"):
        sweeps.sweep(random_split(9), random_split(9, depth=4))
    with pytest.raises(ValueError, match=r"drop >= 0, got -0.1"):
        sweeps.sweep(random_split(9), random_split(9), drop=-0.1)


def test_collect_trace_keeps_rows_in_order():
    tokenizer = toy.toy_tokenizer()
    model = to_early_exit(toy.toy_model(0, layers=2, hidden=16))
    sentences = ["the plot was dull .", "the cast was not very witty .", "nobody believes that the hero was weak ."]
    data = encode(Split(sentences, [0, 1, 1]), tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    trace, labels = collect_trace(model, data, collate_fn=collate, batch_size=2)
    assert labels.tolist() == [0, 1, 1] and trace.logits.shape == (3, 2, 2)
    for row, sentence in enumerate(sentences):
        alone = model.trace(**tokenizer(sentence, return_tensors="pt")).logits[0]
        assert torch.allclose(trace.logits[row], alone, atol=1e-5)


def test_collect_trace_keeps_keys_and_aux():
    tokenizer, model = toy.toy_tokenizer(), to_early_exit(toy.toy_model(0, layers=2, hidden=16), method="palbert")
    data = encode(Split(["the plot was dull .", "the cast was witty ."], [0, 1]), tokenizer)
    trace, _ = collect_trace(model, data, collate_fn=DataCollatorWithPadding(tokenizer), batch_size=1)
    assert trace.keys is not None and len(set(trace.keys.tolist())) == 2
    assert trace.aux["halting"].shape == trace.aux["hidden_cosine"].shape == (2, 2)


def test_collect_trace_refuses_rows_only_some_of_which_have_labels():
    model = to_early_exit(toy.toy_model(0, layers=2, hidden=16))
    rows = [{"input_ids": [1, 2], "labels": 1}, {"input_ids": [1, 2]}]
    with pytest.raises(ValueError, match="all with labels or all without, got 2 batches, 1 of them with labels"):
        collect_trace(model, rows, batch_size=1)
    with pytest.raises(ValueError, match="got 0 batches"):
        collect_trace(model, [])


@pytest.fixture(scope="module")
def gated():
    """Model whose gates skip layer 2 of 3 on every row, and two splits of four rows."""
    torch.manual_seed(0)
    model = to_early_exit(toy.toy_model(0, layers=3, hidden=16), method="smartbert").eval()
    with torch.no_grad():
        for gate, logit in zip(model.heads.gates, (-9.0, 9.0, -9.0), strict=True):
            gate.out.weight.zero_()
            gate.out.bias.fill_(logit)
    tokenizer = toy.toy_tokenizer()
    splits = toy.write_splits(train_rows=0, dev_rows=4, test_rows=4)
    halves = (Split([s.text for s in splits[n]], [s.label for s in splits[n]]) for n in ("dev", "test"))
    data = [encode(half, tokenizer) for half in halves]
    return model, data, DataCollatorWithPadding(tokenizer)


def test_sweep_skipping_counts_layers_run(gated):
    model, data, collate = gated
    before = model.criterion
    traced = [collect_trace(model, rows, collate_fn=collate) for rows in data]
    replayed = sweeps.sweep(*traced, points=8)
    numbers = ((0.5, 0.0), (1.0, 0.0), (0.5, 9.0))
    criteria = [SkipGate(threshold=skip, exit=Entropy(threshold=leave)) for skip, leave in numbers]
    result = sweeps.sweep_skipping(model, replayed, criteria, *data, collate_fn=collate, batch_size=3)
    assert model.criterion == before and set(result.points) == {*replayed.points, "skip_gate"}
    by_setting = {(p.criterion.threshold, p.criterion.exit.threshold): p.reporting for p in result.points["skip_gate"]}
    skipping, running, leaving = by_setting[0.5, 0.0], by_setting[1.0, 0.0], by_setting[0.5, 9.0]
    assert (skipping.mean_exit_layer, skipping.mean_layers_run, skipping.layer_speed_up) == (3, 2, 1.5)
    assert (running.mean_exit_layer, running.mean_layers_run) == (3, 3)
    assert (leaving.mean_exit_layer, leaving.mean_layers_run) == (1, 1)
    assert running.scores == replayed.layers["reporting"][-1], "without skipped layers, the scores of the last exit"
    assert skipping.random_exit is None and sum(p.chosen for p in result.points["skip_gate"]) <= 1
    json.dumps(result.records())


def test_sweep_skipping_requires_gates(gated):
    _, data, collate = gated
    model = to_early_exit(toy.toy_model(0, layers=3, hidden=16))
    replayed = sweeps.sweep(*(collect_trace(model, rows, collate_fn=collate) for rows in data), points=8)
    with pytest.raises(ValueError, match="'gate'"):
        criteria = [SkipGate(threshold=0.5, exit=Entropy(threshold=0.1))]
        sweeps.sweep_skipping(model, replayed, criteria, *data, collate_fn=collate)
    assert model.criterion is None


@pytest.mark.data
def test_stored_run_beats_random_exit(traces):
    """Entropy on TREC reaches 0.964 at mean layer 2.8 of 6; random exit with the same shares reaches 0.922."""
    stored = np.load(traces / "trec_mean_s0.npz")
    split = (ExitTrace(torch.from_numpy(stored["logits"])), stored["labels"])
    criteria = settings(split[0], points=200)["entropy"]
    rows = rows_of(split)
    outcomes = [sweeps.outcome(rows, answers, ("accuracy",)) for answers in rows.replay(criteria)]
    full_depth = rows.truncations(("accuracy",))[-1]["accuracy"]
    chosen = outcomes[sweeps.fastest_within_drop(outcomes, full_depth, metric="accuracy")]
    assert chosen.scores["accuracy"] >= 0.964 and chosen.mean_exit_layer < 2.9
    assert chosen.random_exit == pytest.approx(0.922, abs=0.004)
