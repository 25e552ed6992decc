"""The kernels before layer 1 compile for several GPU architectures, without spilling a register."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")
from ops.test_triton_compile import (
    BFLOAT16,
    FLOAT32,
    HALF,
    TARGETS,
    Recorder,
    compile_launch,
    compile_recorded,
    empty,
)
from support.kernel_table import usage_of

#: Rows and columns of a batch, and the kernels that pack it.
PACKED = {
    "one": (1, 1024, ["pack_tokens_kernel"]),
    "some": (32, 128, ["pack_tokens_kernel"]),
    "many": (1024, 512, ["count_tokens_kernel", "pack_tokens_kernel"]),
    "long": (1, 2048, ["count_tokens_kernel", "pack_tokens_kernel"]),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", PACKED)
def test_pack_tokens(name, capability, monkeypatch, kernel_table, tmp_path):
    """A state of three numbers a row, and the counts of 48 layers."""
    module, (rows, width, kernels) = importlib.import_module("earlyexit_kernels.ops.pack_tokens"), PACKED[name]
    longs = [empty(rows, width, dtype=torch.int64) for _ in range(4)]
    found, row_ids, offsets, counts = (
        empty(*size, dtype=torch.int32) for size in ((2, rows), (rows,), (rows + 1,), (49 * 6,))
    )
    tokens, states = empty(4, rows * width, dtype=torch.int64), [empty(*s, dtype=FLOAT32) for s in ((3,), (3, rows))]
    recorders = {kernel: Recorder() for kernel in ("count_tokens_kernel", "pack_tokens_kernel")}
    with monkeypatch.context() as patch:
        for kernel, recorder in recorders.items():
            patch.setattr(module, kernel, recorder)
        module.pack_tokens_triton(empty(5, dtype=torch.int32), *longs, found, row_ids, offsets, tokens, counts, *states)
    assert [kernel for kernel, recorder in recorders.items() if vars(recorder)] == kernels
    compiled = [compile_recorded(capability, getattr(module, kernel), recorders[kernel]) for kernel in kernels]
    for kernel in compiled:
        usage_of(kernel, tmp_path)
    for kernel in compiled:
        kernel_table.check(f"{rows} x {width}", capability, kernel, tmp_path)


def rows_embed(dtype, width=768, positions=512, types=2):
    words, norm = empty(30522, width, dtype=dtype), [empty(width, dtype=dtype)] * 2
    tables = [empty(size, width, dtype=dtype) if size else None for size in (positions, types)]
    tokens, offsets = empty(4, 999, dtype=torch.int64), empty(9, dtype=torch.int32)
    return "rows_embed", tokens, words, *tables, *norm, 1e-12, offsets, empty(999, width, dtype=dtype)


#: As in BERT, ModernBERT, a factorised DistilBERT and RoBERTa.
EMBEDDINGS = {
    "all": lambda: rows_embed(HALF),
    "words": lambda: rows_embed(BFLOAT16, positions=0, types=0),
    "narrow": lambda: rows_embed(FLOAT32, 128, types=0),
    "wide": lambda: rows_embed(FLOAT32, 4096, types=1),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_rows_embed(name, capability, monkeypatch, kernel_table, tmp_path):
    compiled = compile_launch(capability, monkeypatch, *EMBEDDINGS[name]())
    kernel_table.check(name, capability, compiled, tmp_path)
