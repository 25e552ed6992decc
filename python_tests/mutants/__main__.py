"""`python -m python_tests.mutants`: put each mutant into a copy of the last commit and run the tests that cover it."""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from mutants.mutant import Mutant, StaleError, all_mutants
from mutants.results import Results, Row
from mutants.scratch import INTERPRETED, Scratch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results.csv"


def main() -> int:
    """Run mutants; return 1 if one survived without a reason, is stale, or was not measured."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.mutants", description=__doc__)
    add = parser.add_argument
    add("--only", default="*", help="names or files, as patterns separated by commas (default: all)")
    add("--list", action="store_true", help="list the mutants and those that are stale, and run nothing")
    add("--again", action="store_true", help="run finished mutants again")
    add("--limit", type=float, default=900, help="seconds after which tests count as hanging (default: %(default)s)")
    args = parser.parse_args()
    mutants = all_mutants()
    chosen = [mutant for mutant in mutants if is_named(mutant, args.only.split(","))]
    if not chosen:
        parser.error(f"--only: no mutant has a name or file like {args.only!r}; see --list")
    if args.list:
        return show(chosen)
    return run(chosen, Results(RESULTS, [mutant.name for mutant in mutants]), again=args.again, limit=args.limit)


def is_named(mutant: Mutant, patterns: list[str]) -> bool:
    """Return whether the name or file of a mutant fits one of some patterns."""
    return any(fnmatch.fnmatchcase(text, pattern) for text in (mutant.name, mutant.file) for pattern in patterns)


def show(chosen: list[Mutant]) -> int:
    """List mutants; return 1 if one is stale."""
    stale = False
    for mutant in chosen:
        print(f"{mutant.name}  [{mutant.kind}]  {mutant.file}  ({mutant.tests})")
        try:
            before, after = mutant.lines(ROOT)
            print(f"    - {before}\n    + {after}")
        except StaleError as error:
            stale = True
            print(f"    stale: {error}")
    return int(stale)


def run(chosen: list[Mutant], results: Results, *, again: bool, limit: float) -> int:
    """Run mutants that have not been run, write their rows, and print the summary.

    Those of Triton kernels run in another process, in which Triton interprets.
    """
    scratch = Scratch(ROOT, limit)
    with scratch.locked():
        commit = scratch.prepare()
        here = [mutant for mutant in chosen if mutant.is_interpreted == INTERPRETED]
        for number, mutant in enumerate(here, start=1):
            if again or not results.has(mutant, scratch.folder):
                row = measured(scratch, mutant, results.noticed_by(mutant.name), commit)
                results.put(row)
                said = f"{row.result:9} {row.name}: {row.reason or row.by} ({row.seconds} s)"
                print(f"{number}/{len(here)} {said}", flush=True)
        check_tests(scratch, results, [mutant.name for mutant in here])
    if not INTERPRETED and len(here) < len(chosen):
        command = [sys.executable, "-m", "python_tests.mutants", *sys.argv[1:]]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    print(results.summary())
    return int(results.unexplained)


def measured(scratch: Scratch, mutant: Mutant, first: str, commit: str) -> Row:
    """Put a mutant in, run its tests, and return its row."""
    try:
        lines = mutant.lines(scratch.folder)
    except StaleError as error:
        return Row.of(mutant, ("", ""), "stale", str(error), "", commit)
    outcome = scratch.outcome(mutant, first)
    return Row.of(mutant, lines, outcome.result, outcome.by, f"{outcome.seconds:.0f}", commit)


def check_tests(scratch: Scratch, results: Results, names: list[str]) -> None:
    """Run the tests that noticed mutants without a mutant; one that fails or is gone has noticed nothing."""
    rows = [results.rows[name] for name in names]
    noticed = {row.by for row in rows if row.result == "killed" and ".py" in row.by}
    failing = scratch.failures_without_mutant(sorted(noticed))
    for row in rows:
        if row.result == "killed" and row.by in failing:
            results.put(replace(row, result="error", by=f"fails or is gone without the mutant too: {row.by}"))


if __name__ == "__main__":
    sys.exit(main())
