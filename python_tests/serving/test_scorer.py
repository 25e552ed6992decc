"""`Scorer`: the answers are those of the model on each row alone, in the order of the rows, whatever the batches."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers as tf
from support.models import parameter_set
from support.text_models import answers_one_by_one, model_and_tokenizer, texts

import earlyexit_kernels as ee
from earlyexit_kernels.serving.rows import token_batches
from earlyexit_kernels.serving.scorer import OPTION_CHECKS

ROWS = texts()
PAIRS = list(zip(texts(20, longest=12, seed=1), texts(20, longest=12, seed=2), strict=True))


@pytest.fixture(scope="module")
def varied():
    """A model whose answers to `ROWS` come from three layers or more, and its tokenizer."""
    return model_and_tokenizer(ROWS)


def without_scores(table):
    return {name: values for name, values in table.items() if name != "score"}


def test_answers_are_those_of_the_model_on_each_row_alone(varied):
    model, words = varied
    found = ee.Scorer(model, words, scores=True)(ROWS)
    assert list(found) == ["label", "score", "exit_layer", "error", "scores"]
    expected = answers_one_by_one(model, words, ROWS)
    assert found["exit_layer"] == [layer for _, layer in expected]
    assert found["label"] == [f"LABEL_{int(logits.argmax())}" for logits, _ in expected]
    scores = torch.stack([logits for logits, _ in expected]).double().softmax(-1)
    assert torch.tensor(found["scores"]) == pytest.approx(scores, abs=1e-6)
    assert found["score"] == [max(row) for row in found["scores"]]
    assert found["error"] == [""] * len(ROWS)


@pytest.mark.parametrize("max_tokens", [1, 40, 333, 10**9])
def test_neither_order_nor_batches_change_an_answer(varied, max_tokens):
    expected = ee.Scorer(*varied)(ROWS)
    order = random.Random(max_tokens).sample(range(len(ROWS)), len(ROWS))
    found = ee.Scorer(*varied, max_tokens=max_tokens)([ROWS[row] for row in order])
    for name, values in without_scores(expected).items():
        assert found[name] == [values[row] for row in order], name
    assert found["score"] == pytest.approx([expected["score"][row] for row in order], abs=1e-6)


def test_batches_have_each_row_once_and_at_most_so_many_tokens():
    lengths = random.Random(0).choices(range(1, 60), k=300)
    for max_tokens in (1, 64, 500, 10**9):
        batches = list(token_batches(lengths, max_tokens))
        assert sorted(row for batch in batches for row in batch) == list(range(300))
        assert all(len(batch) == 1 or sum(lengths[row] for row in batch) <= max_tokens for batch in batches)
        in_order = [lengths[row] for batch in batches for row in batch]
        assert in_order == sorted(lengths, reverse=True)
    assert len(batches) == 1 and list(token_batches([], 5)) == []


def test_pairs_in_every_form(varied):
    model, words = varied
    scorer = ee.Scorer(model, words)
    expected = scorer(PAIRS)
    assert expected["exit_layer"] == [layer for _, layer in answers_one_by_one(model, words, PAIRS)]
    first, second = (list(column) for column in zip(*PAIRS, strict=True))
    forms = [list(map(list, PAIRS)), np.array(PAIRS), np.array(PAIRS, dtype=object), tuple(PAIRS), iter(PAIRS)]
    for form in forms:
        assert scorer(form) == expected
    columns = {"text": first, "id": range(len(PAIRS)), "text_pair": np.array(second, dtype=object)}
    assert scorer(columns) == {**columns, **expected}


def test_columns_are_kept(varied):
    scorer = ee.Scorer(*varied)
    columns = {"text": np.array(ROWS, dtype=object), "truth": [1] * len(ROWS)}
    found = scorer(columns)
    assert list(found) == ["text", "truth", "label", "score", "exit_layer", "error"]
    assert found["text"] is columns["text"] and {name: found[name] for name in scorer(ROWS)} == scorer(ROWS)


def test_no_rows(varied):
    empty = {"label": [], "score": [], "exit_layer": [], "error": []}
    assert ee.Scorer(*varied)([]) == empty
    assert ee.Scorer(*varied, scores=True)({"text": []}) == {"text": [], **empty, "scores": []}


@pytest.mark.parametrize(
    "sizes",
    [{}, {"num_labels": 2}, {"num_labels": 1}, {"problem_type": "multi_label_classification"}],
    ids=["classes", "two classes", "regression", "several labels"],
)
@pytest.mark.parametrize("function", [None, "softmax", "sigmoid", "none"])
def test_labels_and_scores_are_those_of_the_pipeline(sizes, function):
    model, words = model_and_tokenizer(ROWS, exits=False, **sizes)
    found = ee.Scorer(model, words, function_to_apply=function, scores=True)(ROWS)
    pipe = tf.pipeline("text-classification", model=model, tokenizer=words)
    expected = pipe(ROWS, function_to_apply=function)
    assert found["score"] == pytest.approx([answer["score"] for answer in expected], abs=1e-5)
    if sizes == {"num_labels": 1}:
        assert "label" not in found
    else:
        assert found["label"] == [answer["label"] for answer in expected]
    for one, answers in zip(found["scores"], pipe(ROWS, function_to_apply=function, top_k=None), strict=True):
        assert sorted(one) == pytest.approx(sorted(answer["score"] for answer in answers), abs=1e-5)


def test_a_row_with_invalid_logits_fails_alone(varied):
    model, words = varied
    scorer, poisoned = ee.Scorer(model, words, scores=True), [row for row, text in enumerate(ROWS) if "witty" in text]
    assert 0 < len(poisoned) < len(ROWS)
    expected = scorer(ROWS)
    with parameter_set(model.backbone.get_input_embeddings().weight, words.vocab["witty"], float("nan")):
        found = scorer(ROWS)
    for row in range(len(ROWS)):
        if row in poisoned:
            assert found["label"][row] == "" and math.isnan(found["score"][row])
            assert found["error"][row] == "the model gives invalid logits for this row"
            assert found["exit_layer"][row] == model.depth and all(map(math.isnan, found["scores"][row]))
        else:
            assert {name: column[row] for name, column in found.items() if name != "scores"} == {
                name: pytest.approx(column[row]) if name == "score" else column[row]
                for name, column in expected.items()
                if name != "scores"
            }


def test_one_infinite_logit_is_an_answer_and_two_are_not():
    model, words = model_and_tokenizer(ROWS, exits=False)
    scorer, bias = ee.Scorer(model, words), model.heads.out[-1].bias
    with parameter_set(bias, 1, float("inf")):
        found = scorer(ROWS[:2])
        assert found["label"] == ["LABEL_1"] * 2 and found["score"] == [1.0] * 2
        with parameter_set(bias, 2, float("inf")):
            assert scorer(ROWS[:2])["label"] == [""] * 2


def test_calls_in_several_threads(varied):
    scorer = ee.Scorer(*varied, max_tokens=100)
    expected = scorer(ROWS)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(scorer, [ROWS] * 8)) == [expected] * 8


def test_scorers_of_one_tokenizer_in_several_threads(varied):
    """Truncation is a setting of the tokenizer, which one of them needs and the other must not have."""
    scorers = [ee.Scorer(*varied, truncate=True, max_length=10), ee.Scorer(*varied)]
    expected = [scorer(ROWS) for scorer in scorers]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert list(pool.map(lambda scorer: scorer(ROWS), scorers * 3)) == expected * 3


def test_a_model_in_train_mode_is_refused():
    model, words = model_and_tokenizer(ROWS, exits=False)
    scorer = ee.Scorer(model.train(), words)
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\) first"):
        scorer(ROWS)


# drift


@pytest.fixture
def calibrated():
    model, words = model_and_tokenizer(ROWS, exits=False)
    ee.calibrate(model, [words(text) for text in texts(60)], target=ee.SpeedUp(1.5))
    return model, words


def test_rows_are_compared_with_the_calibration_in_the_order_of_the_call(calibrated):
    scorer = ee.Scorer(*calibrated, drift_window=16, max_tokens=64, bad_rows="report")
    assert scorer.drift is not None and scorer.drift.calibration == ee.Calibration.of(calibrated[0])
    layers = scorer([*ROWS, None])["exit_layer"]
    last = layers[len(ROWS) - 16 : len(ROWS)]
    assert scorer.drift.observed == tuple(last.count(layer) / 16 for layer in range(1, 5))
    assert (scorer.drift.tests, layers[-1]) == (2, 0)


def test_rows_are_not_compared_under_another_criterion(calibrated):
    model, words = calibrated
    scorer = ee.Scorer(model, words)
    model.set_criterion(None)
    scorer(ROWS)
    assert scorer.drift.rows == 0
    assert ee.Scorer(model, words).drift is None, "another criterion has no calibration"


def test_a_calibration_of_another_model_is_refused(calibrated):
    model, words = calibrated
    other, _ = model_and_tokenizer(ROWS, exits=False, num_hidden_layers=3)
    ee.Calibration.of(model).apply(other)
    with pytest.raises(ValueError, match="expected a calibration of 3 layers, as the model has, got one of 4"):
        ee.Scorer(other, words)


def test_the_comparison_can_be_left_out(calibrated, varied):
    assert ee.Scorer(*calibrated, drift_window=None).drift is None
    assert ee.Scorer(*varied).drift is None


# options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", 0),
        ("max_length", 0),
        ("truncate", 1),
        ("bad_rows", "skip"),
        ("function_to_apply", "relu"),
        ("scores", "yes"),
        ("drift_window", 0),
        ("show_progress_bar", 1),
    ],
)
def test_options_are_checked(varied, option, value):
    assert option in OPTION_CHECKS
    with pytest.raises(ValueError, match=rf"Scorer\({option}=...\): expected"):
        ee.Scorer(*varied, **{option: value})


def test_a_bar_counts_the_rows_that_run(varied, capsys):
    ee.Scorer(*varied)(ROWS)
    assert capsys.readouterr().err == ""
    ee.Scorer(*varied, max_tokens=40, bad_rows="report", show_progress_bar=True)([*ROWS, None])
    assert f"{len(ROWS)}/{len(ROWS)}" in capsys.readouterr().err
