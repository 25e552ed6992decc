"""Accuracy of a trained model by the type in which the weights of their fused layers are stored.

    python -m benchmarks.run --suite stored_accuracy --model FOLDER

The folder is one that ``earlyexit train`` wrote for a built-in task, whose data EARLYEXIT_DATA names. An entropy
threshold is chosen for float32 on the held-out train rows (at most half a point lost), and used for all types on the
rows that the training reported on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import earlyexit_kernels as ee
from benchmarks.harness import Record
from benchmarks.machine import trained_folder
from earlyexit_kernels.cli.evaluate import encoded, load_model
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.tuning.traces import collect_trace

SUITE = "stored_accuracy"
STORED = ("float32", "float16", "bfloat16", "int8")
DROP = 0.005


def records(repeats: int) -> Iterator[Record]:
    """Yield a record for each type of weights."""
    folder = trained_folder()
    recipe = Recipe.load(folder)
    task = recipe.load_data(task=None, dev=None)
    model = load_model(folder, task).eval()
    (tuning, _), (reporting, _) = recipe.both_rows(task)
    splits = {"tuning": tuning, "reporting": reporting}
    data, collate = encoded(folder, model, splits, max_length=recipe.max_length)
    model.configure(path="fused")
    trace, labels = collect_trace(model, data["tuning"], collate_fn=collate)
    rule = ee.calibrate(trace, labels, target=ee.MaxDrop(DROP), criterion="entropy").criterion
    first = None
    for stored in STORED:
        record = {"suite": SUITE, "case": task.name, "dtype": stored, "engine": "fused layers", "backend": "cpp"}
        try:
            model.configure(path="fused", weights=stored)
        except BackendUnavailableError as error:
            yield record | {"not_measured": str(error)}
            continue
        trace, labels = collect_trace(model, data["reporting"], collate_fn=collate)
        truth = torch.as_tensor(labels)
        logits, exit_layer = ee.replay(trace, rule)
        early, full = logits.argmax(dim=1), trace.logits[:, -1].argmax(dim=1)
        first = early if first is None else first
        yield record | {
            "rows": len(truth),
            "full_depth": float((full == truth).double().mean()),
            "accuracy": float((early == truth).double().mean()),
            "mean_exit_layer": float(exit_layer.double().mean()),
            "same": float((early == first).double().mean()),
        }
