"""A trained model on noisy text: typing errors and missing words, under patience, entropy and full depth.

Entropy thresholds are chosen on clean held-out rows; every patience is reported. A share of noise is drawn several
times; the numbers are means.

``python -m benchmarks.accuracy.robustness --folder trained/sst2-joint-seed0``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from benchmarks.accuracy.noise import NOISES
from benchmarks.accuracy.runs import RESULTS, SPEED_UPS, Trained, noted
from benchmarks.harness import Record
from earlyexit_kernels.criteria import Criterion, FullDepth, Patience
from earlyexit_kernels.tasks.sources import Split
from earlyexit_kernels.tuning.sweep import Outcome, collect_trace, nearest_speed_up, outcome, sweep

EXPERIMENT = "robustness"
SHARES = (0.1, 0.2, 0.4)


def rules(model: Trained) -> dict[str, Criterion | None]:
    """Return full depth, each patience that may leave early, and entropy near each speed-up on clean held-out rows."""
    trace = collect_trace(model.model, model.encoded(model.held_out), progress="held out", **model.passing)
    points = sweep(trace, trace, metrics=model.task.metrics).points["entropy"]
    patient = {f"patience {p}": Patience(patience=p) for p in range(1, model.model.depth - 1)}
    near = {f"entropy, {target:g}x": nearest_speed_up(points, target).criterion for target in SPEED_UPS}
    return {"full depth": None, **patient, **near}


def conditions(clean: Split, shares: Sequence[float], draws: int) -> Iterator[tuple[str, float, list[Split]]]:
    """Yield clean text, then every noise at every share, drawn several times."""
    yield "clean", 0.0, [clean]
    for name, noise in NOISES.items():
        for share in shares:
            yield name, share, [noise(clean, share, seed=seed) for seed in range(draws)]


def records(model: Trained, shares: Sequence[float], draws: int) -> Iterator[Record]:
    """Yield a record for each condition and criterion: means over the draws, and each draw."""
    found = rules(model)
    for noise, share, splits in conditions(model.reporting, shares, draws):
        data = [model.encoded(split) for split in splits]
        traces = [collect_trace(model.model, rows, progress=f"{noise} {share:g}", **model.passing) for rows in data]
        for name, criterion in found.items():
            rule = criterion or FullDepth()
            outcomes = [outcome(*trace, rule, metrics=model.task.metrics) for trace in traces]
            yield {
                "kind": "noise",
                "noise": noise,
                "share": share,
                "rule": name,
                "criterion": None if criterion is None else criterion.to_dict(),
                "score": _mean(outcomes, model.task.metric),
                "layer_speed_up": model.model.depth / float(np.mean([o.mean_layers_run for o in outcomes])),
                "draws": [asdict(o) for o in outcomes],
            }


def _mean(outcomes: Sequence[Outcome], metric: str) -> float:
    return float(np.mean([o.scores[metric] for o in outcomes]))


def main() -> None:
    """Run the experiment, unless its JSON exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="written by `earlyexit train`, method joint")
    add("--results", type=Path, default=RESULTS, help="folder for the JSON (default: benchmarks/results/accuracy)")
    add("--threads", type=int, default=1, help="(default: %(default)s)")
    add("--shares", type=float, nargs="+", default=list(SHARES), help="of the words hit (default: 0.1 0.2 0.4)")
    add("--draws", type=int, default=3, help="of each share of noise (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    harness.write_once(args.results / f"{EXPERIMENT}-{args.folder.name}.json", partial(_document, args))


def _document(args: argparse.Namespace) -> tuple[list[Record], Record]:
    model = Trained(args.folder, args.batch_size)
    run = {"experiment": EXPERIMENT, "task": model.recipe.task, "method": model.recipe.method["name"]}
    found = list(records(model, args.shares, args.draws))
    return found, {"arguments": noted(args), "run": run, "recipe": asdict(model.recipe)}


if __name__ == "__main__":
    main()
