"""Run the suites, write results/<machine>.json, draw its plots and rewrite the README's tables: ``make bench``."""

from __future__ import annotations

import argparse
import os
import time

import torch

from benchmarks import store
from benchmarks.end_to_end import compaction_cost, offline, plots, profiles, server, single_stream
from benchmarks.end_to_end.models import MODEL_VARIABLE
from benchmarks.micro import collect, decision_cost, layer_products
from benchmarks.readme import rewrite

SUITES = {
    single_stream.SUITE: lambda repeats: single_stream.records(repeats),
    offline.SUITE: lambda repeats: offline.records(repeats),
    server.SUITE: lambda repeats: server.records(repeats),
    compaction_cost.SUITE: lambda repeats: compaction_cost.records(),
    decision_cost.SUITE: lambda repeats: decision_cost.records(repeats),
    layer_products.SUITE: lambda repeats: layer_products.records(repeats),
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
    args = parser.parse_args()
    if args.model:
        os.environ[MODEL_VARIABLE] = args.model
    torch.set_flush_denormal(True)
    for name in args.suite or SUITES:
        found, start = [], time.monotonic()
        for record in suites[name](args.repeats):
            found.append(record)
            print(" ".join(f"{key}={value}" for key, value in record.items() if value not in (None, "")), flush=True)
        took = round(time.monotonic() - start)
        print(f"wrote {store.save(name, found, repeats=args.repeats, seconds=took)}")
    for path in plots.write():
        print(f"drew {path}")
    rewrite()


if __name__ == "__main__":
    main()
