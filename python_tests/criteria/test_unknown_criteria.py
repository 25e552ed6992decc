"""Unregistered criteria are refused where they are set, with the names of the supported ones."""

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
    """A rule with its own name."""

    name: ClassVar[str] = "mine"

    @staticmethod
    def rule(z, aux, state, layer, depth, params):
        return z, z[:, 0] > 0, state


class Nameless(Mine):
    name = None


class Taken(Mine):
    """A rule with the name of another one and its own decision."""

    name = "entropy"


class Redecided(Entropy):
    """A subclass with another decision, which no back-end implements."""

    @staticmethod
    def rule(z, aux, state, layer, depth, params):
        return z, z[:, 0] > 0, state


class Halved(Entropy):
    """A subclass with other parameters, which all back-ends can run."""

    def params(self, layer):
        threshold, normalized = super().params(layer)
        return [threshold / 2, normalized]


UNKNOWN = [Mine(), Nameless(), Taken(), Redecided(threshold=0.5)]
WORDS = r"criterion {}: expected a class of earlyexit_kernels.criteria \(.*Entropy.*SkipGate.*\), .*criteria.register"


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
def test_ops_refuse_unregistered_classes(backend, rule):
    with pytest.raises(ValueError, match=WORDS.format(type(rule).__name__)):
        call(rule, backend)


@pytest.mark.parametrize("rule", UNKNOWN, ids=lambda rule: type(rule).__name__)
def test_models_and_replay_refuse_unregistered_classes(rule):
    model = early_exit()
    batch = batch_for(model)
    trace, before = model.trace(**batch), model(**batch).logits
    for chosen in (rule, SkipGate(threshold=0.5, exit=rule)):
        with pytest.raises(ValueError, match=WORDS.format(type(rule).__name__)):
            model.set_criterion(chosen)
    with pytest.raises(ValueError, match=WORDS.format(type(rule).__name__)):
        ee.replay(trace, rule)
    assert model.criterion is None and torch.equal(model(**batch).logits, before)


def test_subclasses_that_keep_the_decision_are_accepted(backend):
    torch.manual_seed(1)
    halved = call(Halved(threshold=1.9), backend)
    torch.manual_seed(1)
    assert halved == call(Entropy(threshold=0.95), backend)


def test_all_criteria_of_the_package_are_known():
    assert all(ee.criteria.check_known(object.__new__(rule)) is None for rule in CRITERIA.values())
