"""Outputs of registered torch rules that do not have the documented form are refused by name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from support.models import batch_for, early_exit
from support.registered_rules import SteadyLead, registered

import earlyexit_kernels as ee
from earlyexit_kernels import criteria

#: What the rule returns in place of (answer, leave, new state), and the words of the error.
WRONG = {
    "one tensor": (lambda z, leave, state: leave, r"expected rule to return \(answer, leave, new state\), got Tensor"),
    "nothing": (lambda z, leave, state: None, r"expected rule to return \(answer, leave, new state\), got NoneType"),
    "two": (
        lambda z, leave, state: (z, leave),
        r"expected rule to return \(answer, leave, new state\), got a tuple of 2",
    ),
    "no tensor": (lambda z, leave, state: (z, True, state), r"expected leave to be a tensor, got bool"),
    "leave shape": (
        lambda z, leave, state: (z, leave[:, None], state),
        r"expected leave \[4\] torch.bool on cpu, got \[4, 1\] torch.bool on cpu",
    ),
    "leave dtype": (lambda z, leave, state: (z, leave.float(), state), r"expected leave .*torch.bool.*got .*float32"),
    "answer shape": (
        lambda z, leave, state: (z[:, 0], leave, state),
        r"expected answer \[4, 3\] torch.float32 on cpu, got \[4\] torch.float32",
    ),
    "answer dtype": (lambda z, leave, state: (z.double(), leave, state), r"expected answer .*got .*float64"),
    "answer device": (
        lambda z, leave, state: (z.to("meta"), leave, state),
        r"expected answer .* on cpu, got .* on meta",
    ),
    "state shape": (
        lambda z, leave, state: (z, leave, state[0]),
        r"expected new state \[1, 4\] torch.float32 on cpu, got \[4\]",
    ),
    "state dtype": (lambda z, leave, state: (z, leave, state.half()), r"expected new state .*got .*float16"),
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

    with registered(Wrong), pytest.raises(ValueError, match=f"criterion 'wrong': {words}"):
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
