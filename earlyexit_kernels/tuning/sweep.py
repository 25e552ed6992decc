"""What each criterion would give at every setting, from one full-depth pass over a tuning and a reporting split.

Settings are laid out (`grids`) and chosen on the tuning split; every number to be quoted comes from the reporting
split. Cost is counted in layers: with m layers run in the mean, of L, the *layer speed-up* is L / m and the *layers
saved* are 1 - m / L. Where no layer is skipped, m is the mean exit layer. Wall-clock is a matter of measuring
(`timing`), not of this file.

A rule that skips layers can't be replayed: `sweep_skipping` runs the model once for each of its settings.

Baselines: *static truncation* answers every row at exit k, and *random exit* keeps a criterion's share of rows per
layer but draws which rows leave where. A criterion that doesn't beat the second one chooses no better than chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.replay import replay
from earlyexit_kernels.hf.predict import predict_with_exits
from earlyexit_kernels.tuning.grids import settings
from earlyexit_kernels.tuning.metrics import predictions_of, score
from earlyexit_kernels.types import ExitTrace

#: Random exits drawn where a metric isn't a mean over rows, so that no closed form holds.
RANDOM_DRAWS = 100


@dataclass(frozen=True)
class Outcome:
    """A criterion at one setting, on one split.

    Attributes:
        scores: metric -> value.
        mean_exit_layer: 1-based depth of the answering exit, in the mean.
        mean_layers_run: m; less than `mean_exit_layer` where layers are skipped, otherwise the same.
        layer_speed_up: L / m.
        layers_saved: 1 - m / L.
        exit_shares: share of the rows that leave at each layer 1..L.
        random_exit: value of the deciding metric expected when rows are drawn at random into the same shares; None
            where layers are skipped, since what other exits would have said isn't known.
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
    """A criterion at one setting, on both splits."""

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
        metric: the one that decides.
        depth: L.
        drop: loss allowed on the tuning split when choosing.
        layers: for each split, the scores of static truncation to k = 1..L layers; the last one is full depth.
        points: criterion name -> its settings, fastest first on the reporting split.
        oracle: reporting rows right at some exit, as a share (classification only).
        overthinking: reporting rows right at some exit but wrong at the last, as a share (classification only).
    """

    metric: str
    depth: int
    drop: float
    layers: dict[str, tuple[dict[str, float], ...]]
    points: dict[str, tuple[Point, ...]]
    oracle: float | None = None
    overthinking: float | None = None

    def chosen(self, name: str) -> Point | None:
        """The setting chosen for a criterion, or None where none keeps the score."""
        return next((point for point in self.points[name] if point.chosen), None)

    def records(self) -> list[dict[str, Any]]:
        """JSON-ready records: one for each truncation and each point, and one of the rows' limits."""
        truncations = [
            {"kind": "static_truncation", "layer": k + 1, **{split: scores[k] for split, scores in self.layers.items()}}
            for k in range(self.depth)
        ]
        points = [{"kind": "point", **point.to_dict()} for group in self.points.values() for point in group]
        limits = {"kind": "limits", "oracle": self.oracle, "overthinking": self.overthinking}
        return [*truncations, *points, limits]


@torch.inference_mode()
def collect_trace(
    model: Any, dataset: Any, *, collate_fn: Callable, batch_size: int = 32, progress: str | None = None
) -> tuple[ExitTrace, NDArray]:
    """Run every layer over a data set, whatever criterion is in force.

    Args:
        model: an early-exit model; left in eval mode with the criterion it had.
        dataset: dicts with ``labels``, as from `tasks.encode`.
        collate_fn: pads a list of them, e.g. `transformers.DataCollatorWithPadding`.
        batch_size: rows a pass.
        progress: title of a progress bar; None shows none.

    Returns:
        the exits, float32 on the CPU, and the labels ``[N]``.
    """
    model.eval()
    traces, labels = [], []
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn)
    with _without_criterion(model):
        for batch in tqdm(loader, desc=progress, disable=progress is None, leave=False):
            labels.append(batch.pop("labels"))
            trace = model.trace(**{name: values.to(model.device) for name, values in batch.items()})
            aux = {name: values.float().cpu() for name, values in trace.aux.items()}
            keys = None if trace.keys is None else trace.keys.cpu()
            traces.append(replace(trace, logits=trace.logits.float().cpu(), aux=aux, keys=keys))
    return ExitTrace.cat(traces), torch.cat(labels).numpy()


@contextmanager
def _without_criterion(model: Any) -> Iterator[None]:
    """Full depth for a while: one that skips layers would refuse to be traced."""
    before = model.criterion
    model.set_criterion(None)
    try:
        yield
    finally:
        model.set_criterion(before)


def _at_layer(trace: ExitTrace, exit_layer: NDArray) -> NDArray:
    """Logits ``[N, C]`` of the exits named by 1-based layers ``[N]``."""
    return trace.logits.numpy()[np.arange(len(exit_layer)), exit_layer - 1]


def random_exit(trace: ExitTrace, labels: ArrayLike, shares: Sequence[float], *, metric: str = "accuracy") -> float:
    """Expected score when a share of the rows, drawn at random, answers at each layer.

    Accuracy is a mean over rows, so its expectation is exactly ``sum_k share_k * accuracy_k``. Other metrics aren't:
    they are averaged over `RANDOM_DRAWS` seeded draws.

    Args:
        trace: N rows, L exits.
        labels: ``[N]``.
        shares: L numbers that sum to 1.
        metric: a name of `metrics.METRICS`.
    """
    if metric == "accuracy":
        return float(np.dot(shares, [layer[metric] for layer in truncations(trace, labels, metrics=(metric,))]))
    generator = np.random.default_rng(0)
    rows = trace.logits.shape[0]
    counts = np.rint(np.cumsum(shares) * rows).astype(int)
    layers = 1 + np.searchsorted(counts, np.arange(rows), side="right").clip(max=trace.depth - 1)
    draws = [_at_layer(trace, generator.permutation(layers)) for _ in range(RANDOM_DRAWS)]
    return float(np.mean([score((metric,), logits, labels)[metric] for logits in draws]))


def truncations(trace: ExitTrace, labels: ArrayLike, *, metrics: Sequence[str]) -> tuple[dict[str, float], ...]:
    """Scores of each exit alone: what a model cut to its first k = 1..L layers would reach with that exit."""
    return tuple(score(metrics, trace.logits[:, k].numpy(), labels) for k in range(trace.depth))


def outcome(
    trace: ExitTrace,
    labels: ArrayLike,
    criterion: Criterion,
    *,
    metrics: Sequence[str],
    problem_type: str | None = None,
) -> Outcome:
    """Replay a criterion over a trace and score it; ``metrics[0]`` decides."""
    logits, exit_layer = replay(trace, criterion, problem_type=problem_type)
    layers = exit_layer.numpy()
    found = _outcome(score(metrics, logits.numpy(), labels), layers, layers, trace.depth)
    return replace(found, random_exit=random_exit(trace, labels, found.exit_shares, metric=metrics[0]))


def _outcome(scores: dict[str, float], exit_layer: NDArray, layers_run: NDArray, depth: int) -> Outcome:
    counts = np.bincount(exit_layer, minlength=depth + 1)[1:]
    mean = float(layers_run.mean())
    return Outcome(
        scores=scores,
        mean_exit_layer=float(exit_layer.mean()),
        mean_layers_run=mean,
        layer_speed_up=depth / mean if mean else math.inf,
        layers_saved=1 - mean / depth,
        exit_shares=tuple(float(share) for share in counts / counts.sum()),
        random_exit=None,
    )


def choose(outcomes: Sequence[Outcome], full_depth: float, *, metric: str, drop: float = 0.0) -> int | None:
    """Index of the fastest outcome that loses at most `drop` against full depth, the better one among equally fast.

    Returns:
        the index, or None where every outcome loses more.
    """
    kept = [i for i, o in enumerate(outcomes) if o.scores[metric] >= full_depth - drop - 1e-9]
    return min(kept, key=lambda i: (outcomes[i].mean_layers_run, -outcomes[i].scores[metric]), default=None)


def nearest(points: Sequence[Point], speed_up: float) -> Point:
    """The point whose layer speed-up on the tuning split lies nearest to a given one, the better among equally near.

    Args:
        points: of one criterion, at least one.
        speed_up: the layer speed-up wanted, at least 1. How near the point comes, on either split, stands in it.

    Raises:
        ValueError: no point was given.
    """
    if not points:
        raise ValueError("nearest: expected at least one point, got none")
    metric = next(iter(points[0].tuning.scores))
    return min(points, key=lambda p: (abs(p.tuning.layer_speed_up - speed_up), -p.tuning.scores[metric]))


def sweep(
    tuning: tuple[ExitTrace, ArrayLike],
    reporting: tuple[ExitTrace, ArrayLike],
    *,
    metrics: Sequence[str] = ("accuracy",),
    drop: float = 0.0,
    points: int = 24,
    problem_type: str | None = None,
    progress: str | None = None,
) -> Sweep:
    """Try every criterion at every setting, choose on the tuning split and report on the other.

    Args:
        tuning, reporting: trace and labels ``[N]`` of each split, as from `collect_trace`.
        metrics: names of `metrics.METRICS`; the first decides.
        drop: loss of that metric against full depth that a choice may cost on the tuning split, at least 0.
        points: settings of a criterion with a threshold.
        problem_type: as in transformers; default: regression with one output, else one label of several.
        progress: title of a progress bar; None shows none.

    Raises:
        ValueError: splits of different shape, or an argument out of range.
    """
    if tuning[0].logits.shape[1:] != reporting[0].logits.shape[1:]:
        shapes = [list(split[0].logits.shape) for split in (tuning, reporting)]
        raise ValueError(f"sweep: expected traces with the same exits and classes, got {shapes[0]} and {shapes[1]}")
    if not drop >= 0:
        raise ValueError(f"sweep: expected drop >= 0, got {drop}")
    splits = {"tuning": tuning, "reporting": reporting}
    layers = {name: truncations(trace, labels, metrics=metrics) for name, (trace, labels) in splits.items()}
    groups = settings(tuning[0], points=points, problem_type=problem_type)
    found: dict[str, tuple[Point, ...]] = {}
    full = layers["tuning"][-1][metrics[0]]
    with tqdm(total=sum(map(len, groups.values())), desc=progress, disable=progress is None, leave=False) as bar:
        for name, group in groups.items():
            listed = []
            for criterion in group:
                on_tuning, on_reporting = (
                    outcome(*split, criterion, metrics=metrics, problem_type=problem_type) for split in splits.values()
                )
                listed.append(Point(criterion, on_tuning, on_reporting))
                bar.update()
            found[name] = _with_choice(listed, full, metric=metrics[0], drop=drop)
    return Sweep(metrics[0], tuning[0].depth, drop, layers, found, *_limits(*reporting))


def _with_choice(listed: Sequence[Point], full_depth: float, *, metric: str, drop: float) -> tuple[Point, ...]:
    """The points of a criterion, fastest first on the reporting split, with the chosen one marked."""
    best = choose([point.tuning for point in listed], full_depth, metric=metric, drop=drop)
    marked = [replace(point, chosen=number == best) for number, point in enumerate(listed)]
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
    """Add rules that skip layers to a sweep, by running the model over both splits at each setting.

    Args:
        model: with gates; its own criterion is put back at the end.
        result: the sweep of the same splits by replay.
        criteria: the settings, all of one kind, as from `grids.skip_settings`.
        tuning, reporting: the splits' data sets, dicts with ``labels``.
        collate_fn: pads a list of them.
        batch_size: rows a pass.
        progress: title of a progress bar; None shows none.

    Returns:
        the sweep with one more group of points, chosen against full depth without skips as the others are.

    Raises:
        ValueError: the model has no gates.
    """
    full_depth = result.layers["tuning"][-1]

    def run(data: Any) -> Outcome:
        out = predict_with_exits(model, data, batch_size=batch_size, collate_fn=collate_fn)
        scores = score(tuple(full_depth), out.logits, np.asarray(out.labels))
        return _outcome(scores, out.exit_layer, out.layers_run, result.depth)

    listed = []
    with _without_criterion(model):
        for criterion in tqdm(criteria, desc=progress, disable=progress is None, leave=False):
            model.set_criterion(criterion)
            listed.append(Point(criterion, run(tuning), run(reporting)))
    points = _with_choice(listed, full_depth[result.metric], metric=result.metric, drop=result.drop)
    return replace(result, points={**result.points, criteria[0].name: points})


def _limits(trace: ExitTrace, labels: ArrayLike) -> tuple[float | None, float | None]:
    """Shares of rows right at some exit, and right at some exit but wrong at the last; None for regression."""
    if trace.logits.shape[2] == 1:
        return None, None
    by_layer = [predictions_of(trace.logits[:, k].numpy()) == np.asarray(labels) for k in range(trace.depth)]
    right = np.stack(by_layer, axis=1)
    return float(right.any(axis=1).mean()), float((right.any(axis=1) & ~right[:, -1]).mean())
