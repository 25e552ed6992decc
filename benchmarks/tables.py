"""Parts of all tables that are made from the JSON of every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Record
from earlyexit_kernels.tuning.report import device_text

NOT_MEASURED = "Not measured yet."


def machine_line(facts: Record) -> str:
    """Return the machine, package versions and commit of a measurement in one line."""
    packages = facts["packages"]
    versions = f"torch {packages['torch']}, transformers {packages['transformers']}"
    return f"{device_text(facts)}; {versions}, commit {facts['commit']}"


def per_machine(suite: str, table: Callable[[list[Record]], str], results: Path | None = None) -> str:
    """Return a suite's table for every machine, each below a line with the machine."""
    found = harness.measured(suite, results)
    return "\n\n".join(f"{machine_line(m.facts)}:\n\n{table(m.records)}" for m in found) or NOT_MEASURED


def ratio_text(record: Record, digits: int = 2) -> str:
    """Return a record's ratio with its spread."""
    low, high = (f"{record[name]:.{digits}f}" for name in ("ratio_low", "ratio_high"))
    return f"{record['ratio']:.{digits}f} ({low} to {high})"


def engine_text(record: Record) -> str:
    """Return a record's engine, back-end and dtype without the usual ones."""
    words = [record["engine"], record["backend"].replace("auto", ""), record["dtype"].replace("float32", "")]
    return ", ".join(word for word in words if word)


def skipped(records: Iterable[Record]) -> list[str]:
    """Return a list of reasons, with the variants that have no number for each; empty if all have one."""
    found: dict[str, list[str]] = {}
    for record in records:
        for kind, word in ((harness.NOT_MEASURED, "Not measured"), (harness.REFUSED, "Refused")):
            if kind in record:
                # a refusal concerns one case, and so does a workload that cannot be built
                of_a_case = kind == harness.REFUSED or not record["dtype"]
                name = f"{engine_text(record)} ({record['case']})" if of_a_case else engine_text(record)
                found.setdefault(f"- {word}: {{}}: {record[kind]}.", []).append(name)
    lines = [line.format(", ".join(dict.fromkeys(names))) for line, names in found.items()]
    return ["\n".join(lines)] if lines else []
