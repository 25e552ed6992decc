"""Columns of answers from the logits of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.ops.exit_step import valid_rows

LABEL, SCORE, EXIT_LAYER, ERROR, SCORES = "label", "score", "exit_layer", "error", "scores"
#: Above all float32 logits that are finite in practice: one of +inf has the probability 1.
LARGEST = 1e30
#: Scores of logits ``[N, C]``, by the names of transformers' pipeline.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.clamp(max=LARGEST).softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}
#: Problem type -> the function that the pipeline applies.
DEFAULT_FUNCTION = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}
INVALID = "the model gives invalid logits for this row"


def column_names(model: EarlyExitForSequenceClassification, *, scores: bool) -> list[str]:
    """Return the names of the columns of answers, in their order."""
    number = model.problem_type == "regression" and model.config.num_labels == 1
    return [LABEL] * (not number) + [SCORE, EXIT_LAYER, ERROR] + [SCORES] * scores


def columns_of(
    model: EarlyExitForSequenceClassification,
    logits: Tensor,
    exit_layer: Tensor,
    problems: Mapping[int, str],
    *,
    function: str | None,
    scores: bool,
) -> dict[str, list[Any]]:
    """Return the columns of the answers to N rows.

    Args:
        model: that answered, for the names of its classes.
        logits: ``[N, C]``; of the rows with a problem anything.
        exit_layer: ``[N]``.
        problems: number of a row -> why it did not run.
        function: name in `FUNCTIONS`, or None for that of the problem type.
        scores: add the column `SCORES`.
    """
    logits = logits.double()
    values = FUNCTIONS[function or DEFAULT_FUNCTION[model.problem_type]](logits)
    errors = ["" if valid else INVALID for valid in valid_rows(logits, None).tolist()]
    for number, problem in problems.items():
        errors[number] = problem
    best = logits.numpy().argmax(axis=1)  # the first of equal ones
    names, rows = model.config.id2label, values.tolist()
    columns: dict[str, list[Any]] = {
        LABEL: ["" if error else names[int(one)] for one, error in zip(best, errors, strict=True)],
        SCORE: [math.nan if error else row[one] for row, one, error in zip(rows, best, errors, strict=True)],
        EXIT_LAYER: exit_layer.tolist(),
        ERROR: errors,
        SCORES: [[math.nan] * len(row) if error else row for row, error in zip(rows, errors, strict=True)],
    }
    return {name: columns[name] for name in column_names(model, scores=scores)}
