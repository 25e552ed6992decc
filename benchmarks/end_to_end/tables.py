"""Tables of whole models, from the JSON of every machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.end_to_end import server, stored
from benchmarks.end_to_end.baselines import PLAIN
from benchmarks.end_to_end.engines import FAMILY_LAYERS
from benchmarks.end_to_end.forced import NEVER
from benchmarks.end_to_end.suites import NEWER, OFFLINE, SINGLE_STREAM
from benchmarks.goals import END_TO_END, PEER
from benchmarks.harness import Measured, Record
from benchmarks.plots import PLOTS
from benchmarks.tables import NOT_MEASURED, engine_text, machine_line, per_machine, ratio_text, skipped
from earlyexit_kernels.tuning.report import markdown_table

#: Kinds of work in the committed profile, which commit dca2a94 measured.
PROFILE, PROFILED = "profile", ("products", "attention", "norms_and_activations", "exits", "moves", "rest")


def goals(results: Path | None = None) -> str:
    """Every case with a goal, beside the number reached, and the plots."""
    header = ("case", "dtype", "engine", "over", "time ratio", "efficiency", "goal", "reached")
    machines: dict[str, list[Measured]] = {}
    for suite in (SINGLE_STREAM, OFFLINE):
        for found in harness.measured(suite, results):
            machines.setdefault(found.machine, []).append(found)
    parts = []
    for machine, suites in machines.items():
        commits = ", ".join(dict.fromkeys(str(found.facts["commit"]) for found in suites))
        facts = suites[0].facts | {"commit": commits}
        # with the layers that `auto` chooses; the others are in the JSON
        mine = [r for found in suites for r in found.records if "ratio" in r and r["engine"] != FAMILY_LAYERS]
        with_goal = [r for r in mine if r.get("goal") is not None]
        rows = [_goal_row(r) for r in mine if r in with_goal or (r["baseline"], r["exits"]) == (PEER, NEVER)]
        reached = sum(r["goal_met"] for r in with_goal)
        parts += [f"{machine_line(facts)}:", markdown_table(header, rows) if rows else NOT_MEASURED]
        parts += [f"Reached: {reached} of {len(with_goal)} goals; not measured: {len(END_TO_END) - len(with_goal)}."]
        parts += _pictures(machine, results or harness.RESULTS)
    return "\n\n".join(parts) or NOT_MEASURED


def _pictures(machine: str, folder: Path) -> list[str]:
    """Links to the plots of a machine."""
    names = {f"{machine}-{name}.png": title for name, title in PLOTS.items()}
    return [f"![{t}](benchmarks/results/{name})" for name, t in names.items() if (folder / name).is_file()]


def _goal_row(record: Record) -> tuple[str, ...]:
    name, against = record["baseline"], record["against"]
    over = name if name.startswith(against) or against == record["engine"] else f"{name}: {against}"
    engine = ", ".join(word for word in (record["engine"], record["backend"]) if word)
    cells = (record["case"], record["dtype"], engine, over, _ratio(record), f"{record['efficiency']:.2f}")
    if record["goal"] is None:
        return (*cells, "none", "")
    bound = "at most" if record["goal_of"] == "ratio" else "efficiency"
    return (*cells, f"{bound} {record['goal']:.2f}", "yes" if record["goal_met"] else "no")


def _ratio(record: Record) -> str:
    return ratio_text(record, 3) if "ratio" in record else ""


#: Column -> cell of a record.
_CELLS: dict[str, Callable[[Record], str]] = {
    "case": lambda r: r["case"],
    "engine": engine_text,
    "layer-rows": lambda r: f"{r['layer_rows']:.2f}",
    "tokens": lambda r: f"{r['tokens']:.2f}",
    "rows": lambda r: str(r["rows"]),
    "rate": lambda r: f"{r['rate']:.1f}",
    "rows / s": lambda r: f"{r['rows_per_second']:.1f}",
    "ms": lambda r: f"{r['median_ms']:.1f}",
    "p50 ms": lambda r: f"{r['median_ms']:.1f}",
    "p90 ms": lambda r: f"{r['p90_ms']:.1f}",
    "p99 ms": lambda r: f"{r['p99_ms']:.1f}",
    "answered / s": lambda r: f"{r['goodput']:.1f}" if "goodput" in r else "",
    "p50 early, late ms": lambda r: f"{r['early_ms']:.1f}, {r['late_ms']:.1f}" if r.get("early_ms") else "",
    "time / plain": _ratio,
    "p50 / plain": _ratio,
    "efficiency": lambda r: f"{r['efficiency']:.2f}" if "efficiency" in r else "",
    "flips": lambda r: str(r["flips"]),
    **{kind.replace("_", " "): lambda r, kind=kind: f"{100 * r[f'{kind}_share']:.1f} %" for kind in PROFILED},
    "GFLOP/s": lambda r: f"{r['products_gflops']:.0f}",
    "torch, 1024 tokens": lambda r: f"{r['best_gflops']:.0f}",
}
#: Suite -> the columns of its table.
COLUMNS: dict[str, Sequence[str]] = {
    SINGLE_STREAM: (
        *("case", "engine", "layer-rows", "p50 ms", "p90 ms", "p99 ms", "time / plain", "efficiency", "flips"),
    ),
    OFFLINE: (
        *("case", "engine", "layer-rows", "tokens", "rows", "rows / s", "p50 ms", "time / plain", "efficiency"),
        "flips",
    ),
    NEWER: ("case", "engine", "layer-rows", "rows / s", "p50 ms", "time / plain", "efficiency", "flips"),
    server.SUITE: (
        *("case", "engine", "rate", "rows / s", "answered / s", "p50 ms", "p99 ms", "p50 early, late ms"),
        "p50 / plain",
    ),
    PROFILE: ("case", "ms", *(kind.replace("_", " ") for kind in PROFILED), "GFLOP/s", "torch, 1024 tokens"),
}


def suite_table(suite: str, results: Path | None = None) -> str:
    """Return a suite's table for every machine, and why variants have no number."""

    def table(records: list[Record]) -> str:
        # comparisons with other baselines than the plain float32 model are in the JSON
        shown = [r for r in records if "median_ms" in r and r["baseline"] in ("", PLAIN)]
        rows = [[_CELLS[column](record) for column in COLUMNS[suite]] for record in shown]
        return "\n\n".join([markdown_table(COLUMNS[suite], rows) if shown else NOT_MEASURED, *skipped(records)])

    return per_machine(suite, table, results)


def stored_weights(results: Path | None = None) -> str:
    """Types of stored weights over the faster peer, machine by machine."""
    header = ("case", "weights", "ms", "over", "time ratio", "goal", "reached", "error of logits")

    def table(records: list[Record]) -> str:
        rows = []
        for r in (r for r in records if "ratio" in r):
            goal, reached = (
                ("none", "") if r["goal"] is None else (f"{r['goal']:.2f}", "yes" if r["goal_met"] else "no")
            )
            cells = (r["case"], r["dtype"], f"{r['median_ms']:.2f}", r["against"], ratio_text(r, 3))
            rows.append((*cells, goal, reached, f"{r['error']:.2g}"))
        return "\n\n".join([markdown_table(header, rows) if rows else NOT_MEASURED, *skipped(records)])

    return per_machine(stored.SUITE, table, results)


TABLES: dict[str, Callable[[], str]] = {
    "end_to_end": goals,
    "stored_weights": stored_weights,
    **{suite: lambda suite=suite: suite_table(suite) for suite in COLUMNS},
}
