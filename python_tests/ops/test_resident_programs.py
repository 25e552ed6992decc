"""The programs of kernels that loop, by the registers and the shared memory that they are compiled to."""

from __future__ import annotations

import pytest
from ops.test_triton_compile import (
    MACHINES,
    compile_launch,
    launch_of,
    named,
    rows_add_norm,
    rows_attention,
    rows_glu,
    rows_rotary,
)

from earlyexit_kernels.ops.tiles import INTERPRETED_PROCESSORS

#: Kernels that loop over the live tokens with a bounded number of programs.
LOOPS = {
    "norm": rows_add_norm,
    "norm_and_total": lambda dtype: rows_add_norm(dtype, total=True),
    "wider_norm": lambda dtype: rows_add_norm(dtype, 2048),
    "glu": rows_glu,
    "rotary": rows_rotary,
    "attention": rows_attention,
    "attention_of_a_window": lambda dtype: rows_attention(dtype, window=65),
    "wide_heads": lambda dtype: rows_attention(dtype, heads=6),
}
#: Compute capability -> KiB of shared memory of a multiprocessor that its programs share, each with one more.
SHARED_KIB = {80: 164, 90: 228, 100: 228}


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "machine"), [(name, machine) for name in LOOPS for machine in MACHINES], ids=str)
def test_programs_that_loop_run_in_full_rounds(name, machine, monkeypatch, kernel_table, tmp_path):
    """All at a time, or a multiple of those that have room: a round costs as much if most of its places are empty.

    Of the version of Triton that the table is of: others give kernels other registers, and the same programs.
    """
    capability, dtype = machine
    given = LOOPS[name](dtype)
    programs = launch_of(monkeypatch, *given)[1].grid[0] // INTERPRETED_PROCESSORS
    compiled = compile_launch(capability, monkeypatch, *given)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared + 1024
    registers = -(-kernel_table.check(named(name, dtype), capability, compiled, tmp_path) // 8) * 8
    room = min(65536 // (32 * warps * registers), 64 // warps, SHARED_KIB[capability] * 1024 // shared)
    assert programs <= room or programs % room == 0, (programs, room, registers)
