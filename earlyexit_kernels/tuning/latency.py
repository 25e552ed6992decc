"""Measure the latency of a model under a criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.hf.predict import INPUTS, PadRight
from earlyexit_kernels.tuning.timing import interleave, quantiles

#: Batches that are timed.
BATCHES = 30


class BatchLatency:
    """Times batches of a data set under criteria; each criterion is measured once.

    Args:
        model: an early-exit model; its criterion is restored after each measurement.
        dataset: items are mappings with the inputs of the model.
        batch_size: rows per batch.
        collate_fn: pads a list of items.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        *,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: BATCHES * batch_size]
        loader = DataLoader(
            Subset(dataset, rows.tolist()), batch_size=batch_size, collate_fn=collate_fn or PadRight.of(model)
        )
        self._model = model
        self._batches = [{k: v.to(model.device) for k, v in batch.items() if k in INPUTS} for batch in loader]
        self._measured: dict[Criterion, float] = {}

    def __call__(self, criterion: Criterion) -> float:
        """Return the median time of a batch in milliseconds, in eval mode."""
        if criterion not in self._measured:
            self._measured[criterion] = self._measure(criterion)
        return self._measured[criterion]

    @torch.inference_mode()
    def _measure(self, criterion: Criterion) -> float:
        model, before = self._model, self._model.criterion
        sync = torch.cuda.synchronize if model.device.type == "cuda" else None
        model.eval()
        model.set_criterion(criterion)
        calls = {str(number): lambda batch=batch: model(**batch) for number, batch in enumerate(self._batches)}
        try:
            times = interleave(calls, repeats=2, warmup=1, sync=sync)
        finally:
            model.set_criterion(before)
        return quantiles([time for batch in times.values() for time in batch])[1]
