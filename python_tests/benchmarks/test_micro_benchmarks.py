"""The microbenchmarks: their records, and what they refuse; speed is not tested."""

from __future__ import annotations

import pytest
import torch

from benchmarks import goals, run, tables
from benchmarks.micro import bench_ops, decision_cost, decisions, layers, peaks
from benchmarks.micro.bench_ops import NAMES, Case
from benchmarks.micro.decisions import LAYER
from benchmarks.micro.plain import SOURCES, STEPS
from earlyexit_kernels.criteria import RULES
from earlyexit_kernels.ops import raw

TINY = {"rows": 6, "width": 16, "length": 4}
CASES = [Case("exit_step", (rule, source), **TINY) for rule in STEPS for source in SOURCES]
CASES += [Case(op, (live,), **TINY) for op in bench_ops.MOVES for live in bench_ops.LIVE]


@pytest.fixture(autouse=True)
def no_cached_variants():
    """Drop the variants that the benchmarks cache."""
    yield
    bench_ops.variants_of.cache_clear()


def wrong_variants(case) -> dict[str, str]:
    with torch.inference_mode():
        return {name: variant.check().wrong for name, variant in bench_ops.variants_of(case).items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_variants_agree(case):
    assert wrong_variants(case) == dict.fromkeys(NAMES, "")


def forgets_answers(op, arguments):
    op(*arguments[:8], torch.zeros_like(arguments[8]), *arguments[9:])


def forgets_rows(op, arguments):
    op(*arguments[:6], arguments[6].clone(), *arguments[7:])


FAULTS = {
    forgets_answers: "answers are off",
    forgets_rows: "rows decide otherwise",
}


def broken(fault):
    """Return `raw` with a fault at the middle layer in one back-end."""

    def op_of(name, backend, device):
        op = raw(name, backend, device)

        def faulty(*arguments):
            if backend != "torch" or arguments[-2] != LAYER:
                return op(*arguments)
            counts = op(*(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments))
            fault(op, arguments)
            return counts

        return faulty

    return op_of


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_op_is_found(monkeypatch, fault):
    monkeypatch.setattr(decisions, "raw", broken(fault))
    found = wrong_variants(Case("exit_step", ("patience", "logits"), rows=64))
    assert FAULTS[fault] in found.pop("torch") and set(found.values()) == {""}


@pytest.mark.thorough
def test_benchmarks_run_under_pytest_and_are_collected_only_by_name():
    options = ("-qq", "-p", "no:cacheprovider", "--benchmark-disable", "-k", "(one_is_left or patience) and B8-C3-H768")
    assert pytest.main([bench_ops.__file__, *options]) == pytest.ExitCode.OK
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
    ("module", "suite", "baseline", "sizes"),
    [
        (decision_cost, "records", "entropy", {"BATCHES": (6,), "CALLS": dict.fromkeys(NAMES, 1)}),
        (layers, "products", "family", {"WIDTHS": (64,), "ROWS": (1,)}),
    ],
)
def test_interleaved_suites_record_their_baseline(module, suite, baseline, sizes, monkeypatch):
    for name, size in sizes.items():
        monkeypatch.setattr(module, name, size)
    records = [record for record in getattr(module, suite)(2) if "not_measured" not in record]
    assert records and all(record["ratio_low"] <= record["ratio"] <= record["ratio_high"] for record in records)
    itself = [record for record in records if baseline in (record.get("rule"), record.get("case"))]
    assert itself and all(record["ratio"] == 1 for record in itself)


@pytest.mark.thorough
def test_layers_are_recorded_beside_the_peaks(monkeypatch):
    for name, size in {"LAYERS": 1, "TOKENS": (1, 256)}.items():
        monkeypatch.setattr(layers, name, size)
    found = [record for record in layers.roofline(1) if "not_measured" not in record]
    assert {record["shape"] for record in found} <= {"M 1", "M 256"}
    rates = (("gflops", "operations_share", "peak_gflops"), ("gb_per_second", "bytes_share", "peak_gb_per_second"))
    for record in found:
        for rate, share, peak in rates:
            rounding = 0.005 + 1 / record[peak]  # operations are rounded to 1e9
            assert record[share] == pytest.approx(record[rate] / record[peak], rel=0.1, abs=rounding)
    assert tables.roofline(found).count("| M 256") == len(found) / 2


def test_no_compiler_is_not_measured(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(peaks.shutil, "which", lambda name: None)
    (record,) = run.records_of("layer_roofline", 1)
    assert "no compiler was found" in record["not_measured"] and "no compiler" in tables.roofline([record])


@pytest.mark.parametrize(
    ("stored", "tokens", "share", "met"), [("float32", 32, 0.62, True), ("float16", 1, 0.7, False)]
)
def test_roofline_goals_are_for_avx2(stored, tokens, share, met):
    goal = goals.roofline_goal(stored, tokens, "AVX2")
    assert goal is not None and goal.met({"operations_share": share, "bytes_share": share}) == met
    assert goals.roofline_goal(stored, tokens, "AVX512") is None


def test_weight_checks_are_timed_and_a_false_alarm_raises(monkeypatch):
    monkeypatch.setattr(layers, "MODELS", {"small": (1, 16, 2)})
    found = list(layers.checks(1))
    assert [record["caches"] for record in found] == ["in a row", "between batches"]
    assert all(0 < record["low"] <= record["microseconds"] <= record["high"] for record in found)
    with pytest.raises(AssertionError, match="reported as changed"):
        layers.timed(lambda: False, lambda: None, 1)
