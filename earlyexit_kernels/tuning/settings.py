"""Settings of each criterion for a sweep, computed from the scores of a tuning trace.

Thresholds are near quantiles of the numbers that the rule compares with them, at the exits before the last: about equal
shares of the scores are between two thresholds, so that the curve is evenly covered for any model. No threshold equals
a score. Rules without a threshold have a few settings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels import criteria
from earlyexit_kernels.criteria import RULES, Criterion
from earlyexit_kernels.types import AUX_ACTIVATIONS, ExitTrace, default_problem_type

#: ``(trace, points) -> settings``.
Grid: TypeAlias = Callable[[ExitTrace, int], "Iterable[Criterion]"]

SEEDS = (0, 1, 2)
#: q in the paper of PALBERT, always included.
PAPER_Q = 0.5
#: Numbers of consecutive exits for the rules with a threshold and a patience.
PATIENCES = (1, 2, 3)
#: Exponents of the layer in voting, without 1: there the first vote is unanimous and every row leaves at layer 1.
GAMMAS = (0.0, 0.25, 0.5, 0.75)
#: Minimum number of settings of a curve.
MIN_POINTS = 8
#: Minimum difference of two scores with a threshold between them, relative to scores above 1: several times the
#: resolution of float32 at 1.
RESOLUTION = 1e-6
#: Minimum number of thresholds for each value of a rule's second parameter.
MIN_THRESHOLDS = 4


def settings(
    trace: ExitTrace, *, points: int = 24, problem_type: str | None = None
) -> dict[str, tuple[Criterion, ...]]:
    """Return the criteria of the package that fit a trace, each with several settings.

    Args:
        trace: of the tuning split.
        points: approximate number of settings of a criterion with a threshold; patience has L - 1.
        problem_type: as in transformers; default: regression with one output, else single-label classification.

    Returns:
        Name of the criterion -> its settings. Registered criteria are not included.

    Raises:
        ValueError: fewer than `MIN_POINTS` points, or fewer than two exits.
    """
    if points < MIN_POINTS or trace.depth < 2:
        raise ValueError(
            f"settings: expected points >= {MIN_POINTS} and a trace of at least 2 exits, got {points} and {trace.depth}"
        )
    task = problem_type or default_problem_type(trace.logits.shape[2])
    allowed = rule_names(trace.aux, task, has_keys=trace.keys is not None)
    return {
        name: fitting
        for name in allowed
        if (fitting := tuple(rule for rule in GRIDS[name](trace, points) if _fits(rule, trace, task)))
    }


def rule_names(aux: Collection[str], problem_type: str, *, has_keys: bool = True) -> list[str]:
    """Return the criteria in `GRIDS` that a task and the scalars of the exits allow.

    Args:
        aux: names of the scalars that the exits produce.
        problem_type: as in transformers.
        has_keys: whether the rows have keys, from which random numbers are drawn.
    """
    return [
        name
        for name in GRIDS
        if problem_type in (rule := RULES[name]).tasks
        and (rule.needs is None or rule.needs in aux)
        and (has_keys or not rule.uses_keys)
    ]


def skip_settings(
    trace: ExitTrace, *, skip_from: Sequence[float] = (0.5, 1.0), points: int = 8
) -> tuple[Criterion, ...]:
    """Return settings of `SkipGate` with `Entropy`; they cannot be replayed, since skips change later hidden states.

    Args:
        trace: of the tuning split at full depth, for the thresholds of the entropy.
        skip_from: gate values from which a layer is skipped; with 1 none is, unless a gate rounds to 1.
        points: number of entropy thresholds for each of them; the first one is 0, with which no row leaves early.
    """
    entropies = _thresholds(_entropy(_log_probabilities(trace)), points - 1, low=0.0)
    thresholds = [0.0, *entropies]
    return tuple(
        criteria.SkipGate(threshold=skip, exit=criteria.Entropy(threshold=t))
        for skip in skip_from
        for t in dict.fromkeys(thresholds)
    )


def _fits(rule: Criterion, trace: ExitTrace, problem_type: str) -> bool:
    shape: dict[str, Any] = {"depth": trace.depth, "classes": trace.logits.shape[2], "aux": tuple(trace.aux)}
    try:
        criteria.check_fits(rule, problem_type=problem_type, **shape)
    except ValueError:
        return False
    return True


def _log_probabilities(trace: ExitTrace) -> Tensor:
    """Return the log of the class probabilities at the exits before the last, ``[N, L - 1, C]`` float64."""
    return trace.logits[:, :-1].double().log_softmax(dim=-1)


def _aux(trace: ExitTrace, name: str) -> Tensor:
    """Return a scalar as a rule reads it, at the exits before the last, ``[N, L - 1]`` float64."""
    return AUX_ACTIVATIONS[name](trace.aux[name][:, :-1].double())


def _margin(trace: ExitTrace) -> Tensor:
    """Return the difference of the two largest class probabilities, or the only one."""
    first, *others = _log_probabilities(trace).exp().topk(min(2, trace.logits.shape[2]), dim=-1).values.unbind(-1)
    return first - sum(others)


def _entropy(log_p: Tensor) -> Tensor:
    """Return the entropy in nats over the last axis."""
    return torch.special.entr(log_p.exp()).sum(dim=-1)


def _divergence(log_p: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence in nats of successive exits, ``[N, L - 2]`` for ``[N, L - 1, C]``."""
    first, second = log_p[:, :-1].exp(), log_p[:, 1:].exp()
    middle = torch.special.entr((first + second) / 2).sum(dim=-1)
    return middle - (_entropy(log_p[:, :-1]) + _entropy(log_p[:, 1:])) / 2


def _thresholds(scores: Tensor, points: int, *, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Return distinct numbers in ``[low, high]``, ascending, with about equal shares of the scores between them.

    Each one is halfway between two scores that differ by more than `RESOLUTION`, or beyond all scores: if a score
    equalled a threshold, rounding would decide.
    """
    known = np.sort(scores[scores.isfinite()].numpy(), axis=None)
    if not known.size:
        return []
    step = RESOLUTION * max(abs(known[0]), abs(known[-1]), 1.0) * 4 + (known[-1] - known[0]) / 50
    ends = [x if math.isfinite(x) else y for x, y in ((low, known[0] - step), (high, known[-1] + step))]
    below, above = np.concatenate(([ends[0]], known)), np.concatenate((known, [ends[1]]))
    # a cut: number of scores below the threshold
    cuts = np.flatnonzero(above - below > RESOLUTION * np.maximum(np.abs(above), 1.0))
    if not cuts.size:
        return []
    wanted = np.linspace(0, known.size, points)
    right = np.searchsorted(cuts, wanted).clip(max=cuts.size - 1)
    left = (right - 1).clip(min=0)
    nearest = np.where(wanted - cuts[left] < cuts[right] - wanted, cuts[left], cuts[right])
    return [float(below[k] + above[k]) / 2 for k in sorted(set(nearest.tolist()))]


def _shares(points: int, parts: int) -> int:
    """Return the number of thresholds for each of `parts` values of a second parameter."""
    return max(MIN_THRESHOLDS, points // parts)


def _over(scores: Callable[[ExitTrace], Tensor], *builds: Any, low: float = 0.0, high: float = 1.0) -> Grid:
    """Return the grid of a rule with a threshold.

    Args:
        scores: ``trace ->`` the numbers that are compared with the threshold.
        builds: ``threshold=... ->`` the rule, one for each value of a second parameter.
        low, high: range of the threshold.
    """

    def grid(trace: ExitTrace, points: int) -> Iterable[Criterion]:
        count = points if len(builds) == 1 else _shares(points, len(builds))
        thresholds = _thresholds(scores(trace), count, low=low, high=high)
        return [build(threshold=t) for build in builds for t in thresholds]

    return grid


def _patiences(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    patiences = range(1, trace.depth)
    if trace.logits.shape[2] > 1:
        return [criteria.Patience(patience=p) for p in patiences]
    steps = trace.logits[:, :, 0].double().diff(dim=1).abs()
    tolerances = _thresholds(steps, _shares(points, len(patiences)), low=0.0)
    return [criteria.Patience(patience=p, tolerance=t) for p in patiences for t in tolerances]


def _q_exits(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    left = 1 - (1 - _aux(trace, "halting")).cumprod(dim=1)
    return [criteria.QExit(q=q) for q in sorted({PAPER_Q, *_thresholds(left, points - 1, low=0.0, high=1.0)})]


def _votings(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    named = trace.logits[:, :-1].argmax(dim=-1)
    most = F.one_hot(named, trace.logits.shape[2]).cumsum(dim=1).amax(dim=-1).double()
    layers = torch.arange(1, trace.depth, dtype=torch.float64)
    for gamma in GAMMAS:
        scores = (most / layers**gamma).flatten()
        # with thresholds up to 1, the score of the first vote, all rows leave at layer 1; gamma 0 covers that
        some = _thresholds(scores[scores > 1], _shares(points, len(GAMMAS)), low=1.0)
        # numbers of votes are whole, so a threshold that equals one is exact
        values = scores.unique().tolist() if gamma == 0 else some
        yield from (criteria.Voting(threshold=t, gamma=gamma) for t in values)


def _dacts(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    may_change = (1 - _aux(trace, "halting")).cumprod(dim=1)
    epsilons = dict.fromkeys((0.0, *_thresholds(may_change, _shares(points, 2) - 1, low=0.0, high=1.0)))
    return [criteria.Dact(bound=bound, epsilon=e) for bound in ("paper", "tight") for e in epsilons]


def _for_each_patience(rule: Any) -> list[Any]:
    return [functools.partial(rule, patience=patience) for patience in PATIENCES]


#: Grids of all rules of `RULES` but full depth, which has no settings.
GRIDS: dict[str, Grid] = {
    "entropy": _over(lambda trace: _entropy(_log_probabilities(trace)), criteria.Entropy, high=math.inf),
    "max_probability": _over(lambda trace: _log_probabilities(trace).exp().amax(dim=-1), criteria.MaxProbability),
    "margin": _over(_margin, criteria.Margin),
    "patience": _patiences,
    "q_exit": _q_exits,
    "sampled_exit": lambda trace, points: [criteria.SampledExit(seed=seed) for seed in SEEDS],
    "expectation": lambda trace, points: [criteria.Expectation()],
    "voting": _votings,
    "dact": _dacts,
    "learned": _over(lambda trace: _aux(trace, "uncertainty"), criteria.Learned),
    "patient_confidence": _over(
        lambda trace: _entropy(_log_probabilities(trace)) / math.log(max(trace.logits.shape[2], 2)),
        *_for_each_patience(criteria.PatientConfidence),
    ),
    "divergence_patience": _over(
        lambda trace: _divergence(_log_probabilities(trace)), *_for_each_patience(criteria.DivergencePatience)
    ),
    "hidden_cosine": _over(lambda trace: _aux(trace, "hidden_cosine"), criteria.HiddenCosine, low=-1.0),
    "energy": _over(lambda trace: torch.sigmoid(-trace.logits[:, :-1].double().logsumexp(dim=-1)), criteria.Energy),
    "fixed_layer": lambda trace, points: [criteria.FixedLayer(layer=layer) for layer in range(1, trace.depth)],
}
