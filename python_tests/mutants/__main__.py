"""`python -m python_tests.mutants`: put each mutant into a copy of the checkout and run the tests that cover it."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

from mutants.mutant import Mutant, StaleError, all_mutants
from mutants.results import Results, Row
from mutants.scratch import Scratch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results.csv"


def main() -> int:
    """Run mutants; return 1 if one survived without a reason, is stale, or was not measured."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.mutants", description=__doc__)
    add = parser.add_argument
    add("--only", default="*", help="names or files, as patterns separated by commas (default: all)")
    add("--list", action="store_true", help="list the mutants and those that are stale, and run nothing")
    add("--again", action="store_true", help="run finished mutants again")
    add("--results", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    args = parser.parse_args()
    mutants = all_mutants()
    chosen = [mutant for mutant in mutants if is_named(mutant, args.only.split(","))]
    if not chosen:
        parser.error(f"--only: no mutant has a name or file like {args.only!r}; see --list")
    return (
        show(chosen)
        if args.list
        else run(chosen, Results(args.results, [mutant.name for mutant in mutants]), args.again)
    )


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


def run(chosen: list[Mutant], results: Results, again: bool) -> int:
    """Run mutants that have not been run, write their rows, and print the summary."""
    scratch = Scratch(ROOT)
    with scratch.locked():
        scratch.prepare()
        commit = scratch.commit()
        for number, mutant in enumerate(chosen, start=1):
            try:
                lines = mutant.lines(scratch.folder)
            except StaleError as error:
                row = Row(mutant.name, mutant.file, mutant.kind, "", "", "stale", str(error), "", commit, mutant.tests)
            else:
                if results.has(mutant, lines) and not again:
                    continue
                row = measured(scratch, mutant, lines, commit)
            results.put(row)
            print(
                f"{number}/{len(chosen)} {row.result:9} {row.name}: {row.reason or row.by} ({row.seconds} s)",
                flush=True,
            )
    results.write()
    print(results.summary())
    return int(results.unexplained)


def measured(scratch: Scratch, mutant: Mutant, lines: tuple[str, str], commit: str) -> Row:
    """Return the row of a mutant, whose tests have to pass without it."""
    outcome = scratch.seconds_without_mutant(mutant.tests)
    if outcome.result == "survived":
        outcome = scratch.outcome(mutant, outcome.seconds)
    else:
        outcome = outcome._replace(result="error", by=f"without the mutant: {outcome.by}")
    seconds = f"{outcome.seconds:.0f}"
    return Row(
        mutant.name, mutant.file, mutant.kind, *lines, outcome.result, outcome.by, seconds, commit, mutant.tests
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
