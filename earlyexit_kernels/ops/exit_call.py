"""The arguments of `exit_step`, named, in the order of the op's schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ExitCall(NamedTuple):
    """The arguments of the bare op `exit_step`; `ops.exit_step` documents them.

    Attributes:
        criterion: name of the exit rule.
        params: its parameters at this layer.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> logits, row_ids = torch.tensor([[0.0, 9.0]]), torch.tensor([0], dtype=torch.int32)
    >>> written = (torch.zeros(0, 1), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    >>> call = ExitCall(None, None, None, None, logits, None, row_ids, *written, "max_probability", [0.9], "none", 1, 4)
    >>> ee.ops.bare_op("exit_step", "torch", "cpu")(*call).tolist(), call.exit_layer.tolist()
    ([0, 0, 0], [1])
    """

    hidden: Tensor | None
    offsets: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logits: Tensor | None
    aux: Tensor | None
    row_ids: Tensor
    state: Tensor
    answers: Tensor
    exit_layer: Tensor
    criterion: str
    params: Sequence[float]
    pooling: str
    layer: int
    depth: int
