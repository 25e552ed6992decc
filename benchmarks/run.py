"""Run the suites, write results/<machine>.json and rewrite the README's tables: ``make bench``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from benchmarks.end_to_end import compaction_cost, wall_clock
from benchmarks.micro import collect, decision_cost
from benchmarks.readme import rewrite
from earlyexit_kernels.report import environment, write_json

RESULTS = Path(__file__).parent / "results"
SUITES = {
    wall_clock.SUITE: lambda repeats: wall_clock.records(repeats),
    compaction_cost.SUITE: lambda repeats: compaction_cost.records(),
    decision_cost.SUITE: lambda repeats: decision_cost.records(repeats),
    collect.SUITE: lambda repeats: collect.records(repeats),
}


def machine_name() -> str:
    """A file name for this machine: its CPU or GPU, and the threads used."""
    facts = environment()
    device = facts["gpus"][0] if facts["gpus"] else f"{facts['cpu']} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def main() -> None:
    """Run what was asked for; each suite has a file of its own, so that one can be run again alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="default: all")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds of a case (default: %(default)s)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    for name in args.suite or sorted(SUITES):
        found = []
        for record in SUITES[name](args.repeats):
            found.append(record)
            print(" ".join(f"{key}={value}" for key, value in record.items() if value is not None), flush=True)
        print(f"wrote {write_json(RESULTS / f'{name}-{machine_name()}.json', found, repeats=args.repeats)}")
    rewrite()


if __name__ == "__main__":
    main()
