"""`ContinuousBatch`: rows that fail, changes of the model under way, its bounds and errors."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from support.arrivals import assert_equal_to, prepared, random_arrivals, row
from support.models import DEPTH, batch_for, early_exit, parameter_set, varied
from support.rule_models import part_of
from support.weight_changes import WAYS, layer_of

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, MaxProbability, Patience, SkipGate

POISON = 119


# rows that fail


def poisoned(batch):
    ids = batch["input_ids"].clone()
    ids[4] = POISON
    return {**batch, "input_ids": ids}


@pytest.mark.parametrize("family", ["bert", "albert"])
@pytest.mark.parametrize("strict", [False, True])
def test_invalid_row_is_reported_and_affects_no_other(family, strict):
    model, batch = varied(family)
    expected = model(**batch)
    with parameter_set(model.get_input_embeddings().weight, POISON, torch.nan):
        whole = model(**poisoned(batch))
        counted = model.invalid_rows
        model.config.strict = strict
        answers = random_arrivals(ee.ContinuousBatch(model), poisoned(batch), seed=6)
    assert whole.logits[4].isnan().all() and answers[4].logits.isnan().all()
    assert isinstance(answers[4].error, ee.InvalidLogitsError)
    assert f"at layer {1 if strict else DEPTH} of {DEPTH}" in str(answers[4].error)
    assert answers[4].exit_layer == (1 if strict else DEPTH)
    assert counted == DEPTH and model.invalid_rows == (counted if strict else 2 * counted)
    answers[4] = answers[4]._replace(logits=expected.logits[4], exit_layer=int(expected.exit_layer[4]), error=None)
    assert_equal_to(expected, answers)


def test_row_that_raises_fails_alone(caplog):
    model, batch = varied()
    expected = model(**batch)

    def refuse_poison(module, arguments):
        if (arguments[0] == POISON).any():
            raise ZeroDivisionError("a bad row")

    model.get_input_embeddings().register_forward_pre_hook(refuse_poison)
    answers = random_arrivals(ee.ContinuousBatch(model), poisoned(batch), seed=7)
    failed = answers[4]
    assert isinstance(failed.error, ZeroDivisionError) and failed.logits.isnan().all() and failed.exit_layer == 1
    assert "is taken row by row: a bad row" in caplog.text
    answers[4] = failed._replace(logits=expected.logits[4], exit_layer=int(expected.exit_layer[4]), error=None)
    assert_equal_to(expected, answers)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.AcceleratorError])
def test_step_that_ends_the_process_leaves_the_pool_as_it_was(error):
    """An interrupt, and an error of the device, after which no row could run alone."""
    model, batch = varied()
    expected, pool = model(**batch), ee.ContinuousBatch(model)
    pool.add(**batch)
    answers, before = pool.step(), (len(pool), pool.tokens, pool.waiting)

    def interrupt(*_):
        raise error

    model.set_layers("family")
    hook = model.backbone.encoder.layer[0].register_forward_hook(interrupt)
    with pytest.raises(error):
        pool.step()
    hook.remove()
    assert (len(pool), pool.tokens) == before[:2]
    answers += pool.drain()
    assert len({answer.id for answer in answers}) == len(answers) == 12
    assert_equal_to(expected, sorted(answers))


# changes of the model under way


def half_way(model, batch):
    """A pool whose rows are at several depths."""
    pool = ee.ContinuousBatch(model, step_tokens=60)
    pool.add(**batch, criterion=MaxProbability(threshold=1.0))
    for _ in range(2):
        assert pool.step() == []
    assert sum(count > 0 for count in pool.waiting) >= 2
    return pool


CHANGES = {
    **{name: lambda model, name=name: WAYS[name](model, None) for name in ("in_place", "new_linear", "layer_replaced")},
    "norm": lambda model: torch.nn.init.uniform_(layer_of(model).output.LayerNorm.weight),
    "embeddings": lambda model: torch.nn.init.normal_(model.get_input_embeddings().weight),
    "exit": lambda model: torch.nn.init.normal_(model.heads.out[2].weight),
    "family layers": lambda model: (model.set_layers("family"), WAYS["in_place"](model, None)),
    "optimizer": lambda model: step_of_sgd(model),
}


def step_of_sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(**batch_for(model), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_rows_start_again_when_weights_change(change):
    model, batch = varied()
    old = model(**batch).logits
    pool = half_way(model, batch)
    change(model)
    model.set_criterion(MaxProbability(threshold=1.0))
    expected = model(**batch)
    assert_equal_to(expected, sorted(pool.drain()))
    assert (expected.logits - old).abs().max() > 0.01


def test_rows_start_again_after_refresh():
    model, batch = varied()
    model(**batch)
    pool = half_way(model, batch)
    weight = model.backbone.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.numpy()[5, 7] += 100.0  # not detected
    model.refresh()
    model.set_criterion(MaxProbability(threshold=1.0))
    assert_equal_to(model(**batch), sorted(pool.drain()))


def test_rows_keep_the_criterion_of_their_arrival():
    model, batch = varied()
    first = model(**batch)
    pool = ee.ContinuousBatch(model, step_tokens=60)
    pool.add(**batch)
    answers = pool.step()
    model.set_criterion(Patience(patience=1))
    second = model(**batch)
    pool.add(**batch)
    pool.add(**batch, criterion=MaxProbability(threshold=1.0))
    answers = sorted([*answers, *pool.drain()])
    assert_equal_to(first, answers[:12])
    assert_equal_to(second, answers[12:24])
    assert [answer.exit_layer for answer in answers[24:]] == [DEPTH] * 12


def first_logit():
    """A registered rule; calling this again defines it again."""

    @ee.criteria.register
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FirstLogit(ee.criteria.Criterion):
        name: ClassVar[str] = "first_logit_of_a_pool"

        @staticmethod
        def rule(z, aux, state, layer, depth, params):
            return z, z[:, 0] > 0.5, state

    return FirstLogit()


def test_rule_that_is_registered_again_fails_its_rows():
    model, batch = varied()
    try:
        model.set_criterion(first_logit())
        expected, pool = model(**batch), ee.ContinuousBatch(model)
        assert_equal_to(expected, random_arrivals(pool, batch, seed=8))
        pool.add(**batch)
        first_logit()
        answers = list(pool.drain())
        with pytest.raises(ValueError, match="was registered again"):
            pool.add(**batch)
    finally:
        ee.criteria.CRITERIA.pop("first_logit_of_a_pool")
    assert len(answers) == 12 and all("was registered again" in str(answer.error) for answer in answers)


# bounds and errors


def test_pool_is_bounded():
    model, batch, expected = prepared("bert")
    pool = ee.ContinuousBatch(model, max_tokens=30)
    pool.add(**row(batch, 11))
    pool.add(**row(batch, 2))
    with pytest.raises(ee.PoolFullError, match=r"the pool holds 28 of at most 30 tokens, 3 more do not fit"):
        pool.add(**row(batch, 0))
    assert (len(pool), pool.tokens) == (2, 28)
    with pytest.raises(ValueError, match=r"expected at most max_tokens=30 tokens, got 31; add fewer rows at a time"):
        pool.add(input_ids=torch.ones(1, 31, dtype=torch.int64))
    assert pool.discard(0) and not pool.discard(0) and not pool.discard(99)
    assert pool.add(**row(batch, 0)) == [2]
    answers = sorted(pool.drain())
    assert_equal_to(ee.EarlyExitOutput(logits=expected.logits[[2, 0]], exit_layer=expected.exit_layer[[2, 0]]), answers)
    assert pool.add(**row(batch, 11)) == [3]


def test_rows_hold_their_own_memory_only():
    model, batch, _ = prepared("bert")
    pool = ee.ContinuousBatch(model)
    pool.add(**batch)
    pool.step()
    rows = list(pool._pool._rows.values())
    assert rows
    for one in rows:
        assert one.hidden.untyped_storage().nbytes() == one.tokens * 64 * 4
        assert one.inputs.untyped_storage().nbytes() == one.tokens * 24


def test_discarded_row_never_answers():
    model, batch, _ = prepared("albert")
    pool = ee.ContinuousBatch(model)
    ids = pool.add(**batch)
    left = {answer.id for answer in pool.step()}
    gone = next(id for id in ids if id not in left)
    assert pool.discard(gone)
    assert left | {answer.id for answer in pool.drain()} == set(ids) - {gone}


def test_empty_pool_and_empty_batch():
    model, batch, _ = prepared("bert")
    pool = ee.ContinuousBatch(model)
    assert pool.step() == [] and list(pool.drain()) == [] and pool.waiting == (0, 0, 0, 0)
    assert pool.add(**part_of(batch, slice(0, 0))) == [] and len(pool) == 0


SKIPS = SkipGate(threshold=0.5, exit=Entropy(threshold=0.3))


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({"labels": torch.zeros(12)}, ValueError, r"add: expected inputs among .*, got \['labels'\]"),
        ({"input_ids": torch.full((1, 3), 9999)}, ValueError, r"expected ids in \[0, 119\], got 9999"),
        ({"deadline": 0}, ValueError, r"add\(deadline=...\): expected a whole number at least 1, got 0"),
        ({"criterion": "entropy"}, TypeError, "expected an instance of a criterion"),
        ({"criterion": Entropy(threshold=[0.1])}, ValueError, "one number for each of the 3 exits"),
        ({"criterion": SKIPS}, ValueError, "criterion 'skip_gate' skips layers, which rows of a pool cannot do"),
    ],
)
def test_wrong_rows_are_refused(arguments, error, expected):
    model, _, _ = prepared("bert")
    pool = ee.ContinuousBatch(model)
    with pytest.raises(error, match=expected):
        pool.add(**{"input_ids": torch.ones(1, 3, dtype=torch.int64), **arguments})
    assert len(pool) == 0


@pytest.mark.parametrize("name", ["max_tokens", "step_tokens", "deadline"])
def test_wrong_sizes_are_refused(name):
    model, _, _ = prepared("bert")
    with pytest.raises(ValueError, match=rf"ContinuousBatch\({name}=...\): expected a whole number at least 1"):
        ee.ContinuousBatch(model, **{name: 0.5})


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="ContinuousBatch: expected an early-exit model, got Linear"):
        ee.ContinuousBatch(torch.nn.Linear(1, 1))
    gated = early_exit(method="smartbert", criterion=SKIPS)
    with pytest.raises(ValueError, match="skips layers"):
        ee.ContinuousBatch(gated)
    model, batch = varied()
    pool = ee.ContinuousBatch(model)
    pool.add(**batch)
    with pytest.raises(RuntimeError, match="add: expected the model in eval mode"):
        model.train() and pool.add(**batch)
    with pytest.raises(RuntimeError, match="step: expected the model in eval mode"):
        pool.step()
    model.eval().heads.half()
    with pytest.raises(ValueError, match=r"the exits are torch.float16"):
        pool.step()
    model.heads.float()
    model.backbone.config._attn_implementation = "sdpa"
    with pytest.raises(ee.AttentionReplacedError):
        pool.step()
    assert len(pool) == 12
