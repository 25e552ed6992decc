"""A trained model on noisy text (typing errors and missing words) under patience, entropy and full depth.

Entropy thresholds are chosen on clean held-out rows; every patience is reported. A share of noise is drawn several
times; the numbers are means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from benchmarks.accuracy.noise import NOISES
from benchmarks.accuracy.runs import SPEED_UPS, Run, Trained
from benchmarks.harness import Record
from earlyexit_kernels.criteria import Criterion, FullDepth, Patience
from earlyexit_kernels.tasks.sources import Split
from earlyexit_kernels.tuning.sweep import nearest_speed_up, outcome, sweep
from earlyexit_kernels.tuning.traces import collect_trace

#: Shares of the words that are hit, and draws of each.
SHARES, DRAWS = (0.1, 0.2, 0.4), 3


def rules(model: Trained) -> dict[str, Criterion]:
    """Return full depth, each patience that may leave early, and entropy near each speed-up on clean held-out rows."""
    trace = collect_trace(model.model, model.encoded(model.held_out), progress="held out", **model.passing)
    points = sweep(trace, trace, metrics=model.task.metrics).points["entropy"]
    patient = {f"patience {p}": Patience(patience=p) for p in range(1, model.model.depth - 1)}
    near = {f"entropy, {target:g}x": nearest_speed_up(points, target).criterion for target in SPEED_UPS}
    return {"full depth": FullDepth(), **patient, **near}


def conditions(clean: Split) -> Iterator[tuple[str, float, list[Split]]]:
    """Yield clean text, then every noise at every share, drawn several times."""
    yield "clean", 0.0, [clean]
    for name, noise in NOISES.items():
        for share in SHARES:
            yield name, share, [noise(clean, share, seed=seed) for seed in range(DRAWS)]


def noise_records(run: Run) -> list[Record]:
    """Return a record for each condition and criterion: means over the draws, and each draw."""
    model, found = Trained(run), []
    metric, criteria = model.task.metric, rules(model)
    for noise, share, splits in conditions(model.reporting):
        data = [model.encoded(split) for split in splits]
        traces = [collect_trace(model.model, rows, progress=f"{noise} {share:g}", **model.passing) for rows in data]
        for name, rule in criteria.items():
            draws = [outcome(*trace, rule, metrics=model.task.metrics) for trace in traces]
            record = {"kind": "noise", "noise": noise, "share": share, "rule": name, "criterion": rule.to_dict()}
            record["score"] = float(np.mean([draw.scores[metric] for draw in draws]))
            record["layer_speed_up"] = model.model.depth / float(np.mean([draw.mean_layers_run for draw in draws]))
            found.append(record | {"draws": [asdict(draw) for draw in draws]})
    return found
