"""How many programs the kernels between the products are launched with, and how many find tokens of a few live rows.

    python -m benchmarks.gpu.programs

A program without work lasts about as long as a read of the offsets, in the place of one that may have some. The widths
are those of BERT-base and ModernBERT-base, the card is that of `roofline`.
"""

from __future__ import annotations

from benchmarks.gpu.roofline import CARD, LENGTH, WIDTH
from earlyexit_kernels.ops.rows_add_norm import MAX_WARPS, RESIDENT_WARPS, WARP_WIDTH
from earlyexit_kernels.ops.rows_attention import BLOCKS
from earlyexit_kernels.ops.rows_attention import RESIDENT as OF_ATTENTION
from earlyexit_kernels.ops.rows_glu import MAX_BLOCK
from earlyexit_kernels.ops.rows_glu import RESIDENT as OF_GLU
from earlyexit_kernels.ops.rows_mean import BLOCK_COLUMNS
from earlyexit_kernels.ops.rows_rotary import BLOCK_TOKENS
from earlyexit_kernels.ops.rows_rotary import RESIDENT as OF_ROTARY
from earlyexit_kernels.tuning.report import markdown_table

#: Full rows of the capacity, and live ones.
CAPACITIES, LIVE = (32, 128), 10
HEADS, GATED_WIDTH = 12, 1152
#: Kernel -> blocks of work of a full row, and programs per multiprocessor at most, None for a program for each block.
KERNELS = {
    "rows_add_norm": (LENGTH, RESIDENT_WARPS // min(MAX_WARPS, 1024 // WARP_WIDTH)),
    "rows_attention": (-(-LENGTH // BLOCKS[2][0]) * HEADS, OF_ATTENTION),
    "rows_rotary": (-(-LENGTH // BLOCK_TOKENS) * 2 * HEADS, OF_ROTARY),
    "rows_glu": (LENGTH * -(-GATED_WIDTH // MAX_BLOCK), OF_GLU),
    "rows_mean": (-(-WIDTH // BLOCK_COLUMNS), None),
}


def programs(kernel: str, rows: int) -> int:
    """Return the number of programs of a launch for so many rows."""
    blocks, resident = KERNELS[kernel]
    return rows * blocks if resident is None else min(rows * blocks, CARD.processors * resident)


def table() -> str:
    """Return the programs of a launch by capacity, beside those with work."""
    header = ("kernel", *(f"blocks of {rows} rows, programs" for rows in CAPACITIES), f"blocks of {LIVE} live rows")
    rows = [
        (kernel, *(f"{rows * blocks}, {programs(kernel, rows)}" for rows in CAPACITIES), str(LIVE * blocks))
        for kernel, (blocks, _) in KERNELS.items()
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    print(table())
