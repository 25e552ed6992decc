"""The subprocesses of ``make gpu-check``: the build, the tests, and the worker that measures."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.bench import header
from benchmarks.gpu.card import ROOT
from benchmarks.harness import Record

#: Step -> the arguments of pytest that choose its tests. The first ones are a few of every kind, for the first minutes.
TESTS: dict[str, tuple[str, ...]] = {
    "tests_first": (
        "python_tests/gpu/test_gpu.py",
        *("-k", "every_family or half_precision or equal_bits or (supported_criterion and (entropy or patience))"),
    ),
    "tests_graph": ("python_tests/gpu/test_gpu.py",),
    "tests_ops": ("python_tests/gpu/test_gpu_ops.py",),
    "tests_eager": ("python_tests/gpu/test_gpu_eager.py", "python_tests/engine/test_fixed_depth_graphs.py"),
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


class Worker:
    """The process that measures, started at the first request, and again after one that ended.

    Args:
        command: serves as `benchmarks.gpu.worker` does.
    """

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu.worker")) -> None:
        self.command = command
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def ask(self, name: str, seconds: float) -> Outcome:
        """Run a section.

        Args:
            name: of `SECTIONS`.
            seconds: it is stopped after so many.
        """
        if self.process is None:
            self._start()
        process, end = self.process, time.monotonic() + seconds
        assert process is not None and process.stdin is not None
        records: list[Record] = []
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.stop()
                return Outcome(records, f"stopped after {seconds:.0f} s")
            if not line:
                self.process = None
                return Outcome(records, f"the process ended with status {process.wait()}; its message is above")
            message = json.loads(line)
            if "record" in message:
                records.append(message["record"])
                continue
            if not message["fit"]:
                self.stop()
            return Outcome(records, message["end"])

    def stop(self) -> None:
        """Kill the process."""
        if self.process is not None:
            _end(self.process, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _start(self) -> None:
        self.lines = queue.Queue()
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={**os.environ, "TQDM_DISABLE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=_forward, args=(self.process.stdout, self.lines), daemon=True).start()


def _forward(stdout: Any, lines: queue.Queue[str]) -> None:
    """Forward lines as they come, and an empty one at the end."""
    for line in stdout:
        lines.put(line)
    lines.put("")
