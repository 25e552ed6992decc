"""Every Triton kernel compiles for several GPU architectures, with every criterion and in all shipped sizes."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess

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
SCALARS |= dict.fromkeys(("rows", "width", "classes", "layer", "depth", "present", "tile"), "i32")
#: Compute capability -> what its PTX is for.
TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
#: Rules that keep a state.
STATEFUL = [name for name, rule in RULES.items() if "tl.store" in inspect.getsource(rule.triton_step.fn)]


def stays_in_registers(compiled, folder) -> None:
    """No register is spilled, and nothing else is on the stack."""
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+) \S+ LOCAL:(\d+)", report) == [("0", "0")], report


def compile_for(capability, kernel, types, constants, **options):
    """Compile `kernel` for pointers aligned like memory of torch."""
    names, types = kernel.arg_names, types | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(kernel, {name: types[name] for name in names}, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})
    assert f".target {TARGETS[capability]}" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
    return compiled


def by_name(kernel):
    """Types of the arguments of a kernel; int32 pointers unless listed."""
    return {name: POINTERS.get(name, SCALARS.get(name, "*i32")) for name in kernel.arg_names}


#: Every rule for Hopper, with both kinds of pooling, and one for the other cards.
EXITS = [(90, name, pooling, 4) for pooling in ("first", "mean") for name in sorted(RULES)]
EXITS += [(capability, "entropy", pooling, 4) for capability in (80, 100) for pooling in ("first", "mean")]
EXITS += [(90, name, "first", 64) for name in ("patience", "voting")]


@pytest.mark.sample(16)
@pytest.mark.parametrize(("capability", "name", "pooling", "block"), EXITS)
def test_exit_step_compiles(capability, name, pooling, block, tmp_path):
    rule, kernel = RULES[name], exit_step.exit_step_kernel
    constants = {"STEP": rule.triton_step, "POOLING": pooling, "HAS_OFFSETS": True, "HAS_AUX": rule.needs is not None}
    constants |= {"FROM_LOGITS": False, "IS_LAST": False, "BLOCK_C": block, "BLOCK_H": 128}
    compiled = compile_for(capability, kernel, by_name(kernel), constants)
    if block < 64:
        stays_in_registers(compiled, tmp_path)
    if (
        name in STATEFUL
    ):  # each warp reads the state; without a barrier before the write a late one would read new values
        ptx = compiled.asm["ptx"]
        writes = ptx.index("st.global")
        assert "bar.sync" in ptx[ptx.rindex("ld.global", 0, writes) : writes]


@pytest.mark.sample(4)
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(("kernel", "block"), [("compact_kernel", 1024), ("gather_rows_kernel", 256)])
def test_compact_and_gather_rows_compile(kernel, block, capability, tmp_path):
    kernel = getattr(compact, kernel)
    stays_in_registers(compile_for(capability, kernel, by_name(kernel), {"BLOCK": block}), tmp_path)


@pytest.mark.parametrize("module", [exit_step, compact])
def test_kernels_are_not_specialized_on_batch_sizes(module):
    kernels = [kernel for own, kernel in vars(module).items() if own.endswith("_kernel")]
    names = ("rows", "present", "layer")
    sizes = [p for kernel in kernels for p in kernel.params if p.name in names]
    assert sizes and all(p.do_not_specialize for p in sizes)
