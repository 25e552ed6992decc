"""The subprocesses of ``make gpu-check``: the build, the tests, and the sections that measure."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.bench import header
from benchmarks.gpu.card import ROOT
from benchmarks.harness import Record

#: Step -> the arguments of pytest that choose its tests. The first ones are a few of every kind, for the first minutes.
TESTS: dict[str, tuple[str, ...]] = {
    "tests_first": (
        "python_tests/gpu/test_gpu.py",
        *("-k", "every_family or half_precision or stale or (every_criterion and (entropy or patience))"),
    ),
    "tests_captured": ("python_tests/gpu/test_gpu.py",),
    "tests_ops": ("python_tests/gpu/test_gpu_ops.py",),
    "tests_eager": ("python_tests/gpu/test_gpu_eager.py", "python_tests/core/test_fixed_depth_graphs.py"),
}
#: In the last line of setup.py if it builds everything; before it may be what did not compile.
CUDA_BUILT = "CPU and CUDA kernels"
TEST_PROCESSES = 8
#: Seconds after which a hanging test is stopped, if pytest-timeout is installed.
TEST_SECONDS = 90
#: Seconds that an interrupted command has to say what it knows, before it is killed.
GRACE_SECONDS = 15
#: How pytest -v names a test that failed: as it goes, alone or with pytest-xdist, and in its summary.
BROKEN = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (\S+)|(\S+::\S+) (?:FAILED|ERROR)|(?:FAILED|ERROR) (\S+))", re.MULTILINE
)
TAIL = 12


class Outcome(NamedTuple):
    """Result of a step.

    Attributes:
        records: those it yielded.
        failed: why it did not finish, or empty.
        without: what later steps lack, or empty; they run again once it is there.
    """

    records: Sequence[Record]
    failed: str = ""
    without: str = ""


def build(seconds: float) -> Outcome:
    """Compile the extension in place for this machine's GPU."""
    major, minor = torch.cuda.get_device_capability(0)
    # ninja is installed beside the interpreter, which may not be on PATH
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    jobs = str(os.cpu_count() or 1)
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": jobs, "PATH": path}
    code, output = run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, environment)
    lines = [line for line in output.splitlines() if line.startswith("earlyexit_kernels: ")]
    printed = lines[-1] if lines else ""
    record = header("gpu_build", "extension", "build") | {"printed": printed, "capability": f"{major}.{minor}"}
    without = "" if code == 0 and CUDA_BUILT in printed else "CUDA kernels"
    if code == 0:
        return Outcome([record], without=without)
    print(output, file=sys.stderr)
    return Outcome([record], f"the build {_ending(code)}: {_tail(output, 1)}", without)


def tests(step: str, seconds: float) -> Outcome:
    """Run tests marked ``gpu``; those that failed are named also where the time runs out.

    Args:
        step: of `TESTS`.
        seconds: at most.
    """
    record = header(f"gpu_{step}", "tests on the GPU", "pytest")
    if importlib.util.find_spec("pytest") is None:
        return Outcome([record | {"not_measured": "pytest is not installed"}])
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", "-ra", *TESTS[step]]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        # method thread ends the process; a process that waits for the device does not handle a signal
        command += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    code, output = run(command, seconds, {"PYTHONUNBUFFERED": "1"})
    counted = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", _tail(output, 1))}
    record |= counted
    if code == 0:
        return Outcome([record])
    print(output, file=sys.stderr)
    broken = sorted({next(filter(None, names)) for names in BROKEN.findall(output)})
    if broken:
        record |= {"refused": f"{len(broken)} tests fail: {', '.join(broken)}"}
    return Outcome([record], "" if code == 1 else f"pytest {_ending(code)}: {_tail(output, 1)}")


def section(name: str, seconds: float) -> Outcome:
    """Run a section of `SECTIONS`; the records that it has written count also where it fails or the time runs out."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "records"
        command = [sys.executable, "-m", "benchmarks.gpu.worker", name, str(into)]
        code, output = run(command, seconds, {"TQDM_DISABLE": "1"})
        # without a line that was not finished
        lines = into.read_text(encoding="utf-8").rpartition("\n")[0].splitlines() if into.is_file() else []
    records = [json.loads(line) for line in lines]
    if code == 0:
        return Outcome(records)
    print(output, file=sys.stderr)
    return Outcome(records, f"the process {_ending(code)}: {_tail(output, 1)}")


def run(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Run a command; return its exit status, None if the time ran out, and its output.

    Near the end of the time it is interrupted, as by Ctrl-C, and killed if that does not end it. An interrupt of this
    process kills it.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        return _outcome(process, seconds)
    except BaseException:  # an interrupt, which does not reach the session of the process
        _end(process, signal.SIGKILL)
        raise


def _outcome(process: subprocess.Popen[str], seconds: float) -> tuple[int | None, str]:
    try:
        output, _ = process.communicate(timeout=max(seconds - GRACE_SECONDS, seconds / 2))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        _end(process, signal.SIGINT)
    try:
        return None, process.communicate(timeout=min(GRACE_SECONDS, seconds / 2))[0]
    except subprocess.TimeoutExpired:
        _end(process, signal.SIGKILL)
        return None, process.communicate()[0]


def _end(process: subprocess.Popen[str], by: int) -> None:
    """Send a signal to a process that leads a session, and to all processes it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, by)


def _ending(code: int | None) -> str:
    return "took too long" if code is None else f"ended with status {code}"


def _tail(output: str, lines: int = TAIL) -> str:
    return "\n".join([line for line in output.splitlines() if line.strip()][-lines:])
