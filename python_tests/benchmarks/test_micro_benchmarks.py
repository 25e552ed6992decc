"""The microbenchmarks: their records, and what they refuse; speed is not tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.micro import (
    bench_compact,
    bench_exit_step,
    decision_cost,
    decisions,
    layer_products,
    plain,
    weight_checks,
)
from benchmarks.micro.decisions import LAYER
from benchmarks.micro.groups import EAGER, TIMED, Shape
from earlyexit_kernels.criteria import RULES
from earlyexit_kernels.ops import bare_op

TINY = Shape(rows=6, classes=3, width=16, length=4)
COMMON = set("suite op case shape dtype engine backend baseline device calls".split())
NUMBERS = set("median_ms low_ms high_ms p90_ms ratio ratio_low ratio_high goal rounds".split())


@pytest.fixture(autouse=True)
def no_cached_groups():
    """Drop the groups that the benchmarks cache."""
    yield
    for module in (bench_exit_step, bench_compact):
        module.group_of.cache_clear()


CASES = [bench_exit_step.Case(rule, source, TINY) for rule in plain.STEPS for source in plain.SOURCES]
CASES += [bench_compact.Case(op, live, TINY) for op in bench_compact.GROUPS for live in bench_compact.LIVE]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_variants_agree_and_records_have_all_fields(case):
    module = bench_exit_step if isinstance(case, bench_exit_step.Case) else bench_compact
    with torch.inference_mode():
        records = list(module.group_of(case).records(2))
    assert {(r["engine"], r["backend"]) for r in records} == {(EAGER, ""), *((EAGER, name) for name in TIMED)}
    for record in records:
        assert set(record) >= COMMON | NUMBERS and record["rounds"] == 2
        assert record["low_ms"] <= record["median_ms"] <= record["high_ms"]
        assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"]


def forgets_answers(op, arguments):
    op(*arguments[:8], torch.zeros_like(arguments[8]), *arguments[9:])


def forgets_state(op, arguments):
    op(*arguments[:7], arguments[7].clone(), *arguments[8:])


def forgets_rows(op, arguments):
    op(*arguments[:6], arguments[6].clone(), *arguments[7:])


FAULTS = {
    forgets_answers: "answers are off",
    forgets_state: "rows leave at other layers",
    forgets_rows: "rows decide otherwise",
}


def broken(fault):
    """Return `bare_op` with a fault at the middle layer in one back-end."""

    def op_of(name, backend, device):
        op = bare_op(name, backend, device)

        def faulty(*arguments):
            if backend != "torch" or arguments[-2] != LAYER:
                return op(*arguments)
            counts = op(*(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments))
            fault(op, arguments)
            return counts

        return faulty

    return op_of


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_op_is_refused(monkeypatch, fault):
    monkeypatch.setattr(decisions, "bare_op", broken(fault))
    group = bench_exit_step.group_of(bench_exit_step.Case("patience", "logits", Shape(rows=64)))
    with torch.inference_mode():
        refused, *timed = group.records(1)
    assert refused["backend"] == "torch" and FAULTS[fault] in refused["refused"]
    assert set(refused) >= COMMON and not set(refused) & NUMBERS
    assert {record["backend"] for record in timed} == {"", *TIMED} - {"torch"}


def test_benchmarks_run_under_pytest_and_are_collected_only_by_name():
    files = [str(path) for path in Path(bench_compact.__file__).parent.glob("bench_*.py")]
    options = ("-qq", "-p", "no:cacheprovider", "--benchmark-disable", "-k", "(one_is_left or patience) and B8-C3-H768")
    assert pytest.main([*files, *options]) == pytest.ExitCode.OK
    assert pytest.main(["--collect-only", "-qq", "benchmarks"]) == pytest.ExitCode.NO_TESTS_COLLECTED


def test_every_criterion_has_a_decision_cost():
    trace = decisions.random_trace(64)
    found = decision_cost.rules(trace)
    assert set(found) == {*RULES, "dact, tight", decision_cost.AGAIN} - {"full_depth"}
    decision = decisions.Decision(found["entropy"], trace, "torch")
    decision()
    for row_ids, _, _, exit_layer in decision.copies[1:]:
        assert int((row_ids < 0).sum()) == decision.left == int((exit_layer == LAYER).sum()) > 0
    decision.restore()
    assert all(int((row_ids < 0).sum()) == 0 for row_ids, *_ in decision.copies)


@pytest.mark.parametrize(
    ("suite", "sizes"),
    [
        (decision_cost, {"BATCHES": (6,), "ROUNDS_PER_REPEAT": 1, "CALLS": dict.fromkeys(TIMED, 1)}),
        (layer_products, {"WIDTHS": (64,), "ROWS": (1,)}),
    ],
    ids=lambda value: getattr(value, "SUITE", ""),
)
def test_interleaved_suites_record_their_baseline(suite, sizes, monkeypatch):
    for name, size in sizes.items():
        monkeypatch.setattr(suite, name, size)
    records = [record for record in suite.records(2) if "not_measured" not in record]
    assert records and all(record["ratio_low"] <= record["ratio"] <= record["ratio_high"] for record in records)
    itself = [record for record in records if suite.BASELINE in (record.get("rule"), record.get("case"))]
    assert itself and all(record["ratio"] == 1 for record in itself)


def test_weight_checks_are_timed_and_a_false_alarm_raises(monkeypatch):
    monkeypatch.setattr(weight_checks, "MODELS", {"small": (1, 16, 2)})
    found = list(weight_checks.records(1))
    assert [record["caches"] for record in found] == ["in a row", "between batches"]
    assert all(0 < record["low"] <= record["microseconds"] <= record["high"] for record in found)
    with pytest.raises(AssertionError, match="reported as changed"):
        weight_checks.timed(lambda: False, lambda: None, 1)
