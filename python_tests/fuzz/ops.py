"""Target `ops`: valid calls of `exit_step`, `compact` and `gather_rows`, compared with float64 oracles."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import numpy as np
import torch
from support import oracle
from support.criterion_case import EPS
from support.criterion_cases import CASES
from support.random_settings import Drawn
from torch import Tensor

from earlyexit_kernels import ops
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.criteria import RULES
from fuzz.case import Case, WrongError

SOURCES = ("logits", "first", "mean", "none")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 11, 33, 90)
CLASSES = (2, 2, 3, 3, 4, 7, 17, 65)
WIDTHS = (1, 3, 8, 16, 17, 33, 64, 131)
UNTOUCHED, NO_LAYER = -7.5, -9
ASKED = os.environ.get("EARLYEXIT_FUZZ_BACKENDS") or "torch,triton,cpp"
BACK_ENDS = tuple(
    name for name, missing in available_backends("cpu").items() if not missing and name in ASKED.split(",")
)
WRITTEN = ("row_ids", "state", "answers", "exit_layer")


@dataclasses.dataclass
class Batch:
    """A batch between two layers: B live rows of N requested ones, T packed tokens."""

    rule: Drawn
    source: str
    dtype: torch.dtype
    classes: int
    depth: int
    row_ids: Tensor
    offsets: Tensor | None
    hidden: Tensor | None
    memory: dict[str, Tensor]
    last: np.ndarray | None = None

    @property
    def requests(self) -> int:
        return self.memory["answers"].shape[0]


def run(case: Case) -> None:
    """Run one batch through all layers, with compactions."""
    if case.chance(0.1):
        moved_rows(case)
        return
    batch = start(case)
    for layer in range(1, batch.depth + 1):
        if not case.chance(0.1):  # an exit may be skipped
            one_layer(case, batch, layer)
        if batch.offsets is not None and case.chance(0.3):
            compact_batch(case, batch)


def start(case: Case) -> Batch:
    """Return a random batch before layer 1."""
    name = case.choice(list(RULES))
    one = ("regression" in RULES[name].tasks and case.chance(0.2)) or (name == "patience" and case.chance(0.3))
    classes = 1 if one else case.choice(CLASSES)
    depth = case.integer(1, 6)
    rule = drawn_setting(name, case, classes, depth)
    rows, spare = case.choice(ROWS), case.integer(0, 3)
    row_ids = torch.from_numpy(case.arrays.permutation(rows + spare)[:rows].astype(np.int32))
    if rows and case.chance(0.4):
        row_ids[torch.from_numpy(case.arrays.random(rows) < 0.3)] = -1
    source, dtype = case.choice(SOURCES), case.choice(DTYPES)
    offsets, hidden = None, None
    if source in ("first", "mean") or case.chance(0.5):
        lengths = case.arrays.integers(1, case.choice((2, 5, 40)), rows)
        lengths[row_ids.numpy() < 0] *= case.arrays.integers(0, 2)
        first = case.integer(0, 2)
        offsets = torch.from_numpy(np.concatenate(([first], first + lengths.cumsum())).astype(np.int32))
    if source != "logits":
        tokens = rows if source == "none" or offsets is None else int(offsets[-1]) + case.integer(0, 2)
        hidden = with_special_values(case, case.normal(tokens, case.choice(WIDTHS))).to(dtype)
    keys = torch.arange(rows + spare)
    memory = {
        "state": rule.criterion.new_state(rows + spare, torch.device("cpu"), classes, keys),
        "answers": torch.full((rows + spare, classes), UNTOUCHED),
        "exit_layer": torch.full((rows + spare,), NO_LAYER),
    }
    return Batch(rule, source, dtype, classes, depth, row_ids, offsets, hidden, memory)


def drawn_setting(name: str, case: Case, classes: int, depth: int) -> Drawn:
    """Draw a random setting of a rule."""
    draw = CASES[name].draw
    assert draw is not None
    return draw(case, classes, depth)


def with_special_values(case: Case, values: np.ndarray, edge: float = math.inf) -> Tensor:
    """Set some of the values to NaN, infinity or the largest finite number."""
    if values.size and case.chance(0.25):
        for _ in range(case.integer(1, 4)):
            at = tuple(int(case.arrays.integers(0, size)) for size in values.shape)
            values[at] = case.choice((math.nan, math.inf, -math.inf, edge, -edge))
    return torch.from_numpy(values)


def given_at(case: Case, batch: Batch, layer: int) -> dict[str, Any]:
    """Return the inputs of the exit at one layer."""
    rows, classes = len(batch.row_ids), batch.classes
    given: dict[str, Any] = {} if batch.offsets is None else {"offsets": batch.offsets}
    scale = case.choice((0.3, 1.0, 3.0, 10.0, 40.0))
    if batch.hidden is None:
        given["logits"] = drawn_logits(case, batch, np.float32(scale))
    else:
        width = batch.hidden.shape[1]
        weight = case.normal(classes, width) * np.float32(scale / math.sqrt(width))
        bias = case.normal(classes)
        given.update(hidden=batch.hidden, pooling=batch.source)
        given["weight"], given["bias"] = (torch.from_numpy(x).to(batch.dtype) for x in (weight, bias))
    if batch.rule.criterion.needs is not None:
        aux = case.arrays.random(rows, dtype=np.float32) * np.float32(batch.rule.scale)
        if batch.rule.name == "hidden_cosine":
            aux = aux * 2 - 1
        if rows and case.chance(0.1):
            aux[int(case.arrays.integers(0, rows))] = case.choice((math.nan, 0.0, 1.0))
        given["aux"] = torch.from_numpy(aux)
    elif case.chance(0.1):
        given["aux"] = torch.full((rows,), math.nan)  # not read by this rule
    return given


def drawn_logits(case: Case, batch: Batch, scale: np.float32) -> Tensor:
    """Return logits ``[B, C]``: random, with ties, with special values, or close to those of the previous exit."""
    shape = len(batch.row_ids), batch.classes
    largest = float(torch.finfo(batch.dtype).max)
    if batch.last is not None and batch.last.shape == shape and case.chance(0.3):
        step = np.float32(10.0 ** -case.integer(2, 6))
        logits = torch.from_numpy(batch.last + step * case.normal(*shape))
    else:
        logits = case.normal(*shape) * scale
        logits = with_special_values(case, np.round(logits) if case.chance(0.2) else logits, largest)
        if shape[0] and shape[1] > 1 and case.chance(0.1):
            logits[case.integer(0, shape[0] - 1), :2] = torch.tensor(case.draw.sample((math.inf, largest), 2))
    batch.last = logits.nan_to_num(nan=0.0, posinf=9.0, neginf=-9.0).clamp(-99, 99).numpy()
    return logits.to(batch.dtype)


def one_layer(case: Case, batch: Batch, layer: int) -> None:
    """Run one exit on every back-end from the same buffers, and continue with one of the results."""
    given = given_at(case, batch, layer)
    logits, tolerance = exact_logits(batch, given)
    truth, step = oracle_step(batch, given, layer, logits)
    results = []
    for backend in BACK_ENDS:
        got = {"row_ids": batch.row_ids.clone(), **{name: t.clone() for name, t in batch.memory.items()}}
        counts = call(batch, given, layer, got, backend)
        case.calls += 1
        compare(batch, layer, got, counts, truth, step, logits, tolerance, backend)
        results.append((backend, got, counts))
    if len(batch.row_ids) > 1 and case.chance(0.2):
        backend, got, _ = case.choice(results)
        alone(case, batch, given, layer, got, backend)
    got = case.choice(results)[1]
    batch.row_ids = got.pop("row_ids")
    batch.memory = got


def call(batch: Batch, given: dict[str, Any], layer: int, memory: dict[str, Tensor], backend: str) -> Tensor:
    return ops.exit_step(
        criterion=batch.rule.criterion, layer=layer, depth=batch.depth, backend=backend, **memory, **given
    )


def exact_logits(batch: Batch, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return logits ``[B, C]`` in float64, and the error bound ``[B]`` of float32 implementations."""
    if "logits" in given:
        exact = given["logits"].double().numpy()
        return exact, np.zeros(len(exact))
    hidden, weight, bias = (given[name].double().numpy() for name in ("hidden", "weight", "bias"))
    rows = len(batch.row_ids)
    pooled, size, longest = np.zeros((rows, hidden.shape[1])), np.zeros((rows, hidden.shape[1])), 1
    with np.errstate(invalid="ignore"):
        for i in np.flatnonzero(batch.row_ids.numpy() >= 0):
            begin, end = i, i + 1
            if batch.offsets is not None and batch.source != "none":
                begin, end = int(batch.offsets[i]), int(batch.offsets[i + 1])
            tokens = hidden[begin : end if batch.source == "mean" else begin + 1]
            pooled[i], size[i] = tokens.mean(axis=0), np.abs(tokens).mean(axis=0)
            longest = max(longest, len(tokens))
        logits = (pooled[:, None, :] * weight).sum(axis=2) + bias
        absolute = (size[:, None, :] * np.abs(weight)).sum(axis=2) + np.abs(bias)
    steps = hidden.shape[1] + longest + 8
    return logits, np.nan_to_num(absolute, nan=0.0, posinf=0.0).max(axis=1, initial=0.0) * EPS * steps


def oracle_step(
    batch: Batch, given: dict[str, Any], layer: int, logits: np.ndarray
) -> tuple[dict[str, np.ndarray], oracle.Step]:
    """Return the buffers of the oracle after the step, and its scores."""
    truth = {
        "row_ids": batch.row_ids.numpy().copy(),
        "state": batch.memory["state"].double().numpy().copy(),
        "answers": batch.memory["answers"].double().numpy().copy(),
        "exit_layer": batch.memory["exit_layer"].numpy().copy(),
    }
    needed = batch.rule.criterion.needs is not None
    step = oracle.exit_step(
        decide=CASES[batch.rule.name].decide,
        params=batch.rule.numbers(layer),
        layer=layer,
        depth=batch.depth,
        source="logits",
        inputs=logits,
        offsets=None if batch.offsets is None else batch.offsets.numpy(),
        aux=given["aux"].double().numpy() if needed else None,
        **truth,
    )
    return truth, step


def compare(
    batch: Batch,
    layer: int,
    got: dict[str, Tensor],
    counts: Tensor,
    truth: dict[str, np.ndarray],
    step: oracle.Step,
    logits: np.ndarray,
    tolerance: np.ndarray,
    backend: str,
) -> None:
    """Raise `WrongError` if a result differs by more than rounding."""
    rule, params = batch.rule, batch.rule.numbers(layer)

    def wrong(what: str) -> WrongError:
        return WrongError(
            f"exit_step on {backend}, {rule.criterion}, layer {layer} of {batch.depth}, {batch.source}, "
            f"{batch.dtype}, {len(batch.row_ids)} rows of {batch.classes} classes: {what}"
        )

    values = {name: tensor.numpy() for name, tensor in got.items()}
    before = batch.row_ids.numpy()
    untouched = np.ones(batch.requests, dtype=bool)
    untouched[before[before >= 0]] = False
    for name, axis in (("state", 1), ("answers", 0), ("exit_layer", 0)):
        old = batch.memory[name].numpy()
        after, was = (np.compress(untouched, x, axis=axis) for x in (values[name], old))
        if not np.array_equal(after, was, equal_nan=True):
            raise wrong(f"{name} of rows outside of the batch has changed")
    present = np.flatnonzero(before >= 0)
    rows = before[present]
    largest = np.abs(np.where(np.isfinite(logits), logits, 0.0)).max(axis=1, initial=0.0)
    near = np.fromiter(
        (
            CASES[rule.name].tolerance(params, step.score[n], tolerance[i], largest[i], batch.depth - layer)
            for i, n in zip(present, rows, strict=True)
        ),
        dtype=np.float64,
        count=len(rows),
    )
    decided = ~(step.distance[rows] < near)  # other rows are within rounding of the threshold
    present, rows = present[decided], rows[decided]
    off, size = tolerance[present, None], largest[present, None]
    for name, a, b in (
        ("row_ids", values["row_ids"][present, None], truth["row_ids"][present, None]),
        ("exit_layer", values["exit_layer"][rows, None], truth["exit_layer"][rows, None]),
        ("state", values["state"][:, rows].T, truth["state"][:, rows].T),
        ("answers", values["answers"][rows], truth["answers"][rows]),
    ):
        bad = np.flatnonzero(~close(rule, name, a, b, off, size))
        if len(bad):
            i, n = present[bad[0]], rows[bad[0]]
            raise wrong(
                f"{name} of row {i} is {a[bad[0]]}, expected {b[bad[0]]}; logits {logits[i]}, score {step.score[n]!r}"
            )
    live = values["row_ids"] >= 0
    lengths = np.ones(len(live), dtype=int) if batch.offsets is None else np.diff(batch.offsets.numpy())
    expected = [int(live.sum()), int(lengths[live].sum()), step.counts[2]]
    if counts.dtype != torch.int32 or counts.tolist() != expected:
        raise wrong(f"counts are {counts.tolist()}, expected {expected}")


def close(
    rule: Drawn, name: str, got: np.ndarray, expected: np.ndarray, off: np.ndarray, largest: np.ndarray
) -> np.ndarray:
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


def alone(case: Case, batch: Batch, given: dict[str, Any], layer: int, got: dict[str, Tensor], backend: str) -> None:
    """Check that the bits of a row are the same without the other rows of its batch."""
    present = np.flatnonzero(batch.row_ids.numpy() >= 0)
    if not len(present):
        return
    i = int(case.choice(list(present)))
    single = dict(given)
    for name in ("logits", "aux"):
        if name in single:
            single[name] = single[name][i : i + 1]
    if batch.hidden is not None and (batch.source == "none" or batch.offsets is None):
        single["hidden"] = batch.hidden[i : i + 1]
    if batch.offsets is not None:
        single["offsets"] = batch.offsets[i : i + 2]
    memory = {"row_ids": batch.row_ids[i : i + 1].clone(), **{k: t.clone() for k, t in batch.memory.items()}}
    call(batch, single, layer, memory, backend)
    case.calls += 1
    n = int(batch.row_ids[i])
    for name, a, b in (
        ("row_ids", memory["row_ids"][0], got["row_ids"][i]),
        ("state", memory["state"][:, n], got["state"][:, n]),
        ("answers", memory["answers"][n], got["answers"][n]),
    ):
        if not np.array_equal(a.numpy(), b.numpy(), equal_nan=True):
            raise WrongError(
                f"exit_step on {backend}, {batch.rule.criterion}, {batch.source}, {batch.dtype}: {name} of row {i} "
                f"alone is {a.tolist()}, in the batch {b.tolist()}"
            )


def compact_batch(case: Case, batch: Batch) -> None:
    """Compact on every back-end, compare, and continue with the result."""
    assert batch.offsets is not None
    expected = oracle.compact(batch.row_ids.tolist(), batch.offsets.tolist())
    for backend in BACK_ENDS:
        planned = ops.compact(batch.row_ids, batch.offsets, backend=backend)
        case.calls += 1
        if [t.tolist() for t in planned] != [list(x) for x in expected] or {t.dtype for t in planned} != {torch.int32}:
            raise WrongError(
                f"compact on {backend} of {batch.row_ids.tolist()}, {batch.offsets.tolist()}: got {planned}"
            )
    new_ids, new_offsets, source = (torch.tensor(x, dtype=torch.int32) for x in expected)
    if batch.hidden is not None and batch.source != "none":
        batch.hidden = gathered(case, batch.hidden, batch.offsets, source, new_offsets)
    elif batch.hidden is not None:
        batch.hidden = batch.hidden[source.long().clamp(min=0)]
    batch.row_ids, batch.offsets = new_ids, new_offsets


def gathered(case: Case, hidden: Tensor, offsets: Tensor, source: Tensor, new_offsets: Tensor) -> Tensor:
    """Compare `gather_rows` on every back-end with the oracle, and return the output buffer."""
    tokens = int(new_offsets[-1]) + case.integer(0, 2)
    expected = np.full((tokens, hidden.shape[1]), UNTOUCHED)
    oracle.gather_rows(hidden.double().numpy(), offsets.tolist(), source.tolist(), new_offsets.tolist(), expected)
    for backend in BACK_ENDS:
        out = torch.full((tokens, hidden.shape[1]), UNTOUCHED, dtype=hidden.dtype)
        ops.gather_rows(hidden, offsets, source, new_offsets, out, backend=backend)
        case.calls += 1
        if not np.array_equal(out.double().numpy(), expected, equal_nan=True):
            raise WrongError(
                f"gather_rows on {backend} of {offsets.tolist()}, {source.tolist()}, {new_offsets.tolist()}"
            )
    return out


def moved_rows(case: Case) -> None:
    """Call `gather_rows` with repeated, unordered and missing sources."""
    rows, new = case.choice(ROWS), case.choice(ROWS)
    lengths = case.arrays.integers(0, case.choice((2, 5, 60)), rows)
    offsets = torch.from_numpy(np.concatenate(([0], lengths.cumsum())).astype(np.int32))
    source = case.arrays.integers(-1, rows, new) if rows else np.full(new, -1)
    taken = np.where(source < 0, case.arrays.integers(0, 4, new), np.append(lengths, 0)[source])
    new_offsets = torch.from_numpy(np.concatenate(([0], taken.cumsum())).astype(np.int32))
    hidden = torch.from_numpy(case.normal(int(offsets[-1]) + case.integer(0, 2), case.choice((0, *WIDTHS))))
    if case.chance(0.3):
        hidden = torch.from_numpy(case.normal(*hidden.T.shape)).T  # with other strides
    gathered(case, hidden.to(case.choice(DTYPES)), offsets, torch.from_numpy(source.astype(np.int32)), new_offsets)
