"""Run the suites, write results/<machine>.json, draw its plots and rewrite the README's tables: ``make bench``."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from benchmarks import store
from benchmarks.end_to_end import compaction_cost, offline, plots, profiles, server, single_stream
from benchmarks.end_to_end.models import MODEL_VARIABLE
from benchmarks.micro import collect, decision_cost, layer_products, weight_checks
from benchmarks.readme import rewrite
from earlyexit_kernels.tuning.report import environment

SUITES = {
    single_stream.SUITE: lambda repeats: single_stream.records(repeats),
    offline.SUITE: lambda repeats: offline.records(repeats),
    server.SUITE: lambda repeats: server.records(repeats),
    compaction_cost.SUITE: lambda repeats: compaction_cost.records(),
    decision_cost.SUITE: lambda repeats: decision_cost.records(repeats),
    layer_products.SUITE: lambda repeats: layer_products.records(repeats),
    weight_checks.SUITE: lambda repeats: weight_checks.records(repeats),
    collect.SUITE: lambda repeats: collect.records(repeats),
}
#: Suites that only run when asked for.
ON_REQUEST = {profiles.SUITE: lambda repeats: profiles.records()}


def main() -> None:
    """Run what was asked for; the records of other suites stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    suites, but = SUITES | ON_REQUEST, ", ".join(ON_REQUEST)
    parser.add_argument("--suite", choices=sorted(suites), action="append", help=f"default: all but {but}")
    parser.add_argument("--repeats", type=int, default=10, help="how much time each case gets (default: %(default)s)")
    parser.add_argument("--model", help=f"folder of `earlyexit train` in MiniLM's shape (default: ${MODEL_VARIABLE})")
    parser.add_argument("--results", type=Path, help="another folder for the JSON; the READMEs and plots stay then")
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
        for record in suites[name](args.repeats):
            found.append(record)
            print(" ".join(f"{key}={value}" for key, value in record.items() if value not in (None, "")), flush=True)
        if not environment()["flush_denormal"]:
            raise RuntimeError(f"suite {name}: something switched the flushing of denormals off while it ran")
        took = round(time.monotonic() - start)
        print(f"wrote {store.save(name, found, results=args.results, repeats=args.repeats, seconds=took)}")
    if args.results is None:
        for path in plots.write():
            print(f"drew {path}")
        rewrite()
        print("rewrote the tables of README.md and benchmarks/README.md")


if __name__ == "__main__":
    main()
