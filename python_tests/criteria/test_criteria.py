"""The rules as objects: what their constructors refuse, what is saved, and where they apply."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import (
    CRITERIA,
    Dact,
    DivergencePatience,
    Energy,
    Entropy,
    Expectation,
    FullDepth,
    HiddenCosine,
    Learned,
    Margin,
    MaxProbability,
    Patience,
    PatientConfidence,
    QExit,
    SampledExit,
    SkipGate,
    Voting,
    check_fits,
    from_dict,
)
from earlyexit_kernels.criteria.base import ANY_TASK

SAVED = [
    (FullDepth(), {"name": "full_depth"}),
    (Entropy(threshold=0.3), {"name": "entropy", "threshold": 0.3, "normalized": False}),
    (Entropy(threshold=(1, 0.5), normalized=True), {"name": "entropy", "threshold": [1.0, 0.5], "normalized": True}),
    (MaxProbability(threshold=[0.9]), {"name": "max_probability", "threshold": [0.9]}),
    (Margin(threshold=0), {"name": "margin", "threshold": 0.0}),
    (Patience(patience=3), {"name": "patience", "patience": 3, "tolerance": None}),
    (Patience(patience=1, tolerance=0.1), {"name": "patience", "patience": 1, "tolerance": 0.1}),
    (QExit(q=np.float64(0.5)), {"name": "q_exit", "q": 0.5}),
    (SampledExit(seed=np.int64(7)), {"name": "sampled_exit", "seed": 7}),
    (Expectation(), {"name": "expectation"}),
    (Voting(threshold=3), {"name": "voting", "threshold": 3.0, "gamma": 0.0, "final": "vote"}),
    (
        Voting(threshold=0.8, gamma=1, final="last"),
        {"name": "voting", "threshold": 0.8, "gamma": 1.0, "final": "last"},
    ),
    (Dact(), {"name": "dact", "bound": "paper", "epsilon": 0.0}),
    (Dact(bound="tight", epsilon=0.1), {"name": "dact", "bound": "tight", "epsilon": 0.1}),
    (Learned(threshold=[0.1, 0]), {"name": "learned", "threshold": [0.1, 0.0]}),
    (
        PatientConfidence(threshold=0.5, patience=2),
        {"name": "patient_confidence", "threshold": 0.5, "patience": 2},
    ),
    (
        DivergencePatience(threshold=[0.1], patience=1),
        {"name": "divergence_patience", "threshold": [0.1], "patience": 1},
    ),
    (HiddenCosine(threshold=-1), {"name": "hidden_cosine", "threshold": -1.0}),
    (Energy(threshold=0.2), {"name": "energy", "threshold": 0.2}),
    (
        SkipGate(threshold=0.5, exit=Entropy(threshold=[0.1, 0.2])),
        {
            "name": "skip_gate",
            "threshold": 0.5,
            "exit": {"name": "entropy", "threshold": [0.1, 0.2], "normalized": False},
        },
    ),
]
CRITERION = [c for c, _ in SAVED]

#: constructor, arguments, and what the message has to say: the argument, what came, what is allowed.
REFUSED = [
    (Entropy, {"threshold": math.nan}, ("threshold", "nan", "finite number")),
    (Entropy, {"threshold": math.inf}, ("threshold", "inf", "finite number")),
    (Entropy, {"threshold": 10**400}, ("threshold", "finite number")),
    (Entropy, {"threshold": -0.1}, ("threshold", "-0.1", "at least 0")),
    (Entropy, {"threshold": 1.5, "normalized": True}, ("threshold", "1.5", "[0, 1]")),
    (Entropy, {"threshold": "low"}, ("threshold", "'low'", "finite number")),
    (Entropy, {"threshold": None}, ("threshold", "None", "finite number")),
    (Entropy, {"threshold": True}, ("threshold", "True", "finite number")),
    (Entropy, {"threshold": [0.1, math.nan]}, ("threshold", "nan", "finite number")),
    (Entropy, {"threshold": [0.1, -1]}, ("threshold", "-1", "at least 0")),
    (Entropy, {"threshold": [[0.1]]}, ("threshold", "[0.1]", "finite number")),
    (Entropy, {"threshold": 0.1, "normalized": 1}, ("normalized", "1", "True or False")),
    (MaxProbability, {"threshold": 1.01}, ("threshold", "1.01", "[0, 1]")),
    (MaxProbability, {"threshold": -0.01}, ("threshold", "-0.01", "[0, 1]")),
    (MaxProbability, {"threshold": math.nan}, ("threshold", "nan", "finite number")),
    (MaxProbability, {"threshold": [0.5, 2]}, ("threshold", "2", "[0, 1]")),
    (Margin, {"threshold": 1.01}, ("threshold", "1.01", "[0, 1]")),
    (Margin, {"threshold": -math.inf}, ("threshold", "-inf", "finite number")),
    (Patience, {"patience": 0}, ("patience", "0", "whole number in [1,", "criterion=None")),
    (Patience, {"patience": -2}, ("patience", "-2", "whole number in [1,")),
    (Patience, {"patience": 1.5}, ("patience", "1.5", "whole number")),
    (Patience, {"patience": True}, ("patience", "True", "whole number")),
    (Patience, {"patience": None}, ("patience", "None", "whole number")),
    (Patience, {"patience": 1, "tolerance": 0}, ("tolerance", "0", "> 0")),
    (Patience, {"patience": 1, "tolerance": -0.5}, ("tolerance", "-0.5", "at least 0")),
    (Patience, {"patience": 1, "tolerance": math.nan}, ("tolerance", "nan", "finite number")),
    (Patience, {"patience": 1, "tolerance": math.inf}, ("tolerance", "inf", "finite number")),
    (QExit, {"q": -0.1}, ("q", "-0.1", "[0, 1]")),
    (QExit, {"q": 1.1}, ("q", "1.1", "[0, 1]")),
    (QExit, {"q": math.nan}, ("q", "nan", "finite number")),
    (QExit, {"q": [0.5]}, ("q", "[0.5]", "finite number")),
    (SampledExit, {"seed": -1}, ("seed", "-1", "whole number in [0,")),
    (SampledExit, {"seed": 2**63}, ("seed", str(2**63), "whole number in [0,")),
    (SampledExit, {"seed": 0.5}, ("seed", "0.5", "whole number")),
    (SampledExit, {"seed": None}, ("seed", "None", "whole number")),
    (Voting, {"threshold": -1}, ("threshold", "-1", "at least 0")),
    (Voting, {"threshold": math.nan}, ("threshold", "nan", "finite number")),
    (Voting, {"threshold": [1, 2]}, ("threshold", "[1, 2]", "finite number")),
    (Voting, {"threshold": 1, "gamma": 1.1}, ("gamma", "1.1", "[0, 1]")),
    (Voting, {"threshold": 1, "gamma": -0.1}, ("gamma", "-0.1", "[0, 1]")),
    (Voting, {"threshold": 1, "final": "first"}, ("final", "'first'", "'vote', 'last'")),
    (Dact, {"bound": "loose"}, ("bound", "'loose'", "'paper', 'tight'")),
    (Dact, {"bound": None}, ("bound", "None", "'paper', 'tight'")),
    (Dact, {"bound": ["paper"]}, ("bound", "['paper']", "'paper', 'tight'")),
    (Dact, {"epsilon": 1.5}, ("epsilon", "1.5", "[0, 1]")),
    (Dact, {"epsilon": math.nan}, ("epsilon", "nan", "finite number")),
    (Learned, {"threshold": 1.01}, ("threshold", "1.01", "[0, 1]")),
    (PatientConfidence, {"threshold": -0.1, "patience": 1}, ("threshold", "-0.1", "[0, 1]")),
    (PatientConfidence, {"threshold": 0.1, "patience": 0}, ("patience", "0", "whole number in [1,")),
    (DivergencePatience, {"threshold": 1.1, "patience": 1}, ("threshold", "1.1", "[0, 1]")),
    (DivergencePatience, {"threshold": 0.1, "patience": 1.0}, ("patience", "1.0", "whole number in [1,")),
    (HiddenCosine, {"threshold": 1.01}, ("threshold", "1.01", "[-1, 1]")),
    (HiddenCosine, {"threshold": [0, -1.5]}, ("threshold", "-1.5", "[-1, 1]")),
    (Energy, {"threshold": -0.1}, ("threshold", "-0.1", "[0, 1]")),
    (SkipGate, {"threshold": 1.5, "exit": Entropy(threshold=0.1)}, ("threshold", "1.5", "[0, 1]")),
    (SkipGate, {"threshold": 0.5, "exit": None}, ("exit", "None", "Entropy(...)")),
    (SkipGate, {"threshold": 0.5, "exit": "entropy"}, ("exit", "'entropy'", "Entropy(...)")),
    (
        SkipGate,
        {"threshold": 0.5, "exit": SkipGate(threshold=0.1, exit=FullDepth())},
        ("exit", "SkipGate(threshold=0.1", "decides at an exit"),
    ),
]


@pytest.mark.parametrize(("cls", "arguments", "words"), REFUSED, ids=lambda v: getattr(v, "__name__", None))
def test_constructor_refuses(cls, arguments, words):
    with pytest.raises(ValueError) as caught:
        cls(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{cls.__name__}({words[0]}=...): expected ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("cls", [c for c in CRITERIA.values() if c not in (FullDepth, Expectation, Dact)])
def test_arguments_are_keyword_only_and_required(cls):
    with pytest.raises(TypeError, match="positional"):
        cls(1)
    with pytest.raises(TypeError, match="missing"):
        cls()


@pytest.mark.parametrize("criterion", CRITERION, ids=str)
def test_cannot_be_changed(criterion):
    for field in dataclasses.fields(criterion):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(criterion, field.name, 0.1)
    assert hash(criterion) == hash(dataclasses.replace(criterion))


def test_a_list_of_thresholds_is_copied():
    given = [0.1, 0.2]
    criterion = Entropy(threshold=given)
    given[0] = 9.0
    saved = criterion.to_dict()
    saved["threshold"][1] = 9.0
    assert criterion.threshold == (0.1, 0.2)


def test_the_ends_of_each_range_are_allowed():
    for value in (0, 1, 0.0, 1.0):
        assert Entropy(threshold=value, normalized=True).threshold == float(value)
        assert (
            MaxProbability(threshold=value).threshold == Margin(threshold=value).threshold == QExit(q=value).q == value
        )
    assert Entropy(threshold=50).threshold == 50.0


@pytest.mark.parametrize(("criterion", "data"), SAVED, ids=str)
def test_saved_and_read_back(criterion, data):
    assert criterion.to_dict() == data
    text = json.dumps(criterion.to_dict(), allow_nan=False)
    again = from_dict(json.loads(text))
    assert again == criterion and type(again) is type(criterion)
    assert again.to_dict() == data


def test_every_criterion_of_the_table_is_saved_somewhere_above():
    assert {type(c) for c in CRITERION} == set(CRITERIA.values())


def test_no_data_is_full_depth():
    assert from_dict(None) == FullDepth()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "psychic"}, ("criterion", "'psychic'", *CRITERIA)),
        ({"threshold": 0.1}, ("criterion", "None", *CRITERIA)),
        ({"name": ["entropy"]}, ("criterion", "['entropy']", *CRITERIA)),
        ({"name": "entropy"}, ("'entropy'", "threshold")),
        ({"name": "entropy", "threshold": 0.1, "q": 0.5}, ("'entropy'", "'q'")),
        ({"name": "entropy", "threshold": -1}, ("Entropy(threshold=...)", "-1", "at least 0")),
        ({"name": "skip_gate", "threshold": 0.5}, ("'skip_gate'", "exit")),
        ({"name": "skip_gate", "threshold": 0.5, "exit": {"name": "psychic"}}, ("criterion", "'psychic'", *CRITERIA)),
    ],
    ids=str,
)
def test_data_that_is_refused(data, words):
    kept = dict(data)
    with pytest.raises(ValueError) as caught:
        from_dict(data)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert data == kept


def checked(criterion, *, depth=4, classes=3, problem_type="single_label_classification", aux=()) -> None:
    check_fits(criterion, depth=depth, classes=classes, problem_type=problem_type, aux=aux)


def test_fits_a_classifier():
    for criterion in (FullDepth(), Entropy(threshold=[0.1, 0.2, 0.3]), Patience(patience=9), Margin(threshold=0.5)):
        checked(criterion)
    checked(QExit(q=0.5), aux=("halting",))
    checked(QExit(q=0.5), aux=("halting",), problem_type="multi_label_classification")
    checked(Patience(patience=1, tolerance=0.1), classes=1, problem_type="regression")
    for criterion in (Voting(threshold=2), PatientConfidence(threshold=0.1, patience=2), Energy(threshold=0.1)):
        checked(criterion)
    checked(Dact(), aux=("halting",))
    checked(SkipGate(threshold=0.5, exit=Entropy(threshold=[0.1, 0.2, 0.3])), aux=("gate",))
    for task in ANY_TASK:
        classes = 1 if task == "regression" else 3
        if task != "multi_label_classification":
            checked(Learned(threshold=0.1), aux=("uncertainty",), problem_type=task, classes=classes)
        checked(HiddenCosine(threshold=0.9), aux=("hidden_cosine",), problem_type=task, classes=classes)
        checked(SampledExit(seed=0), aux=("halting",), problem_type=task, classes=classes)
        gated = SkipGate(threshold=0.5, exit=HiddenCosine(threshold=0.9))
        checked(gated, aux=("gate", "hidden_cosine"), problem_type=task, classes=classes)
    checked(Expectation(), aux=("halting",), problem_type="regression", classes=1)
    checked(Expectation(), aux=("halting",))


@pytest.mark.parametrize(
    ("criterion", "given", "words"),
    [
        (Entropy(threshold=[0.1, 0.2]), {}, ("threshold", "'entropy'", "each of the 3 exits before the last", "got 2")),
        (Margin(threshold=[]), {}, ("threshold", "'margin'", "3 exits", "got 0")),
        (Entropy(threshold=0.1), {"classes": 1}, ("'entropy'", "at least 2", "got 1")),
        (Entropy(threshold=0.1), {"problem_type": "regression"}, ("'entropy'", "single_label", "'regression'")),
        (Margin(threshold=0.1), {"problem_type": "multi_label_classification"}, ("'margin'", "'multi_label")),
        (Patience(patience=1), {"problem_type": "multi_label_classification"}, ("'patience'", "'multi_label")),
        (QExit(q=0.5), {}, ("'q_exit'", "'halting'", "none", "method='palbert'")),
        (QExit(q=0.5), {"aux": ("uncertainty",)}, ("'q_exit'", "'halting'", "uncertainty")),
        (
            Patience(patience=1),
            {"classes": 1, "problem_type": "regression"},
            ("tolerance=None", "1 output", "give tol"),
        ),
        (Patience(patience=1, tolerance=0.1), {}, ("tolerance=0.1", "3 output", "leave tolerance out")),
        (Patience(patience=1), {"problem_type": "regression"}, ("tolerance=None", "regression", "3 output")),
        (
            Voting(threshold=2),
            {"classes": 1, "problem_type": "regression", "aux": ("hidden_cosine", "uncertainty")},
            ("'voting'", "'regression'", "heads have FullDepth, HiddenCosine, Learned, Patience"),
        ),
        (
            Dact(),
            {"aux": ("halting",), "problem_type": "multi_label_classification"},
            ("'dact'", "heads have FullDepth, QExit, SampledExit"),
        ),
        (Voting(threshold=2), {"depth": 4096}, ("'voting'", "4095", "4096")),
        (Voting(threshold=2), {"classes": 1}, ("'voting'", "at least 2", "got 1")),
        (Dact(), {}, ("'dact'", "'halting'", "none", "method='palbert' or 'dact'")),
        (Learned(threshold=0.1), {"aux": ("halting",)}, ("'learned'", "'uncertainty'", "method='berxit'")),
        (HiddenCosine(threshold=0.1), {}, ("'hidden_cosine'", "none", "model.trace")),
        (Learned(threshold=[0.1]), {"aux": ("uncertainty",)}, ("threshold", "'learned'", "3 exits", "got 1")),
        (Expectation(), {"aux": ("halting",), "classes": 1}, ("'expectation'", "single_label", "1 output")),
        (Expectation(), {"aux": ("halting",), "problem_type": "regression"}, ("'expectation'", "3 output")),
        (SkipGate(threshold=0.5, exit=FullDepth()), {}, ("'skip_gate'", "'gate'", "none", "method='smartbert'")),
        (SkipGate(threshold=0.5, exit=QExit(q=0.5)), {"aux": ("gate",)}, ("'q_exit'", "'halting'", "gate")),
        (
            SkipGate(threshold=0.5, exit=Entropy(threshold=0.1)),
            {"aux": ("gate", "hidden_cosine"), "problem_type": "regression"},
            ("'entropy'", "'regression'", "heads have FullDepth, HiddenCosine, Patience, SkipGate"),
        ),
    ],
    ids=str,
)
def test_check_refuses(criterion, given, words):
    with pytest.raises(ValueError) as caught:
        checked(criterion, **given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_threshold_of_each_layer():
    criterion = Entropy(threshold=[0.1, 0.2, 0.3])
    assert [criterion.params(layer)[0] for layer in (1, 2, 3)] == [0.1, 0.2, 0.3]
    assert criterion.params(4)[0] in criterion.threshold


@pytest.mark.parametrize("cls", [Entropy, MaxProbability, Margin, Energy])
def test_a_model_of_one_layer_takes_an_empty_list(cls):
    assert ee.replay(ee.ExitTrace(torch.randn(2, 1, 3)), cls(threshold=[]))[1].tolist() == [1, 1]


def test_the_state_has_the_request_behind_each_number():
    state = Patience(patience=1).new_state(5, torch.device("cpu"), 3)
    assert state.shape == (2, 5) and state.is_contiguous() and state.dtype == torch.float32
    assert state[0].isnan().all() and (state[1] == 0).all()
    assert QExit(q=0.5).new_state(2, torch.device("cpu"), 3).tolist() == [[1.0, 1.0]]
    assert Entropy(threshold=1).new_state(3, torch.device("cpu"), 2).shape == (0, 3)
    assert Voting(threshold=1).new_state(2, torch.device("cpu"), 3).tolist() == [[0.0, 0.0]] * 3
    assert Dact().new_state(1, torch.device("cpu"), 2).tolist() == [[1.0], [0.0], [0.0]]


def test_a_criterion_around_another_one():
    gate = SkipGate(threshold=0.5, exit=Entropy(threshold=0.1))
    assert gate.skip_from == 0.5 and gate.exit_rule == Entropy(threshold=0.1)
    assert gate.exit_rule.skip_from is None and gate.exit_rule.exit_rule == gate.exit_rule
