"""exit_step of every back-end against the float64 oracle; bits that do not depend on the batch; what is not read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.backends import backend_params
from support.criterion_case import no_state
from support.criterion_cases import CASES, OWNERS, SETTINGS
from support.exit_step_cases import DEPTH, DTYPES, NO_LAYER, SOURCES, UNTOUCHED, Case, build, memory, one_exit, truth

from earlyexit_kernels.criteria import RULES as TABLE
from earlyexit_kernels.criteria import Dact, Entropy, MaxProbability, Patience, QExit, SkipGate, Voting
from earlyexit_kernels.ops import compact, exit_step, gather_rows

#: A decision may differ from that of the oracle only where its score is this close to the threshold: float32 against
#: float64, with values of order 10 and sums of up to 131 terms. Also the tolerance of answers and state, absolute and
#: relative.
TOLERANCE = 1e-5


#: Batch sizes B for each class count C; at 150 a Triton program takes narrower slices of H. The slow
#: interpreter gets fewer rows.
SHAPES = {1: (0, 1, 7, 33), 2: (1, 7), 3: (0, 7, 33), 17: (1, 33), 150: (7,)}
SMALL_SHAPES = {1: (0, 7), 2: (1,), 3: (0, 7), 17: (1,), 150: (1,)}


#: Sources and dtypes: all of them for rules of each kind (state a row, state a class, scalars of the head, answers of
#: their own), and these for the rest, since the skeleton is the same.
ALL_INPUTS = tuple((source, dtype) for source in SOURCES for dtype in DTYPES)
SOME_INPUTS = (("mean", torch.float32), ("none", torch.bfloat16), ("logits", torch.float32), ("logits", torch.float16))
THOROUGH = {
    "full_depth",
    "entropy",
    "entropy_by_layer",
    "max_probability",
    "margin",
    "patience",
    "q_exit",
    "voting",
    "dact",
}


def grid(shapes) -> list[Case]:
    return [
        Case(name, source, dtype, b, c)
        for name, rule in SETTINGS.items()
        for source, dtype in (ALL_INPUTS if name in THOROUGH else SOME_INPUTS)
        for c in rule.classes
        for b in shapes.get(c, ())
    ]


def params(names, cases) -> list:
    """Pairs of a back-end and a case; the back-ends of a case are adjacent and share its expected results."""
    marked = [(p.values[0], p.marks) for p in backend_params(names)]
    return [pytest.param(name, case, marks=marks, id=f"{name}-{case}") for case in cases for name, marks in marked]


def one_large(rows, names=tuple(SETTINGS)) -> list[Case]:
    """One batch of this size for every rule."""
    return [Case(name, "mean", torch.float32, rows, 3 if 3 in SETTINGS[name].classes else 1) for name in names]


EVERY_CASE = params(["torch", "cpp"], grid(SHAPES)) + params(["triton"], grid(SMALL_SHAPES))
LARGE = params(["torch", "cpp"], one_large(1024)) + params(["triton"], one_large(33, sorted(THOROUGH)))


def test_every_criterion_has_cases():
    assert set(OWNERS.values()) == set(TABLE)


@pytest.mark.sample(7)
@pytest.mark.parametrize(("backend", "case"), EVERY_CASE)
def test_equals_oracle(backend, case, count_flips):
    follow(backend, case, count_flips)


@pytest.mark.sample(5)
@pytest.mark.parametrize(("backend", "case"), LARGE)
def test_equals_oracle_on_a_large_batch(backend, case, count_flips):
    follow(backend, case, count_flips)


def follow(backend, case, count_flips, device="cpu") -> None:
    """Run all layers and the oracle; rows that were within tolerance of their threshold may differ."""
    criterion, batch = case.criterion, build(case)
    changed = {"row_ids": batch.row_ids.clone(), **memory(criterion, batch.requests, case.classes)}
    changed = {name: tensor.to(device) for name, tensor in changed.items()}
    near = np.zeros(batch.requests, dtype=bool)
    for layer, (given, want) in enumerate(zip(batch.layers, truth(case), strict=True), start=1):
        there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        counts = exit_step(criterion=criterion, layer=layer, depth=DEPTH, backend=backend, **there, **changed)
        got = {name: tensor.cpu().numpy() for name, tensor in changed.items()}
        row_ids = torch.from_numpy(got["row_ids"])
        near |= want.step.distance < (0.0 if case.exact else TOLERANCE)
        np.testing.assert_array_equal(got["exit_layer"][~near], want.exit_layer[~near])
        named = batch.row_ids.numpy()
        sure = ~near[named] | (named < 0)
        np.testing.assert_array_equal(got["row_ids"][sure], want.row_ids[sure])
        tolerance = 0.0 if case.source == "logits" and not case.own_answer else TOLERANCE
        np.testing.assert_allclose(got["answers"][~near], want.answers[~near], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(got["state"][:, ~near], want.state[:, ~near], rtol=TOLERANCE, atol=TOLERANCE)
        assert counts.dtype == torch.int32
        assert counts.tolist()[:2] == live_and_tokens(row_ids, given.get("offsets"))
        assert near.any() or counts.tolist() == list(want.step.counts)
    assert near.sum() <= 1 + batch.requests // 50, "a tolerance that covers this many rows hides errors"
    count_flips((got["exit_layer"] != want.exit_layer).sum(), batch.requests)


def live_and_tokens(row_ids, offsets) -> list[int]:
    live = row_ids >= 0
    return [int(live.sum()), int(live.sum() if offsets is None else offsets.diff()[live].sum())]


#: Every setting that fits three classes; one rule of each kind with all sources, since the skeleton is the same.
CASES_IN_SUBSETS = [
    (name, source)
    for name, setting in SETTINGS.items()
    if 3 in setting.classes
    for source in (SOURCES if name in ("entropy", "patience_1", "q_exit", "full_depth") else ("mean", "logits"))
]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("name", "source"), CASES_IN_SUBSETS)
def test_bits_of_a_row_do_not_depend_on_the_batch(backend, name, source):
    rows = 7 if backend == "triton" else 33
    batch = build(Case(name, source, torch.float32, rows, 3))
    everyone = torch.arange(rows)
    together = finish(backend, name, batch.layers, everyone)
    exits = 1 if backend == "triton" else min(CASES[OWNERS[name]].exits, 2)  # seven rows may leave together
    assert len(set(together[1].tolist())) >= exits, "rows should leave at several layers"
    for subset in (everyone[torch.randperm(rows)], everyone[::2], *everyone.split(1)):
        assert same(finish(backend, name, batch.layers, subset), [x[subset] for x in together])


@pytest.mark.parametrize("source", SOURCES)
def test_bits_do_not_depend_on_the_number_of_threads(source, thread_counts):
    """1024 rows are enough work for the compiled op to use several threads."""
    batch = build(Case("entropy", source, torch.float32, 1024, 3))
    one, *others = (finish("auto", "entropy", batch.layers, torch.arange(1024)) for _ in thread_counts)
    assert all(same(one, other) for other in others)


def same(one, other) -> bool:
    return all(torch.equal(x.nan_to_num(0.5), y.nan_to_num(0.5)) for x, y in zip(one, other, strict=True))


def finish(backend, name, layers, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers and exit layers of some rows of a batch, run in this order through all layers."""
    criterion = SETTINGS[name].build(3)
    row_ids, held = torch.arange(len(rows), dtype=torch.int32), memory(criterion, len(rows), 3, rows)
    for layer, given in enumerate(layers, start=1):
        part = select(given, rows) | held
        exit_step(criterion=criterion, layer=layer, depth=DEPTH, row_ids=row_ids, backend=backend, **part)
    return held["answers"], held["exit_layer"]


def select(given, rows) -> dict:
    """The inputs of these rows alone, packed anew."""
    part = dict(given)
    part.update({name: given[name][rows] for name in ("logits", "aux") if name in given})
    if "offsets" in given:
        offsets = given["offsets"]
        part["offsets"] = torch.cat([offsets[:1], offsets.diff()[rows].cumsum(0)]).to(torch.int32)
    if given.get("pooling") == "none":
        part["hidden"] = given["hidden"][rows]
    elif "hidden" in given:
        part["hidden"] = torch.cat([given["hidden"][offsets[i] : offsets[i + 1]] for i in rows])
    return part


#: Settings with one threshold that compare a score of the logits alone.
THRESHOLDS = [
    name
    for name, owner in OWNERS.items()
    if CASES[owner].state is no_state
    and TABLE[owner].needs is None
    and isinstance(getattr(SETTINGS[name].build(3), "threshold", None), float)
]


@pytest.mark.parametrize("name", THRESHOLDS)
def test_decisions_at_the_threshold_do_not_depend_on_the_batch(backend, name):
    """Thresholds within a rounding step of the score of a row, where the smallest difference would show."""
    rows, classes = (4, 3) if backend == "triton" else (12, 5)
    case = Case(name, "logits", torch.float32, rows, classes)
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(3))
    scores = truth_scores(case, logits)
    for i, score in enumerate(scores):
        for threshold in (score, np.nextafter(np.float32(score), np.float32(9))):
            criterion = dataclasses.replace(case.criterion, threshold=float(threshold))
            together, alone = (left_at_1(backend, criterion, part) for part in (logits, logits[i : i + 1].clone()))
            assert together[i] == alone[0]


def truth_scores(case, logits) -> np.ndarray:
    """Return the oracle's score of each row of given logits."""
    decide, numbers = CASES[OWNERS[case.rule]].decide, SETTINGS[case.rule].numbers(case.classes, 1)
    return np.array([decide(z, None, None, numbers, (1, 2))[1] for z in logits.double().numpy()])


def left_at_1(backend, criterion, logits) -> torch.Tensor:
    return one_exit(criterion, logits, backend)["row_ids"] < 0


B, C, H = 4, 3, 8


def call(criterion=None, *, requests=B, classes=C, **changed) -> dict:
    """Keyword arguments of a valid call with logits at layer 1 of 2, with some changed."""
    criterion = criterion or MaxProbability(threshold=0.0)
    arguments = dict(
        criterion=criterion,
        layer=1,
        depth=2,
        row_ids=torch.arange(B, dtype=torch.int32),
        logits=torch.randn(B, classes),
        **memory(criterion, requests, classes),
    )
    return {name: value for name, value in {**arguments, **changed}.items() if value is not None}


def head(dtype=torch.float32, tokens=B, classes=C) -> dict:
    """Hidden states and a linear head instead of logits."""
    hidden, weight, bias = torch.randn(tokens, H), torch.randn(classes, H), torch.randn(classes)
    return {"logits": None, "hidden": hidden.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype)}


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_step_after_compaction(backend, pooling):
    """`compact` leaves empty rows at the end."""
    offsets = torch.tensor([0, 2, 3, 5, 6], dtype=torch.int32)
    row_ids = torch.tensor([3, -1, 1, -1], dtype=torch.int32)
    given = call(**head(tokens=6), depth=1, pooling=pooling)
    new_ids, new_offsets, source = compact(row_ids, offsets, backend=backend)
    moved = torch.full((4, H), torch.nan)
    gather_rows(given["hidden"], offsets, source, new_offsets, moved, backend=backend)
    plain = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    given.update(row_ids=new_ids, offsets=new_offsets, hidden=moved)
    plain.update(row_ids=row_ids, offsets=offsets)
    assert exit_step(**given, backend=backend).tolist() == exit_step(**plain, backend=backend).tolist() == [0, 0, 0]
    assert torch.equal(given["answers"], plain["answers"])
    assert (given["answers"] == UNTOUCHED).all(dim=1).tolist() == [True, False, True, False]


def test_rows_that_have_left_do_not_change(backend):
    """Their values are ignored, and they are not counted."""
    given = call(Patience(patience=1), row_ids=torch.tensor([-1, 2, -1, 0], dtype=torch.int32))
    given["logits"][[0, 2]] = torch.nan
    counts = exit_step(**given, backend=backend)
    assert counts.tolist() == [2, 2, 0]
    assert given["row_ids"].tolist() == [-1, 2, -1, 0]
    assert given["state"][0].isnan().tolist() == [False, True, False, True]
    assert (given["answers"] == UNTOUCHED).all()
    assert (given["exit_layer"] == NO_LAYER).all()


@pytest.mark.parametrize("criterion", [Patience(patience=1), Voting(threshold=3), Dact()], ids=str)
def test_invalid_row_keeps_its_state_and_leaves_at_the_last_layer(backend, criterion):
    given = call(criterion, depth=3, aux=torch.full((B,), 0.1))
    exit_step(**given, backend=backend)
    state = given["state"].clone()
    given["row_ids"][2] = -1
    given["logits"][1, 2] = torch.nan
    assert exit_step(**{**given, "layer": 2}, backend=backend)[2] == 1
    assert torch.equal(given["state"][:, 1:3], state[:, 1:3])
    assert (given["state"][:, [0, 3]] != state[:, [0, 3]]).any(dim=0).all()
    assert given["row_ids"][1] == 1
    assert exit_step(**{**given, "layer": 3}, backend=backend).tolist() == [0, 0, 1]
    assert given["exit_layer"][1] == 3
    torch.testing.assert_close(given["answers"][1], given["logits"][1], rtol=0, atol=0, equal_nan=True)


def test_unneeded_aux_is_not_read(backend):
    given = call(Entropy(threshold=9.0), aux=torch.full((B,), torch.nan))
    assert exit_step(**given, backend=backend).tolist() == [0, 0, 0]


def test_given_logits_keep_their_values(backend):
    """Also those of rows with an answer of their own."""
    given = call(Voting(threshold=1))
    logits = given["logits"].clone()
    assert exit_step(**given, backend=backend).tolist() == [0, 0, 0]
    assert torch.equal(given["logits"], logits)


def test_skip_gate_decides_by_its_exit_rule(backend):
    gate, alone = call(SkipGate(threshold=0.5, exit=Entropy(threshold=0.9))), call(Entropy(threshold=0.9))
    alone["logits"] = gate["logits"]
    assert torch.equal(exit_step(**gate, backend=backend), exit_step(**alone, backend=backend))
    assert torch.equal(gate["row_ids"], alone["row_ids"])


def test_outputs_have_no_gradient(backend):
    """The outputs do not join the autograd graph of the inputs."""
    given = call(QExit(q=0.2), **head(), aux=torch.rand(B, requires_grad=True), depth=1, pooling="none")
    for name in ("hidden", "weight", "bias"):
        given[name].requires_grad_()
    counts = exit_step(**given, backend=backend)
    assert not any(given[name].requires_grad for name in ("answers", "state")) and not counts.requires_grad


def test_compiled_caller(backend):
    given = call(Entropy(threshold=0.9), row_ids=torch.tensor([2, -1, 0, 3], dtype=torch.int32))
    again = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    compiled = torch.compile(lambda arguments: exit_step(**arguments, backend=backend) + 0, backend="aot_eager")
    assert torch.equal(compiled(again), exit_step(**given, backend=backend))
    for name in ("row_ids", "answers", "exit_layer"):
        assert torch.equal(given[name], again[name])
    assert 0 < int((given["row_ids"] >= 0).sum()) < 3, "some of the rows should leave"
