"""Checks of the labels of a batch against the task."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.methods.base import IGNORED
from earlyexit_kernels.types import INTEGER_DTYPES

#: Setting of a stock model for several labels a row.
SEVERAL = "stock.config.problem_type = 'multi_label_classification'"
_REAL = (*INTEGER_DTYPES, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_labels(labels: Tensor, problem_type: str, rows: int, classes: int) -> Tensor:
    """Check the labels of N rows and return them in the form that the task losses expect.

    Values are checked on the CPU only, where reading them does not synchronise; on CUDA a class out of range fails an
    assertion in torch's cross entropy.

    Args:
        labels: integers ``[N]`` for single_label_classification, ``[N, C]`` in [0, 1] for multi_label_classification,
            ``[N, C]``, or ``[N]`` for one output, for regression.
        problem_type: as in transformers.
        rows, classes: N and C.

    Raises:
        ValueError: a wrong shape, dtype or value.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: expected a tensor, got {type(labels).__name__}; pass torch.tensor(labels)")
    single = problem_type == "single_label_classification"
    shapes = [(rows,), (rows, 1)] if single else [(rows, classes)]
    if problem_type == "regression" and classes == 1:
        shapes = [(rows,), (rows, 1)]
    if tuple(labels.shape) not in shapes:
        several = single and tuple(labels.shape) == (rows, classes)
        cure = "; for several labels a row, convert with " if several else ""
        raise ValueError(
            f"labels: expected shape {list(shapes[0])} for {problem_type} of {rows} rows and {classes} classes, got "
            f"{list(labels.shape)}{cure}" + SEVERAL * several
        )
    if labels.dtype not in (INTEGER_DTYPES if single else _REAL):
        expected = "integers" if single else "numbers"
        cure = "; class numbers are labels.long(), and regression requires a model with num_labels=1" if single else ""
        raise ValueError(f"labels: expected {expected} for {problem_type}, got {labels.dtype}{cure}")
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        _check_values(labels, problem_type, classes)
    return labels.long() if single else labels


def _check_values(labels: Tensor, problem_type: str, classes: int) -> None:
    if problem_type == "single_label_classification":
        wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
        allowed = f"classes in [0, {classes - 1}], as the model has {classes}, or {IGNORED} for no label"
    elif problem_type == "multi_label_classification":
        wrong = labels[~((labels >= 0) & (labels <= 1))]
        allowed = "numbers in [0, 1]"
    else:
        wrong = labels[~torch.isfinite(labels)]
        allowed = "finite numbers"
    if wrong.numel():
        raise ValueError(f"labels: expected {allowed}, got {wrong.flatten()[0].item()}")
