"""The microbenchmarks: what they record, what they refuse, and the roofline's arithmetic; never how fast a thing is."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.micro import (
    bench_compact,
    bench_exit_step,
    bench_heads,
    collect,
    decision_cost,
    decisions,
    layer_products,
    measure,
    plain_exits,
    plain_rules,
    weight_checks,
)
from benchmarks.micro.decisions import LAYER, Decision, head_giving, random_trace
from benchmarks.micro.measure import COPY, EAGER, Rounds, Shape, Way
from earlyexit_kernels.criteria import RULES, Voting
from earlyexit_kernels.ops import exit_step_op

TINY = Shape(rows=6, classes=3, width=16, length=4)
COMMON = set("suite op case shape dtype engine backend baseline device way calls moved_bytes".split())
NUMBERS = set("median_ms low_ms high_ms p90_ms ratio ratio_low ratio_high goal roofline_percent copy_gb_per_s".split())


@pytest.fixture(autouse=True)
def as_before():
    """Benchmarks flush denormals for speed, which other tests count on; groups set up here are forgotten."""
    yield
    torch.set_flush_denormal(False)
    for module in (bench_exit_step, bench_heads, bench_compact):
        module.group_of.cache_clear()


@pytest.fixture
def run(monkeypatch):
    """``run(*options)``: records of two rounds of some benchmarks, run by pytest inside this test."""
    monkeypatch.setattr(measure, "LARGE_COPY", 2**16)
    # pytest-benchmark refuses to time in a process of xdist
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def collected(*options):
        outer = dict(os.environ)
        try:
            return list(collect.records_of(collect.run(2, *options)))
        finally:
            os.environ.update(outer)

    return collected


def test_every_rule_that_decides_early_has_a_plain_twin_and_a_case():
    assert set(plain_rules.STEPS) == set(RULES) - {"full_depth"}
    for source in bench_exit_step.SOURCES:
        at_base = {case.rule for case in bench_exit_step.CASES if (case.source, case.shape) == (source, measure.BASE)}
        assert at_base == set(plain_rules.STEPS)


def differences(group) -> dict[str, str]:
    with torch.inference_mode():
        return {name: way.difference() for name, way in group.ways.items()}


@pytest.mark.parametrize("source", bench_exit_step.SOURCES)
@pytest.mark.parametrize("rule", plain_rules.STEPS)
def test_every_way_of_a_decision_answers_alike(rule, source):
    group = bench_exit_step.group_of(bench_exit_step.Case(rule, source, TINY))
    assert set(differences(group).values()) == {""} and {EAGER, COPY, *measure.TIMED} == set(group.ways)


@pytest.mark.parametrize("name", [*bench_heads.FORMS, bench_heads.GATE])
def test_every_way_of_a_head_answers_alike(name):
    with torch.inference_mode():
        assert set(differences(bench_heads.group_of(name, TINY)).values()) == {""}


@pytest.mark.parametrize("live", bench_compact.LIVE)
@pytest.mark.parametrize("op", bench_compact.GROUPS)
def test_every_way_of_a_compaction_answers_alike(op, live):
    assert set(differences(bench_compact.group_of(bench_compact.Case(op, live, TINY))).values()) == {""}


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
    """`exit_step_op`, with a fault at the middle layer in one back-end."""

    def op_of(backend, device):
        op = exit_step_op(backend, device)

        def faulty(*arguments):
            if backend != "torch" or arguments[-2] != LAYER:
                return op(*arguments)
            counts = op(*(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments))
            fault(op, arguments)
            return counts

        return faulty

    return op_of


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_op_is_found(monkeypatch, fault):
    monkeypatch.setattr(decisions, "exit_step_op", broken(fault))
    found = differences(bench_exit_step.group_of(bench_exit_step.Case("patient_confidence", "logits", Shape(rows=64))))
    assert FAULTS[fault] in found.pop("torch") and set(found.values()) == {""}


def test_what_was_timed_has_all_numbers(run):
    records = run("-k", "(entropy-logits or family_dense or one_has_left) and (B8-C3-H768 or B1-C3-H768)")
    assert {record["case"] for record in records} == {
        "exit_step entropy, logits",
        "head family dense",
        "compact one has left",
        "gather_rows one has left",
    }
    assert all(COMMON | NUMBERS | {"rounds"} <= set(record) for record in records)
    assert {record["way"] for record in records} == {EAGER, COPY, *measure.TIMED}
    for record in records:
        assert record["rounds"] == 2 and record["low_ms"] <= record["median_ms"] <= record["high_ms"]
        assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"] and record["roofline_percent"] > 0
        assert record["backend"] == (record["way"] if record["way"] in measure.TIMED else None)


def test_a_case_that_answers_wrongly_gets_no_number(run, monkeypatch):
    monkeypatch.setattr(decisions, "exit_step_op", broken(forgets_answers))
    *timed, refused = run("-k", "margin-logits-B32-C3")
    assert refused["way"] == "torch" and refused["refused"].startswith("answers are off by up to")
    assert set(refused) >= COMMON and not set(refused) & NUMBERS
    assert {record["way"] for record in timed} == {EAGER, COPY, *measure.TIMED} - {"torch"}
    assert all("refused" not in record for record in timed)


def test_where_nothing_compiles_the_record_says_so(run, monkeypatch):
    def no_compiler(function):
        def fail(*arguments):
            raise RuntimeError("no working C++ compiler\nand a long trace")

        return fail

    monkeypatch.setattr(plain_exits, "compiled", no_compiler)
    *timed, left_out = run("-k", "entropy-logits-B32-C3")
    assert left_out["not_measured"] == "torch.compile fails here: RuntimeError: no working C++ compiler"
    assert left_out["engine"] == "compiled" and not set(left_out) & NUMBERS and len(timed) == 2 + len(measure.TIMED)


def test_a_benchmark_that_fails_ends_the_run(run, monkeypatch):
    def failing(bandwidth):
        raise ZeroDivisionError

    monkeypatch.setattr(measure.Bandwidth, "look", failing)
    with pytest.raises(RuntimeError, match="expected all to run"):
        run("-k", "margin-logits-B1-C3")


def test_no_benchmark_is_collected_unless_it_is_named(run):
    assert pytest.main(["--collect-only", "-qq", "benchmarks"]) == pytest.ExitCode.NO_TESTS_COLLECTED


def test_the_roofline_by_hand():
    """3 MB at 6 GB/s take 0.5 ms, so 1 ms is half of what is possible."""
    assert measure.roofline_percent(3_000_000, 0.001, 6e9) == pytest.approx(50.0)
    assert measure.roofline_percent(3_000_000, 0.0005, 6e9) == pytest.approx(100.0)


def test_the_bytes_of_a_decision_by_hand():
    """B 4, C 3, H 16, S 2: row ids 16 bytes, logits 48, a leaving row 4 + 12 + 8, counts 12; Voting keeps 3 numbers a
    row, read and written: 96."""
    trace = random_trace(4)
    logits = trace.logits[:, LAYER - 1]
    rule = Voting(threshold=3)
    decision = Decision(rule, trace, "torch", 1)
    leaving = decision.left * (4 + 12 + 8)
    assert decision.moved_bytes() == 16 + 48 + 96 + leaving + 12
    # hidden 4 or 8 tokens of 64 bytes, offsets 20, weight 192, bias 12
    first = Decision(rule, trace, "torch", 1, head_giving(logits, 16, 2, "first"))
    assert first.moved_bytes() == 16 + (4 * 64 + 20 + 192 + 12) + 96 + leaving + 12
    mean = Decision(rule, trace, "torch", 1, head_giving(logits, 16, 2, "mean"))
    assert mean.moved_bytes() == 16 + (8 * 64 + 20 + 192 + 12) + 96 + leaving + 12


def test_the_bytes_of_a_compaction_by_hand():
    """B 6, H 16, S 4, three rows live: the plan reads 24 + 28 bytes and writes 24 + 28 + 24; moving reads and writes 12
    tokens of 64 bytes, and reads 3 sources, 4 new offsets and 4 old ones."""
    plan, tokens = (
        bench_compact.group_of(bench_compact.Case(op, "half have left", TINY)) for op in bench_compact.GROUPS
    )
    assert plan.moved == 52 + 76
    assert tokens.moved == 2 * 12 * 64 + 12 + 16 + 16


def test_the_chain_runs_once_in_every_round_on_either_side():
    ran = []
    ways = {
        name: Way(lambda name=name: ran.append(name), str, lambda: ran.append("restored")) for name in ("op", EAGER)
    }
    rounds = Rounds(ways["op"], ways[EAGER])
    for _ in range(16):
        rounds.before()
        rounds.timed()
        rounds.after()
    assert len(rounds.chain_seconds) == 16 and ran[::2] == ["restored"] * 32
    turns = {tuple(ran[i : i + 4 : 2]) for i in range(1, 64, 4)}
    assert turns == {("op", EAGER), (EAGER, "op")}


@pytest.mark.parametrize(
    ("suite", "sizes"),
    [
        (decision_cost, {"BATCHES": (6,), "ROUNDS_A_REPEAT": 1, "CALLS": dict.fromkeys(measure.TIMED, 1)}),
        (layer_products, {"WIDTHS": (64,), "ROWS": (1,)}),
    ],
    ids=lambda value: getattr(value, "SUITE", ""),
)
def test_what_takes_turns_is_recorded_beside_its_baseline(suite, sizes, monkeypatch):
    for name, size in sizes.items():
        monkeypatch.setattr(suite, name, size)
    records = [record for record in suite.records(2) if "not_measured" not in record]
    assert records and all(record["ratio_low"] <= record["ratio"] <= record["ratio_high"] for record in records)
    itself = [record for record in records if suite.BASELINE in (record.get("rule"), record.get("case"))]
    assert itself and all(record["ratio"] == 1 for record in itself)


def test_checks_of_weights_are_timed_and_a_false_alarm_is_refused(monkeypatch):
    monkeypatch.setattr(weight_checks, "MODELS", {"small": (1, 16, 2)})
    found = list(weight_checks.records(1))
    assert [record["caches"] for record in found] == ["in a row", "between batches"]
    assert all(0 < record["low"] <= record["microseconds"] <= record["high"] for record in found)
    with pytest.raises(AssertionError, match="taken for changed"):
        weight_checks.timed(lambda: False, lambda: None, 1)
