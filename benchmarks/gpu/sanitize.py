"""``make gpu-sanitize``: replays of the graph engine under compute-sanitizer, and the errors it finds.

Tensors share blocks of torch's allocator, which hides overruns from the tool; one pass therefore runs without a graph
and with a separate allocation for each tensor.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.goals import gpu_goal
from benchmarks.gpu import steps
from benchmarks.gpu.bench import header
from benchmarks.gpu.check import Step, arguments_of, run_steps
from benchmarks.gpu.steps import Outcome

#: Messages of the tool if it does not support the device.
REFUSALS = ("Device not supported", "not supported on", "Unable to initialize", "Internal Sanitizer Error", "error 999")
#: Prefix of the tool's lines.
MARK = "====="
ERROR_STATUS = 86
MINUTES = 60.0
#: Characters of the tool's output that are printed.
TAIL = 4000
_Run = Callable[[Sequence[str], float, dict[str, str]], tuple[int | None, str]]


@dataclass(frozen=True)
class Pass:
    """One run under the tool.

    Attributes:
        tool: of compute-sanitizer.
        arguments: of `benchmarks.gpu.replays`.
        environment: more variables.
    """

    tool: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


PASSES = {
    "memcheck": Pass("memcheck", ("--replays", "1000")),
    "memcheck_apart": Pass("memcheck", ("--replays", "20", "--launched"), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    "racecheck": Pass("racecheck", ("--replays", "50")),
    "initcheck": Pass("initcheck", ("--replays", "50")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the passes not finished yet, and write their records; return 1 if one found an error or failed."""
    args = arguments_of(__doc__, "--only", sorted(PASSES), MINUTES).parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-sanitize: expected an NVIDIA GPU, torch sees none; nothing was checked", file=sys.stderr)
        return 2
    passes = {
        f"sanitize_{name}": Step(functools.partial(outcome_of, name, each), 60 * args.minutes)
        for name, each in PASSES.items()
        if name in (args.only or PASSES)
    }
    wanted = {"build": Step(steps.build, 300, always=True), **passes}
    return run_steps(wanted, args)


def find_tool() -> str | None:
    """Return the path of compute-sanitizer, on PATH or in the toolkit, or None."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for place in (shutil.which("compute-sanitizer"), str(Path(named) / "bin" / "compute-sanitizer")):
        if place is not None and Path(place).is_file():
            return place
    return None


def outcome_of(name: str, each: Pass, seconds: float, run: _Run = steps.run, tool: str | None = None) -> Outcome:
    """Run one pass.

    Args:
        name: of the pass.
        each: the pass.
        seconds: at most.
        run: runs a command within seconds, with more variables; returns its status and output.
        tool: path of compute-sanitizer; default: searched for.
    """
    case = " ".join(word.removeprefix("--") for word in each.arguments)
    record = header(
        f"gpu_sanitize_{name}", case, each.tool, shape=f"{each.tool}, {case}, H 64, 4 layers", dtype="float32"
    )
    tool = tool or find_tool()
    if tool is None:
        return Outcome([record | {"not_measured": "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin"}])
    command = [tool, "--tool", each.tool, "--error-exitcode", str(ERROR_STATUS)]
    command += ["--target-processes", "application-only"]
    command += [sys.executable, "-m", "benchmarks.gpu.replays", *each.arguments]
    status, output = run(command, seconds, each.environment)
    own = [text.strip() for text in output.splitlines() if text.startswith(MARK)]
    refusal = next((text for text in own if any(word in text for word in REFUSALS)), "")
    if refusal:
        return Outcome([record | {"not_measured": f"compute-sanitizer refuses the device: {refusal}"}])
    if status is None:
        return Outcome([], f"stopped after {seconds:.0f} s")
    summary = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) ", output)
    if not summary:
        last = next((text for text in reversed(output.splitlines()) if text.strip()), "")
        return Outcome([], f"no summary was printed; the status is {status}: {last}")
    print(output[-TAIL:], file=sys.stderr)
    return Outcome([record | _read(status, output, max(map(int, summary)))])


def _read(status: int, output: str, count: int) -> dict[str, Any]:
    """Return what a finished pass found."""
    found: dict[str, Any] = {"errors": count}
    first = re.findall(r"^=+ ((?:Invalid|Error|Uninitialized|Race|Potential|Program hit).*)$", output, re.MULTILINE)
    if first:
        found["first"] = first[0]
    answers = re.findall(r"^\d+ replays by .*$", output, re.MULTILINE)
    if status not in (0, ERROR_STATUS) or not answers:
        return found | {"refused": answers[-1] if answers else f"the replays ended with status {status}"}
    return found | {"printed": answers[-1]} | gpu_goal("errors that compute-sanitizer finds", found)


if __name__ == "__main__":
    sys.exit(main())
