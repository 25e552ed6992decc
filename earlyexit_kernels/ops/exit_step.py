"""One exit of one layer, fused: pool, linear head, decision, and the answers of the rows that leave.

The skeleton is the same in every back-end: load a row, compute its logits, let the criterion's step decide, write the
answer and the layer to the row's place in the request. Adding a criterion adds no op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, resolve, tl
from earlyexit_kernels.criteria import RULES, Criterion
from earlyexit_kernels.criteria.base import MAX_PARAMS
from earlyexit_kernels.ops.exit_checks import check_call, exit_rule_of
from earlyexit_kernels.ops.schema import EXIT_STEP, define

#: Weights of the head that a Triton program holds at a time.
TILE = 8192


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
    """One program a row, so that its reduction order knows nothing of the batch."""
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
        # a scalar flag can't be combined with a block's mask in the interpreter; a limit can
        tl.store(answers + n * classes + cols, answer, mask=cols < tl.where(leave, classes, 0))
        tl.store(exit_layer + n, tl.cast(layer, tl.int64), mask=leave)
        tl.store(row_ids + i, -1, mask=leave)
        tl.atomic_add(counts, 1, mask=leave == 0)
        tl.atomic_add(counts + 1, (end - first).to(tl.int32), mask=leave == 0)
        tl.atomic_add(counts + 2, 1, mask=wrong > 0)


def exit_step_triton(
    hidden: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    aux: Tensor | None,
    row_ids: Tensor,
    state: Tensor,
    answers: Tensor,
    exit_layer: Tensor,
    criterion: str,
    params: Sequence[float],
    pooling: str,
    layer: int,
    depth: int,
) -> Tensor:
    """Launch `exit_step_kernel`, one program for each row present."""
    counts = torch.zeros(3, dtype=torch.int32, device=row_ids.device)
    rows, classes = answers.shape
    if row_ids.numel() == 0:
        return counts
    x = logits if hidden is None else hidden
    assert x is not None
    p0, p1, p2 = (*params, *[0.0] * (MAX_PARAMS - len(params)))
    rule = RULES[criterion]
    block_c = max(2, 1 << (classes - 1).bit_length())
    exit_step_kernel[(row_ids.numel(),)](
        x,
        row_ids if offsets is None else offsets,
        x if weight is None else weight,
        x if bias is None else bias,
        row_ids if aux is None else aux,
        row_ids,
        state,
        answers,
        exit_layer,
        counts,
        rows,
        x.shape[1],
        classes,
        layer,
        depth,
        p0,
        p1,
        p2,
        STEP=rule.triton_step,
        POOLING=pooling,
        HAS_OFFSETS=offsets is not None,
        HAS_AUX=aux is not None and rule.needs is not None,
        FROM_LOGITS=hidden is None,
        IS_LAST=layer == depth,
        BLOCK_C=block_c,
        BLOCK_H=max(16, min(128, TILE // block_c)),
        enable_fp_fusion=False,
    )
    return counts


def reference_logits(
    hidden: Tensor, offsets: Tensor | None, weight: Tensor, bias: Tensor, pooling: str, present: Tensor
) -> Tensor:
    """Pool the rows present and apply the linear head in float32, in a reduction order that ignores the batch."""
    if pooling == "none" or offsets is None:
        pooled = hidden[present].float()
    elif pooling == "first":
        pooled = hidden[offsets[:-1][present]].float()
    else:
        pooled = torch.segment_reduce(hidden.float(), "mean", offsets=offsets.long())[present]
    return (pooled[:, None, :] * weight.float()).sum(dim=-1) + bias.float()


def meaningful(z: Tensor, aux: Tensor | None) -> Tensor:
    """Rows of ``[B, C]`` whose softmax exists: no NaN, at most one +inf, not all -inf, and no NaN in `aux`."""
    valid = ~z.isnan().any(dim=-1) & ((z == torch.inf).sum(dim=-1) < 2) & (z > -torch.inf).any(dim=-1)
    return valid if aux is None else valid & ~aux.isnan()


@torch.no_grad()
def exit_step_torch(
    hidden: Tensor | None,
    offsets: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    aux: Tensor | None,
    row_ids: Tensor,
    state: Tensor,
    answers: Tensor,
    exit_layer: Tensor,
    criterion: str,
    params: Sequence[float],
    pooling: str,
    layer: int,
    depth: int,
) -> Tensor:
    """The same in torch, the reference of the other back-ends."""
    present = row_ids >= 0
    if logits is None:
        assert hidden is not None and weight is not None and bias is not None
        z = weight.new_zeros(row_ids.numel(), weight.shape[0], dtype=torch.float32)
        z[present] = reference_logits(hidden, offsets, weight, bias, pooling, present)
    else:
        z = logits.float().clone()
    rule = RULES[criterion]
    aux = aux if rule.needs is not None else None
    valid = meaningful(z, aux)
    decided = (present & valid).nonzero()[:, 0]
    rows = row_ids[decided].long()
    answer, leave, new_state = rule.rule(
        z[decided], None if aux is None else aux[decided].float(), state.index_select(1, rows), layer, depth, params
    )
    state.index_copy_(1, rows, new_state)
    z[decided] = answer
    gone = present & (layer == depth)
    gone[decided] |= leave
    rows = row_ids[gone].long()
    answers[rows] = z[gone]
    exit_layer[rows] = layer
    row_ids[gone] = -1
    staying = present & ~gone
    tokens = torch.ones_like(row_ids) if offsets is None else offsets.diff()
    counted = (staying.sum(), tokens[staying].sum(), (present & ~valid).sum())
    return torch.stack(counted).to(torch.int32)


def _fake(hidden, offsets, weight, bias, logits, aux, row_ids, *rest):
    return row_ids.new_empty(3)


_EXIT_STEP = define(
    "exit_step", EXIT_STEP, fake=_fake, implementations={"torch": exit_step_torch, "triton": exit_step_triton}
)


def exit_step_op(backend: str, device: str) -> Callable[..., Tensor]:
    """The bare op of a back-end, for a loop that calls it at every layer with input it has made itself.

    The price of `exit_step`'s checks shows at one row a batch. Arguments are positional, in the order of the schema.

    Args:
        backend: ``"auto"`` or a name.
        device: kind of device, ``"cpu"`` or ``"cuda"``.

    Raises:
        BackendUnavailableError: `backend` can't run there.
    """
    return _EXIT_STEP[resolve(backend, device)]


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

    Give either `hidden` with `weight` and `bias` (the linear head is fused) or ready `logits`.

    Args:
        criterion: its `exit_rule` decides, with the numbers of `params(layer)`.
        layer, depth: 1-based layer and number of layers; at `depth` every row leaves.
        row_ids: ``[B]`` int32, the request row of each row present, no row twice, and -1 for a row that has left.
            **Changed**: -1 is written where a row leaves. On CUDA ids and offsets are trusted, since looking would cost
            a synchronisation.
        state: ``[K, N]`` float32 from `criterion.new_state`. **Changed.**
        answers: ``[N, C]`` float32, by request row. **Changed** for the rows that leave.
        exit_layer: ``[N]`` int64, by request row. **Changed** likewise.
        hidden: ``[T, H]`` packed tokens, or ``[B, H]`` with `pooling="none"`; float32, float16 or bfloat16.
        offsets: ``[B + 1]`` int32 that never decrease, row i holds the tokens ``offsets[i]`` to ``offsets[i + 1]``.
        weight, bias: ``[C, H]`` and ``[C]``, dtype of `hidden`.
        logits: ``[B, C]``, in place of `hidden`, `weight` and `bias`.
        aux: ``[B]`` float32, the scalar the criterion needs.
        pooling: ``"first"`` token, ``"mean"`` of the tokens, or ``"none"``.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"cpp"``.

    Returns:
        counts ``[3]`` int32: rows still live, their tokens, and rows present whose logits had no meaning (NaN, several
        +inf, all -inf): such a row stays and keeps its state.

    Raises:
        TypeError: an argument that has to be a tensor or a whole number isn't one.
        ValueError: shapes, dtypes or devices don't fit, a tensor that is written overlaps another one in memory, or the
            criterion isn't one that the back-ends know; on the CPU also ids and offsets as above.
        BackendUnavailableError: `backend` can't run here.

    All arithmetic is float32 and ties go to the lowest class. A row's bits depend on nothing but the row.
    """
    rule = exit_rule_of(criterion)
    tensors, params = check_call(
        rule,
        layer,
        depth,
        pooling,
        {
            "hidden": hidden,
            "offsets": offsets,
            "weight": weight,
            "bias": bias,
            "logits": logits,
            "aux": aux,
            "row_ids": row_ids,
            "state": state,
            "answers": answers,
            "exit_layer": exit_layer,
        },
    )
    op = _EXIT_STEP[resolve(backend, row_ids.device.type)]
    return op(*tensors.values(), rule.name, params, pooling if logits is None else "none", layer, depth)
