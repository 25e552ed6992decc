"""The counted programs of the launches between the products, beside what is launched."""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks.gpu import programs
from benchmarks.gpu.roofline import CARD, LENGTH, WIDTH


def empty(*shape, dtype=torch.float16):
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(kernel: str, rows: int) -> tuple:
    """Arguments of a launcher for a capacity of full rows."""
    tokens, vector, (offsets, row_ids) = rows * LENGTH, empty(WIDTH), (empty(rows + 1), empty(rows))
    hidden, qkv, angles = empty(tokens, WIDTH), empty(tokens, 3 * WIDTH), empty(tokens, WIDTH // programs.HEADS)
    gated = programs.GATED_WIDTH
    return {
        "rows_add_norm": (hidden, None, hidden, vector, vector, 1e-5, offsets, hidden, False, False),
        "rows_attention": (qkv, offsets, row_ids, programs.HEADS, LENGTH, hidden),
        "rows_rotary": (qkv, angles, angles, offsets, offsets, row_ids, programs.HEADS, LENGTH),
        "rows_glu": (empty(tokens, 2 * gated), offsets, empty(tokens, gated), "gelu"),
        "rows_mean": (empty(2 * tokens, WIDTH), offsets, row_ids, empty(rows, WIDTH)),
    }[kernel]


@pytest.mark.parametrize("rows", programs.CAPACITIES)
@pytest.mark.parametrize("kernel", programs.KERNELS)
def test_programs_are_those_of_the_launch(kernel, rows, monkeypatch):
    module, grids = importlib.import_module(f"earlyexit_kernels.ops.{kernel}"), []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(module, f"{kernel}_kernel", Recorder())
    monkeypatch.setattr("earlyexit_kernels.ops.tiles.processors_of", lambda device: CARD.processors)
    getattr(module, f"{kernel}_triton")(*arguments(kernel, rows))
    (grid,) = grids
    assert programs.programs(kernel, rows) == torch.Size(grid).numel()


def test_launches_do_not_grow_with_the_capacity():
    """A layer with few live rows would otherwise cost what its empty programs do."""
    for kernel, (_, resident) in programs.KERNELS.items():
        assert resident is None or programs.programs(kernel, 1024) == resident * CARD.processors
