"""The README's tables, written from the committed results between ``<!-- table:NAME -->`` and ``<!-- end -->``.

``python -m benchmarks.readme`` rewrites them; ``python -m benchmarks.readme --check`` fails where they are out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from earlyexit_kernels.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _load(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def _machine(facts: dict[str, Any]) -> str:
    packages = facts["packages"]
    device = ", ".join(facts["gpus"]) or f"{facts['cpu']}, {facts['threads']} threads"
    return f"{device}; torch {packages['torch']}, transformers {packages['transformers']}, commit {facts['commit']}"


def wall_clock() -> str:
    """Time of each case over the plain model's, for every machine; full depth without decisions only in the JSON."""
    parts = []
    for document in _load("wall_clock-*.json"):
        rows = [
            (
                record["case"],
                f"{record['layer_rows']:.2f}",
                f"{record['tokens']:.2f}",
                f"{record['ratio']:.3f} ({record['ratio_low']:.3f} to {record['ratio_high']:.3f})",
                "" if record["goal"] is None else f"{record['goal']:.2f}",
                f"{record['median_ms']:.1f}",
            )
            for record in document["records"]
            if not record["case"].startswith("full depth")
        ]
        header = ("case", "layer-rows run", "tokens in the padded batch", "time / plain model", "goal", "ms")
        parts.append(f"{_machine(document['environment'])}:\n\n{markdown_table(header, rows)}")
    return "\n\n".join(parts)


def sst2_layers() -> str:
    """Accuracy of static truncation to each exit of the real encoder."""
    (document,) = _load("sst2-*.json")
    rows = [
        (record["layer"], *(f"{record[split]['accuracy']:.3f}" for split in ("tuning", "reporting")))
        for record in document["records"]
        if record["kind"] == "static_truncation"
    ]
    return markdown_table(("exit after layer", "held-out train rows", "dev"), rows)


def sst2_criteria() -> str:
    """The settings chosen on held-out train rows, and every patience, on dev."""
    (document,) = _load("sst2-*.json")
    rows = []
    for record in document["records"]:
        if record["kind"] != "point" or not (record["chosen"] or record["criterion"]["name"] == "patience"):
            continue
        criterion, dev = dict(record["criterion"]), record["reporting"]
        name = criterion.pop("name").replace("_", " ")
        numbers = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in criterion.values() if v not in (None, False)]
        chosen = "yes" if record["chosen"] else ""
        accuracy, random = f"{dev['scores']['accuracy']:.3f}", f"{dev['random_exit']:.3f}"
        cells = (f"{dev['mean_exit_layer']:.2f}", f"{dev['layer_speed_up']:.2f}", accuracy, random)
        rows.append((f"{name} {' '.join(numbers)}", chosen, *cells))
    header = ("criterion", "chosen", "mean exit layer", "fewer layers, x", "accuracy", "random exit, same mix")
    return markdown_table(header, rows)


TABLES = {"wall_clock": wall_clock, "sst2_layers": sst2_layers, "sst2_criteria": sst2_criteria}


def rewrite(*, check: bool = False) -> bool:
    """Put the tables into the README.

    Args:
        check: change nothing.

    Returns:
        Whether the README was up to date.
    """
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = _BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", text)
    if not check:
        readme.write_text(new, encoding="utf-8")
    return new == text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    checking = parser.parse_args().check
    if not rewrite(check=checking) and checking:
        sys.exit("README.md: its tables differ from benchmarks/results; run `python -m benchmarks.readme`")
