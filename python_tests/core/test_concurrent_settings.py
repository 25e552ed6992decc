"""Criteria set while another thread runs the model: each forward pass uses one criterion."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from support.models import early_exit, ragged

from earlyexit_kernels.criteria import Entropy, MaxProbability, Patience, QExit, SampledExit, SkipGate

#: Training method -> criteria that a thread sets in turn; some draw random numbers, halt or skip layers.
RULES = {
    "palbert": (None, Entropy(threshold=0.9), SampledExit(seed=3), QExit(q=0.6), Patience(patience=1)),
    "smartbert": (None, MaxProbability(threshold=0.5), SkipGate(threshold=0.5, exit=Entropy(threshold=0.9))),
}


def answer(model, batch, all_logits):
    """Return the answers and exit layers of a forward pass."""
    out = model(**batch, output_all_logits=all_logits)
    return out.logits, out.exit_layer


def same(left, right) -> bool:
    return all(map(torch.equal, left, right))


@pytest.mark.parametrize(("method", "all_logits"), [("palbert", True), ("palbert", False), ("smartbert", False)])
def test_criterion_set_during_a_pass_is_used_by_the_next(method, all_logits):
    model, batch = early_exit(method=method), ragged()
    embeddings = model.backbone.embeddings.word_embeddings
    for before, after in itertools.permutations(RULES[method], 2):
        model.set_criterion(before)
        with embeddings.register_forward_hook(lambda *_: None):  # a module with a hook is called, and rounds otherwise
            expected = answer(model, batch, all_logits)
        with embeddings.register_forward_hook(lambda *_, rule=after: model.set_criterion(rule)):
            found = answer(model, batch, all_logits)
        assert same(found, expected), f"{before} then {after}"
        assert model.criterion is after


@pytest.mark.parametrize("method", RULES)
def test_each_pass_uses_one_criterion(method):
    model, batch, rules = early_exit(method=method), ragged(), RULES[method]
    expected = []
    for rule in rules:
        model.set_criterion(rule)
        expected.append(answer(model, batch, False))
    wrong, done, start = [], threading.Event(), threading.Barrier(4)

    def set_criteria():
        start.wait()
        while not done.is_set():
            for rule in rules:
                model.set_criterion(rule)
                time.sleep(1e-4)  # a busy thread would take most of the interpreter's time

    def call():
        start.wait()
        for turn in range(25):
            try:
                found = answer(model, batch, False)
            except Exception as error:
                wrong.append(repr(error))
            else:
                if not any(same(found, other) for other in expected):
                    wrong.append(f"turn {turn}: the answer of no criterion")

    callers = [threading.Thread(target=call) for _ in range(3)]
    setter = threading.Thread(target=set_criteria)
    for thread in (setter, *callers):
        thread.start()
    for thread in callers:
        thread.join(timeout=60)
    done.set()
    setter.join(timeout=60)
    assert not any(thread.is_alive() for thread in (setter, *callers)) and wrong == []


def test_public_criterion_is_read_once():
    """Full depth is None, even if another thread sets a criterion between two reads."""
    model = early_exit()
    reads = []

    class Counting(type(model)):
        def __getattribute__(self, name):
            if name == "_criterion":
                reads.append(name)
            return super().__getattribute__(name)

    model.__class__ = Counting
    assert model.criterion is None and len(reads) == 1
