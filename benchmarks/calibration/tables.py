"""Tables of what `calibrate` promises, from the JSON that `calibration` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Record
from benchmarks.tables import NOT_MEASURED
from earlyexit_kernels.tuning.report import markdown_table

RESULTS = harness.RESULTS / "calibration"


def _records(part: str, results: Path) -> list[Record]:
    path = results / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8"))["records"] if path.is_file() else []


def guarantee(*, results: Path = RESULTS) -> str:
    """How often the risk that a `Risk` target allows was exceeded."""
    header = ("rule", "risk against", "allowed", "exceeded", "mean risk", "fewer layers, x")
    rows = [
        (
            r["rule"].replace("_", " "),
            r["against"].replace("_", " "),
            f"{r['epsilon']:.0%} of draws",
            f"{r['broken'] / r['draws']:.1%} of {r['draws']}",
            f"{r['mean_risk']:.3f} (bound {r['delta']:g})",
            f"{r['mean_layer_speed_up']:.2f}",
        )
        for r in _records("guarantee", results)
    ]
    return markdown_table(header, rows) if rows else NOT_MEASURED


def drop(*, results: Path = RESULTS) -> str:
    """Speed-up and loss of `MaxDrop` on rows not used to choose."""
    header = ("model", "rows", "thresholds", "fewer layers, x", "drop, points")
    rows = [
        (
            r["trace"].partition("_")[0],
            str(r["rows"]),
            "one for each layer" if r["per_layer"] else "one",
            f"{r['layer_speed_up']:.2f} ± {r['layer_speed_up_deviation']:.2f}",
            f"{100 * r['drop']:.1f} ± {100 * r['drop_deviation']:.1f}",
        )
        for r in _records("drop", results)
    ]
    return markdown_table(header, rows) if rows else NOT_MEASURED


def scale(*, results: Path = RESULTS) -> str:
    """Time and memory to evaluate many settings on many rows."""
    header = ("rule", "seconds", "peak memory, GiB", "mean exit layer")
    rows = [
        (r["rule"].replace("_", " "), f"{r['seconds']:.1f}", f"{r['peak_gib']:.1f}", f"{r['mean_exit_layer']:.1f}")
        for r in _records("scale", results)
    ]
    return markdown_table(header, rows) if rows else NOT_MEASURED


TABLES: dict[str, Callable[[], str]] = {
    "calibration_guarantee": guarantee,
    "calibration_drop": drop,
    "calibration_scale": scale,
}
