"""The short tables of the README, and those of accuracy on SST-2, chosen from the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import harness
from benchmarks.goals import PEER
from benchmarks.harness import Measured, Record, measured
from benchmarks.plots import ACCURACY
from benchmarks.tables import FUSED, PLAIN, Cell, Columns, Table, draw


def everything(record: Record) -> bool:
    """Choose every record."""
    return True


def _sst2() -> list[Record]:
    return json.loads((harness.RESULTS / ACCURACY[0]).read_text(encoding="utf-8"))["records"]


SST2_LAYERS: Columns = (
    ("exit after layer", "{layer}"),
    *(("held-out train rows", "{tuning[accuracy]:.3f}"), ("dev", "{reporting[accuracy]:.3f}")),
)
_DEV: Columns = (
    ("mean exit layer", "{reporting[mean_exit_layer]:.2f}"),
    ("fewer layers, x", "{reporting[layer_speed_up]:.2f}"),
    ("accuracy", "{reporting[scores][accuracy]:.3f}"),
)


def _setting(record: Record) -> str:
    name, *values = record["criterion"].values()
    shown = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in values if v not in (None, False)]
    return f"{name.replace('_', ' ')} {' '.join(shown)}"


SST2_CRITERIA: Columns = (
    *(("criterion", _setting), ("chosen", lambda r: "yes" if r["chosen"] else ""), *_DEV),
    ("random exit, same mix", "{reporting[random_exit]:.3f}"),
)


def _shown_setting(record: Record) -> bool:
    return record["kind"] == "point" and (record["chosen"] or record["criterion"]["name"] == "patience")


def accuracies(results: Path | None = None) -> str:
    """Return full depth, truncation and the two chosen criteria on SST-2, method `joint`."""
    layers = [r for r in _sst2() if r["kind"] == "static_truncation"]
    depth = len(layers)

    def layer_row(exit_: str, layer: int) -> Record:
        dev = {"mean_exit_layer": layer, "layer_speed_up": depth / layer, "scores": layers[layer - 1]["reporting"]}
        return {"exit": exit_, "reporting": dev}

    rows = [layer_row("all layers", depth), layer_row(f"first {depth // 2} layers only", depth // 2)]
    for name, number in (("entropy", "threshold"), ("patience", "patience")):
        row = next(r for r in _sst2() if r["kind"] == "point" and r["chosen"] and r["criterion"]["name"] == name)
        rows.append(row | {"exit": f"{name}, {number} {round(row['criterion'][number], 2):g}"})
    columns = (("exit", "{exit}"), *_DEV, ("random exits", "{reporting[random_exit]:.3f}"))
    return draw(columns, everything, rows)


#: The case of the README's first sentence: suite, case.
HEADLINE = ("offline", "MiniLM, own exits, B 32, SST-2 lengths")


def _newest(suite: str, results: Path | None) -> Measured:
    """The CPU with two threads that the README reports: the one measured last."""
    found = [m for m in measured(suite, results) if not m.facts["gpus"] and m.facts["threads"] == 2]
    return max(found, key=lambda m: m.facts["time"])


TITLES = {"sst2": "SST-2", "trec": "TREC"}
#: Rows of the README's table of whole jobs: the way, the type and whether rows exit.
JOBS = (
    ("transformers pipeline, batches of 32, sorted", "float32", "full depth"),
    ("ONNX Runtime in int8, sorted", "int8", "full depth"),
    ("OpenVINO by default, sorted", "default", "full depth"),
    ("OpenVINO in int8, sorted", "int8", "full depth"),
    *(("Scorer", stored, exits) for stored in ("float32", "int8") for exits in ("full depth", "own exits")),
)


def jobs(results: Path | None = None) -> str:
    """Return the seconds and the accuracy of some ways to label the texts of each task."""
    tables: dict[tuple[str, ...], Record] = {}
    columns: list[tuple[str, Cell]] = [("way", "{engine}"), ("weights", "{dtype}"), ("exits", "{exits}")]
    for suite in ("job", "job_trec"):
        found = _newest(suite, results).records
        task = TITLES[found[0]["case"]]
        columns += [(f"{task}, s", f"{{{suite}[seconds]:.2f}}"), (f"{task}, accuracy", f"{{{suite}[accuracy]:.3f}}")]
        for way in JOBS:
            record = next(r for r in found if (r["engine"], r["dtype"], r["exits"]) == way and "seconds" in r)
            tables.setdefault(way, dict(zip(("engine", "dtype", "exits"), way, strict=True)))[suite] = record
    return draw(tuple(columns), everything, list(tables.values()))


def headline(results: Path | None = None) -> str:
    """Return one case beside plain Transformers, the faster of the other runtimes, and itself without exits."""
    suite, case = HEADLINE
    _, facts, found = _newest(suite, results)
    keys = {"case": case, "engine": FUSED, "backend": "cpp", "dtype": "float32"}
    timed = {r["baseline"]: r for r in found if "ratio" in r and keys.items() <= r.items()}
    plain, peer, own = timed[PLAIN], timed[PEER], timed["our full depth"]
    machine = f"{facts['threads']} threads of an {facts['cpu']}"
    return (
        f"On SST-2 sentences in batches of 32 on {machine}, a 6-layer MiniLM with\n"
        f"exits takes {plain['ratio']:.2f} of the time of the plain Transformers model, {peer['ratio']:.2f} of that of "
        f"{peer['against']}, the faster of ONNX Runtime\nand OpenVINO, and {own['ratio']:.2f} of its own time with "
        "early exit off ([results](#results))."
    )


TABLES: dict[str, Table] = {
    "headline": headline,
    "jobs": jobs,
    "accuracies": accuracies,
    "sst2_layers": lambda results=None: draw(SST2_LAYERS, lambda r: r["kind"] == "static_truncation", _sst2()),
    "sst2_criteria": lambda results=None: draw(SST2_CRITERIA, _shown_setting, _sst2()),
}
