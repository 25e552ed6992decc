"""Compare rules on kept answers, at a share of the multiply-adds of the rows that are reported on.

Settings are chosen on the rows for that (``tuning``); of the reported rows only the multiply-adds are read to meet a
share, no label. Shares are of the bare encoder at full depth; exits, their scalars and gates count.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.evidence.kept import Kept
from earlyexit_kernels.core.replay import replay_each
from earlyexit_kernels.criteria import Criterion, Expectation, FixedLayer, SampledExit, from_dict
from earlyexit_kernels.tuning.flops import exits_computed
from earlyexit_kernels.tuning.metrics import predictions_of
from earlyexit_kernels.tuning.settings import settings
from earlyexit_kernels.types import read_aux

#: Settings of a rule with a threshold, and draws of rules that draw.
POINTS, DRAWS = 16, 20
#: Draws of the bootstrap over rows, and its seed.
BOOTSTRAP, SEED = 2000, 0


@dataclass(frozen=True)
class Outcome:
    """What a setting does on N rows.

    Attributes:
        criterion: the setting.
        answers: ``[N]`` classes or numbers.
        exit_layer: ``[N]``, 1-based.
        layers_run: ``[N]``.
        macs: ``[N]`` multiply-adds over the mean of the bare encoder at full depth.
    """

    criterion: Criterion
    answers: NDArray
    exit_layer: NDArray
    layers_run: NDArray
    macs: NDArray


@dataclass(frozen=True)
class Mix:
    """Two settings, the first of which answers a share of the reported rows, drawn at random.

    Attributes:
        first, second: settings on the reported rows.
        weight: share of the first.
    """

    first: Outcome
    second: Outcome
    weight: float

    @property
    def macs(self) -> float:
        """Mean share of the multiply-adds."""
        return float(self.weight * self.first.macs.mean() + (1 - self.weight) * self.second.macs.mean())

    @property
    def layers(self) -> float:
        """Mean layers run."""
        return float(self.weight * self.first.layers_run.mean() + (1 - self.weight) * self.second.layers_run.mean())


class Comparison:
    """The rules of one trained model on its kept answers.

    Args:
        kept: of the model.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    @functools.cache  # noqa: B019 - lives as long as the tables that are made of it
    def settings(self, rule: str) -> tuple[Criterion, ...]:
        """Return the settings of a rule or an arm that skips layers, from the tuning rows; none if it has none here."""
        if rule in self.kept.arms:
            return tuple(criterion for made in self.kept.arms[rule] if (criterion := from_dict(made)))
        trace = self.kept.trace("tuning")
        if rule == "fixed_layer":
            return tuple(FixedLayer(layer=k) for k in range(1, self.kept.depth + 1))
        if rule in ("sampled_exit", "expectation"):
            draws = [SampledExit(seed=seed) for seed in range(DRAWS)]
            return () if "halting" not in trace.aux else tuple(draws if rule == "sampled_exit" else [Expectation()])
        return tuple(settings(trace, points=POINTS, problem_type=self.kept.problem_type).get(rule, ()))

    @functools.cache  # noqa: B019
    def outcomes(self, rule: str, split: str, draw: str = "") -> tuple[Outcome, ...]:
        """Return what each setting of a rule does on a split, or on one of its draws of changed words."""
        group = self.settings(rule)
        if rule in self.kept.arms:
            names = ("answers", "exit_layer", "layers_run")
            arrays = zip(*(self.kept.arrays[f"{split}_{rule}_{name}"].astype(np.int64) for name in names), strict=True)
            return tuple(self._outcome(split, c, *rows) for c, rows in zip(group, arrays, strict=True))
        trace, found = self.kept.trace(split, draw), []
        for criterion, (logits, layers) in zip(group, replay_each(trace, group), strict=True):
            answers = predictions_of(logits.numpy(), self.kept.problem_type)
            found.append(self._outcome(split, criterion, answers, layers.numpy(), layers.numpy()))
        return tuple(found)

    def _outcome(self, split: str, criterion: Criterion, answers: NDArray, layers: NDArray, run: NDArray) -> Outcome:
        macs = self.macs(split, criterion, layers, run) / self.full_macs(split).mean()
        return Outcome(criterion, answers, layers, run, macs)

    def full_macs(self, split: str) -> NDArray:
        """Return the multiply-adds ``[N]`` of the bare encoder at full depth."""
        costs, tokens = self.kept.costs, self.kept.tokens(split)
        return costs.of(costs.embedding, tokens) + self.kept.depth * costs.of(costs.layer, tokens)

    def macs(self, split: str, criterion: Criterion, exit_layer: NDArray, layers_run: NDArray) -> NDArray:
        """Return the multiply-adds ``[N]`` of rows that leave after `exit_layer`, as `tuning.flops.row_macs`."""
        costs, tokens, depth = self.kept.costs, self.kept.tokens(split), self.kept.depth
        due = [criterion.exit_rule.is_due(k, depth) for k in range(1, depth + 1)]
        exits = exits_computed(torch.from_numpy(exit_layer), torch.from_numpy(layers_run), due).numpy()
        total = costs.of(costs.embedding, tokens) + layers_run * costs.of(costs.layer, tokens)
        total = total + exits * costs.of(costs.exits[criterion.exit_rule.needs or ""], tokens)
        return total + (exit_layer * costs.of(costs.gate, tokens) if criterion.skip_from is not None else 0.0)

    def score(self, answers: NDArray, split: str) -> float:
        """Return the metric of the answers ``[N]`` to the rows of a split."""
        ones = np.ones((1, len(answers)))
        return float(weighted_scores(self.kept.metric, answers, self.kept.labels(split), ones)[0])

    def mix(self, rule: str, share: float) -> Mix | None:
        """Return the best two settings of a rule on the tuning rows, mixed to a share on the reported rows.

        None if the settings do not reach the share.
        """
        tuning, reporting = self.outcomes(rule, "tuning"), self.outcomes(rule, "reporting")
        points = [(float(o.macs.mean()), self.score(o.answers, "tuning")) for o in tuning]
        for first, second in itertools.pairwise(upper_hull(points)):
            cheap, dear = sorted((reporting[first], reporting[second]), key=lambda o: o.macs.mean())
            low, high = cheap.macs.mean(), dear.macs.mean()
            if low <= share <= high and low < high:
                return Mix(cheap, dear, float((high - share) / (high - low)))
        return None

    def lossless(self, rule: str) -> Outcome | None:
        """Return the cheapest setting that loses nothing on the tuning rows, on the reported ones."""
        full = self.score(self.at_layers("tuning")[-1], "tuning")
        tuning = self.outcomes(rule, "tuning")
        kept = [n for n, o in enumerate(tuning) if self.score(o.answers, "tuning") >= full]
        cheapest = min(kept, key=lambda n: tuning[n].macs.mean(), default=None)
        return None if cheapest is None else self.outcomes(rule, "reporting")[cheapest]

    def at_layers(self, split: str, criterion: Criterion | None = None) -> NDArray:
        """Return the answers ``[L, N]`` that a row would get after each layer, in the way a rule answers.

        Args:
            split: of the rows.
            criterion: whose answers; None: those of the exits. Rules that mix or vote answer by all layers so far.
        """
        trace = self.kept.trace(split)
        rule = None if criterion is None else criterion.exit_rule
        if rule is None or not rule.initial_state(trace.logits.shape[2]):
            return np.stack([predictions_of(z.numpy(), self.kept.problem_type) for z in trace.logits.unbind(1)])
        rows, depth, classes = trace.logits.shape
        state = torch.tensor(rule.initial_state(classes)).repeat(rows, 1).T.contiguous()
        aux = read_aux(trace.aux[rule.needs], rule.needs) if rule.needs else None
        found = []
        for layer in range(1, depth + 1):
            scalar = None if aux is None else aux[:, layer - 1]
            z = trace.logits[:, layer - 1]
            answers, _, state = rule.rule(z, scalar, state, layer, depth, rule.params(layer))
            found.append(predictions_of(answers.numpy(), self.kept.problem_type))
        return np.stack(found)

    def random(self, mix: Mix) -> float:
        """Return the expected score if the rows that leave at each layer are drawn, and answered as by the rule."""
        return mix.weight * self._random(mix.first) + (1 - mix.weight) * self._random(mix.second)

    def _random(self, outcome: Outcome) -> float:
        answers, rng = self.at_layers("reporting", outcome.criterion), np.random.default_rng(SEED)
        scores = []
        for _ in range(DRAWS):
            layers = rng.permutation(outcome.exit_layer)
            scores.append(self.score(answers[layers - 1, np.arange(len(layers))], "reporting"))
        return float(np.mean(scores))

    def mixed_score(self, mix: Mix) -> float:
        """Return the score of a mix on the reported rows."""
        return float(self._drawn(mix, np.ones((1, len(mix.first.answers))))[0])

    def difference(self, first: Mix, second: Mix) -> tuple[float, float, float]:
        """Return how far the score of a mix is above another's, with the 95 % interval over draws of the rows."""
        rows = len(first.first.answers)
        draws = np.random.default_rng(SEED).multinomial(rows, np.full(rows, 1 / rows), size=BOOTSTRAP)
        apart = self._drawn(first, draws) - self._drawn(second, draws)
        low, high = np.quantile(apart, (0.025, 0.975))
        return self.mixed_score(first) - self.mixed_score(second), float(low), float(high)

    def _drawn(self, mix: Mix, draws: NDArray) -> NDArray:
        labels = self.kept.labels("reporting")
        one, other = (weighted_scores(self.kept.metric, o.answers, labels, draws) for o in (mix.first, mix.second))
        return mix.weight * one + (1 - mix.weight) * other


def upper_hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of the points ``(cost, score)`` of the upper hull, by cost."""
    hull: list[int] = []
    for number in sorted(range(len(points)), key=lambda n: points[n]):
        while len(hull) > 1 and _turns_up(points[hull[-2]], points[hull[-1]], points[number]):
            hull.pop()
        if hull and points[number][0] == points[hull[-1]][0]:
            hull.pop()
        hull.append(number)
    return hull


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) >= (b[1] - a[1]) * (c[0] - a[0])


def weighted_scores(metric: str, answers: NDArray, labels: NDArray, weights: NDArray) -> NDArray:
    """Return a metric ``[B]`` under B weights ``[B, N]`` of the rows: accuracy, Matthews or Pearson correlation."""
    weights = weights / weights.sum(axis=1, keepdims=True)
    if metric == "accuracy":
        return weights @ (answers == labels).astype(np.float64)
    x, y = answers.astype(np.float64), labels.astype(np.float64)
    mean_x, mean_y = weights @ x, weights @ y
    covariance = weights @ (x * y) - mean_x * mean_y
    spread = (weights @ (x * x) - mean_x**2) * (weights @ (y * y) - mean_y**2)
    return np.divide(covariance, np.sqrt(np.maximum(spread, 0.0)), out=np.zeros_like(covariance), where=spread > 1e-12)
