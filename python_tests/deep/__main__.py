"""`python -m python_tests.deep`, or `make fuzz`: run the tests of this folder on new examples for a given time.

Every target runs in a process of its own, in rounds: a round is each test of its file, on examples that the number of
the round determines. The log of a target in ``.fuzz/`` names each example before it runs, so that it ends with the one
in which a process died or hung. A target ends at its first finding. Hypothesis keeps failed examples in ``.fuzz/`` too,
and tries them first in the next run, which otherwise continues with the next round. The exit code is 1 after a finding.
"""

from __future__ import annotations

import argparse
import contextlib
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
from hypothesis import reporting, stateful, statistics
from support import criterion_cases, models  # noqa: F401  what takes long to import, once for all targets
from support.profiles import FOLDER

CONTEXT: Any = multiprocessing.get_context("fork")
#: Ways to end with a finding: a failed assertion, another exception, a process that died, one that did not go on.
FINDINGS = ("wrong", "tracebacks", "crashes", "hangs")
#: Characters of a finding that are printed.
SHOWN = 4000


#: Target -> examples of each test in a round, and seconds after which an example counts as hung.
TARGETS = {
    "ops": (40, 120),
    "hostile": (40, 120),
    "models": (20, 120),
    "weights": (10, 120),
    "checkpoints": (20, 120),
    "cli": (10, 300),
}
#: Seconds between two looks at the processes.
POLL = 0.2
#: Bytes that a process may take in addition to those it has.
MEMORY = 3 << 30


def run_round(name: str, number: int) -> None:
    """Run each test of a target once; raise the error of the first that fails."""
    module = importlib.import_module(f"deep.test_{name}")
    for test in vars(module).values():
        if hypothesis.is_hypothesis_test(test):
            hypothesis.seed(number)(test)()
        elif getattr(test, "__module__", "") == module.__name__ and hasattr(test, "TestCase"):
            machine = hypothesis.seed(number)(test)
            stateful.run_state_machine_as_test(machine, settings=machine.TestCase.settings)


def serve(name: str, number: int, until: float, log: Path, scratch: str, pipe: Any) -> None:
    """Run rounds until the time is over; send ``(cases, kind of finding or "", its message)`` after each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = scratch
    sys.stdout = sys.stderr = file = log.open("w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    faulthandler.enable(file=file)
    if "ASAN_OPTIONS" not in os.environ:  # the memory of a sanitizer counts too
        used = int(re.findall(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[0]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    hypothesis.settings.register_profile(
        "rounds",
        hypothesis.settings.get_profile("deep"),
        max_examples=TARGETS[name][0],
        verbosity=hypothesis.Verbosity.verbose,  # prints each example before it runs
    )
    hypothesis.settings.load_profile("rounds")
    while time.monotonic() < until:
        file.truncate(0)
        file.seek(0)
        print(f"round {number}")
        phases: list[dict[str, Any]] = []
        finding = message = ""
        try:
            with statistics.collector.with_value(phases.append), reporting.with_reporter(print):
                run_round(name, number)
        except Exception as error:
            errors = getattr(error, "exceptions", (error,))  # of an ExceptionGroup
            finding = FINDINGS[not all(isinstance(e, AssertionError) for e in errors)]
            message = "".join(traceback.format_exception(error))[-SHOWN:]
        drawn = [phase.get(f"{kind}-phase", {}) for phase in phases for kind in ("reuse", "generate")]
        pipe.send((sum(len(phase.get("test-cases", ())) for phase in drawn), finding, message))
        if finding:
            return
        number += 1


class Child:
    """The process of a target, as seen by the parent.

    Attributes:
        number: of the round that runs.
        rounds, cases, seconds: of this run.
        finding, message: one of `FINDINGS` or "", and what is to be said of it.
    """

    def __init__(self, name: str, first: int, seconds: float, scratch: str) -> None:
        self.name, self.number, self.log = name, first, FOLDER / f"{name}.log"
        self.rounds, self.cases, self.seconds, self.finding, self.message = 0, 0, 0.0, "", ""
        self.log.write_text("")
        # in polls and not by the clock, since both processes may be suspended
        self.changed, self.idle = 0.0, 0.0
        self.began = time.monotonic()
        self.pipe, pipe = CONTEXT.Pipe(duplex=False)
        arguments = (name, first, self.began + seconds, self.log, scratch, pipe)
        self.process = CONTEXT.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        pipe.close()

    def runs(self) -> bool:
        """Take what the process has sent, and end it if it hangs; return whether it is still running."""
        alive = self.process.is_alive()
        with contextlib.suppress(EOFError):  # it has ended
            while self.pipe.poll():
                cases, self.finding, self.message = self.pipe.recv()
                self.cases += cases
                if not self.finding:
                    self.number, self.rounds = self.number + 1, self.rounds + 1
        if alive:
            self.seconds = time.monotonic() - self.began
            changed, before = self.log.stat().st_mtime, self.changed
            self.changed, self.idle = changed, 0.0 if changed != before else self.idle + POLL
            if self.idle < TARGETS[self.name][1]:
                return True
            os.kill(self.process.pid, signal.SIGABRT)  # faulthandler adds the stack to the log
            self.process.join()
        if not self.finding and self.process.exitcode:
            self.finding = FINDINGS[3 if alive else 2]
            log = self.log.read_text(errors="replace")
            end = log.find("Fatal Python error")  # of faulthandler, below the last example
            self.message = log[-SHOWN:] if end < 0 else log[max(0, end - SHOWN // 2) : end + SHOWN // 2]
        return False

    def row(self) -> list[str]:
        """Return the row of the table."""
        counts = (int(self.finding == finding) for finding in FINDINGS)
        return [self.name, *map(str, (self.rounds, self.cases, round(self.seconds), *counts))]


def main() -> int:
    """Run the targets side by side; return 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.deep", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="duration (default: %(default)s)")
    parser.add_argument("--only", default=",".join(TARGETS), help="targets, separated by commas (default: %(default)s)")
    parser.add_argument("--round", type=int, help="first round of every target (default: the one after the last run)")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(TARGETS)):
        parser.error(f"--only: expected targets among {', '.join(TARGETS)}, got {', '.join(unknown)}")
    FOLDER.mkdir(exist_ok=True)
    progress = FOLDER / "rounds.json"
    next_rounds = json.loads(progress.read_text()) if progress.is_file() else {}
    print(f"fuzzing {', '.join(names)}: {args.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="deep-") as scratch:  # with the files of killed processes
        first = {name: next_rounds.get(name, 0) if args.round is None else args.round for name in names}
        children = [Child(name, first[name], args.minutes * 60, scratch) for name in names]
        while list(filter(Child.runs, children)):
            time.sleep(POLL)
    for child in children:
        if child.finding:
            again = f"python -m python_tests.deep --only {child.name} --round {child.number}"
            print(f"\n{child.name}, {child.finding}: {again}\n{child.message}")
    progress.write_text(json.dumps(next_rounds | {child.name: child.number for child in children}))
    rows = [["target", "rounds", "cases", "seconds", *FINDINGS], *(child.row() for child in children)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print("", *("  ".join(map(str.rjust, row, widths)) for row in rows), sep="\n")
    return int(any(child.finding for child in children))


if __name__ == "__main__":
    sys.exit(main())
