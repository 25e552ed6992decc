"""Grids of settings: they exist for every rule, cover the range of costs, and avoid scores of the trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.backends import backend_params
from support.criterion_cases import CASES

from earlyexit_kernels import criteria
from earlyexit_kernels.core.replay import replay
from earlyexit_kernels.tuning import settings as grids
from earlyexit_kernels.types import AUX_ACTIVATIONS, CLASSIFICATION, ExitTrace

ROWS, DEPTH = 300, 6
SCORED = [name for name, case in CASES.items() if case.scores]


def random_trace(classes: int = 3, *, aux: tuple[str, ...] = tuple(AUX_ACTIVATIONS), keys: bool = True) -> ExitTrace:
    """Return a trace whose exits get more confident with depth."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, DEPTH, classes, generator=generator) * torch.linspace(0.5, 4, DEPTH)[:, None]
    scalars = {name: torch.rand(ROWS, DEPTH, generator=generator) * 2 - 1 for name in aux}
    return ExitTrace(logits, scalars, torch.arange(ROWS) if keys else None)


def mean_layer(trace: ExitTrace, rule: criteria.Criterion, problem_type: str | None = None) -> float:
    return replay(trace, rule, problem_type=problem_type, backend="torch")[1].double().mean().item()


def test_every_rule_except_full_depth_has_a_grid():
    assert list(grids.GRIDS) == [name for name in criteria.RULES if name != "full_depth"]


def test_all_rules_have_settings_on_a_complete_trace():
    groups = grids.settings(random_trace(), points=12)
    assert list(groups) == list(grids.GRIDS)
    for name, group in groups.items():
        assert group and all(type(rule) is criteria.RULES[name] for rule in group)
        assert len(set(group)) == len(group) <= 24, "duplicate settings"


@pytest.mark.parametrize("name", [name for name in SCORED if CASES[name].covers_costs])
def test_settings_cover_the_range_of_costs(name):
    trace = random_trace()
    group = grids.settings(trace, points=12)[name]
    means = sorted(mean_layer(trace, rule) for rule in group)
    slowest = {"dact": 4.0}.get(name, DEPTH - 0.3)  # rows leave early even with epsilon 0, as in the paper
    assert min(means) < 1.1 and max(means) > slowest
    assert max(np.diff(means)) < 1.6


def test_rules_without_threshold_have_all_settings():
    groups = grids.settings(random_trace(), points=12)
    assert [rule.patience for rule in groups["patience"]] == list(range(1, DEPTH))
    assert [rule.seed for rule in groups["sampled_exit"]] == [0, 1, 2]
    assert len(groups["expectation"]) == 1
    assert 0.5 in [rule.q for rule in groups["q_exit"]]
    assert {rule.bound for rule in groups["dact"]} == {"paper", "tight"}
    assert {(rule.bound, rule.epsilon) for rule in groups["dact"]} >= {("paper", 0.0), ("tight", 0.0)}
    assert {rule.patience for rule in groups["patient_confidence"]} == {1, 2, 3}


def test_voting_has_settings_for_every_exponent():
    trace = random_trace()
    voting = grids.settings(trace, points=24)["voting"]
    assert [rule.threshold for rule in voting if rule.gamma == 0] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert {rule.gamma for rule in voting} == set(grids.GAMMAS)
    by_gamma = [[mean_layer(trace, rule) for rule in voting if rule.gamma == gamma] for gamma in grids.GAMMAS]
    assert all(means == sorted(means) and means[-1] > 4 for means in by_gamma)


def test_voting_thresholds_lie_between_scores():
    """Five agreeing exits: 4 votes at layer 4 score 4 / 4^0.5 = 2; with a lower threshold the row leaves there."""
    trace = ExitTrace(torch.tensor([[[2.0, 0.0]] * 5]))
    rules = [rule for rule in grids.settings(trace)["voting"] if rule.gamma == 0.5]
    assert 3**0.5 < rules[-2].threshold < 2.0 < rules[-1].threshold
    assert [mean_layer(trace, rule) for rule in rules[-2:]] == [4.0, 5.0]


def trace_with_ties() -> ExitTrace:
    """Return a trace with duplicate rows, rows with probabilities near or equal to 1, and rows of zeros."""
    trace = random_trace()
    logits = torch.cat(
        (trace.logits, trace.logits[:50], trace.logits[:20] * 9, trace.logits[:20] * 90, 0 * trace.logits[:9])
    )
    rows = torch.arange(len(logits)) % ROWS
    return ExitTrace(logits, {name: values[rows] for name, values in trace.aux.items()}, rows)


@pytest.mark.parametrize("name", SCORED)
def test_no_threshold_is_within_rounding_of_a_score(name):
    """Except whole numbers of votes, and settings from papers."""
    trace, (scores_of, threshold) = trace_with_ties(), CASES[name].scores
    z, aux = trace.logits[:, :-1], {key: values[:, :-1] for key, values in trace.aux.items()}
    rules = grids.settings(trace, points=24)[name]
    tested = 0
    for rule in rules:
        value, scores = getattr(rule, threshold), scores_of(z, aux, rule).flatten()
        if (name, value) in (("q_exit", 0.5), ("dact", 0.0)) or (name == "voting" and rule.gamma == 0):
            continue
        assert (scores - value).abs().min() > 4e-7
        tested += 1
    assert tested >= 8


def test_regression_thresholds_are_not_within_rounding_of_a_step():
    trace = ExitTrace(torch.randn(50, DEPTH, 1, generator=torch.Generator().manual_seed(0)))
    steps = trace.logits[:, :, 0].double().diff(dim=1).abs()
    rules = grids.settings(trace)["patience"]
    assert len(rules) >= 8 and all((steps - rule.tolerance).abs().min() > 4e-7 for rule in rules)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", backend_params(("triton", "cpp")))
def test_decisions_do_not_depend_on_the_backend(backend):
    """Back-ends round differently, but no threshold is within rounding of a score of its trace."""
    trace = trace_with_ties()
    if backend == "triton":
        trace = ExitTrace(trace.logits[-16:], {k: v[-16:] for k, v in trace.aux.items()}, trace.keys[-16:])
    for name, rules in grids.settings(trace, points=8 if backend == "triton" else 24).items():
        for rule in rules[:: 8 if backend == "triton" else 1]:
            expected = replay(trace, rule, backend="torch")[1]
            assert torch.equal(replay(trace, rule, backend=backend)[1], expected), (name, rule)


def test_rules_depend_on_the_trace():
    without_inputs = [name for name in grids.GRIDS if criteria.RULES[name].needs is None]
    assert "entropy" in without_inputs
    assert list(grids.settings(random_trace(aux=(), keys=False))) == without_inputs
    assert "sampled_exit" not in grids.settings(random_trace(keys=False)), "it requires keys"
    assert "q_exit" in grids.settings(random_trace(keys=False))


def test_rules_depend_on_the_task():
    regression = grids.settings(random_trace(1))
    expected = [n for n, cls in criteria.RULES.items() if "regression" in cls.tasks and n != "full_depth"]
    assert list(regression) == expected and all(rule.tolerance > 0 for rule in regression["patience"])
    multi_label = grids.settings(random_trace(4), problem_type="multi_label_classification")
    expected = [
        n for n, cls in criteria.RULES.items() if "multi_label_classification" in cls.tasks and n != "full_depth"
    ]
    assert list(multi_label) == expected
    assert not any(rule.tasks == CLASSIFICATION for group in multi_label.values() for rule in group)
    one_class = grids.settings(random_trace(1), problem_type="single_label_classification")
    compares = [name for name in one_class if criteria.RULES[name].tasks == CLASSIFICATION]
    assert not compares, "these rules require several classes"


@pytest.mark.parametrize("scale", (1e4, 0.0))
def test_settings_of_exits_with_constant_scores(scale):
    trace = random_trace()
    flat = {name: values * scale for name, values in trace.aux.items() if name != "hidden_cosine"}
    trace = ExitTrace(trace.logits * scale, {**flat, "hidden_cosine": torch.ones(ROWS, DEPTH)}, trace.keys)
    for group in grids.settings(trace).values():
        for rule in group:
            assert 1 <= mean_layer(trace, rule) <= DEPTH


def test_rows_with_invalid_logits_are_ignored():
    trace = random_trace()
    trace.logits[0] = float("nan")
    assert {name: len(group) for name, group in grids.settings(trace).items()} == {
        name: len(group) for name, group in grids.settings(random_trace()).items()
    }


def test_skip_settings_include_full_depth():
    group = grids.skip_settings(random_trace(), skip_from=(0.6, 1.0), points=8)
    assert len(group) == 16 and {rule.threshold for rule in group} == {0.6, 1.0}
    assert all(next(r.exit.threshold for r in group if r.threshold == s) == 0.0 for s in (0.6, 1.0))


def test_too_few_points_or_exits_are_refused():
    with pytest.raises(ValueError, match=r"points >= 8 .* got 7 and 6"):
        grids.settings(random_trace(), points=7)
    with pytest.raises(ValueError, match="at least 2 exits, got 24 and 1"):
        grids.settings(ExitTrace(torch.zeros(3, 1, 2)))
