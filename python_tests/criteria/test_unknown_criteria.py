"""Classes that no back-end knows are refused where they are set, and outputs of registered rules of another form."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from support.exit_step_cases import one_exit
from support.models import batch_for, early_exit
from support.registered_rules import SteadyLead, registered

import earlyexit_kernels as ee
from earlyexit_kernels import criteria
from earlyexit_kernels.criteria import CRITERIA, Criterion, Entropy, SkipGate


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
    return one_exit(rule, torch.randn(4, 3), backend)["counts"].tolist()


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


#: What the rule returns in place of (answer, leave, new state), and the words of the error.
WRONG = {
    "one tensor": (lambda z, leave, state: leave, r"rule to return \(answer, leave, new state\), got Tensor"),
    "nothing": (lambda z, leave, state: None, r"rule to return \(answer, leave, new state\), got NoneType"),
    "two": (lambda z, leave, state: (z, leave), r"rule to return \(answer, leave, new state\), got a tuple of 2"),
    "no tensor": (lambda z, leave, state: (z, True, state), "leave to be a tensor, got bool"),
    "leave shape": (
        lambda z, leave, state: (z, leave[:, None], state),
        r"leave \[4\] torch.bool on cpu, got \[4, 1\] torch.bool on cpu",
    ),
    "leave dtype": (lambda z, leave, state: (z, leave.float(), state), "leave .*torch.bool.*got .*float32"),
    "answer shape": (
        lambda z, leave, state: (z[:, 0], leave, state),
        r"answer \[4, 3\] torch.float32 on cpu, got \[4\] torch.float32",
    ),
    "answer dtype": (lambda z, leave, state: (z.double(), leave, state), "answer .*got .*float64"),
    "answer device": (lambda z, leave, state: (z.to("meta"), leave, state), "answer .* on cpu, got .* on meta"),
    "state shape": (
        lambda z, leave, state: (z, leave, state[0]),
        r"new state \[1, 4\] torch.float32 on cpu, got \[4\]",
    ),
    "state dtype": (lambda z, leave, state: (z, leave, state.half()), "new state .*got .*float16"),
}


@pytest.mark.parametrize("mode", ["replay", "fixed_depth"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_outputs_are_refused(wrong, mode):
    change, words = WRONG[wrong]

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wrong(SteadyLead):
        name: ClassVar[str] = "wrong"

        @staticmethod
        def rule(z, aux, state, layer, depth, params):
            return change(*SteadyLead.rule(z, aux, state, layer, depth, params))

    with registered(Wrong), pytest.raises(ValueError, match=f"criterion 'wrong': expected {words}"):
        if mode == "replay":
            ee.replay(ee.ExitTrace(torch.randn(4, 3, 3)), Wrong(threshold=1.0))
        else:
            model = early_exit(criterion=Wrong(threshold=1.0))
            model.fixed_depth()(**batch_for(model, lengths=[3, 5, 4, 2]))


def test_outputs_of_the_rules_of_the_package_are_not_looked_at(monkeypatch):
    """They are tested, and every pass would pay for it."""
    looked = []
    monkeypatch.setattr(criteria, "check_outputs", lambda *arguments: looked.append(arguments))
    trace = ee.ExitTrace(torch.randn(4, 3, 3))
    ee.replay(trace, criteria.Entropy(threshold=0.1), backend="torch")
    assert not looked
    with registered(SteadyLead):
        ee.replay(trace, SteadyLead(threshold=0.1))
    assert looked
