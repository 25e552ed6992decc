"""Residual and layer norm of the present tokens, whose number only the device knows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.checks import FLOAT32, FLOATS, check_apart, check_present, check_tensor, not_traced
from earlyexit_kernels.ops.schema import ROWS_ADD_NORM, bare_op, define
from earlyexit_kernels.ops.tiles import SUM_PARTS, looping_programs

#: Values of a token per warp, and the maximum number of warps.
WARP_WIDTH, MAX_WARPS = 256, 16
#: Warps of a multiprocessor that have room for their registers: up to this width, and of wider norms.
NARROW, RESIDENT_WARPS, WIDE_RESIDENT_WARPS = 1024, 64, 48


@jit
def normed(y, weight, bias, h, EPS: tl.constexpr, H: tl.constexpr):
    """Return the layer norm of the first H of the values `y`, which are 0 after those."""
    real = h < H
    y = tl.where(real, y - tl.sum(y, 0) / H, 0.0)
    y = y / tl.sqrt(tl.sum(y * y, 0) / H + EPS)
    y = y * tl.load(weight + h, mask=real, other=0.0).to(tl.float32)
    return y + tl.load(bias + h, mask=real, other=0.0).to(tl.float32)


@jit
def rows_add_norm_kernel(
    x,  # [T, H], or [PARTS, T, H] float32; not read with PARTS = 0
    x_bias,  # [H], read with PARTS > 1
    residual,  # [T, H], or [2 T, H]
    weight,  # [H]
    bias,  # [H]
    offsets,  # [R + 1] int32
    out,  # [T, H], or [2 T, H]
    total,  # like residual; written with HAS_TOTAL
    rows,  # R
    capacity,  # T
    HAS_TOTAL: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL_ABSOLUTE: tl.constexpr,
    OUT_ABSOLUTE: tl.constexpr,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Persistent programs, which loop over the present tokens."""
    first = tl.load(offsets)
    present = tl.load(offsets + rows) - first
    h = tl.arange(0, BLOCK)
    real = h < H
    for number in tl.range(tl.program_id(0), present, tl.num_programs(0), disable_licm=True):
        token = tl.cast(number, tl.int64)
        source = token
        target = token
        if RESIDUAL_ABSOLUTE:
            source = token + first
        if OUT_ABSOLUTE:
            target = token + first
        if PARTS == 0:
            y = tl.zeros((BLOCK,), dtype=tl.float32)
        elif PARTS == 1:
            y = tl.load(x + token * H + h, mask=real, other=0.0).to(tl.float32)
        else:
            y = tl.zeros((BLOCK,), dtype=tl.float32)
            for part in tl.static_range(PARTS):
                y += tl.load(x + (token + part * capacity) * H + h, mask=real, other=0.0)
            y += tl.load(x_bias + h, mask=real, other=0.0).to(tl.float32)
            y = y.to(out.dtype.element_ty).to(tl.float32)
        y += tl.load(residual + source * H + h, mask=real, other=0.0).to(tl.float32)
        if HAS_TOTAL:
            rounded = y.to(total.dtype.element_ty)
            tl.store(total + source * H + h, rounded, mask=real)
            y = rounded.to(tl.float32)
        y = normed(y, weight, bias, h, EPS, H)
        tl.store(out + target * H + h, y.to(out.dtype.element_ty), mask=real)


def rows_add_norm_triton(
    x: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    offsets: Tensor,
    out: Tensor,
    residual_absolute: bool,
    out_absolute: bool,
    total: Tensor | None = None,
) -> None:
    """Launch `rows_add_norm_kernel`."""
    capacity, width = out.shape[0] // (2 if out_absolute else 1), out.shape[1]
    block = 1 << (width - 1).bit_length()
    warps = max(1, min(MAX_WARPS, block // WARP_WIDTH))
    resident = (RESIDENT_WARPS if block <= NARROW else WIDE_RESIDENT_WARPS) // warps
    if out.numel():
        rows_add_norm_kernel[(looping_programs(capacity, resident, out.device),)](
            residual if x is None else x,
            bias if x_bias is None else x_bias,
            residual,
            weight,
            bias,
            offsets,
            out,
            out if total is None else total,
            offsets.numel() - 1,
            capacity,
            HAS_TOTAL=total is not None,
            EPS=eps,
            RESIDUAL_ABSOLUTE=residual_absolute,
            OUT_ABSOLUTE=out_absolute,
            PARTS=0 if x is None else SUM_PARTS if x.dim() == 3 else 1,
            H=width,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,
        )


@torch.no_grad()
def rows_add_norm_torch(
    x: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    offsets: Tensor,
    out: Tensor,
    residual_absolute: bool,
    out_absolute: bool,
    total: Tensor | None = None,
) -> None:
    """`rows_add_norm` in torch, the reference of the Triton back-end; synchronises to read the token count."""
    first, end = int(offsets[0]), int(offsets[-1])
    absolute, relative = slice(first, end), slice(0, end - first)
    source, target = (absolute if there else relative for there in (residual_absolute, out_absolute))
    y = residual[source].float()
    if x_bias is not None and x is not None:
        y = (sum(x[:, relative].unbind()) + x_bias.float()).to(out.dtype).float() + y
    elif x is not None:
        y = x[relative].float() + y
    if total is not None:
        total[source] = y.to(total.dtype)
        y = total[source].float()
    out[target] = F.layer_norm(y, out.shape[1:], weight.float(), bias.float(), eps).to(out.dtype)


define("rows_add_norm", ROWS_ADD_NORM, implementations={"torch": rows_add_norm_torch, "triton": rows_add_norm_triton})


def rows_add_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    offsets: Tensor,
    out: Tensor,
    *,
    x_bias: Tensor | None = None,
    residual_absolute: bool = False,
    out_absolute: bool = False,
    total: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write ``layer_norm(x + residual)`` of the present tokens, the first ``offsets[-1] - offsets[0]`` of `x`.

    Sum, mean and variance are float32. With Triton the result of a token does not depend on other tokens, bit for bit.

    Args:
        x: ``[T, H]``, the present tokens first; float32, float16 or bfloat16, like all tensors but `offsets`. With
            `x_bias` ``[SUM_PARTS, T, H]`` float32, the parts of a product that `rows_linear` has summed. None adds
            nothing: the norm is that of `residual`.
        residual: ``[T, H]``, the present tokens first; with `residual_absolute` ``[2 T, H]``, from ``offsets[0]`` on.
        weight, bias: ``[H]``, of the norm.
        eps: of the norm.
        offsets: ``[R + 1]`` int32, non-decreasing. On CUDA the values are not checked, since that would synchronise.
        out: shaped like `residual`, with `out_absolute`; it may be `x` or `residual` itself if a token has the same
            position in both. **Changed** for the present tokens.
        x_bias: ``[H]``, of the product of which `x` holds the parts. Their sum and the bias are rounded to the dtype of
            `out`, as by `rows_linear`, before the residual is added.
        total: shaped like `residual`, which it may be, or None. **Changed** for the present tokens to ``x + residual``,
            with which pre-norm layers go on; the norm is then that of the rounded sum.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not match, or `out` overlaps another tensor.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> x, residual, out = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2)
    >>> offsets = torch.tensor([0, 1], dtype=torch.int32)
    >>> ee.ops.rows_add_norm(x, residual, torch.ones(2), torch.zeros(2), 0.0, offsets, out)
    >>> out.tolist()
    [[-1.0, 1.0]]
    """
    op = "rows_add_norm"
    absolute = residual_absolute, out_absolute
    x, x_bias, residual, weight, bias, offsets = _checked(
        op, x, x_bias, residual, weight, bias, offsets, out, total, absolute
    )
    bare_op(op, backend, out.device)(x, x_bias, residual, weight, bias, eps, offsets, out, *absolute, total)


@not_traced
def _checked(
    op: str,
    x: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    out: Tensor,
    total: Tensor | None,
    absolute: tuple[bool, bool],
) -> tuple[Any, ...]:
    parts = x_bias is not None
    if parts:
        check_tensor(op, "x", x, (SUM_PARTS, None, None), FLOAT32)
    elif x is not None:
        check_tensor(op, "x", x, (None, None), FLOATS)
    check_tensor(op, "residual", residual, (None, None), FLOATS if x is None or parts else (x.dtype,))
    capacity = residual.shape[0] // 2 if absolute[0] else residual.shape[0]
    width, device = residual.shape[1], residual.device
    if x is not None:
        (capacity, width), device, x = x.shape[-2:], x.device, x.contiguous()
    residual_rows, out_rows = (2 * capacity if each else capacity for each in absolute)
    shapes = {"residual": (residual_rows, width), "weight": (width,), "bias": (width,), "out": (out_rows, width)}
    given = {"residual": residual, "weight": weight, "bias": bias, "out": out}
    if total is not None:
        shapes, given = {**shapes, "total": shapes["residual"]}, {**given, "total": total}
    for name, shape in shapes.items():
        written = name in ("out", "total")
        check_tensor(op, name, given[name], shape, (residual.dtype,), written=written, device=device)
    if x_bias is not None:
        check_tensor(op, "x_bias", x_bias, (width,), (residual.dtype,), device=device)
        x_bias = x_bias.contiguous()
    check_present(op, offsets, None, capacity=capacity, device=device)
    residual, weight, bias, offsets = (tensor.contiguous() for tensor in (residual, weight, bias, offsets))
    read = {"x_bias": x_bias, "weight": weight, "bias": bias, "offsets": offsets}
    # in place: a token is written where it was read
    if x is not None and (x.data_ptr() != out.data_ptr() or absolute[1] or parts):
        read["x"] = x
    if residual.data_ptr() != out.data_ptr() or absolute[0] != absolute[1]:
        read["residual"] = residual
    if total is not None and residual.data_ptr() == total.data_ptr():
        read.pop("residual", None)
    check_apart(op, {"out": out, "total": total}, read)
    return x, x_bias, residual, weight, bias, offsets
