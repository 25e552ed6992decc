"""Classes and adapters that are registered again, as by a notebook cell that runs twice."""

from __future__ import annotations

import types

import pytest
import torch
from support.models import batch_for, early_exit, stock

import earlyexit_kernels as ee
from earlyexit_kernels import backbones, criteria, methods

CRITERION = """
import dataclasses
from typing import ClassVar
import earlyexit_kernels as ee

@ee.criteria.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lead(ee.criteria.Criterion):
    threshold: float
    name: ClassVar[str] = "cell_lead"

    def params(self, layer):
        return [self.threshold]

    @staticmethod
    def rule(z, aux, state, layer, depth, params):
        return z, (z[:, 0] - z[:, 1]).abs() COMPARED params[0], state
"""
METHOD = """
import dataclasses
from typing import ClassVar
import earlyexit_kernels as ee

@ee.methods.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Last(ee.methods.Method):
    name: ClassVar[str] = "cell_last"
    rule: ClassVar[str] = "entropy"

    def loss(self, trace, labels, step):
        return FACTOR * ee.methods.mean_task_loss(trace.logits[:, -1], labels, step.problem_type)
"""
BACKBONE = """
from earlyexit_kernels import backbones

def layers(backbone):
    return backbone.encoder.layer[:DEPTH]

ADAPTER = backbones.register(backbones.BackboneAdapter(
    model_type="ernie", base="ernie", head=backbones.StockHead(dense="ernie.pooler.dense"),
    embed=backbones.embed_with_types, layers=layers, positions=backbones.column_positions,
    longest=backbones.position_limit, FIELDS
))
"""


def cell(monkeypatch, code, module="notebook", **values):
    """Run a cell of a notebook; what it defines has the name of this module."""
    for name, value in values.items():
        code = code.replace(name, str(value))
    space = types.ModuleType(module)
    monkeypatch.setitem(__import__("sys").modules, module, space)
    exec(code, vars(space))
    return space


@pytest.fixture(autouse=True)
def forgotten():
    yield
    criteria.CRITERIA.pop("cell_lead", None)
    methods.METHODS.pop("cell_last", None)
    backbones.BACKBONES.pop("ernie", None)


def test_a_criterion_defined_again_replaces_the_first(monkeypatch, tmp_path):
    old = cell(monkeypatch, CRITERION, COMPARED=">=").Lead
    model = early_exit()
    model.set_criterion(old(threshold=0.0))
    batch = batch_for(model)
    assert set(model(**batch).exit_layer.tolist()) == {1}
    fixed = model.fixed_depth()
    model.save_pretrained(tmp_path)

    new = cell(monkeypatch, CRITERION, COMPARED="<").Lead
    assert criteria.CRITERIA["cell_lead"] is new is not old
    words = r"criterion 'cell_lead': notebook.Lead was registered again.*build the criterion again"
    for run in (lambda: model(**batch), lambda: model.set_criterion(old(threshold=0.0))):
        with pytest.raises(ValueError, match=words):
            run()
    with pytest.raises(ValueError, match=words):
        ee.replay(ee.ExitTrace(torch.zeros(1, 3, 2)), old(threshold=0.0))
    assert set(fixed(**batch)[1].tolist()) == {1}, "this one keeps the rule that it was built with"

    for other in (model, ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)):
        other.set_criterion(new(threshold=0.0)) if other is model else None
        assert type(other.criterion) is new and set(other(**batch).exit_layer.tolist()) == {other.depth}


def test_a_method_defined_again_replaces_the_first(monkeypatch, tmp_path):
    old = cell(monkeypatch, METHOD, FACTOR=1.0).Last
    model = ee.to_early_exit(stock(), method="cell_last")
    batch = {**batch_for(model), "labels": torch.tensor([0, 1, 2, 0])}
    before = model(**batch).loss
    model.save_pretrained(tmp_path)

    new = cell(monkeypatch, METHOD, FACTOR=2.0).Last
    assert type(model.method) is old and torch.equal(model(**batch).loss, before), "models keep the method they have"
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded.method) is new is type(methods.method_of("cell_last"))


def test_an_adapter_with_functions_defined_again_replaces_the_first(monkeypatch, tmp_path):
    cell(monkeypatch, BACKBONE, DEPTH=4, FIELDS="")
    base = stock("ernie")
    model = ee.to_early_exit(base)
    batch = batch_for(base)
    model.save_pretrained(tmp_path)

    again = cell(monkeypatch, BACKBONE, DEPTH=5, FIELDS="").ADAPTER
    assert backbones.adapter_of("ernie") is again
    for held in (model, ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)):
        assert torch.allclose(held(**batch).logits, base(**batch).logits, atol=1e-5)
    with pytest.raises(ValueError, match=r"'ernie' has another adapter already.*BACKBONES.pop\('ernie'\)"):
        cell(monkeypatch, BACKBONE, DEPTH=4, FIELDS="embeddings='embedding'")
    with pytest.raises(ValueError, match="'ernie' has another adapter already"):
        cell(monkeypatch, BACKBONE, module="elsewhere", DEPTH=4, FIELDS="")
    assert backbones.adapter_of("ernie") is again
