"""Wall-clock against plain Hugging Face (sdpa) on the same weights: full depth, forced exits, and ragged lengths.

BERT-base's shape with random weights; denormals are flushed, since random weights make them. All cases of a batch run
interleaved; ratios are medians of per-round ratios with their .2 and .8 quantiles.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import earlyexit_kernels as ee
from benchmarks.end_to_end.forced import MIXES, force_exits
from earlyexit_kernels.criteria import Entropy
from earlyexit_kernels.timing import interleave, paired_ratio, quantiles

SUITE = "wall_clock"
CLASSES = 3
#: case -> the ratio to stock that was set as a goal
GOALS = {
    "never exit, B 1, S 32": 1.03,
    "never exit, B 32, S 32": 1.03,
    "39 % of layer-rows, even, B 32, S 32": 0.40,
    "23 % of layer-rows, even, B 32, S 32": 0.24,
    "18 % of layer-rows, even, B 32, S 32": 0.19,
    "39 % of layer-rows, long tail, B 32, S 32": 0.40,
    "23 % of layer-rows, long tail, B 32, S 32": 0.24,
    "18 % of layer-rows, long tail, B 32, S 32": 0.19,
    "never exit, SST-2 train lengths, B 32": 0.48,
}


@dataclass(frozen=True)
class Case:
    """Some batches and the early-exit models to time on them beside the stock one.

    Attributes:
        shape: in words.
        batches: run one after the other in every call that is timed.
        models: by name.
        shares: share of the layer-rows that each runs.
    """

    shape: str
    batches: tuple[dict[str, Tensor], ...]
    models: dict[str, ee.EarlyExitForSequenceClassification]
    shares: dict[str, float]

    @property
    def tokens(self) -> float:
        """Share of the padded batches that is tokens."""
        masks = [batch["attention_mask"] for batch in self.batches]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


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


def sst2_batches(split: str, rows: int, batches: int) -> tuple[dict[str, Tensor], ...]:
    """Padded batches with the token counts of random SST-2 rows, words and two marks; none without the data."""
    folder = os.environ.get("EARLYEXIT_DATA")
    if folder is None:
        return ()
    with (Path(folder) / "sst2" / f"{split}.tsv").open(encoding="utf-8") as file:
        sentences = [row["sentence"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    lengths = torch.tensor([len(s.split()) + 2 for s in sentences])
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    padded = []
    for picked in lengths[order[: rows * batches]].split(rows):
        mask = (torch.arange(int(picked.max())) < picked[:, None]).long()
        padded.append({"input_ids": full_batch(*mask.shape)["input_ids"] * mask, "attention_mask": mask})
    return tuple(padded)


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
    for rows, length in ((1, 32), (1, 128), (32, 32)):
        yield Case(f"B {rows}, S {length}", (full_batch(rows, length),), never, everything)
    batch = full_batch(32, 32)
    models, shares = {}, {}
    for mix in MIXES:
        for share in (0.39, 0.23, 0.18):
            model = ee.to_early_exit(stock, pooling="first")
            name = f"{share * 100:.0f} % of layer-rows, {mix}"
            models[name], shares[name] = model, force_exits(model, batch, share, mix)
    yield Case("B 32, S 32", (batch,), models, shares)
    for split in ("train", "dev"):
        ragged = sst2_batches(split, rows=32, batches=4)
        if ragged:
            yield Case(f"SST-2 {split} lengths, B 32", ragged, never, everything)


def check_answers(stock: BertForSequenceClassification, case: Case) -> None:
    """Refuse to time a model whose answers are wrong: its trace must replay to them, and end in the stock logits."""
    for batch in case.batches:
        for name, model in case.models.items():
            logits, exit_layer = ee.replay(model.trace(**batch), model.criterion)
            out: Any = model(**batch)
            torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
            if not torch.equal(out.exit_layer, exit_layer):
                raise AssertionError(f"{name}, {case.shape}: exit layers differ from the replayed ones")
        if "never exit, family heads" in case.models:
            got = case.models["never exit, family heads"](**batch).logits
            torch.testing.assert_close(got, stock(**batch).logits, rtol=1e-4, atol=1e-5)


def _runs(model: Any, batches: tuple[dict[str, Tensor], ...]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            model(**batch)

    return run


def records(repeats: int) -> Iterator[dict[str, Any]]:
    """Time every case; one record for each early-exit model of it."""
    torch.set_flush_denormal(True)
    stock = stock_model()
    with torch.inference_mode():
        for case in cases(stock):
            check_answers(stock, case)
            calls = {name: _runs(model, case.batches) for name, model in {"stock": stock, **case.models}.items()}
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
                    "tokens": round(case.tokens, 4),
                    "median_ms": round(median, 3),
                    "p90_ms": round(p90, 3),
                    "ratio": round(ratio.median, 4),
                    "ratio_low": round(ratio.low, 4),
                    "ratio_high": round(ratio.high, 4),
                    "goal": GOALS.get(label),
                }
