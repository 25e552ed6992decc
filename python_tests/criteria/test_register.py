"""Criteria that users register: where they run, what is refused, and how saved models name them."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch
from support.exit_step_cases import one_exit
from support.models import balance_classes, batch_for, early_exit, ragged
from support.registered_rules import SteadyLead, TritonSteadyLead, registered, steady_lead_layers

import earlyexit_kernels as ee
from earlyexit_kernels import backends, criteria
from earlyexit_kernels.core import loop, rows
from earlyexit_kernels.core.view import Settings
from earlyexit_kernels.criteria import Criterion, Entropy, SkipGate
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.tuning.rows import Rows

LENGTHS = [5, 20, 7, 8, 11, 19, 10, 17]


@pytest.fixture
def steady():
    with registered(SteadyLead) as cls:
        yield cls


def prepared(**arguments):
    """A model, a batch, its trace, and a threshold by which the rows leave at several layers."""
    model = early_exit(gain=4, num_labels=3, **arguments)
    batch = batch_for(model, lengths=LENGTHS)
    balance_classes(model, batch)
    trace = model.trace(**batch)
    leads = (trace.logits[..., 0] - trace.logits[..., 1]).abs()
    return model, batch, trace, float(leads[:, :2].mean(dim=1).median())


@pytest.mark.parametrize("layers", ["eager", "fused"])
def test_eager_replay_and_fixed_depth_agree(steady, layers):
    model, batch, trace, threshold = prepared()
    rule, expected = steady(threshold=threshold), steady_lead_layers(trace.logits, threshold)
    assert len(set(expected)) >= 2
    model.configure(path=layers)
    model.set_criterion(rule)
    answers, exit_layer = ee.replay(trace, rule)
    assert exit_layer.tolist() == expected
    for got in (model(**batch), model(**batch, output_all_logits=True)):
        assert got.exit_layer.tolist() == expected and torch.allclose(got.logits, answers, atol=1e-5)
    logits, exit_layer = model.fixed_depth()(**batch)
    assert exit_layer.tolist() == expected and torch.allclose(logits, answers, atol=1e-5)
    rows = Rows(trace, np.zeros(len(LENGTHS), dtype=int), "accuracy", "single_label_classification")
    (found,) = rows.settings([rule])
    assert found.mean_exit_layer == pytest.approx(sum(expected) / len(expected))


def test_auto_resolves_to_torch_and_logs_it_once(steady, caplog):
    model, batch, _, threshold = prepared()
    with caplog.at_level(logging.WARNING, logger="earlyexit_kernels"):
        model.set_criterion(steady(threshold=threshold))
        assert model.explain().backend == "torch"
        model(**batch)
        model(**batch)
    messages = [r.getMessage() for r in caplog.records if "steady_lead" in r.getMessage()]
    assert messages == ["criterion 'steady_lead' supports the back-ends torch: 'auto' chose 'torch'"]
    model.set_criterion(Entropy(threshold=0.3))
    assert model.explain().backend == early_exit().explain().backend


@pytest.mark.parametrize("skips", [False, True])
def test_rows_move_on_the_back_end_of_the_device(steady, monkeypatch, skips):
    """Only the decision is limited to torch."""
    met = []
    raw = loop.raw

    def watched(op, backend, device):
        met.append((op, backends.resolve(backend, device)))
        return raw(op, backend, device)

    for module in (loop, rows):
        monkeypatch.setattr(module, "raw", watched)
    model, batch, _, threshold = prepared()
    rule = steady(threshold=threshold)
    if skips:
        model, rule = early_exit(gain=4, num_labels=3, method="smartbert"), SkipGate(threshold=0.5, exit=rule)
    model.configure(compaction="always")
    model.set_criterion(rule)
    assert model.explain().backend == "torch" and criteria.from_dict(rule.to_dict()) == rule
    met.clear()
    model(**batch)
    chosen = backends.resolve("auto", "cpu")
    assert set(met) == {("exit_step", "torch"), ("compact", chosen), ("gather_rows", chosen)}
    met.clear()
    model.double()(**batch)
    assert {backend for _, backend in met} == {"torch"}


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_other_backends_are_refused(steady, backend):
    model, _, trace, threshold = prepared()
    rule = steady(threshold=threshold)
    words = rf"backend '{backend}' does not implement criterion 'steady_lead', which supports torch; choose"
    model.set_criterion(rule)
    with pytest.raises(BackendUnavailableError, match=words):
        model.configure(backend=backend)
    with pytest.raises(BackendUnavailableError, match=words):
        ee.replay(trace, rule, backend=backend)
    with pytest.raises(BackendUnavailableError, match=words):
        one_exit(rule, torch.zeros(4, 3), backend)
    assert model.criterion == rule and model.explain().backend == "torch"


def test_a_model_with_a_chosen_backend_refuses_the_rule(steady):
    model = early_exit()
    backend = model.explain().backend
    model.configure(backend=backend)
    if backend == "torch":
        pytest.skip("the extension is not built")
    with pytest.raises(BackendUnavailableError, match=f"backend '{backend}' does not implement"):
        model.set_criterion(steady(threshold=1.0))
    assert model.criterion is None and model.config.criterion is None


@pytest.mark.triton
def test_a_triton_step_runs_on_triton():
    _, _, trace, threshold = prepared()
    with registered(TritonSteadyLead) as cls:
        assert criteria.supported_backends(cls.name) == ("torch", "triton")
        got = ee.replay(trace, cls(threshold=threshold), backend="triton")[1].tolist()
    assert got == steady_lead_layers(trace.logits, threshold)


def test_a_saved_model_names_the_class_to_register(tmp_path):
    load = ee.EarlyExitForSequenceClassification.from_pretrained
    with registered(SteadyLead):
        model, batch, trace, threshold = prepared()
        model.set_criterion(SteadyLead(threshold=threshold))
        model.save_pretrained(tmp_path)
    words = r"got 'steady_lead'; it was saved with .*support\.registered_rules\.SteadyLead.*register \(--import"
    with pytest.raises(ValueError, match=words):
        load(tmp_path)
    with registered(SteadyLead):
        loaded = load(tmp_path)
        assert loaded.criterion == model.criterion
        assert loaded(**batch).exit_layer.tolist() == steady_lead_layers(trace.logits, threshold)


def test_a_name_belongs_to_one_class(steady):
    assert criteria.register(steady) is steady

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(SteadyLead):
        pass

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class BuiltIn(SteadyLead):
        name: ClassVar[str] = "entropy"

    for cls, owner in ((Other, "SteadyLead"), (BuiltIn, "Entropy")):
        with pytest.raises(ValueError, match=rf"the name '{cls.name}' belongs to .*{owner}; give the class another"):
            criteria.register(cls)
    assert criteria.CRITERIA["steady_lead"] is steady and criteria.CRITERIA["entropy"] is Entropy


def test_an_inherited_triton_step_does_not_decide_for_a_new_torch_rule():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Never(Entropy):
        name: ClassVar[str] = "never"

        @staticmethod
        def rule(z, aux, state, layer, depth, params):
            return z, z[:, 0] != z[:, 0], state

    with registered(Never):
        assert criteria.supported_backends("never") == ("torch",)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Halved(Entropy):
        name: ClassVar[str] = "halved"

    with registered(Halved):
        assert criteria.supported_backends("halved") == ("torch", "triton")


def changed(**members):
    """A dataclass like `SteadyLead` with other members."""
    annotations = dict.fromkeys(members, ClassVar)
    body = {"name": "changed", **members, "__annotations__": {"name": ClassVar, **annotations}}
    return dataclasses.dataclass(frozen=True, kw_only=True)(type("Changed", (SteadyLead,), body))


class Undecorated(SteadyLead):
    name = "undecorated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleMissing(Criterion):
    name: ClassVar[str] = "rule_missing"


REFUSED = {
    "an instance": (SteadyLead(threshold=1.0), TypeError, "expected a subclass of .*Criterion, got SteadyLead"),
    "another class": (dict, TypeError, "expected a subclass of .*Criterion, got <class 'dict'>"),
    "no dataclass": (Undecorated, ValueError, r"register\(Undecorated\): expected a frozen dataclass; write @data"),
    "no rule": (RuleMissing, ValueError, r"register\(RuleMissing\): expected a static method rule\(z, aux, state"),
    "name": (changed(name="a-b"), ValueError, "class attribute `name: .*got 'a-b'"),
    "no name": (changed(name=None), ValueError, "class attribute `name: .*got None"),
    "rule with self": (changed(rule=lambda self, z: z), ValueError, "expected a static method rule"),
    "short rule": (changed(rule=staticmethod(lambda z: z)), ValueError, "got a rule with 1 arguments"),
    "needs": (changed(needs="mood"), ValueError, r"expected `needs` to be None or one of \['halting'.*got 'mood'"),
    "tasks": (changed(tasks=frozenset({"ranking"})), ValueError, "expected `tasks` .*'regression'.*got .*ranking"),
    "no tasks": (changed(tasks=frozenset()), ValueError, "expected `tasks` to be a non-empty frozenset"),
    "step": (changed(triton_step=staticmethod(lambda z: z)), ValueError, "`triton_step` with the arguments z, aux"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_register_says_what_is_missing(name):
    cls, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        criteria.register(cls)
    assert "changed" not in criteria.CRITERIA


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyParams(SteadyLead):
    thresholds: list = dataclasses.field(default_factory=list)
    name: ClassVar[str] = "many_params"

    def params(self, layer):
        return [self.threshold] * layer


def test_settings_that_back_ends_cannot_take_are_refused(monkeypatch):
    monkeypatch.setitem(criteria.CRITERIA, "many_params", ManyParams)
    for layers, words in ((4, "at most 3 numbers, got 4"), (3, "expected hashable fields")):
        model = early_exit(num_hidden_layers=layers)
        with pytest.raises(ValueError, match=words):
            model.set_criterion(ManyParams(threshold=0.5))


def test_criterion_is_chosen_apart_from_the_dtype():
    """A restored criterion must not fail where the chosen back-end cannot run at the moment."""
    model = early_exit()
    model.configure(backend="torch")
    model.settings = Settings(backend="cpp")
    model.double().set_criterion(criteria.Entropy(threshold=0.3))
    with pytest.raises(BackendUnavailableError, match="float64"):
        model(**ragged())


def test_a_registered_rule_may_take_its_settings_by_position():
    @dataclasses.dataclass(frozen=True)
    class ByPosition(Criterion):
        threshold: float

    assert ByPosition(0.8).threshold == 0.8 == pickle.loads(pickle.dumps(Entropy(threshold=0.8))).threshold
    with pytest.raises(TypeError, match="positional"):
        ByPosition(0.8, 1)
