"""Runs the suites, writes results/<machine>.json, draws its plots and rewrites the tables: ``make bench``."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import harness, plots
from benchmarks.end_to_end import measure, server, stored, suites
from benchmarks.end_to_end.models import MODEL_VARIABLE
from benchmarks.harness import Record
from benchmarks.micro import decision_cost, layer_products, layer_roofline, weight_checks
from benchmarks.readme import rewrite
from earlyexit_kernels.tuning.report import environment

MODULES = (stored, server, decision_cost, layer_products, layer_roofline, weight_checks)
#: Suite -> its records, given the repeats.
SUITES: dict[str, Callable[[int], Iterator[Record]]] = {
    **{name: partial(measure.records, name, cases) for name, cases in suites.CASES.items()},
    **{module.SUITE: module.records for module in MODULES},
}


def main() -> None:
    """Run the requested suites; the records of other suites stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="default: all")
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
        for record in SUITES[name](args.repeats):
            found.append(record)
            print(" ".join(f"{key}={value}" for key, value in record.items() if value not in (None, "")), flush=True)
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
