"""The short tables of the README, chosen from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS, Measured, measured
from benchmarks.tables import ratio_text
from earlyexit_kernels.tuning.report import markdown_table

SST2 = "sst2-minilm-l6.json"


class Case(NamedTuple):
    """One row of the table of speeds: a record of the end-to-end suites, and its description."""

    suite: str
    case: str
    baseline: str
    description: str


#: Cases that win and cases that lose, with the layers and the back-end that `auto` chooses.
SPEEDS = (
    Case("offline", "MiniLM, own exits, B 32, SST-2 lengths", "transformers", "MiniLM, trained exits, batches of 32"),
    Case("single_stream", "MiniLM, own exits, B 1, SST-2 lengths", "transformers", "MiniLM, trained exits, one by one"),
    Case("offline", "BERT-base, uniform, 50 %, B 32, S 32", "faster peer", "BERT-base, half the layers, batches of 32"),
    Case("offline", "BERT-base, never exit, B 32, S 32", "faster peer", "BERT-base, no row exits, batches of 32"),
    Case("single_stream", "BERT-base, never exit, B 1, S 32", "faster peer", "BERT-base, no row exits, one by one"),
)


def _machine(suite: str, results: Path | None) -> Measured:
    """The CPU with two threads that the README reports: the one measured last."""
    found = [m for m in measured(suite, results) if not m.facts["gpus"] and m.facts["threads"] == 2]
    return max(found, key=lambda m: m.facts["time"])


def _record(wanted: Case, results: Path | None, *, baseline: str | None = None) -> dict[str, Any]:
    keys = {"case": wanted.case, "baseline": baseline or wanted.baseline, "engine": "fused layers"}
    keys |= {"backend": "cpp", "dtype": "float32"}
    return next(r for r in _machine(wanted.suite, results).records if "ratio" in r and keys.items() <= r.items())


def headline(results: Path | None = None) -> str:
    """One case beside plain Transformers, the faster of the other runtimes, and itself without exits."""
    first = SPEEDS[0]
    plain, peer, own = (
        _record(first, results, baseline=name) for name in ("transformers", "faster peer", "our full depth")
    )
    facts = _machine(first.suite, results).facts
    machine = f"{facts['threads']} threads of an {facts['cpu']}"
    return (
        f"On SST-2 sentences in batches of 32 on {machine}, a 6-layer MiniLM with\n"
        f"exits takes {plain['ratio']:.2f} of the time of the plain Transformers model, {peer['ratio']:.2f} of that of "
        f"{peer['against']}, the faster of ONNX Runtime\nand OpenVINO, and {own['ratio']:.2f} of its own time with "
        "early exit off ([results](#results))."
    )


def speeds(results: Path | None = None) -> str:
    """Five cases of whole models, losses included."""
    rows = []
    for wanted in SPEEDS:
        record = _record(wanted, results)
        rows.append((wanted.description, f"{record['layer_rows']:.0%}", record["against"], ratio_text(record)))
    return markdown_table(("case", "layers run", "compared with", "time ratio"), rows)


def accuracies() -> str:
    """Full depth, truncation and the two chosen criteria on SST-2, method `joint`."""
    records = json.loads((RESULTS / SST2).read_text(encoding="utf-8"))["records"]
    layers = [r["reporting"]["accuracy"] for r in records if r["kind"] == "static_truncation"]
    depth = len(layers)
    half = depth // 2
    rows = [
        ("all layers", f"{depth:.2f}", "1.00", f"{layers[-1]:.3f}", ""),
        (f"first {half} layers only", f"{half:.2f}", f"{depth / half:.2f}", f"{layers[half - 1]:.3f}", ""),
    ]
    for name, number in (("entropy", "threshold"), ("patience", "patience")):
        record = next(r for r in records if r["kind"] == "point" and r["chosen"] and r["criterion"]["name"] == name)
        dev = record["reporting"]
        numbers = (dev["mean_exit_layer"], dev["layer_speed_up"])
        scores = (dev["scores"]["accuracy"], dev["random_exit"])
        setting = f"{name}, {number} {round(record['criterion'][number], 2):g}"
        rows.append((setting, *(f"{v:.2f}" for v in numbers), *(f"{v:.3f}" for v in scores)))
    return markdown_table(("exit", "mean exit layer", "fewer layers, x", "accuracy", "random exits"), rows)


TABLES = {"headline": headline, "speeds": speeds, "accuracies": accuracies}
