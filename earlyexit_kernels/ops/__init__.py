"""The fused ops, for people who write their own loop."""

from earlyexit_kernels.ops.compact import compact, gather_rows
from earlyexit_kernels.ops.encoder_layer import ENCODER_LAYERS
from earlyexit_kernels.ops.exit_step import exit_step, exit_step_op

__all__ = ["ENCODER_LAYERS", "compact", "exit_step", "exit_step_op", "gather_rows"]
