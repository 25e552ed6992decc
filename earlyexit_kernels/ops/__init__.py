"""The fused ops, for people who write their own loop."""

from earlyexit_kernels.ops.compact import GATHER_ROWS_OPS, compact, compaction_ops, gather_rows
from earlyexit_kernels.ops.encoder_layer import ENCODER_LAYERS
from earlyexit_kernels.ops.exit_step import exit_step, exit_step_op
from earlyexit_kernels.ops.first_tokens_linear import first_tokens_linear
from earlyexit_kernels.ops.pack_tokens import PACK_TOKENS_OPS
from earlyexit_kernels.ops.resident_exit import MOST_ROWS, RESIDENT_EXITS
from earlyexit_kernels.ops.rows_add_norm import rows_add_norm
from earlyexit_kernels.ops.rows_attention import rows_attention
from earlyexit_kernels.ops.rows_linear import rows_linear

__all__ = [
    "ENCODER_LAYERS",
    "GATHER_ROWS_OPS",
    "MOST_ROWS",
    "PACK_TOKENS_OPS",
    "RESIDENT_EXITS",
    "compact",
    "compaction_ops",
    "exit_step",
    "exit_step_op",
    "first_tokens_linear",
    "gather_rows",
    "rows_add_norm",
    "rows_attention",
    "rows_linear",
]
