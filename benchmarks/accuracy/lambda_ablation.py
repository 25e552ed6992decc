"""PALBERT's Lambda layers by input and depth, under Q-exit at 1.5x and 2x fewer layers.

``python -m benchmarks.accuracy.lambda_ablation --model <all-MiniLM-L6-v2>``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.accuracy import runs
from benchmarks.accuracy.runs import Run

EXPERIMENT = "lambda_ablation"
INPUTS = ("concat", "diff", "single")
LAYERS = (1, 3)


def planned(args: argparse.Namespace) -> Iterator[Run]:
    """Yield one run for each task, seed, input and number of hidden layers."""
    for task in args.task:
        for seed in args.seed:
            for reads in args.halting_input:
                for layers in args.halting_layers:
                    own = {"halting_input": reads, "halting_layers": layers}
                    settings = runs.settings_of(args, "palbert", **own)
                    yield Run(EXPERIMENT, task, "palbert", settings, seed, f"{reads}, {layers}")


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_arguments(parser, train_rows=10_000)
    parser.add_argument("--task", nargs="+", default=["sst2"], help="(default: sst2)")
    parser.add_argument("--halting-input", nargs="+", choices=INPUTS, default=list(INPUTS), help="(default: all)")
    parser.add_argument("--halting-layers", type=int, nargs="+", default=list(LAYERS), help="(default: 1 3)")
    args = parser.parse_args()
    runs.write_runs(planned(args), args)


if __name__ == "__main__":
    main()
