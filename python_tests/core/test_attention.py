"""Attention within the rows of packed tokens: every kind against its definition, its dtypes, kernels and plans."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from support import reference_networks
from support.models import DEPTH, batch_for, early_exit, varied
from support.unknown_lengths import hide_lengths

from earlyexit_kernels.core import attention, attention_plan
from earlyexit_kernels.core.attention import attend_by_plan, packed_attention
from earlyexit_kernels.core.attention_plan import AttentionKind, AttentionPlan, PaddedPlan, plan_attention
from earlyexit_kernels.core.packing import pack, rows_of_tokens
from earlyexit_kernels.cpu.kernels import kernels_unsupported_reason

KINDS = [AttentionKind(*kind) for kind in itertools.product((False, True), (None, 1, 3, 40), (None, 2.0)) if any(kind)]
LENGTHS = (17, 3, 9, 12, 1, 17, 30)
HEADS, SHARED, WIDTH = 4, 2, 6
CPU = torch.device("cpu")


def definition(q, k, v, columns, kind, scale):
    """Attention of one row in float64, ``[t, heads, D]``, from the distance of each two tokens."""
    distance = columns[:, None] - columns
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if kind.causal:
        hidden |= distance < 0
    if kind.window is not None:
        hidden |= distance.abs() >= kind.window
    out = torch.zeros_like(q, dtype=torch.float64)
    for head in range(HEADS):
        shared = head * SHARED // HEADS
        scores = q[:, head].double() @ k[:, shared].double().T * scale
        scores = scores if kind.softcap is None else kind.softcap * torch.tanh(scores / kind.softcap)
        out[:, head] = scores.masked_fill(hidden, -torch.inf).softmax(1) @ v[:, shared].double()
    return out.float()


def batch_of(lengths, *, holes=False):
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
    return dataclasses.replace(batch, tokens=batch.tokens, lengths=None)


def random_tokens(batch, shared=HEADS, seed=0, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(int(batch.offsets[-1]), n, width, generator=generator) for n in (HEADS, shared, shared)]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, (5, 5, 5)])
def test_equals_the_definition_row_by_row(lengths, kind, holes):
    """Packed, packed with lengths on the device, and padded."""
    batch, columns, mask = batch_of(lengths, holes=holes)
    q, k, v = random_tokens(batch, SHARED)
    ends = itertools.pairwise(batch.offsets.tolist())
    expected = torch.cat([definition(*(x[a:b] for x in (q, k, v, columns)), kind, 0.3) for a, b in ends])
    got = [attend_by_plan(q, k, v, plan_attention(batch, columns if holes else None), 0.3, 0.0, kind)]
    if kind != AttentionKind(causal=True):  # which is a kernel of CUDA there
        got.append(attend_by_plan(q, k, v, plan_attention(on_device(batch), columns), 0.3, 0.0, kind))
    padded = [torch.zeros(*mask.shape, *x.shape[1:]) for x in (q, k, v)]
    for row, x in zip(padded, (q, k, v), strict=True):
        row[mask != 0] = x
    module = torch.nn.Identity()
    module.is_causal = kind.causal
    module.num_key_value_groups = HEADS // SHARED
    asked = {"sliding_window": kind.window, "softcap": kind.softcap, "scaling": 0.3, "plan": PaddedPlan(mask != 0)}
    out, _ = packed_attention(module, *(x.transpose(1, 2) for x in padded), None, **asked)
    assert torch.isfinite(out).all()
    for answer in (*got, out[mask != 0]):
        assert (answer - expected).abs().max() < 2e-6


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_and_gradients_stay_in_their_row(kind):
    batch, _, _ = batch_of(LENGTHS)
    q, k, v = random_tokens(batch, seed=1)
    clean = attend_by_plan(q, k, v, plan_attention(batch), None, 0.0, kind)
    start, end = batch.offsets[3:5].tolist()
    learned = [x.clone().requires_grad_() for x in (q, k, v)]
    attend_by_plan(*learned, plan_attention(batch), None, 0.0, kind)[start:end].square().sum().backward()
    for x in learned:
        assert torch.isfinite(x.grad).all() and not x.grad[:start].any() and not x.grad[end:].any()
    assert learned[2].grad[start:end].any()
    for x in (q, k, v):
        x[start:end] = torch.nan
    got = attend_by_plan(q, k, v, plan_attention(batch), None, 0.0, kind)
    assert got[start:end].isnan().all()
    rest = torch.tensor([*range(start), *range(end, len(q))])
    assert torch.equal(got[rest], clean[rest])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.window], ids=str)
@pytest.mark.parametrize("lengths", [(9, 9), (9, 4, 3), LENGTHS])
def test_a_window_that_covers_a_bucket_needs_no_mask(lengths, kind):
    batch, columns, _ = batch_of(lengths)
    q, k, v = random_tokens(batch, seed=3)
    plan, with_columns = plan_attention(batch), plan_attention(batch, columns)
    got, expected = (attend_by_plan(q, k, v, each, None, 0.0, kind) for each in (plan, with_columns))
    assert torch.equal(got, expected)
    masks = (each.masks_of(kind, CPU) for each in (plan, with_columns))
    for mask, windowed, bucket in zip(*masks, plan.buckets, strict=True):
        if kind.window < bucket.width:
            assert torch.equal(mask.expand_as(windowed), windowed)
        elif kind.causal:
            assert mask is None or kind.softcap is not None
        else:
            assert mask is bucket.mask


def test_holes_may_put_tokens_of_a_short_row_outside_of_a_window():
    """The window reaches over columns, of which there are more than tokens."""
    batch, columns, _ = batch_of((12, 12), holes=True)
    (mask,) = plan_attention(batch, columns).masks_of(AttentionKind(window=9), CPU)
    assert all(bucket.width < 12 for bucket in plan_attention(batch, columns).buckets) and not mask.all()


def test_a_window_below_one_is_refused():
    states, plan = torch.randn(1, 2, 5, 4), plan_attention(batch_of((5,))[0])
    with pytest.raises(ValueError, match="sliding_window: expected at least 1, got 0 from Identity"):
        packed_attention(torch.nn.Identity(), states, states, states, None, plan=plan, sliding_window=0)


def test_rows_of_tokens():
    row, place = rows_of_tokens(torch.tensor([0, 3, 3, 5], dtype=torch.int32), 7)
    assert row.tolist() == [0, 0, 0, 2, 2, 2, 2] and place.tolist() == [0, 1, 2, 0, 1, 2, 3]


# plans


@pytest.fixture
def groupings(monkeypatch):
    """The lengths of each group of rows that was put into buckets."""
    made, group = [], attention_plan.group_by_length
    monkeypatch.setattr(attention_plan, "group_by_length", lambda *given: made.append(given[0]) or group(*given))
    return made


def test_buckets_and_masks_of_a_plan_are_made_once_when_a_layer_asks(groupings):
    plan = plan_attention(batch_of(LENGTHS)[0])
    assert groupings == []
    assert plan.buckets is plan.buckets and groupings == [LENGTHS]
    assert plan.grouped().arguments[0] == [bucket.rows for bucket in plan.buckets]
    kind = AttentionKind(window=3)
    assert plan.masks_of(kind, CPU) is plan.masks_of(kind, CPU)


@pytest.mark.parametrize("layers", ["eager", "fused"])
def test_vector_kernels_need_no_buckets(layers, groupings):
    if layers == "fused" and kernels_unsupported_reason(torch.float32):
        pytest.skip("the processor has no vector kernels")
    model, batch = varied("bert")
    model.configure(path=layers, compaction="always")
    groupings.clear()
    exits = model(**batch).exit_layer
    assert len(exits.unique()) > 2
    assert len(groupings) == (0 if layers == "fused" else len({int(e) for e in exits} - {DEPTH}) + 1)


# dtypes, and the kernels of CUDA


@pytest.fixture
def dtypes(monkeypatch):
    """Run as on CUDA, where the host does not know lengths; the dtypes of q, k and v at each call, by kernel."""
    seen = {"_varlen": [], "_attend": []}
    plain_attend = attention._attend

    def varlen(q, k, v, *others, **options):
        seen["_varlen"].append((q.dtype, k.dtype, v.dtype))
        with torch.autocast("cpu", enabled=False):  # autocast does not know private ops
            return reference_networks.attended_by_row(q, k, v, *others, **options)

    def attend(q, k, v, *others):
        seen["_attend"].append((q.dtype, k.dtype, v.dtype))
        return plain_attend(q, k, v, *others)

    hide_lengths(monkeypatch)
    monkeypatch.setattr(attention, "_varlen", varlen)
    monkeypatch.setattr(attention, "_attend", attend)
    return seen


#: A family of each way to call attention -> whether some of its layers take the kernel for rows of any length.
CALLERS = {"bert": True, "albert": True, "modernbert": True, "qwen2": True, "mistral": False, "gemma2": False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", CALLERS)
def test_kernels_get_one_dtype_under_autocast(family, dtype, dtypes):
    model = early_exit(family, dropout=0.0)
    batch = batch_for(model)
    model.configure(path="eager")
    expected = model(**batch).logits
    for calls in dtypes.values():
        calls.clear()
    with torch.autocast("cpu", dtype):
        got = model(**batch).logits
        loss = model.train()(**batch, labels=torch.tensor([0, 1, 2, 0])).loss
    loss.backward()
    assert (got - expected).abs().max() < 0.2
    assert set(dtypes["_varlen"] + dtypes["_attend"]) == {(dtype,) * 3}
    assert bool(dtypes["_varlen"]) == CALLERS[family]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), name
    learned = [p.grad is not None and bool(p.grad.any()) for p in model.backbone.parameters()]
    assert sum(learned) > 0.9 * len(learned)


def tokens_as_on_cuda(*dtypes, width=8):
    """Queries, keys and values, and the plan of their rows of 5 and 3 tokens."""
    parts = torch.randn(3, 8, 2, width, generator=torch.Generator().manual_seed(0))
    plan = AttentionPlan(offsets=torch.tensor([0, 5, 8], dtype=torch.int32), longest=5)
    return [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)], plan


@pytest.mark.parametrize("kind", [AttentionKind(), AttentionKind(window=3), AttentionKind(softcap=2.0)], ids=str)
def test_float64_and_inputs_without_autocast_keep_their_dtype(kind, dtypes):
    """Float64 takes the rectangle: the kernels for rows of any length have none."""
    for dtype, autocast in ((torch.float64, True), (torch.float32, False), (torch.float16, False)):
        for calls in dtypes.values():
            calls.clear()
        parts, plan = tokens_as_on_cuda(dtype, dtype, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert attend_by_plan(*parts, plan, None, 0.0, kind).dtype == dtype
        assert dtypes["_varlen"] + dtypes["_attend"] == [(dtype,) * 3]
        assert bool(dtypes["_varlen"]) == (kind == AttentionKind() and dtype != torch.float64)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_dtypes_that_differ_without_autocast_are_refused(odd):
    """The kernels would read memory of another dtype."""
    given = [torch.float32] * 3
    given[odd] = torch.bfloat16
    parts, plan = tokens_as_on_cuda(*given)
    with pytest.raises(ValueError, match=r"one dtype.*torch\.bfloat16"):
        attend_by_plan(*parts, plan, None, 0.0)


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for the two kernels of CUDA; their calls, and a list that holds the compute capability of the card."""
    calls, asked, card = [], [], [(8, 0)]

    def kernel(name):
        def attend(q, *arguments, scale, **options):
            calls.append((name, q.shape[-1], scale, arguments[-4:]))
            return (q,)

        return attend

    for name in ("_flash_attention_forward", "_efficient_attention_forward"):
        monkeypatch.setattr(torch.ops.aten, name, kernel(name.split("_")[1]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or card[0])
    attention.capability.cache_clear()
    yield calls, asked, card
    attention.capability.cache_clear()


#: Compute capability, dtype and width of the heads -> the kernel, and the width it gets: a multiple of 8.
CARDS = [
    ((7, 0), torch.float16, 20, "efficient", 24),
    ((7, 5), torch.bfloat16, 8, "efficient", 8),
    ((8, 0), torch.float16, 20, "flash", 24),
    ((8, 0), torch.float16, 256, "flash", 256),
    ((8, 0), torch.bfloat16, 260, "efficient", 264),
    ((8, 6), torch.bfloat16, 8, "flash", 8),
    ((10, 0), torch.bfloat16, 8, "flash", 8),
    ((12, 0), torch.float32, 20, "efficient", 24),
]


@pytest.mark.parametrize(("capability", "dtype", "width", "kernel", "padded"), CARDS, ids=str)
def test_kernels_of_cuda(capability, dtype, width, kernel, padded, kernels):
    """Heads are padded at the scale of their own width; a device is asked once."""
    calls, asked, card = kernels
    card[0] = capability
    (q, k, v), plan = tokens_as_on_cuda(dtype, dtype, dtype, width=width)
    for _ in range(2):
        assert torch.equal(attend_by_plan(q, k, v, plan, None, 0.0), q)
    assert [call[:3] for call in calls] == [(kernel, padded, width**-0.5)] * 2 and len(asked) <= 1
    attend_by_plan(q, k, v, plan, None, 0.0, AttentionKind(window=3))
    assert len(calls) == 2, "windows are not theirs"


def test_kernels_of_cuda_are_told_of_dropout_causality_and_gradients(kernels):
    calls, _, _ = kernels
    (q, k, v), plan = tokens_as_on_cuda(*[torch.float32] * 3)
    attend_by_plan(q, k, v.requires_grad_(), plan, 0.3, 0.1, AttentionKind(causal=True))
    assert calls[-1][2:] == (0.3, (5, 0.1, 1, True)), "the last: what the gradient needs is kept"
