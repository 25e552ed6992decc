"""Training methods as objects: phases, saved forms, invalid arguments, registration and tasks."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
from support.loss_cases import CASES, CLASSES, SINGLE
from support.method_cases import METHOD_CASES
from support.models import batch_for, stock

import earlyexit_kernels as ee
from earlyexit_kernels.methods import (
    METHODS,
    PARTS,
    Berxit,
    Dact,
    Deebert,
    Ensemble,
    Fastbert,
    Joint,
    Method,
    Palbert,
    PhaseSpec,
    Smartbert,
    check_task,
    from_dict,
    mean_task_loss,
    method_of,
    register,
)

every_method = pytest.mark.parametrize("cls", dict.fromkeys(METHODS.values()), ids=lambda cls: cls.name)


@pytest.mark.parametrize("name", METHODS)
def test_phases(name):
    method = method_of(name)
    got = [(p.name, p.trains, p.epochs, p.lr, p.projections, p.needs_labels) for p in method.phases]
    assert got == [(n, set(t or PARTS), *rest) for n, t, *rest in METHOD_CASES[method.name].phases]


def test_phases_of_other_settings():
    """The paper's start of DACT, none, and the phase of PALBERT's halting head."""
    last, dact = Dact(start="last").phases
    assert (last.name, last.epochs, last.lr) == ("backbone", 2.0, 2e-5)
    assert last.trains == {"backbone", "dense", "last_exit"} and dact == Dact().phases[1]
    assert Dact(start=None).phases == (PhaseSpec(name="dact", epochs=3.0, lr=2e-5),)
    ponder, halting = Palbert(halting_phase=True).phases
    assert Palbert().phases == (ponder,) and not ponder.other_rows
    assert (halting.name, halting.trains, halting.other_rows) == ("halting", {"halting"}, True)


def test_a_model_records_the_prior_of_its_depth():
    for method, prior in (("palbert", 1 - 0.9**5.5), (Palbert(prior=0.1), 0.1)):
        model = ee.to_early_exit(stock("bert", num_hidden_layers=3), method=method)
        assert model.method.prior == pytest.approx(prior) and model.config.method["prior"] == model.method.prior


#: What is saved; the keys of the data are fields of the files of earlier versions too.
SAVED = [
    (Joint(), {"name": "joint", "equilibrium": False}),
    (
        Palbert(beta=1, prior=np.float64(0.2), halting_layers=1),
        {"name": "palbert", "beta": 1.0, "prior": 0.2, "kl": "prior_posterior", "close_tail": True}
        | {"halting_input": "concat", "halting_layers": 1, "halting_phase": False},
    ),
    (Berxit(), {"name": "berxit", "strategy": "alternating", "odd_includes_last": True, "learned_weight": 1.0}),
    (Fastbert(kl="student_teacher"), {"name": "fastbert", "kl": "student_teacher"}),
]


@pytest.mark.parametrize(("method", "data"), SAVED)
def test_saved_data(method, data):
    assert method.to_dict() == data and from_dict(data) == method


def test_every_setting_is_read_back():
    for case in CASES.values():
        data = json.loads(json.dumps(case.method.to_dict()))
        assert from_dict(data) == method_of(data) == method_of(case.method) == case.method


#: Methods saved before a field existed, and what they did then.
EARLIER = [
    ({"name": "dact", "ponder": 0.03, "include_last": True, "shared": False, "halting_bias": -2.2}, Dact(start=None)),
    ({"name": "palbert", "beta": 0.5, "prior": 0.1}, Palbert(prior=0.1)),
    ({"name": "ensemble", "diversity": 0.1}, Ensemble(weights="equal")),
    ({"name": "smartbert", "gate_weight": 0.04, "soft_epochs": 1.8}, Smartbert(gate_bias=0.0, soft_epochs=1.8)),
]


@pytest.mark.parametrize(("data", "wanted"), EARLIER, ids=[data["name"] for data, _ in EARLIER])
def test_data_of_earlier_versions(data, wanted):
    """Also within a model's config and in a recipe; a method by name, or built, has the new defaults."""
    wanted = dataclasses.replace(wanted, **{k: v for k, v in data.items() if k != "name"})
    assert from_dict(data) == method_of(data) == wanted
    assert method_of(data["name"]) == type(wanted)()
    model = ee.to_early_exit(stock("bert", num_hidden_layers=3), method=data["name"])
    model.config.method = data
    assert ee.EarlyExitForSequenceClassification(model.config).method == wanted


@every_method
def test_values_of_missing_fields_are_valid(cls):
    cls(**cls.when_missing)
    assert set(cls.when_missing) <= {field.name for field in dataclasses.fields(cls)}


#: Numbers out of range, and what is expected; flags and choices are refused by their kind.
OUT_OF_RANGE = {
    Palbert: {"beta": (-1, "at least 0"), "prior": (0, "in (0, 1)"), "halting_layers": (0, "whole number at least 1")},
    Ensemble: {"diversity": (1.1, "[0, 1]"), "cap": (0, "above 0")},
    Smartbert: {
        "gate_weight": (-1, "at least 0"),
        "gate_bias": ("closed", "finite number"),
        "skip_threshold": (1.5, "[0, 1]"),
        "soft_epochs": (-1, "at least 0"),
        "contrast_backbone": (2, "[0, 1]"),
        "contrast_exits": (True, "finite number"),
        "temperature_backbone": (0, "above 0"),
        "temperature_exits": (-1, "above 0"),
    },
    Dact: {
        "start": ("first", "joint"),
        "ponder": (10**400, "finite number"),
        "halting_bias": ("high", "finite number"),
    },
    Berxit: {"learned_weight": (-1, "at least 0")},
}


@every_method
def test_every_argument_is_checked(cls):
    assert set(cls.checks) == {field.name for field in dataclasses.fields(cls)}
    for field in dataclasses.fields(cls):
        refused = OUT_OF_RANGE.get(cls, {}).get(field.name)
        if refused is None:
            assert isinstance(field.default, (bool, str)), field
            refused = (1, "True or False") if isinstance(field.default, bool) else ("magic", repr(field.default))
        value, expected = refused
        with pytest.raises(ValueError, match=rf"^{cls.__name__}\({field.name}=.*{re.escape(expected)}"):
            cls(**{field.name: value})
        for number in (math.nan, math.inf, -math.inf) if "float" in str(field.type) else ():
            with pytest.raises(ValueError, match=rf"\({field.name}=...\): expected a finite number"):
                cls(**{field.name: number})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastExit(Method):
    """A method of another package."""

    name: ClassVar[str] = "last_exit"
    rule: ClassVar[str] = "entropy"
    scale: float = 1.0

    def loss(self, trace, labels, step):
        return self.scale * mean_task_loss(trace.logits[:, -1], labels, step.problem_type)


def changed(**members):
    """A dataclass like `LastExit` with other members."""
    annotations = dict.fromkeys(("name", *members), ClassVar)
    body = {"name": "changed", **members, "__annotations__": annotations}
    return dataclasses.dataclass(frozen=True, kw_only=True)(type("Changed", (LastExit,), body))


REFUSED = [
    *((lambda m=m: method_of(m), r"method: expected one of .*'joint'.* got") for m in ("magic", None, {}, {"name": 1})),
    (lambda: method_of({"name": "joint", "beta": 1}), r"method 'joint': .*'beta'"),
    (lambda: method_of(Joint), r"got the class; write Joint\(\)"),
    (lambda: PhaseSpec(name="p", trains={"head"}), r"trains=.*'backbone'.* got \['head'\]"),
    (lambda: PhaseSpec(name="p", projections="outputs"), r"projections=.*'inputs'.* got 'outputs'"),
    (lambda: PhaseSpec(name="p", lr=math.nan), r"\(lr=...\): expected a finite number"),
    (lambda: PhaseSpec(name="p", epochs=math.inf), r"\(epochs=...\): expected a finite number"),
    (lambda: check_task(Joint(), "ranking", CLASSES), "it is unknown"),
    *(
        (lambda cls=cls: check_task(cls(), SINGLE, 1), "at least 2, got 1")
        for cls in (Ensemble, Dact, Fastbert, Smartbert)
    ),
    (
        lambda: register(type("Undecorated", (LastExit,), {})),
        r"register\(Undecorated\): expected a frozen dataclass; write @data",
    ),
    (lambda: register(changed(name="two words")), "expected a class attribute `name"),
    (lambda: register(changed(rule=None)), "expected a class attribute `rule"),
    (lambda: register(changed(loss=Method.loss)), r"expected a method loss\(self, trace, labels, step\)"),
    (lambda: register(changed(name="joint")), "the name 'joint' belongs to .*Joint; give the class another name"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
    with pytest.raises(TypeError, match=r"expected a subclass of .*Method, got"):
        register("Changed")
    assert "changed" not in METHODS
    check_task(Deebert(), SINGLE, 1)


def test_register_makes_a_method_known(tmp_path):
    register(LastExit)
    try:
        assert register(LastExit) is LastExit and method_of("last_exit") == LastExit()
        model = ee.to_early_exit(stock(), method=LastExit(scale=2.0))
        batch, labels = batch_for(model), torch.tensor([0, 1, 2, 0])
        output = model.train()(**batch, labels=labels)
        assert output.loss.item() == pytest.approx(2 * mean_task_loss(output.logits, labels, SINGLE).item())
        model.save_pretrained(tmp_path)
        assert ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path).method == LastExit(scale=2.0)
    finally:
        METHODS.pop("last_exit")
    with pytest.raises(ValueError, match=r"got 'last_exit'; .*methods\.register"):
        ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
