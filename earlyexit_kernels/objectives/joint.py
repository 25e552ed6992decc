"""Joint training of all exits, weighted by depth.

BERT Loses Patience: Fast and Robust Inference with Early Exit. Wangchunshu Zhou et al. NeurIPS 2020, arXiv 2006.04152,
eq. 6 (after Kaya et al. 2019, arXiv 1810.07052): L = sum_j j L_j / sum_j j.
"""

from __future__ import annotations

from torch import Tensor

from earlyexit_kernels.objectives.base import mean_task_loss
from earlyexit_kernels.types import ExitTrace


def joint_loss(trace: ExitTrace, labels: Tensor, problem_type: str) -> Tensor:
    """Average of the exits' mean losses, exit j with weight j / (1 + ... + L).

    Args:
        trace: logits ``[N, L, C]``.
        labels: ``[N]`` or ``[N, C]``.
        problem_type: as in transformers.
    """
    depth = trace.depth
    losses = [mean_task_loss(trace.logits[:, j], labels, problem_type) * (j + 1) for j in range(depth)]
    return sum(losses[1:], losses[0]) / (depth * (depth + 1) / 2)
