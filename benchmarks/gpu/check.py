"""``make gpu-check``: builds for this machine's GPU, runs the tests marked ``gpu``, and measures, within nine minutes.

The records of each step are written to results/<gpu>.json when it ends. Run again, it continues with the steps that
were not finished with these sources. Requires torch with CUDA, triton and transformers; steps that need nvcc, pytest or
text data record that they are missing.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu import card, steps
from benchmarks.gpu.bench import header
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.steps import TESTS, Outcome
from benchmarks.gpu.tables import goals_table
from benchmarks.harness import Record
from benchmarks.machine import first_line
from earlyexit_kernels.tuning.report import environment

MINUTES = 9.0
#: Exit status after Ctrl-C or SIGTERM.
INTERRUPTED = 130
#: A step is not started with less than so many seconds left, nor a section with less than this share of its time.
MIN_SECONDS, MIN_SHARE = 30, 1 / 3
#: Seconds of the steps that run tests.
TEST_SECONDS = {"tests_first": 90, "tests_captured": 150, "tests_ops": 120, "tests_eager": 90}
#: Section -> the tests that run after it.
TESTS_AFTER = {
    "costs": ("tests_first",),
    "whole_float16_128": ("tests_captured", "tests_ops", "tests_eager"),
}


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        run: does it, given the seconds it has.
        seconds: at most.
        always: also if its records are there already, or other steps were asked for.
        least: it is not started with less than so many seconds left.
    """

    run: Callable[[float], Outcome]
    seconds: float
    always: bool = False
    least: float = MIN_SECONDS


@dataclass
class Summary:
    """The names of the steps by how they ended, and the refused records."""

    done: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    wrong: list[Record] = field(default_factory=list)

    def __str__(self) -> str:
        named = {
            "measured": self.done,
            "measured before": self.there,
            "failed, will be tried again": self.failed,
            "left for the next run": self.late,
        }
        lines = [f"{word}: {', '.join(names)}" for word, names in named.items() if names]
        return "\n".join([*lines, *(f"refused: {line_of(record)}" for record in self.wrong)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; return 0 if none failed."""
    names = ["build", *TESTS, *SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", dest="only", choices=names, action="append", help="only these; default: all")
    parser.add_argument("--redo", action="store_true", help="also steps finished before with these sources")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="another folder for the JSON; the documents stay then")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: expected an NVIDIA GPU, torch sees none; nothing was measured", file=sys.stderr)
        return 2
    if environment()["commit"] is None:
        print("note: not a git checkout; set EARLYEXIT_COMMIT, or the results name no commit", file=sys.stderr)
    # a shell starts commands in the background with SIGINT ignored, and their processes would ignore it too
    before = {by: signal.signal(by, signal.default_int_handler) for by in (signal.SIGINT, signal.SIGTERM)}
    try:
        chosen = args.only or names
        wanted = {name: step for name, step in plan().items() if step.always or name in chosen}
        summary = check(wanted, minutes=args.minutes, redo=args.redo, results=args.results)
    except KeyboardInterrupt:
        print("interrupted; finished steps are kept, run the command again for the others", file=sys.stderr)
        return INTERRUPTED
    finally:
        for by, handler in before.items():
            signal.signal(by, handler)
    print(f"\n{goals_table(args.results)}\n\n{summary}")
    if args.results is None:
        rewrite_documents()
    return 1 if summary.failed or summary.wrong else 0


def plan() -> dict[str, Step]:
    """Return all steps in order."""
    tests = {name: Step(functools.partial(steps.tests, name), TEST_SECONDS[name], least=40) for name in TESTS}
    planned = {"build": Step(steps.build, 300, always=True)}
    for name, one in SECTIONS.items():
        least = max(MIN_SECONDS, one.seconds * MIN_SHARE)
        planned[name] = Step(functools.partial(steps.section, name), one.seconds, least=least)
        planned |= {test: tests[test] for test in TESTS_AFTER.get(name, ())}
    return planned


def check(
    wanted: Mapping[str, Step],
    *,
    minutes: float,
    redo: bool = False,
    results: Path | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Summary:
    """Run steps while there is time, and write each one's records when it ends.

    Steps that this machine has never run come first, those that it ran with other sources last.

    Args:
        wanted: by name, in order.
        minutes: for all of them.
        redo: also those finished before.
        results: folder; default: the committed results.
        now: a clock in seconds.
    """
    summary, end, sources = Summary(), now() + 60 * minutes, card.fingerprint()
    known = run_before(results)
    for name, step in sorted(wanted.items(), key=lambda item: not item[1].always and item[0] in known):
        if not redo and not step.always and name in finished(sources, results):
            summary.there.append(name)
            continue
        start = now()
        if end - start < step.least:
            summary.late.append(name)
            continue
        print(f"-- {name}", flush=True)
        try:
            outcome = step.run(min(step.seconds, end - start))
        except Exception as error:  # the other steps are to run
            traceback.print_exc()
            outcome = Outcome([], first_line(error))
        records = list(outcome.records)
        if outcome.failed:
            records.append(header(f"gpu_{name}", name, "the rest") | {"not_measured": outcome.failed})
        facts = {"finished": not outcome.failed, "sources": sources, "seconds": round(now() - start), **known_facts()}
        harness.save(f"gpu_{name}", records, results=results, **facts)
        _print(records)
        (summary.failed if outcome.failed else summary.done).append(name)
        summary.wrong += [record for record in records if "refused" in record]
        if outcome.without:
            sources += f" without {outcome.without}"
    return summary


def known_facts() -> dict[str, Any]:
    """Return `card.facts`, or why they are unknown: a device that a step has broken gives none."""
    try:
        return card.facts()
    except RuntimeError as error:
        return {"gpu": None, "facts_failed": first_line(error)}


def run_before(results: Path | None = None) -> dict[str, Any]:
    """Return the steps that this machine has run, with the facts of each."""
    suites = harness.documents(results).get(harness.machine_name(), {"suites": {}})["suites"]
    return {name.removeprefix("gpu_"): facts for name, facts in suites.items() if name.startswith("gpu_")}


def finished(sources: str, results: Path | None = None) -> set[str]:
    """Return the steps that this machine has finished with these sources."""
    known = run_before(results).items()
    return {name for name, facts in known if facts.get("finished") and facts.get("sources") == sources}


def _print(records: Iterable[Record]) -> None:
    for record in records:
        print(line_of(record), flush=True)


def line_of(record: Record) -> str:
    """Return a record on one line."""
    return " ".join(f"{key}={value}" for key, value in record.items() if value not in (None, ""))


def rewrite_documents() -> None:
    """Write the numbers into the documents' tables."""
    from benchmarks.readme import rewrite

    rewrite()


if __name__ == "__main__":
    sys.exit(main())
