"""The GPU's tables: every goal beside the number reached, and all other measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import harness
from benchmarks.goals import GPU
from benchmarks.gpu import roofline
from benchmarks.harness import Record
from benchmarks.tables import machine_line, skipped
from earlyexit_kernels.tuning.report import markdown_table

TO_BE_MEASURED = "The GPU numbers are still to be measured: no `make gpu-check` has run on a machine that has one."


def goals_table(results: Path | None = None) -> str:
    """Every goal beside the number reached."""
    return _per_machine(results, _goals) or TO_BE_MEASURED


def details_table(results: Path | None = None) -> str:
    """Measurements without a goal."""
    return _per_machine(results, _details) or TO_BE_MEASURED


def _per_machine(results: Path | None, table: Callable[[list[Record]], str]) -> str:
    parts = []
    for document in harness.documents(results).values():
        suites = {name: facts for name, facts in document["suites"].items() if name.startswith("gpu_")}
        if not suites:
            continue
        records = [record for record in document["records"] if record["suite"] in suites]
        newest = max(suites.values(), key=lambda facts: facts["time"])
        commits = ", ".join(dict.fromkeys(str(facts["commit"]) for facts in suites.values()))
        line = machine_line(document["environment"] | newest | {"commit": commits})
        driver = newest.get("nvidia_smi", {}).get("driver_version")
        parts += [f"{line}{f', driver {driver}' * bool(driver)}:", table(records), *skipped(records)]
    return "\n\n".join(parts)


def _goals(records: list[Record]) -> str:
    rows = []
    for name in GPU:
        found = [record for record in records if record.get("goal_name") == name]
        rows += [(name, record["dtype"], _input(record), *_reached(record)) for record in found]
        if not found:
            rows.append((name, "", "", "", "", "not measured"))
    return markdown_table(("what", "dtype", "input", "is", "at most", "reached"), rows)


def _input(record: Record) -> str:
    # exits are compiled ones, unless these could not be built
    by = f"by {record['backend']}" if record["backend"] not in ("", "cpp") else ""
    return ", ".join(word for word in (record.get("exits", ""), record["shape"], by) if word)


def _reached(record: Record) -> tuple[str, str, str]:
    return _number(record, record["goal_of"]), f"{record['goal']:g}", "yes" if record["goal_met"] else "no"


def _number(record: Record, of: str) -> str:
    spread = {"ratio": ("ratio_low", "ratio_high"), "median_us": ("low_us", "high_us")}.get(of)
    if spread is None or spread[0] not in record:
        return f"{record[of]:g}"
    low, high = (record[name] for name in spread)
    return f"{record[of]:.3g} ({low:.3g} to {high:.3g})"


def _details(records: list[Record]) -> str:
    header = ("case", "input", "dtype", "variant", "us", "over", "time ratio")
    rows = [
        (record["case"], record["shape"], record["dtype"], _variant(record), *_times(record))
        for record in records
        if "goal_name" not in record and "median_ms" in record
    ]
    return markdown_table(header, rows)


def _variant(record: Record) -> str:
    return ", ".join(word for word in (record["engine"], record["backend"]) if word)


def _times(record: Record) -> tuple[str, str, str]:
    ratio = _number(record, "ratio") if "ratio" in record else ""
    return f"{1000 * record['median_ms']:.4g}", record["baseline"], ratio


TABLES = {
    "gpu": goals_table,
    "gpu_details": details_table,
    "gpu_roofline": roofline.table,
    "gpu_constants": roofline.constants_table,
}
