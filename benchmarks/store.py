"""The JSON of every machine, ``results/<machine>.json``: all suites' records together, each suite replaced as a whole.

Beside the environment of the last run, ``suites`` keeps when each suite ran, at which commit and with which packages.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from earlyexit_kernels.tuning.report import environment, write_json

RESULTS = Path(__file__).parent / "results"


class Measured(NamedTuple):
    """One suite on one machine.

    Attributes:
        machine: its name in file names.
        facts: of the environment, as they were when the suite ran.
        records: of the suite.
    """

    machine: str
    facts: dict[str, Any]
    records: list[dict[str, Any]]


def machine_name() -> str:
    """A file name for this machine: its GPU, or its CPU and the threads used."""
    facts = environment()
    device = facts["gpus"][0] if facts["gpus"] else f"{facts['cpu']} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def documents(results: Path | None = None) -> dict[str, dict[str, Any]]:
    """Machine -> its JSON."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((results or RESULTS).glob("*.json"))
    }
    return {machine: document for machine, document in found.items() if "suites" in document}


def measured(suite: str, results: Path | None = None) -> list[Measured]:
    """A suite's records, machine by machine."""
    return [
        Measured(
            machine,
            document["environment"] | document["suites"][suite],
            [record for record in document["records"] if record["suite"] == suite],
        )
        for machine, document in documents(results).items()
        if suite in document["suites"]
    ]


def save(suite: str, records: Sequence[Mapping[str, Any]], *, results: Path | None = None, **facts: Any) -> Path:
    """Put a suite's records into this machine's JSON, in place of those it had.

    Args:
        suite: whose.
        records: JSON-ready; their own ``suite`` may be a finer one.
        results: the folder; default: the committed results.
        facts: about the run, e.g. its repeats.
    """
    path = (results or RESULTS) / f"{machine_name()}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"records": [], "suites": {}}
    if before.get("environment", {}).get("platform", platform.platform()) != platform.platform():
        print(f"note: {path.name} has results of another machine by this name; those of {suite} are replaced")
    mine = {suite, *(record["suite"] for record in records)}
    kept = [record for record in before["records"] if record["suite"] not in mine]
    now = environment()
    run = {name: now[name] for name in ("time", "commit", "packages", "flush_denormal")} | facts
    return write_json(path, [*kept, *records], suites=before["suites"] | dict.fromkeys(sorted(mine), run))
