"""Tables of single operations, from the JSON of every machine."""

from __future__ import annotations

import functools

from benchmarks.harness import Record
from benchmarks.micro import decision_cost, layer_products, layer_roofline, stored_accuracy, weight_checks
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


def roofline(records: list[Record]) -> str:
    """Return the operations and bytes per second of layers, and their share of the peaks of the processor."""
    header = ("weights", "tokens", "ms", "GFLOP/s", "of the peak", "GB/s", "of the peak", "goal", "reached")
    shown = [r for r in records if "gflops" in r]
    rows = [(r["case"], r["shape"], *_roofline_cells(r)) for r in shown]
    skipped = [f"- Not measured: {r.get('case', 'all')}: {r['not_measured']}." for r in records if "not_measured" in r]
    peaks = [f"Peaks: {r['peak_gflops']} GFLOP/s in float32 and {r['peak_gb_per_second']} GB/s." for r in shown[:1]]
    return "\n\n".join([*peaks, *([markdown_table(header, rows)] if rows else []), *skipped])


def _roofline_cells(record: Record) -> tuple[str, ...]:
    # other types are not multiplied in float32
    in_float32 = record["case"] in ("float32", "float16")
    share = f"{100 * record['operations_share']:.0f} %" if in_float32 else ""
    cells = (f"{record['median_ms']:.2f}", str(record["gflops"]), share, f"{record['gb_per_second']:.1f}")
    goal = "none" if record["goal"] is None else f"{100 * record['goal']:.0f} % of {record['goal_of'].split('_')[0]}"
    reached = "" if record["goal"] is None else "yes" if record["goal_met"] else "no"
    return (*cells, f"{100 * record['bytes_share']:.0f} %", goal, reached)


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
    layer_roofline.SUITE: functools.partial(per_machine, layer_roofline.SUITE, roofline),
    stored_accuracy.SUITE: stored_accuracy.table,
    weight_checks.SUITE: functools.partial(per_machine, weight_checks.SUITE, checks),
}
