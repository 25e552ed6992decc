"""The truth about the ops: one row at a time, in float64, from the definitions. Shares nothing with the package.

Arrays are numpy and are changed in place where the ops change theirs. Shape letters as in the package: N rows of the
request, B present, T tokens, H width, C classes, K state width. Layers count from 1.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Step:
    """What one exit did.

    Attributes:
        counts: rows still live, their tokens, rows present without a meaningful answer.
        score: ``[N]`` the number each row's decision rests on, by request row; NaN where nothing was decided.
        distance: ``[N]`` how far that number is from where the decision turns; inf where nothing was decided.
    """

    counts: tuple[int, int, int]
    score: np.ndarray
    distance: np.ndarray


def exit_step(
    *, criterion, params, layer, depth, row_ids, state, answers, exit_layer, source, inputs, offsets=None, aux=None
) -> Step:
    """One exit: pool, linear, decide, and the answers of the rows that leave.

    Args:
        source: ``"logits"`` (`inputs` is ``[B, C]``), or a pooling (`inputs` is hidden, weight, bias).
    """
    score, distance = np.full(len(answers), np.nan), np.full(len(answers), np.inf)
    live = tokens = invalid = 0
    for i in range(len(row_ids)):
        n = row_ids[i]
        if n < 0:
            continue
        z = inputs[i] if source == "logits" else linear(pool(inputs[0], offsets, i, source), *inputs[1:])
        scalar = None if aux is None else aux[i]
        leaves = False
        if has_meaning(z) and not (scalar is not None and math.isnan(scalar)):
            leaves, score[n], distance[n] = DECISIONS[criterion](z, scalar, state[:, n], params)
        else:
            invalid += 1
        if leaves or layer == depth:
            answers[n], exit_layer[n], row_ids[i] = z, layer, -1
        else:
            live += 1
            tokens += 1 if offsets is None else offsets[i + 1] - offsets[i]
    return Step((live, int(tokens), invalid), score, distance)


def pool(hidden, offsets, i, pooling):
    if pooling == "none" or offsets is None:
        return hidden[i]
    if pooling == "first":
        return hidden[offsets[i]]
    with np.errstate(invalid="ignore"):  # inf - inf is the NaN it should be
        total = np.zeros(hidden.shape[1])
        for token in range(offsets[i], offsets[i + 1]):
            total = total + hidden[token]
        return total / (offsets[i + 1] - offsets[i])


def linear(x, weight, bias):
    with np.errstate(invalid="ignore"):
        return np.array([np.sum(weight[c] * x) + bias[c] for c in range(len(bias))])


def has_meaning(z) -> bool:
    infinite = sum(1 for v in z if v == math.inf)
    return not any(math.isnan(v) for v in z) and infinite <= 1 and any(v > -math.inf for v in z)


def probabilities(z) -> list[float]:
    top = max(z)
    if top == math.inf:
        return [1.0 if v == top else 0.0 for v in z]
    weights = [math.exp(v - top) for v in z]
    return [w / math.fsum(weights) for w in weights]


def _full_depth(z, aux, state, params):
    return False, 0.0, math.inf


def _entropy(z, aux, state, params):
    threshold, normalized = params
    h = -math.fsum(p * math.log(p) for p in probabilities(z) if p > 0)
    h = h / math.log(len(z)) if normalized else h
    return h < threshold, h, abs(h - threshold)


def _max_probability(z, aux, state, params):
    p = max(probabilities(z))
    return p >= params[0], p, abs(p - params[0])


def _margin(z, aux, state, params):
    second, first = sorted(probabilities(z))[-2:]
    return first - second >= params[0], first - second, abs(first - second - params[0])


def _patience(z, aux, state, params):
    """The decision turns where the label does (two top logits meet), or where the output moves by the tolerance."""
    patience, tolerance = params
    last = state[0]
    if tolerance is None:
        best = min(c for c in range(len(z)) if z[c] == max(z))
        others = [z[c] for c in range(len(z)) if c != best]
        now, distance = float(best), z[best] - max(others, default=-math.inf)
        agrees = now == last
    else:
        now = z[0]
        moved = math.inf if math.isnan(last) or math.isinf(last) else abs(now - last)
        agrees, distance = moved < tolerance, abs(moved - tolerance)
    state[1] = state[1] + 1 if agrees else 0
    state[0] = now
    return state[1] >= patience, state[1], distance


def _q_exit(z, aux, state, params):
    state[0] *= 1 - aux
    reached = 1 - state[0]
    return reached > params[0] or params[0] == 0, reached, abs(reached - params[0]) if params[0] else math.inf


DECISIONS = {
    "full_depth": _full_depth,
    "entropy": _entropy,
    "max_probability": _max_probability,
    "margin": _margin,
    "patience": _patience,
    "q_exit": _q_exit,
}


def compact(row_ids, offsets):
    """New row ids, offsets and sources of the live rows, as lists."""
    ids, ends, source = [], [0], []
    for i in range(len(row_ids)):
        if row_ids[i] >= 0:
            ids.append(row_ids[i])
            ends.append(ends[-1] + offsets[i + 1] - offsets[i])
            source.append(i)
    gone = len(row_ids) - len(ids)
    return ids + [-1] * gone, ends + [ends[-1]] * gone, source + [-1] * gone


def gather_rows(hidden, offsets, source, new_offsets, out):
    for j in range(len(source)):
        if source[j] >= 0:
            for k in range(new_offsets[j + 1] - new_offsets[j]):
                out[new_offsets[j] + k] = hidden[offsets[source[j]] + k]
