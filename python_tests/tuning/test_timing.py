"""Timing: interleaved rounds, warm-up, and ratios within rounds."""

from __future__ import annotations

import pytest

from earlyexit_kernels.tuning import timing


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock; returns a function that advances it by milliseconds."""
    now = [0]
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now[0])

    def advance(milliseconds: float) -> None:
        now[0] += int(milliseconds * 1e6)

    return advance


def test_calls_are_timed_with_their_sync_and_without_their_preparation(clock):
    prepared, queued = [], []

    def prepare(name: str) -> None:
        clock(7)
        prepared.append(name)

    def sync() -> None:
        clock(3 * len(queued))
        queued.clear()

    calls = {"a": lambda: clock(2), "b": lambda: clock(5), "queues": lambda: queued.append(1)}
    times = timing.interleave(calls, repeats=4, warmup=1, prepare=prepare, sync=sync)
    assert times == {"a": [2.0] * 4, "b": [5.0] * 4, "queues": [3.0] * 4}
    assert sorted(prepared) == sorted([*calls] * 5)


def test_custom_clock(clock):
    def device(call):
        call()
        return 7.5

    times = timing.interleave({"a": lambda: clock(2)}, repeats=3, warmup=0, clock=device)
    assert times == {"a": [7.5] * 3}


def test_every_round_calls_each_once_in_random_order(clock):
    calls = []
    timing.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=20, warmup=2)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 22 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


def test_slow_phases_cancel_in_paired_ratio():
    slow = [1, 1, 10, 1, 40]
    ratio = timing.paired_ratio([2.0 * s for s in slow], [4.0 * s for s in slow])
    assert ratio == timing.Ratio(median=0.5, low=0.5, high=0.5) and ratio.saved == 0.5


def test_ratio_matches_worked_example():
    ratio = timing.paired_ratio([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1])
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 3.5, 5.0)
    assert str(ratio) == "3.50 (2.00 to 5.00)"
    assert timing.Ratio(1 / 3, 0.25, 0.5).fields() == {"ratio": 0.3333, "ratio_low": 0.25, "ratio_high": 0.5}


@pytest.mark.parametrize(
    ("alternatives", "repeats", "warmup"), [({}, 1, 0), ({"a": lambda: None}, 0, 0), ({"a": lambda: None}, 1, -1)]
)
def test_no_alternatives_or_rounds_are_refused(alternatives, repeats, warmup):
    with pytest.raises(ValueError, match=r"interleave: expected at least one alternative"):
        timing.interleave(alternatives, repeats=repeats, warmup=warmup)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"equal length from one run, got 1 and 2"):
        timing.paired_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"at least one number"):
        timing.quantiles([])
