"""Compaction: the rows still live move together, in order, and their tokens into a second buffer.

`compact` plans (new row ids, new offsets, where each row came from), `gather_rows` copies. Criterion state, answers and
exit layers stay where they are: they are indexed by the request's rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, resolve, tl
from earlyexit_kernels.ops.checks import (
    COPIED,
    INT32,
    check_apart,
    check_moves,
    check_offsets,
    check_row_count,
    check_row_ids,
    check_tensor,
)
from earlyexit_kernels.ops.schema import COMPACT, GATHER_ROWS, define

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
    """A stable exclusive scan of rows and tokens; one program walks the batch block by block."""
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
    """One program for each new row and slice of the width; it walks the row's tokens."""
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


_COMPACT = define(
    "compact", COMPACT, fake=_fake_compact, implementations={"torch": compact_torch, "triton": compact_triton}
)
GATHER_ROWS_OPS = define(
    "gather_rows",
    GATHER_ROWS,
    implementations={"torch": gather_rows_torch, "triton": gather_rows_triton},
)


def compact(row_ids: Tensor, offsets: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Plan a stable compaction of the rows still live.

    Args:
        row_ids: ``[B]`` int32, -1 for a row that has left; the others differ from each other.
        offsets: ``[B + 1]`` int32 that never decrease, from 0 or above. On CUDA ids and offsets are trusted, since
            looking would cost a synchronisation.
        backend: as in `exit_step`.

    Returns:
        new row ids ``[B]`` (live ones first, in order, then -1), new offsets ``[B + 1]`` (live segments back to back,
        constant after them), source ``[B]`` (the old index of each new row, -1 after them); all int32.

    Raises:
        ValueError: shapes, dtypes or devices don't fit; on the CPU also a row id that stands twice, and offsets that
            decrease.
        BackendUnavailableError: `backend` can't run here.
    """
    check_tensor("compact", "row_ids", row_ids, (None,), INT32)
    check_tensor("compact", "offsets", offsets, (row_ids.shape[0] + 1,), INT32, device=row_ids.device)
    check_row_count("compact", row_ids.shape[0])
    if row_ids.device.type == "cpu":
        check_row_ids("compact", row_ids, requests=None)
        check_offsets("compact", offsets, tokens=None)
    return _COMPACT[resolve(backend, row_ids.device.type)](row_ids.contiguous(), offsets.contiguous())


def gather_rows(
    hidden: Tensor, offsets: Tensor, source: Tensor, new_offsets: Tensor, out: Tensor, *, backend: str = "auto"
) -> None:
    """Copy the tokens of the rows named by `source` into a second buffer.

    Args:
        hidden: ``[T, H]`` packed tokens; float32, float16, bfloat16 or float64.
        offsets: ``[B + 1]`` int32 of `hidden`, which never decrease.
        source: ``[B2]`` int32, the index in `hidden` of each new row, -1 for none.
        new_offsets: ``[B2 + 1]`` int32 of `out`, which never decrease and give a row its length in `offsets`. On CUDA
            these three are trusted, since looking would cost a synchronisation.
        out: ``[T2, H]``, dtype of `hidden`, apart from it in memory; T2 at least the live tokens. **Changed** where a
            row has a source; the rest isn't, which is how a part of the rows is put back among the others.
        backend: as in `exit_step`.

    Raises:
        ValueError: shapes, dtypes or devices don't fit, or `out` overlaps another tensor; on the CPU also a source or
            offsets that name no row or no token, or change a row's length.
        BackendUnavailableError: `backend` can't run here.
    """
    op, device = "gather_rows", hidden.device if isinstance(hidden, Tensor) else None
    check_tensor(op, "hidden", hidden, (None, None), COPIED)
    check_tensor(op, "out", out, (None, hidden.shape[1]), (hidden.dtype,), written=True, device=device)
    check_tensor(op, "offsets", offsets, (None,), INT32, device=device)
    check_tensor(op, "source", source, (None,), INT32, device=device)
    check_tensor(op, "new_offsets", new_offsets, (source.shape[0] + 1,), INT32, device=device)
    hidden, offsets, source, new_offsets = (x.contiguous() for x in (hidden, offsets, source, new_offsets))
    named = {"hidden": hidden, "offsets": offsets, "source": source, "new_offsets": new_offsets}
    check_apart(op, {"out": out}, named)
    if hidden.device.type == "cpu":
        check_offsets(op, offsets, tokens=hidden.shape[0])
        check_offsets(op, new_offsets, tokens=out.shape[0], name="new_offsets")
        check_moves(op, offsets, source, new_offsets)
    GATHER_ROWS_OPS[resolve(backend, hidden.device.type)](hidden, offsets, source, new_offsets, out)


def compaction_ops(
    backend: str, device: str
) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., None]]:
    """The bare `compact` and `gather_rows` of a back-end, for a loop that calls them with input it has made itself.

    Args:
        backend: ``"auto"`` or a name.
        device: kind of device, ``"cpu"`` or ``"cuda"``.

    Raises:
        BackendUnavailableError: `backend` can't run there.
    """
    name = resolve(backend, device)
    return _COMPACT[name], GATHER_ROWS_OPS[name]
