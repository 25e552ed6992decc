"""The product of a gated linear unit of the present tokens, whose number only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.activations import ACTIVATIONS
from earlyexit_kernels.ops.checks import FLOATS, check_apart, check_present, check_tensor, not_traced
from earlyexit_kernels.ops.schema import ROWS_GLU, bare_op, define
from earlyexit_kernels.ops.tiles import looping_programs

#: Maximum number of values of a program at a time, its warps, and programs per multiprocessor. Unmeasured.
MAX_BLOCK, WARPS, RESIDENT = 1024, 4, 16


@jit
def rows_glu_kernel(
    x,  # [T, 2 N]
    offsets,  # [R + 1] int32
    out,  # [T, N]
    rows,  # R
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Persistent programs, which loop over the present tokens and blocks of their columns."""
    present = tl.load(offsets + rows) - tl.load(offsets)
    wide: tl.constexpr = (N + BLOCK - 1) // BLOCK
    for number in tl.range(tl.program_id(0), present * wide, tl.num_programs(0), disable_licm=True):
        token = tl.cast(number // wide, tl.int64)
        n = number % wide * BLOCK + tl.arange(0, BLOCK)
        a = tl.load(x + token * (2 * N) + n, mask=n < N, other=0.0).to(tl.float32)
        b = tl.load(x + token * (2 * N) + N + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out + token * N + n, (ACTIVATION(a) * b).to(out.dtype.element_ty), mask=n < N)


def rows_glu_triton(x: Tensor, offsets: Tensor, out: Tensor, activation: str) -> None:
    """Launch `rows_glu_kernel`."""
    capacity, width = out.shape
    block = min(MAX_BLOCK, 1 << (width - 1).bit_length())
    programs = looping_programs(capacity * -(-width // block), RESIDENT, out.device)
    if programs:
        rows_glu_kernel[(programs,)](
            x,
            offsets,
            out,
            offsets.numel() - 1,
            N=width,
            ACTIVATION=ACTIVATIONS[activation].device,
            BLOCK=block,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


@torch.no_grad()
def rows_glu_torch(x: Tensor, offsets: Tensor, out: Tensor, activation: str) -> None:
    """`rows_glu` in torch, the reference of the Triton back-end; synchronises to read the token count."""
    present = int(offsets[-1]) - int(offsets[0])
    a, b = x[:present].float().chunk(2, dim=1)
    out[:present] = (ACTIVATIONS[activation].reference(a) * b).to(out.dtype)


define("rows_glu", ROWS_GLU, implementations={"torch": rows_glu_torch, "triton": rows_glu_triton})


def rows_glu(x: Tensor, offsets: Tensor, out: Tensor, *, activation: str, backend: str = "auto") -> None:
    """Write ``f(a) b`` of the present tokens, where ``[a, b]`` are the halves of a line of `x`, in float32.

    Args:
        x: ``[T, 2 N]``, the present tokens first, ``offsets[-1] - offsets[0]`` of them; float32, float16 or bfloat16.
        offsets: ``[R + 1]`` int32, non-decreasing. On CUDA the values are not checked, since that would synchronise.
        out: ``[T, N]``, dtype of `x`, not overlapping it. **Changed** for the present tokens.
        activation: as in `rows_linear`.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not match, or `out` overlaps another tensor.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> x, out = torch.tensor([[2.0, -1.0, 5.0, 7.0], [1.0, 1.0, 1.0, 1.0]]), torch.zeros(2, 2)
    >>> ee.ops.rows_glu(x, torch.tensor([0, 1], dtype=torch.int32), out, activation="relu")
    >>> out.tolist()
    [[10.0, 0.0], [0.0, 0.0]]
    """
    op = "rows_glu"
    x, offsets = _checked(op, x, offsets, out, activation)
    bare_op(op, backend, out.device)(x, offsets, out, activation)


@not_traced
def _checked(op: str, x: Tensor, offsets: Tensor, out: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    check_tensor(op, "out", out, (None, None), FLOATS, written=True)
    capacity, width = out.shape
    check_tensor(op, "x", x, (capacity, 2 * width), (out.dtype,), device=out.device)
    check_present(op, offsets, None, capacity=capacity, device=out.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation to be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    x, offsets = x.contiguous(), offsets.contiguous()
    check_apart(op, {"out": out}, {"x": x, "offsets": offsets})
    return x, offsets
