"""Evaluate criteria at many settings, from one full-depth pass over a tuning and a reporting split.

A *setting* is a criterion with values for its parameters. Settings are generated (`settings`) and chosen on the tuning
split; results to quote come from the reporting split. The cost is counted in layers: if m of L layers are run on
average, the *layer speed-up* is L / m and the *layers saved* are 1 - m / L. Without skipped layers, m is the mean exit
layer. For wall-clock time, see `timing`.

Rules that skip layers cannot be replayed; `sweep_skipping` runs the model once per setting.

Baselines: *static truncation* answers every row at exit k; *random exit* keeps the share of rows that a criterion lets
leave at each layer, but draws these rows at random. A criterion no better than random exit selects rows no better than
chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.hf.predict import predict_with_exits
from earlyexit_kernels.tuning.metrics import score
from earlyexit_kernels.tuning.rows import Answers, Rows, exit_shares
from earlyexit_kernels.tuning.settings import settings
from earlyexit_kernels.tuning.traces import without_criterion
from earlyexit_kernels.types import ExitTrace, default_problem_type


@dataclass(frozen=True)
class Outcome:
    """Result of one setting on one split.

    Attributes:
        scores: metric -> value.
        mean_exit_layer: mean 1-based layer of the answering exit.
        mean_layers_run: m; less than `mean_exit_layer` if layers are skipped, else equal.
        layer_speed_up: L / m.
        layers_saved: 1 - m / L.
        exit_shares: share of the rows that leave at each layer 1..L.
        random_exit: expected value of the deciding metric for random exit at the same shares; None if layers are
            skipped, because the answers of the other exits are then unknown.
    """

    scores: dict[str, float]
    mean_exit_layer: float
    mean_layers_run: float
    layer_speed_up: float
    layers_saved: float
    exit_shares: tuple[float, ...]
    random_exit: float | None


@dataclass(frozen=True)
class Point:
    """Results of one setting on both splits."""

    criterion: Criterion
    tuning: Outcome
    reporting: Outcome
    chosen: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "criterion": self.criterion.to_dict(),
            "chosen": self.chosen,
            "tuning": asdict(self.tuning),
            "reporting": asdict(self.reporting),
        }


@dataclass(frozen=True)
class Sweep:
    """The result of `sweep`.

    Attributes:
        metric: the deciding metric.
        depth: number of layers L.
        drop: maximum score loss allowed on the tuning split.
        layers: split -> scores of static truncation to k = 1..L layers; the last one is full depth.
        points: criterion name -> its settings, fastest first on the reporting split.
        oracle: share of the reporting rows that some exit answers correctly (classification only).
        overthinking: share of the reporting rows that some exit answers correctly but the last does not (classification
            only).
    """

    metric: str
    depth: int
    drop: float
    layers: dict[str, tuple[dict[str, float], ...]]
    points: dict[str, tuple[Point, ...]]
    oracle: float | None = None
    overthinking: float | None = None

    def chosen(self, name: str) -> Point | None:
        """Return the chosen setting of a criterion, or None if every setting loses more than `drop`."""
        return next((point for point in self.points[name] if point.chosen), None)

    def records(self) -> list[dict[str, Any]]:
        """Return JSON-ready records: one per truncation, one per point, and one with the oracle shares."""
        truncations = [
            {"kind": "static_truncation", "layer": k + 1, **{split: scores[k] for split, scores in self.layers.items()}}
            for k in range(self.depth)
        ]
        points = [{"kind": "point", **point.to_dict()} for group in self.points.values() for point in group]
        limits = {"kind": "limits", "oracle": self.oracle, "overthinking": self.overthinking}
        return [*truncations, *points, limits]


def outcome(rows: Rows, answers: Answers, metrics: Sequence[str]) -> Outcome:
    """Return the result of replayed answers; the deciding metric is that of the rows."""
    found = _outcome(rows.scores(metrics, answers.logits), answers.exit_layer, answers.layers_run, rows.trace.depth)
    return replace(found, random_exit=rows.random_exit(found.exit_shares))


def _outcome(scores: dict[str, float], exit_layer: NDArray, layers_run: NDArray, depth: int) -> Outcome:
    mean = float(layers_run.mean())
    return Outcome(
        scores=scores,
        mean_exit_layer=float(exit_layer.mean()),
        mean_layers_run=mean,
        layer_speed_up=depth / mean if mean else math.inf,
        layers_saved=1 - mean / depth,
        exit_shares=exit_shares(exit_layer, depth),
        random_exit=None,
    )


def fastest_within_drop(
    outcomes: Sequence[Outcome], full_depth: float, *, metric: str, drop: float = 0.0
) -> int | None:
    """Return the index of the fastest outcome that loses at most `drop`; ties go to the higher score.

    Args:
        outcomes: outcomes on the tuning split.
        full_depth: score of full depth.
        metric: name of the score.
        drop: maximum loss of that score.

    Returns:
        the index, or None if every outcome loses more.
    """
    kept = [i for i, o in enumerate(outcomes) if o.scores[metric] >= full_depth - drop - 1e-9]
    return min(kept, key=lambda i: (outcomes[i].mean_layers_run, -outcomes[i].scores[metric]), default=None)


def sweep(
    tuning: tuple[ExitTrace, ArrayLike],
    reporting: tuple[ExitTrace, ArrayLike],
    *,
    metrics: Sequence[str] = ("accuracy",),
    drop: float = 0.0,
    points: int = 24,
    problem_type: str | None = None,
    groups: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
    progress: str | None = None,
) -> Sweep:
    """Evaluate every criterion at all its settings on both splits, and choose one setting each on the tuning split.

    Args:
        tuning, reporting: trace and labels ``[N]`` of each split, as from `traces.collect_trace`.
        metrics: names in `metrics.METRIC_NAMES`; the first is the deciding metric.
        drop: maximum score loss against full depth allowed on the tuning split, at least 0.
        points: number of thresholds to try per criterion.
        problem_type: as in transformers (default: regression for one output, else single-label classification).
        groups: the query of each row of each split, for ``"ndcg"`` and ``"mrr"``.
        progress: title of a progress bar, or None for none.

    Raises:
        ValueError: the splits have different shapes, or an argument is out of range.

    Example:

        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> logits = torch.tensor([[[0.1, 0.0], [3.0, 0.0]], [[0.0, 4.0], [0.0, 5.0]]]).repeat(50, 1, 1)
        >>> split = ee.ExitTrace(logits), torch.tensor([0, 1] * 50)
        >>> found = ee.sweep(split, split)
        >>> found.chosen("entropy").reporting.mean_exit_layer, found.oracle
        (1.0, 1.0)
    """
    if tuning[0].logits.shape[1:] != reporting[0].logits.shape[1:]:
        shapes = [list(split[0].logits.shape) for split in (tuning, reporting)]
        raise ValueError(f"sweep: expected traces with the same exits and classes, got {shapes[0]} and {shapes[1]}")
    if not drop >= 0:
        raise ValueError(f"sweep: expected drop >= 0, got {drop}")
    task = problem_type or tuning[0].problem_type or default_problem_type(tuning[0].logits.shape[2])
    splits = {
        name: Rows(trace, np.asarray(labels), metrics[0], task, None if group is None else np.asarray(group))
        for name, (trace, labels), group in zip(("tuning", "reporting"), (tuning, reporting), groups, strict=True)
    }
    layers = {name: rows.truncations(metrics) for name, rows in splits.items()}
    candidates = settings(tuning[0], points=points, problem_type=task)
    found: dict[str, tuple[Point, ...]] = {}
    full = layers["tuning"][-1][metrics[0]]
    hidden = progress is None or None
    with tqdm(total=sum(map(len, candidates.values())), desc=progress, disable=hidden, leave=False) as bar:
        for name, rules in candidates.items():
            evaluated = []
            for pair in zip(*(rows.replay(rules) for rows in splits.values()), strict=True):
                on_tuning, on_reporting = (outcome(r, a, metrics) for r, a in zip(splits.values(), pair, strict=True))
                evaluated.append(Point(pair[0].criterion, on_tuning, on_reporting))
                bar.update()
            found[name] = _with_choice(evaluated, full, metric=metrics[0], drop=drop)
    oracle = overthinking = None
    if task != "regression":
        right = splits["reporting"].right_by_layer
        some = right.any(axis=1)
        oracle, overthinking = float(some.mean()), float((some & ~right[:, -1]).mean())
    return Sweep(metrics[0], tuning[0].depth, drop, layers, found, oracle, overthinking)


def _with_choice(points: Sequence[Point], full_depth: float, *, metric: str, drop: float) -> tuple[Point, ...]:
    """Mark the chosen point of a criterion, and sort by speed on the reporting split, fastest first."""
    best = fastest_within_drop([point.tuning for point in points], full_depth, metric=metric, drop=drop)
    marked = [replace(point, chosen=number == best) for number, point in enumerate(points)]
    return tuple(sorted(marked, key=lambda point: point.reporting.mean_layers_run))


def sweep_skipping(
    model: Any,
    result: Sweep,
    criteria: Sequence[Criterion],
    tuning: Any,
    reporting: Any,
    *,
    collate_fn: Callable,
    batch_size: int = 32,
    progress: str | None = None,
) -> Sweep:
    """Add a rule that skips layers to a sweep, by running the model over both splits at each setting.

    Args:
        model: a model with gates; its criterion is restored at the end.
        result: sweep of the same splits by replay.
        criteria: settings of one rule, as from `settings.skip_settings`.
        tuning, reporting: data sets of the splits, dicts with ``labels``.
        collate_fn: pads a list of rows.
        batch_size: rows per batch.
        progress: title of a progress bar, or None for none.

    Returns:
        the sweep with the points of this rule, chosen like the others against full depth without skipped layers.

    Raises:
        ValueError: the model has no gates.
    """
    full_depth = result.layers["tuning"][-1]

    def run(data: Any) -> Outcome:
        out = predict_with_exits(model, data, batch_size=batch_size, collate_fn=collate_fn)
        scores = score(tuple(full_depth), out.logits, np.asarray(out.labels), problem_type=model.problem_type)
        return _outcome(scores, out.exit_layer, out.layers_run, result.depth)

    evaluated = []
    with without_criterion(model):
        for criterion in tqdm(criteria, desc=progress, disable=progress is None or None, leave=False):
            model.set_criterion(criterion)
            evaluated.append(Point(criterion, run(tuning), run(reporting)))
    points = _with_choice(evaluated, full_depth[result.metric], metric=result.metric, drop=result.drop)
    return replace(result, points={**result.points, criteria[0].name: points})
