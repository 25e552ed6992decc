"""Tables of single operations, from the JSON of every machine."""

from __future__ import annotations

import functools

from benchmarks.harness import Record
from benchmarks.micro import decision_cost, layer_products, stored_accuracy, weight_checks
from benchmarks.tables import per_machine, ratio_text
from earlyexit_kernels.tuning.report import markdown_table


def decisions(records: list[Record]) -> str:
    """Return the time of each rule's decision over entropy's, a table for each back-end."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["backend"], []).append(record)
    return "\n\n".join(_decisions_by(backend, mine) for backend, mine in found.items())


def _decisions_by(backend: str, records: list[Record]) -> str:
    if "not_measured" in records[0]:
        return f"`{backend}`: not measured, {records[0]['not_measured']}."
    rows: dict[str, list[str]] = {}
    for record in records:
        ratio = "1.00" if record["rule"] == decision_cost.BASELINE else ratio_text(record)
        rows.setdefault(record["rule"].replace("_", " "), []).extend([ratio, f"{record['microseconds']:.1f}"])
    header = [f"`{backend}`"]
    for size in dict.fromkeys(record["rows"] for record in records):
        header += [f"B {size}: time / entropy", "us"]
    return markdown_table(header, [(name, *cells) for name, cells in rows.items()])


def products(records: list[Record]) -> str:
    """Return the time of one encoder layer over the family's own, by its tokens and the products it is made of."""
    rows: dict[str, dict[str, str]] = {}
    for record in records:
        if "ratio" in record and record["case"] != layer_products.BASELINE:
            rows.setdefault(record["shape"], {})[record["case"].removeprefix("fused, ")] = ratio_text(record)
    ways = list(dict.fromkeys(way for cells in rows.values() for way in cells))
    return markdown_table(
        ("width and tokens", *ways), [(shape, *(cells.get(way, "") for way in ways)) for shape, cells in rows.items()]
    )


def checks(records: list[Record]) -> str:
    """Return the time to check the packed weights before a batch, and the goal."""
    rows = []
    for record in records:
        if "microseconds" in record:
            spread = f"{record['microseconds']:.1f} ({record['low']:.1f} to {record['high']:.1f})"
            goal = "" if record["goal"] is None else f"{record['goal']:.0f}"
            rows.append((record["case"], record["caches"], spread, goal))
    return markdown_table(("model", "caches", "us a batch", "goal"), rows)


TABLES = {
    decision_cost.SUITE: functools.partial(per_machine, decision_cost.SUITE, decisions),
    layer_products.SUITE: functools.partial(per_machine, layer_products.SUITE, products),
    stored_accuracy.SUITE: stored_accuracy.table,
    weight_checks.SUITE: functools.partial(per_machine, weight_checks.SUITE, checks),
}
