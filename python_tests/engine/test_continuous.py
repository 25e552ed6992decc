"""`ContinuousBatch`: the answers of `forward` whatever shares the pool, and its choice of steps."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from support import reference_networks
from support.arrivals import assert_equal_to, prepared, random_arrivals, row
from support.leaving_models import HEADS, most_spread
from support.models import DEPTH, FAMILIES, VARIED_LENGTHS, balance_classes, batch_for, early_exit, varied
from support.rule_models import RULES, model_for_rule, part_of

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, MaxProbability
from earlyexit_kernels.engine import advance, continuous, packing

#: Every row leaves at layer 1.
AT_ONCE = Entropy(threshold=9.0)


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_dtypes(dtype, tolerance):
    model, batch = varied()
    model.to(dtype)
    if dtype == torch.bfloat16:  # whose rounding moves rows to other exits
        model.set_criterion(None)
    expected, answers = model(**batch), random_arrivals(ee.ContinuousBatch(model), batch, seed=5)
    assert [answer.exit_layer for answer in answers] == expected.exit_layer.tolist()
    assert (torch.stack([answer.logits for answer in answers]) - expected.logits).abs().max() <= tolerance


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
