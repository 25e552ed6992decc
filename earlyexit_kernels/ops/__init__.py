"""The fused ops, for custom inference loops.

Each function checks its arguments and runs on the back-end that is asked for; `bare_op` returns an op without checks.
"""

from earlyexit_kernels.backends import register_self_test
from earlyexit_kernels.ops.compact import compact, gather_rows
from earlyexit_kernels.ops.encoder_layer import EncoderWeights, encoder_layer
from earlyexit_kernels.ops.exit_call import ExitCall
from earlyexit_kernels.ops.exit_step import exit_step
from earlyexit_kernels.ops.first_tokens_linear import first_tokens_linear
from earlyexit_kernels.ops.pack_tokens import pack_tokens
from earlyexit_kernels.ops.packed_layer import PackedWeights, pack_weights, packed_layer
from earlyexit_kernels.ops.resident_exit import resident_exit
from earlyexit_kernels.ops.rows_add_norm import rows_add_norm
from earlyexit_kernels.ops.rows_attention import rows_attention
from earlyexit_kernels.ops.rows_embed import rows_embed
from earlyexit_kernels.ops.rows_glu import rows_glu
from earlyexit_kernels.ops.rows_linear import rows_linear
from earlyexit_kernels.ops.rows_mean import rows_mean
from earlyexit_kernels.ops.rows_rotary import rows_rotary
from earlyexit_kernels.ops.schema import bare_op
from earlyexit_kernels.ops.self_test import failure

__all__ = [
    "EncoderWeights",
    "ExitCall",
    "PackedWeights",
    "bare_op",
    "compact",
    "encoder_layer",
    "exit_step",
    "first_tokens_linear",
    "gather_rows",
    "pack_tokens",
    "pack_weights",
    "packed_layer",
    "resident_exit",
    "rows_add_norm",
    "rows_attention",
    "rows_embed",
    "rows_glu",
    "rows_linear",
    "rows_mean",
    "rows_rotary",
]

register_self_test(failure)
