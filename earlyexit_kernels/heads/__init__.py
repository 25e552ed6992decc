"""Exit heads: what turns the hidden states after a layer into the logits of its exit, and the scalars beside them."""

from __future__ import annotations

from earlyexit_kernels.heads.bank import ExitHeads, FusedExit, HeadOutput, LinearExits, exit_logits
from earlyexit_kernels.heads.config import HeadConfig
from earlyexit_kernels.heads.halting import HaltingHead, StartsAt

__all__ = [
    "ExitHeads",
    "FusedExit",
    "HaltingHead",
    "HeadConfig",
    "HeadOutput",
    "LinearExits",
    "StartsAt",
    "exit_logits",
]
