"""The fused ops, for custom inference loops.

Each function checks its arguments and runs on the back-end that is asked for; `raw` returns an op without checks.
"""

import earlyexit_kernels.ops.first_tokens_linear  # noqa: F401  defines an op that only the package calls
from earlyexit_kernels.backends import register_self_test
from earlyexit_kernels.ops.compact import compact, gather_rows
from earlyexit_kernels.ops.exit_step import exit_step
from earlyexit_kernels.ops.schema import raw
from earlyexit_kernels.ops.self_test import failure

__all__ = ["compact", "exit_step", "gather_rows", "raw"]

register_self_test(failure)
