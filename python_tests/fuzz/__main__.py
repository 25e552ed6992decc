"""`python -m python_tests.fuzz`: fuzz the package for a given time, or replay one case."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from fuzz import report
from fuzz.case import Case
from fuzz.driver import Driver
from fuzz.targets import TARGETS

FOLDER = Path(__file__).resolve().parents[2] / ".fuzz"
#: Read when torch, transformers and tokenizers are imported.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    """Run the driver; return 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.fuzz", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=60, help="duration (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of all cases (default: %(default)s)")
    add("--only", default=",".join(TARGETS), help="targets, separated by commas (default: %(default)s)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    add("--cases", type=int, default=None, help="maximum cases per target (default: no limit)")
    add("--folder", type=Path, default=FOLDER, help="folder for the progress, by seed (default: %(default)s)")
    add("--backends", default="", help="back-ends of the ops, separated by commas (default: all available on CPU)")
    add("--replay", metavar="TARGET:CASE", help="run one case in this process and show its error")
    args = parser.parse_args()
    unknown = sorted(set(args.only.split(",")) - set(TARGETS))
    if unknown:
        parser.error(f"--only: expected targets among {', '.join(TARGETS)}, got {', '.join(unknown)}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["EARLYEXIT_FUZZ_BACKENDS"] = args.backends
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        tempfile.tempdir = scratch  # removes the files of killed processes too
        return replay(parser, args) if args.replay else fuzz(args)


def replay(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run one case in this process."""
    target, _, number = args.replay.partition(":")
    if target not in TARGETS or not number.isdigit():
        parser.error(f"--replay: expected a target and a case number, as ops:12345, got {args.replay}")
    TARGETS[target].load()(Case(target, args.seed, int(number)))
    print(f"{args.replay}: no finding")
    return 0


def fuzz(args: argparse.Namespace) -> int:
    """Run the driver and print its findings."""
    targets = {name: TARGETS[name] for name in args.only.split(",")}
    print(
        f"fuzzing {', '.join(targets)}: {args.minutes:g} minutes, seed {args.seed}, {args.workers} processes",
        flush=True,
    )
    driver = Driver(targets, seed=args.seed, workers=args.workers, folder=args.folder, max_cases=args.cases)
    result = driver.drive(args.minutes * 60)
    if result.findings:
        print(f"\n{report.findings(result, args.seed)}")
    print(f"\n{report.table(targets, result)}\n")
    total = ", ".join(f"{name} {progress.cases}" for name, progress in driver.store.targets.items())
    print(f"cases with this seed over all runs: {total} ({driver.store.path})")
    return 1 if result.counted else 0


if __name__ == "__main__":
    sys.exit(main())
