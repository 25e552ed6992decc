"""The fuzz harness detects wrong results, accepted invalid calls, tracebacks, crashes and hangs."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time

import pytest
import torch
from fuzz import report
from fuzz.case import AcceptedError, Case, WrongError
from fuzz.driver import Driver, Store
from fuzz.targets import TARGETS, Target
from fuzz.worker import finding_of
from support.models import ALL_FAMILIES

from earlyexit_kernels import criteria, ops


def run(case: Case) -> None:
    """Target of this file; the random numbers of a case determine its finding."""
    case.calls += 2
    number = case.integer(0, 10**6)
    kind = number % 40
    if kind == 0:
        raise WrongError("one is two")
    if kind == 1:
        raise AcceptedError("accepted an invalid call")
    if kind == 2:
        raise KeyError("unexpected")
    if kind == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == 4 and number % 80 == 44:
        time.sleep(60)


HERE = {"here": Target("test_fuzz", 1, limit=3)}


def expected(count: int) -> dict[str, set[int]]:
    """Return the numbers of the cases with each kind of finding."""
    found: dict[str, set[int]] = {kind: set() for kind in report.KINDS}
    for k in range(count):
        number = Case("here", 7, k).integer(0, 10**6)
        kind = {0: "wrong", 1: "accepted", 2: "traceback", 3: "crash"}.get(number % 40)
        kind = "crash" if number % 80 == 44 else kind
        if kind is not None:
            found[kind].add(k)
    return found


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    sys.modules.setdefault("test_fuzz", sys.modules[__name__])
    driver = Driver(HERE, seed=7, workers=2, folder=folder, max_cases=100)
    return folder, driver.drive(60)


@pytest.mark.thorough
def test_every_kind_of_finding_is_reported_with_its_case(driven):
    _, done = driven
    found = {kind: {f.number for f in done.findings if f.kind == kind} for kind in report.KINDS}
    assert found == expected(100) and all(found.values())
    assert done.cases == {"here": 100}
    crashes = [f.message for f in done.findings if f.kind == "crash"]
    assert any("SIGSEGV" in message for message in crashes)
    assert any("no answer within 3 s" in message for message in crashes)


def test_report_counts_findings_and_shows_replay_commands(driven):
    _, done = driven
    counts = expected(100)
    row = report.table(HERE, done).splitlines()[1].split()
    assert row[:2] == ["here", "100"] and row[4:] == [str(len(counts[kind])) for kind in report.KINDS]
    text = report.findings(done, 7)
    assert f"--seed 7 --replay here:{min(counts['wrong'])}" in text and "one is two" in text


def test_second_run_continues_with_the_next_case(driven):
    folder, _ = driven
    driver = Driver({"here": Target("test_fuzz", 1, limit=3)}, seed=7, workers=1, folder=folder, max_cases=3)
    done = driver.drive(30)
    progress = Store(folder, 7).of("here")
    assert done.cases["here"] == 3 and progress.cases == 103
    left = sum(stop - start for start, stop in progress.left)
    assert progress.next - left == 103


def findings_of(target: str, count: int) -> set[str]:
    """Return the kinds of finding among the first cases of a target."""
    run_case = TARGETS[target].load()
    found = (finding_of(run_case, Case(target, 0, number)) for number in range(count))
    return {kind for kind, _ in filter(None, found)}


def test_wrong_decision_is_detected(monkeypatch):
    exit_step = ops.exit_step

    def never_leaves(*, criterion, **others):
        wrong = isinstance(criterion, criteria.Entropy)
        return exit_step(criterion=criteria.FullDepth() if wrong else criterion, **others)

    assert "wrong" not in findings_of("ops", 60)
    monkeypatch.setattr(ops, "exit_step", never_leaves)
    assert "wrong" in findings_of("ops", 60)


def test_wrong_compaction_is_detected(monkeypatch):
    compact = ops.compact

    def unstable(*arguments, **others):
        new_ids, *rest = compact(*arguments, **others)
        return new_ids.flip(0), *rest

    monkeypatch.setattr(ops, "compact", unstable)
    assert "wrong" in findings_of("ops", 60)


def test_missing_refusal_is_detected(monkeypatch):
    gather_rows = ops.gather_rows

    def accepts(*arguments, **others):
        with contextlib.suppress(ValueError, TypeError):
            gather_rows(*arguments, **others)

    monkeypatch.setattr(ops, "gather_rows", accepts)
    assert "accepted" in findings_of("hostile", 60)


def test_write_before_refusal_is_detected(monkeypatch):
    @functools.wraps(ops.exit_step)  # the harness reads the signature
    def writes(*, answers=None, **others):
        if isinstance(answers, torch.Tensor) and answers.numel():
            answers.view(-1)[0] = 99
        raise ValueError("refused")

    monkeypatch.setattr(ops, "exit_step", writes)
    assert "accepted" in findings_of("hostile", 30)


def test_case_is_determined_by_seed_and_number():
    draws = [(case.integer(0, 99), case.normal(3).tolist()) for case in (Case("ops", 1, 5), Case("ops", 1, 5))]
    assert draws[0] == draws[1] != (Case("ops", 1, 6).integer(0, 99), Case("ops", 1, 6).normal(3).tolist())
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("target", "builder"), [("models", "built"), ("weights", "stock")])
def test_every_family_is_drawn(target, builder, monkeypatch):
    run_case, families = TARGETS[target].load(), []

    def drawn(family, *_, **__):
        families.append(family)
        raise StopIteration

    monkeypatch.setattr(sys.modules[run_case.__module__], builder, drawn)
    for number in range(400):
        with contextlib.suppress(StopIteration):
            run_case(Case(target, 0, number))
    assert len(families) == 400 and set(families) == set(ALL_FAMILIES)
