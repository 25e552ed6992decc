"""Cost of a compaction in units of a layer's arithmetic: the two constants of the eager engine's rule.

For batches of several sizes it times one layer on all tokens and one compaction that drops a single row (so that nearly
all tokens move), and fits ``compaction = fixed + moved values * per_value``, in multiply-adds at the layer's own speed.
Run with ``python -m benchmarks.run --suite compaction_cost``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from statistics import median

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

import earlyexit_kernels as ee
from benchmarks.harness import Record
from earlyexit_kernels.engine import eager
from earlyexit_kernels.engine.packing import PackedBatch, compact_batch, pack, plan_attention
from earlyexit_kernels.tuning.timing import interleave

SUITE = "compaction_cost"
SHAPES = ((4, 32), (16, 32), (32, 32), (32, 128), (128, 32))


def _ragged(rows: int, length: int) -> PackedBatch:
    lengths = length // 2 + torch.arange(rows) % (length // 2) + 1
    return pack(torch.ones(rows, length, dtype=torch.long), (torch.arange(length) < lengths[:, None]).long())


def measure(width: int, rows: int, length: int, repeats: int = 15) -> Record:
    """Time one layer and one compaction of a ragged batch."""
    config = BertConfig(
        hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width, num_hidden_layers=1
    )
    model = ee.to_early_exit(BertForSequenceClassification(config).eval(), pooling="first")
    layer, macs = model.execution.encoder_layers(model.view())[0], 12 * width * width
    batch = _ragged(rows, length)
    tokens = int(batch.offsets[-1])
    hidden, plan = torch.randn(1, tokens, width), plan_attention(batch)
    left = dataclasses.replace(batch, tokens=None, row_ids=batch.row_ids.clone())
    left.row_ids[0] = -1
    kept = tokens - batch.lengths[0]

    def compaction() -> None:
        smaller, _, _ = compact_batch(left, hidden, rows - 1, kept, "auto")
        plan_attention(smaller)

    times = interleave({"layer": lambda: layer(hidden, None, plan=plan), "compaction": compaction}, repeats=repeats)
    layer_ms, compaction_ms = median(times["layer"]), median(times["compaction"])
    return {
        "suite": SUITE,
        "case": f"H {width}, B {rows}, S {length}",
        "layer_ms": round(layer_ms, 4),
        "compaction_ms": round(compaction_ms, 4),
        "moved_values": kept * width,
        "compaction_macs": round(compaction_ms / layer_ms * tokens * macs),
    }


def records(repeats: int) -> Iterator[Record]:
    """Yield a record for each shape, then one with the fit; rounds do not depend on `repeats`."""
    with torch.inference_mode():
        rows = []
        for width in (384, 768):
            for shape in SHAPES:
                rows.append(measure(width, *shape))
                yield rows[-1]
    moved = np.array([[1.0, row["moved_values"]] for row in rows])
    cost = np.array([row["compaction_macs"] for row in rows], dtype=np.float64)
    # the fit minimises relative errors, so that small batches count as much as large ones
    fixed, per_value = np.linalg.lstsq(moved / cost[:, None], np.ones(len(rows)), rcond=None)[0]
    yield {
        "suite": SUITE,
        "case": "fit",
        "macs_per_compaction": round(fixed),
        "macs_per_moved_value": round(per_value, 1),
        "macs_per_compaction_in_use": eager.MACS_PER_COMPACTION,
        "macs_per_moved_value_in_use": eager.MACS_PER_MOVED_VALUE,
    }
