"""Every training method under one budget: full depth, each exit, and the paper's own rule at 1.5x and 2x fewer layers.

``python -m benchmarks.accuracy.methods --model <all-MiniLM-L6-v2>``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.accuracy import runs
from benchmarks.accuracy.runs import Run

EXPERIMENT = "methods"
METHODS = ("joint", "palbert", "ensemble", "smartbert", "dact", "deebert", "berxit", "fastbert")
#: DACT fixes its speed in training, so each point needs its own model.
PONDERS = (0.01, 0.03, 0.1)


def planned(args: argparse.Namespace) -> Iterator[Run]:
    """Yield one run for each task, seed and method, and for each ponder cost of DACT."""
    for task in args.task:
        for seed in args.seed:
            for method in args.methods:
                for ponder in args.ponder if method == "dact" else (None,):
                    own = {} if ponder is None else {"ponder": ponder}
                    label = "" if ponder is None else f"ponder {ponder:g}"
                    yield Run(EXPERIMENT, task, method, runs.settings_of(args, method, **own), seed, label)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_arguments(parser, train_rows=10_000)
    parser.add_argument("--task", nargs="+", default=["sst2", "trec"], help="(default: sst2 trec)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument("--ponder", type=float, nargs="+", default=list(PONDERS), help="DACT's costs of a layer")
    args = parser.parse_args()
    runs.write_runs(planned(args), args)


if __name__ == "__main__":
    main()
