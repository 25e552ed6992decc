"""Exit heads: modules that map the hidden states after a layer to the logits and scalars of its exit."""

from __future__ import annotations

from earlyexit_kernels.heads.bank import ExitHeads, FusedExit, HeadOutput, LinearExits, exit_logits
from earlyexit_kernels.heads.config import HeadConfig
from earlyexit_kernels.heads.halting import HaltingHead, LinearWithInitialBias

__all__ = [
    "ExitHeads",
    "FusedExit",
    "HaltingHead",
    "HeadConfig",
    "HeadOutput",
    "LinearExits",
    "LinearWithInitialBias",
    "exit_logits",
]
