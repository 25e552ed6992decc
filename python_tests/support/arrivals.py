"""Rows that arrive in a pool, and their answers compared with those of `forward`."""

from __future__ import annotations

import functools
import random

import torch
from support.models import VARIED_LENGTHS, varied
from support.rule_models import TOLERANCE, part_of


def row(batch, i):
    """Row i without its padding."""
    return {name: values[i : i + 1, : VARIED_LENGTHS[i]] for name, values in batch.items()}


def random_arrivals(pool, batch, seed):
    """Add the rows of a batch in small parts with random steps between them; return the answer of each row."""
    draw = random.Random(seed)
    rows, row_of, answers = list(range(len(batch["input_ids"]))), {}, {}
    draw.shuffle(rows)
    while rows or len(pool):
        size = draw.randint(0, 3)
        part, rows = rows[:size], rows[size:]
        if part:
            row_of.update(zip(pool.add(**part_of(batch, part)), part, strict=True))
        for _ in range(draw.randint(0, 4)):
            for answer in pool.step():
                assert row_of[answer.id] not in answers, "a row left twice"
                answers[row_of[answer.id]] = answer
    assert len(answers) == len(batch["input_ids"]) and pool.tokens == 0 and not any(pool.waiting)
    return [answers[i] for i in range(len(answers))]


def assert_equal_to(expected, answers):
    assert [answer.exit_layer for answer in answers] == expected.exit_layer.tolist()
    assert all(answer.error is None for answer in answers)
    assert (torch.stack([answer.logits for answer in answers]) - expected.logits).abs().max() <= TOLERANCE


@functools.cache
def prepared(family):
    """Return a model, its batch, and the answers of `forward`; cached for all tests. An ALBERT has one group."""
    model, batch = varied(family, num_hidden_groups=1) if family == "albert" else varied(family)
    return model, batch, model(**batch)
