"""What each criterion would give at every setting, from one full-depth pass over a tuning and a reporting split.

Settings are laid out and chosen on the tuning split; every number to be quoted comes from the reporting split. Cost is
counted in layers: with a mean exit layer m of L, the *layer speed-up* is L / m and the *layers saved* are 1 - m / L.
Wall-clock is a matter of measuring (`timing`), not of this file.

Baselines: *static truncation* answers every row at exit k, and *random exit* keeps a criterion's share of rows per
layer but draws which rows leave where. A criterion that doesn't beat the second one chooses no better than chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from earlyexit_kernels.criteria import Criterion, Entropy, Margin, MaxProbability, Patience, QExit
from earlyexit_kernels.metrics import predictions_of, score
from earlyexit_kernels.replay import replay
from earlyexit_kernels.types import ExitTrace

#: Random exits drawn where a metric isn't a mean over rows, so that no closed form holds.
RANDOM_DRAWS = 100


@dataclass(frozen=True)
class Outcome:
    """A criterion at one setting, on one split.

    Attributes:
        scores: metric -> value.
        mean_exit_layer: m, 1-based.
        layer_speed_up: L / m.
        layers_saved: 1 - m / L.
        exit_shares: share of the rows that leave at each layer 1..L.
        random_exit: value of the deciding metric expected when rows are drawn at random into the same shares.
    """

    scores: dict[str, float]
    mean_exit_layer: float
    layer_speed_up: float
    layers_saved: float
    exit_shares: tuple[float, ...]
    random_exit: float


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
    """Run every layer over a data set.

    Args:
        model: an early-exit model; left in eval mode.
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
    for batch in tqdm(loader, desc=progress, disable=progress is None, leave=False):
        labels.append(batch.pop("labels"))
        trace = model.trace(**{name: values.to(model.device) for name, values in batch.items()})
        aux = {name: values.float().cpu() for name, values in trace.aux.items()}
        traces.append(ExitTrace(trace.logits.float().cpu(), aux))
    return ExitTrace.cat(traces), torch.cat(labels).numpy()


def _early_probabilities(trace: ExitTrace) -> NDArray:
    """Class probabilities at the exits that may leave early, ``[N * (L - 1), C]`` float64."""
    early = trace.logits[:, :-1].double()
    return early.softmax(dim=-1).flatten(0, 1).numpy()


def _quantile_grid(scores: NDArray, points: int) -> list[float]:
    """Thresholds between which equal shares of the scores lie, so that a curve is evenly covered; ascending."""
    return sorted({float(q) for q in np.quantile(scores[np.isfinite(scores)], np.linspace(0, 1, points))})


def _entropy_grid(trace: ExitTrace, points: int) -> list[Criterion]:
    p = _early_probabilities(trace)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
    return [Entropy(threshold=max(t, 0.0)) for t in _quantile_grid(entropy, points)]


def _max_probability_grid(trace: ExitTrace, points: int) -> list[Criterion]:
    top = _early_probabilities(trace).max(axis=1)
    return [MaxProbability(threshold=min(t, 1.0)) for t in _quantile_grid(top, points)]


def _margin_grid(trace: ExitTrace, points: int) -> list[Criterion]:
    ordered = np.sort(_early_probabilities(trace), axis=1)
    return [Margin(threshold=min(t, 1.0)) for t in _quantile_grid(ordered[:, -1] - ordered[:, -2], points)]


def _patience_grid(trace: ExitTrace, points: int) -> list[Criterion]:
    patiences = range(1, trace.depth)
    if trace.logits.shape[2] > 1:
        return [Patience(patience=p) for p in patiences]
    steps = trace.logits[:, :, 0].double().diff(dim=1).abs().flatten().numpy()
    tolerances = [t for t in _quantile_grid(steps, max(3, points // len(patiences))) if t > 0]
    return [Patience(patience=p, tolerance=t) for p in patiences for t in tolerances]


def _q_exit_grid(trace: ExitTrace, points: int) -> list[Criterion]:
    return [QExit(q=float(q)) for q in np.linspace(0.05, 0.95, points)]


_CLASSIFICATION_GRIDS = {
    "entropy": _entropy_grid,
    "max_probability": _max_probability_grid,
    "margin": _margin_grid,
}


def settings(trace: ExitTrace, *, points: int = 24) -> dict[str, list[Criterion]]:
    """The criteria that have a meaning on a trace, each at several settings laid out over its scores.

    Args:
        trace: of the tuning split.
        points: settings of a criterion with a threshold; patience has its own L - 1.

    Raises:
        ValueError: fewer than 8 points, or fewer than two exits.
    """
    if points < 8 or trace.depth < 2:
        raise ValueError(
            f"settings: expected points >= 8 and a trace of at least 2 exits, got {points} and {trace.depth}"
        )
    grids = dict(_CLASSIFICATION_GRIDS) if trace.logits.shape[2] > 1 else {}
    grids["patience"] = _patience_grid
    if "halting" in trace.aux:
        grids["q_exit"] = _q_exit_grid
    return {name: grid(trace, points) for name, grid in grids.items()}


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


def outcome(trace: ExitTrace, labels: ArrayLike, criterion: Criterion, *, metrics: Sequence[str]) -> Outcome:
    """Replay a criterion over a trace and score it; ``metrics[0]`` decides."""
    logits, exit_layer = replay(trace, criterion)
    counts = np.bincount(exit_layer.numpy(), minlength=trace.depth + 1)[1:]
    shares = tuple(float(share) for share in counts / counts.sum())
    mean = float(np.dot(shares, np.arange(1, trace.depth + 1)))
    return Outcome(
        scores=score(metrics, logits.numpy(), labels),
        mean_exit_layer=mean,
        layer_speed_up=trace.depth / mean,
        layers_saved=1 - mean / trace.depth,
        exit_shares=shares,
        random_exit=random_exit(trace, labels, shares, metric=metrics[0]),
    )


def choose(outcomes: Sequence[Outcome], full_depth: float, *, metric: str, drop: float = 0.0) -> int | None:
    """Index of the fastest outcome that loses at most `drop` against full depth, the better one among equally fast.

    Returns:
        the index, or None where every outcome loses more.
    """
    kept = [i for i, o in enumerate(outcomes) if o.scores[metric] >= full_depth - drop - 1e-9]
    return min(kept, key=lambda i: (outcomes[i].mean_exit_layer, -outcomes[i].scores[metric]), default=None)


def sweep(
    tuning: tuple[ExitTrace, ArrayLike],
    reporting: tuple[ExitTrace, ArrayLike],
    *,
    metrics: Sequence[str] = ("accuracy",),
    drop: float = 0.0,
    points: int = 24,
    progress: str | None = None,
) -> Sweep:
    """Try every criterion at every setting, choose on the tuning split and report on the other.

    Args:
        tuning, reporting: trace and labels ``[N]`` of each split, as from `collect_trace`.
        metrics: names of `metrics.METRICS`; the first decides.
        drop: loss of that metric against full depth that a choice may cost on the tuning split, at least 0.
        points: settings of a criterion with a threshold.
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
    full = layers["tuning"][-1][metrics[0]]
    groups = settings(tuning[0], points=points)
    found: dict[str, tuple[Point, ...]] = {}
    with tqdm(total=sum(map(len, groups.values())), desc=progress, disable=progress is None, leave=False) as bar:
        for name, group in groups.items():
            listed = []
            for criterion in group:
                on_tuning, on_reporting = (outcome(*split, criterion, metrics=metrics) for split in splits.values())
                listed.append(Point(criterion, on_tuning, on_reporting))
                bar.update()
            best = choose([point.tuning for point in listed], full, metric=metrics[0], drop=drop)
            if best is not None:
                listed[best] = replace(listed[best], chosen=True)
            found[name] = tuple(sorted(listed, key=lambda point: point.reporting.mean_exit_layer))
    return Sweep(metrics[0], tuning[0].depth, drop, layers, found, *_limits(*reporting))


def _limits(trace: ExitTrace, labels: ArrayLike) -> tuple[float | None, float | None]:
    """Shares of rows right at some exit, and right at some exit but wrong at the last; None for regression."""
    if trace.logits.shape[2] == 1:
        return None, None
    by_layer = [predictions_of(trace.logits[:, k].numpy()) == np.asarray(labels) for k in range(trace.depth)]
    right = np.stack(by_layer, axis=1)
    return float(right.any(axis=1).mean()), float((right.any(axis=1) & ~right[:, -1]).mean())
