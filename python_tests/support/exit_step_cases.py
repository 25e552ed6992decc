"""Inputs for the tests of exit_step: rules with their plain numbers, and seeded batches, bad rows among the good."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from support import oracle
from torch import Tensor

from earlyexit_kernels import criteria

DEPTH = 4
SOURCES = ("first", "mean", "none", "logits")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Hidden width by batch size, so that odd widths and one above a Triton block are all met.
WIDTHS = {0: 8, 1: 131, 7: 33, 33: 16}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A criterion and, for the oracle, its name and its plain numbers at a layer.

    Attributes:
        build: ``C -> Criterion``.
        numbers: ``(C, layer) -> the oracle's params``.
        classes: class counts C it is tested with.
        scale: its scalars lie in [0, scale].
    """

    name: str
    build: Callable[[int], criteria.Criterion]
    numbers: Callable[[int, int], Any]
    classes: tuple[int, ...] = (2, 3, 17)
    scale: float = 0.5

    @property
    def own_answer(self) -> bool:
        """Whether it answers something else than the logits it sees."""
        return self.name in ("expectation", "voting", "dact")


def half(c: int) -> float:
    return 0.5 * math.log(c)


RULES = {
    "full_depth": Rule("full_depth", lambda c: criteria.FullDepth(), lambda c, at: (), (1, 2, 3, 17)),
    "entropy": Rule(
        "entropy", lambda c: criteria.Entropy(threshold=half(c)), lambda c, at: (half(c), False), (2, 3, 17, 150)
    ),
    "entropy_by_layer": Rule(
        "entropy",
        lambda c: criteria.Entropy(threshold=[0.3, 0.6, 0.1]),
        lambda c, at: ((0.3, 0.6, 0.1, 0.1)[at - 1], False),
    ),
    "entropy_normalized": Rule(
        "entropy", lambda c: criteria.Entropy(threshold=0.45, normalized=True), lambda c, at: (0.45, True)
    ),
    "max_probability": Rule("max_probability", lambda c: criteria.MaxProbability(threshold=0.7), lambda c, at: (0.7,)),
    "margin": Rule("margin", lambda c: criteria.Margin(threshold=0.4), lambda c, at: (0.4,)),
    "patience": Rule("patience", lambda c: criteria.Patience(patience=2), lambda c, at: (2, None)),
    "patience_1": Rule("patience", lambda c: criteria.Patience(patience=1), lambda c, at: (1, None), (3,)),
    "patience_value": Rule(
        "patience", lambda c: criteria.Patience(patience=1, tolerance=0.8), lambda c, at: (1, 0.8), (1,)
    ),
    "q_exit": Rule("q_exit", lambda c: criteria.QExit(q=0.5), lambda c, at: (0.5,), (1, 2, 3, 17)),
    "sampled_exit": Rule("sampled_exit", lambda c: criteria.SampledExit(seed=5), lambda c, at: (5,), (1, 3)),
    "expectation": Rule("expectation", lambda c: criteria.Expectation(), lambda c, at: (), (1, 3, 17)),
    "voting": Rule("voting", lambda c: criteria.Voting(threshold=2), lambda c, at: (2, 0, "vote")),
    "voting_by_depth": Rule(
        "voting",
        lambda c: criteria.Voting(threshold=1.3, gamma=0.5, final="last"),
        lambda c, at: (1.3, 0.5, "last"),
        (3,),
    ),
    "dact": Rule("dact", lambda c: criteria.Dact(), lambda c, at: ("paper", 0), (2, 3, 17), 0.98),
    "dact_tight": Rule("dact", lambda c: criteria.Dact(bound="tight"), lambda c, at: ("tight", 0), (3,), 0.98),
    "dact_epsilon": Rule("dact", lambda c: criteria.Dact(epsilon=0.5), lambda c, at: ("paper", 0.5), (3,)),
    "learned": Rule("learned", lambda c: criteria.Learned(threshold=0.1), lambda c, at: (0.1,), (1, 3)),
    "learned_by_layer": Rule(
        "learned",
        lambda c: criteria.Learned(threshold=[0.1, 0.2, 0.3]),
        lambda c, at: ((0.1, 0.2, 0.3, 0)[at - 1],),
        (3,),
    ),
    "patient_confidence": Rule(
        "patient_confidence",
        lambda c: criteria.PatientConfidence(threshold=0.7, patience=2),
        lambda c, at: (0.7, 2),
        (3, 17),
    ),
    "divergence_patience": Rule(
        "divergence_patience",
        lambda c: criteria.DivergencePatience(threshold=0.2, patience=1),
        lambda c, at: (0.2, 1),
    ),
    "divergence_patience_2": Rule(
        "divergence_patience",
        lambda c: criteria.DivergencePatience(threshold=0.4, patience=2),
        lambda c, at: (0.4, 2),
        (3,),
    ),
    "hidden_cosine": Rule(
        "hidden_cosine", lambda c: criteria.HiddenCosine(threshold=0.4), lambda c, at: (0.4,), (1, 3)
    ),
    "energy": Rule("energy", lambda c: criteria.Energy(threshold=0.1), lambda c, at: (0.1,), (3, 17)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch: B rows present of a request of B + 3, all layers of it."""

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
        return RULES[self.rule].build(self.classes)

    @property
    def exact(self) -> bool:
        """Whether the decision involves no rounding: labels compared on logits as they came."""
        by_label = ("full_depth", "patience", "patience_1", "voting", "voting_by_depth")
        return self.source == "logits" and self.rule in by_label


@dataclasses.dataclass(frozen=True)
class Batch:
    """The tensors of a case: what `ops.exit_step` takes at each layer, and the row ids at the start."""

    row_ids: Tensor
    requests: int
    layers: tuple[dict[str, Any], ...]


@functools.lru_cache(maxsize=8)
def build(case: Case) -> Batch:
    """The batch of a case; rows are a shuffled part of the request, some masked from the start."""
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
        given["aux"] = torch.rand(case.rows, generator=g) * RULES[case.rule].scale
        if case.rows >= 7:
            given["aux"][torch.randint(case.rows, (1,), generator=g)] = math.nan
    return given


def spoil_logits(logits: Tensor, dtype: torch.dtype, g: torch.Generator) -> None:
    """Write logits at the edge of meaning, and ties, into rows of a big enough ``[B, C]``."""
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
    """What the oracle holds after one layer; arrays as in `oracle.exit_step`."""

    step: oracle.Step
    row_ids: np.ndarray
    state: np.ndarray
    answers: np.ndarray
    exit_layer: np.ndarray


#: What untouched memory holds in the tests.
UNTOUCHED, NO_LAYER = -7.5, -9


@functools.lru_cache(maxsize=8)
def truth(case: Case) -> tuple[Truth, ...]:
    """The oracle's run over all layers of a case."""
    rule, batch = RULES[case.rule], build(case)
    row_ids = batch.row_ids.numpy().copy()
    numbers = rule.numbers(case.classes, 1)
    first = [oracle.first_state(rule.name, numbers, case.classes, key) for key in range(batch.requests)]
    state = np.array(first, dtype=np.float64).T.copy()
    answers = np.full((batch.requests, case.classes), UNTOUCHED)
    exit_layer = np.full(batch.requests, NO_LAYER)
    after = []
    for layer, given in enumerate(batch.layers, start=1):
        names = ("hidden", "weight", "bias")
        inputs = wide(given["logits"]) if case.source == "logits" else tuple(wide(given[name]) for name in names)
        step = oracle.exit_step(
            criterion=rule.name,
            params=rule.numbers(case.classes, layer),
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
    """State, answers and exit layers before layer 1; the last two poisoned. A row's key is its number."""
    keys = torch.arange(requests) if keys is None else keys
    return {
        "state": criterion.new_state(requests, torch.device("cpu"), classes, keys),
        "answers": torch.full((requests, classes), UNTOUCHED),
        "exit_layer": torch.full((requests,), NO_LAYER),
    }
