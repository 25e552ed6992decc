"""Criteria as objects: invalid arguments, saved forms, and checks against heads and tasks."""

from __future__ import annotations

import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch
from support.criterion_cases import CASES

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import (
    CRITERIA,
    RULES,
    Dact,
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
from earlyexit_kernels.types import ANY_TASK

SAVED = [(criterion, {"name": name, **data}) for name, case in CASES.items() for criterion, data in case.saved]
CRITERION = [criterion for criterion, _ in SAVED]
#: Class, constructor arguments, and words of the error message: the argument, the value and what is allowed.
REFUSED = [(CRITERIA[name], arguments, words) for name, case in CASES.items() for arguments, words in case.refused]


@pytest.mark.parametrize(("cls", "arguments", "words"), REFUSED, ids=lambda v: getattr(v, "__name__", None))
def test_constructor_refuses_invalid_arguments(cls, arguments, words):
    with pytest.raises(ValueError) as caught:
        cls(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{cls.__name__}({words[0]}=...): expected ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("value", [torch.tensor(0.3), torch.tensor([0.1, 0.2]), np.array([0.1, 0.2]), "0.3", None])
def test_refused_threshold_names_what_is_allowed(value):
    with pytest.raises(ValueError, match="a list or tuple of them, one for each exit before the last, got ") as caught:
        Entropy(threshold=value)
    assert ("tolist()" in str(caught.value)) == hasattr(value, "tolist")
    assert len(str(caught.value)) < 250


def test_refused_tensor_in_a_list_or_of_a_single_number_says_how_to_convert_it():
    with pytest.raises(ValueError, match=r"a finite number at least 0, got a Tensor; its tolist\(\)"):
        Entropy(threshold=[torch.tensor(0.3)])
    with pytest.raises(ValueError, match=r"a finite number at least 0, got a Tensor; its tolist\(\)"):
        Voting(threshold=torch.tensor(2.0))


@pytest.mark.parametrize("cls", [c for c in CRITERIA.values() if c not in (FullDepth, Expectation, Dact)])
def test_arguments_are_keyword_only_and_required(cls):
    first = dataclasses.fields(cls)[0].name
    words = rf"{cls.__name__}: expected settings by name, such as {cls.__name__}\({first}=0\.8\), got 0\.8 without"
    with pytest.raises(TypeError, match=words):
        cls(0.8)
    assert list(inspect.signature(cls).parameters) == [field.name for field in dataclasses.fields(cls)]
    with pytest.raises(TypeError, match="missing"):
        cls()


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(TypeError, match=r"Entropy: expected the settings threshold, normalized, got 'treshold'"):
        Entropy(treshold=0.2)
    with pytest.raises(TypeError, match=r"FullDepth: expected no settings, got 'threshold'"):
        FullDepth(threshold=0.2)


@pytest.mark.parametrize("criterion", CRITERION, ids=str)
def test_criteria_are_immutable(criterion):
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


def test_range_ends_are_allowed():
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


def test_every_criterion_has_a_case():
    assert list(CASES) == list(CRITERIA)
    assert all(case.saved and (case.refused or not fields(name)) for name, case in CASES.items())
    assert all(
        case.decide and case.draw and case.spreading and name in case.settings
        for name, case in CASES.items()
        if name in RULES
    )


def fields(name):
    return dataclasses.fields(CRITERIA[name])


def test_none_is_full_depth():
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
def test_from_dict_refuses_invalid_data(data, words):
    kept = dict(data)
    with pytest.raises(ValueError) as caught:
        from_dict(data)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert data == kept


def checked(criterion, *, depth=4, classes=3, problem_type="single_label_classification", aux=()) -> None:
    check_fits(criterion, depth=depth, classes=classes, problem_type=problem_type, aux=aux)


def test_check_fits_accepts():
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
            ("'voting'", "'regression'", "heads have FixedLayer, FullDepth, HiddenCosine, Learned, Patience"),
        ),
        (
            Dact(),
            {"aux": ("halting",), "problem_type": "multi_label_classification"},
            ("'dact'", "heads have FixedLayer, FullDepth, QExit, SampledExit"),
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
            ("'entropy'", "'regression'", "heads have FixedLayer, FullDepth, HiddenCosine, Patience, SkipGate"),
        ),
    ],
    ids=str,
)
def test_check_fits_refuses(criterion, given, words):
    with pytest.raises(ValueError) as caught:
        checked(criterion, **given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_thresholds_by_layer():
    criterion = Entropy(threshold=[0.1, 0.2, 0.3])
    assert [criterion.params(layer)[0] for layer in (1, 2, 3)] == [0.1, 0.2, 0.3]
    assert criterion.params(4)[0] in criterion.threshold


@pytest.mark.parametrize("cls", [Entropy, MaxProbability, Margin, Energy])
def test_one_layer_allows_an_empty_threshold_list(cls):
    assert ee.replay(ee.ExitTrace(torch.randn(2, 1, 3)), cls(threshold=[]))[1].tolist() == [1, 1]


def test_initial_state_shapes_and_values():
    state = Patience(patience=1).new_state(5, torch.device("cpu"), 3)
    assert state.shape == (2, 5) and state.is_contiguous() and state.dtype == torch.float32
    assert state[0].isnan().all() and (state[1] == 0).all()
    assert QExit(q=0.5).new_state(2, torch.device("cpu"), 3).tolist() == [[1.0, 1.0]]
    assert Entropy(threshold=1).new_state(3, torch.device("cpu"), 2).shape == (0, 3)
    assert Voting(threshold=1).new_state(2, torch.device("cpu"), 3).tolist() == [[0.0, 0.0]] * 3
    assert Dact().new_state(1, torch.device("cpu"), 2).tolist() == [[1.0], [0.0], [0.0]]


def test_skip_gate_wraps_an_exit_rule():
    gate = SkipGate(threshold=0.5, exit=Entropy(threshold=0.1))
    assert gate.skip_from == 0.5 and gate.exit_rule == Entropy(threshold=0.1)
    assert gate.exit_rule.skip_from is None and gate.exit_rule.exit_rule == gate.exit_rule
