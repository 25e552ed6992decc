"""Replay: apply a criterion to the stored exits of one full-depth pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.core.exits import RequestExits, TraceSource
from earlyexit_kernels.criteria import Criterion, FullDepth, check_fits, check_known, resolve_backend
from earlyexit_kernels.criteria.base import refused_criterion_message
from earlyexit_kernels.ops import raw
from earlyexit_kernels.ops.exit_call import checked_call
from earlyexit_kernels.types import ExitTrace, default_problem_type

#: Rows that are replayed at a time.
BLOCK = 65536
#: Criteria that are applied to a block in turn.
GROUP = 8


def replay(
    trace: ExitTrace, criterion: Criterion | None, *, problem_type: str | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Apply a criterion to a trace, so that a sweep of thresholds costs one pass of the model.

    Args:
        trace: from `model.trace`, or built from stored logits ``[N, L, C]``.
        criterion: the rule, or None for full depth.
        problem_type: as in transformers. Default: that of the trace, and for a trace without one regression if C is 1,
            else single-label classification.
        backend: of the op `exit_step`.

    Returns:
        logits ``[N, C]`` float32 and exit_layer ``[N]`` int64, as the model itself returns them, except for rows whose
        score is within rounding of the threshold: the model's matrix products round depending on the batch.

    Raises:
        ValueError: the trace lacks what the criterion needs, the criterion is not defined for its shape or dtype, or it
            skips layers, the effect of which no trace contains.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> logits = torch.tensor([[[3.0, 0.0], [5.0, 0.0]], [[0.1, 0.0], [0.0, 2.0]]])
    >>> answers, exit_layer = ee.replay(ee.ExitTrace(logits), ee.criteria.MaxProbability(threshold=0.9))
    >>> answers.tolist(), exit_layer.tolist()
    ([[3.0, 0.0], [0.0, 2.0]], [1, 2])
    """
    return next(replay_each(trace, [criterion], problem_type=problem_type, backend=backend))


def replay_each(
    trace: ExitTrace,
    criteria: Iterable[Criterion | None],
    *,
    problem_type: str | None = None,
    backend: str = "auto",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Apply several criteria to a trace, each as `replay` does; faster for many criteria and many rows.

    The trace is read in blocks of `BLOCK` rows, to which `GROUP` criteria in turn are applied, so that a block stays in
    the cache of the processor, and the memory in use does not grow with the number of criteria.

    Args:
        trace, problem_type, backend: as for `replay`.
        criteria: the rules, or None for full depth.

    Yields:
        For each criterion, in order: logits ``[N, C]`` float32 and exit_layer ``[N]`` int64.

    Raises:
        ValueError, BackendUnavailableError: as `replay`.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> trace = ee.ExitTrace(torch.tensor([[[3.0, 0.0], [5.0, 0.0]], [[0.1, 0.0], [0.0, 2.0]]]))
    >>> rules = [ee.criteria.MaxProbability(threshold=t) for t in (0.5, 0.9, 0.99)]
    >>> [exit_layer.tolist() for _, exit_layer in ee.replay_each(trace, rules)]
    [[1, 1], [1, 2], [2, 2]]
    """
    remaining = iter(criteria)
    while group := list(itertools.islice(remaining, GROUP)):
        plans = [_plan(trace, criterion, problem_type, backend) for criterion in group]
        rows, _, classes = trace.logits.shape
        device = trace.logits.device
        answers = [torch.empty(rows, classes, dtype=torch.float32, device=device) for _ in plans]
        layers = [torch.empty(rows, dtype=torch.int64, device=device) for _ in plans]
        for first in range(0, rows, BLOCK):
            part = slice(first, first + BLOCK)
            block = _block(trace, part)
            for plan, logits, exit_layer in zip(plans, answers, layers, strict=True):
                request = plan.decide(block)
                logits[part], exit_layer[part] = request.answers, request.exit_layer
        yield from zip(answers, layers, strict=True)


@dataclass(frozen=True)
class _Plan:
    """A rule, and the op that decides by it."""

    rule: Criterion
    op: Callable[..., None]

    def decide(self, block: ExitTrace) -> RequestExits:
        """Return the exits of the rows of a block."""
        rows, depth, classes = block.logits.shape
        rule, device = self.rule, block.logits.device
        request = RequestExits.new(rule, rows=rows, classes=classes, depth=depth, device=device, keys=block.keys)
        row_ids, source = torch.arange(rows, dtype=torch.int32, device=device), TraceSource(block, rule.needs)
        due = [layer for layer in range(1, depth + 1) if rule.is_due(layer, depth)]
        for layer in due:
            call = request.call(layer, source(layer), row_ids, None)
            if layer == due[0]:
                checked_call("replay", rule, call)  # all layers have the same dtypes, shapes and devices
            self.op(*call)
        return request


def _plan(trace: ExitTrace, criterion: Criterion | None, problem_type: str | None, backend: str) -> _Plan:
    """Check that a criterion can be replayed on a trace."""
    rule = _checked_rule(trace, criterion)
    _, depth, classes = trace.logits.shape
    task = problem_type or trace.problem_type or default_problem_type(classes)
    check_fits(rule, depth=depth, classes=classes, problem_type=task, aux=tuple(trace.aux))
    check_known(rule)
    device = trace.logits.device
    return _Plan(rule, raw("exit_step", resolve_backend(rule.name, backend, device), device))


def _block(trace: ExitTrace, part: slice) -> ExitTrace:
    """Return some rows of a trace, in memory such that the numbers of each exit are contiguous."""
    logits = trace.logits[part].detach().transpose(0, 1).contiguous().transpose(0, 1)
    aux = {name: values[part].detach().t().contiguous().t() for name, values in trace.aux.items()}
    return ExitTrace(logits, aux, None if trace.keys is None else trace.keys[part])


def _checked_rule(trace: Any, criterion: Any) -> Criterion:
    """Return the exit rule of a criterion that can be replayed on a trace."""
    if not isinstance(trace, ExitTrace):
        raise ValueError(f"replay: expected a trace, as model.trace(**batch) returns, got {type(trace).__name__}")
    if criterion is not None and not isinstance(criterion, Criterion):
        raise ValueError(refused_criterion_message("replay", criterion, none_allowed=True))
    wrong = {name: list(aux.shape) for name, aux in trace.aux.items() if aux.shape != trace.logits.shape[:2]}
    if trace.logits.dim() != 3 or wrong:
        raise ValueError(
            f"replay: expected trace.logits [N, L, C] and aux [N, L], got {list(trace.logits.shape)} and aux {wrong}"
        )
    if criterion is not None and criterion.skip_from is not None:
        raise ValueError(
            f"replay: {criterion.name!r} cannot be replayed, since a layer that a row skips changes all its later "
            f"exits; run the model with it, or replay its exit rule, {criterion.exit_rule.name!r}, alone"
        )
    return (FullDepth() if criterion is None else criterion).exit_rule
