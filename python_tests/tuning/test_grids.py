"""Grids: every rule with something to set has one, it covers the range of costs, and it tries only what fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from earlyexit_kernels import criteria
from earlyexit_kernels.engine.replay import replay
from earlyexit_kernels.tuning import grids
from earlyexit_kernels.types import AUX_ACTIVATIONS, ExitTrace

ROWS, DEPTH = 300, 6
#: Rules that leave a share of the rows at each layer by a threshold; the others have few settings.
CONTINUOUS = (
    "entropy",
    "max_probability",
    "margin",
    "q_exit",
    "dact",
    "learned",
    "patient_confidence",
    "hidden_cosine",
    "energy",
)


def drawn(classes: int = 3, *, aux: tuple[str, ...] = tuple(AUX_ACTIVATIONS), keys: bool = True) -> ExitTrace:
    """A trace whose exits get surer with depth."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, DEPTH, classes, generator=generator) * torch.linspace(0.5, 4, DEPTH)[:, None]
    scalars = {name: torch.rand(ROWS, DEPTH, generator=generator) * 2 - 1 for name in aux}
    return ExitTrace(logits, scalars, torch.arange(ROWS) if keys else None)


def mean_layer(trace: ExitTrace, rule: criteria.Criterion, problem_type: str | None = None) -> float:
    return replay(trace, rule, problem_type=problem_type, backend="torch")[1].double().mean().item()


def test_every_rule_but_full_depth_has_a_grid_in_the_order_of_the_table():
    assert list(grids.GRIDS) == [name for name in criteria.RULES if name != "full_depth"]


def test_all_of_them_are_laid_out_where_all_fit():
    groups = grids.settings(drawn(), points=12)
    assert list(groups) == list(grids.GRIDS)
    for name, group in groups.items():
        assert group and all(type(rule) is criteria.RULES[name] for rule in group)
        assert len(set(group)) == len(group) <= 24, "no setting twice"


@pytest.mark.parametrize("name", CONTINUOUS)
def test_settings_cover_the_whole_range_of_costs(name):
    trace = drawn()
    group = grids.settings(trace, points=12)[name]
    means = sorted(mean_layer(trace, rule) for rule in group)
    slowest = {"dact": 4.0}.get(name, DEPTH - 0.3)  # epsilon 0, the paper's own, lets rows go all the same
    assert min(means) < 1.1 and max(means) > slowest
    assert max(np.diff(means)) < 1.6


def test_few_settings_are_all_there():
    groups = grids.settings(drawn(), points=12)
    assert [rule.patience for rule in groups["patience"]] == list(range(1, DEPTH))
    assert [rule.seed for rule in groups["sampled_exit"]] == [0, 1, 2]
    assert len(groups["expectation"]) == 1
    assert 0.5 in [rule.q for rule in groups["q_exit"]]
    assert {rule.bound for rule in groups["dact"]} == {"paper", "tight"}
    assert {(rule.bound, rule.epsilon) for rule in groups["dact"]} >= {("paper", 0.0), ("tight", 0.0)}
    assert {rule.patience for rule in groups["patient_confidence"]} == {1, 2, 3}


def test_votes_are_counted_and_shared_out():
    trace = drawn()
    voting = grids.settings(trace, points=24)["voting"]
    assert [rule.threshold for rule in voting if rule.gamma == 0] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert {rule.gamma for rule in voting} == set(grids.GAMMAS)
    by_gamma = [[mean_layer(trace, rule) for rule in voting if rule.gamma == gamma] for gamma in grids.GAMMAS]
    assert all(means == sorted(means) and means[-1] > 4 for means in by_gamma)


def test_thresholds_of_votes_lie_between_the_scores():
    """Five exits of one mind: 4 votes of 4 layers score 4 / 4^0.5 = 2 exactly; below it the row leaves at layer 4."""
    trace = ExitTrace(torch.tensor([[[2.0, 0.0]] * 5]))
    rules = [rule for rule in grids.settings(trace)["voting"] if rule.gamma == 0.5]
    assert 3**0.5 < rules[-2].threshold < 2.0 < rules[-1].threshold
    assert [mean_layer(trace, rule) for rule in rules[-2:]] == [4.0, 5.0]


def clumped() -> ExitTrace:
    """Rows that stand twice, rows whose exits are sure up to rounding or all of it, and rows all alike."""
    trace = drawn()
    logits = torch.cat(
        (trace.logits, trace.logits[:50], trace.logits[:20] * 9, trace.logits[:20] * 90, 0 * trace.logits[:9])
    )
    rows = torch.arange(len(logits)) % ROWS
    return ExitTrace(logits, {name: values[rows] for name, values in trace.aux.items()}, rows)


def one_less_cumulated(halting):
    return (1 - halting.double().sigmoid()).cumprod(dim=1)


def entropy(z):
    p = z.double().softmax(dim=-1)
    return -torch.special.xlogy(p, p).sum(dim=-1)


def divergence(z):
    p, q = z[:, 1:].double().softmax(dim=-1), z[:, :-1].double().softmax(dim=-1)
    return (torch.special.xlogy(p, 2 * p / (p + q)) + torch.special.xlogy(q, 2 * q / (p + q))).nansum(dim=-1) / 2


def votes(z, gamma):
    counts = [torch.nn.functional.one_hot(z[:, :k].argmax(dim=-1), z.shape[-1]).sum(dim=1) for k in range(1, DEPTH)]
    return torch.stack([c.amax(dim=-1) / k**gamma for k, c in enumerate(counts, start=1)], dim=1)


#: Rule -> the number that it compares with a threshold, at the exits before the last, and that threshold of a setting.
SCORES = {
    "entropy": (lambda z, aux, rule: entropy(z), "threshold"),
    "max_probability": (lambda z, aux, rule: z.double().softmax(dim=-1).amax(dim=-1), "threshold"),
    "margin": (lambda z, aux, rule: -z.double().softmax(dim=-1).topk(2).values.diff(dim=-1)[..., 0], "threshold"),
    "q_exit": (lambda z, aux, rule: 1 - one_less_cumulated(aux["halting"]), "q"),
    "voting": (lambda z, aux, rule: votes(z, rule.gamma), "threshold"),
    "dact": (lambda z, aux, rule: one_less_cumulated(aux["halting"]), "epsilon"),
    "learned": (lambda z, aux, rule: aux["uncertainty"].double().sigmoid(), "threshold"),
    "patient_confidence": (lambda z, aux, rule: entropy(z) / np.log(z.shape[-1]), "threshold"),
    "divergence_patience": (lambda z, aux, rule: divergence(z), "threshold"),
    "hidden_cosine": (lambda z, aux, rule: aux["hidden_cosine"].double(), "threshold"),
    "energy": (lambda z, aux, rule: 1 / (1 + z.double().exp().sum(dim=-1)), "threshold"),
}


@pytest.mark.parametrize("name", SCORES)
def test_no_threshold_equals_a_score(name):
    """Nor is one within rounding of a score, but votes without an exponent, which are whole, and settings of papers."""
    trace, (scores_of, threshold) = clumped(), SCORES[name]
    z, aux = trace.logits[:, :-1], {key: values[:, :-1] for key, values in trace.aux.items()}
    rules = grids.settings(trace, points=24)[name]
    tried = 0
    for rule in rules:
        value, scores = getattr(rule, threshold), scores_of(z, aux, rule).flatten()
        if (name, value) in (("q_exit", 0.5), ("dact", 0.0)) or (name == "voting" and rule.gamma == 0):
            continue
        assert (scores - value).abs().min() > 4e-7
        tried += 1
    assert tried >= 8


def test_thresholds_of_a_regression_equal_no_step():
    trace = ExitTrace(torch.randn(50, DEPTH, 1, generator=torch.Generator().manual_seed(0)))
    steps = trace.logits[:, :, 0].double().diff(dim=1).abs()
    rules = grids.settings(trace)["patience"]
    assert len(rules) >= 8 and all((steps - rule.tolerance).abs().min() > 4e-7 for rule in rules)


def test_every_setting_decides_alike_on_every_back_end(backend):
    """Rounding, which differs between them, decides no row of the trace that a setting was laid out over."""
    trace = clumped()
    if backend == "triton":
        trace = ExitTrace(trace.logits[-16:], {k: v[-16:] for k, v in trace.aux.items()}, trace.keys[-16:])
    for name, rules in grids.settings(trace, points=8 if backend == "triton" else 24).items():
        for rule in rules[:: 8 if backend == "triton" else 1]:
            wanted = replay(trace, rule, backend="torch")[1]
            assert torch.equal(replay(trace, rule, backend=backend)[1], wanted), (name, rule)


def test_settings_follow_the_trace():
    assert list(grids.settings(drawn(aux=(), keys=False))) == [
        "entropy",
        "max_probability",
        "margin",
        "patience",
        "voting",
        "patient_confidence",
        "divergence_patience",
        "energy",
    ]
    assert "sampled_exit" not in grids.settings(drawn(keys=False)), "it reads the rows' keys"
    assert "q_exit" in grids.settings(drawn(keys=False))


def test_settings_follow_the_task():
    regression = grids.settings(drawn(1))
    able = [n for n, cls in criteria.RULES.items() if "regression" in cls.tasks and n != "full_depth"]
    assert list(regression) == able and all(rule.tolerance > 0 for rule in regression["patience"])
    several = grids.settings(drawn(4), problem_type="multi_label_classification")
    able = [n for n, cls in criteria.RULES.items() if "multi_label_classification" in cls.tasks and n != "full_depth"]
    assert list(several) == able
    assert not any(rule.tasks == criteria.base.CLASSIFICATION for group in several.values() for rule in group)
    alone = grids.settings(drawn(1), problem_type="single_label_classification")
    compares = [name for name in alone if criteria.RULES[name].tasks == criteria.base.CLASSIFICATION]
    assert not compares, "one class leaves nothing to compare"


@pytest.mark.parametrize("scale", (1e4, 0.0))
def test_settings_survive_exits_that_are_all_sure_or_all_alike(scale):
    trace = drawn()
    flat = {name: values * scale for name, values in trace.aux.items() if name != "hidden_cosine"}
    trace = ExitTrace(trace.logits * scale, {**flat, "hidden_cosine": torch.ones(ROWS, DEPTH)}, trace.keys)
    for group in grids.settings(trace).values():
        for rule in group:
            assert 1 <= mean_layer(trace, rule) <= DEPTH


def test_settings_survive_rows_without_a_meaning():
    trace = drawn()
    trace.logits[0] = float("nan")
    assert {name: len(group) for name, group in grids.settings(trace).items()} == {
        name: len(group) for name, group in grids.settings(drawn()).items()
    }


def test_skips_are_tried_with_and_without_an_early_exit():
    group = grids.skip_settings(drawn(), skip_from=(0.6, 1.0), points=8)
    assert len(group) == 16 and {rule.threshold for rule in group} == {0.6, 1.0}
    assert all(next(r.exit.threshold for r in group if r.threshold == s) == 0.0 for s in (0.6, 1.0))


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(ValueError, match=r"points >= 8 .* got 7 and 6"):
        grids.settings(drawn(), points=7)
    with pytest.raises(ValueError, match="at least 2 exits, got 24 and 1"):
        grids.settings(ExitTrace(torch.zeros(3, 1, 2)))
