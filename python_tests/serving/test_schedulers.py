"""Schedulers of a worker: the answers are those of `forward`, rows can be dropped, and a failing row fails alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.text_models import answers_one_by_one, model_and_tokenizer, texts

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, SkipGate
from earlyexit_kernels.serving import worker
from earlyexit_kernels.serving.protocol import Row
from earlyexit_kernels.serving.settings import SCHEDULERS
from earlyexit_kernels.tasks import toy

ROWS = texts(30)
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def varied():
    return model_and_tokenizer(ROWS)


@pytest.fixture(params=SCHEDULERS)
def scheduler(request, varied):
    with torch.inference_mode():
        yield worker.SCHEDULERS[request.param](varied[0], MAX_TOKENS)


def rows_of(words, given=ROWS, first=0):
    encoded = [words(text) for text in given]
    return [Row(first + n, one["input_ids"], one.get("token_type_ids")) for n, one in enumerate(encoded)]


def finished(scheduler):
    """Take all steps; return the answers by key, and the failed keys."""
    answers, failed = {}, []
    while scheduler.busy:
        done = scheduler.step()
        for answer in done.answers:
            assert answer.key not in answers
            answers[answer.key] = answer
        failed += done.failed
    return answers, failed


def test_every_scheduler_has_a_name():
    assert set(worker.SCHEDULERS) == set(SCHEDULERS)


def test_answers_are_those_of_forward(varied, scheduler):
    model, words = varied
    rows = rows_of(words)
    scheduler.add(rows[:20])
    first = scheduler.step()
    scheduler.add(rows[20:])
    answers, failed = finished(scheduler)
    answers.update({answer.key: answer for answer in first.answers})
    assert not failed and sorted(answers) == list(range(len(ROWS)))
    for key, (logits, layer) in enumerate(answers_one_by_one(model, words, ROWS)):
        assert answers[key].exit_layer == layer
        torch.testing.assert_close(torch.tensor(answers[key].logits), logits, rtol=1e-4, atol=1e-5)


def test_dropped_rows_are_not_answered(varied, scheduler):
    rows = rows_of(varied[1])
    scheduler.add(rows)
    begun = {answer.key for answer in scheduler.step().answers}
    dropped = scheduler.drop(range(10, 30))
    answers, failed = finished(scheduler)
    assert not failed and len(dropped) == len(set(dropped)) >= 15
    assert {*begun, *answers} | {*dropped} == set(range(len(ROWS))) and not {*begun, *answers} & {*dropped}
    scheduler.add(rows_of(varied[1], ROWS[:2], first=100))
    assert sorted(finished(scheduler)[0]) == [100, 101]


def test_a_row_that_fails_leaves_its_neighbours_alone(varied, scheduler, caplog):
    model, words = varied
    rows = rows_of(words, ROWS[:9])
    rows[4] = rows[4]._replace(input_ids=[*rows[4].input_ids[:-1], len(words)])  # no embedding
    scheduler.add(rows)
    answers, failed = finished(scheduler)
    assert failed == [4] and sorted(answers) == [0, 1, 2, 3, 5, 6, 7, 8]
    for key, (_, layer) in enumerate(answers_one_by_one(model, words, ROWS[:9])):
        assert key == 4 or answers[key].exit_layer == layer
    assert "tokens" in caplog.text


def test_a_layer_that_raises_on_one_row(varied, scheduler):
    model, words = varied
    rows = rows_of(words, ROWS[:6])
    marked = words.unk_token_id
    rows[3] = rows[3]._replace(input_ids=[*rows[3].input_ids, marked])

    def raising(_, inputs, __):
        if (inputs[0] == marked).any():
            raise RuntimeError("no")

    hook = model.backbone.get_input_embeddings().register_forward_hook(raising)
    try:
        scheduler.add(rows)
        answers, failed = finished(scheduler)
    finally:
        hook.remove()
    assert failed == [3] and set(answers) == {0, 1, 2, 4, 5}


def test_rows_with_thresholds_of_their_own(varied):
    model, words = varied
    rule = model.criterion
    strict = replace(rule, threshold=0.0)
    with torch.inference_mode():
        scheduler = worker.SCHEDULERS["continuous"](model, MAX_TOKENS)
        rows = rows_of(words, ROWS[:10])
        scheduler.add([row._replace(threshold=0.0) if row.key % 2 else row for row in rows])
        answers, _ = finished(scheduler)
    usual = answers_one_by_one(model, words, ROWS[:10])
    model.set_criterion(strict)
    try:
        deep = answers_one_by_one(model, words, ROWS[:10])
    finally:
        model.set_criterion(rule)
    assert [answers[n].exit_layer for n in range(10)] == [(deep if n % 2 else usual)[n][1] for n in range(10)]


def test_a_row_longer_than_a_step(varied, scheduler):
    model, words = varied
    long = " ".join(["good"] * (MAX_TOKENS + 5))
    scheduler.add(rows_of(words, [ROWS[0], long, ROWS[1]]))
    answers, failed = finished(scheduler)
    assert sorted(answers) == [0, 1, 2] and not failed
    assert answers[1].exit_layer == answers_one_by_one(model, words, [long])[0][1]


def test_rows_that_skip_layers_run_in_batches():
    """A pool cannot skip layers."""
    model = ee.to_early_exit(toy.toy_model(layers=3, hidden=8), method="smartbert").eval()
    model.set_criterion(Entropy(threshold=0.5))
    assert worker.scheduler_of("continuous", model, MAX_TOKENS)[0] == "continuous"
    model.set_criterion(SkipGate(threshold=0.5, exit=Entropy(threshold=0.5)))
    name, scheduler = worker.scheduler_of("continuous", model, MAX_TOKENS)
    scheduler.add(rows_of(toy.toy_tokenizer(), ["the plot was dull ."] * 5))
    with torch.inference_mode():
        assert name == "stream" and len(finished(scheduler)[0]) == 5
    assert worker.scheduler_of("whole", model, MAX_TOKENS)[0] == "whole"
