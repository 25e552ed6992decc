"""One criterion at a middle layer, ready to be timed; all benchmarks of a decision start from it.

Rows have passed five exits, which left their state. All of them are live, so that every call does the work of a whole
batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.criteria import Criterion, Dact
from earlyexit_kernels.ops import raw
from earlyexit_kernels.tuning.settings import settings
from earlyexit_kernels.types import AUX_ACTIVATIONS, ExitTrace, read_aux

CLASSES, DEPTH, LAYER = 3, 12, 6


class Head(NamedTuple):
    """A linear exit on packed tokens ``[T, H]`` with their offsets ``[B + 1]``, as `exit_step` takes it."""

    hidden: Tensor
    offsets: Tensor
    weight: Tensor
    bias: Tensor
    pooling: str


def untimeable(device: str) -> dict[str, str]:
    """Return back-end -> why it cannot be timed on a kind of device; empty if it can."""
    reasons = available_backends(device)
    if device == "cpu":
        reasons["triton"] = "no GPU; the interpreter's time says nothing of the kernel's"
    return reasons


def random_trace(rows: int, classes: int = CLASSES, device: str = "cpu") -> ExitTrace:
    """Return exits that mostly agree from layer to layer, with every scalar that a criterion may read."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    logits = 2 * normal(rows, 1, classes) + normal(rows, DEPTH, classes)
    drawn = {name: normal(rows, DEPTH) - 1.5 for name in AUX_ACTIVATIONS}
    drawn["hidden_cosine"] = drawn["hidden_cosine"].tanh()
    aux = {name: values.to(device) for name, values in drawn.items()}
    return ExitTrace(logits.to(device), aux, torch.arange(rows, device=device))


def middle_settings(trace: ExitTrace) -> dict[str, Criterion]:
    """Return every criterion that decides at a middle layer, in the middle of its grid; DACT without a threshold."""
    found = {name: group[len(group) // 2] for name, group in settings(trace).items()}
    return {**found, "dact": Dact()}


def head_giving(logits: Tensor, width: int, length: int, pooling: str) -> Head:
    """Return random hidden states and a random linear exit whose logits are `logits` ``[B, C]`` up to rounding.

    Args:
        logits: on the device to be used.
        width, length: H, and S tokens in every row.
        pooling: ``"first"`` or ``"mean"``.
    """
    (rows, classes), device = logits.shape, logits.device
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(classes, width, generator=generator).to(device) / math.sqrt(width)
    bias = torch.randn(classes, generator=generator).to(device)
    hidden = torch.randn(rows, length, width, generator=generator).to(device)
    missing = logits - F.linear(hidden[:, 0] if pooling == "first" else hidden.mean(dim=1), weight, bias)
    hidden += (missing @ torch.linalg.pinv(weight).T)[:, None]
    return Head(hidden.view(-1, width), even_offsets(rows, length, device), weight, bias, pooling)


def even_offsets(rows: int, length: int, device: torch.device | str) -> Tensor:
    """Return the offsets ``[B + 1]`` int32 of rows of one length."""
    return torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)


class Decision:
    """A criterion at the middle layer, on copies of one batch.

    The op is called as the engine calls it, without `exit_step`'s checks. A call runs it on each copy of row ids, state
    and answers; `restore` puts them back.

    Args:
        rule: the criterion.
        trace: of the batch, on the device.
        backend: of the op.
        calls: copies of the batch.
        head: computes the logits of the middle layer; None takes them from the trace.
        apart: whether each copy has hidden states of its own, which then come from memory.
    """

    def __init__(
        self,
        rule: Criterion,
        trace: ExitTrace,
        backend: str,
        calls: int = 16,
        head: Head | None = None,
        *,
        apart: bool = False,
    ) -> None:
        (rows, _, classes), device = trace.logits.shape, trace.logits.device
        self.rule, self.op = rule, raw("exit_step", backend, device.type)
        self.logits = [trace.logits[:, k].contiguous() for k in range(DEPTH)]
        values = None if rule.needs is None else read_aux(trace.aux[rule.needs], rule.needs)
        self.aux = [None if values is None else values[:, k].contiguous() for k in range(DEPTH)]
        ready = (None, None, None, None, self.logits[LAYER - 1])
        inputs = (*(ready if head is None else (*head[:4], None)), self.aux[LAYER - 1])
        self.inputs = [(inputs[0].clone(), *inputs[1:]) if apart and head else inputs for _ in range(calls)]
        self.tail = (rule.name, rule.params(LAYER), "none" if head is None else head.pooling, LAYER, DEPTH)
        ids = torch.arange(rows, dtype=torch.int32, device=device)
        answers = torch.zeros(rows, classes, device=device)
        exit_layer = torch.zeros(rows, dtype=torch.int64, device=device)
        state = rule.new_state(rows, device, classes, trace.keys)
        for layer in range(1, LAYER):
            self._decide(layer, (ids.clone(), state, answers, exit_layer))
        self.before = (ids, state, answers, exit_layer)
        self.copies = [tuple(x.clone() for x in self.before) for _ in range(calls)]
        self.counts = self._decide(LAYER, self.copies[0])
        self.left = rows - int(self.counts[0])

    def _decide(self, layer: int, buffers: tuple[Tensor, ...]) -> Tensor:
        """Decide from ready logits at any layer."""
        given = (None, None, None, None, self.logits[layer - 1], self.aux[layer - 1])
        return self.op(*given, *buffers, self.rule.name, self.rule.params(layer), "none", layer, DEPTH)

    def restore(self) -> None:
        """Restore every copy to its state before the layer."""
        for copy in self.copies:
            for x, before in zip(copy, self.before, strict=True):
                x.copy_(before)

    def once(self, number: int) -> Tensor:
        """Decide on one of the copies; return the counts."""
        return self.op(*self.inputs[number], *self.copies[number], *self.tail)

    def __call__(self) -> Tensor:
        """Decide once on each copy; return the counts of the last one."""
        op, tail = self.op, self.tail
        for inputs, copy in zip(self.inputs, self.copies, strict=True):
            counts = op(*inputs, *copy, *tail)
        return counts
