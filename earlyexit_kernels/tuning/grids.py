"""The settings of each criterion that a sweep tries, laid out over the scores of a tuning trace; one line a rule.

Thresholds are laid near quantiles of what the rule compares with them, over the exits that may leave early: about equal
shares of the scores lie between two of them, so that the curve is evenly covered whatever the model. None equals a
score. Rules without a threshold have the few settings there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels import criteria
from earlyexit_kernels.criteria import RULES, Criterion
from earlyexit_kernels.types import AUX_ACTIVATIONS, ExitTrace

#: ``(trace, points) -> settings``.
Grid: TypeAlias = Callable[[ExitTrace, int], "Iterable[Criterion]"]

SEEDS = (0, 1, 2)
#: PALBERT's own q, always tried.
PAPER_Q = 0.5
#: Layers in a row that a patient threshold is tried with.
PATIENCES = (1, 2, 3)
#: Exponents of the layer in voting. With 1 the first exit's own vote is unanimous, so that every row leaves there.
GAMMAS = (0.0, 0.25, 0.5, 0.75)
#: Fewest settings that make a curve.
FEWEST_POINTS = 8
#: By how much scores differ at least that a threshold is laid between: several times what float32 tells apart at 1, or
#: at a score above 1.
RESOLUTION = 1e-6
#: Fewest thresholds at each value of a rule's second number.
FEWEST = 4


def settings(
    trace: ExitTrace, *, points: int = 24, problem_type: str | None = None
) -> dict[str, tuple[Criterion, ...]]:
    """The criteria that have a meaning on a trace, each at several settings.

    Args:
        trace: of the tuning split.
        points: settings of a criterion with a threshold, about; patience, for one, has its own L - 1.
        problem_type: as in transformers; default: regression with one output, else one label of several.

    Raises:
        ValueError: fewer than `FEWEST_POINTS`, or fewer than two exits.
    """
    if points < FEWEST_POINTS or trace.depth < 2:
        raise ValueError(
            f"settings: expected points >= {FEWEST_POINTS} and a trace of at least 2 exits, got {points} and "
            f"{trace.depth}"
        )
    task = problem_type or ("regression" if trace.logits.shape[2] == 1 else "single_label_classification")
    return {
        name: fitting
        for name, grid in GRIDS.items()
        if _may_fit(RULES[name], trace, task)
        and (fitting := tuple(rule for rule in grid(trace, points) if _fits(rule, trace, task)))
    }


def skip_settings(
    trace: ExitTrace, *, skip_from: Sequence[float] = (0.5, 1.0), points: int = 8
) -> tuple[Criterion, ...]:
    """Settings of `SkipGate` around `Entropy`, to be run and not replayed: skips change all later hidden states.

    Args:
        trace: of the tuning split, every layer run; it only lays the entropies out.
        skip_from: gate values from which a layer is skipped; 1 is never, unless a gate rounds to 1.
        points: entropy thresholds at each of them, the first one 0, where no row leaves early.
    """
    entropies = _thresholds(_entropy(_log_probabilities(trace)), points - 1, low=0.0)
    thresholds = [0.0, *entropies]
    return tuple(
        criteria.SkipGate(threshold=skip, exit=criteria.Entropy(threshold=t))
        for skip in skip_from
        for t in dict.fromkeys(thresholds)
    )


def _may_fit(rule: type[Criterion], trace: ExitTrace, problem_type: str) -> bool:
    """Whether a rule reads only what the trace has, so that a grid can be laid out."""
    has_keys = trace.keys is not None or not rule.uses_keys
    return problem_type in rule.tasks and (rule.needs is None or rule.needs in trace.aux) and has_keys


def _fits(rule: Criterion, trace: ExitTrace, problem_type: str) -> bool:
    shape: dict[str, Any] = {"depth": trace.depth, "classes": trace.logits.shape[2], "aux": tuple(trace.aux)}
    try:
        criteria.check_fits(rule, problem_type=problem_type, **shape)
    except ValueError:
        return False
    return True


def _log_probabilities(trace: ExitTrace) -> Tensor:
    """Log of the class probabilities at the exits that may leave early, ``[N, L - 1, C]`` float64."""
    return trace.logits[:, :-1].double().log_softmax(dim=-1)


def _aux(trace: ExitTrace, name: str) -> Tensor:
    """A scalar as a rule reads it, at the exits that may leave early, ``[N, L - 1]`` float64."""
    return AUX_ACTIVATIONS[name](trace.aux[name][:, :-1].double())


def _entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats over the last axis."""
    return torch.special.entr(log_p.exp()).sum(dim=-1)


def _divergence(log_p: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of successive exits, ``[N, L - 2]`` of ``[N, L - 1, C]``."""
    first, second = log_p[:, :-1].exp(), log_p[:, 1:].exp()
    middle = torch.special.entr((first + second) / 2).sum(dim=-1)
    return middle - (_entropy(log_p[:, :-1]) + _entropy(log_p[:, 1:])) / 2


def _thresholds(scores: Tensor, points: int, *, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Distinct numbers in ``[low, high]``, ascending, between which about equal shares of the scores lie.

    Each is halfway between two scores that differ by more than `RESOLUTION`, or beyond all scores: a score that equals
    a threshold would leave the decision to rounding.
    """
    known = np.sort(scores[scores.isfinite()].numpy(), axis=None)
    if not known.size:
        return []
    step = RESOLUTION * max(abs(known[0]), abs(known[-1]), 1.0) * 4 + (known[-1] - known[0]) / 50
    ends = [x if math.isfinite(x) else y for x, y in ((low, known[0] - step), (high, known[-1] + step))]
    below, above = np.concatenate(([ends[0]], known)), np.concatenate((known, [ends[1]]))
    # a cut is the number of scores below the threshold
    cuts = np.flatnonzero(above - below > RESOLUTION * np.maximum(np.abs(above), 1.0))
    if not cuts.size:
        return []
    wanted = np.linspace(0, known.size, points)
    right = np.searchsorted(cuts, wanted).clip(max=cuts.size - 1)
    left = (right - 1).clip(min=0)
    nearest = np.where(wanted - cuts[left] < cuts[right] - wanted, cuts[left], cuts[right])
    return [float(below[k] + above[k]) / 2 for k in sorted(set(nearest.tolist()))]


def _shares(points: int, parts: int) -> int:
    """Thresholds at each of `parts` values of a second number."""
    return max(FEWEST, points // parts)


def _entropies(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    scores = _entropy(_log_probabilities(trace))
    return [criteria.Entropy(threshold=t) for t in _thresholds(scores, points, low=0.0)]


def _max_probabilities(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    scores = _log_probabilities(trace).exp().amax(dim=-1)
    return [criteria.MaxProbability(threshold=t) for t in _thresholds(scores, points, low=0.0, high=1.0)]


def _margins(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    first, *others = _log_probabilities(trace).exp().topk(min(2, trace.logits.shape[2]), dim=-1).values.unbind(-1)
    scores = first - sum(others)
    return [criteria.Margin(threshold=t) for t in _thresholds(scores, points, low=0.0, high=1.0)]


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


def _sampled_exits(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    return [criteria.SampledExit(seed=seed) for seed in SEEDS]


def _expectations(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    return [criteria.Expectation()]


def _votings(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    named = trace.logits[:, :-1].argmax(dim=-1)
    most = F.one_hot(named, trace.logits.shape[2]).cumsum(dim=1).amax(dim=-1).double()
    layers = torch.arange(1, trace.depth, dtype=torch.float64)
    for gamma in GAMMAS:
        scores = (most / layers**gamma).flatten()
        # up to 1, the score of every first vote, all rows leave at layer 1; gamma 0 says that once
        some = _thresholds(scores[scores > 1], _shares(points, len(GAMMAS)), low=1.0)
        # numbers of votes are whole, so that a threshold that equals one is exact
        values = scores.unique().tolist() if gamma == 0 else some
        yield from (criteria.Voting(threshold=t, gamma=gamma) for t in values)


def _dacts(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    may_change = (1 - _aux(trace, "halting")).cumprod(dim=1)
    epsilons = dict.fromkeys((0.0, *_thresholds(may_change, _shares(points, 2) - 1, low=0.0, high=1.0)))
    return [criteria.Dact(bound=bound, epsilon=e) for bound in ("paper", "tight") for e in epsilons]


def _learned(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    scores = _aux(trace, "uncertainty")
    return [criteria.Learned(threshold=t) for t in _thresholds(scores, points, low=0.0, high=1.0)]


def _patient_confidences(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    scores = _entropy(_log_probabilities(trace)) / math.log(max(trace.logits.shape[2], 2))
    thresholds = _thresholds(scores, _shares(points, len(PATIENCES)), low=0.0, high=1.0)
    return [criteria.PatientConfidence(threshold=t, patience=p) for p in PATIENCES for t in thresholds]


def _divergence_patiences(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    scores = _divergence(_log_probabilities(trace))
    thresholds = _thresholds(scores, _shares(points, len(PATIENCES)), low=0.0, high=1.0)
    return [criteria.DivergencePatience(threshold=t, patience=p) for p in PATIENCES for t in thresholds]


def _hidden_cosines(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    scores = _aux(trace, "hidden_cosine")
    return [criteria.HiddenCosine(threshold=t) for t in _thresholds(scores, points, low=-1.0, high=1.0)]


def _energies(trace: ExitTrace, points: int) -> Iterable[Criterion]:
    scores = torch.sigmoid(-trace.logits[:, :-1].double().logsumexp(dim=-1))
    return [criteria.Energy(threshold=t) for t in _thresholds(scores, points, low=0.0, high=1.0)]


#: Every rule of `RULES` that has something to set; full depth has not.
GRIDS: dict[str, Grid] = {
    "entropy": _entropies,
    "max_probability": _max_probabilities,
    "margin": _margins,
    "patience": _patiences,
    "q_exit": _q_exits,
    "sampled_exit": _sampled_exits,
    "expectation": _expectations,
    "voting": _votings,
    "dact": _dacts,
    "learned": _learned,
    "patient_confidence": _patient_confidences,
    "divergence_patience": _divergence_patiences,
    "hidden_cosine": _hidden_cosines,
    "energy": _energies,
}
