"""Accuracy of trained models by the type in which the weights of their fused layers are stored.

    python -m benchmarks.micro.stored_accuracy FOLDER ...

Each folder is one that ``earlyexit train`` wrote for a built-in task, whose data EARLYEXIT_DATA names. An entropy
threshold is chosen for float32 on the held-out train rows (at most half a point lost), and used for all types on the
rows that the training reported on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

import earlyexit_kernels as ee
from benchmarks import harness
from benchmarks.harness import Record
from benchmarks.tables import NOT_MEASURED, per_machine, skipped
from earlyexit_kernels.cli.evaluate import encoded, load_model
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.tuning.report import markdown_table
from earlyexit_kernels.tuning.traces import collect_trace

SUITE = "stored_accuracy"
STORED = ("float32", "float16", "bfloat16", "int8")
DROP = 0.005


def records(folder: Path) -> Iterator[Record]:
    """Yield a record for each type of weights of one trained model."""
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


def table(results: Path | None = None) -> str:
    """Return accuracies by model and type of weights."""
    header = ("task", "weights", "rows", "accuracy, all layers", "with exits", "mean exit layer", "same answers")

    def rows(found: list[Record]) -> str:
        cells = [
            (
                *(r["case"], r["dtype"], str(r["rows"]), f"{r['full_depth']:.4f}", f"{r['accuracy']:.4f}"),
                *(f"{r['mean_exit_layer']:.2f}", f"{r['same']:.2%}"),
            )
            for r in found
            if "rows" in r
        ]
        return "\n\n".join([markdown_table(header, cells) if cells else NOT_MEASURED, *skipped(found)])

    return per_machine(SUITE, rows, results)


def main() -> None:
    """Measure the models and store the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    found = []
    for folder in parser.parse_args().folder:
        for record in records(folder):
            found.append(record)
            print(record, flush=True)
    print(f"wrote {harness.save(SUITE, found)}")


if __name__ == "__main__":
    main()
