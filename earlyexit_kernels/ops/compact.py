"""Compaction of the live rows: `compact` plans it, `gather_rows` copies their tokens into a second buffer.

The state of the criterion, answers and exit layers are indexed by request row and do not move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.schema import define, raw
from earlyexit_kernels.ops.shapes import COPIED, INT32, Argument, Shapes, not_traced
from earlyexit_kernels.ops.values import check_moves, check_offsets, check_row_count, check_row_ids

COMPACT = Shapes({"row_ids": Argument("B", INT32), "offsets": Argument("B + 1", INT32)})
GATHER_ROWS = Shapes(
    {
        "hidden": Argument("T, H", COPIED),
        "offsets": Argument("B + 1", INT32),
        "source": Argument("B2", INT32),
        "new_offsets": Argument("B2 + 1", INT32),
        "out": Argument("T2, H", "hidden", written=True),
    }
)

BLOCK_ROWS = 1024
BLOCK_WIDTH = 256


@jit
def compact_kernel(
    row_ids,  # [B] int32
    offsets,  # [B + 1] int32
    new_ids,  # [B] int32
    new_offsets,  # [B + 1] int32
    source,  # [B] int32
    present,  # B
    BLOCK: tl.constexpr,
):
    """Stable exclusive scan of rows and tokens by one program, block by block."""
    rows_done = present * 0
    tokens_done = present * 0
    start = present * 0
    while start < present:
        i = start + tl.arange(0, BLOCK)
        inside = i < present
        n = tl.load(row_ids + i, mask=inside, other=-1)
        live = n >= 0
        keep = live.to(tl.int32)
        end = tl.load(offsets + i + 1, mask=inside, other=0)
        length = tl.where(live, end - tl.load(offsets + i, mask=inside, other=0), 0)
        slot = rows_done + tl.cumsum(keep, 0) - keep
        tl.store(new_ids + slot, n, mask=live)
        tl.store(source + slot, i, mask=live)
        tl.store(new_offsets + slot + 1, tokens_done + tl.cumsum(length, 0), mask=live)
        rows_done += tl.sum(keep, 0)
        tokens_done += tl.sum(length, 0)
        start += BLOCK
    tl.store(new_offsets, 0)
    start = present * 0
    while start < present:
        i = start + tl.arange(0, BLOCK)
        beyond = (i < present) & (i >= rows_done)
        tl.store(new_ids + i, -1, mask=beyond)
        tl.store(source + i, -1, mask=beyond)
        tl.store(new_offsets + i + 1, tokens_done, mask=beyond)
        start += BLOCK


def compact_triton(row_ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `compact_kernel`."""
    planned = torch.empty_like(row_ids), torch.zeros_like(offsets), torch.empty_like(row_ids)
    if row_ids.numel():
        compact_kernel[(1,)](row_ids, offsets, *planned, row_ids.numel(), BLOCK=BLOCK_ROWS)
    return planned


@jit
def gather_rows_kernel(
    hidden,  # [T, H]
    offsets,  # [B + 1] int32
    source,  # [B2] int32
    new_offsets,  # [B2 + 1] int32
    out,  # [T2, H]
    width,  # H
    BLOCK: tl.constexpr,
):
    """One program per new row and slice of the width, which loops over the tokens of the row."""
    j = tl.program_id(0).to(tl.int64)
    i = tl.load(source + j).to(tl.int64)
    if i >= 0:
        h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = h < width
        token = tl.load(offsets + i).to(tl.int64)
        end = tl.load(offsets + i + 1).to(tl.int64)
        shift = tl.load(new_offsets + j).to(tl.int64) - token
        while token < end:
            values = tl.load(hidden + token * width + h, mask=inside)
            tl.store(out + (token + shift) * width + h, values, mask=inside)
            token += 1


def gather_rows_triton(hidden: Tensor, offsets: Tensor, source: Tensor, new_offsets: Tensor, out: Tensor) -> None:
    """Launch `gather_rows_kernel`."""
    width = hidden.shape[1]
    if source.numel() and width:
        grid = (source.numel(), -(-width // BLOCK_WIDTH))
        gather_rows_kernel[grid](hidden, offsets, source, new_offsets, out, width, BLOCK=BLOCK_WIDTH)


def compact_torch(row_ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`compact` in torch, the reference of the other back-ends."""
    left = row_ids < 0
    source = torch.argsort(left, stable=True).to(torch.int32)
    beyond = left[source]
    lengths = offsets.diff()[source].masked_fill(beyond, 0)
    new_offsets = torch.zeros_like(offsets)
    new_offsets[1:] = lengths.cumsum(0)
    return row_ids[source].masked_fill(beyond, -1), new_offsets, source.masked_fill(beyond, -1)


@torch.no_grad()
def gather_rows_torch(hidden: Tensor, offsets: Tensor, source: Tensor, new_offsets: Tensor, out: Tensor) -> None:
    """`gather_rows` in torch, the reference of the other back-ends."""
    lengths = new_offsets.diff().masked_fill(source < 0, 0)
    before = lengths.cumsum(0) - lengths
    shift_in, shift_out = offsets[source.clamp(min=0)] - before, new_offsets[:-1] - before
    token = torch.arange(int(lengths.sum()), device=hidden.device)
    out[token + shift_out.repeat_interleave(lengths)] = hidden[token + shift_in.repeat_interleave(lengths)]


def _fake_compact(row_ids, offsets):
    return torch.empty_like(row_ids), torch.empty_like(offsets), torch.empty_like(row_ids)


define(
    "compact",
    COMPACT,
    returns="(Tensor, Tensor, Tensor)",
    implementations={"torch": compact_torch, "triton": compact_triton},
    fake=_fake_compact,
    compiled_for=("cpu", "cuda"),
)
define(
    "gather_rows",
    GATHER_ROWS,
    implementations={"torch": gather_rows_torch, "triton": gather_rows_triton},
    compiled_for=("cpu", "cuda"),
)


def compact(row_ids: Tensor, offsets: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Plan a stable compaction of the live rows.

    Args:
        row_ids: ``[B]`` int32, distinct, -1 for a row that has left.
        offsets: ``[B + 1]`` int32, non-negative and non-decreasing. On CUDA the values of ids and offsets are not
            checked, since that would synchronise.
        backend: as in `exit_step`.

    Returns:
        new row ids ``[B]`` (the live ones in order, then -1), new offsets ``[B + 1]`` (lengths of the live rows, then
        constant) and source ``[B]`` (old index of each new row, then -1); all int32.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not match; on the CPU also repeated row ids and decreasing offsets.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> row_ids = torch.tensor([0, -1, 2], dtype=torch.int32)
    >>> offsets = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    >>> new_ids, new_offsets, source = ee.ops.compact(row_ids, offsets)
    >>> new_ids.tolist(), new_offsets.tolist(), source.tolist()
    ([0, 2, -1], [0, 2, 3, 3], [0, 2, -1])
    """
    checked = _checked_plan(row_ids, offsets)
    return raw("compact", backend, row_ids.device)(*checked)


@not_traced
def _checked_plan(row_ids: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    op, given = "compact", {"row_ids": row_ids, "offsets": offsets}
    check_row_count(op, COMPACT.check(op, given)["B"])
    if row_ids.device.type == "cpu":
        check_row_ids(op, row_ids, requests=None)
        check_offsets(op, offsets, tokens=None)
    return tuple(COMPACT.ready(op, given).values())


def gather_rows(
    hidden: Tensor, offsets: Tensor, source: Tensor, new_offsets: Tensor, out: Tensor, *, backend: str = "auto"
) -> None:
    """Copy the tokens of the rows in `source` into a second buffer.

    Args:
        hidden: ``[T, H]`` packed tokens; float32, float16, bfloat16 or float64.
        offsets: ``[B + 1]`` int32 of `hidden`, non-decreasing.
        source: ``[B2]`` int32, index in `hidden` of each new row, -1 for none.
        new_offsets: ``[B2 + 1]`` int32 of `out`, non-decreasing; each row keeps its length. On CUDA the values of
            `offsets`, `source` and `new_offsets` are not checked, since that would synchronise.
        out: ``[T2, H]``, dtype of `hidden`, not overlapping it; T2 is at least the number of copied tokens. **Changed**
            for the rows with a source; other tokens keep their values.
        backend: as in `exit_step`.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not match, or `out` overlaps another tensor; on the CPU also a source
            or offsets that are out of range or change the length of a row.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> hidden = torch.arange(6.0)[:, None]
    >>> offsets, new_offsets = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5, 6], [0, 2, 3, 3]))
    >>> source, out = torch.tensor([0, 2, -1], dtype=torch.int32), torch.zeros(3, 1)
    >>> ee.ops.gather_rows(hidden, offsets, source, new_offsets, out)
    >>> out[:, 0].tolist()
    [0.0, 1.0, 5.0]
    """
    given = {"hidden": hidden, "offsets": offsets, "source": source, "new_offsets": new_offsets, "out": out}
    checked = _checked_move(given)
    raw("gather_rows", backend, out.device)(*checked)


@not_traced
def _checked_move(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    op = "gather_rows"
    GATHER_ROWS.check(op, given)
    ready = GATHER_ROWS.ready(op, given)
    hidden, offsets, source, new_offsets, out = ready.values()
    if out.device.type == "cpu":
        check_offsets(op, offsets, tokens=hidden.shape[0])
        check_offsets(op, new_offsets, tokens=out.shape[0], name="new_offsets")
        check_moves(op, offsets, source, new_offsets)
    return tuple(ready.values())
