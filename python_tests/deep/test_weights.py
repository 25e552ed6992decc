"""Sequences of ways to change a weight: the answers are always those of a fresh copy of the model.

Writes of single elements through views that autograd does not track are left out: the documentation leaves these to the
user.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.models import ALL_FAMILIES, batch_for, stock
from support.trained_weight_changes import WAYS
from support.weight_changes import AT, BIASES, PARAMETER, layer_of

import earlyexit_kernels as ee

#: Difference allowed between the family's layers and fused ones, relative to the largest logit, by dtype.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.15}
#: Ways that change any parameter; others change what they name.
WRITES = sorted(name for name, way in WAYS.items() if inspect.isfunction(way) and "weight_of" in way.__code__.co_names)
#: Ways after which the model has other modules than its family, other dtypes or tensors of inference mode, or that
#: train; they end a sequence.
LAST = sorted(
    name
    for name in WAYS
    if any(
        word in name
        for word in (
            *("quantized", "lora", "norm", "pruned", "class", "forward", "hook", "trainer", "backward"),
            *("reload", "built", "half", "bfloat16", "double", "conversion"),
        )
    )
    and name != "norm_data_in_place"
)
OTHERS = sorted(set(WAYS) - set(WRITES) - set(LAST))
LAYERS = 3


class WeightChanges(RuleBasedStateMachine):
    """A model with packed weights, and the stock model that shares its weights."""

    @initialize(family=st.sampled_from(ALL_FAMILIES), seed=st.integers(0, 99))
    def build(self, family: str, seed: int) -> None:
        biases = BIASES.get(family, {})
        self.stock = stock(family, seed=seed, num_hidden_layers=LAYERS, **biases)
        self.model, self.ended = ee.to_early_exit(self.stock), False
        self.batch = batch_for(self.model, lengths=(5, 9, 3))
        self.answers()

    def answers(self, model: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return (model or self.model)(**self.batch).logits

    def change(self, way: str, at: int, parameter: str | None = None) -> None:
        note(f"{way} of layer {at}{f', {parameter}' if parameter else ''}")
        tokens = AT.set(at), PARAMETER.set(parameter)
        try:
            self.model = WAYS[way](self.model, self.stock) or self.model
        finally:
            AT.reset(tokens[0])
            PARAMETER.reset(tokens[1])

    @precondition(lambda self: not self.ended)
    @rule(way=st.sampled_from(WRITES), at=st.integers(0, LAYERS - 1), number=st.integers(0, 30))
    def write(self, way: str, at: int, number: int) -> None:
        token = AT.set(at)
        names = [name for name, _ in layer_of(self.model).named_parameters()]
        AT.reset(token)
        self.change(way, at, names[number % len(names)])

    @precondition(lambda self: not self.ended and self.model.adapter.names is not None)
    @rule(way=st.sampled_from(OTHERS), at=st.integers(0, LAYERS - 1))
    def change_modules(self, way: str, at: int) -> None:
        self.change(way, at)

    @precondition(lambda self: not self.ended and self.model.adapter.names is not None)
    @rule(way=st.sampled_from(LAST), at=st.integers(0, LAYERS - 1))
    def change_last(self, way: str, at: int) -> None:
        self.ended = True
        self.change(way, at)
        self.compare()

    @rule()
    def compare(self) -> None:
        got = self.answers()
        # the copy shares no packed weights; after the last change, not all models can be copied
        fresh = self.model if self.ended else copy.deepcopy(self.model)
        fresh.configure(path="eager")
        expected = self.answers(fresh)
        apart = float((got - expected).abs().max())
        assert apart <= ROUNDING[self.model.dtype] * (1 + float(expected.abs().max())), f"logits are off by {apart:.3g}"


TestWeightChanges = pytest.mark.thorough(WeightChanges.TestCase)
TestWeightChanges.settings = settings(stateful_step_count=8)
