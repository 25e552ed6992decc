"""The tables of whole models, from the JSON of every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.end_to_end import offline, profiles, server, single_stream
from benchmarks.end_to_end.baselines import PLAIN
from benchmarks.end_to_end.engines import FAMILY_LAYERS
from benchmarks.end_to_end.forced import NEVER
from benchmarks.end_to_end.goals import GOALS, PEER
from benchmarks.end_to_end.plots import PLOTS
from earlyexit_kernels.tuning.report import markdown_table

NOT_MEASURED = "Not measured yet."
Record = dict[str, Any]


def machine_line(facts: Record) -> str:
    """The machine, and what ran on it."""
    packages = facts["packages"]
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    device = ", ".join(facts["gpus"]) or f"{facts['cpu']}, {threads}"
    return f"{device}; torch {packages['torch']}, transformers {packages['transformers']}, commit {facts['commit']}"


def goals(results: Path | None = None) -> str:
    """Every case with a goal, beside the number reached, and the plots."""
    header = ("case", "dtype", "engine", "over", "time ratio", "efficiency", "goal", "reached")
    machines: dict[str, list[store.Measured]] = {}
    for suite in (single_stream.SUITE, offline.SUITE):
        for found in store.measured(suite, results):
            machines.setdefault(found.machine, []).append(found)
    parts = []
    for machine, suites in machines.items():
        commits = ", ".join(dict.fromkeys(str(found.facts["commit"]) for found in suites))
        facts = suites[0].facts | {"commit": commits}
        # with the layers that `auto` takes; the others are in the JSON
        mine = [r for found in suites for r in found.records if "ratio" in r and r["engine"] != FAMILY_LAYERS]
        with_goal = [r for r in mine if r.get("goal") is not None]
        rows = [_goal_row(r) for r in mine if r in with_goal or (r["baseline"], r["exits"]) == (PEER, NEVER)]
        reached = sum(r["goal_met"] for r in with_goal)
        parts += [f"{machine_line(facts)}:", markdown_table(header, rows) if rows else NOT_MEASURED]
        parts += [f"Reached: {reached} of {len(with_goal)} goals; not measured: {len(GOALS) - len(with_goal)}."]
        parts += _pictures(machine, results or store.RESULTS)
    return "\n\n".join(parts) or NOT_MEASURED


def _pictures(machine: str, folder: Path) -> list[str]:
    """The plots that lie beside a machine's JSON."""
    names = {f"{machine}-{name}.png": title for name, title in PLOTS.items()}
    return [f"![{t}](benchmarks/results/{name})" for name, t in names.items() if (folder / name).is_file()]


def _goal_row(record: Record) -> tuple[str, ...]:
    engine = ", ".join(word for word in (record["engine"], record["backend"]) if word)
    own = (record["case"], record["dtype"], engine, _against(record))
    numbers = (*own, _ratio(record), f"{record['efficiency']:.2f}")
    if record["goal"] is None:
        return (*numbers, "none", "")
    bound = "at most" if record["goal_of"] == "ratio" else "efficiency"
    return (*numbers, f"{bound} {record['goal']:.2f}", "yes" if record["goal_met"] else "no")


def _against(record: Record) -> str:
    name, against = record["baseline"], record["against"]
    return name if name.startswith(against) or against == record["engine"] else f"{name}: {against}"


def latency(results: Path | None = None) -> str:
    """One row at a time."""
    header = ("case", "engine", "layer-rows", "p50 ms", "p90 ms", "p99 ms", "time / plain", "efficiency", "flips")
    return _per_machine(
        single_stream.SUITE,
        header,
        lambda r: (
            *_named(r),
            *(f"{r[name]:.1f}" for name in ("median_ms", "p90_ms", "p99_ms")),
            *_beside_plain(r),
        ),
        results,
    )


def throughput(results: Path | None = None) -> str:
    """Batches."""
    header = (
        "case",
        "engine",
        "layer-rows",
        "tokens",
        "rows",
        "rows / s",
        "p50 ms",
        "time / plain",
        "efficiency",
        "flips",
    )
    return _per_machine(
        offline.SUITE,
        header,
        lambda r: (
            *_named(r),
            f"{r['tokens']:.2f}",
            str(r["rows"]),
            f"{r['rows_per_second']:.1f}",
            f"{r['median_ms']:.1f}",
            *_beside_plain(r),
        ),
        results,
    )


def under_load(results: Path | None = None) -> str:
    """Rows that arrive by chance."""
    header = ("case", "engine", "rate", "rows / s", "p50 ms", "p90 ms", "p99 ms", "p50 / plain")
    return _per_machine(
        server.SUITE,
        header,
        lambda r: (
            r["case"],
            _engine(r),
            f"{r['rate']:.1f}",
            f"{r['rows_per_second']:.1f}",
            *(f"{r[name]:.1f}" for name in ("median_ms", "p90_ms", "p99_ms")),
            _ratio(r),
        ),
        results,
    )


def where_time_goes(results: Path | None = None) -> str:
    """Shares of our time, for the cases that have a goal."""
    kinds = (*profiles.KINDS, "rest")
    header = ("case", "ms", *(kind.replace("_", " ") for kind in kinds), "GFLOP/s", "torch, 1024 tokens")
    return _per_machine(
        profiles.SUITE,
        header,
        lambda r: (
            r["case"],
            f"{r['median_ms']:.1f}",
            *(f"{100 * r[f'{kind}_share']:.1f} %" for kind in kinds),
            *(f"{r[name]:.0f}" for name in ("products_gflops", "best_gflops")),
        ),
        results,
    )


def _per_machine(
    suite: str, header: Sequence[str], row: Callable[[Record], tuple[str, ...]], results: Path | None
) -> str:
    parts = []
    for found in store.measured(suite, results):
        # a bfloat16 one beside the plain bfloat16 model, our engines beside others: in the JSON
        shown = [r for r in found.records if "median_ms" in r and r["baseline"] in ("", PLAIN)]
        table = markdown_table(header, map(row, shown)) if shown else NOT_MEASURED
        parts += [f"{machine_line(found.facts)}:", table, *_left_out(found.records)]
    return "\n\n".join(parts) or NOT_MEASURED


def _left_out(records: Iterable[Record]) -> list[str]:
    """A line for each reason for which something has no number, and who that is."""
    found: dict[str, list[str]] = {}
    for record in records:
        for kind, word in (("not_measured", "Not measured"), ("refused", "Refused")):
            if kind in record:
                # a refusal is of one case, and so is a workload that can't be had
                of_a_case = kind == "refused" or not record["dtype"]
                name = f"{_engine(record)} ({record['case']})" if of_a_case else _engine(record)
                found.setdefault(f"- {word}: {{}}: {record[kind]}.", []).append(name)
    lines = [said.format(", ".join(dict.fromkeys(who))) for said, who in found.items()]
    return ["\n".join(lines)] if lines else []


def _named(record: Record) -> tuple[str, str, str]:
    return record["case"], _engine(record), f"{record['layer_rows']:.2f}"


def _engine(record: Record) -> str:
    words = [record["engine"], record["backend"].replace("auto", ""), record["dtype"].replace("float32", "")]
    return ", ".join(word for word in words if word)


def _beside_plain(record: Record) -> tuple[str, str, str]:
    return _ratio(record), f"{record['efficiency']:.2f}" if "efficiency" in record else "", str(record["flips"])


def _ratio(record: Record) -> str:
    if "ratio" not in record:
        return ""
    return f"{record['ratio']:.3f} ({record['ratio_low']:.3f} to {record['ratio_high']:.3f})"


TABLES = {
    "end_to_end": goals,
    "single_stream": latency,
    "offline": throughput,
    "server": under_load,
    "profile": where_time_goes,
}
