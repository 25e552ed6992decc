"""``make gpu-sanitize``: replays of the graph engine under compute-sanitizer, and the errors it finds.

Tensors share blocks of torch's allocator, whose insides the tool can't tell apart; so the loop also runs without a
graph, and with memory of its own for each tensor.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import store
from benchmarks.gpu import card, steps
from benchmarks.gpu.bench import Record, head
from benchmarks.gpu.check import words_of
from benchmarks.gpu.goals import line

SUITE = "gpu_sanitize"
#: What the tool says where it can't work here.
REFUSALS = ("Device not supported", "not supported on", "Unable to initialize", "Internal Sanitizer Error", "error 999")
ERROR_STATUS = 86
_Run = Callable[[Sequence[str], float, dict[str, str]], tuple[int | None, str]]


@dataclass(frozen=True)
class Pass:
    """One run under the tool.

    Attributes:
        tool: of compute-sanitizer.
        arguments: of `benchmarks.gpu.replays`.
        seconds: at most.
        environment: more variables.
    """

    tool: str
    arguments: tuple[str, ...]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


PASSES = {
    "1000 replays": Pass("memcheck", ("--replays", "1000"), 1200),
    "20 batches launched by the host, each tensor apart": Pass(
        "memcheck", ("--replays", "20", "--launched"), 600, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ),
    "50 replays, races": Pass("racecheck", ("--replays", "50"), 900),
    "50 replays, uninitialised memory": Pass("initcheck", ("--replays", "50"), 900),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all passes and write their records; 1 where one found an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted({each.tool for each in PASSES.values()}), help="one of the tools")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-sanitize: expected an NVIDIA GPU, torch sees none; nothing was checked", file=sys.stderr)
        return 2
    found = []
    for name, each in PASSES.items():
        if args.only in (None, each.tool):
            found.append(record_of(name, each))
            print(words_of(found[-1]), flush=True)
    if args.only is None:
        print(f"wrote {store.save(SUITE, found, sources=card.fingerprint(), finished=True, **card.facts())}")
    return 1 if any(record.get("errors") or "refused" in record for record in found) else 0


def find_tool() -> str | None:
    """compute-sanitizer on PATH, or in the toolkit."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for place in (shutil.which("compute-sanitizer"), str(Path(named) / "bin" / "compute-sanitizer")):
        if place is not None and Path(place).is_file():
            return place
    return None


def record_of(name: str, each: Pass, run: _Run = steps.run, tool: str | None = None) -> Record:
    """Do one pass.

    Args:
        name: of the pass.
        each: what to do.
        run: runs a command, within seconds, with more variables: its status and what it printed.
        tool: path of compute-sanitizer; default: looked for.
    """
    record = head(SUITE, name, each.tool, shape="H 64, 4 layers", dtype="float32")
    tool = tool or find_tool()
    if tool is None:
        return record | {"not_measured": "compute-sanitizer isn't on PATH, nor in CUDA_HOME/bin"}
    command = [tool, "--tool", each.tool, "--error-exitcode", str(ERROR_STATUS)]
    command += ["--target-processes", "application-only"]
    command += [sys.executable, "-m", "benchmarks.gpu.replays", *each.arguments]
    status, output = run(command, each.seconds, each.environment)
    return record | _read(status, output)


def _read(status: int | None, output: str) -> dict[str, Any]:
    """What the tool's output says."""
    refusal = next((text.strip() for text in output.splitlines() if any(word in text for word in REFUSALS)), "")
    if refusal:
        return {"not_measured": f"compute-sanitizer refuses the device: {refusal}"}
    if status is None:
        return {"not_measured": "it took too long"}
    summary = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) ", output)
    if not summary:
        last = next((text for text in reversed(output.splitlines()) if text.strip()), "")
        return {"not_measured": f"no summary was printed; the status is {status}: {last}"}
    errors: dict[str, Any] = {"errors": max(map(int, summary))}
    first = re.findall(r"^=+ ((?:Invalid|Error|Uninitialized|Race|Potential|Program hit).*)$", output, re.MULTILINE)
    if first:
        errors["first"] = first[0]
    answers = re.findall(r"^\d+ replays, .*$", output, re.MULTILINE)
    if status not in (0, ERROR_STATUS) or not answers:
        return errors | {"refused": answers[-1] if answers else f"the replays ended with status {status}"}
    return errors | {"said": answers[-1]} | line("errors that compute-sanitizer finds", errors)


if __name__ == "__main__":
    sys.exit(main())
