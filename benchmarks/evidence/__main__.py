"""Train and measure the models of the experiments, a file each in ``benchmarks/results/kept``.

``python -m benchmarks.evidence --encoder sentence-transformers/all-MiniLM-L6-v2``

A training that has a file is skipped, so that an interrupted run continues where it stopped. ``--list`` shows what is
left and trains nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from benchmarks.evidence import plans
from benchmarks.evidence.encoders import make_encoders
from benchmarks.evidence.kept import FOLDER
from benchmarks.evidence.plans import EXPERIMENTS
from benchmarks.evidence.runs import groups, run_group
from earlyexit_kernels.tuning.tables import markdown_table


def left_table(results: Path) -> str:
    """Return a table of the trainings that are done and left, by experiment."""
    rows = []
    for name, experiment in EXPERIMENTS.items():
        done = sum((results / f"{training.name}.npz").is_file() for training in experiment.trainings)
        rows.append((name, experiment.claim, len(experiment.trainings), done, len(experiment.trainings) - done))
    return markdown_table(("experiment", "claim", "trainings", "done", "left"), rows)


def main() -> None:
    """Run what is left of the experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--encoder",
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="folder or hub name of a six-layer BERT (default: %(default)s)",
    )
    add("--only", choices=EXPERIMENTS, action="append", default=[], help="experiment to run (default: all)")
    add("--jobs", type=int, default=os.cpu_count(), help="processes of one thread each (default: one a core)")
    add("--work", type=Path, default=Path("trained"), help="folder for models and logs (default: %(default)s)")
    add("--results", type=Path, default=FOLDER, help="folder (default: benchmarks/results/kept)")
    add("--list", action="store_true", help="show what is left, and stop")
    args = parser.parse_args()
    print(left_table(args.results))
    if args.list:
        return
    left = groups(tuple(plans.all_trainings(tuple(args.only)).values()), args.results)
    encoders = make_encoders(args.encoder, args.work / "encoders")
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=sum(map(len, left)), desc="trainings") as bar,
        ProcessPoolExecutor(args.jobs, mp_context=context) as pool,
    ):
        running = [pool.submit(run_group, group, encoders, args.work, args.results) for group in left]
        for future in as_completed(running):
            for name in future.result():
                bar.write(f"measured {name}")
                bar.update()
    print(left_table(args.results))


if __name__ == "__main__":
    main()
