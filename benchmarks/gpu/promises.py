"""Checks of the graph engine: one synchronisation per batch, and equal bits of a row in every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.end_to_end import models
from benchmarks.end_to_end.engines import FAMILY_LAYERS, GRAPH, engine_model
from benchmarks.end_to_end.forced import rule_for
from benchmarks.end_to_end.models import Model
from benchmarks.end_to_end.suites import HALF
from benchmarks.end_to_end.workloads import Fixed, padded
from benchmarks.goals import gpu_goal
from benchmarks.gpu.bench import Bench, header
from benchmarks.gpu.calls import calls_of, launches, miscounted, synchronisations
from benchmarks.gpu.whole import SUBJECT
from benchmarks.harness import Record
from benchmarks.machine import device

SYNCS, BITS = "gpu_synchronisations", "gpu_bits"
ENGINES = (GRAPH, FAMILY_LAYERS)
WARM_UPS = 3
#: Rows of the batch, and of the smaller batches in which they run again.
ROWS, TOGETHER = 128, (1, 8, 32)


def sync_records(bench: Bench) -> Iterator[Record]:
    """Yield how often the host waits for the device per batch, with and without a mask, and torch's debug message."""
    if wrong := miscounted(bench.device):
        yield header(SYNCS, "host synchronisations", "profiler") | {"not_measured": wrong}
        return
    dtype, rows = bench.dtypes[0], bench.batches[len(bench.batches) // 2]
    for engine in ENGINES:
        model, batch = _ready(bench, engine, dtype, rows)
        for given, inputs in (("with a mask", batch), ("without a mask", {"input_ids": batch["input_ids"]})):
            shape = f"{Fixed(rows, bench.length).name}, {given}"
            record = header(SYNCS, "host synchronisations", engine, shape=shape, dtype=dtype, backend=model.backend)
            run = _run(model, inputs)
            for _ in range(WARM_UPS):
                run()
            counted = calls_of(run)
            record |= {"syncs": synchronisations(counted), "launches": launches(counted)}
            record |= {"silent_in_debug_mode": not (message := _in_debug_mode(run)), "debug_mode": message}
            yield record | (gpu_goal("host synchronisations a batch", record) if engine == GRAPH else {})


def _in_debug_mode(run: Callable[[], Any]) -> str:
    """Return torch's message if a call synchronises, else an empty string."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _ready(bench: Bench, engine: str, dtype: str, rows: int) -> tuple[Model, dict[str, Tensor]]:
    """Return a model whose rows leave at many layers, and a batch."""
    subject = models.subject(SUBJECT, dtype)
    (batch,) = Fixed(rows, bench.length).build(subject).batches
    model = engine_model(subject, engine)
    with torch.inference_mode():
        model.set_criterion(rule_for(HALF, subject.model.trace(**batch), trained=False))
    return model, batch


def _run(model: Model, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(**batch)

    return run


def bit_records(bench: Bench) -> Iterator[Record]:
    """Yield how many rows differ in a bit when they run in smaller batches of the graph engine, or alone unpadded."""
    for dtype in ("float32", *bench.dtypes):
        subject = models.subject(SUBJECT, dtype)
        rows = min(ROWS, 2 * max(bench.batches))
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(2, bench.length + 1, (rows,), generator=generator).tolist()
        lengths[0] = bench.length
        ids = [torch.randint(1, subject.vocabulary, (n,), generator=generator).to(device()) for n in lengths]
        model, batch = engine_model(subject, GRAPH), padded(ids)
        with torch.inference_mode():
            model.set_criterion(rule_for(HALF, subject.model.trace(**batch), trained=False))
            whole = model(**batch)
            record = header(BITS, f"in {', '.join(map(str, TOGETHER))} and {rows}", GRAPH, dtype=dtype)
            record |= {"backend": model.backend, "shape": Fixed(rows, bench.length).name}
            different = set[int]().union(*(_differing(model, whole, *part) for part in _parts(batch, ids)))
        record |= {"rows": rows, "different": len(different)}
        record |= {"mean_exit_layer": round(float(whole.exit_layer.double().mean()), 3)}
        yield record | gpu_goal("rows whose bits differ alone and in 8, 32 and 128", record)


def _parts(batch: dict[str, Tensor], ids: Sequence[Tensor]) -> Iterator[tuple[range, dict[str, Tensor]]]:
    """Yield the rows of a batch in smaller batches: its parts, padded as they are, and each row alone, unpadded."""
    rows = len(ids)
    for size in TOGETHER:
        for start in range(0, rows, size):
            part = range(start, min(start + size, rows))
            yield part, {name: x[part.start : part.stop] for name, x in batch.items()}
    for row, own in enumerate(ids):
        yield range(row, row + 1), {"input_ids": own[None], "attention_mask": torch.ones_like(own)[None]}


def _differing(model: Model, whole: Any, rows: range, batch: dict[str, Tensor]) -> set[int]:
    """Return the rows of a part whose logits or exit layers differ from those in the whole batch."""
    out = model(**batch)
    logits, exits = whole.logits[rows.start : rows.stop], whole.exit_layer[rows.start : rows.stop]
    same = (out.logits.view(torch.int32) == logits.view(torch.int32)).all(dim=1) & (out.exit_layer == exits)
    return {rows.start + i for i in (~same).nonzero()[:, 0].tolist()}
