"""Reference results of the ops: one row at a time, in float64, from the definitions, without code of the package.

Arrays are numpy and are changed in place where the ops change theirs. Shape letters as in the package: N rows of the
request, B present, T tokens, H width, C classes, K state width. Layers count from 1.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Step:
    """Result of one exit.

    Attributes:
        counts: rows still live, their tokens, rows present with invalid logits.
        score: ``[N]`` the number that each row's decision compares, by request row; NaN where nothing was decided.
        distance: ``[N]`` distance of that number from the value at which the decision changes; inf where nothing was
            decided.
    """

    counts: tuple[int, int, int]
    score: np.ndarray
    distance: np.ndarray


def exit_step(
    *, decide, params, layer, depth, row_ids, state, answers, exit_layer, source, inputs, offsets=None, aux=None
) -> Step:
    """Run one exit: pool, linear, decide, and write the answers of the rows that leave.

    Args:
        decide: one of the functions below.
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
        if is_valid(z) and not (scalar is not None and math.isnan(scalar)):
            at = (layer, depth)
            leaves, score[n], distance[n], z = decide(z, scalar, state[:, n], params, at)
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
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, as in the ops
        total = np.zeros(hidden.shape[1])
        for token in range(offsets[i], offsets[i + 1]):
            total = total + hidden[token]
        return total / (offsets[i + 1] - offsets[i])


def linear(x, weight, bias):
    with np.errstate(invalid="ignore"):
        return np.array([np.sum(weight[c] * x) + bias[c] for c in range(len(bias))])


def is_valid(z) -> bool:
    infinite = sum(1 for v in z if v == math.inf)
    return not any(math.isnan(v) for v in z) and infinite <= 1 and any(v > -math.inf for v in z)


def probabilities(z) -> list[float]:
    top = max(z)
    if top == math.inf:
        return [1.0 if v == top else 0.0 for v in z]
    weights = [math.exp(v - top) for v in z]
    return [w / math.fsum(weights) for w in weights]


def entropy(z) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities(z) if p > 0)


def label(z) -> int:
    """Return the lowest class among those with the largest logit."""
    return min(c for c in range(len(z)) if z[c] == max(z))


def clearance(z) -> float:
    """Return the distance of the label from changing: the difference of the two largest logits."""
    best = label(z)
    return z[best] - max((z[c] for c in range(len(z)) if c != best), default=-math.inf)


def logs(probabilities) -> np.ndarray:
    """Return logarithms, where 0 counts as the smallest normal float32 number."""
    return np.array([math.log(max(p, 2.0**-126)) for p in probabilities])


def uniform(seed, key) -> float:
    """Return a number in [0, 1) from a seed and a key: the top 24 bits of splitmix64 of key xor mixed seed."""

    def mixed(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    return (mixed((key % 2**64) ^ mixed(seed)) >> 40) / 2**24


# Each decision: (z, aux, state, params, (layer, depth)) -> whether the row leaves, the number that is compared, its
# distance from the value at which the decision changes, the answer. The state [K] is changed in place.


def decide_full_depth(z, aux, state, params, at):
    return False, 0.0, math.inf, z


def decide_fixed_layer(z, aux, state, params, at):
    return at[0] >= params[0], 0.0, math.inf, z


def decide_entropy(z, aux, state, params, at):
    threshold, normalized = params
    h = entropy(z) / math.log(len(z)) if normalized else entropy(z)
    return h < threshold, h, abs(h - threshold), z


def decide_max_probability(z, aux, state, params, at):
    p = max(probabilities(z))
    return p >= params[0], p, abs(p - params[0]), z


def decide_margin(z, aux, state, params, at):
    second, first = sorted(probabilities(z))[-2:]
    return first - second >= params[0], first - second, abs(first - second - params[0]), z


def decide_patience(z, aux, state, params, at):
    """The decision changes with the label, where two logits are equal, or with the output, at the tolerance."""
    patience, tolerance = params
    last = state[0]
    if tolerance is None:
        now, distance = float(label(z)), clearance(z)
        agrees = now == last
    else:
        now = z[0]
        moved = math.inf if math.isnan(last) or math.isinf(last) else abs(now - last)
        agrees, distance = moved < tolerance, abs(moved - tolerance)
    state[1] = state[1] + 1 if agrees else 0
    state[0] = now
    return state[1] >= patience, state[1], distance, z


def decide_q_exit(z, aux, state, params, at):
    state[0] *= 1 - aux
    reached = 1 - state[0]
    return reached > params[0] or params[0] == 0, reached, abs(reached - params[0]) if params[0] else math.inf, z


def decide_sampled_exit(z, aux, state, params, at):
    state[0] *= 1 - aux
    reached = 1 - state[0]
    return reached > state[1], reached, abs(reached - state[1]), z


def decide_expectation(z, aux, state, params, at):
    layer, depth = at
    weight = state[0] if layer == depth else state[0] * aux
    values = z if len(z) == 1 else probabilities(z)
    for c in range(len(z)):
        state[1 + c] += weight * values[c] if weight > 0 else 0.0
    state[0] *= 1 - aux
    return False, 0.0, math.inf, state[1:].copy() if len(z) == 1 else logs(state[1:])


def decide_voting(z, aux, state, params, at):
    """State: votes * 4096 + layer of the last vote."""
    threshold, gamma, final = params
    layer, depth = at
    mine = label(z)
    state[mine] = (state[mine] // 4096 + 1) * 4096 + layer
    votes = [v // 4096 for v in state]
    tied = [c for c in range(len(z)) if votes[c] == max(votes)]
    winner = max(tied, key=lambda c: state[c] % 4096)
    smoothed = [v + 1 + 0.5 * (c == winner) for c, v in enumerate(votes)]
    answer = z if final == "last" and layer == depth else logs(s / math.fsum(smoothed) for s in smoothed)
    return max(votes) / layer**gamma >= threshold - 1e-9, max(votes), clearance(z), answer


def decide_dact(z, aux, state, params, at):
    bound, epsilon = params
    layer, depth = at
    before, left = state[0], depth - layer
    p = state[0] = (1 - aux) * before
    state[1:] = [y * before + a * (1 - before) for y, a in zip(probabilities(z), state[1:], strict=True)]
    second, top = sorted(state[1:])[-2:]
    kept = (1 - p) ** left
    lead = top * kept - (second + p * left)
    if bound == "tight":
        lead = max(lead, (top - second) * kept - (1 - kept))
    leaves = lead > 1e-6 or (epsilon > 0 and p <= epsilon)
    return leaves, lead, min(abs(lead - 1e-6), abs(p - epsilon) if epsilon > 0 else math.inf), logs(state[1:])


def decide_learned(z, aux, state, params, at):
    return aux < params[0], aux, abs(aux - params[0]), z


def decide_hidden_cosine(z, aux, state, params, at):
    return aux >= params[0], aux, abs(aux - params[0]), z


def decide_patient_confidence(z, aux, state, params, at):
    threshold, patience = params
    h = entropy(z) / math.log(len(z))
    state[0] = state[0] + 1 if h < threshold else 0
    return state[0] >= patience, state[0], abs(h - threshold), z


def decide_divergence_patience(z, aux, state, params, at):
    """Jensen-Shannon divergence: the mean of both Kullback-Leibler divergences from the mean."""
    threshold, patience = params
    now, last = probabilities(z), list(state[1:])
    apart = math.inf
    if not any(math.isnan(q) for q in last):
        middle = [(p + q) / 2 for p, q in zip(now, last, strict=True)]
        apart = sum(
            math.fsum(a * math.log(a / m) for a, m in zip(one, middle, strict=True) if a > 0) / 2 for one in (now, last)
        )
    state[0] = state[0] + 1 if apart < threshold else 0
    state[1:] = now
    return state[0] >= patience, state[0], abs(apart - threshold), z


def decide_energy(z, aux, state, params, at):
    top = max(z)
    if top > 700:  # exp would overflow
        return params[0] > 0, 0.0, params[0], z
    energy = 1 / (1 + math.fsum(math.exp(v) for v in z))
    return energy < params[0], energy, abs(energy - params[0]), z


def compact(row_ids, offsets):
    """Return the new row ids, offsets and sources of the live rows, as lists."""
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
