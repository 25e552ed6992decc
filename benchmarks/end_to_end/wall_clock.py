"""Wall-clock against plain Hugging Face (sdpa) on the same weights: full depth, forced exits, and ragged lengths.

BERT-base's shape with random weights; denormals are flushed, since random weights make them. All cases of a batch run
interleaved; ratios are medians of per-round ratios with their .2 and .8 quantiles.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import earlyexit_kernels as ee
from benchmarks.end_to_end.forced import force_exits
from earlyexit_kernels.criteria import Entropy
from earlyexit_kernels.timing import interleave, paired_ratio, quantiles

SUITE = "wall_clock"
CLASSES = 3
#: case -> the ratio to stock that was set as a goal
GOALS = {
    "never exit, B 1, S 32": 1.03,
    "never exit, B 32, S 32": 1.03,
    "39 % of layer-rows, B 32, S 32": 0.40,
    "23 % of layer-rows, B 32, S 32": 0.24,
    "18 % of layer-rows, B 32, S 32": 0.19,
    "never exit, SST-2 lengths, B 32": 0.48,
}


@dataclass(frozen=True)
class Case:
    """One batch and the early-exit models to time on it beside the stock one."""

    shape: str
    batch: dict[str, Tensor]
    models: dict[str, ee.EarlyExitForSequenceClassification]
    shares: dict[str, float]


def stock_model() -> BertForSequenceClassification:
    """BERT-base's shape, random weights, sdpa attention."""
    torch.manual_seed(0)
    config = BertConfig(num_labels=CLASSES)
    config._attn_implementation = "sdpa"
    return BertForSequenceClassification(config).eval()


def full_batch(rows: int, length: int) -> dict[str, Tensor]:
    """Rows of one length, mask of ones, as a tokenizer gives them."""
    ids = torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def sst2_batch(rows: int) -> dict[str, Tensor] | None:
    """A padded batch with the token counts of SST-2's dev sentences (words and two marks); None without the data."""
    folder = os.environ.get("EARLYEXIT_DATA")
    if folder is None:
        return None
    with (Path(folder) / "sst2" / "dev.tsv").open(encoding="utf-8") as file:
        sentences = [row["sentence"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    lengths = torch.tensor([len(s.split()) + 2 for s in sentences])
    picked = lengths[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))[:rows]]
    width = int(picked.max())
    mask = (torch.arange(width) < picked[:, None]).long()
    return {"input_ids": full_batch(rows, width)["input_ids"] * mask, "attention_mask": mask}


def never_exits(stock: BertForSequenceClassification) -> dict[str, ee.EarlyExitForSequenceClassification]:
    """Full depth (only the last head runs), and every head and decision with a threshold nothing passes."""
    full = ee.to_early_exit(stock, pooling="first")
    deciding = ee.to_early_exit(stock, pooling="first", criterion=Entropy(threshold=0.0))
    family = ee.to_early_exit(stock, criterion=Entropy(threshold=0.0))
    return {"full depth": full, "never exit": deciding, "never exit, family heads": family}


def cases(stock: BertForSequenceClassification) -> Iterator[Case]:
    """All cases, each ready to time."""
    never = never_exits(stock)
    everything = dict.fromkeys(never, 1.0)
    for rows, length in ((1, 32), (1, 128), (32, 32), (32, 128)):
        yield Case(f"B {rows}, S {length}", full_batch(rows, length), never, everything)
    batch = full_batch(32, 32)
    models, shares = {}, {}
    for share in (0.39, 0.23, 0.18):
        model = ee.to_early_exit(stock, pooling="first")
        name = f"{share * 100:.0f} % of layer-rows"
        models[name], shares[name] = model, force_exits(model, batch, share)
    yield Case("B 32, S 32", batch, models, shares)
    ragged = sst2_batch(32)
    if ragged is not None:
        yield Case("SST-2 lengths, B 32", ragged, never, everything)


def check_answers(stock: BertForSequenceClassification, case: Case) -> None:
    """Refuse to time a model whose answers are wrong: its trace must replay to them, and end in the stock logits."""
    for name, model in case.models.items():
        trace = model.trace(**case.batch)
        logits, exit_layer = ee.replay(trace, model.criterion)
        out: Any = model(**case.batch)
        torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
        if not torch.equal(out.exit_layer, exit_layer):
            raise AssertionError(f"{name}, {case.shape}: exit layers differ from the replayed ones")
    if "never exit, family heads" in case.models:
        expected = stock(**case.batch).logits
        got = case.models["never exit, family heads"](**case.batch).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def records(repeats: int) -> Iterator[dict[str, Any]]:
    """Time every case; one record for each early-exit model of it."""
    torch.set_flush_denormal(True)
    stock = stock_model()
    with torch.inference_mode():
        for case in cases(stock):
            check_answers(stock, case)
            calls = {"stock": lambda batch=case.batch: stock(**batch)}
            for name, model in case.models.items():
                calls[name] = lambda model=model, batch=case.batch: model(**batch)
            times = interleave(calls, repeats=repeats, progress=case.shape)
            for name, model in case.models.items():
                ratio = paired_ratio(times[name], times["stock"])
                median, p90 = quantiles(times[name], (0.5, 0.9))
                label = f"{name}, {case.shape}"
                yield {
                    "suite": SUITE,
                    "case": label,
                    "shape": case.shape,
                    "dtype": "float32",
                    "engine": "eager",
                    "backend": model.backend,
                    "baseline": "transformers, sdpa, padded",
                    "layer_rows": round(case.shares[name], 4),
                    "median_ms": round(median, 3),
                    "p90_ms": round(p90, 3),
                    "ratio": round(ratio.median, 4),
                    "ratio_low": round(ratio.low, 4),
                    "ratio_high": round(ratio.high, 4),
                    "goal": GOALS.get(label),
                }
