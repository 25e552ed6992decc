"""Suites that check what `calibrate` promises; their sizes are fixed.

- guarantee: on generated rows, the risk that a `Risk` target allows is exceeded in at most `epsilon` of the draws;
- drop: on stored traces of trained models (``traces/*.npz`` of EARLYEXIT_DATA), the speed-up and the loss of `MaxDrop`
  on rows that `calibrate` has not seen;
- scale: seconds and memory to evaluate 100 settings on 10^6 rows.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
#: Stored traces, random splits of their rows, the share that `calibrate` is given, and the drop allowed.
TRACES, SPLITS, GIVEN, DROP = ("sst2_10k_mean_s0", "trec_mean_s0", "mrpc_mean_s0"), 40, 0.7, 0.005
#: What is chosen -> arguments of `calibrate`.
CHOICES: dict[str, dict[str, Any]] = {
    "one threshold of entropy": {},
    "one for each layer": {"per_layer": True},
    "any rule": {"criterion": "auto"},
}
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
    """Yield the speed-up and the drop of `MaxDrop` on rows that `calibrate` has not seen."""
    folder = Path(os.environ.get(DATA_VARIABLE, "")) / "traces"
    if not folder.is_dir():
        raise NotMeasuredError(f"expected stored traces in {DATA_VARIABLE}/traces")
    for name in TRACES:
        stored = np.load(folder / f"{name}.npz")
        trace, labels = ee.ExitTrace(torch.from_numpy(stored["logits"])), stored["labels"]
        given = round(GIVEN * len(labels))
        for choice, arguments in CHOICES.items():
            found = np.array([_unseen(trace, labels, given, seed, arguments) for seed in range(SPLITS)])
            (speed_up, loss), (speed_up_sd, loss_sd) = found.mean(axis=0), found.std(axis=0, ddof=1)
            yield {"suite": "calibration_drop", "trace": name, "target": DROP, "choice": choice} | {
                "splits": SPLITS, "rows": given, "unseen": len(labels) - given,
                "layer_speed_up": float(speed_up), "layer_speed_up_deviation": float(speed_up_sd),
                "drop": float(loss), "drop_deviation": float(loss_sd),
            }  # fmt: skip


def _unseen(
    trace: ee.ExitTrace, labels: NDArray, given: int, seed: int, arguments: dict[str, Any]
) -> tuple[float, float]:
    """Return the speed-up and the drop of the setting chosen on `given` rows of a random order, on the others."""
    order = np.random.default_rng(seed).permutation(len(labels))
    first, rest = order[:given], order[given:]
    part = trace.take(torch.from_numpy(first))
    rule = ee.calibrate(part, labels[first], target=ee.MaxDrop(DROP), seed=seed, **arguments).criterion
    others = trace.take(torch.from_numpy(rest))
    logits, exit_layer = ee.replay(others, rule)
    early, full = (torch.from_numpy(labels[rest]) == part.argmax(dim=1) for part in (logits, others.logits[:, -1]))
    lost = full.double().mean() - early.double().mean()
    return others.depth / exit_layer.double().mean().item(), lost.item()


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
