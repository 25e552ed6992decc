"""The GPU's tables: every line of the bar beside what was reached, and all that was measured besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.end_to_end.tables import machine_line
from benchmarks.gpu.goals import GOALS
from earlyexit_kernels.tuning.report import markdown_table

TO_BE_MEASURED = "The GPU numbers are still to be measured: no `make gpu-check` has run on a machine that has one."
Record = dict[str, Any]


def bar_table(results: Path | None = None) -> str:
    """Every line of the bar, beside what was reached, or why there is nothing."""
    return _per_machine(results, _bar) or TO_BE_MEASURED


def details_table(results: Path | None = None) -> str:
    """What was measured and has no line in the bar."""
    return _per_machine(results, _details) or TO_BE_MEASURED


def _per_machine(results: Path | None, table: Callable[[list[Record]], str]) -> str:
    parts = []
    for document in store.documents(results).values():
        suites = {name: facts for name, facts in document["suites"].items() if name.startswith("gpu_")}
        if not suites:
            continue
        records = [record for record in document["records"] if record["suite"] in suites]
        parts += [_machine(document, suites), table(records), *_left_out(records)]
    return "\n\n".join(parts)


def _machine(document: Record, suites: dict[str, Record]) -> str:
    """The card, its driver and versions, and the commits that were measured."""
    newest = max(suites.values(), key=lambda facts: facts["time"])
    commits = ", ".join(dict.fromkeys(str(facts["commit"]) for facts in suites.values()))
    line = machine_line(document["environment"] | newest | {"commit": commits})
    driver = newest.get("nvidia_smi", {}).get("driver_version")
    return f"{line}{f', driver {driver}' * bool(driver)}:"


def _bar(records: list[Record]) -> str:
    rows = []
    for bar in GOALS:
        found = [record for record in records if record.get("bar") == bar]
        rows += [(bar, record["dtype"], *_where(record), *_reached(record)) for record in found]
        if not found:
            rows.append((bar, "", "", "", "", "not measured"))
    return markdown_table(("what", "dtype", "input", "is", "at most", "reached"), rows)


def _where(record: Record) -> tuple[str]:
    # the exits are compiled ones, unless these couldn't be built
    by = f"by {record['backend']}" if record["backend"] not in ("", "cpp") else ""
    return (", ".join(word for word in (record.get("exits", ""), record["shape"], by) if word),)


def _reached(record: Record) -> tuple[str, str, str]:
    return _number(record, record["goal_of"]), f"{record['goal']:g}", "yes" if record["goal_met"] else "no"


def _number(record: Record, of: str) -> str:
    spread = {"ratio": ("ratio_low", "ratio_high"), "median_us": ("low_us", "high_us")}.get(of)
    if spread is None or spread[0] not in record:
        return f"{record[of]:g}"
    low, high = (record[name] for name in spread)
    return f"{record[of]:.3g} ({low:.3g} to {high:.3g})"


def _details(records: list[Record]) -> str:
    header = ("case", "input", "dtype", "way", "us", "over", "time ratio")
    rows = [
        (record["case"], record["shape"], record["dtype"], _way(record), *_times(record))
        for record in records
        if "bar" not in record and "median_ms" in record
    ]
    return markdown_table(header, rows)


def _way(record: Record) -> str:
    return ", ".join(word for word in (record["engine"], record["backend"]) if word)


def _times(record: Record) -> tuple[str, str, str]:
    ratio = _number(record, "ratio") if "ratio" in record else ""
    return f"{1000 * record['median_ms']:.4g}", record["baseline"], ratio


def _left_out(records: Iterable[Record]) -> list[str]:
    """A line for each thing without a number, and why."""
    lines = [
        f"- {word}: {record['case']}, {_way(record)}{', ' * bool(record['dtype'])}{record['dtype']}: {record[kind]}."
        for kind, word in (("not_measured", "Not measured"), ("refused", "Refused"))
        for record in records
        if kind in record
    ]
    return ["\n".join(dict.fromkeys(lines))] if lines else []


TABLES = {"gpu": bar_table, "gpu_details": details_table}
