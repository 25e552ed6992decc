"""Inputs for the tests of exit_step: seeded batches with valid and invalid rows, and the results of the oracle."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Any

import numpy as np
import torch
from support import oracle
from support.criterion_cases import CASES, OWNERS, SETTINGS
from torch import Tensor

from earlyexit_kernels import criteria
from earlyexit_kernels.ops import exit_step

DEPTH = 4
SOURCES = ("first", "mean", "none", "logits")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Hidden width by batch size: odd widths, and one above a Triton block.
WIDTHS = {0: 8, 1: 131, 7: 33, 33: 16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch: B rows present of a request of B + 3, at all layers, for one of `SETTINGS`."""

    rule: str
    source: str
    dtype: torch.dtype
    rows: int
    classes: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rule}-{self.source}-{dtype}-B{self.rows}-C{self.classes}"

    @property
    def criterion(self) -> criteria.Criterion:
        return SETTINGS[self.rule].build(self.classes)

    @property
    def exact(self) -> bool:
        """Whether the decision involves no rounding: labels compared on given logits."""
        return self.source == "logits" and SETTINGS[self.rule].exact

    @property
    def own_answer(self) -> bool:
        """Whether the answer differs from the logits of the exit."""
        return CASES[OWNERS[self.rule]].own_answer


@dataclasses.dataclass(frozen=True)
class Batch:
    """The tensors of a case: the inputs of `ops.exit_step` at each layer, and the row ids before layer 1."""

    row_ids: Tensor
    requests: int
    layers: tuple[dict[str, Any], ...]


@functools.lru_cache(maxsize=8)
def build(case: Case) -> Batch:
    """Build the batch of a case: shuffled rows of the request, some of which have left before layer 1."""
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    requests = case.rows + 3
    row_ids = torch.randperm(requests, generator=g)[: case.rows].to(torch.int32)
    if case.rows > 1:
        row_ids[torch.rand(case.rows, generator=g) < 0.15] = -1
    lengths = torch.randint(1, 5, (case.rows,), generator=g)
    offsets = torch.zeros(case.rows + 1, dtype=torch.int32)
    offsets[1:] = lengths.cumsum(0)
    layers = tuple(_layer(case, layer, offsets, g) for layer in range(1, DEPTH + 1))
    return Batch(row_ids, requests, layers)


def _layer(case: Case, layer: int, offsets: Tensor, g: torch.Generator) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if case.source == "logits":
        logits = torch.randn(case.rows, case.classes, generator=g) * layer
        spoil_logits(logits, case.dtype, g)
        given["logits"] = logits.to(case.dtype)
    else:
        width = WIDTHS.get(case.rows, 16)
        tokens = case.rows if case.source == "none" else int(offsets[-1])
        hidden = torch.randn(tokens, width, generator=g)
        for bad in (math.nan, math.inf, -math.inf):
            if case.rows >= 7:
                hidden[torch.randint(tokens, (1,), generator=g), torch.randint(width, (1,), generator=g)] = bad
        weight = torch.randn(case.classes, width, generator=g) * layer / math.sqrt(width)
        bias = torch.randn(case.classes, generator=g) / 4
        given.update(hidden=hidden.to(case.dtype), weight=weight.to(case.dtype), bias=bias.to(case.dtype))
        given.update(pooling=case.source, offsets=offsets)
    if case.criterion.needs is not None:
        given["aux"] = torch.rand(case.rows, generator=g) * SETTINGS[case.rule].scale
        if case.rows >= 7:
            given["aux"][torch.randint(case.rows, (1,), generator=g)] = math.nan
    return given


def spoil_logits(logits: Tensor, dtype: torch.dtype, g: torch.Generator) -> None:
    """Write invalid logits, extreme ones and ties into rows of ``[B, C]`` with B >= 7."""
    if len(logits) < 7:
        return
    largest = torch.finfo(dtype).max
    rows = torch.randperm(len(logits), generator=g)
    logits[rows[0], 0] = math.nan
    logits[rows[1], -1] = math.inf
    logits[rows[2]] = math.inf
    logits[rows[3]] = -math.inf
    logits[rows[4], 0] = -math.inf
    logits[rows[5]] = 1.5
    logits[rows[6], 0], logits[rows[6], -1] = -largest, largest


@dataclasses.dataclass(frozen=True)
class Truth:
    """Memory of the oracle after one layer; arrays as in `oracle.exit_step`."""

    step: oracle.Step
    row_ids: np.ndarray
    state: np.ndarray
    answers: np.ndarray
    exit_layer: np.ndarray


#: Initial content of memory that an op must not write.
UNTOUCHED, NO_LAYER = -7.5, -9


@functools.lru_cache(maxsize=8)
def truth(case: Case) -> tuple[Truth, ...]:
    """Run the oracle over all layers of a case."""
    setting, criterion, batch = SETTINGS[case.rule], CASES[OWNERS[case.rule]], build(case)
    row_ids = batch.row_ids.numpy().copy()
    numbers = setting.numbers(case.classes, 1)
    first = [criterion.state(numbers, case.classes, key) for key in range(batch.requests)]
    state = np.array(first, dtype=np.float64).T.copy()
    answers = np.full((batch.requests, case.classes), UNTOUCHED)
    exit_layer = np.full(batch.requests, NO_LAYER)
    after = []
    for layer, given in enumerate(batch.layers, start=1):
        names = ("hidden", "weight", "bias")
        inputs = wide(given["logits"]) if case.source == "logits" else tuple(wide(given[name]) for name in names)
        step = oracle.exit_step(
            decide=criterion.decide,
            params=setting.numbers(case.classes, layer),
            layer=layer,
            depth=DEPTH,
            row_ids=row_ids,
            state=state,
            answers=answers,
            exit_layer=exit_layer,
            source=case.source,
            inputs=inputs,
            offsets=given["offsets"].numpy() if "offsets" in given else None,
            aux=wide(given["aux"]) if "aux" in given else None,
        )
        after.append(Truth(step, row_ids.copy(), state.copy(), answers.copy(), exit_layer.copy()))
    return tuple(after)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def memory(criterion: criteria.Criterion, requests: int, classes: int, keys: Tensor | None = None) -> dict[str, Tensor]:
    """Return state, answers and exit layers before layer 1, the last two filled with `UNTOUCHED` and `NO_LAYER`."""
    keys = torch.arange(requests) if keys is None else keys
    return {
        "state": criterion.new_state(requests, torch.device("cpu"), classes, keys),
        "answers": torch.full((requests, classes), UNTOUCHED),
        "exit_layer": torch.full((requests,), NO_LAYER),
    }


def one_exit(
    criterion: criteria.Criterion, logits: Tensor, backend: str, *, layer: int = 1, depth: int = 2, **changed: Any
) -> dict[str, Tensor]:
    """Run an exit on given logits of rows that are all present; return the counts and what was written.

    Args:
        changed: further arguments, and other memory to write.
    """
    written = {"row_ids": torch.arange(len(logits), dtype=torch.int32), **memory(criterion, *logits.shape)}
    written |= {name: changed.pop(name) for name in written if name in changed}
    given = {"criterion": criterion, "layer": layer, "depth": depth, "logits": logits, "backend": backend}
    return {"counts": exit_step(**given, **written, **changed), **written}
