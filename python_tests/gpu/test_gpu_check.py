"""``make gpu-check``: what it keeps, what it does again, and what it makes of failures."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.gpu_checks import document, good

from benchmarks import store
from benchmarks.end_to_end.models import NotMeasuredError
from benchmarks.gpu import card, check, goals, sanitize, steps, tables, worker
from benchmarks.gpu.bench import Bench, head
from benchmarks.gpu.check import TOO_LATE, Step
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.gpu.steps import Outcome, Worker


def test_what_is_measured_is_kept_and_not_measured_again(driver):
    summary = driver({"a": good("a"), "b": good("b")})
    assert summary.done == ["a", "b"] and not summary.failed
    assert {record["suite"] for record in document(driver)["records"]} == {"gpu_a", "gpu_b"}
    facts = document(driver)["suites"]["gpu_a"]
    assert facts["finished"] and facts["sources"] == "aaaa" and facts["gpu"] == "Fake" and "commit" in facts
    summary = driver({"a": good("a"), "b": good("b"), "c": good("c")})
    assert summary.there == ["a", "b"] and summary.done == ["c"] and [name for name, _ in driver.ran] == ["c"]
    assert driver({"a": good("a")}, redo=True).done == ["a"]
    assert driver({"a": good("a")}, always=("a",)).done == ["a"]
    driver.sources = "bbbb"
    assert driver({"a": good("a"), "c": good("c")}).done == ["a", "c"], "other sources are measured anew"


def test_failures_are_kept_and_tried_again(driver):
    partly = Outcome(good("a").records, "the process ended with status -6; its message is above")
    summary = driver({"a": partly, "b": good("b")})
    assert summary.failed == ["a"] and summary.done == ["b"]
    first, rest = document(driver)["records"][:2]
    assert first["median_ms"] == 1.0 and "status -6" in rest["not_measured"]
    assert "failed, to be tried again: a" in str(summary)
    assert driver({"a": good("a"), "b": good("b")}).done == ["a"]
    assert len(document(driver)["records"]) == 2


def test_what_there_is_no_time_for_is_left(driver):
    summary = driver({name: good(name) for name in "abcd"}, takes=50, minutes=2)
    assert summary.done == ["a", "b"] and summary.late == ["c", "d"]
    assert driver.ran == [("a", 100), ("b", 70)], "no step is given more than is left"
    assert "left for the next run: c, d" in str(summary)
    assert driver({name: good(name) for name in "efg"}, takes=50, minutes=2, least=71).done == ["e"]


def test_what_was_measured_without_the_kernels_is_measured_with_them(driver):
    lacking, built = Outcome(good("build").records, without="CUDA kernels"), good("build")
    for expected in ("done", "there"):
        summary = driver({"build": lacking, "a": good("a")}, always=("build",))
        assert "a" in getattr(summary, expected)
    assert document(driver)["suites"]["gpu_a"]["sources"] == "aaaa without CUDA kernels"
    for expected in ("done", "there"):
        assert "a" in getattr(driver({"build": built, "a": good("a")}, always=("build",)), expected)


def test_refusals_are_named_at_the_end(driver, capsys):
    wrong = Outcome([head("gpu_a", "a", "ours") | {"refused": "answers are 3 off"}])
    summary = driver({"a": wrong, "b": good("b", entry=[(128, "graph")])})
    assert "refused: suite=gpu_a case=a engine=ours refused=answers are 3 off" in str(summary)
    assert "'Fake': ((128, 'graph'),)," in capsys.readouterr().out


def test_the_plan_builds_tests_and_measures():
    plan = check.plan(SimpleNamespace(ask=lambda name, seconds: (name, seconds)))
    assert list(plan) == ["build", "tests", *SECTIONS] and plan["build"].always
    assert plan["bits"].run(3.0) == ("bits", 3.0)
    assert all(TOO_LATE <= step.least <= step.seconds / 2 for step in plan.values())


def test_every_test_that_waits_for_a_gpu_is_among_those_run():
    for path in (card.ROOT / "python_tests").glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        waits = re.findall(r"skipif\(not torch\.cuda\.is_available\(\)", text)
        assert text.count(f"pytest.{steps.MARK}") >= len(waits), path.name


def test_without_a_gpu_nothing_is_done(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2 and sanitize.main([]) == 2
    assert "torch sees none" in capsys.readouterr().err


def test_all_of_it_with_stand_ins(monkeypatch, driver, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(store, "RESULTS", driver.results)
    monkeypatch.setattr(store, "machine_name", lambda: "fake-gpu")
    monkeypatch.setattr(check, "rewrite_readme", lambda: None)
    three = {
        name: Step(lambda seconds, name=name: good(name), 9, name == "build") for name in ("build", "bits", "nodes")
    }
    monkeypatch.setattr(check, "plan", lambda worker: three)
    monkeypatch.setattr(check, "environment", lambda: {"commit": None})
    assert check.main(["--section", "bits"]) == 0
    said = capsys.readouterr()
    assert "measured: build, bits\n" in said.out, "a fresh machine has no extension"
    assert "set EARLYEXIT_COMMIT" in said.err
    monkeypatch.setattr(check, "plan", lambda worker: {"bits": Step(lambda seconds: Outcome([], "broke"), 9)})
    assert check.main(["--redo"]) == 1


SERVES = """
import json, os, sys, time
for line in sys.stdin:
    name = line.strip()
    print(json.dumps({"record": {"case": name}}), flush=True)
    if name == "dies":
        os._exit(7)
    if name == "hangs":
        time.sleep(600)
    failed = "RuntimeError: no" if name == "fails" else ""
    print(json.dumps({"end": failed, "fit": name not in ("fails", "spoils")}), flush=True)
"""


def test_a_process_that_dies_or_hangs_is_started_again():
    with Worker([sys.executable, "-c", SERVES]) as served:
        assert served.ask("one", 60) == Outcome([{"case": "one"}])
        first = served.process
        assert served.ask("two", 60).failed == "" and served.process is first
        assert served.ask("dies", 60) == Outcome(
            [{"case": "dies"}], "the process ended with status 7; its message is above"
        )
        assert served.ask("three", 60).failed == ""
        assert served.ask("fails", 60) == Outcome([{"case": "fails"}], "RuntimeError: no")
        assert served.process is None
        assert served.ask("spoils", 60).failed == "" and served.process is None
        found = served.ask("hangs", 3)
        assert found.failed == "stopped after 3 s" and served.process is None
        assert served.ask("four", 60) == Outcome([{"case": "four"}])
        last = served.process
    assert last.poll() is not None


def said_by(monkeypatch, tmp_path, name, records) -> tuple[bool, list[dict]]:
    """What the process writes for a section."""
    monkeypatch.setattr(Bench, "here", classmethod(lambda cls: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(SECTIONS, name, Section(records, 9))
    with open(tmp_path / "reply", "w") as reply:
        fit = worker.run(name, reply)
    return fit, [json.loads(line) for line in (tmp_path / "reply").read_text().splitlines()]


def test_a_section_ends_well_or_says_why(monkeypatch, tmp_path):
    def works(bench):
        yield {"case": "a"}

    def cannot(bench):
        yield {"case": "a"}
        raise NotMeasuredError("no text")

    def breaks(bench):
        yield {"case": "a"}
        raise RuntimeError("illegal memory access\nmore")

    def spoiled():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    fit, lines = said_by(monkeypatch, tmp_path, "good", works)
    assert fit and lines == [{"record": {"case": "a"}}, {"end": "", "fit": True}]
    fit, lines = said_by(monkeypatch, tmp_path, "some", cannot)
    assert fit and lines[1]["record"]["not_measured"] == "no text" and lines[1]["record"]["suite"] == "gpu_some"
    fit, lines = said_by(monkeypatch, tmp_path, "bad", breaks)
    assert not fit and lines[-1] == {"end": "RuntimeError: illegal memory access", "fit": False}
    monkeypatch.setattr(worker.gc, "collect", spoiled)
    fit, lines = said_by(monkeypatch, tmp_path, "good", works)
    assert not fit and lines[-1] == {"end": "", "fit": False}, "what was measured counts, and the process is replaced"


def test_the_process_measures_nothing_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with Worker() as served:
        found = served.ask("nodes", 300)
    assert found.failed == "" and found.records[0]["not_measured"] == "torch sees no CUDA device"


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "building\nearlyexit_kernels: EARLYEXIT_BUILD=auto: CPU and CUDA kernels\ndone", ""),
        (1, "nvcc fatal: unsupported", "the build ended with status 1: nvcc fatal: unsupported"),
        (None, "still at it", "the build took too long: still at it"),
    ],
)
def test_the_build_is_for_the_card_that_is_here(monkeypatch, code, output, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(steps, "run", lambda *arguments: asked.append(arguments) or (code, output))
    found = steps.build(60)
    assert found.failed == expected and found.records[0]["capability"] == "9.0"
    assert asked[0][2]["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert asked[0][2]["PATH"].startswith(f"{Path(sys.executable).parent}{os.pathsep}"), "where its ninja lies"
    assert ("CUDA kernels" in found.records[0]["said"]) == (code == 0) == (found.without == "")


def test_a_build_of_the_cpu_kernels_alone_is_no_failure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    said = "earlyexit_kernels: EARLYEXIT_BUILD=auto: CPU kernels only, because no CUDA toolkit with nvcc was found"
    monkeypatch.setattr(steps, "run", lambda *_: (0, said))
    assert (steps.build(60).failed, steps.build(60).without) == ("", "CUDA kernels")


@pytest.mark.parametrize(
    ("code", "output", "fields", "failed"),
    [
        (0, "....\n40 passed, 2 skipped in 3.1s", {"passed": 40, "skipped": 2}, ""),
        (
            1,
            "FAILED python_tests/test_gpu.py::test_a - x\n1 failed, 3 passed in 2s",
            {"failed": 1, "passed": 3, "refused": "1 tests fail: python_tests/test_gpu.py::test_a"},
            "",
        ),
        (2, "INTERNALERROR", {}, "pytest ended with status 2: INTERNALERROR"),
        (None, "....", {}, "pytest took too long: ...."),
    ],
)
def test_the_tests_are_counted(monkeypatch, code, output, fields, failed):
    asked = []
    monkeypatch.setattr(steps, "run", lambda *arguments: asked.append(arguments[0]) or (code, output))
    found = steps.tests(60)
    assert found.failed == failed and found.records[0].items() >= fields.items()
    assert any(path.endswith("test_gpu.py") for path in asked[0]) and "gpu" in asked[0]


def test_a_test_that_hangs_is_given_up(monkeypatch):
    asked = []
    monkeypatch.setattr(steps, "run", lambda *arguments: asked.append(arguments[0]) or (0, "1 passed in 1s"))
    for there in (True, False):
        monkeypatch.setattr(
            steps.importlib.util, "find_spec", lambda name, there=there: there or name == "pytest" or None
        )
        steps.tests(60)
    assert [("--timeout" in command, "-n" in command) for command in asked] == [(True, True), (False, False)]


def test_missing_pytest_is_said(monkeypatch):
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    assert steps.tests(60).records[0]["not_measured"] == "pytest isn't installed"


def test_a_command_is_stopped_in_time():
    code, output = steps.run([sys.executable, "-c", "print('x', flush=True); import time; time.sleep(600)"], 3, {})
    assert code is None and output == "x\n"
    assert steps.run([sys.executable, "-c", "import os; print(os.environ['A'])"], 60, {"A": "b"}) == (0, "b\n")


def test_sources_have_a_fingerprint(tmp_path):
    (tmp_path / "earlyexit_kernels").mkdir()
    source = tmp_path / "earlyexit_kernels" / "a.py"
    source.write_text("x = 1\n")
    first = card.fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("text\n")
    assert card.fingerprint(tmp_path) == first and len(first) == 12
    source.write_text("x = 2\n")
    assert card.fingerprint(tmp_path) != first


def test_nvidia_smi_is_asked_where_it_is(monkeypatch):
    answer = ", ".join(str(number) for number in range(len(card.ASKED)))
    monkeypatch.setattr(card.shutil, "which", lambda name: "there")
    run = {"returncode": 0, "stdout": f"{answer}\n"}
    monkeypatch.setattr(card.subprocess, "run", lambda *_, **__: SimpleNamespace(**run))
    assert card.smi()["driver_version"] == "0" and len(card.smi()) == len(card.ASKED)
    run["returncode"] = 9
    assert card.smi() == {}
    monkeypatch.setattr(card.shutil, "which", lambda name: None)
    assert card.smi() == {}


def test_the_cards_facts(gpu):
    assert card.facts()["capability"] == "9.0" and card.facts()["memory_gib"] == 1.0


def test_tables_say_what_was_reached_and_what_is_missing(driver):
    assert tables.bar_table(driver.results) == tables.TO_BE_MEASURED == tables.details_table(driver.results)
    ratio = {"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6, "baseline": "torch.compile", "dtype": "float16"}
    bar = "mean depth 6 over torch.compile, B 32"
    reached = good("a", **ratio, exits="uniform, 50 %", backend="triton", **goals.line(bar, ratio))
    missing = Outcome([head("gpu_b", "b", "grouped_mm") | {"not_measured": "no such thing"}])
    driver({"a": reached, "b": missing, "c": good("c", dtype="float16")})
    text = tables.bar_table(driver.results)
    (line,) = [line for line in text.splitlines() if bar in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [bar, "float16", "uniform, 50 %, by triton", "0.5 (0.4 to 0.6)", "0.56", "yes"]
    assert all(bar in text for bar in goals.GOALS) and "| not measured |" in text and "driver 580.1:" in text
    assert "- Not measured: b, grouped_mm: no such thing." in text
    details = tables.details_table(driver.results)
    assert "| c " in details and bar not in details
