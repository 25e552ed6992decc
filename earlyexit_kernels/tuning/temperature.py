"""Temperature scaling: divide the logits of each exit by a number (Guo et al., ICML 2017, arXiv 1706.04599).

The temperature of an exit minimises the negative log-likelihood of the labels. It changes no label, but makes the
probabilities of the exits comparable, so that one threshold fits all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from earlyexit_kernels.types import ExitTrace

#: Smallest and largest temperature that is looked for; an exit that is always right has no finite best one.
RANGE = (0.05, 20.0)


def fit_temperatures(trace: ExitTrace, labels: ArrayLike) -> tuple[float, ...]:
    """Return the temperature of each exit, found by Brent's bounded search for its logarithm.

    Args:
        trace: logits ``[N, L, C]`` with at least two classes.
        labels: class indices ``[N]``.

    Raises:
        ValueError: one output, or labels of another shape.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> from earlyexit_kernels.tuning.temperature import fit_temperatures
    >>> labels = torch.tensor([0, 1, 1, 0])
    >>> sure = torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.0, 4.0], [0.0, 4.0]])  # one of four is wrong
    >>> [round(t, 2) for t in fit_temperatures(ee.ExitTrace(sure[:, None]), labels)]
    [3.64]
    """
    truth = torch.as_tensor(np.asarray(labels))
    if trace.logits.shape[2] < 2 or truth.shape != trace.logits.shape[:1] or truth.is_floating_point():
        raise ValueError(
            f"fit_temperatures: expected logits [N, L, C] of at least two classes and class indices [N], got "
            f"{list(trace.logits.shape)} and {truth.dtype} {list(truth.shape)}"
        )
    return tuple(_fit(trace.logits[:, k].double(), truth.long()) for k in range(trace.depth))


def _fit(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature of one exit; the loss is convex in 1 / T, so it has one minimum.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.optimize import minimize_scalar
    except ImportError as error:
        raise ImportError("temperatures require scipy: `pip install scipy`") from error

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / np.exp(log_temperature), labels))

    found = minimize_scalar(loss, bounds=np.log(RANGE), method="bounded", options={"xatol": 1e-9, "maxiter": 200})
    return float(np.exp(found.x))


def scaled(trace: ExitTrace, temperatures: Sequence[float]) -> ExitTrace:
    """Return a trace with the logits of each exit divided by its temperature."""
    divisors = torch.tensor(temperatures, dtype=trace.logits.dtype)
    return replace(trace, logits=trace.logits / divisors[:, None])


@torch.no_grad()
def scale_exits(model: Any, temperatures: Sequence[float]) -> None:
    """Divide the weight and bias of the last linear of each exit by its temperature, in place.

    Args:
        model: an early-exit model.
        temperatures: one for each exit.
    """
    for exit_, temperature in zip(model.heads.out, temperatures, strict=True):
        exit_.weight.div_(temperature)
        exit_.bias.div_(temperature)
