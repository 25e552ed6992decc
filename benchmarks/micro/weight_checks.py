"""Time of the checks that packed weights are current, of all layers that a batch runs.

``in a row`` checks again at once, from warm caches; ``between batches`` checks after a forward pass of one row, which
evicts the caches. Run with ``python -m benchmarks.run --suite weight_checks``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import earlyexit_kernels as ee
from benchmarks.harness import Record, do_nothing
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.tuning.timing import quantiles

SUITE = "weight_checks"
#: Case -> layers, H and heads of a model of BERT's form.
MODELS = {"MiniLM": (6, 384, 12), "BERT-base": (12, 768, 12)}
#: Case -> microseconds per batch that are its goal.
GOALS = {"BERT-base": 50.0}
CHECKS_PER_REPEAT = 20
LENGTH = 16


def records(repeats: int) -> Iterator[Record]:
    """Yield a record for each model and state of the caches."""
    for case, (depth, width, heads) in MODELS.items():
        config = BertConfig(
            num_hidden_layers=depth, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width
        )
        model = ee.to_early_exit(BertForSequenceClassification(config).eval(), pooling="first")
        ids = torch.randint(5, 1000, (1, LENGTH))
        model(input_ids=ids)
        made = dict(model.runner.paths["fused"].layers._made)
        if model.explain().path != "fused":
            yield {"suite": SUITE, "case": case, "not_measured": model.explain().reason}
            continue
        check = partial(_all_hold, [(each.seal, [layer]) for layer, each in made.items()])
        for caches, batch in {"in a row": do_nothing, "between batches": partial(model, input_ids=ids)}.items():
            low, median, high = (round(1e6 * x, 2) for x in quantiles(timed(check, batch, repeats), (0.2, 0.5, 0.8)))
            fields = {"suite": SUITE, "case": case, "caches": caches, "goal": GOALS.get(case)}
            fields["backend"] = "python" if available_backends("cpu")["cpp"] else "cpp"
            yield fields | {"microseconds": median, "low": low, "high": high}


def _all_hold(sealed: list[tuple[Any, list[Any]]]) -> bool:
    return all(seal.holds(modules) for seal, modules in sealed)


def timed(check: Callable[[], bool], batch: Callable[[], Any], repeats: int) -> list[float]:
    """Return the seconds of each check, with a batch before it."""
    seconds = []
    with torch.inference_mode():
        for _ in range(CHECKS_PER_REPEAT * repeats):
            batch()
            start = time.perf_counter()
            current = check()
            seconds.append(time.perf_counter() - start)
            if not current:
                raise AssertionError("unchanged weights are reported as changed")
    return seconds
