"""Embeddings of the packed tokens, whose number only the device knows: rows of tables, added and normalised."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.checks import FLOATS, INT64, check_apart, check_present, check_tensor, not_traced
from earlyexit_kernels.ops.rows_add_norm import MAX_WARPS, WARP_WIDTH, normed
from earlyexit_kernels.ops.schema import ROWS_EMBED, bare_op, define


@jit
def embedding(table, index, ROWS: tl.constexpr, h, H: tl.constexpr):
    """Return a row of a table as float32, or NaN where the table does not have it."""
    i = tl.load(index)
    end = tl.where((i >= 0) & (i < ROWS), H, 0)
    return tl.load(table + i * H + h, mask=h < end, other=float("nan")).to(tl.float32)


@jit
def rows_embed_kernel(
    tokens,  # [4, T] int64: ids, positions, types, columns
    words,  # [WORDS, H]
    positions,  # [POSITIONS, H], read with POSITIONS > 0
    types,  # [TYPES, H], read with TYPES > 0
    weight,  # [H]
    bias,  # [H]
    offsets,  # [R + 1] int32
    out,  # [T, H]
    rows,  # R
    capacity,  # T
    EPS: tl.constexpr,
    WORDS: tl.constexpr,
    POSITIONS: tl.constexpr,
    TYPES: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    if token < tl.load(offsets + rows) - tl.load(offsets):
        h = tl.arange(0, BLOCK)
        real = h < H
        y = embedding(words, tokens + token, WORDS, h, H)
        if TYPES:
            y += embedding(types, tokens + token + 2 * capacity, TYPES, h, H)
        if POSITIONS:
            y += embedding(positions, tokens + token + capacity, POSITIONS, h, H)
        y = tl.where(real, y, 0.0)
        y = normed(y, weight, bias, h, EPS, H)
        tl.store(out + token * H + h, y.to(out.dtype.element_ty), mask=real)


def rows_embed_triton(
    tokens: Tensor,
    words: Tensor,
    positions: Tensor | None,
    types: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    offsets: Tensor,
    out: Tensor,
) -> None:
    """Launch `rows_embed_kernel` with one program per token of the capacity."""
    capacity, width = out.shape
    block = 1 << (width - 1).bit_length()
    if out.numel():
        rows_embed_kernel[(capacity,)](
            tokens,
            words,
            words if positions is None else positions,
            words if types is None else types,
            weight,
            bias,
            offsets,
            out,
            offsets.numel() - 1,
            capacity,
            EPS=eps,
            WORDS=words.shape[0],
            POSITIONS=0 if positions is None else positions.shape[0],
            TYPES=0 if types is None else types.shape[0],
            H=width,
            BLOCK=block,
            num_warps=max(1, min(MAX_WARPS, block // WARP_WIDTH)),
            enable_fp_fusion=False,
        )


@torch.no_grad()
def rows_embed_torch(
    tokens: Tensor,
    words: Tensor,
    positions: Tensor | None,
    types: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    offsets: Tensor,
    out: Tensor,
) -> None:
    """`rows_embed` in torch, the reference of the Triton back-end; synchronises to read the token count."""
    present = int(offsets[-1]) - int(offsets[0])
    ids, places, kinds, _ = tokens[:, :present]
    y = _embedding(words, ids)
    for table, index in ((types, kinds), (positions, places)):
        if table is not None:
            y = y + _embedding(table, index)
    out[:present] = F.layer_norm(y, out.shape[1:], weight.float(), bias.float(), eps).to(out.dtype)


def _embedding(table: Tensor, index: Tensor) -> Tensor:
    """Return rows of a table as float32, and NaN for those that it does not have."""
    outside = (index < 0) | (index >= table.shape[0])
    return table[index.masked_fill(outside, 0)].float().masked_fill(outside[:, None], torch.nan)


define(
    "rows_embed",
    ROWS_EMBED,
    implementations={"torch": rows_embed_torch, "triton": rows_embed_triton},
    compiled_for=("cpu",),
)


def rows_embed(
    tokens: Tensor,
    words: Tensor,
    positions: Tensor | None,
    types: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    offsets: Tensor,
    out: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Write ``layer_norm(words[id] + types[type] + positions[position])`` of the present tokens.

    Sum, mean and variance are float32. With Triton and C++ the result of a token does not depend on other tokens,
    bit for bit.

    Args:
        tokens: ``[4, T]`` int64, as `pack_tokens` writes it: ids, positions, types and columns, of which the last are
            not read; the present tokens first, ``offsets[-1] - offsets[0]`` of them.
        words: ``[V, H]``, an embedding for each id; float32, float16 or bfloat16, like all tensors but `tokens` and
            `offsets`.
        positions: ``[P, H]``, or None: they are not added.
        types: ``[Y, H]``, or None: they are not added.
        weight, bias: ``[H]``, of the norm.
        eps: of the norm.
        offsets: ``[R + 1]`` int32, non-decreasing.
        out: ``[T, H]``. **Changed** for the present tokens.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"cpp"`` (on the CPU).

    On CUDA the values of `offsets` and `tokens` are not checked, since that would synchronise: there a token that a
    table does not have becomes NaN, and the exits count its row as invalid.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not match, or `out` overlaps another tensor; on the CPU also a present
            token that is not in a table.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> tokens, words = torch.tensor([[1, 0], [0, 1], [0, 0], [0, 1]]), torch.tensor([[0.0, 4.0], [5.0, 1.0]])
    >>> offsets, out = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2, 2)
    >>> ee.ops.rows_embed(tokens, words, None, None, torch.ones(2), torch.zeros(2), 0.0, offsets, out)
    >>> out.tolist()
    [[1.0, -1.0], [0.0, 0.0]]
    """
    op = "rows_embed"
    given = _checked(op, tokens, {"words": words, "positions": positions, "types": types}, weight, bias, offsets, out)
    tokens, tables, weight, bias, offsets = given
    bare_op(op, backend, out.device)(tokens, *tables, weight, bias, eps, offsets, out)


@not_traced
def _checked(
    op: str,
    tokens: Tensor,
    tables: dict[str, Tensor | None],
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    out: Tensor,
) -> tuple[Any, ...]:
    check_tensor(op, "out", out, (None, None), FLOATS, written=True)
    (capacity, width), device, dtypes = out.shape, out.device, (out.dtype,)
    check_tensor(op, "tokens", tokens, (4, capacity), INT64, device=device)
    for name, table in tables.items():
        if table is not None or name == "words":
            check_tensor(op, name, table, (None, width), dtypes, device=device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_tensor(op, name, tensor, (width,), dtypes, device=device)
    check_present(op, offsets, None, capacity=capacity, device=device)
    if device.type == "cpu":
        _check_indices(op, tokens[:, : int(offsets[-1]) - int(offsets[0])], tables)
    given = {"tokens": tokens, **tables, "weight": weight, "bias": bias, "offsets": offsets}
    read: dict[str, Any] = {name: None if x is None else x.contiguous() for name, x in given.items()}
    check_apart(op, {"out": out}, read)
    return read["tokens"], [read[name] for name in tables], read["weight"], read["bias"], read["offsets"]


def _check_indices(op: str, present: Tensor, tables: dict[str, Tensor | None]) -> None:
    """Raise ValueError if a table does not have a present token."""
    if not present.numel():
        return
    for (name, table), index in zip(tables.items(), present, strict=False):
        if table is not None and not 0 <= int(index.min()) <= int(index.max()) < table.shape[0]:
            raise ValueError(
                f"{op}: expected indices of {name} in [0, {table.shape[0] - 1}], got {int(index.min())} to "
                f"{int(index.max())}"
            )
