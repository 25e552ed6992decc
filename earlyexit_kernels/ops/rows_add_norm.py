"""Residual and layer norm of the tokens present, whose number only the device knows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import jit, resolve, tl
from earlyexit_kernels.ops.checks import FLOATS, check_apart, check_present, check_tensor
from earlyexit_kernels.ops.schema import PYTHON_BACK_ENDS, ROWS_ADD_NORM, define

#: Values of a token for each warp that shares it, and warps at most.
WARP_WIDTH, MOST_WARPS = 256, 8


@jit
def rows_add_norm_kernel(
    x,  # [T, H]
    residual,  # [T, H], or [2 T, H]
    weight,  # [H]
    bias,  # [H]
    offsets,  # [R + 1] int32
    out,  # [T, H], or [2 T, H]
    rows,  # R
    EPS: tl.constexpr,
    RESIDUAL_ABSOLUTE: tl.constexpr,
    OUT_ABSOLUTE: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token, which holds all of it."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets)
    if token < tl.load(offsets + rows) - first:
        h = tl.arange(0, BLOCK)
        real = h < H
        source = token
        target = token
        if RESIDUAL_ABSOLUTE:
            source = token + first
        if OUT_ABSOLUTE:
            target = token + first
        y = tl.load(x + token * H + h, mask=real, other=0.0).to(tl.float32)
        y += tl.load(residual + source * H + h, mask=real, other=0.0).to(tl.float32)
        y = tl.where(real, y - tl.sum(y, 0) / H, 0.0)
        y = y / tl.sqrt(tl.sum(y * y, 0) / H + EPS)
        y = y * tl.load(weight + h, mask=real, other=0.0).to(tl.float32)
        y = y + tl.load(bias + h, mask=real, other=0.0).to(tl.float32)
        tl.store(out + target * H + h, y.to(out.dtype.element_ty), mask=real)


def rows_add_norm_triton(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    offsets: Tensor,
    out: Tensor,
    residual_absolute: bool,
    out_absolute: bool,
) -> None:
    """Launch `rows_add_norm_kernel`, a program for each token there can be."""
    capacity, width = x.shape
    block = 1 << (width - 1).bit_length()
    if x.numel():
        rows_add_norm_kernel[(capacity,)](
            x,
            residual,
            weight,
            bias,
            offsets,
            out,
            offsets.numel() - 1,
            EPS=eps,
            RESIDUAL_ABSOLUTE=residual_absolute,
            OUT_ABSOLUTE=out_absolute,
            H=width,
            BLOCK=block,
            num_warps=max(1, min(MOST_WARPS, block // WARP_WIDTH)),
            enable_fp_fusion=False,
        )


@torch.no_grad()
def rows_add_norm_torch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    offsets: Tensor,
    out: Tensor,
    residual_absolute: bool,
    out_absolute: bool,
) -> None:
    """`rows_add_norm` in torch, the reference of the other back-end; it reads the count."""
    first, end = int(offsets[0]), int(offsets[-1])
    absolute, relative = slice(first, end), slice(0, end - first)
    source, target = (absolute if there else relative for there in (residual_absolute, out_absolute))
    y = x[relative].float() + residual[source].float()
    out[target] = F.layer_norm(y, x.shape[1:], weight.float(), bias.float(), eps).to(out.dtype)


_ROWS_ADD_NORM = define(
    "rows_add_norm",
    ROWS_ADD_NORM,
    implementations={"torch": rows_add_norm_torch, "triton": rows_add_norm_triton},
    back_ends=PYTHON_BACK_ENDS,
)


def rows_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    offsets: Tensor,
    out: Tensor,
    *,
    residual_absolute: bool = False,
    out_absolute: bool = False,
    backend: str = "auto",
) -> None:
    """Write ``layer_norm(x + residual)`` of the tokens present, ``offsets[-1] - offsets[0]`` of them.

    Args:
        x: ``[T, H]``, the tokens present first; float32, float16 or bfloat16.
        residual: ``[T, H]`` likewise, or with `residual_absolute` ``[2 T, H]``, where they start at ``offsets[0]``.
        weight, bias: ``[H]``, of the norm.
        eps: of the norm.
        offsets: ``[R + 1]`` int32. On CUDA they are trusted, since looking would cost a synchronisation.
        out: as `residual`, with `out_absolute`; it may be `x` or `residual` itself, where a token has the same place
            in both. **Changed** for the tokens present.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: shapes, dtypes or devices don't fit.
        BackendUnavailableError: `backend` can't run here.

    All tensors but `offsets` have the dtype of `x`; sum, mean and variance are float32. In triton a token is one
    program's, so its bits depend on nothing but the token.
    """
    op = "rows_add_norm"
    check_tensor(op, "x", x, (None, None), FLOATS)
    (capacity, width), device = x.shape, x.device
    for name, tensor, shape in (
        ("residual", residual, (2 * capacity if residual_absolute else capacity, width)),
        ("weight", weight, (width,)),
        ("bias", bias, (width,)),
        ("out", out, (2 * capacity if out_absolute else capacity, width)),
    ):
        check_tensor(op, name, tensor, shape, (x.dtype,), written=name == "out", device=device)
    check_present(op, offsets, None, capacity=capacity, device=device)
    x, residual, weight, bias, offsets = (tensor.contiguous() for tensor in (x, residual, weight, bias, offsets))
    read = {"weight": weight, "bias": bias, "offsets": offsets}
    for name, tensor, absolute in (("x", x, False), ("residual", residual, residual_absolute)):
        if tensor.data_ptr() != out.data_ptr() or absolute != out_absolute:
            read[name] = tensor
    check_apart(op, {"out": out}, read)
    _ROWS_ADD_NORM[resolve(backend, device.type, PYTHON_BACK_ENDS)](
        x, residual, weight, bias, eps, offsets, out, residual_absolute, out_absolute
    )
