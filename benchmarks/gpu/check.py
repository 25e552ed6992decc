"""``make gpu-check``: builds for this GPU, runs the tests marked ``gpu``, then the suites, within ten minutes.

Each step is a process of its own, since a failed kernel leaves the GPU in an unknown state. Its records are in
results/<gpu>.json when it ends. Run again, it continues with the steps that were not finished with these sources.
Requires torch with CUDA, triton and transformers; what else is missing (nvcc, pytest, text data) is recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import harness, tables
from benchmarks.gpu.bench import header
from benchmarks.gpu.suites import SUITES
from benchmarks.harness import Record
from benchmarks.readme import rewrite
from earlyexit_kernels.tuning.tables import environment

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 10.0
#: Exit status after Ctrl-C or SIGTERM.
INTERRUPTED = 130
#: Seconds that an interrupted command has to say what it knows, before it is killed.
GRACE_SECONDS = 15
#: In the last line of setup.py if it builds everything; before it may be what did not compile.
CUDA_BUILT = "CPU and CUDA kernels"
#: Files that the numbers depend on.
SOURCES = ("earlyexit_kernels/**/*.py", "csrc/**/*", "benchmarks/**/*.py", "setup.py")
SMI_FIELDS = "driver_version pstate clocks.sm clocks.mem power.draw power.limit temperature.gpu".split()
TEST_PROCESSES = 8
#: How pytest -v names a test that failed: as it goes, alone or with pytest-xdist, and in its summary.
BROKEN = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (\S+)|(\S+::\S+) (?:FAILED|ERROR)|(?:FAILED|ERROR) (\S+))", re.MULTILINE
)
#: Exit status of a command, None if its time ran out, and its output -> its records, and why it did not finish.
Reading = Callable[[int | None, str], tuple[list[Record], str]]


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        command: its arguments.
        seconds: at most; it is not started with less than a third of them left.
        read: what its output says; default: that of a suite, which writes its own records.
        environment: variables beside those of this process.
        always: also if it is done, or other steps were asked for.
    """

    command: Sequence[str]
    seconds: float
    read: Reading | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    always: bool = False


def plan(results: Path) -> dict[str, Step]:
    """Return all steps in order."""
    python, capability = sys.executable, ".".join(map(str, torch.cuda.get_device_capability(0)))
    # ninja is installed beside the interpreter, which may not be on PATH
    path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", os.defpath)])
    build = {"TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": str(os.cpu_count() or 1), "PATH": path}
    pytest = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", "-ra"]
    if importlib.util.find_spec("xdist") is not None:
        pytest += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    suite = [python, "-m", "benchmarks.run", "--results", str(results), "--suite"]
    return {
        "gpu_build": Step([python, "setup.py", "build_ext", "--inplace"], 300, read_build, build, always=True),
        **{f"gpu_{name}": Step([*pytest, *files], 150, read_tests) for name, files in TESTS.items()},
        **{name: Step([*suite, name], 120, environment={"TQDM_DISABLE": "1"}) for name in SUITES},
    }


#: Step -> its files of tests.
TESTS = {
    "tests_captured": ("python_tests/gpu/test_gpu.py",),
    "tests_ops": ("python_tests/gpu/test_gpu_ops.py",),
    "tests_eager": ("python_tests/gpu/test_gpu_eager.py", "python_tests/core/test_fixed_depth_graphs.py"),
}


def read_build(code: int | None, output: str) -> tuple[list[Record], str]:
    """Return what was built; without CUDA kernels the other steps go on with Triton's."""
    printed = ([line for line in output.splitlines() if line.startswith("earlyexit_kernels: ")] or [""])[-1]
    record = header("gpu_build", "extension", "build") | {"printed": printed}
    return [record], "" if code == 0 else f"the build {ending(code, output)}"


def read_tests(code: int | None, output: str) -> tuple[list[Record], str]:
    """Return how many tests passed, and name those that failed, also where the time ran out."""
    record = header("gpu_tests", "tests on the GPU", "pytest")
    if importlib.util.find_spec("pytest") is None:
        return [record | {"not_measured": "pytest is not installed"}], ""
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output.rstrip().rpartition("\n")[2])
    record |= {word: int(n) for n, word in counts}
    broken = sorted({next(filter(None, names)) for names in BROKEN.findall(output)})
    record |= {"refused": f"{len(broken)} tests fail: {', '.join(broken)}"} if broken else {}
    return [record], "" if code in (0, 1) else f"pytest {ending(code, output)}"


def read_suite(name: str, results: Path, code: int | None, output: str) -> tuple[list[Record], str]:
    """Return the records that a suite has written."""
    if code != 0:
        return [], f"the process {ending(code, output)}"
    records = harness.documents(results)[harness.machine_name()]["records"]
    return [record for record in records if record["suite"] == name], ""


def ending(code: int | None, output: str) -> str:
    """Return how a command ended, with its last line."""
    last = output.rstrip().rpartition("\n")[2]
    return f"{'took too long' if code is None else f'ended with status {code}'}: {last}"


@dataclass
class Summary:
    """The names of the steps by how they ended, and the refused records."""

    steps: dict[str, list[str]] = field(default_factory=dict)
    refused: list[Record] = field(default_factory=list)

    def add(self, how: str, name: str) -> None:
        """Add a step."""
        self.steps.setdefault(how, []).append(name)

    def __str__(self) -> str:
        lines = [f"{how}: {', '.join(names)}" for how, names in self.steps.items()]
        return "\n".join([*lines, *(f"refused: {harness.line_of(record)}" for record in self.refused)])


DONE, BEFORE, FAILED, LATE = "measured", "measured before", "failed, will be tried again", "left for the next run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; return 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["gpu_build", *(f"gpu_{name}" for name in TESTS), *SUITES]
    parser.add_argument("--step", dest="only", choices=names, action="append", help="only these; default: all")
    parser.add_argument("--redo", action="store_true", help="also steps finished before with these sources")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="another folder for the JSON; the documents stay then")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: expected an NVIDIA GPU, torch sees none; nothing was measured", file=sys.stderr)
        return 2
    if environment()["commit"] is None:
        print("note: not a git checkout; set EARLYEXIT_COMMIT, or the results name no commit", file=sys.stderr)
    results = (args.results or harness.RESULTS).resolve()
    # a shell starts commands in the background with SIGINT ignored, and their processes would ignore it too
    before = {by: signal.signal(by, signal.default_int_handler) for by in (signal.SIGINT, signal.SIGTERM)}
    try:
        steps = {name: step for name, step in plan(results).items() if step.always or name in (args.only or names)}
        summary = check(steps, results, minutes=args.minutes, redo=args.redo)
    except KeyboardInterrupt:
        print("interrupted; finished steps are kept, run the command again for the others", file=sys.stderr)
        return INTERRUPTED
    finally:
        for by, handler in before.items():
            signal.signal(by, handler)
    print(f"\n{tables.TABLES['gpu'](results)}\n\n{summary}")
    if args.results is None:
        rewrite()
    return 1 if FAILED in summary.steps or summary.refused else 0


def check(
    steps: Mapping[str, Step],
    results: Path,
    *,
    minutes: float,
    redo: bool = False,
    now: Callable[[], float] = time.monotonic,
) -> Summary:
    """Run steps while there is time, and write each one's records when it ends.

    Steps that this machine has never run come first, those that it ran with other sources last.

    Args:
        steps: by name, in order.
        results: folder.
        minutes: for all of them.
        redo: also those finished before.
        now: a clock in seconds.
    """
    summary, end, sources = Summary(), now() + 60 * minutes, fingerprint()
    known = harness.documents(results).get(harness.machine_name(), {"suites": {}})["suites"]
    for name, step in sorted(steps.items(), key=lambda item: not item[1].always and item[0] in known):
        facts = known.get(name, {})
        if not redo and not step.always and facts.get("finished") and facts["sources"] == sources:
            summary.add(BEFORE, name)
            continue
        start = now()
        if end - start < step.seconds / 3:
            summary.add(LATE, name)
            continue
        print(f"-- {name}", flush=True)
        code, output = run(step.command, min(step.seconds, end - start), step.environment)
        records, failed = step.read(code, output) if step.read else read_suite(name, results, code, output)
        if code != 0:
            print(output, file=sys.stderr)
        if failed:
            records.append(header(name, name, "the rest") | {"not_measured": failed})
        about = {"finished": not failed, "sources": sources, "seconds": round(now() - start), "nvidia_smi": smi()}
        records = [record | {"suite": name} for record in records]
        harness.save(name, records, results=results, **about)
        print(*map(harness.line_of, records), sep="\n", flush=True)
        summary.add(FAILED if failed else DONE, name)
        summary.refused += [record for record in records if "refused" in record]
        if name == "gpu_build" and CUDA_BUILT not in records[0]["printed"]:
            sources += " without CUDA kernels"  # then the other steps run again once these are there
    return summary


def smi() -> dict[str, str]:
    """Return nvidia-smi's fields of the first GPU; empty if it is not installed or fails."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(SMI_FIELDS, values, strict=True)) if done.returncode == 0 and len(values) == len(SMI_FIELDS) else {}


def fingerprint(root: Path = ROOT) -> str:
    """Return a hash of the sources; a step finished with the same hash is not run again."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()}):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Run a command; return its exit status, None if the time ran out, and its output.

    Near the end of the time it is interrupted, as by Ctrl-C, and killed if that does not end it. An interrupt of this
    process kills it.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
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


if __name__ == "__main__":
    sys.exit(main())
