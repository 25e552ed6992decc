"""One fused exit: pooling, linear head, decision, and the answers of the rows that leave.

Every back-end does the same per row: compute its logits, let the criterion's step decide, and if the row leaves write
its answer and layer to its place in the request. A new criterion needs no new op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria import Criterion, resolve_backend, rule_named, torch_step
from earlyexit_kernels.criteria.base import MAX_PARAMS
from earlyexit_kernels.ops.exit_call import EXIT_STEP, ExitCall, checked_call, exit_rule_of
from earlyexit_kernels.ops.schema import define, raw

#: Maximum number of head weights that a Triton program holds at a time.
MAX_HELD_WEIGHTS = 8192


@jit
def exit_step_kernel(
    x,  # hidden [T, H], or logits [B, C]
    offsets,  # [B + 1] int32
    weight,  # [C, H]
    bias,  # [C]
    aux,  # [B] float32
    row_ids,  # [B] int32
    state,  # [K, N] float32
    answers,  # [N, C] float32
    exit_layer,  # [N] int64
    counts,  # [3] int32
    rows,  # N
    width,  # H
    classes,  # C
    layer,
    depth,
    p0,
    p1,
    p2,
    STEP: tl.constexpr,
    POOLING: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_AUX: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program per row, so that the order of its sums does not depend on the batch."""
    i = tl.program_id(0).to(tl.int64)
    n = tl.load(row_ids + i).to(tl.int64)
    if n >= 0:
        cols = tl.arange(0, BLOCK_C)
        real = cols < classes
        first = i
        end = i + 1
        if HAS_OFFSETS:
            first = tl.load(offsets + i).to(tl.int64)
            end = tl.load(offsets + i + 1).to(tl.int64)
        if FROM_LOGITS:
            z = tl.load(x + i * classes + cols, mask=real, other=0.0).to(tl.float32)
        else:
            z = tl.load(bias + cols, mask=real, other=0.0).to(tl.float32)
            h0 = width * 0
            while h0 < width:
                h = h0 + tl.arange(0, BLOCK_H)
                in_row = h < width
                token = first
                if POOLING == "none":
                    token = i
                pooled = tl.load(x + token * width + h, mask=in_row, other=0.0).to(tl.float32)
                if POOLING == "mean":
                    token += 1
                    while token < end:
                        pooled += tl.load(x + token * width + h, mask=in_row, other=0.0).to(tl.float32)
                        token += 1
                    pooled = pooled / (end - first).to(tl.float32)
                w_mask = real[:, None] & in_row[None, :]
                w = tl.load(weight + cols[:, None] * width + h[None, :], mask=w_mask, other=0.0).to(tl.float32)
                z += tl.sum(w * pooled[None, :], 1)
                h0 += BLOCK_H
        a = 0.0
        if HAS_AUX:
            a = tl.load(aux + i).to(tl.float32)
        infinity = float("inf")
        wrong = tl.sum((real & (z != z)).to(tl.int32), 0) + tl.where(a != a, 1, 0)
        wrong += tl.where(tl.sum((real & (z == infinity)).to(tl.int32), 0) > 1, 1, 0)
        wrong += tl.where(tl.sum((real & (z > -infinity)).to(tl.int32), 0) == 0, 1, 0)
        valid = wrong == 0
        q0 = tl.cast(p0, tl.float32)
        q1 = tl.cast(p1, tl.float32)
        q2 = tl.cast(p2, tl.float32)
        stride = tl.cast(rows, tl.int64)
        answer, leave = STEP(z, a, cols, classes, state + n, stride, valid, layer, depth, q0, q1, q2)
        answer = tl.where(valid, answer, z)
        leave = leave & valid
        if IS_LAST:
            leave = valid | (wrong > 0)
        # the interpreter cannot combine a scalar flag with the mask of a block, but a limit works
        tl.store(answers + n * classes + cols, answer, mask=cols < tl.where(leave, classes, 0))
        tl.store(exit_layer + n, tl.cast(layer, tl.int64), mask=leave)
        tl.store(row_ids + i, -1, mask=leave)
        tl.atomic_add(counts, 1, mask=leave == 0)
        tl.atomic_add(counts + 1, (end - first).to(tl.int32), mask=leave == 0)
        tl.atomic_add(counts + 2, 1, mask=wrong > 0)


def exit_step_triton(call: ExitCall) -> Tensor:
    """Launch `exit_step_kernel` with one program per row."""
    row_ids, answers = call.row_ids, call.answers
    counts = torch.zeros(3, dtype=torch.int32, device=row_ids.device)
    rows, classes = answers.shape
    if row_ids.numel() == 0:
        return counts
    x = call.logits if call.hidden is None else call.hidden
    assert x is not None
    p0, p1, p2 = (*call.params, *[0.0] * (MAX_PARAMS - len(call.params)))
    rule = rule_named(call.criterion)
    block_c = max(2, 1 << (classes - 1).bit_length())
    exit_step_kernel[(row_ids.numel(),)](
        x,
        row_ids if call.offsets is None else call.offsets,
        x if call.weight is None else call.weight,
        x if call.bias is None else call.bias,
        row_ids if call.aux is None else call.aux,
        row_ids,
        call.state,
        answers,
        call.exit_layer,
        counts,
        rows,
        x.shape[1],
        classes,
        call.layer,
        call.depth,
        p0,
        p1,
        p2,
        STEP=rule.triton_step,
        POOLING=call.pooling,
        HAS_OFFSETS=call.offsets is not None,
        HAS_AUX=call.aux is not None and rule.needs is not None,
        FROM_LOGITS=call.hidden is None,
        IS_LAST=call.layer == call.depth,
        BLOCK_C=block_c,
        BLOCK_H=max(16, min(128, MAX_HELD_WEIGHTS // block_c)),
        enable_fp_fusion=False,
    )
    return counts


def reference_logits(
    hidden: Tensor, offsets: Tensor | None, weight: Tensor, bias: Tensor, pooling: str, present: Tensor
) -> Tensor:
    """Pool the present rows and apply the linear head in float32; the order of sums does not depend on the batch."""
    if pooling == "none" or offsets is None:
        pooled = hidden[present].float()
    elif pooling == "first":
        pooled = hidden[offsets[:-1][present]].float()
    else:
        pooled = torch.segment_reduce(hidden.float(), "mean", offsets=offsets.long())[present]
    return (pooled[:, None, :] * weight.float()).sum(dim=-1) + bias.float()


def valid_rows(z: Tensor, aux: Tensor | None) -> Tensor:
    """Return which rows of logits ``[B, C]`` are valid: no NaN, at most one +inf, not all -inf, and no NaN in `aux`."""
    valid = ~z.isnan().any(dim=-1) & ((z == torch.inf).sum(dim=-1) < 2) & (z > -torch.inf).any(dim=-1)
    return valid if aux is None else valid & ~aux.isnan()


@torch.no_grad()
def exit_step_torch(call: ExitCall) -> Tensor:
    """`exit_step` in torch, the reference of the other back-ends."""
    row_ids, state, layer = call.row_ids, call.state, call.layer
    present = row_ids >= 0
    if call.logits is None:
        assert call.hidden is not None and call.weight is not None and call.bias is not None
        z = call.weight.new_zeros(row_ids.numel(), call.weight.shape[0], dtype=torch.float32)
        z[present] = reference_logits(call.hidden, call.offsets, call.weight, call.bias, call.pooling, present)
    else:
        z = call.logits.float().clone()
    rule = rule_named(call.criterion)
    aux = call.aux if rule.needs is not None else None
    valid = valid_rows(z, aux)
    decided = (present & valid).nonzero()[:, 0]
    rows = row_ids[decided].long()
    own_aux = None if aux is None else aux[decided].float()
    answer, leave, new_state = torch_step(
        rule, z[decided], own_aux, state.index_select(1, rows), layer, call.depth, call.params
    )
    state.index_copy_(1, rows, new_state)
    z[decided] = answer
    gone = present & (layer == call.depth)
    gone[decided] |= leave
    rows = row_ids[gone].long()
    call.answers[rows] = z[gone]
    call.exit_layer[rows] = layer
    row_ids[gone] = -1
    staying = present & ~gone
    tokens = torch.ones_like(row_ids) if call.offsets is None else call.offsets.diff()
    counted = (staying.sum(), tokens[staying].sum(), (present & ~valid).sum())
    return torch.stack(counted).to(torch.int32)


def _fake(hidden, offsets, weight, bias, logits, aux, row_ids, *rest):
    return row_ids.new_empty(3)


define(
    "exit_step",
    EXIT_STEP,
    settings="str criterion, float[] params, str pooling, int layer, int depth",
    returns="Tensor",
    implementations={"torch": exit_step_torch, "triton": exit_step_triton},
    call=ExitCall,
    fake=_fake,
    compiled_for=("cpu", "cuda"),
)


def exit_step(
    *,
    criterion: Criterion,
    layer: int,
    depth: int,
    row_ids: Tensor,
    state: Tensor,
    answers: Tensor,
    exit_layer: Tensor,
    hidden: Tensor | None = None,
    offsets: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    aux: Tensor | None = None,
    pooling: str = "first",
    backend: str = "auto",
) -> Tensor:
    """Decide at one layer which rows leave, and write their answers.

    Pass either `hidden` with `weight` and `bias` (the linear head is fused) or `logits`.

    All arithmetic is float32 and ties go to the lowest class. The result of a row does not depend on the other rows,
    bit for bit.

    Args:
        criterion: its `exit_rule` decides, with the parameters `params(layer)`.
        layer, depth: 1-based layer and number of layers; at `depth` every row leaves.
        row_ids: ``[B]`` int32, index of each row in the request, distinct, -1 for a row that has left. **Changed**: set
            to -1 where a row leaves. On CUDA the values of ids and offsets are not checked, since that would
            synchronise.
        state: ``[K, N]`` float32 from `criterion.new_state`. **Changed.**
        answers: ``[N, C]`` float32, indexed by request row. **Changed** for the rows that leave.
        exit_layer: ``[N]`` int64, indexed by request row. **Changed** for the rows that leave.
        hidden: ``[T, H]`` packed tokens, or ``[B, H]`` with ``pooling="none"``; float32, float16 or bfloat16.
        offsets: ``[B + 1]`` int32, non-decreasing; row i has the tokens from ``offsets[i]`` up to ``offsets[i + 1]``.
            Default: one token per row.
        weight, bias: ``[C, H]`` and ``[C]``, dtype of `hidden`.
        logits: ``[B, C]`` float32, float16 or bfloat16, instead of `hidden`, `weight` and `bias`.
        aux: ``[B]`` float32, the scalar that the criterion needs.
        pooling: ``"first"`` token, ``"mean"`` of the tokens, or ``"none"``.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"cpp"``.

    Returns:
        counts ``[3]`` int32: live rows, their tokens, and present rows with invalid logits (NaN, several +inf or all
        -inf), which stay and keep their state.

    Raises:
        TypeError: an argument is not a tensor or not a whole number where one is required.
        ValueError: shapes, dtypes or devices do not match, a tensor that is written shares memory with another one, no
            back-end implements the criterion, or a registered torch rule returned something of another form than
            documented; on the CPU also invalid ids and offsets.
        BackendUnavailableError: `backend` cannot run here, or does not implement a registered criterion.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> rule = ee.criteria.MaxProbability(threshold=0.9)
    >>> row_ids = torch.arange(2, dtype=torch.int32)
    >>> state = rule.new_state(2, torch.device("cpu"), 2)
    >>> answers, exit_layer = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    >>> logits = torch.tensor([[4.0, 0.0], [0.1, 0.0]])
    >>> counts = ee.ops.exit_step(
    ...     criterion=rule, layer=1, depth=3, row_ids=row_ids, state=state, answers=answers, exit_layer=exit_layer,
    ...     logits=logits,
    ... )
    >>> counts.tolist(), row_ids.tolist(), exit_layer.tolist()
    ([1, 1, 0], [-1, 1], [1, 0])
    """
    op = "exit_step"
    rule = exit_rule_of(op, criterion)
    call = ExitCall(
        hidden, offsets, weight, bias, logits, aux, row_ids, state, answers, exit_layer,
        rule.name, (), pooling, layer, depth,
    )  # fmt: skip
    call = checked_call(op, rule, call)
    device = row_ids.device
    return raw(op, resolve_backend(rule.name, backend, device), device)(*call)
