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
CPU_ONLY = "earlyexit_kernels: EARLYEXIT_BUILD=auto: CPU kernels only, because no CUDA toolkit with nvcc was found"


def reads(**fields):
    return lambda code, output: ([header("gpu_a", "a", "ours", dtype="float16") | fields], "" if code == 0 else "broke")


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """``driver(steps, ...)``: run steps in an invented time; returns name -> how it ended."""

    def run(command, seconds, environment):
        driver.ran.append((command[0], seconds))
        clock["now"] += driver.takes
        return driver.codes.get(command[0], 0), BUILT if driver.built else CPU_ONLY

    def driver(names, *, minutes=9.0, redo=False, seconds=90, **reading):
        driver.ran.clear()
        read = reads(**reading)
        steps = {name: Step([name], seconds, read) for name in names}
        if "gpu_build" in steps:
            steps["gpu_build"] = Step(["gpu_build"], seconds, check.read_build, always=True)
        driver.summary = check.check(steps, tmp_path, minutes=minutes, redo=redo, now=lambda: clock["now"])
        return {name: how for how, ended in driver.summary.steps.items() for name in ended}

    clock = {"now": 0.0}
    driver.ran, driver.codes, driver.takes, driver.built, driver.sources = [], {}, 10.0, True, "aaaa"
    driver.results = tmp_path
    driver.document = lambda: next(iter(harness.documents(tmp_path).values()))
    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check, "card", lambda: {"gpu": "Fake", "nvidia_smi": {"driver_version": "580.1"}})
    monkeypatch.setattr(check, "fingerprint", lambda: driver.sources)
    return driver


def test_finished_steps_are_kept_and_those_never_run_come_first(driver):
    assert driver(["gpu_a", "gpu_b"]) == {"gpu_a": DONE, "gpu_b": DONE}
    facts = driver.document()["suites"]["gpu_a"]
    assert facts["finished"] and facts["sources"] == "aaaa" and facts["gpu"] == "Fake" and "commit" in facts
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


def test_steps_run_without_kernels_run_again_with_them(driver):
    driver.built = False
    assert driver(["gpu_build", "gpu_a"])["gpu_a"] == DONE
    assert driver(["gpu_build", "gpu_a"]) == {"gpu_build": DONE, "gpu_a": BEFORE}
    driver.built = True
    assert driver(["gpu_build", "gpu_a"])["gpu_a"] == DONE


def test_refusals_are_listed_at_the_end(driver):
    driver(["gpu_a"], refused="answers are 3 off")
    assert "refused: suite=gpu_a case=a engine=ours dtype=float16 refused=answers are 3 off" in str(driver.summary)


def test_records_of_a_suite_are_those_it_has_written(tmp_path):
    harness.save("gpu_x", [{"suite": "gpu_x", "case": "a"}], results=tmp_path)
    assert check.read_suite("gpu_x", tmp_path, 0, "") == ([{"suite": "gpu_x", "case": "a"}], "")
    records, failed = check.read_suite("gpu_x", tmp_path, -6, "more\nRuntimeError: CUDA error\n")
    assert (records, failed) == ([], "the process ended with status -6: RuntimeError: CUDA error")


def test_plan(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    plan = check.plan(tmp_path)
    assert list(plan)[:4] == ["gpu_build", "gpu_tests_captured", "gpu_tests_ops", "gpu_tests_eager"]
    assert list(plan)[4:] == list(check.SUITES) and plan["gpu_costs"].command[-1] == "gpu_costs"
    environment = plan["gpu_build"].environment
    assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert environment["PATH"].startswith(f"{Path(sys.executable).parent}{os.pathsep}"), "where its ninja lies"


def test_tests_that_need_a_gpu_are_marked_and_run():
    run = {ROOT / file for files in check.TESTS.values() for file in files}
    for path in (ROOT / "python_tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        waits = re.findall(r"skipif\(not torch\.cuda\.is_available\(\)", text)
        assert text.count("pytest.mark.gpu") >= len(waits), path.name
        assert (path in run) == ("pytest.mark.gpu" in text and path != Path(__file__)), path.name


@pytest.mark.parametrize(
    ("code", "output", "fields", "failed"),
    [
        (0, "....\n40 passed, 2 skipped in 3.1s", {"passed": 40, "skipped": 2}, ""),
        (1, "FAILED a.py::b - x\n1 failed, 3 passed in 2s", {"failed": 1, "refused": "1 tests fail: a.py::b"}, ""),
        (2, "INTERNALERROR", {}, "pytest ended with status 2: INTERNALERROR"),
        (
            None,
            "[gw0] [  1%] PASSED a.py::b\n[gw1] [ 12%] FAILED a.py::c[x-1] \na.py::d ERROR   [ 3%]\n",
            {"refused": "2 tests fail: a.py::c[x-1], a.py::d"},
            "pytest took too long: a.py::d ERROR   [ 3%]",
        ),
    ],
)
def test_test_results_are_counted(code, output, fields, failed):
    (record,), why = check.read_tests(code, output)
    assert why == failed and record.items() >= fields.items()


def test_a_build_that_fails_says_why():
    assert check.read_build(0, f"x\n{CPU_ONLY}\ny")[0][0]["printed"] == CPU_ONLY
    assert check.read_build(1, "nvcc fatal")[1] == "the build ended with status 1: nvcc fatal"


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


def test_facts_of_the_gpu(monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lost)
    assert "an illegal memory access" in check.card()["facts_failed"]
    answer = {"returncode": 0, "stdout": ", ".join(str(number) for number in range(len(check.SMI_FIELDS))) + "\n"}
    monkeypatch.setattr(check.shutil, "which", lambda name: "there")
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: SimpleNamespace(**answer))
    assert check.smi()["driver_version"] == "0"
    answer["returncode"] = 9
    assert check.smi() == {}


def test_fingerprint_of_sources(tmp_path):
    (tmp_path / "earlyexit_kernels").mkdir()
    source = tmp_path / "earlyexit_kernels" / "a.py"
    source.write_text("x = 1\n")
    first = check.fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("text\n")
    assert check.fingerprint(tmp_path) == first and len(first) == 12
    source.write_text("x = 2\n")
    assert check.fingerprint(tmp_path) != first


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


@pytest.fixture
def interruptible():
    """A process that ignores SIGINT, as one that a shell started in the background, passes that on to its processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.thorough
def test_command_is_stopped_in_time(interruptible):
    sleeps = "print('x', flush=True); import time; time.sleep(600)"
    code, output = check.run([sys.executable, "-c", sleeps], 6, {})
    assert code is None and output.startswith("x\n") and "KeyboardInterrupt" in output, "it may say what it knows"
    deaf = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {sleeps}"
    assert check.run([sys.executable, "-c", deaf], 6, {}) == (None, "x\n")
    assert check.run([sys.executable, "-c", "import os; print(os.environ['A'])"], 60, {"A": "b"}) == (0, "b\n")


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
check.card = dict
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
