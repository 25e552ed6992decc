"""Dtypes of queries, keys and values at the attention kernels, under autocast too."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import reference_networks
from support.models import ALL_FAMILIES, RECTANGULAR, batch_for, early_exit

from earlyexit_kernels.core import attention, rows
from earlyexit_kernels.core.attention import attend_by_plan
from earlyexit_kernels.core.attention_plan import AttentionKind, AttentionPlan, plan_attention
from earlyexit_kernels.core.packing import pack

#: Families all of whose small layers have a window or soft-capped scores, which the kernel of CUDA does not.
WITHOUT_VARLEN = ("mistral", "gemma2", "gemma3_text")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def dtypes(monkeypatch):
    """Run as on CUDA, where the host does not know lengths; the dtypes of q, k and v at each call, by kernel."""
    seen = {"_varlen": [], "_attend": []}
    plain_pack, plain_attend = rows.pack, attention._attend

    def unknown_lengths(*arguments, **options):
        batch = plain_pack(*arguments, **options)
        return dataclasses.replace(batch, lengths=None, longest=max(batch.lengths))

    def varlen(q, k, v, *others, **options):
        seen["_varlen"].append((q.dtype, k.dtype, v.dtype))
        with torch.autocast("cpu", enabled=False):  # autocast does not know private ops
            return reference_networks.attended_by_row(q, k, v, *others, **options)

    def attend(q, k, v, *others):
        seen["_attend"].append((q.dtype, k.dtype, v.dtype))
        return plain_attend(q, k, v, *others)

    monkeypatch.setattr(rows, "pack", unknown_lengths)
    monkeypatch.setattr(attention, "_varlen", varlen)
    monkeypatch.setattr(attention, "_attend", attend)
    return seen


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family not in RECTANGULAR])
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
    assert bool(dtypes["_varlen"]) == (family not in WITHOUT_VARLEN)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), name
    learned = [p.grad is not None and bool(p.grad.any()) for p in model.backbone.parameters()]
    assert sum(learned) > 0.9 * len(learned)


def mixed(dtypes):
    """Queries, keys and values of these dtypes, and the plan of their rows as on CUDA."""
    batch = pack(torch.zeros(2, 5, dtype=torch.long), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]))
    parts = torch.randn(3, 8, 2, 8, generator=torch.Generator().manual_seed(0))
    plan = AttentionPlan(offsets=batch.offsets, longest=5)
    return [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)], plan, plan_attention(batch)


@pytest.mark.parametrize("kind", [AttentionKind(), AttentionKind(window=3), AttentionKind(softcap=2.0)], ids=str)
def test_float64_and_inputs_without_autocast_keep_their_dtype(kind, dtypes):
    for dtype, autocast in ((torch.float64, True), (torch.float32, False), (torch.float16, False)):
        for calls in dtypes.values():
            calls.clear()
        parts, *plans = mixed([dtype] * 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = [attend_by_plan(*parts, plan, None, 0.0, kind) for plan in plans]
        assert all(x.dtype == dtype for x in got)
        assert dtypes["_varlen"] + dtypes["_attend"] == [(dtype,) * 3] * (1 + len(plans[1].buckets))


def test_float64_takes_the_rectangle(dtypes):
    """The kernels for rows of different lengths have no float64."""
    parts, plan, _ = mixed([torch.float64] * 3)
    attend_by_plan(*parts, plan, None, 0.0)
    assert not dtypes["_varlen"] and len(dtypes["_attend"]) == 1


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_dtypes_that_differ_without_autocast_are_refused(odd):
    """The kernels would read memory of another dtype."""
    given = [torch.float32] * 3
    given[odd] = torch.bfloat16
    parts, plan, _ = mixed(given)
    with pytest.raises(ValueError, match=r"one dtype.*torch\.bfloat16"):
        attend_by_plan(*parts, plan, None, 0.0)


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for the two kernels, and for the compute capability of devices; the calls of both."""
    met, asked, capabilities = [], [], {}

    def kernel(name):
        def attend(q, *arguments, **options):
            met.append((name, q.dtype))
            return (q,)

        return attend

    for name in ("_flash_attention_forward", "_efficient_attention_forward"):
        monkeypatch.setattr(torch.ops.aten, name, kernel(name.split("_")[1]))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or capabilities["cards"]
    )
    attention.capability.cache_clear()
    yield met, asked, capabilities
    attention.capability.cache_clear()


@pytest.mark.parametrize(
    ("card", "dtype", "kernel"),
    [
        ((7, 0), torch.float16, "efficient"),
        ((7, 5), torch.float16, "efficient"),
        ((7, 5), torch.bfloat16, "efficient"),
        ((7, 5), torch.float32, "efficient"),
        ((8, 0), torch.float16, "flash"),
        ((8, 6), torch.bfloat16, "flash"),
        ((9, 0), torch.float16, "flash"),
        ((10, 0), torch.bfloat16, "flash"),
        ((12, 0), torch.float32, "efficient"),
    ],
    ids=str,
)
def test_cards_without_flash_attention_use_the_other_kernel(card, dtype, kernel, kernels):
    met, asked, capabilities = kernels
    capabilities["cards"] = card
    parts, plan, _ = mixed([dtype] * 3)
    for _ in range(3):
        attend_by_plan(*parts, plan, None, 0.0)
    assert met == [(kernel, dtype)] * 3
    assert len(asked) <= 1, "a device is asked once"
