"""SmartBERT on small tasks: skips, exits, and both. Its paper reports that entropy alone saves little there.

Multiply-adds count gates and exits, over full depth without any.

``python -m benchmarks.accuracy.smartbert --model <all-MiniLM-L6-v2>``
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any

from benchmarks.accuracy import runs
from benchmarks.accuracy.runs import Run, Trained
from earlyexit_kernels.cli.evaluate import NEVER_SKIP
from earlyexit_kernels.criteria import from_dict

EXPERIMENT = "smartbert"


def planned(args: argparse.Namespace) -> Iterator[Run]:
    """Yield one run for each task and seed."""
    for task in args.task:
        for seed in args.seed:
            yield Run(EXPERIMENT, task, "smartbert", runs.settings_of(args, "smartbert"), seed)


def records(run: Run, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return records of the most frequent class, full depth, skips alone, exits alone, and both near each speed-up."""
    folder = runs.trained_model(run, args)
    evaluation, model = runs.swept(folder, args), Trained(folder, args.batch_size)
    labels = model.reporting.labels
    fixed = {"full depth": None, "skips alone": from_dict(model.model.objective.answering())}
    found: list[dict[str, Any]] = [{"kind": "majority", "share": Counter(labels).most_common(1)[0][1] / len(labels)}]
    for name, criterion in fixed.items():
        found.append({"kind": "fixed", "rule": name, "measured": model.measure(criterion)})
    points = evaluation.result.points
    skipping = [p for p in points["skip_gate"] if p.criterion.skip_from != NEVER_SKIP]
    found += runs.near_records(model, points["entropy"], rule="exits alone")
    found += runs.near_records(model, skipping, rule="skips and exits")
    return [*runs.sweep_records(evaluation), *found]


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_arguments(parser, holdout=150)
    parser.add_argument("--task", nargs="+", default=["rte", "wnli"], help="(default: rte wnli)")
    args = parser.parse_args()
    runs.write_runs(planned(args), args, records)


if __name__ == "__main__":
    main()
