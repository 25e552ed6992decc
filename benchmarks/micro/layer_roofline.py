"""Encoder layers on the vector kernels beside what the processor can do: operations, and bytes of weights.

The layers of BERT-base, one after the other, so that each reads its weights from memory, on M tokens in rows of at most
128. Operations are those of the products alone, while the time is that of the whole layers. The peaks are measured
before and after, and the larger ones count; see `peaks`. Run with ``python -m benchmarks.run --suite layer_roofline``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import earlyexit_kernels as ee
from benchmarks.goals import roofline_goal
from benchmarks.harness import Implementation, PreparedCase, Record, Variant, goal_fields, time_fields
from benchmarks.micro.peaks import Peaks, measured_peaks
from earlyexit_kernels.core.attention_plan import plan_attention
from earlyexit_kernels.core.packing import pack
from earlyexit_kernels.cpu.kernels import STORED, kernels_unsupported_reason

SUITE = "layer_roofline"
TOKENS = (1, 8, 32, 128, 1024)
LONGEST = 128
LAYERS = 12


def records(repeats: int) -> Iterator[Record]:
    """Yield a record for each number of tokens and type of weights."""
    before = measured_peaks()
    with torch.inference_mode():
        model = ee.to_early_exit(BertForSequenceClassification(BertConfig(num_hidden_layers=LAYERS)).eval())
        stacks: dict[str, Sequence[Any]] = {}
        for stored, dtype in STORED.items():
            if reason := kernels_unsupported_reason(torch.float32, dtype):
                yield {"suite": SUITE, "case": stored, "not_measured": reason}
                continue
            model.configure(path="fused", weights=stored)
            stacks[stored] = model.runner._encoder(model.view()).layers
        found = [record for tokens in TOKENS for record in _times_of(tokens, stacks, repeats)]
    peaks = measured_peaks().best(before)
    for record in found:
        yield _beside(peaks, record)


def _times_of(tokens: int, stacks: dict[str, Sequence[Any]], repeats: int) -> Iterator[Record]:
    """Yield the time of all layers on some tokens, and their operations and bytes."""
    rows = -(-tokens // LONGEST)
    plan = plan_attention(pack(torch.ones(rows, tokens // rows, dtype=torch.long), None))
    hidden = torch.randn(1, tokens, BertConfig().hidden_size)
    variants = {stored: Variant("fused layers", "cpp", stored) for stored in stacks}
    case = PreparedCase({v: Implementation(v, partial(_run, stacks[s], hidden, plan)) for s, v in variants.items()})
    times = case.times(rounds=3 * repeats, warmup=2, progress=f"M {tokens}")
    for stored, variant in variants.items():
        packed = [layer.packed.weights for layer in stacks[stored]]
        bytes_read = sum(x.nbytes for weights in packed for x in weights)
        operations = 2 * tokens * sum(x.numel() for weights in packed for x in weights)
        record = {"suite": SUITE, "case": stored, "shape": f"M {tokens}", "dtype": stored, "engine": "fused layers"}
        record |= {"backend": "cpp", "cpu_capability": torch.backends.cpu.get_cpu_capability(), "tokens": tokens}
        yield record | {"operations": operations, "bytes": bytes_read} | time_fields(times[variant])


def _beside(peaks: Peaks, record: Record) -> Record:
    """Return a record with its rates, their shares of the peaks, and its goal."""
    operations, read = (1000 * record[name] / record["median_ms"] for name in ("operations", "bytes"))
    record |= {"peak_gflops": round(peaks.operations / 1e9), "peak_gb_per_second": round(peaks.bytes / 1e9, 1)}
    record |= {"gflops": round(operations / 1e9), "gb_per_second": round(read / 1e9, 1)}
    record |= {"operations_share": round(operations / peaks.operations, 3)}
    record |= {"bytes_share": round(read / peaks.bytes, 3)}
    return record | goal_fields(roofline_goal(record["case"], record["tokens"]), record)


def _run(layers: Sequence[Any], hidden: torch.Tensor, plan: Any) -> torch.Tensor:
    for layer in layers:
        hidden = layer(hidden, plan=plan)
    return hidden
