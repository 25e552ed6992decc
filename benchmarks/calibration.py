"""Suites that check what `calibrate` promises; their sizes are fixed.

- guarantee: on generated rows, the risk that a `Risk` target allows is exceeded in at most `epsilon` of the draws;
- drop: on stored traces of trained models (``traces/*.npz`` of EARLYEXIT_DATA), the
  speed-up and the loss that `MaxDrop` has on rows not used to choose;
- scale: seconds and memory to evaluate 100 settings on 10^6 rows.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import binomtest

import earlyexit_kernels as ee
from benchmarks.harness import Record
from benchmarks.machine import DATA_VARIABLE, NotMeasuredError
from earlyexit_kernels import criteria
from earlyexit_kernels.tuning.rows import Rows

#: Generated rows that stand for the distribution, draws from it, and rows of a draw.
POPULATION, DRAWS, DRAWN = 100_000, 1000, 1000
RULES = ("entropy", "margin", "patient_confidence")
DELTA, EPSILON = 0.05, 0.1
#: Stored traces and their splits in halves.
TRACES, SPLITS, DROP = ("sst2_10k_mean_s0", "trec_mean_s0", "mrpc_mean_s0"), 20, 0.005
SCALE_ROWS, SCALE_DEPTH, SCALE_CLASSES, SETTINGS = 1_000_000, 12, 3, 100


def generated(rows: int, depth: int, classes: int) -> tuple[ee.ExitTrace, NDArray]:
    """Return a trace of easy and hard rows, whose exits are more often right the deeper they are, and the labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=generator)
    easy = 6 * torch.rand(rows, 1, 1, generator=generator)
    logits = torch.randn(rows, depth, classes, generator=generator) * torch.linspace(1.6, 0.6, depth)[:, None]
    return ee.ExitTrace(logits.add_(F.one_hot(labels, classes)[:, None] * easy)), labels.numpy()


def guarantee(repeats: int) -> Iterator[Record]:
    """Yield, for each rule and risk, the share of draws whose chosen setting exceeds the bound on the population."""
    trace, labels = generated(POPULATION, 4, 3)
    truths = {"labels": labels, "full_depth": trace.logits[:, -1].argmax(dim=1).numpy()}
    for rule in RULES:
        for against, truth in truths.items():
            right = trace.logits[:, -1].argmax(dim=1).numpy() == truth
            target = ee.Risk(delta=DELTA, epsilon=EPSILON, against=against)
            risks, speed_ups = [], []
            for seed in range(DRAWS):
                rows = np.random.default_rng(seed).integers(POPULATION, size=DRAWN)
                part = trace.take(torch.from_numpy(rows))
                found = ee.calibrate(part, labels[rows], target=target, criterion=rule, points=16, seed=seed)
                early = ee.replay(trace, found.criterion)[0].argmax(dim=1).numpy() == truth
                risks.append(float((right & ~early).mean()))
                speed_ups.append(found.layer_speed_up)
            broken = sum(risk > DELTA for risk in risks)
            p_value = binomtest(broken, DRAWS, EPSILON, alternative="greater").pvalue
            yield {"suite": "calibration_guarantee", "rule": rule, "against": against} | {
                "delta": DELTA, "epsilon": EPSILON,
                "draws": DRAWS, "rows": DRAWN, "broken": broken, "binomial_p_value": float(p_value),
                "mean_risk": float(np.mean(risks)), "mean_layer_speed_up": float(np.mean(speed_ups)),
            }  # fmt: skip


def drop(repeats: int) -> Iterator[Record]:
    """Yield the speed-up and the drop of `MaxDrop` on the half of the rows that it does not choose on."""
    folder = Path(os.environ.get(DATA_VARIABLE, "")) / "traces"
    if not folder.is_dir():
        raise NotMeasuredError(f"expected stored traces in {DATA_VARIABLE}/traces")
    for name in TRACES:
        stored = np.load(folder / f"{name}.npz")
        trace, labels = ee.ExitTrace(torch.from_numpy(stored["logits"])), stored["labels"]
        for per_layer in (False, True):
            found = [
                ee.calibrate(trace, labels, target=ee.MaxDrop(DROP), per_layer=per_layer, seed=seed)
                for seed in range(SPLITS)
            ]
            speed_ups, drops = np.array([c.layer_speed_up for c in found]), np.array([c.drop for c in found])
            yield {"suite": "calibration_drop", "trace": name, "target": DROP, "per_layer": per_layer} | {
                "splits": SPLITS,
                "rule": "entropy", "rows": len(labels),
                "layer_speed_up": float(speed_ups.mean()), "layer_speed_up_deviation": float(speed_ups.std(ddof=1)),
                "drop": float(drops.mean()), "drop_deviation": float(drops.std(ddof=1)),
            }  # fmt: skip


def scale(repeats: int) -> Iterator[Record]:
    """Yield the seconds to evaluate many settings of a rule on many rows, and the peak memory of the process."""
    trace, labels = generated(SCALE_ROWS, SCALE_DEPTH, SCALE_CLASSES)
    rows = Rows(trace, labels, "accuracy", "single_label_classification")
    steps = np.linspace(0.01, 0.99, SETTINGS).tolist()
    rules: dict[str, Callable[[float], criteria.Criterion]] = {
        "entropy": lambda t: criteria.Entropy(threshold=t),
        "margin": lambda t: criteria.Margin(threshold=t),
        "divergence_patience": lambda t: criteria.DivergencePatience(threshold=t / 10, patience=2),
        "voting": lambda t: criteria.Voting(threshold=1 + 4 * t, gamma=0.25),
    }
    for name, build in rules.items():
        start = time.perf_counter()
        found = rows.settings([build(t) for t in steps])
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        yield {"suite": "calibration_scale", "rule": name, "rows": SCALE_ROWS} | {
            "depth": SCALE_DEPTH, "classes": SCALE_CLASSES,
            "settings": len(found), "seconds": round(seconds, 1), "peak_gib": round(memory, 2),
            "mean_exit_layer": float(np.mean([s.mean_exit_layer for s in found])),
        }  # fmt: skip
