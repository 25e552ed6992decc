"""Every Triton kernel compiles for a GPU that isn't here, with every criterion plugged in."""

import importlib

import pytest

from earlyexit_kernels.backends import TRITON_INTERPRETED
from earlyexit_kernels.criteria import RULES

triton = pytest.importorskip("triton")
if TRITON_INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

exit_step = importlib.import_module("earlyexit_kernels.ops.exit_step")
compact = importlib.import_module("earlyexit_kernels.ops.compact")

POINTERS = {
    "x": "*fp16",
    "weight": "*fp16",
    "bias": "*fp16",
    "hidden": "*fp16",
    "out": "*fp16",
    "aux": "*fp32",
    "state": "*fp32",
    "answers": "*fp32",
    "exit_layer": "*i64",
}
SCALARS = dict.fromkeys(("p0", "p1", "p2"), "fp32")
SCALARS |= dict.fromkeys(("rows", "width", "classes", "layer", "depth", "present"), "i32")


def compile_for_sm90(kernel, constants):
    """Compile `kernel` with its pointers typed by name; int32 unless listed."""
    types = {name: POINTERS.get(name, SCALARS.get(name, "*i32")) for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("name", sorted(RULES))
def test_exit_step_compiles(name, pooling):
    rule = RULES[name]
    constants = {
        "STEP": rule.triton_step,
        "POOLING": pooling,
        "HAS_OFFSETS": True,
        "HAS_AUX": rule.needs is not None,
        "FROM_LOGITS": False,
        "IS_LAST": False,
        "BLOCK_C": 4,
        "BLOCK_H": 128,
    }
    compiled = compile_for_sm90(exit_step.exit_step_kernel, constants)
    assert ".target sm_90a" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0


@pytest.mark.parametrize("kernel, block", [("compact_kernel", 1024), ("gather_rows_kernel", 256)])
def test_compaction_compiles(kernel, block):
    compiled = compile_for_sm90(getattr(compact, kernel), {"BLOCK": block})
    assert len(compiled.asm["cubin"]) > 0
