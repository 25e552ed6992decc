"""Every Triton kernel compiles for several GPU architectures, with every criterion and in all shipped sizes."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from support.kernel_table import usage_of

from benchmarks.gpu.tiles import BY_POINTERS
from earlyexit_kernels.backends import TRITON_INTERPRETED
from earlyexit_kernels.criteria import RULES
from earlyexit_kernels.ops.activations import ACTIVATIONS
from earlyexit_kernels.ops.rows_linear_tma import FIRST_COLUMNS, SHARED_BYTES, TMA_TILES
from earlyexit_kernels.ops.tiles import SUM_PARTS, Tiles, few_tiles, part_terms

triton = pytest.importorskip("triton")
if TRITON_INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

exit_step = importlib.import_module("earlyexit_kernels.ops.exit_step")
compact = importlib.import_module("earlyexit_kernels.ops.compact")
resident_exit = importlib.import_module("earlyexit_kernels.ops.resident_exit")

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
SCALARS |= dict.fromkeys(("rows", "width", "classes", "layer", "depth", "present", "capacity", "tile"), "i32")
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
#: Compute capability -> what its PTX is for, and the instruction of its matrix units.
TARGETS = {80: ("sm_80", "mma.sync"), 90: ("sm_90a", "wgmma.mma_async"), 100: ("sm_100a", "tcgen05.mma")}
#: Rules that keep a state.
STATEFUL = [name for name, rule in RULES.items() if "tl.store" in inspect.getsource(rule.triton_step.fn)]
FLOAT32, HALF, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


def compile_for(capability, kernel, types, constants, **options):
    """Compile `kernel` for pointers aligned like memory of torch."""
    names, types = kernel.arg_names, types | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(kernel, {name: types[name] for name in names}, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})
    assert f".target {TARGETS[capability][0]}" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
    return compiled


def by_name(kernel):
    """Types of the arguments of a kernel; int32 pointers unless listed."""
    return {name: POINTERS.get(name, SCALARS.get(name, "*i32")) for name in kernel.arg_names}


#: Every rule, with means for Hopper.
EXITS = [(capability, name, "first") for capability in TARGETS for name in sorted(RULES)]
EXITS += [(90, name, "mean") for name in sorted(RULES)] + [(80, "entropy", "mean"), (100, "entropy", "mean")]


def compile_exit(capability, name, pooling, block):
    rule = RULES[name]
    constants = {
        "STEP": rule.triton_step,
        "POOLING": pooling,
        "HAS_OFFSETS": True,
        "HAS_AUX": rule.needs is not None,
        "FROM_LOGITS": False,
        "IS_LAST": False,
        "BLOCK_C": block,
        "BLOCK_H": 128,
    }
    kernel = exit_step.exit_step_kernel
    return compile_for(capability, kernel, by_name(kernel), constants)


@pytest.mark.sample(20)
@pytest.mark.parametrize(("capability", "name", "pooling"), EXITS)
def test_exit_step_compiles(capability, name, pooling, kernel_table, tmp_path):
    kernel_table.check(f"{name}, {pooling}", capability, compile_exit(capability, name, pooling, 4), tmp_path)


@pytest.mark.sample(8)
@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_read_before_a_barrier_and_written_after(name, block):
    """Each warp reads the state; without the barrier a late one would read new values."""
    ptx = compile_exit(90, name, "first", block).asm["ptx"]
    writes = ptx.index("st.global")
    assert "bar.sync" in ptx[ptx.rindex("ld.global", 0, writes) : writes]


@pytest.mark.sample(4)
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(
    ("room", "kernel", "block"),
    [
        (compact, "compact_kernel", 1024),
        (compact, "gather_rows_kernel", 256),
        (resident_exit, "settle_rows_kernel", 1024),
    ],
    ids=["compact", "gather_rows", "settle_rows"],
)
def test_compact_and_gather_rows_compile(room, kernel, block, capability, kernel_table, tmp_path):
    kernel = getattr(room, kernel)
    compiled = compile_for(capability, kernel, by_name(kernel), {"BLOCK": block})
    kernel_table.check(f"blocks of {block}", capability, compiled, tmp_path)


class Recorder:
    """Replaces a kernel and records its launches."""

    def __getitem__(self, grid):
        self.grid = grid
        return self.launch

    def launch(self, *given, **keywords):
        self.given, self.keywords = given, keywords


def launch_of(monkeypatch, op, *arguments):
    """Return the kernel that the launcher of `op` launches for these arguments, and the launch."""
    module, recorder = importlib.import_module(f"earlyexit_kernels.ops.{op}"), Recorder()
    kernel = getattr(module, f"{op}_kernel")
    with monkeypatch.context() as patch:
        patch.setattr(module, f"{op}_kernel", recorder)
        getattr(module, f"{op}_triton")(*arguments)
    return kernel, recorder


def compile_launch(capability, monkeypatch, op, *arguments):
    """Compile what the launcher of `op` launches for these arguments."""
    return compile_recorded(capability, *launch_of(monkeypatch, op, *arguments))


def compile_recorded(capability, kernel, recorder):
    """Compile what has been launched."""
    given = zip(kernel.arg_names, recorder.given, strict=False)
    types = {name: TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32" for name, value in given}
    constants = {name: value for name, value in recorder.keywords.items() if name in kernel.arg_names}
    options = {name: value for name, value in recorder.keywords.items() if name not in constants}
    return compile_for(capability, kernel, types, constants, **options)


def empty(*shape, dtype):
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def rows_linear(tokens, dtype, n=768, k=768, activation="gelu", weights=1):
    x, weight, bias, out = (empty(*s, dtype=dtype) for s in ((2 * tokens, k), (n, k), (n,), (tokens, weights * n)))
    offsets = empty(9, dtype=torch.int32)
    return "rows_linear", x, [weight] * weights, [bias] * weights, offsets, out, activation, True, False


def rows_linear_in_parts(tokens, dtype, n=768, k=768):
    x, weight, bias, out = (empty(*s, dtype=dtype) for s in ((tokens, k), (n, k), (n,), (tokens, n)))
    if few_tiles(dtype, tokens, n):
        out = empty(SUM_PARTS, tokens, n, dtype=FLOAT32)
    return "rows_linear", x, [weight], [bias], empty(9, dtype=torch.int32), out, "none", False, True


def first_tokens_linear(dtype):
    hidden, weight, bias, out = (empty(*s, dtype=dtype) for s in ((999, 768), (768, 768), (768,), (8, 768)))
    ids = (empty(n, dtype=torch.int32) for n in (9, 8))
    return "first_tokens_linear", hidden, weight, bias, *ids, out, "tanh"


def rows_attention(dtype, heads=12, window=None):
    ids = (empty(n, dtype=torch.int32) for n in (9, 8))
    near = [None] * 3 if window is None else [window, empty(999, dtype=torch.int64), empty(9, dtype=torch.int32)]
    return "rows_attention", empty(999, 3 * 768, dtype=dtype), *ids, heads, 128, empty(999, 768, dtype=dtype), *near


def rows_rotary(dtype, heads=12):
    qkv, cos = empty(999, 3 * 768, dtype=dtype), empty(999, 768 // heads, dtype=dtype)
    return "rows_rotary", qkv, cos, cos, *(empty(n, dtype=torch.int32) for n in (9, 9, 8)), heads, 128


def rows_mean(dtype):
    ids = (empty(n, dtype=torch.int32) for n in (9, 8))
    return "rows_mean", empty(2 * 999, 768, dtype=dtype), *ids, empty(8, 768, dtype=dtype)


def rows_glu(dtype, width=1152, activation="gelu"):
    x, out = empty(999, 2 * width, dtype=dtype), empty(999, width, dtype=dtype)
    return "rows_glu", x, empty(9, dtype=torch.int32), out, activation


def rows_add_norm(dtype, width=768, adds=True, total=False):
    x, hidden, weight = (empty(*s, dtype=dtype) for s in ((999, width), (2 * 999, width), (width,)))
    norm = weight, weight, 1e-12, empty(9, dtype=torch.int32)
    return "rows_add_norm", x if adds else None, None, hidden, *norm, hidden, True, True, hidden if total else None


def norm_of_parts(dtype, width=768):
    parts, bias = empty(SUM_PARTS, 999, width, dtype=FLOAT32), empty(width, dtype=dtype)
    out = empty(999, width, dtype=dtype)
    return "rows_add_norm", parts, bias, out, bias, bias, 1e-12, empty(9, dtype=torch.int32), out, False, False


def named(name, dtype) -> str:
    """The configuration of a launch, as in the table."""
    return f"{name.replace('_', ' ')}, {str(dtype).removeprefix('torch.')}"


#: Tokens that take small and large tiles.
FEW, MANY = 128, 32768
#: The loops over matrix products, in each size that is shipped.
PRODUCTS = {
    "few": lambda dtype: rows_linear(FEW, dtype),
    "few_wide": lambda dtype: rows_linear(FEW, dtype, n=3072),
    "many": lambda dtype: rows_linear(MANY, dtype, n=3072),
    "few_of_three": lambda dtype: rows_linear(FEW, dtype, activation="none", weights=3),
    "many_of_three": lambda dtype: rows_linear(MANY, dtype, activation="none", weights=3),
    "few_in_parts": lambda dtype: rows_linear_in_parts(FEW, dtype, k=3072),
    "more_in_parts": lambda dtype: rows_linear_in_parts(1024, dtype),
    "many_in_parts": lambda dtype: rows_linear_in_parts(MANY, dtype),
    "attention": rows_attention,
    "attention_of_a_window": lambda dtype: rows_attention(dtype, window=65),
}
#: Hopper with both dtypes, the other architectures with one.
MACHINES = [(80, HALF), (90, HALF), (90, BFLOAT16), (100, HALF)]


@pytest.mark.sample(20)
@pytest.mark.parametrize(
    ("name", "capability", "dtype"), [(name, *machine) for name in PRODUCTS for machine in MACHINES], ids=str
)
def test_products_use_the_matrix_units(name, capability, dtype, monkeypatch, kernel_table, tmp_path):
    compiled = compile_launch(capability, monkeypatch, *PRODUCTS[name](dtype))
    assert TARGETS[capability][1] in compiled.asm["ptx"]
    kernel_table.check(named(name, dtype), capability, compiled, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("tiles", BY_POINTERS, ids=lambda tiles: f"{tiles.rows} {tiles.columns} {tiles.warps}")
def test_tiles_that_are_measured_stay_in_registers(tiles, monkeypatch, tmp_path):
    """One of them may become an entry of the table, for every product."""
    monkeypatch.setattr(importlib.import_module("earlyexit_kernels.ops.rows_linear"), "tiles_for", lambda *_: tiles)
    for given in (rows_linear(FEW, HALF), rows_linear_in_parts(FEW, HALF), rows_linear_in_parts(MANY, HALF)):
        usage_of(compile_launch(90, monkeypatch, *given), tmp_path)


#: Columns in and out, and activation, of the products of BERT-base, and those of odd widths.
TMA_PRODUCTS = [
    (768, 768, "none", False),
    (768, 3072, "gelu", False),
    (768, 3072, "gelu_tanh", False),
    (40, 24, "relu", False),
    (768, 768, "none", True),
    (3072, 768, "none", True),
    (1000, 24, "none", True),
]


#: Both dtypes; bfloat16 in one size.
TMA_LAUNCHES = [
    (capability, dtype, *product, tiles)
    for capability, dtype in ((90, "fp16"), (90, "bf16"), (100, "fp16"))
    for product in TMA_PRODUCTS
    for tiles in (TMA_TILES[-1:] if product[-1] or dtype == "bf16" else TMA_TILES)
]


@pytest.mark.sample(29)
@pytest.mark.parametrize(
    ("capability", "dtype", "k", "n", "activation", "in_parts", "tiles"),
    TMA_LAUNCHES,
    ids=lambda value: f"{value.columns} wide" if isinstance(value, Tiles) else None,
)
def test_bulk_copies_feed_the_matrix_units(
    k, n, activation, in_parts, tiles, dtype, capability, kernel_table, tmp_path
):
    module = importlib.import_module("earlyexit_kernels.ops.rows_linear_tma")
    kernel, first, second = module.rows_linear_tma_kernel, FIRST_COLUMNS, tiles.columns - FIRST_COLUMNS
    blocks = {
        "x": (tiles.rows, tiles.depth),
        "weight": (first, tiles.depth),
        "second_weight": (second, tiles.depth),
        "out": (1, 1, tiles.rows, first),
        "second_out": (1, 1, tiles.rows, second),
    }
    types = {name: f"tensordesc<{dtype}{list(sizes)}>" for name, sizes in blocks.items()}
    types |= {"bias": f"*{dtype}", "offsets": "*i32", "rows": "i32"}
    options = dict(tiles.options)
    constants = {name: options.pop(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    constants |= {"ABSOLUTE": True, "N": n, "K": k, "ACTIVATION": ACTIVATIONS[activation].device, "GROUP_M": 8}
    constants["PART"] = part_terms(k, HALF) if in_parts else k
    compiled = compile_for(capability, kernel, types, constants, **options)
    assert TARGETS[capability][1] in compiled.asm["ptx"] and "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert "st.global" not in compiled.asm["ptx"], "rows that are not present are left out by the copies"
    assert compiled.metadata.shared <= SHARED_BYTES
    words = f"{k} to {n}{' in parts' if in_parts else ''}, {activation}, {tiles.rows} x {tiles.columns}, {dtype}"
    kernel_table.check(words, capability, compiled, tmp_path)


#: Other launches: wide heads, first tokens, float32 (not on matrix units), odd widths, and norms.
OTHERS = {
    "first_tokens": lambda: first_tokens_linear(BFLOAT16),
    "few_float32": lambda: rows_linear(FEW, FLOAT32),
    "many_float32": lambda: rows_linear(MANY, FLOAT32, n=3072),
    "few_float32_in_parts": lambda: rows_linear_in_parts(FEW, FLOAT32, k=3072),
    "many_float32_in_parts": lambda: rows_linear_in_parts(MANY, FLOAT32),
    "attention_float32": lambda: rows_attention(FLOAT32),
    "window_float32": lambda: rows_attention(FLOAT32, window=65),
    "window_of_wide_heads": lambda: rows_attention(HALF, heads=6, window=65),
    "window_of_wide_heads_float32": lambda: rows_attention(FLOAT32, heads=6, window=65),
    "wide_heads_float32": lambda: rows_attention(FLOAT32, heads=6),
    "mean_float32": lambda: rows_mean(FLOAT32),
    "mean_bfloat16": lambda: rows_mean(BFLOAT16),
    "rotary_float32": lambda: rows_rotary(FLOAT32),
    "rotary_of_wide_heads": lambda: rows_rotary(BFLOAT16, heads=6),
    **{f"glu_{name}": lambda name=name: rows_glu(FLOAT32, 40, name) for name in ("gelu", "gelu_tanh", "relu")},
    **{f"odd_{name}": lambda name=name: rows_linear(FEW, HALF, 5, 7, name) for name in ("gelu_tanh", "relu")},
    "norm_of_parts": lambda: norm_of_parts(HALF),
    "wide_norm": lambda: rows_add_norm(FLOAT32, 4096),
    "norm_and_total": lambda: rows_add_norm(FLOAT32, 1024, total=True),
    "norm_alone": lambda: rows_add_norm(HALF, adds=False),
    "wide_norm_of_parts": lambda: norm_of_parts(FLOAT32, 4096),
}


@pytest.mark.sample(24)
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_launches(name, capability, monkeypatch, kernel_table, tmp_path):
    compiled = compile_launch(capability, monkeypatch, *OTHERS[name]())
    assert "tf32" not in compiled.asm["ptx"]
    kernel_table.check(name.replace("_", " "), capability, compiled, tmp_path)


#: Modules of kernels that are told the size of a batch.
SIZED = ("exit_step", "compact", "resident_exit", "pack_tokens", "rows_linear", "rows_add_norm", "first_tokens_linear")
SIZED += ("rows_embed", "rows_glu", "rows_rotary", "rows_attention")


@pytest.mark.parametrize("name", SIZED)
def test_kernels_are_not_specialized_on_batch_sizes(name):
    module = importlib.import_module(f"earlyexit_kernels.ops.{name}")
    kernels = [kernel for own, kernel in vars(module).items() if own.endswith("_kernel")]
    names = ("rows", "present", "capacity", "longest", "layer")
    sizes = [p for kernel in kernels for p in kernel.params if p.name in names]
    assert sizes and all(p.do_not_specialize for p in sizes)
