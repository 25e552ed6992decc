"""Times two versions of the package side by side: ``make bench-compare BASE=<git ref>``.

The base is checked out into a temporary worktree and its extension is built there. Each version runs in its own
process with this tree's `benchmarks.compare_worker`. The processes take turns in rounds of random order, so that a slow
spell of the machine affects both. Ratios are this version's time over the base's; a case whose answers differ from the
base's gets none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.versions import ROOT, check_imported, checked_out, linked
from earlyexit_kernels.tuning.tables import markdown_table
from earlyexit_kernels.tuning.timing import paired_ratio, quantiles

#: Largest difference of logits that counts as rounding.
ROUNDING = 1e-4
WARMUP, MIN_ROUNDS = 2, 10
SUBJECTS = ("BERT-base", "MiniLM")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", help="git ref to compare with")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds of a case (default: %(default)s)")
    parser.add_argument("--subject", default="MiniLM", choices=SUBJECTS, help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.repeats < MIN_ROUNDS:
        parser.error(f"--repeats: expected at least {MIN_ROUNDS}, got {args.repeats}")
    if not args.base:
        parser.error("expected a git ref to compare with, e.g. `make bench-compare BASE=main`")
    with tempfile.TemporaryDirectory(prefix="earlyexit-compare-") as folder, checked_out(args.base, folder) as base:
        print(compare(base, ROOT, Path(folder), subject=args.subject, repeats=args.repeats))


def compare(base: Path, here: Path, folder: Path, *, subject: str, repeats: int) -> str:
    """Time both versions on every case, and return the table.

    Args:
        base, here: folders that hold the package.
        folder: scratch folder of the processes.
        subject: a name of `SUBJECTS`.
        repeats: timed rounds.
    """
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, package in (("base", base), ("here", here), ("again", base)):
            workers[name] = Worker(package, folder / f"run-{name}", subject)
            stack.callback(workers[name].stop)
        rows = [_row(case, workers, repeats) for case in workers["base"].cases]
    return markdown_table(("case", "base ms", "here ms", "here / base", "base again / base"), rows)


def _row(case: str, workers: dict[str, Worker], repeats: int) -> tuple[str, ...]:
    answers = {name: worker.ask(case) for name, worker in workers.items()}
    wrong = difference(answers["base"], answers["here"])
    if wrong:
        return case, "", "", f"refused: {wrong}", ""
    # the base is timed in two processes to show the noise; one that has more turns would have warmer caches
    times: dict[str, list[float]] = {name: [] for name in workers}
    shuffle, order = random.Random(0).shuffle, list(workers)
    for turn in range(WARMUP + repeats):
        shuffle(order)
        for name in order:
            found = workers[name].ask(case)["milliseconds"]
            if turn >= WARMUP:
                times[name].append(found)
    middle = (f"{quantiles(times[name], (0.5,))[0]:.1f}" for name in ("base", "here"))
    return case, *middle, *(str(paired_ratio(times[name], times["base"])) for name in ("here", "again"))


def difference(base: dict[str, Any], here: dict[str, Any]) -> str:
    """Return how two answers to one case differ, or an empty string."""
    if base["exit_layer"] != here["exit_layer"]:
        return "rows leave at other layers"
    off = max(abs(a - b) for a, b in zip(base["logits"], here["logits"], strict=True))
    return "" if off <= ROUNDING else f"logits differ by {off:.2g}"


class Worker:
    """A process that runs one version, and waits between requests.

    Args:
        package: folder that holds ``earlyexit_kernels``.
        folder: to run in; made here, with that package beside this version's benchmarks.
        subject: a name of `SUBJECTS`.
    """

    def __init__(self, package: Path, folder: Path, subject: str) -> None:
        command, environment = [sys.executable, "-m", "benchmarks.compare_worker", subject], linked(package, folder)
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        ready = self._read()
        check_imported(package, ready["package"])
        self.cases: list[str] = ready["cases"]

    def ask(self, case: str) -> dict[str, Any]:
        """Run a case once."""
        assert self.process.stdin is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended early; its message is above")
        return json.loads(line)


if __name__ == "__main__":
    main()
