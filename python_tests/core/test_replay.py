"""Replay against the published figures of four trained models and against the oracle."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from support import oracle
from support.criterion_cases import CASES
from support.models import batch_for, early_exit

import earlyexit_kernels as ee
from earlyexit_kernels.core import replay as replay_module
from earlyexit_kernels.criteria import Entropy, HiddenCosine, Learned, Margin, MaxProbability, Patience, QExit, SkipGate

#: By run: accuracy of exits 1..6; entropy threshold, mean exit layer and accuracy; accuracy and mean exit layer of
#: patience 1..5. With all published digits.
FIGURES = {
    "sst2_10k_mean_s0": (
        ".735 .781 .825 .848 .854 .848",
        (0.554, "3.12", ".848"),
        ".783 2.11 .825 3.29 .839 4.34 .848 5.22 .848 6",
    ),
    "sst2_10k_s0": (
        ".509 .509 .509 .572 .834 .834",
        (0.624, "5.13", ".834"),
        ".509 2 .509 3 .572 4.1 .831 5.5 .834 6",
    ),
    "trec_mean_s0": (
        ".774 .882 .954 .966 .964 .964",
        (0.358, "2.79", ".964"),
        ".888 2.1 .958 3.3 .964 4.3 .964 5.2 .964 6",
    ),
    "mrpc_mean_s0": (
        ".708 .703 .716 .765 .779 .784",
        (0.485, "4.31", ".784"),
        ".711 2.1 .721 3.1 .765 4.4 .772 5.2 .784 6",
    ),
}


@pytest.fixture(params=FIGURES)
def run(request, traces):
    """Return the name, trace and labels of a stored run."""
    path = traces / f"{request.param}.npz"
    if not path.is_file():
        pytest.skip(f"EARLYEXIT_DATA: there is no {path.name} in {traces}")
    stored = np.load(path)
    return request.param, ee.ExitTrace(torch.from_numpy(stored["logits"])), stored["labels"]


def same(value: float, printed: str) -> bool:
    """Return whether a value equals a printed one up to a unit of its last digit; both were rounded twice."""
    digits = len(printed.partition(".")[2])
    return abs(value - float(printed)) < 10**-digits


def accuracy_and_layer(trace, labels, criterion) -> tuple[float, float]:
    logits, exit_layer = ee.replay(trace, criterion)
    return float((logits.argmax(dim=1).numpy() == labels).mean()), float(exit_layer.float().mean())


@pytest.mark.data
def test_published_figures(run):
    name, trace, labels = run
    exits, (threshold, layer, accuracy), of_patience = FIGURES[name]
    for number, printed in enumerate(exits.split(), start=1):
        got = accuracy_and_layer(ee.ExitTrace(trace.logits[:, :number]), labels, None)
        assert same(got[0], printed) and got[1] == number, (number, got)
    got = accuracy_and_layer(trace, labels, Entropy(threshold=threshold))
    assert same(got[0], accuracy) and same(got[1], layer), got
    printed = of_patience.split()
    for patience, (accuracy, layer) in enumerate(zip(printed[::2], printed[1::2], strict=True), start=1):
        got = accuracy_and_layer(trace, labels, Patience(patience=patience))
        assert same(got[0], accuracy) and same(got[1], layer), (patience, got)


@pytest.mark.sample(4)
@pytest.mark.data
@pytest.mark.parametrize(
    ("criterion", "numbers"),
    [
        (Entropy(threshold=0.3), (0.3, False)),
        (MaxProbability(threshold=0.8), (0.8,)),
        (Margin(threshold=0.5), (0.5,)),
        (Patience(patience=2), (2, None)),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_equals_oracle(run, backend, criterion, numbers, count_flips):
    trace = ee.ExitTrace(run[1].logits[: 24 if backend == "triton" else 400])
    rows = len(trace.logits)
    answers, exit_layer = ee.replay(trace, criterion, backend=backend)
    assert torch.equal(answers, trace.logits[torch.arange(rows), exit_layer - 1])
    want, near = layers_of_the_oracle(trace.logits.double().numpy(), criterion.name, numbers)
    got = exit_layer.numpy()
    np.testing.assert_array_equal(got[~near], want[~near])
    assert near.mean() < 0.02
    count_flips((got != want).sum(), rows)


def layers_of_the_oracle(logits, name, numbers) -> tuple[np.ndarray, np.ndarray]:
    """Return exit layers ``[N]``, and which rows were within 1e-5 of their threshold."""
    rows, depth, classes = logits.shape
    row_ids, exit_layer, answers = np.arange(rows), np.zeros(rows, dtype=int), np.zeros((rows, classes))
    state, near = np.tile([[np.nan], [0.0]], (1, rows)), np.zeros(rows, dtype=bool)
    for layer in range(1, depth + 1):
        step = oracle.exit_step(
            decide=CASES[name].decide,
            params=numbers,
            layer=layer,
            depth=depth,
            row_ids=row_ids,
            state=state,
            answers=answers,
            exit_layer=exit_layer,
            source="logits",
            inputs=logits[:, layer - 1],
        )
        near |= (step.distance < 1e-5) & (name != "patience")
    return exit_layer, near


def test_trace_is_not_changed():
    logits, halting = torch.randn(4, 3, 2, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    before = logits.detach().clone(), halting.detach().clone()
    answers, exit_layer = ee.replay(ee.ExitTrace(logits, {"halting": halting}), QExit(q=0.5))
    assert not answers.requires_grad and answers.shape == (4, 2) and exit_layer.dtype == torch.int64
    assert torch.equal(logits.detach(), before[0]) and torch.equal(halting.detach(), before[1])


def test_aux_is_the_logit_of_the_halting_probability():
    trace = ee.ExitTrace(torch.zeros(2, 2, 2), {"halting": torch.tensor([[0.1, 0.0], [-0.1, 0.0]])})
    assert ee.replay(trace, QExit(q=0.5))[1].tolist() == [1, 2]


def refused() -> list:
    """Calls, and words of their refusals."""
    logits = torch.randn(4, 3, 2)
    trace = ee.ExitTrace(logits)
    halting = ee.ExitTrace(logits, {"halting": torch.zeros(4, 3)})
    skips = SkipGate(threshold=0.5, exit=Entropy(threshold=0.1))
    return [
        (ee.replay, (trace, QExit(q=0.5)), "'q_exit' needs heads with the output 'halting', these produce none"),
        (ee.replay, (trace, Entropy(threshold=[0.1] * 3)), "2 exits before the last, got 3"),
        (ee.replay, (ee.ExitTrace(logits[..., :1]), Entropy(threshold=0.1)), r"'entropy'.*'regression'"),
        (partial(ee.replay, backend="fast"), (trace, None), "backend: expected one of"),
        (
            *(ee.replay, (ee.ExitTrace(logits, {"gate": torch.zeros(4, 3)}), skips)),
            r"'skip_gate' cannot be replayed.*skips changes.*exit rule, 'entropy', alone",
        ),
        (
            *(ee.replay, (torch.nn.Linear(2, 2), None)),
            r"replay: expected a trace, as model.trace\(\*\*batch\) returns, got Linear",
        ),
        (lambda *given: list(ee.replay_each(*given)), (trace, [None, Learned(threshold=0.5)]), "'learned'"),
        (ee.ExitTrace.cat, ([],), "at least one trace, got an empty list"),
        (ee.ExitTrace.cat, ([halting, trace],), r"same aux outputs in every trace, got \[\['halting'\], \[\]\]"),
        (ee.ExitTrace.cat, (trace,), "ExitTrace.cat: expected a list of traces, .*got ExitTrace"),
        (ee.ExitTrace.cat, ([trace, logits],), "ExitTrace.cat: expected a list of traces, .*got Tensor"),
        (
            *(ee.ExitTrace.cat, ([trace, ee.ExitTrace(logits[:, :2])],)),
            r"logits \[N, L, C\] with the same L and C in every trace, got \[\[4, 3, 2\], \[4, 2, 2\]\]",
        ),
        (
            *(ee.ExitTrace.cat, ([ee.ExitTrace(logits, keys=torch.arange(4)), trace],)),
            "keys in every trace or in none, got 1 of 2",
        ),
    ]


def test_refusals():
    for call, arguments, words in refused():
        with pytest.raises(ValueError, match=words):
            call(*arguments)


def test_trace_has_the_problem_type_of_its_model():
    model = early_exit("bert", pooling="first", problem_type="multi_label_classification")
    batch = batch_for(model)
    for trace in (model.trace(**batch), ee.ExitTrace.cat([model.trace(**batch)] * 2)):
        with pytest.raises(ValueError, match=r"'entropy'.*'multi_label_classification'"):
            ee.replay(trace, Entropy(threshold=0.1))
    model.set_criterion(None)
    assert ee.replay(model.trace(**{name: x[:0] for name, x in batch.items()}), None)[0].shape == (0, 3)
    other = replace(model.trace(**batch), problem_type=None)
    with pytest.raises(ValueError, match="one problem_type in all traces"):
        ee.ExitTrace.cat([model.trace(**batch), other])


def test_cat():
    parts = [ee.ExitTrace(torch.randn(n, 3, 2), {"halting": torch.randn(n, 3)}) for n in (2, 0, 3)]
    whole = ee.ExitTrace.cat(parts)
    assert whole.depth == 3
    assert torch.equal(whole.logits, torch.cat([p.logits for p in parts]))
    assert torch.equal(whole.aux["halting"], torch.cat([p.aux["halting"] for p in parts]))
    one_by_one = [ee.replay(part, QExit(q=0.6)) for part in parts]
    for joined, separate in zip(ee.replay(whole, QExit(q=0.6)), zip(*one_by_one, strict=True), strict=True):
        assert torch.equal(joined, torch.cat(separate))


def test_cat_of_keys():
    logits = torch.zeros(2, 2, 2)
    keyed = [ee.ExitTrace(logits, keys=torch.tensor(keys)) for keys in ([1, 2], [3, 4])]
    assert ee.ExitTrace.cat(keyed).keys.tolist() == [1, 2, 3, 4]
    joined = ee.ExitTrace.cat(
        [ee.ExitTrace(logits, projections=torch.zeros(1, 5, 3), offsets=torch.tensor([0, 2]))] * 2
    )
    assert joined.keys is None and joined.projections is None and joined.offsets is None


def test_replay_each_in_blocks_equals_replay_of_each(monkeypatch):
    model = early_exit()
    trace = ee.ExitTrace.cat([model.trace(**batch_for(model)) for _ in range(3)])
    rules = [*(Entropy(threshold=t) for t in (0.2, 0.9, 1.05)), None, HiddenCosine(threshold=0.9)]
    alone = [ee.replay(trace, rule) for rule in rules]
    monkeypatch.setattr(replay_module, "BLOCK", 5)
    monkeypatch.setattr(replay_module, "GROUP", 2)
    for (logits, layer), (expected, expected_layer) in zip(ee.replay_each(trace, iter(rules)), alone, strict=True):
        assert torch.equal(logits, expected) and torch.equal(layer, expected_layer)
    assert list(ee.replay_each(trace, [])) == []


def test_rows_keep_their_keys_in_blocks(monkeypatch):
    trace = ee.ExitTrace(torch.zeros(9, 4, 2), {"halting": torch.zeros(9, 4)}, torch.arange(9))
    _, whole = ee.replay(trace, ee.criteria.SampledExit(seed=3))
    monkeypatch.setattr(replay_module, "BLOCK", 4)
    assert torch.equal(ee.replay(trace, ee.criteria.SampledExit(seed=3))[1], whole) and len(whole.unique()) > 1
