"""Criteria that the back-ends don't know are refused where they are chosen, with what is supported."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from support.exit_step_cases import memory
from support.models import batch_for, early_exit

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import CRITERIA, Criterion, Entropy, SkipGate
from earlyexit_kernels.ops import exit_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Criterion):
    """A rule of somebody's own."""

    name: ClassVar[str] = "mine"

    @staticmethod
    def rule(z, aux, state, layer, depth, params):
        return z, z[:, 0] > 0, state


class Nameless(Mine):
    name = None


class Taken(Mine):
    """A name of the table on another decision."""

    name = "entropy"


class Redecided(Entropy):
    """A rule of the table with another decision, which no back-end would run."""

    @staticmethod
    def rule(z, aux, state, layer, depth, params):
        return z, z[:, 0] > 0, state


class Halved(Entropy):
    """A rule of the table with other numbers, which the back-ends run as it is."""

    def params(self, layer):
        threshold, normalized = super().params(layer)
        return [threshold / 2, normalized]


UNKNOWN = [Mine(), Nameless(), Taken(), Redecided(threshold=0.5)]
WORDS = r"criterion {}: expected one of earlyexit_kernels.criteria \(.*Entropy.*SkipGate.*\), .* got a class with"


def call(rule, backend):
    z = torch.randn(4, 3)
    return exit_step(
        criterion=rule,
        layer=1,
        depth=2,
        row_ids=torch.arange(4, dtype=torch.int32),
        logits=z,
        backend=backend,
        **memory(rule, 4, 3),
    ).tolist()


@pytest.mark.parametrize("rule", UNKNOWN, ids=lambda rule: type(rule).__name__)
def test_an_op_refuses_them(backend, rule):
    with pytest.raises(ValueError, match=WORDS.format(type(rule).__name__)):
        call(rule, backend)


@pytest.mark.parametrize("rule", UNKNOWN, ids=lambda rule: type(rule).__name__)
def test_a_model_and_a_replay_refuse_them(rule):
    model = early_exit()
    batch = batch_for(model)
    trace, before = model.trace(**batch), model(**batch).logits
    for chosen in (rule, SkipGate(threshold=0.5, exit=rule)):
        with pytest.raises(ValueError, match=WORDS.format(type(rule).__name__)):
            model.set_criterion(chosen)
    with pytest.raises(ValueError, match=WORDS.format(type(rule).__name__)):
        ee.replay(trace, rule)
    assert model.criterion is None and torch.equal(model(**batch).logits, before)


def test_a_subclass_that_keeps_the_decision_is_taken(backend):
    torch.manual_seed(1)
    halved = call(Halved(threshold=1.9), backend)
    torch.manual_seed(1)
    assert halved == call(Entropy(threshold=0.95), backend)


def test_all_that_the_package_has_are_known():
    assert all(ee.criteria.check_known(object.__new__(rule)) is None for rule in CRITERIA.values())
