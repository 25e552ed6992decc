"""Criteria as a user would write them, outside the package: with a torch rule only, and with a Triton step too."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from earlyexit_kernels import criteria
from earlyexit_kernels.arguments import number
from earlyexit_kernels.backends import jit, tl


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteadyLead(criteria.Criterion):
    """Leave where the mean difference of the first two logits over the exits so far reaches a threshold."""

    threshold: float
    name: ClassVar[str] = "steady_lead"
    checks: ClassVar = {"threshold": number(low=0.0)}

    def params(self, layer):
        return [self.threshold]

    def initial_state(self, classes):
        return (0.0,)

    @staticmethod
    def rule(z, aux, state, layer, depth, params):
        total = state[0] + (z[:, 0] - z[:, 1]).abs()
        return z, total >= params[0] * layer, total[None]


@jit
def steady_lead_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    first = tl.sum(tl.where(cols == 0, z, 0.0), 0)
    second = tl.sum(tl.where(cols == 1, z, 0.0), 0)
    total = tl.load(state, mask=live, other=0.0) + tl.abs(first - second)
    tl.debug_barrier()
    tl.store(state, total, mask=live)
    return z, total >= p0 * tl.cast(layer, tl.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonSteadyLead(SteadyLead):
    """The same rule, with a Triton step."""

    name: ClassVar[str] = "triton_steady_lead"
    triton_step: ClassVar[Any] = steady_lead_step


def steady_lead_layers(logits: torch.Tensor, threshold: float) -> list[int]:
    """Exit layers of logits ``[N, L, C]``, computed row by row."""
    layers = []
    for row in logits.double():
        means = [sum(abs(z[0] - z[1]) for z in row[:k]) / k for k in range(1, len(row))]
        layers.append(next((k for k, mean in enumerate(means, start=1) if mean >= threshold), len(row)))
    return layers


@contextlib.contextmanager
def registered(cls: type[criteria.Criterion]) -> Iterator[type[criteria.Criterion]]:
    """Register a class within the block."""
    criteria._log_restriction.cache_clear()
    try:
        yield criteria.register(cls)
    finally:
        criteria.CRITERIA.pop(cls.name)


#: A module of a user, which registers the rule "imported_rule".
RULE_IN_A_MODULE = """
import dataclasses
from typing import ClassVar

import earlyexit_kernels as ee


@ee.criteria.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportedRule(ee.criteria.Criterion):
    name: ClassVar[str] = "imported_rule"

    @staticmethod
    def rule(z, aux, state, layer, depth, params):
        return z, z[:, 0] == z[:, 0], state
"""
