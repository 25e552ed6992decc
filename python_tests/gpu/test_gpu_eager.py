"""The loop on a GPU: no synchronisation between layers, NaN, attention and its gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import reference_networks
from support.leaving_models import HEADS, LENGTHS, prepared, tuned
from support.models import DEPTH, VOCABULARY, batch_for, early_exit, parameter_set, varied_entropy

import earlyexit_kernels as ee
from earlyexit_kernels.core import attention, attention_plan
from earlyexit_kernels.criteria import RULES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

#: Calls until all levels that a batch reaches have been captured.
WARM_UPS = 4
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Largest distance of attention and logits in each dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def moved(model, batch, dtype=torch.float32, layers="eager"):
    """Return a model and its batch on the GPU, with compaction at every exit."""
    model = model.to("cuda", dtype)
    model.configure(path=layers)
    model.configure(compaction="always")
    return model, {name: values.cuda() for name, values in batch.items()}


def leaving(arguments, dtype=torch.float32, kind="right", layers="eager"):
    model = early_exit("bert", **arguments)
    batch = batch_for(model, kind, lengths=LENGTHS)
    model, batch = moved(model, batch, dtype, layers)
    model.set_criterion(varied_entropy(ee.ExitTrace(model.trace(**batch).logits.cpu())))
    return model, batch


def synchronisations(call):
    """Return torch's messages about host synchronisations in a call, after calls that warm up and capture."""
    for _ in range(WARM_UPS):
        call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in found if "called a synchronizing" in str(w.message)]


@pytest.mark.parametrize("layers", ["family", "captured"])
@pytest.mark.parametrize("compaction", ["always", "never", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arguments", HEADS.values(), ids=HEADS)
def test_synchronisations_without_and_with_a_mask(arguments, dtype, compaction, layers):
    model, batch = leaving(arguments, dtype, "full", layers)
    model.configure(compaction=compaction)
    ids = batch["input_ids"]
    for _ in range(WARM_UPS):
        model(input_ids=ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model(input_ids=ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.exit_layer.min() < DEPTH
    ragged = batch_for(model, "right", lengths=LENGTHS)["attention_mask"].cuda()
    for mask in (batch["attention_mask"], ragged):
        assert len(synchronisations(lambda mask=mask: model(input_ids=ids, attention_mask=mask))) == 1


@pytest.mark.parametrize("layers", ["family", "captured"])
@pytest.mark.parametrize("criterion", RULES)
def test_no_criterion_synchronises(criterion, layers):
    model = early_exit("bert", method="berxit", halting=True)
    model.load_state_dict(prepared("bert", None, len(LENGTHS))[0].state_dict())
    model.set_criterion(tuned("bert", None, len(LENGTHS), criterion))
    model, batch = moved(model, prepared("bert", None, len(LENGTHS))[1], layers=layers)
    assert synchronisations(lambda: model(input_ids=batch["input_ids"])) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_of_nan_does_not_affect_others(dtype):
    """NaN before and after the other rows, and in the memory that a compaction frees."""
    model, batch = leaving({}, dtype)
    poison = VOCABULARY - 1
    expected = model(**batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    row = torch.full_like(ids[:1], poison)
    torch.full((2**26,), float("nan"), device="cuda", dtype=dtype)  # freed at once, then reused
    with parameter_set(model.get_input_embeddings().weight, poison, float("nan")):
        out = model(input_ids=torch.cat([row, ids, row]), attention_mask=torch.cat([mask[1:2], mask, mask[:1]]))
    assert out.logits[[0, -1]].isnan().all() and out.exit_layer[[0, -1]].tolist() == [DEPTH] * 2
    assert torch.equal(out.exit_layer[1:-1], expected.exit_layer)
    assert (out.logits[1:-1] - expected.logits).abs().max() < TOLERANCES[dtype]


def test_invalid_rows_are_counted_and_refused():
    model, batch = leaving({})
    with parameter_set(model.heads.out[1].bias, 0, float("nan")):
        out = model(**batch)
        present = int((out.exit_layer >= 2).sum())
        assert model.invalid_rows == present > 0
        model.config.strict = True
        with pytest.raises(ee.InvalidLogitsError, match=rf"{present} row\(s\).*at layer 2 of {DEPTH}"):
            model(**batch)


@pytest.mark.parametrize("width", [16, 20, 64, 256, 260])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_rows_with_and_without_tokens(dtype, width):
    """Rows without tokens, a bound on the longest row, and NaN in tokens of no row."""
    ends = torch.tensor([0, 5, 5, 6, 40, 300, 300, 300], dtype=torch.int32, device="cuda")
    plan = attention_plan.AttentionPlan(offsets=ends, longest=512)
    q, k, v = torch.randn(
        3, 320, 3, width, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(0)
    )
    for x in (q, k, v):
        x[300:] = float("nan")
    expected = reference_networks.attended_by_row(*(x.double() for x in (q, k, v)), plan, None, 0.0)
    got = attention._varlen(q, k, v, plan, None, 0.0)
    assert got.shape == q.shape and got.dtype == dtype
    assert (got[:300] - expected[:300]).abs().max() < TOLERANCES[dtype]
    alone = attention_plan.AttentionPlan(offsets=torch.tensor([0, 34], dtype=torch.int32, device="cuda"), longest=34)
    row = attention._varlen(*(x[6:40].contiguous() for x in (q, k, v)), alone, None, 0.0)
    assert (row - got[6:40]).abs().max() < TOLERANCES[dtype], "alone and among others"


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_attention(dtype):
    plan = attention_plan.AttentionPlan(offsets=torch.tensor([0, 5, 20], dtype=torch.int32, device="cuda"), longest=15)
    generator = torch.Generator("cuda").manual_seed(0)
    parts = torch.randn(4, 20, 3, 20, device="cuda", dtype=dtype, generator=generator)

    def gradients(attend, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in parts[:3]]
        (attend(*leaves, plan, None, 0.0) * parts[3].to(dtype)).sum().backward()
        return [x.grad for x in leaves]

    wanted = gradients(reference_networks.attended_by_row, torch.float64)
    for got, expected in zip(gradients(attention._varlen, dtype), wanted, strict=True):
        assert (got - expected).abs().max() < 4 * TOLERANCES[dtype]
