"""Replay: what any criterion would have done, from the stored exits of one full-depth pass."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.criteria import Criterion, FullDepth, check_fits
from earlyexit_kernels.ops import exit_step
from earlyexit_kernels.types import ExitTrace, read_aux


def replay(
    trace: ExitTrace, criterion: Criterion | None, *, problem_type: str | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run a criterion over a trace, so that a sweep of thresholds costs one pass of the model.

    Args:
        trace: from `model.trace`, or built from stored logits ``[N, L, C]``.
        criterion: the rule, or None for full depth.
        problem_type: as in transformers; default: the trace's, and where a trace has none regression with one output,
            else one label of several.
        backend: of the op.

    Returns:
        logits ``[N, C]`` float32 and exit_layer ``[N]`` int64, as the model itself would give, but for rows whose
        score lies within rounding of the threshold: the model's matrix products round with the batch they run in.

    Raises:
        ValueError: the trace lacks what the criterion needs, the criterion has no meaning on its shape, or it skips
            layers, whose effect no stored pass holds.
    """
    if not isinstance(trace, ExitTrace):
        raise ValueError(f"replay: expected a trace, as model.trace(**batch) gives, got {type(trace).__name__}")
    if criterion is not None and not isinstance(criterion, Criterion):
        raise ValueError(f"replay: expected one of earlyexit_kernels.criteria or None, got {criterion!r}")
    wrong = {name: list(aux.shape) for name, aux in trace.aux.items() if aux.shape != trace.logits.shape[:2]}
    if trace.logits.dim() != 3 or wrong:
        raise ValueError(
            f"replay: expected trace.logits [N, L, C] and aux [N, L], got {list(trace.logits.shape)} and aux {wrong}"
        )
    if criterion is not None and criterion.skip_from is not None:
        raise ValueError(
            f"replay: {criterion.name!r} can't be replayed, since a layer that a row skips changes all its later "
            f"exits; run the model with it, or replay its exit rule, {criterion.exit_rule.name!r}, alone"
        )
    rule = (FullDepth() if criterion is None else criterion).exit_rule
    rows, depth, classes = trace.logits.shape
    task = problem_type or trace.problem_type or ("regression" if classes == 1 else "single_label_classification")
    check_fits(rule, depth=depth, classes=classes, problem_type=task, aux=tuple(trace.aux))
    device = trace.logits.device
    row_ids = torch.arange(rows, dtype=torch.int32, device=device)
    state = rule.new_state(rows, device, classes, trace.keys)
    answers = torch.zeros(rows, classes, dtype=torch.float32, device=device)
    exit_layer = torch.zeros(rows, dtype=torch.int64, device=device)
    for layer in range(1, depth + 1):
        if not rule.is_due(layer, depth):
            continue
        aux = None if rule.needs is None else read_aux(trace.aux[rule.needs][:, layer - 1], rule.needs)
        exit_step(
            criterion=rule,
            layer=layer,
            depth=depth,
            row_ids=row_ids,
            state=state,
            answers=answers,
            exit_layer=exit_layer,
            logits=trace.logits[:, layer - 1].detach(),
            aux=aux,
            backend=backend,
        )
    return answers, exit_layer
