"""``make gpu-check``: which steps it runs, keeps and repeats, and how it handles failures and time limits."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.gpu_checks import document, good

from benchmarks import goals, harness
from benchmarks.gpu import card, check, steps, tables, worker
from benchmarks.gpu.bench import Bench, header
from benchmarks.gpu.check import MIN_SECONDS, Step
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.gpu.steps import Outcome
from benchmarks.machine import NotMeasuredError


def test_finished_steps_are_kept_and_not_repeated(driver):
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
    assert driver({"a": good("a"), "c": good("c")}).done == ["a", "c"], "other sources are measured again"


def test_steps_that_were_never_run_come_first(driver):
    driver({"a": good("a"), "b": Outcome([], "broke")})
    driver.sources = "bbbb"
    wanted = {"build": good("build"), "a": good("a"), "b": good("b"), "c": good("c")}
    driver(wanted, always=("build",))
    assert [name for name, _ in driver.ran] == ["build", "c", "a", "b"]


def test_an_error_of_the_driver_or_of_the_facts_ends_no_run(driver, monkeypatch, capsys):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(card, "facts", lost)
    summary = driver({"a": lambda: lost(), "b": good("b")})
    assert summary.failed == ["a"] and summary.done == ["b"]
    assert "an illegal memory access" in document(driver)["suites"]["gpu_b"]["facts_failed"]
    assert "an illegal memory access" in document(driver)["records"][0]["not_measured"]


def test_failed_steps_keep_their_records_and_run_again(driver):
    partly = Outcome(good("a").records, "the process ended with status -6; its message is above")
    summary = driver({"a": partly, "b": good("b")})
    assert summary.failed == ["a"] and summary.done == ["b"]
    first, rest = document(driver)["records"][:2]
    assert first["median_ms"] == 1.0 and "status -6" in rest["not_measured"]
    assert "failed, will be tried again: a" in str(summary)
    assert driver({"a": good("a"), "b": good("b")}).done == ["a"]
    assert len(document(driver)["records"]) == 2


def test_time_limits(driver):
    summary = driver({name: good(name) for name in "abcd"}, takes=50, minutes=2)
    assert summary.done == ["a", "b"] and summary.late == ["c", "d"]
    assert driver.ran == [("a", 100), ("b", 70)], "no step is given more than is left"
    assert "left for the next run: c, d" in str(summary)
    assert driver({name: good(name) for name in "efg"}, takes=50, minutes=2, least=71).done == ["e"]


def test_steps_measured_without_kernels_run_again_with_them(driver):
    lacking, built = Outcome(good("build").records, without="CUDA kernels"), good("build")
    for expected in ("done", "there"):
        summary = driver({"build": lacking, "a": good("a")}, always=("build",))
        assert "a" in getattr(summary, expected)
    assert document(driver)["suites"]["gpu_a"]["sources"] == "aaaa without CUDA kernels"
    for expected in ("done", "there"):
        assert "a" in getattr(driver({"build": built, "a": good("a")}, always=("build",)), expected)


def test_refusals_are_listed_at_the_end(driver, capsys):
    wrong = Outcome([header("gpu_a", "a", "ours") | {"refused": "answers are 3 off"}])
    summary = driver({"a": wrong, "b": good("b")})
    line = "refused: suite=gpu_a case=a engine=ours refused=answers are 3 off"
    assert line in str(summary) and line.removeprefix("refused: ") in capsys.readouterr().out


def test_plan():
    plan = check.plan()
    assert set(plan) == {"build", *steps.TESTS, *SECTIONS} and plan["build"].always
    assert list(plan)[:4] == ["build", "costs", "tests_first", "whole_float16_1"]
    assert all(MIN_SECONDS <= step.least <= step.seconds / 2 for step in plan.values())


@pytest.mark.parametrize(("failed", "marked", "broken"), [(True, True, True), (True, True, False), (True, False, True)])
def test_a_failure_that_breaks_the_device_ends_the_test_process(monkeypatch, request, failed, marked, broken):
    """pytest-xdist then names the test and goes on in another process, where the device works."""

    def synchronize():
        if broken:
            raise RuntimeError("an illegal memory access")

    def leave(status):
        raise SystemExit(status)

    plugin = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(plugin.os, "_exit", leave)
    item = SimpleNamespace(get_closest_marker=lambda name: marked or None)
    report = SimpleNamespace(get_result=lambda: SimpleNamespace(failed=failed))
    run = plugin.pytest_runtest_makereport(item, None)
    next(run)
    with pytest.raises(SystemExit if marked and broken else StopIteration) as caught:
        run.send(report)
    assert caught.type is StopIteration or caught.value.code == plugin.DEVICE_LOST


def test_tests_that_need_a_gpu_are_marked_and_run():
    run = {card.ROOT / word for words in steps.TESTS.values() for word in words if word.endswith(".py")}
    for path in (card.ROOT / "python_tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        waits = re.findall(r"skipif\(not torch\.cuda\.is_available\(\)", text)
        assert text.count("pytest.mark.gpu") >= len(waits), path.name
        assert (path in run) == ("pytest.mark.gpu" in text and path != Path(__file__)), path.name


def test_without_a_gpu_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    assert "torch sees none" in capsys.readouterr().err


def test_command_runs_the_chosen_steps(monkeypatch, driver, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "RESULTS", driver.results)
    monkeypatch.setattr(harness, "machine_name", lambda: "fake-gpu")
    rewritten = []
    monkeypatch.setattr(check, "rewrite_documents", lambda: rewritten.append(True))
    three = {
        name: Step(lambda seconds, name=name: good(name), 9, name == "build")
        for name in ("build", "costs", "exit_step")
    }
    monkeypatch.setattr(check, "plan", lambda: three)
    monkeypatch.setattr(check, "environment", lambda: {"commit": None})
    assert check.main(["--section", "costs"]) == 0 and rewritten == [True]
    printed = capsys.readouterr()
    assert "measured: build, costs\n" in printed.out, "a fresh machine has no extension"
    assert "set EARLYEXIT_COMMIT" in printed.err
    elsewhere = tmp_path / "elsewhere"
    assert check.main(["--section", "costs", "--results", str(elsewhere)]) == 0 and rewritten == [True]
    assert (elsewhere / "fake-gpu.json").is_file(), "records are brought back in the folder that was asked for"
    monkeypatch.setattr(check, "plan", lambda: {"costs": Step(lambda seconds: Outcome([], "broke"), 9)})
    assert check.main(["--redo"]) == 1


def works(bench):
    yield {"case": "a"}


def cannot(bench):
    yield {"case": "a"}
    raise NotMeasuredError("no text")


def breaks(bench):
    yield {"case": "a"}
    raise RuntimeError("illegal memory access\nmore")


@pytest.mark.parametrize(("records", "after"), [(works, {}), (cannot, {"not_measured": "no text"}), (breaks, None)])
def test_worker_writes_records_as_they_come(monkeypatch, tmp_path, records, after):
    monkeypatch.setattr(Bench, "here", classmethod(lambda cls: None))
    monkeypatch.setitem(SECTIONS, "some", Section(records, 9))
    with contextlib.nullcontext() if after is not None else pytest.raises(RuntimeError, match="illegal memory access"):
        worker.work("some", tmp_path / "records")
    first, *rest = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert first == {"case": "a"}
    assert len(rest) == bool(after) and all(record.items() >= after.items() for record in rest)


@pytest.mark.parametrize(
    ("code", "written", "failed"),
    [
        (0, '{"case": "a"}\n', ""),
        (-6, '{"case": "a"}\n{"ca', "the process ended with status -6: RuntimeError: CUDA error"),
        (None, '{"case": "a"}\n', "the process took too long: RuntimeError: CUDA error"),
    ],
)
def test_records_of_a_section_that_ends_early_count(monkeypatch, code, written, failed):
    def run(command, seconds, environment):
        Path(command[-1]).write_text(written)
        return code, "more\nRuntimeError: CUDA error\n"

    monkeypatch.setattr(steps, "run", run)
    assert steps.section("costs", 60) == Outcome([{"case": "a"}], failed)


@pytest.mark.thorough
def test_section_measures_nothing_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    outcome = steps.section("costs", 300)
    assert outcome.failed == "" and outcome.records[0]["not_measured"] == "torch sees no CUDA device"


CPU_ONLY = "earlyexit_kernels: EARLYEXIT_BUILD=auto: CPU kernels only, because no CUDA toolkit with nvcc was found"


@pytest.mark.parametrize(
    ("code", "output", "failed", "without"),
    [
        (0, "building\nearlyexit_kernels: EARLYEXIT_BUILD=auto: CPU and CUDA kernels\ndone", "", ""),
        (0, CPU_ONLY, "", "CUDA kernels"),
        (0, f"earlyexit_kernels: EARLYEXIT_BUILD=auto: CPU and CUDA kernels\n{CPU_ONLY}", "", "CUDA kernels"),
        (1, "nvcc fatal: unsupported", "the build ended with status 1: nvcc fatal: unsupported", "CUDA kernels"),
        (None, "unfinished", "the build took too long: unfinished", "CUDA kernels"),
    ],
)
def test_build_is_for_this_gpu(monkeypatch, code, output, failed, without):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(steps, "run", lambda *arguments: asked.append(arguments) or (code, output))
    found = steps.build(60)
    assert (found.failed, found.without) == (failed, without) and found.records[0]["capability"] == "9.0"
    assert asked[0][2]["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert asked[0][2]["PATH"].startswith(f"{Path(sys.executable).parent}{os.pathsep}"), "where its ninja lies"


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
        (
            None,
            "[gw0] [  1%] PASSED a.py::b\n[gw1] [ 12%] FAILED a.py::c[x-1] \na.py::d ERROR   [ 3%]\n",
            {"refused": "2 tests fail: a.py::c[x-1], a.py::d"},
            "pytest took too long: a.py::d ERROR   [ 3%]",
        ),
    ],
)
def test_test_results_are_counted(monkeypatch, code, output, fields, failed):
    asked = []
    monkeypatch.setattr(steps, "run", lambda *arguments: asked.append(arguments[0]) or (code, output))
    found = steps.tests("tests_captured", 60)
    assert found.failed == failed and found.records[0].items() >= fields.items()
    assert any(path.endswith("test_gpu.py") for path in asked[0]) and "gpu" in asked[0]


def test_hanging_tests_are_stopped_if_pytest_timeout_is_installed(monkeypatch):
    asked = []
    monkeypatch.setattr(steps, "run", lambda *arguments: asked.append(arguments[0]) or (0, "1 passed in 1s"))
    for there in (True, False):
        monkeypatch.setattr(
            steps.importlib.util, "find_spec", lambda name, there=there: there or name == "pytest" or None
        )
        steps.tests("tests_ops", 60)
    assert [("--timeout" in command, "-n" in command) for command in asked] == [(True, True), (False, False)]
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    assert steps.tests("tests_ops", 60).records[0]["not_measured"] == "pytest is not installed"


@pytest.fixture
def interruptible():
    """A process that ignores SIGINT, as one that a shell started in the background, passes that on to its processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.thorough
def test_command_is_stopped_in_time(interruptible):
    sleeps = "print('x', flush=True); import time; time.sleep(600)"
    code, output = steps.run([sys.executable, "-c", sleeps], 6, {})
    assert code is None and output.startswith("x\n") and "KeyboardInterrupt" in output, "it may say what it knows"
    deaf = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {sleeps}"
    assert steps.run([sys.executable, "-c", deaf], 6, {}) == (None, "x\n")
    assert steps.run([sys.executable, "-c", "import os; print(os.environ['A'])"], 60, {"A": "b"}) == (0, "b\n")


def test_fingerprint_of_sources(tmp_path):
    (tmp_path / "earlyexit_kernels").mkdir()
    source = tmp_path / "earlyexit_kernels" / "a.py"
    source.write_text("x = 1\n")
    first = card.fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("text\n")
    assert card.fingerprint(tmp_path) == first and len(first) == 12
    source.write_text("x = 2\n")
    assert card.fingerprint(tmp_path) != first


def test_facts_of_the_gpu(gpu, monkeypatch):
    assert card.facts()["capability"] == "9.0" and card.facts()["memory_gib"] == 1.0
    answer = ", ".join(str(number) for number in range(len(card.SMI_FIELDS)))
    run = {"returncode": 0, "stdout": f"{answer}\n"}
    monkeypatch.setattr(card.shutil, "which", lambda name: "there")
    monkeypatch.setattr(card.subprocess, "run", lambda *_, **__: SimpleNamespace(**run))
    assert card.smi()["driver_version"] == "0" and len(card.smi()) == len(card.SMI_FIELDS)
    run["returncode"] = 9
    assert card.smi() == {}
    monkeypatch.setattr(card.shutil, "which", lambda name: None)
    assert card.smi() == {}


def test_tables_show_goals_and_what_is_missing(driver):
    assert tables.goals_table(driver.results) == tables.TO_BE_MEASURED == tables.details_table(driver.results)
    ratio = {"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6, "baseline": "torch.compile", "dtype": "float16"}
    goal = "mean depth 6 over torch.compile, B 32"
    reached = good("a", **ratio, exits="uniform, 50 %", backend="triton", **goals.gpu_goal(goal, ratio))
    missing = Outcome([header("gpu_b", "b", "cuBLAS") | {"not_measured": "no such thing"}])
    driver({"a": reached, "b": missing, "c": good("c", dtype="float16")})
    text = tables.goals_table(driver.results)
    (line,) = [line for line in text.splitlines() if goal in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [goal, "float16", "uniform, 50 %, by triton", "0.5 (0.4 to 0.6)", "0.56", "yes"]
    assert all(name in text for name in goals.GPU) and "| not measured |" in text and "driver 580.1:" in text
    assert "- Not measured: cuBLAS (b): no such thing." in text
    details = tables.details_table(driver.results)
    assert "| c " in details and goal not in details
