"""The fused ops, for custom inference loops.

Each function checks its arguments and runs on the back-end that is asked for; `bare_op` returns an op without checks.
"""

from earlyexit_kernels.backends import register_self_test
from earlyexit_kernels.ops.compact import compact, gather_rows
from earlyexit_kernels.ops.exit_call import ExitCall
from earlyexit_kernels.ops.exit_step import exit_step
from earlyexit_kernels.ops.first_tokens_linear import first_tokens_linear
from earlyexit_kernels.ops.schema import bare_op
from earlyexit_kernels.ops.self_test import failure

__all__ = [
    "ExitCall",
    "bare_op",
    "compact",
    "exit_step",
    "first_tokens_linear",
    "gather_rows",
]

register_self_test(failure)
