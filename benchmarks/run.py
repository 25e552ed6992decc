"""Runs the suites, writes results/<machine>.json, draws its plots and rewrites the tables: ``make bench``.

Some run by name only; `benchmarks.gpu.check` runs all those of a GPU.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import harness, plots
from benchmarks.end_to_end import job, measure, server, suites
from benchmarks.gpu import suites as gpu
from benchmarks.harness import Record
from benchmarks.machine import MODEL_VARIABLE, NotMeasuredError
from benchmarks.micro import decision_cost, layers
from benchmarks.readme import rewrite
from earlyexit_kernels.tuning.tables import environment


def _later(module: str, records: str = "records") -> Callable[[int], Iterator[Record]]:
    """Return a suite whose module needs packages that the others do not."""
    return lambda repeats: getattr(import_module(f"benchmarks.{module}"), records)(repeats)


#: Suite -> its records, given the repeats; those of ``make bench``.
SUITES: dict[str, Callable[[int], Iterator[Record]]] = {
    **{name: partial(measure.records, name, cases) for name, cases in suites.CASES.items()},
    **{module.SUITE: module.records for module in (server, decision_cost)},
    **layers.SUITES,
}
#: Those that run by name only: they take long, or need a trained model, text or a GPU.
BY_NAME: dict[str, Callable[[int], Iterator[Record]]] = {
    **{name: partial(job.records, name) for name in job.TASKS},
    "http": _later("http.load"),
    "scoring": _later("scoring"),
    **{f"calibration_{part}": _later("calibration", part) for part in ("guarantee", "drop", "scale")},
    **{name: partial(gpu.records, name) for name in gpu.SUITES},
}


def records_of(name: str, repeats: int) -> Iterator[Record]:
    """Yield the records of a suite, or why it cannot be measured here."""
    try:
        yield from (SUITES | BY_NAME)[name](repeats)
    except NotMeasuredError as error:
        yield {"suite": name, "not_measured": str(error)}


def main() -> None:
    """Run the requested suites; the records of other suites stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--suite", choices=sorted(SUITES | BY_NAME), action="append", help="default: those of make bench"
    )
    parser.add_argument("--repeats", type=int, default=10, help="time for each case, relative (default: %(default)s)")
    parser.add_argument("--model", help=f"folder of `earlyexit train` in MiniLM's shape (default: ${MODEL_VARIABLE})")
    parser.add_argument("--results", type=Path, help="another folder for the JSON; documents and plots stay then")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {args.repeats}")
    if args.model and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model: expected a folder that `earlyexit train` wrote, got {args.model!r}")
    if args.model:
        os.environ[MODEL_VARIABLE] = args.model
    torch.set_flush_denormal(True)
    for name in args.suite or SUITES:
        found, start = [], time.monotonic()
        for record in records_of(name, args.repeats):
            found.append(record)
            print(harness.line_of(record), flush=True)
        if not environment()["flush_denormal"]:
            raise RuntimeError(f"suite {name}: flushing of denormals was switched off while it ran")
        took = round(time.monotonic() - start)
        print(f"wrote {harness.save(name, found, results=args.results, repeats=args.repeats, seconds=took)}")
    if args.results is None:
        for path in plots.write():
            print(f"drew {path}")
        rewrite()
        print("rewrote the documents' tables")


if __name__ == "__main__":
    main()
