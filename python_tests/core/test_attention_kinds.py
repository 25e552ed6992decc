"""Causal attention, sliding windows, soft-capped scores and shared heads, within the rows of packed tokens."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.models import DEPTH, varied

from earlyexit_kernels.core import attention, attention_plan
from earlyexit_kernels.core.attention import attend_by_plan, packed_attention
from earlyexit_kernels.core.attention_plan import AttentionKind, PaddedPlan, plan_attention
from earlyexit_kernels.core.packing import pack, rows_of_tokens
from earlyexit_kernels.cpu.kernels import kernels_unsupported_reason

KINDS = [AttentionKind(*kind) for kind in itertools.product((False, True), (None, 1, 3, 40), (None, 2.0)) if any(kind)]
LENGTHS = (17, 3, 9, 12, 1, 17, 30)
HEADS, SHARED, WIDTH = 4, 2, 6


def naive(q, k, v, columns, kind, scale):
    """Attention of one row in float64, ``[t, heads, D]``, element by element of the definition."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros_like(q)
    for head in range(HEADS):
        shared = head * SHARED // HEADS
        for token in range(len(q)):
            scores = []
            for other in range(len(q)):
                distance = int(columns[token] - columns[other])
                hidden = (kind.causal and distance < 0) or (kind.window is not None and abs(distance) >= kind.window)
                score = (q[token, head] @ k[other, shared]) * scale
                score = score if kind.softcap is None else kind.softcap * torch.tanh(score / kind.softcap)
                scores.append(torch.tensor(-torch.inf, dtype=torch.float64) if hidden else score)
            out[token, head] = torch.stack(scores).softmax(0) @ v[:, shared]
    return out


def batch_of(lengths, *, holes):
    """A packed batch, the columns of its tokens, and the mask ``[N, S]``."""
    size = max(lengths)
    mask = (torch.arange(size) < torch.tensor(lengths)[:, None]).long()
    if holes:
        mask[:, 1:2] = 0
        mask[0, 4:8] = 0
    batch = pack(torch.zeros_like(mask), mask)
    columns = torch.arange(size).repeat(len(lengths)) if batch.tokens is None else batch.tokens % size
    return batch, columns, mask


def on_device(batch):
    """The batch as on CUDA, where the host does not know the lengths."""
    return batch.__class__(batch.tokens, batch.offsets, batch.row_ids, None, batch.longest)


@pytest.mark.sample(4)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, (5, 5, 5)])
def test_equals_the_definition_row_by_row(lengths, kind, holes, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    batch, columns, mask = batch_of(lengths, holes=holes)
    tokens = int(batch.offsets[-1])
    q = torch.randn(tokens, HEADS, WIDTH, generator=generator)
    k, v = (torch.randn(tokens, SHARED, WIDTH, generator=generator) for _ in range(2))
    expected = torch.zeros_like(q)
    for start, end in itertools.pairwise(batch.offsets.tolist()):
        expected[start:end] = naive(q[start:end], k[start:end], v[start:end], columns[start:end], kind, 0.3).float()
    given = columns if holes else None
    got = attend_by_plan(q, k, v, plan_attention(batch, given), 0.3, 0.0, kind)
    assert (got - expected).abs().max() < 2e-6
    if kind != AttentionKind(causal=True):  # which is a kernel of CUDA there
        got = attend_by_plan(q, k, v, plan_attention(on_device(batch), columns), 0.3, 0.0, kind)
        assert (got - expected).abs().max() < 2e-6
    plan, module = PaddedPlan(mask != 0), torch.nn.Identity()
    padded = [torch.zeros(*mask.shape, *x.shape[1:]) for x in (q, k, v)]
    for row, x in zip(padded, (q, k, v), strict=True):
        row[mask != 0] = x
    module.is_causal = kind.causal
    arguments = {"sliding_window": kind.window, "softcap": kind.softcap, "scaling": 0.3}
    got, _ = packed_attention(module, *(x.transpose(1, 2) for x in padded), None, plan=plan, **arguments)
    assert torch.isfinite(got).all() and (got[mask != 0] - expected).abs().max() < 2e-6


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_other_rows_may_hold_nan(kind):
    batch, _, _ = batch_of(LENGTHS, holes=False)
    q, k, v = torch.randn(3, int(batch.offsets[-1]), HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    plan = plan_attention(batch)
    clean = attend_by_plan(q, k, v, plan, None, 0.0, kind)
    start, end = batch.offsets[3:5].tolist()
    for x in (q, k, v):
        x[start:end] = torch.nan
    got = attend_by_plan(q, k, v, plan_attention(batch), None, 0.0, kind)
    assert got[start:end].isnan().all()
    rest = torch.tensor([*range(start), *range(end, len(q))])
    assert torch.equal(got[rest], clean[rest])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_are_finite_and_stay_in_their_row(kind):
    batch, _, _ = batch_of(LENGTHS, holes=False)
    q, k, v = torch.randn(3, int(batch.offsets[-1]), HEADS, WIDTH, generator=torch.Generator().manual_seed(2))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    start, end = batch.offsets[2:4].tolist()
    attend_by_plan(*inputs, plan_attention(batch), None, 0.0, kind)[start:end].square().sum().backward()
    for x in inputs:
        assert torch.isfinite(x.grad).all()
        assert not x.grad[:start].any() and not x.grad[end:].any()
    assert inputs[2].grad[start:end].any()


def test_causal_rows_on_the_device_use_its_kernels(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "_varlen", lambda q, *rest, causal: seen.append(causal) or q)
    batch, _, _ = batch_of(LENGTHS, holes=False)
    q = torch.randn(int(batch.offsets[-1]), HEADS, WIDTH)
    for kind in (AttentionKind(), AttentionKind(causal=True), AttentionKind(window=3)):
        attend_by_plan(q, q, q, plan_attention(on_device(batch)), None, 0.0, kind)
    assert seen == [False, True]


def test_rows_of_tokens():
    row, place = rows_of_tokens(torch.tensor([0, 3, 3, 5], dtype=torch.int32), 7)
    assert row.tolist() == [0, 0, 0, 2, 2, 2, 2] and place.tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_masks_of_a_plan_are_made_once():
    plan = plan_attention(batch_of(LENGTHS, holes=False)[0])
    kind = AttentionKind(window=3)
    assert plan.masks_of(kind, torch.device("cpu")) is plan.masks_of(kind, torch.device("cpu"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.window], ids=str)
@pytest.mark.parametrize("lengths", [(9, 9), (9, 4, 3), LENGTHS])
def test_a_window_that_covers_a_bucket_needs_no_mask(lengths, kind):
    generator = torch.Generator().manual_seed(3)
    batch, columns, _ = batch_of(lengths, holes=False)
    q, k, v = torch.randn(3, int(batch.offsets[-1]), HEADS, WIDTH, generator=generator)
    plan, with_columns = plan_attention(batch), plan_attention(batch, columns)
    assert torch.equal(
        attend_by_plan(q, k, v, plan, None, 0.0, kind), attend_by_plan(q, k, v, with_columns, None, 0.0, kind)
    )
    masks = zip(plan.masks_of(kind, q.device), with_columns.masks_of(kind, q.device), plan.buckets, strict=True)
    for mask, windowed, bucket in masks:
        assert windowed.shape[2] == bucket.width
        if kind.window < bucket.width:
            assert torch.equal(mask.expand_as(windowed), windowed)
        elif kind.causal and kind.softcap is None:
            assert mask is None
        elif not kind.causal:
            assert mask is bucket.mask


def test_holes_may_put_tokens_of_a_short_row_outside_of_a_window():
    """The window reaches over columns, of which there are more than tokens."""
    batch, columns, _ = batch_of((12, 12), holes=True)
    kind = AttentionKind(window=9)
    (mask,) = plan_attention(batch, columns).masks_of(kind, columns.device)
    assert all(bucket.width < 12 for bucket in plan_attention(batch, columns).buckets) and not mask.all()


def test_a_window_below_one_is_refused():
    states, plan = torch.randn(1, 2, 5, 4), plan_attention(batch_of((5,), holes=False)[0])
    with pytest.raises(ValueError, match="sliding_window: expected at least 1, got 0 from Identity"):
        packed_attention(torch.nn.Identity(), states, states, states, None, plan=plan, sliding_window=0)


@pytest.fixture
def groupings(monkeypatch):
    """The lengths of each group of rows that was put into buckets."""
    found, group = [], attention_plan.group_by_length
    monkeypatch.setattr(attention_plan, "group_by_length", lambda *given: found.append(given[0]) or group(*given))
    return found


def test_rows_are_put_into_buckets_once_and_when_a_layer_asks(groupings):
    plan = plan_attention(batch_of(LENGTHS, holes=False)[0])
    assert plan.ends.tolist()[-1] == sum(LENGTHS) and not groupings
    q = torch.randn(sum(LENGTHS), HEADS, WIDTH)
    for kind in (AttentionKind(), AttentionKind(window=3)):
        attend_by_plan(q, q, q, plan, None, 0.0, kind)
    assert plan.grouped().arguments[0] == [bucket.rows for bucket in plan.buckets]
    assert groupings == [LENGTHS]


def test_threads_share_the_buckets_of_a_plan():
    plan = plan_attention(batch_of(LENGTHS, holes=False)[0])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: plan.buckets, range(64)))
    assert all(buckets is found[0] for buckets in found)


@pytest.mark.parametrize("layers", ["eager", "fused"])
def test_vector_kernels_need_no_buckets(layers, groupings):
    if layers == "fused" and kernels_unsupported_reason(torch.float32):
        pytest.skip("the processor has no vector kernels")
    model, batch = varied("bert")
    model.configure(path=layers)
    model.configure(compaction="always")
    groupings.clear()
    exits = model(**batch).exit_layer
    assert len(exits.unique()) > 2
    assert len(groupings) == (0 if layers == "fused" else len({int(e) for e in exits} - {DEPTH}) + 1)
