"""The memory that the graphs of a model share, and that no batch sees what others have left in it."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch
from support.models import batch_for, early_exit

from earlyexit_kernels.criteria import Patience
from earlyexit_kernels.engine import graphs
from earlyexit_kernels.engine.graphs import Graphs, bucket_of, max_rows
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident_buffers import ALIGNMENT, Arena, activation_shapes, bytes_of

HALF, CPU, LONGEST = torch.float16, torch.device("cpu"), 512
DESIGN = Path(__file__).resolve().parents[2] / "docs" / "design.md"


def of_bert_base(tokens: int) -> int:
    """Bytes of the activations of BERT-base in half precision."""
    return bytes_of(activation_shapes(tokens, 768, 3072, HALF).values())


def test_an_arena_grows_and_is_freed():
    arena = Arena()
    small = arena.take(100, CPU)
    large = arena.take(1000, CPU)
    assert arena.take(10, CPU) is large is arena.take(1000, CPU) is not small
    assert arena.take(10, torch.device("meta")) is not large
    large = arena.take(2000, CPU)
    del large
    gc.collect()
    assert len(arena.take(10, CPU).data) == 10, "memory that no loop holds is freed"


def loops_of(runner: Graphs) -> list:
    return [captured.loop for captured in runner._captured.values()]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_graphs_share_memory_and_nothing_that_it_holds(captures, family):
    """Buckets of ascending and descending sizes; before each batch all activations of all graphs are NaN."""
    model, runner = early_exit(family, pooling="mean", criterion=Patience(patience=1)), Graphs()
    lengths = [(5,), (17, 3, 9), (20, 4, 4, 4, 30), (40, 9), (7,), (5, 6), (17, 3, 9)]
    for rows in lengths:
        for loop, buffer in itertools.product(loops_of(runner), range(8)):
            loop.activations.buffers[buffer].fill_(torch.nan)
        batch = batch_for(model, lengths=rows)
        out, expected = runner.run(model.view(), "torch", Inputs(**batch)), model(**batch)
        assert torch.equal(out.exit_layer, expected.exit_layer)
        torch.testing.assert_close(out.logits, expected.logits, atol=2e-5, rtol=1e-4)
    memories = {id(loop.activations.memory) for loop in loops_of(runner)}
    assert len(captures) == 5 and len(memories) == 3, "the first three are each larger than those before"


def test_buffers_lie_apart_and_aligned(captures):
    model, runner = early_exit("modernbert", pooling="mean", criterion=Patience(patience=1)), Graphs()
    runner.run(model.view(), "torch", Inputs(**batch_for(model)))
    (loop,) = loops_of(runner)
    start = loop.activations.memory.data.data_ptr()
    spans = sorted((x.data_ptr() - start, x.numel() * x.element_size()) for x in loop.activations.buffers[:-1])
    assert all(first % ALIGNMENT == 0 for first, _ in spans)
    assert all(first + size <= second for (first, size), (second, _) in itertools.pairwise(spans))
    assert sum(spans[-1]) <= len(loop.activations.memory.data)


def test_the_document_counts_graphs_and_bytes():
    lengths = {bucket_of(1, length).length for length in range(1, LONGEST + 1)}
    buckets = {bucket_of(rows, length) for length in lengths for rows in range(1, max_rows(length) + 1)}
    tokens = sorted((bucket.tokens for bucket in buckets), reverse=True)
    largest, apart = of_bert_base(tokens[0]), sum(map(of_bert_base, tokens[: graphs.MAX_GRAPHS]))
    # in any order of captures each further memory is of another number of tokens
    in_turn = sum(map(of_bert_base, set(tokens)))
    text = " ".join(DESIGN.read_text(encoding="utf-8").split())
    assert tokens[0] == graphs.MAX_TOKENS
    for said in (
        f"up to {graphs.MAX_GRAPHS} of the {len(buckets)} buckets that there are for rows of up to {LONGEST} tokens",
        f"{largest / tokens[0]:,.0f} bytes for each token, {largest / 2**20:.0f} MiB for the largest bucket",
        f"{in_turn / largest:.2f} times as much",
        f"{apart / largest:.1f} times as much",
        f"{8 * 8 * tokens[0] / 2**20:.0f} MiB",
    ):
        assert said in text, said
