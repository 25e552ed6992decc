"""Time to check, before each batch, that packed weights are those the model has.

``in a row`` checks again at once, from warm caches; ``between batches`` checks after a forward pass of one row, which
has evicted the caches. Run with ``python -m benchmarks.run --suite weight_checks``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import earlyexit_kernels as ee
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.tuning.timing import quantiles

SUITE = "weight_checks"
#: Case -> layers, H and heads of a model of BERT's form.
MODELS = {"MiniLM": (6, 384, 12), "BERT-base": (12, 768, 12)}
#: Microseconds a batch that were set as a goal.
GOALS = {"BERT-base": 50.0}
CHECKS_A_REPEAT = 20
LENGTH = 16


def records(repeats: int) -> Iterator[dict[str, Any]]:
    """One record for each model and state of the caches."""
    for case, (depth, width, heads) in MODELS.items():
        config = BertConfig(
            num_hidden_layers=depth, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width
        )
        model = ee.to_early_exit(BertForSequenceClassification(config).eval(), pooling="first")
        ids = torch.randint(5, 1000, (1, LENGTH))
        model(input_ids=ids)
        packed = model._fused._packed
        if packed is None or packed.layers is None:
            yield {"suite": SUITE, "case": case, "not_measured": model.explain(input_ids=ids).layers.reason}
            continue
        batches = {"in a row": lambda: None, "between batches": lambda model=model, ids=ids: model(input_ids=ids)}
        for caches, batch in batches.items():
            seconds = timed(
                lambda packed=packed, model=model: packed.made_from.is_current([model.backbone]), batch, repeats
            )
            low, median, high = (round(1e6 * x, 2) for x in quantiles(seconds, (0.2, 0.5, 0.8)))
            yield {
                "suite": SUITE,
                "case": case,
                "caches": caches,
                "backend": "python" if available_backends("cpu")["cpp"] else "cpp",
                "microseconds": median,
                "low": low,
                "high": high,
                "goal": GOALS.get(case),
            }


def timed(check: Callable[[], bool], batch: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each check, with a batch before it."""
    seconds = []
    with torch.inference_mode():
        for _ in range(CHECKS_A_REPEAT * repeats):
            batch()
            start = time.perf_counter()
            current = check()
            seconds.append(time.perf_counter() - start)
            if not current:
                raise AssertionError("the weights of a model that nobody changes are taken for changed")
    return seconds
