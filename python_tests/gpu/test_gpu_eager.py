"""The eager loop on a GPU: the answers of the CPU, without synchronisation between layers."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from support import reference_networks
from support.leaving_models import HEADS, LENGTHS, prepared, tuned
from support.models import (
    ALL_FAMILIES,
    DEPTH,
    FAMILIES,
    VOCABULARY,
    batch_for,
    early_exit,
    parameter_set,
    varied_entropy,
)

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import RULES
from earlyexit_kernels.engine import attention, attention_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Largest distance of attention and logits in each dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def moved(model, batch, dtype=torch.float32):
    """Return a model and its batch on the GPU, with compaction at every exit."""
    model = model.to("cuda", dtype)
    model.compaction = "always"
    return model, {name: values.cuda() for name, values in batch.items()}


def leaving(arguments, dtype=torch.float32, kind="right"):
    model = early_exit("bert", **arguments)
    batch = batch_for(model, kind, lengths=LENGTHS)
    model, batch = moved(model, batch, dtype)
    model.set_criterion(varied_entropy(ee.ExitTrace(model.trace(**batch).logits.cpu())))
    return model, batch


def synchronisations(call):
    """Return torch's messages about host synchronisations in a call, after a first call that warms up."""
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


@pytest.mark.parametrize("compaction", ["always", "never", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arguments", HEADS.values(), ids=HEADS)
def test_synchronisations_without_and_with_a_mask(arguments, dtype, compaction):
    model, batch = leaving(arguments, dtype, "full")
    model.compaction = compaction
    ids = batch["input_ids"]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family not in FAMILIES])
def test_other_families_answer_as_on_the_cpu(family, dtype):
    model = early_exit(family)
    batch = batch_for(model, lengths=LENGTHS)
    model.set_criterion(varied_entropy(model.trace(**batch)))
    expected = model(**batch)
    model, batch = moved(model, batch, dtype)
    got = model(**batch)
    same = got.exit_layer.cpu() == expected.exit_layer
    assert same.all() or dtype != torch.float32
    assert (got.logits.cpu() - expected.logits)[same].abs().max() <= TOLERANCES[dtype]


@pytest.mark.parametrize("criterion", RULES)
def test_no_criterion_synchronises(criterion):
    model = early_exit("bert", method="berxit", halting=True)
    model.load_state_dict(prepared("bert", None, len(LENGTHS))[0].state_dict())
    model.set_criterion(tuned("bert", None, len(LENGTHS), criterion))
    model, batch = moved(model, prepared("bert", None, len(LENGTHS))[1])
    assert synchronisations(lambda: model(input_ids=batch["input_ids"])) == []


@pytest.mark.parametrize("criterion", RULES)
def test_rows_leave_as_on_the_cpu(criterion):
    on_cpu, batch, _ = prepared("bert", None, len(LENGTHS))
    rule = tuned("bert", None, len(LENGTHS), criterion)
    model = early_exit("bert", method="berxit", halting=True)
    model.load_state_dict(on_cpu.state_dict())
    for each in (model, on_cpu):
        each.set_criterion(rule)
    expected = on_cpu(**batch)
    model, batch = moved(model, batch)
    for compaction in ("always", "never", "auto"):
        model.compaction = compaction
        got = model(**batch)
        assert torch.equal(got.exit_layer.cpu(), expected.exit_layer)
        assert (got.logits.cpu() - expected.logits).abs().max() < TOLERANCES[torch.float32]


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


def test_consecutive_and_concurrent_batches():
    """Batches reuse the memory for counts; two threads have their own, each on its own stream."""
    model, batch = leaving({})
    expected = model(**batch)
    torch.cuda.synchronize()
    found = []

    def many(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for k in range(50):
                rows = torch.randperm(len(LENGTHS), generator=generator)[: 1 + seed + k % 7].cuda()
                out = model(**{name: values[rows] for name, values in batch.items()})
                found.append(torch.equal(out.exit_layer, expected.exit_layer[rows]))

    many(0)
    threads = [threading.Thread(target=many, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 150


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
    assert torch.equal(row, got[6:40]), "a row's bits are the same alone and among others"


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


@pytest.mark.parametrize("arguments", HEADS.values(), ids=HEADS)
def test_stream_gives_the_answers_of_forward(arguments):
    model, batch = leaving(arguments)
    expected = model(**batch)
    parts = list(model.stream(**batch))
    rows = torch.cat([part.rows for part in parts])
    assert torch.equal(rows.sort().values, torch.arange(len(LENGTHS), device="cuda")) and len(parts) > 1
    assert torch.equal(torch.cat([part.exit_layer for part in parts]), expected.exit_layer[rows])
    distance = (torch.cat([part.logits for part in parts]) - expected.logits[rows]).abs().max()
    assert distance <= TOLERANCES[torch.float32]
