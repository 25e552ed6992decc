"""Batches of a worker: the answers are those of `forward`, rows can be dropped, and a failing row fails alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.text_models import answers_one_by_one, model_and_tokenizer, texts

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, SkipGate
from earlyexit_kernels.data import toy
from earlyexit_kernels.serving.http.batches import Batches
from earlyexit_kernels.serving.http.protocol import Row

ROWS = texts(30)
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def varied():
    return model_and_tokenizer(ROWS)


@pytest.fixture
def batches(varied):
    with torch.inference_mode():
        yield Batches(varied[0], MAX_TOKENS)


def rows_of(words, given=ROWS, first=0):
    encoded = [words(text) for text in given]
    return [Row(first + n, one["input_ids"], one.get("token_type_ids")) for n, one in enumerate(encoded)]


def finished(batches):
    """Take all steps; return the answers by key, and the failed keys."""
    answers, failed = {}, []
    while batches.busy:
        done = batches.step()
        for answer in done.answers:
            assert answer.key not in answers
            answers[answer.key] = answer
        failed += done.failed
    return answers, failed


def test_answers_are_those_of_forward(varied, batches):
    model, words = varied
    rows = rows_of(words)
    batches.add(rows[:20])
    first = batches.step()
    batches.add(rows[20:])
    answers, failed = finished(batches)
    answers.update({answer.key: answer for answer in first.answers})
    assert not failed and sorted(answers) == list(range(len(ROWS)))
    for key, (logits, layer) in enumerate(answers_one_by_one(model, words, ROWS)):
        assert answers[key].exit_layer == layer
        torch.testing.assert_close(torch.tensor(answers[key].logits), logits, rtol=1e-4, atol=1e-5)


def test_dropped_rows_are_not_answered(varied, batches):
    rows = rows_of(varied[1])
    batches.add(rows)
    begun = {answer.key for answer in batches.step().answers}
    dropped = batches.drop(range(10, 30))
    answers, failed = finished(batches)
    assert not failed and len(dropped) == len(set(dropped)) >= 15
    assert {*begun, *answers} | {*dropped} == set(range(len(ROWS))) and not {*begun, *answers} & {*dropped}
    batches.add(rows_of(varied[1], ROWS[:2], first=100))
    assert sorted(finished(batches)[0]) == [100, 101]


def test_a_row_that_fails_leaves_its_neighbours_alone(varied, batches, caplog):
    model, words = varied
    rows = rows_of(words, ROWS[:9])
    rows[4] = rows[4]._replace(input_ids=[*rows[4].input_ids[:-1], len(words)])  # no embedding
    batches.add(rows)
    answers, failed = finished(batches)
    assert failed == [4] and sorted(answers) == [0, 1, 2, 3, 5, 6, 7, 8]
    for key, (_, layer) in enumerate(answers_one_by_one(model, words, ROWS[:9])):
        assert key == 4 or answers[key].exit_layer == layer
    assert "tokens" in caplog.text


def test_a_layer_that_raises_on_one_row(varied, batches):
    model, words = varied
    rows = rows_of(words, ROWS[:6])
    marked = words.unk_token_id
    rows[3] = rows[3]._replace(input_ids=[*rows[3].input_ids, marked])

    def raising(_, inputs, __):
        if (inputs[0] == marked).any():
            raise RuntimeError("no")

    hook = model.backbone.get_input_embeddings().register_forward_hook(raising)
    try:
        batches.add(rows)
        answers, failed = finished(batches)
    finally:
        hook.remove()
    assert failed == [3] and set(answers) == {0, 1, 2, 4, 5}


def test_rows_with_thresholds_of_their_own(varied):
    model, words = varied
    rule = model.criterion
    strict = replace(rule, threshold=0.0)
    with torch.inference_mode():
        batches = Batches(model, MAX_TOKENS)
        rows = rows_of(words, ROWS[:10])
        batches.add([row._replace(threshold=0.0) if row.key % 2 else row for row in rows])
        answers, _ = finished(batches)
    model.set_criterion(rule)
    usual = answers_one_by_one(model, words, ROWS[:10])
    model.set_criterion(strict)
    try:
        deep = answers_one_by_one(model, words, ROWS[:10])
    finally:
        model.set_criterion(rule)
    assert [answers[n].exit_layer for n in range(10)] == [(deep if n % 2 else usual)[n][1] for n in range(10)]


def test_a_row_longer_than_a_step(varied, batches):
    model, words = varied
    long = " ".join(["good"] * (MAX_TOKENS + 5))
    batches.add(rows_of(words, [ROWS[0], long, ROWS[1]]))
    answers, failed = finished(batches)
    assert sorted(answers) == [0, 1, 2] and not failed
    assert answers[1].exit_layer == answers_one_by_one(model, words, [long])[0][1]


def test_rows_that_skip_layers():
    model = ee.to_early_exit(toy.toy_model(layers=3, hidden=8), method="smartbert").eval()
    model.set_criterion(SkipGate(threshold=0.5, exit=Entropy(threshold=0.5)))
    batches = Batches(model, MAX_TOKENS)
    batches.add(rows_of(toy.toy_tokenizer(), ["the plot was dull ."] * 5))
    with torch.inference_mode():
        assert len(finished(batches)[0]) == 5


def test_a_batch_has_one_threshold_and_the_oldest_row(varied):
    """A row with a threshold of its own does not wait for all others, nor keep them from a full batch."""
    batches, started = Batches(varied[0], MAX_TOKENS), []
    run = batches._run
    batches._run = lambda rows: started.append([row.key for row in rows]) or run(rows)
    length = MAX_TOKENS // 4
    given = [None, None, 0.0, None, None, None, 0.0]
    with torch.inference_mode():
        batches.add(Row(key, [5] * length, threshold=threshold) for key, threshold in enumerate(given))
        answers, _ = finished(batches)
    assert started == [[0, 1, 3, 4], [2, 6], [5]] and len(answers) == 7
