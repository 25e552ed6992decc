"""One exit of a loop without synchronisation: `exit_step`, followed by the compaction plan, on the device.

Hidden states lie in a flat buffer of two sides of T tokens each. The offsets count from the beginning of the buffer and
so show which side is live. After the decision, a move of the live rows to the other side, in order, is planned if that
leaves fewer tiles of tokens to compute; `gather_rows` then copies them. The number of present tokens stays on the
device as ``offsets[-1] - offsets[0]``, where every kernel of the next layer reads it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from earlyexit_kernels.backends import constant, jit, tl
from earlyexit_kernels.criteria import Criterion, resolve_backend
from earlyexit_kernels.ops.checks import (
    FLOATS,
    INT32,
    MAX_INT32,
    check_apart,
    check_present,
    check_tensor,
    check_whole,
    not_traced,
)
from earlyexit_kernels.ops.exit_call import ExitCall, ResidentExitCall
from earlyexit_kernels.ops.exit_checks import READ, WRITTEN, checked_call, exit_rule_of
from earlyexit_kernels.ops.exit_step import exit_step_torch, exit_step_triton
from earlyexit_kernels.ops.schema import RESIDENT_EXIT, bare_op, define

#: Maximum number of rows, which one program plans.
MAX_ROWS = 1024
#: Numbers in `counts`: four results, and four words of scratch.
COUNTS = 8
#: Where in `counts` back-ends other than ``"cpp"`` say whether rows are live, as a condition of a CUDA graph.
LIVE = 4
_LIVE = constant(LIVE)


@jit
def settle_rows_kernel(
    row_ids,  # [R] int32
    offsets,  # [R + 1] int32
    old_offsets,  # [R + 1] int32
    source,  # [R] int32
    found,  # [3] int32, as exit_step returns them
    counts,  # [8] int32
    rows,  # R
    capacity,  # T
    tile,
    BLOCK: tl.constexpr,
):
    """One program. It loads everything before the scans, whose barriers order all stores after the loads."""
    i = tl.arange(0, BLOCK)
    inside = i < rows
    n = tl.load(row_ids + i, mask=inside, other=-1)
    start = tl.load(offsets + i, mask=inside, other=0)
    end = tl.load(offsets + i + 1, mask=inside, other=0)
    first = tl.load(offsets)
    last = tl.load(offsets + rows)
    live = n >= 0
    keep = live.to(tl.int32)
    length = tl.where(live, end - start, 0)
    slot = tl.cumsum(keep, 0) - keep
    after = tl.cumsum(length, 0)
    live_rows = tl.sum(keep, 0)
    live_tokens = tl.sum(length, 0)
    present = last - first
    tl.debug_barrier()
    if (live_tokens + tile - 1) // tile < (present + tile - 1) // tile:
        base = tl.where(first == 0, capacity, 0)
        beyond = inside & (i >= live_rows)
        tl.store(old_offsets + i + 1, end, mask=inside)
        tl.store(old_offsets, first)
        tl.store(offsets, base)
        tl.store(row_ids + slot, n, mask=live)
        tl.store(source + slot, i, mask=live)
        tl.store(offsets + slot + 1, base + after, mask=live)
        tl.store(row_ids + i, -1, mask=beyond)
        tl.store(source + i, -1, mask=beyond)
        tl.store(offsets + i + 1, base + live_tokens, mask=beyond)
        present = live_tokens
    else:
        tl.store(source + i, -1, mask=inside)
    tl.store(counts, live_rows)
    tl.store(counts + 1, live_tokens)
    tl.store(counts + 2, tl.load(found + 2))
    tl.store(counts + 3, present)
    tl.store(counts + _LIVE, (live_rows > 0).to(tl.int32))


def settle_rows_triton(
    row_ids: Tensor,
    offsets: Tensor,
    old_offsets: Tensor,
    source: Tensor,
    found: Tensor,
    counts: Tensor,
    capacity: int,
    tile: int,
) -> None:
    """Launch `settle_rows_kernel`."""
    rows = row_ids.numel()
    block = max(2, 1 << (rows - 1).bit_length())
    settle_rows_kernel[(1,)](
        row_ids, offsets, old_offsets, source, found, counts, rows, capacity, tile, BLOCK=block, num_warps=4
    )


def settle_rows_torch(
    row_ids: Tensor,
    offsets: Tensor,
    old_offsets: Tensor,
    source: Tensor,
    found: Tensor,
    counts: Tensor,
    capacity: int,
    tile: int,
) -> None:
    """`settle_rows_kernel` in torch, without synchronisation."""
    rows = row_ids.numel()
    live = row_ids >= 0
    order = torch.argsort(~live, stable=True)
    beyond = ~live[order]
    lengths = offsets.diff()
    live_tokens = lengths.masked_fill(~live, 0).sum()
    present = offsets[rows] - offsets[0]
    moves = -(-live_tokens // tile) < -(-present // tile)
    base = torch.where(offsets[0] == 0, capacity, 0).to(offsets.dtype)
    moved = torch.cat((base[None], base + lengths[order].masked_fill(beyond, 0).cumsum(0))).to(offsets.dtype)
    old_offsets.copy_(torch.where(moves, offsets, old_offsets))
    source.copy_(torch.where(moves & ~beyond, order, -1))
    row_ids.copy_(torch.where(moves, row_ids[order].masked_fill(beyond, -1), row_ids))
    offsets.copy_(torch.where(moves, moved, offsets))
    now_present = torch.where(moves, live_tokens, present)
    counts[: LIVE + 1].copy_(torch.stack((live.sum(), live_tokens, found[2], now_present, live.any())))


def _two_launches(
    decide: Callable[[ExitCall], Tensor], settle: Callable[..., None], *, from_zero: bool
) -> Callable[[ResidentExitCall], None]:
    """Return the op as a decision and a plan; `from_zero`: the decision requires offsets that start at 0."""

    def run(call: ResidentExitCall) -> None:
        if call.handle is not None:
            raise ValueError(f"resident_exit: only back-end 'cpp' sets a graph's handle, got {call.handle}; pass None")
        if call.tile < 1:
            raise ValueError(f"resident_exit: expected tile >= 1 token, got {call.tile}")
        exit_call, offsets = call.exit_call, call.offsets
        if call.hidden is not None and call.pooling != "none":
            check_tensor("resident_exit", "hidden", call.hidden, (2 * call.capacity, None), FLOATS)
            if from_zero:
                live = call.hidden[offsets[0] : offsets[-1]]
                exit_call = exit_call._replace(hidden=live, offsets=offsets - offsets[0])
        found = decide(exit_call)
        settle(call.row_ids, offsets, call.old_offsets, call.source, found, call.counts, call.capacity, call.tile)

    return run


define(
    "resident_exit",
    RESIDENT_EXIT,
    implementations={
        "torch": _two_launches(exit_step_torch, settle_rows_torch, from_zero=True),
        "triton": _two_launches(exit_step_triton, settle_rows_triton, from_zero=False),
    },
    call=ResidentExitCall,
    compiled_for=("cuda",),
)


def resident_exit(
    *,
    criterion: Criterion,
    layer: int,
    depth: int,
    row_ids: Tensor,
    offsets: Tensor,
    old_offsets: Tensor,
    source: Tensor,
    counts: Tensor,
    state: Tensor,
    answers: Tensor,
    exit_layer: Tensor,
    capacity: int,
    tile: int,
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    aux: Tensor | None = None,
    pooling: str = "first",
    handle: int | None = None,
    backend: str = "auto",
) -> None:
    """Decide at one layer which rows leave, and plan where the live rows move, without synchronisation on CUDA.

    Rows move only if the live tokens need fewer tiles than the present ones. `old_offsets`, `source` and `offsets` are
    then the arguments of the bare op `gather_rows`, which moves the tokens to the other side of the same buffer.

    Args:
        criterion, layer, depth, state, answers, exit_layer, weight, bias, aux: as in `exit_step`.
        row_ids: ``[R]`` int32, as in `exit_step`, R at most 1024. **Changed**: -1 where a row leaves, and moved.
        offsets: ``[R + 1]`` int32, non-decreasing; row i has the tokens from ``offsets[i]`` up to ``offsets[i + 1]`` of
            the buffer of two sides. On CUDA the values of ids and offsets are not checked, since that would
            synchronise. **Changed** to those after the move.
        old_offsets: ``[R + 1]`` int32. **Changed** to the offsets before the move, if rows move.
        source: ``[R]`` int32. **Changed** to the old index of each moved row, -1 for none.
        counts: ``[8]`` int32. **Changed**: the first four to the live rows, their tokens, the present rows with invalid
            logits, and the tokens present after the move. The last four must be 0. Back-end ``"cpp"`` counts its blocks
            and rows there, and they are 0 again afterwards; the others set the fifth to 1 if rows are live, else to 0.
        capacity: T, tokens of one side.
        tile: tokens per tile, at least 1.
        hidden: ``[2 T, H]`` tokens, or ``[R, F]`` features with ``pooling="none"``; float32, float16 or bfloat16.
        logits: ``[R, C]`` float32, float16 or bfloat16, instead of `hidden`, `weight` and `bias`.
        pooling: ``"first"`` token, ``"mean"`` of the tokens, or ``"none"``.
        handle: conditional handle of a CUDA graph, which is set to whether rows are live, or None; back-end
            ``"cpp"`` only.
        backend: ``"auto"``, ``"torch"``, ``"triton"``, or on CUDA ``"cpp"``, which needs one launch.

    Raises:
        TypeError: an argument is not a tensor or not a whole number where one is required.
        ValueError: as in `exit_step`, or `capacity`, `tile` or `handle` are out of range.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> rule = ee.criteria.MaxProbability(threshold=0.9)
    >>> ints = lambda *values: torch.tensor(values, dtype=torch.int32)
    >>> row_ids, source, counts = ints(0, 1), ints(0, 0), torch.zeros(8, dtype=torch.int32)
    >>> offsets, old_offsets = ints(0, 2, 3), ints(0, 0, 0)
    >>> state = rule.new_state(2, torch.device("cpu"), 2)
    >>> answers, exit_layer = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    >>> ee.ops.resident_exit(
    ...     criterion=rule, layer=1, depth=3, row_ids=row_ids, offsets=offsets, old_offsets=old_offsets, source=source,
    ...     counts=counts, state=state, answers=answers, exit_layer=exit_layer, capacity=4, tile=1,
    ...     logits=torch.tensor([[4.0, 0.0], [0.1, 0.0]]),
    ... )
    >>> counts[:4].tolist(), row_ids.tolist(), offsets.tolist(), source.tolist()
    ([1, 1, 0, 1], [1, -1], [4, 5, 5], [1, -1])
    """
    op = "resident_exit"
    rule = exit_rule_of(op, criterion)
    call = ResidentExitCall(
        hidden, weight, bias, logits, aux, row_ids, offsets, old_offsets, source, counts, state, answers, exit_layer,
        rule.name, (), pooling, layer, depth, tile, capacity, handle,
    )  # fmt: skip
    call = _checked(op, rule, call)
    device = row_ids.device
    if backend == "auto" and device.type == "cpu":
        backend = "torch"  # the extension has this op on CUDA only
    bare_op(op, resolve_backend(rule.name, backend, device), device)(*call)


@not_traced
def _checked(op: str, rule: Criterion, call: ResidentExitCall) -> ResidentExitCall:
    check_whole(op, capacity=call.capacity, tile=call.tile)
    if not 0 <= call.capacity <= MAX_INT32 // 2 or call.tile < 1:
        raise ValueError(f"{op}: expected capacity >= 0 and tile >= 1 token, got {call.capacity} and {call.tile}")
    exit_call = checked_call(op, rule, call.exit_call)
    rows, device = call.row_ids.shape[0], call.row_ids.device
    if rows > MAX_ROWS:
        raise ValueError(f"{op}: expected at most {MAX_ROWS} rows, got {rows}; split the batch")
    check_present(op, call.offsets, call.row_ids, capacity=call.capacity, device=device)
    planned = {"offsets": rows + 1, "old_offsets": rows + 1, "source": rows, "counts": COUNTS}
    for name, size in planned.items():
        check_tensor(op, name, getattr(call, name), (size,), INT32, written=True, device=device)
    if call.hidden is not None and call.pooling != "none":
        check_tensor(op, "hidden", call.hidden, (2 * call.capacity, None), FLOATS, device=device)
    read = {name: getattr(exit_call, name) for name in READ if name != "offsets"}
    check_apart(op, {name: getattr(call, name) for name in (*planned, *WRITTEN)}, read)
    return call._replace(**read, params=exit_call.params, pooling=exit_call.pooling)
