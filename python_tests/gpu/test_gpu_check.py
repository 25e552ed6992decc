"""``make gpu-check``: which steps it runs, keeps and repeats, and how it handles failures, limits and interrupts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import goals, harness, tables
from benchmarks.gpu import check
from benchmarks.gpu.bench import header
from benchmarks.gpu.check import BEFORE, DONE, FAILED, LATE, ROOT, Step

BUILT = f"earlyexit_kernels: EARLYEXIT_BUILD=auto: {check.CUDA_BUILT}"


def reads(**fields):
    return lambda code, output: ([header("gpu_a", "a", "ours", dtype="float16") | fields], "" if code == 0 else "broke")


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """``driver(steps, ...)``: run steps in an invented time; returns name -> how it ended."""

    def run(command, seconds, environment):
        driver.ran.append((command[0], seconds))
        clock["now"] += driver.takes
        return driver.codes.get(command[0], 0), BUILT

    def driver(names, *, minutes=9.0, redo=False, seconds=90, **reading):
        driver.ran.clear()
        read = reads(**reading)
        steps = {name: Step([name], seconds, read) for name in names}
        if "gpu_build" in steps:
            steps["gpu_build"] = Step(["gpu_build"], seconds, check.read_build, always=True)
        driver.summary = check.check(steps, tmp_path, minutes=minutes, redo=redo, now=lambda: clock["now"])
        return {name: how for how, ended in driver.summary.steps.items() for name in ended}

    clock = {"now": 0.0}
    driver.ran, driver.codes, driver.takes, driver.sources = [], {}, 10.0, "aaaa"
    driver.results = tmp_path
    driver.document = lambda: next(iter(harness.documents(tmp_path).values()))
    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check, "smi", lambda: {"driver_version": "580.1"})
    monkeypatch.setattr(check, "fingerprint", lambda: driver.sources)
    return driver


def test_finished_steps_are_kept_and_those_never_run_come_first(driver):
    assert driver(["gpu_a", "gpu_b"]) == {"gpu_a": DONE, "gpu_b": DONE}
    facts = driver.document()["suites"]["gpu_a"]
    assert facts["finished"] and facts["sources"] == "aaaa" and facts["nvidia_smi"] and "commit" in facts
    assert driver(["gpu_a", "gpu_b", "gpu_c"]) == {"gpu_a": BEFORE, "gpu_b": BEFORE, "gpu_c": DONE}
    assert driver(["gpu_a"], redo=True) == {"gpu_a": DONE}
    driver.sources = "bbbb"
    assert set(driver(["gpu_build", "gpu_a", "gpu_d"]).values()) == {DONE}, "other sources are measured again"
    assert [name for name, _ in driver.ran] == ["gpu_build", "gpu_d", "gpu_a"]


def test_failed_steps_are_named_and_run_again(driver):
    driver.codes = {"gpu_a": 1}
    assert driver(["gpu_a", "gpu_b"]) == {"gpu_a": FAILED, "gpu_b": DONE}
    assert [r["not_measured"] for r in driver.document()["records"] if "not_measured" in r] == ["broke"]
    assert "failed, will be tried again: gpu_a" in str(driver.summary)
    driver.codes = {}
    assert driver(["gpu_a", "gpu_b"]) == {"gpu_a": DONE, "gpu_b": BEFORE}
    assert not [r for r in driver.document()["records"] if "not_measured" in r]


def test_time_limits(driver):
    driver.takes = 50
    assert driver(["gpu_a", "gpu_b", "gpu_c"], minutes=2) == {"gpu_a": DONE, "gpu_b": DONE, "gpu_c": LATE}
    assert driver.ran == [("gpu_a", 90), ("gpu_b", 70)], "no step is given more than is left"
    assert f"{LATE}: gpu_c" in str(driver.summary)


def test_tests_that_need_a_gpu_are_marked_and_run():
    run = {ROOT / file for files in check.TESTS.values() for file in files}
    for path in (ROOT / "python_tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        waits = re.findall(r"skipif\(not torch\.cuda\.is_available\(\)", text)
        assert text.count("pytest.mark.gpu") >= len(waits), path.name
        assert (path in run) == ("pytest.mark.gpu" in text and path != Path(__file__)), path.name


def test_test_results_are_counted():
    """Of a process that ends, and of one that is stopped."""
    (record,), why = check.read_tests(1, "FAILED a.py::b - x\n1 failed, 3 passed in 2s")
    assert not why and record.items() >= {"failed": 1, "passed": 3, "refused": "1 tests fail: a.py::b"}.items()
    (record,), why = check.read_tests(None, "[gw1] [ 12%] FAILED a.py::c[x-1] \na.py::d ERROR   [ 3%]\n")
    assert record["refused"] == "2 tests fail: a.py::c[x-1], a.py::d" and why.startswith("pytest took too long")


def test_without_a_gpu_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2 and "torch sees none" in capsys.readouterr().err


def test_command_runs_the_chosen_steps(monkeypatch, driver, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "environment", lambda: {"commit": None})
    steps = {name: Step([name], 90, reads(), always=name == "gpu_other") for name in ("gpu_other", *check.SUITES)}
    monkeypatch.setattr(check, "plan", lambda results: steps)
    elsewhere = tmp_path / "elsewhere"
    assert check.main(["--step", "gpu_costs", "--results", str(elsewhere)]) == 0
    printed = capsys.readouterr()
    assert "measured: gpu_other, gpu_costs\n" in printed.out and "set EARLYEXIT_COMMIT" in printed.err
    assert len(list(elsewhere.glob("*.json"))) == 1
    driver.codes = {"gpu_costs": 1}
    assert check.main(["--step", "gpu_costs", "--redo", "--results", str(elsewhere)]) == 1


def test_tables_show_goals_and_what_is_missing(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Fake")
    gpu, details = tables.TABLES["gpu"], tables.TABLES["gpu_details"]
    assert gpu(driver.results) == tables.NO_GPU == details(driver.results)
    ratio = {"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6, "baseline": "torch.compile"}
    goal = "mean depth 6 over torch.compile, B 32"
    driver(["gpu_a"], **ratio, exits="uniform, 50 %", backend="triton", **goals.gpu_goal(goal, ratio))
    driver(["gpu_b"], not_measured="no such thing")
    driver(["gpu_c"], median_ms=1.0)
    text = gpu(driver.results)
    (line,) = [line for line in text.splitlines() if goal in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [goal, "float16", "uniform, 50 %, by triton", "0.5 (0.4 to 0.6)", "0.56", "yes"]
    assert all(name in text for name in goals.GPU) and "| not measured |" in text and "driver 580.1:" in text
    assert "- Not measured: ours, float16: no such thing." in text
    assert "1000" in details(driver.results) and goal not in details(driver.results)


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


#: A command whose second step sleeps in a process of its own, in a session of its own.
ASLEEP = """
import sys
from pathlib import Path

import torch

from benchmarks.gpu import check
from benchmarks.gpu.check import Step

results = Path(sys.argv[1])
sleep = f"import os, time; open({str(results / 'process')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
torch.cuda.is_available = lambda: True
check.smi = dict
build = Step([sys.executable, "-c", "0"], 60, check.read_build, always=True)
check.plan = lambda results: {"gpu_build": build, "gpu_tests_ops": Step([sys.executable, "-c", sleep], 300)}
sys.exit(check.main(["--step", "gpu_tests_ops", "--results", str(results)]))
"""


def wait_for(happened, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.05)
    assert happened()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_keeps_finished_steps_and_leaves_no_process(tmp_path, by):
    """A process that went on would use the GPU while the next run measures.

    The command starts as one in the background of a shell, with SIGINT ignored.
    """
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", ASLEEP, str(tmp_path)]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (tmp_path / "process").is_file() and (tmp_path / "process").read_text(), 400)
        step = int((tmp_path / "process").read_text())
        run.send_signal(by)
        _, said = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == check.INTERRUPTED
    assert said.splitlines()[-1] == "interrupted; finished steps are kept, run the command again for the others"
    wait_for(lambda: not is_running(step), 10)
    (results,) = tmp_path.glob("*.json")
    assert '"gpu_build"' in results.read_text() and "gpu_tests_ops" not in results.read_text()
