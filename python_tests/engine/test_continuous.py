"""`ContinuousBatch`: the answers of `forward` whatever shares the pool, its choice of steps, and its bounds."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from support import reference_networks
from support.leaving_models import HEADS, most_spread
from support.models import (
    DEPTH,
    FAMILIES,
    VARIED_LENGTHS,
    balance_classes,
    batch_for,
    early_exit,
    parameter_set,
    varied,
)
from support.rule_models import RULES, TOLERANCE, model_for_rule, part_of
from support.weight_changes import WAYS, layer_of

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, MaxProbability, Patience, SkipGate
from earlyexit_kernels.engine import advance, continuous, packing

POISON = 119
#: Every row leaves at layer 1.
AT_ONCE = Entropy(threshold=9.0)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model, batch = varied(family)
    expected = model(**batch)
    assert len(expected.exit_layer.unique()) >= 3
    assert_equal_to(expected, random_arrivals(ee.ContinuousBatch(model), batch, seed=0))


@pytest.mark.parametrize("rule", [rule for rule, owner in RULES.items() if owner != "skip_gate"])
def test_rules(rule):
    """States, scalars of the heads, keys, regression, rules whose exits are not all due."""
    model, batch = model_for_rule(rule)
    for seed, step_tokens in ((1, 40), (2, 512)):
        answers = random_arrivals(ee.ContinuousBatch(model, step_tokens=step_tokens), batch, seed)
        assert_equal_to(model(**batch), answers)


@pytest.mark.parametrize("arguments", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("groups", [1, 2])
def test_heads_with_shared_layers(arguments, groups):
    """Exits with attention and with memory, on steps with rows of all depths."""
    model = early_exit("albert", num_hidden_groups=groups, **arguments)
    batch = batch_for(model, lengths=VARIED_LENGTHS)
    if len(model.heads.out) == DEPTH:
        balance_classes(model, batch)
    for name in ("hidden_cosine", *(["q_exit"] if "halting" in model.heads.aux_names else [])):
        model.set_criterion(None)
        model.set_criterion(most_spread(name, model.trace(**batch)))
        assert_equal_to(model(**batch), random_arrivals(ee.ContinuousBatch(model), batch, seed=3))


PREPARED = {}


def prepared(family):
    """A model, its batch, and the answers of `forward`; made once."""
    if family not in PREPARED:
        model, batch = varied(family, num_hidden_groups=1) if family == "albert" else varied(family)
        PREPARED[family] = model, batch, model(**batch)
    return PREPARED[family]


@settings(max_examples=25)
@given(
    family=st.sampled_from(["bert", "albert"]),
    seed=st.integers(0, 10**6),
    step_tokens=st.sampled_from([1, 20, 60, 512]),
    deadline=st.sampled_from([1, 100, 10**9]),
)
@example(family="albert", seed=0, step_tokens=512, deadline=512)
def test_random_arrivals(family, seed, step_tokens, deadline):
    model, batch, expected = prepared(family)
    pool = ee.ContinuousBatch(model, step_tokens=step_tokens, deadline=deadline)
    assert_equal_to(expected, random_arrivals(pool, batch, seed))


@pytest.mark.parametrize("kind", ["full", "holes", "pad_ids_attended"])
def test_masks_types_and_positions(kind):
    model, _ = varied("bert")
    batch = batch_for(model, kind, lengths=VARIED_LENGTHS)
    batch["token_type_ids"] = (batch["input_ids"] % 2).long()
    batch["position_ids"] = torch.arange(1, 21).expand(12, -1)
    batch["attention_mask"][3] = 0  # a row without tokens
    assert_equal_to(model(**batch), random_arrivals(ee.ContinuousBatch(model), batch, seed=4))


@pytest.mark.parametrize("arguments", [{}, {"method": "fastbert"}], ids=["dense", "attention"])
def test_plan_of_cuda(arguments, monkeypatch):
    """Attention by offsets, as on CUDA."""
    model, batch = varied("albert", num_hidden_groups=1, **arguments)
    expected, layout = model(**batch), advance._layout

    def by_offsets(lengths, device):
        offsets, _ = layout(lengths, device)
        return offsets, packing.AttentionPlan(offsets=offsets, longest=max(lengths))

    monkeypatch.setattr(advance, "_layout", by_offsets)
    monkeypatch.setattr(packing, "_varlen", reference_networks.attended_by_row)
    model.set_layers("family")
    assert_equal_to(expected, random_arrivals(ee.ContinuousBatch(model), batch, seed=5))


def test_back_ends_agree(backend):
    model, batch = varied()
    expected = model(**batch)
    model.set_backend(backend)
    model.set_layers("family")
    assert_equal_to(expected, random_arrivals(ee.ContinuousBatch(model), batch, seed=5))


# what shares a step


def watched(model):
    """Return the tokens of each call of the layers, by layer."""
    calls = []
    model.set_layers("family")
    for depth, layer in enumerate(dict.fromkeys(model.adapter.layers(model.backbone))):
        layer.register_forward_hook(lambda _, given, out, depth=depth: calls.append((depth, given[0].shape[1])))
    return calls


def test_rows_of_all_depths_share_a_step_of_an_albert():
    model, batch = varied("albert", num_hidden_groups=1)
    expected, calls = model(**batch), watched(model)
    pool, answers = ee.ContinuousBatch(model), []
    for i in range(4):
        pool.add(**row(batch, i))
        answers += pool.step()
    assert [depth for depth, _ in calls] == [0] * 4 and pool.tokens < sum(VARIED_LENGTHS[:4])
    for step, (_, tokens) in enumerate(calls):
        present = [i for i in range(step + 1) if expected.exit_layer[i] > step - i]
        assert tokens == sum(VARIED_LENGTHS[i] for i in present)
    answers += pool.drain()
    assert_equal_to(model(**part_of(batch, [0, 1, 2, 3])), sorted(answers))


def test_step_takes_the_oldest_rows_that_fit():
    model = early_exit()
    calls = watched(model)
    pool = ee.ContinuousBatch(model, step_tokens=19)
    batch = batch_for(model, lengths=VARIED_LENGTHS)
    for i in (0, 3, 11, 2, 1):  # of 3, 9, 20, 8, 5 tokens
        pool.add(**row(batch, i), criterion=AT_ONCE)
    left = [[answer.id for answer in pool.step()] for _ in range(3)]
    assert left == [[0, 1], [2], [3, 4]] and calls == [(0, 12), (0, 20), (0, 13)]


def test_step_that_pays_most_runs():
    """Many rows before few, the deeper ones among equals, an urgent row before others, and one that has waited."""
    model, (one, two) = early_exit(), ([[5, 6]], [[5, 6], [5, 7]])
    calls = watched(model)

    def layer_of_next(pool):
        pool._pool.steps = 1
        pool.step()
        return calls[-1][0] + 1

    def pool_with(first, second, waited=0, **arguments):
        pool = ee.ContinuousBatch(model, deadline=10**9)
        pool.add(input_ids=torch.tensor(first), **arguments)
        pool.step()
        pool._pool.clock += waited
        pool.add(input_ids=torch.tensor(second))
        return pool

    assert layer_of_next(pool_with(one, two)) == 1
    assert layer_of_next(pool_with(two, one)) == 2
    assert layer_of_next(pool_with(one, one)) == 2
    assert layer_of_next(pool_with(one, two, deadline=1)) == 2
    assert layer_of_next(pool_with(one, two, waited=3 * 10**9)) == 2


@pytest.mark.parametrize("fair", [True, False])
def test_no_row_starves(fair, monkeypatch):
    """Where new rows always pay more, a deep row leaves within 8 * L steps, but not without the fair ones."""
    if not fair:
        monkeypatch.setattr(continuous, "FAIR_EVERY", 10**9)
    model, batch, _ = prepared("bert")
    pool = ee.ContinuousBatch(model, deadline=10**9)
    (first,) = pool.add(**row(batch, 11), criterion=MaxProbability(threshold=1.0))
    bound, new = 8 * DEPTH, part_of(batch, [0, 1, 2], 5)
    left = []
    for _ in range(bound):
        pool.add(**new, criterion=AT_ONCE)
        left += [answer.id for answer in pool.step()]
    assert (first in left) == fair and len(left) > bound


def test_wait_is_bounded_by_the_rows_before():
    """With every policy a row with m older ones leaves within 8 * L * (m + 1) steps."""
    model, batch, _ = prepared("bert")
    for deadline in (1, 10**9):
        pool, added, step = ee.ContinuousBatch(model, deadline=deadline, step_tokens=25), {}, 0
        while len(added) < 150 or len(pool):
            if len(added) < 150:
                older = len(pool)
                ids = pool.add(**part_of(batch, [step % 12, 11]))
                added.update((id, (step, older + k)) for k, id in enumerate(ids))
            step += 1
            for answer in pool.step():
                since, older = added[answer.id]
                assert step - since <= 8 * DEPTH * (older + 1)


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


def test_interrupt_leaves_the_pool_as_it_was():
    model, batch = varied()
    expected, pool = model(**batch), ee.ContinuousBatch(model)
    pool.add(**batch)
    answers, before = pool.step(), (len(pool), pool.tokens, pool.waiting)

    def interrupt(*_):
        raise KeyboardInterrupt

    model.set_layers("family")
    hook = model.backbone.encoder.layer[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
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
    model.eval().backbone.config._attn_implementation = "sdpa"
    with pytest.raises(ee.AttentionReplacedError):
        pool.step()
    assert len(pool) == 12
