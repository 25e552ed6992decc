"""`python -m python_tests.deep`, or `make fuzz`: run the tests of this folder on new examples for a given time.

Every target runs in a process of its own, in rounds: a round is each test of its file, on examples that the number of
the round determines. The log of a target in ``.fuzz/`` names each example before it runs, so that it ends with the one
in which a process died or hung. A target ends at its first finding. Hypothesis keeps failed examples in ``.fuzz/`` too,
and tries them first in the next run, which otherwise continues with the next round. The exit code is 1 after a finding.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# read when torch, transformers and tokenizers are imported
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import hypothesis
from hypothesis import stateful, statistics
from support import criterion_cases, models  # noqa: F401  what takes long to import, once for all targets
from support.profiles import FOLDER

CONTEXT: Any = multiprocessing.get_context("fork")
#: Ways to end with a finding: a failed assertion, another exception, a process that died, one that did not go on.
FINDINGS = ("wrong", "tracebacks", "crashes", "hangs")
#: Characters of a finding that are printed.
SHOWN = 4000


@dataclasses.dataclass
class Target:
    """A file of tests, and what came of it.

    Attributes:
        examples: of each test in a round.
        limit: seconds after which an example counts as hung.
        memory: bytes that the process may take in addition to those it has, or None for no limit.
        rounds, cases, seconds: of this run.
        finding: one of `FINDINGS`, or empty.
        message: of the finding.
    """

    examples: int
    limit: float
    memory: int | None = None
    rounds: int = 0
    cases: int = 0
    seconds: float = 0.0
    finding: str = ""
    message: str = ""


TARGETS = {
    "ops": Target(40, 120),
    "hostile": Target(40, 120, memory=2 << 30),
    "models": Target(20, 120),
    "weights": Target(10, 120),
    "checkpoints": Target(20, 120, memory=2 << 30),
    "cli": Target(10, 300, memory=2 << 30),
}


def run_round(name: str, number: int) -> int:
    """Run each test of a target once and return the number of examples; raise the error of the first that fails."""
    module = importlib.import_module(f"deep.test_{name}")
    phases: list[dict[str, Any]] = []
    with statistics.collector.with_value(phases.append):
        for test in vars(module).values():
            if hypothesis.is_hypothesis_test(test):
                hypothesis.seed(number)(test)()
            elif getattr(test, "__module__", "") == module.__name__ and hasattr(test, "TestCase"):
                machine = hypothesis.seed(number)(test)
                stateful.run_state_machine_as_test(machine, settings=machine.TestCase.settings)
    run = (phase.get(f"{name}-phase", {}) for phase in phases for name in ("reuse", "generate"))
    return sum(len(phase.get("test-cases", ())) for phase in run)


def serve(name: str, number: int, until: float, log: Path, pipe: Any) -> None:
    """Run rounds until the time is over; send ``(cases, kind of finding or "", its message)`` after each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr = file = log.open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    faulthandler.enable(file=file)
    target = TARGETS[name]
    if target.memory is not None and "ASAN_OPTIONS" not in os.environ:  # the memory of a sanitizer counts too
        used = int(re.findall(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[0]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + target.memory, used + target.memory))
    hypothesis.settings.register_profile(
        "rounds",
        hypothesis.settings.get_profile("deep"),
        max_examples=target.examples,
        verbosity=hypothesis.Verbosity.verbose,  # prints each example before it runs
    )
    hypothesis.settings.load_profile("rounds")
    while time.monotonic() < until:
        file.truncate(0)
        print(f"round {number}")
        try:
            pipe.send((run_round(name, number), "", ""))
        except Exception as error:
            errors = getattr(error, "exceptions", (error,))  # of an ExceptionGroup
            kind = FINDINGS[not all(isinstance(e, AssertionError) for e in errors)]
            pipe.send((0, kind, "".join(traceback.format_exception(error))[-SHOWN:]))
            return
        number += 1


class Child:
    """The process of a target, as seen by the parent."""

    def __init__(self, name: str, first: int, seconds: float) -> None:
        self.target, self.log, self.number = TARGETS[name], FOLDER / f"{name}.log", first
        self.log.write_text("")
        self.began = time.monotonic()
        self.pipe, pipe = CONTEXT.Pipe(duplex=False)
        arguments = (name, first, self.began + seconds, self.log, pipe)
        self.process = CONTEXT.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        pipe.close()

    def runs(self) -> bool:
        """Take what the process has sent, and end one that hangs; return whether it is still running."""
        alive, target = self.process.is_alive(), self.target
        while self.pipe.poll():
            try:
                cases, finding, message = self.pipe.recv()
            except EOFError:
                break
            target.cases, target.finding, target.message = target.cases + cases, finding, message
            if not finding:
                target.rounds, self.number = target.rounds + 1, self.number + 1
        target.seconds = time.monotonic() - self.began
        if alive and time.time() - self.log.stat().st_mtime > target.limit:
            os.kill(self.process.pid, signal.SIGABRT)  # faulthandler adds the stack to the log
            self.process.join()
            alive, target.finding = False, "hangs"
        if not alive and not target.finding and self.process.exitcode:
            target.finding = "crashes"
        if not alive and not target.message:
            target.message = self.log.read_text(errors="replace")[-SHOWN:]
        return alive


def table(names: list[str]) -> str:
    """Return a table of rounds, cases, seconds and findings of each target."""
    rows = [["target", "rounds", "cases", "seconds", *FINDINGS]]
    for name in names:
        target = TARGETS[name]
        numbers = (target.rounds, target.cases, round(target.seconds), *(int(target.finding == f) for f in FINDINGS))
        rows.append([name, *map(str, numbers)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def main() -> int:
    """Run the targets side by side; return 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.deep", description=__doc__.partition(",")[0])
    parser.add_argument("--minutes", type=float, default=60, help="duration (default: %(default)s)")
    parser.add_argument("--only", default=",".join(TARGETS), help="targets, separated by commas (default: all)")
    parser.add_argument("--round", type=int, help="first round of every target (default: after that of the last run)")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(TARGETS)):
        parser.error(f"--only: expected targets among {', '.join(TARGETS)}, got {', '.join(unknown)}")
    FOLDER.mkdir(exist_ok=True)
    progress = FOLDER / "rounds.json"
    first = json.loads(progress.read_text()) if progress.is_file() else {}
    print(f"fuzzing {', '.join(names)}: {args.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="deep-") as scratch:
        tempfile.tempdir = scratch  # removes the files of killed processes too
        children = {
            name: Child(name, first.get(name, 0) if args.round is None else args.round, args.minutes * 60)
            for name in names
        }
        while [child for child in children.values() if child.runs()]:
            time.sleep(0.2)
    for name, child in children.items():
        first[name] = child.number
        if child.target.finding:
            again = f"python -m python_tests.deep --only {name} --round {child.number}"
            print(f"\n{name}, {child.target.finding}; to run it again: {again}\n{child.target.message}")
    progress.write_text(json.dumps(first))
    print(f"\n{table(names)}")
    return int(any(child.target.finding for child in children.values()))


if __name__ == "__main__":
    sys.exit(main())
