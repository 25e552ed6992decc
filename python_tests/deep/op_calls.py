"""Strategies for valid calls of the ops, and their comparison with the oracle."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from support import oracle
from support.backends import missing_reason
from support.criterion_case import EPS
from support.criterion_cases import CASES
from support.exit_step_cases import DTYPES, SOURCES, UNTOUCHED, memory
from support.random_settings import Drawn, chance, choice
from torch import Tensor

from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.criteria import RULES

ROWS = (0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 11, 33, 90)
CLASSES = (2, 2, 3, 3, 4, 7, 17, 65)
WIDTHS = (1, 3, 8, 16, 17, 33, 64, 131)
WRITTEN = ("row_ids", "state", "answers", "exit_layer")
BACK_ENDS = tuple(name for name, reason in available_backends("cpu").items() if not missing_reason(reason))
#: Numpy's random numbers for large arrays, of which hypothesis draws the seed only.
GENERATORS = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@dataclasses.dataclass
class Batch:
    """B live rows of N requested ones, with the inputs of the exit at each layer."""

    rule: Drawn
    row_ids: Tensor
    memory: dict[str, Tensor]
    layers: list[dict[str, Any]]

    def arguments(self, layer: int) -> dict[str, Any]:
        """Return the arguments of `ops.exit_step`, with copies of what it writes."""
        written = {name: tensor.clone() for name, tensor in ({"row_ids": self.row_ids} | self.memory).items()}
        depth = len(self.layers)
        return {"criterion": self.rule.criterion, "layer": layer, "depth": depth, **written, **self.layers[layer - 1]}

    def take(self, written: dict[str, Any]) -> None:
        """Continue with what a call has written."""
        self.row_ids, self.memory = written["row_ids"], {name: written[name] for name in WRITTEN[1:]}


def int32(values: Any) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def offsets_of(lengths: Any, first: int = 0) -> Tensor:
    return int32(np.concatenate(([first], first + np.cumsum(lengths))))


def normal(numbers: np.random.Generator, *shape: int) -> np.ndarray:
    return numbers.standard_normal(shape, dtype=np.float32)


def spoiled(draw: Any, values: np.ndarray, largest: float = math.inf) -> np.ndarray:
    """Set some of the values to NaN, infinity or the largest finite number."""
    if values.size and chance(draw, 25):
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, values.size - 1))
            values.reshape(-1)[at] = choice(draw, (math.nan, math.inf, -math.inf, largest, -largest))
    return values


@st.composite
def batches(draw: Any) -> Batch:
    """Draw a rule with its setting, a batch before layer 1, and the inputs at each layer."""
    name, depth, numbers = choice(draw, sorted(RULES)), draw(st.integers(1, 6)), draw(GENERATORS)
    one = ("regression" in RULES[name].tasks and chance(draw, 20)) or (name == "patience" and chance(draw, 30))
    classes = 1 if one else choice(draw, CLASSES)
    rule = CASES[name].draw(draw, classes, depth)
    rows, spare = choice(draw, ROWS), draw(st.integers(0, 3))
    row_ids = numbers.permutation(rows + spare)[:rows]
    if chance(draw, 40):
        row_ids[numbers.random(rows) < 0.3] = -1
    source, dtype = choice(draw, SOURCES), choice(draw, DTYPES)
    shared: dict[str, Any] = {}
    tokens = rows
    if source in ("first", "mean") or chance(draw, 50):
        lengths = numbers.integers(1, choice(draw, (2, 5, 40)), rows)
        lengths[row_ids < 0] *= numbers.integers(0, 2)
        shared["offsets"] = offsets_of(lengths, draw(st.integers(0, 2)))
        tokens = rows if source == "none" else int(shared["offsets"][-1]) + draw(st.integers(0, 2))
    if source != "logits":
        hidden = spoiled(draw, normal(numbers, tokens, choice(draw, WIDTHS)))
        shared.update(hidden=torch.from_numpy(hidden).to(dtype), pooling=source)
    layers, last = [], None
    for _ in range(depth):
        inputs = dict(shared)
        scale = np.float32(choice(draw, (0.3, 1.0, 3.0, 10.0, 40.0)))
        if source == "logits":
            last = logits_of(draw, numbers, (rows, classes), scale, dtype, last)
            inputs["logits"] = torch.from_numpy(last).to(dtype)
        else:
            width = shared["hidden"].shape[1]
            weight, bias = normal(numbers, classes, width) * scale / math.sqrt(width), normal(numbers, classes)
            inputs.update(weight=torch.from_numpy(weight).to(dtype), bias=torch.from_numpy(bias).to(dtype))
        if rule.criterion.needs is not None:
            aux = numbers.random(rows, dtype=np.float32) * np.float32(rule.scale)
            aux = aux * 2 - 1 if name == "hidden_cosine" else aux
            if rows and chance(draw, 10):
                aux[draw(st.integers(0, rows - 1))] = choice(draw, (math.nan, 0.0, 1.0))
            inputs["aux"] = torch.from_numpy(aux)
        elif chance(draw, 10):
            inputs["aux"] = torch.full((rows,), math.nan)  # not read by this rule
        layers.append(inputs)
    return Batch(rule, int32(row_ids), memory(rule.criterion, rows + spare, classes), layers)


def logits_of(draw: Any, numbers: Any, shape: tuple[int, int], scale: Any, dtype: Any, last: Any) -> np.ndarray:
    """Draw logits: random, with ties, with special values, or close to those of the previous exit."""
    if last is not None and chance(draw, 30):
        step = np.float32(10.0 ** -draw(st.integers(2, 6)))
        return np.clip(np.nan_to_num(last, posinf=9, neginf=-9), -99, 99) + step * normal(numbers, *shape)
    logits, largest = normal(numbers, *shape) * scale, float(torch.finfo(dtype).max)
    logits = spoiled(draw, np.round(logits) if chance(draw, 20) else logits, largest)
    if shape[0] and shape[1] > 1 and chance(draw, 10):
        logits[draw(st.integers(0, shape[0] - 1)), :2] = choice(draw, ((math.inf, largest), (largest, math.inf)))
    return logits


@st.composite
def compactions(draw: Any) -> dict[str, Tensor]:
    """Draw the arguments of `ops.compact`."""
    numbers, rows = draw(GENERATORS), choice(draw, ROWS)
    row_ids = np.where(numbers.random(rows) < choice(draw, (0, 0.3, 0.7)), -1, numbers.permutation(rows))
    lengths = numbers.integers(0, choice(draw, (2, 5, 60)), rows)
    return {"row_ids": int32(row_ids), "offsets": offsets_of(lengths, draw(st.integers(0, 2)))}


@st.composite
def moves(draw: Any) -> dict[str, Tensor]:
    """Draw the arguments of `ops.gather_rows`: a compaction, or repeated, unordered and missing sources."""
    numbers, rows = draw(GENERATORS), choice(draw, ROWS)
    lengths = numbers.integers(0, choice(draw, (2, 5, 60)), rows)
    offsets = offsets_of(lengths)
    if chance(draw, 50):
        row_ids = np.where(numbers.random(rows) < 0.4, -1, np.arange(rows))
        _, new_offsets, source = oracle.compact(row_ids.tolist(), offsets.tolist())
    else:
        new = choice(draw, ROWS)
        source = numbers.integers(-1, rows, new) if rows else np.full(new, -1)
        kept = np.where(source < 0, numbers.integers(0, 4, new), np.append(lengths, 0)[source])
        new_offsets = offsets_of(kept)
    dtype, width = choice(draw, DTYPES), choice(draw, (0, *WIDTHS))
    hidden = torch.from_numpy(normal(numbers, int(offsets[-1]) + draw(st.integers(0, 2)), width)).to(dtype)
    if chance(draw, 30):
        hidden = hidden.T.contiguous().T
    out = torch.full((int(new_offsets[-1]) + draw(st.integers(0, 2)), width), UNTOUCHED, dtype=dtype)
    return {
        "hidden": hidden,
        "offsets": offsets,
        "source": int32(source),
        "new_offsets": int32(new_offsets),
        "out": out,
    }


def exact_logits(inputs: dict[str, Any], present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return logits ``[B, C]`` in float64, and the error bound ``[B]`` of float32 implementations."""
    if inputs.get("logits") is not None:
        exact = inputs["logits"].double().numpy()
        return exact, np.zeros(len(exact))
    hidden, weight, bias = (inputs[name].double().numpy() for name in ("hidden", "weight", "bias"))
    offsets, pooling = inputs.get("offsets"), inputs["pooling"]
    pooled, size = (np.zeros((len(present), hidden.shape[1])) for _ in range(2))
    longest = 1
    with np.errstate(invalid="ignore"):
        for i in np.flatnonzero(present):
            begin, end = (i, i + 1) if offsets is None or pooling == "none" else offsets[i : i + 2].tolist()
            tokens = hidden[begin : end if pooling == "mean" else begin + 1]
            pooled[i], size[i] = tokens.mean(axis=0), np.abs(tokens).mean(axis=0)
            longest = max(longest, len(tokens))
        logits = (pooled[:, None, :] * weight).sum(axis=2) + bias
        absolute = (size[:, None, :] * np.abs(weight)).sum(axis=2) + np.abs(bias)
    steps = hidden.shape[1] + longest + 8
    return logits, np.nan_to_num(absolute, nan=0.0, posinf=0.0).max(axis=1, initial=0.0) * EPS * steps


def check_exit_step(rule: Drawn, before: dict[str, Any], after: dict[str, Any], counts: Tensor, why: str) -> None:
    """Fail if what a call of `ops.exit_step` wrote differs from the oracle's results by more than rounding.

    Args:
        rule: the setting of the criterion.
        before, after: the arguments before and after the call.
        counts: returned by the call.
        why: names the call.
    """
    layer, depth, offsets = before["layer"], before["depth"], before.get("offsets")
    ids = before["row_ids"].numpy()
    logits, error = exact_logits(before, ids >= 0)
    truth = {name: before[name].numpy().copy() for name in ("row_ids", "exit_layer")}
    truth.update({name: before[name].double().numpy().copy() for name in ("state", "answers")})
    step = oracle.exit_step(
        decide=CASES[rule.name].decide,
        params=rule.numbers(layer),
        layer=layer,
        depth=depth,
        source="logits",
        inputs=logits,
        offsets=None if offsets is None else offsets.numpy(),
        aux=None if rule.criterion.needs is None else before["aux"].double().numpy(),
        **truth,
    )
    values = {name: after[name].numpy() for name in WRITTEN}
    others = np.setdiff1d(np.arange(len(before["answers"])), ids[ids >= 0])
    for name, axis in (("state", 1), ("answers", 0), ("exit_layer", 0)):
        kept, was = (np.take(x, others, axis=axis) for x in (values[name], before[name].numpy()))
        assert np.array_equal(kept, was, equal_nan=True), f"{why}: {name} of rows outside of the batch has changed"
    present = np.flatnonzero(ids >= 0)
    largest = np.abs(np.where(np.isfinite(logits), logits, 0.0)).max(axis=1, initial=0.0)
    tolerance, params = CASES[rule.name].tolerance, rule.numbers(layer)
    near = [tolerance(params, step.score[ids[i]], error[i], largest[i], depth - layer) for i in present]
    present = present[~(step.distance[ids[present]] < np.array(near, dtype=np.float64))]  # others are within rounding
    rows, off = ids[present], (error[present, None], largest[present, None])
    for name, got, expected in (
        ("row_ids", values["row_ids"][present, None], truth["row_ids"][present, None]),
        ("exit_layer", values["exit_layer"][rows, None], truth["exit_layer"][rows, None]),
        ("state", values["state"][:, rows].T, truth["state"][:, rows].T),
        ("answers", values["answers"][rows], truth["answers"][rows]),
    ):
        bad = np.flatnonzero(~_close(rule, name, got, expected, *off))
        assert not len(bad), (
            f"{why}: {name} of row {present[bad[0]]} is {got[bad[0]]}, expected {expected[bad[0]]}; "
            f"logits {logits[present[bad[0]]]}, score {step.score[rows[bad[0]]]!r}"
        )
    live = values["row_ids"] >= 0
    lengths = np.ones(len(live), dtype=int) if offsets is None else np.diff(offsets.numpy())
    wanted = [int(live.sum()), int(lengths[live].sum()), step.counts[2]]
    assert counts.dtype == torch.int32 and counts.tolist() == wanted, f"{why}: counts {counts.tolist()}, not {wanted}"


def _close(rule: Drawn, name: str, got: Any, expected: Any, off: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Return which rows of ``[B, ...]`` are equal up to rounding; `off` and `largest` are ``[B, 1]``."""
    with np.errstate(invalid="ignore", over="ignore"):
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        if name in ("state", "answers") and not same.all():
            size = np.where(np.isfinite(expected), np.abs(expected), 0.0)
            same |= np.abs(got - expected) <= 4e-6 * (1 + size) + 8 * off + 8 * EPS * largest
            if name == "answers" and CASES[rule.name].own_answer:
                # logarithms of shares, which may differ much for tiny shares
                shares = np.exp(got.astype(np.float64)), np.exp(expected)
                same |= (shares[1] <= 1.001) & (np.abs(shares[0] - shares[1]) <= 8e-6 + 8 * off)
        return same.all(axis=1)
