"""One rule at a middle layer, ready to be timed: what every microbenchmark of a decision starts from.

Rows have been through five exits, which left their state; all of them are still present, so that every timing does the
work of a whole batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.criteria import Criterion, Dact
from earlyexit_kernels.ops import exit_step_op
from earlyexit_kernels.tuning.grids import settings
from earlyexit_kernels.types import AUX_ACTIVATIONS, ExitTrace, read_aux

CLASSES, DEPTH, LAYER = 3, 12, 6


class Outcome(NamedTuple):
    """What a decision did, and what came of it at the layers that remain, where a state written wrongly shows.

    Attributes:
        left: ``[B]``, rows that left at the middle layer.
        live: how many rows it counted as live.
        answers, exit_layer: ``[B, C]`` and ``[B]`` after the last layer.
    """

    left: Tensor
    live: int
    answers: Tensor
    exit_layer: Tensor


class Head(NamedTuple):
    """A linear exit on packed tokens ``[T, H]`` with their offsets ``[B + 1]``, as `exit_step` takes it."""

    hidden: Tensor
    offsets: Tensor
    weight: Tensor
    bias: Tensor
    pooling: str


def untimeable(device: str) -> dict[str, str]:
    """Back-end -> why it can't be timed on a kind of device, ``""`` where it can."""
    reasons = available_backends(device)
    if device == "cpu":
        reasons["triton"] = "no GPU; the interpreter's time says nothing of the kernel's"
    return reasons


def random_trace(rows: int, classes: int = CLASSES) -> ExitTrace:
    """Exits that mostly agree from layer to layer, with every scalar a rule may read."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    logits = 2 * normal(rows, 1, classes) + normal(rows, DEPTH, classes)
    raw = {name: normal(rows, DEPTH) - 1.5 for name in AUX_ACTIVATIONS}
    raw["hidden_cosine"] = raw["hidden_cosine"].tanh()
    return ExitTrace(logits, raw, torch.arange(rows))


def on_device(trace: ExitTrace, device: str) -> ExitTrace:
    """The trace on another device."""
    aux = {name: values.to(device) for name, values in trace.aux.items()}
    keys = None if trace.keys is None else trace.keys.to(device)
    return ExitTrace(trace.logits.to(device), aux, keys)


def middle_settings(trace: ExitTrace) -> dict[str, Criterion]:
    """Every rule that decides at a middle layer, at the middle of its grid; DACT without a threshold."""
    found = {name: group[len(group) // 2] for name, group in settings(trace).items()}
    return {**found, "dact": Dact()}


def head_giving(logits: Tensor, width: int, length: int, pooling: str) -> Head:
    """Random hidden states and a random linear exit whose logits are `logits` ``[B, C]`` up to rounding.

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
    """Offsets ``[B + 1]`` int32 of rows of one length."""
    return torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)


def aux_of(rule: Criterion, trace: ExitTrace) -> list[Tensor | None]:
    """The scalar ``[B]`` that a rule reads, layer by layer."""
    if rule.needs is None:
        return [None] * trace.depth
    values = read_aux(trace.aux[rule.needs], rule.needs)
    return [values[:, k].contiguous() for k in range(trace.depth)]


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of some tensors together."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


class Decision:
    """One rule at the middle layer, on copies of one batch.

    The op is called as the engine calls it, without `exit_step`'s checks. One timing runs it on many copies of row ids,
    state and answers, so that each call finds its rows present; `restore` puts them back outside of the clock.

    Args:
        rule: the criterion.
        trace: of the batch, on the device.
        backend: of the op.
        calls: copies of the batch, and calls of the op in one timing.
        head: what gives the logits of the middle layer; None takes them ready from the trace.
    """

    def __init__(
        self, rule: Criterion, trace: ExitTrace, backend: str, calls: int = 16, head: Head | None = None
    ) -> None:
        (rows, _, classes), device = trace.logits.shape, trace.logits.device
        self.rule, self.op = rule, exit_step_op(backend, device.type)
        self.logits = [trace.logits[:, k].contiguous() for k in range(DEPTH)]
        self.aux = aux_of(rule, trace)
        ready = (None, None, None, None, self.logits[LAYER - 1])
        self.inputs = (*(ready if head is None else (*head[:4], None)), self.aux[LAYER - 1])
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
        logits, aux, rule = self.logits[layer - 1], self.aux[layer - 1], self.rule
        return self.op(
            None, None, None, None, logits, aux, *buffers, rule.name, rule.params(layer), "none", layer, DEPTH
        )

    def restore(self) -> None:
        """Put every copy back to what it was before the layer."""
        for copy in self.copies:
            for x, before in zip(copy, self.before, strict=True):
                x.copy_(before)

    def __call__(self) -> Tensor:
        """Decide once on each copy; the counts of the last one."""
        op, inputs, tail = self.op, self.inputs, self.tail
        for copy in self.copies:
            counts = op(*inputs, *copy, *tail)
        return counts

    def kept_bytes(self) -> int:
        """Bytes of a call that lie in what the loop keeps: row ids and state read, and written the state, the rows that
        leave, and the counts."""
        ids, state, answers, exit_layer = self.before
        return nbytes(ids, state, state) + self.left * nbytes(ids[0], answers[0], exit_layer[0]) + nbytes(self.counts)

    def moved_bytes(self) -> int:
        """Bytes that a call has to move, its input read once and its output written once."""
        hidden, *others = self.inputs
        if hidden is not None and self.tail[2] == "first":
            hidden = hidden[: len(self.before[0])]
        return self.kept_bytes() + nbytes(hidden, *others)

    def outcome(self) -> Outcome:
        """Run what is timed, then the layers that remain on the copy that came last."""
        self.restore()
        live = int(self()[0])
        row_ids, _, answers, exit_layer = buffers = self.copies[-1]
        left = row_ids < 0
        for layer in range(LAYER + 1, DEPTH + 1):
            self._decide(layer, buffers)
        return Outcome(left, live, answers.clone(), exit_layer.clone())
