"""Replay: apply a criterion to the stored exits of one full-depth pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.criteria import Criterion, FullDepth, check_fits, check_known, resolve_backend
from earlyexit_kernels.criteria.base import refused_criterion_message
from earlyexit_kernels.engine.exits import RequestExits, TraceSource
from earlyexit_kernels.ops import bare_op
from earlyexit_kernels.ops.exit_checks import checked_call
from earlyexit_kernels.types import ExitTrace, default_problem_type


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
    rule = _checked_rule(trace, criterion)
    rows, depth, classes = trace.logits.shape
    task = problem_type or trace.problem_type or default_problem_type(classes)
    check_fits(rule, depth=depth, classes=classes, problem_type=task, aux=tuple(trace.aux))
    check_known(rule)
    device = trace.logits.device
    request = RequestExits.new(rule, rows=rows, classes=classes, depth=depth, device=device, keys=trace.keys)
    row_ids, source = torch.arange(rows, dtype=torch.int32, device=device), TraceSource(trace, rule.needs)
    decide = bare_op("exit_step", resolve_backend(rule.name, backend, device.type), device.type)
    due = [layer for layer in range(1, depth + 1) if rule.is_due(layer, depth)]
    for layer in due:
        call = request.call(layer, source(layer), row_ids, None)
        if layer == due[0]:
            checked_call("replay", rule, call)  # all layers have the same dtypes, shapes and devices
        decide(*call)
    return request.answers, request.exit_layer


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
