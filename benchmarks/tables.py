"""The tables of measurements, from the committed results: each is data, drawn by one renderer.

A table has a suite and columns; a column is a title and a format string of a record's fields, which is empty where a
record lacks one, or a function of the record. `TABLES` has all of them by the name that documents use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import harness
from benchmarks.goals import END_TO_END, GPU, PEER
from benchmarks.harness import Measured, Record, measured
from benchmarks.plots import PLOTS
from earlyexit_kernels.tuning.tables import device_text, markdown_table

Cell: TypeAlias = str | Callable[[Record], Any]
Columns: TypeAlias = Sequence[tuple[str, Cell]]
Draw: TypeAlias = Callable[[list[Record]], str]
Table: TypeAlias = Callable[[Path | None], str]
NOT_MEASURED = "Not measured yet."
NO_GPU = "The GPU numbers are still to be measured: no `make gpu-check` has run on a machine that has one."
PLAIN, FUSED, FAMILY = "transformers", "fused layers", "family layers"
RATIO, SHORT_RATIO = ("{ratio:%s} ({ratio_low:%s} to {ratio_high:%s})" % ((digits,) * 3) for digits in (".3f", ".2f"))


def cell_text(cell: Cell, record: Record) -> str:
    """Return what a cell shows of a record."""
    if callable(cell):
        return str(cell(record))
    try:
        return cell.format_map(record)
    except (KeyError, TypeError):  # the record lacks the field, or it is None
        return ""


def draw(columns: Columns, where: Callable[[Record], bool], records: list[Record]) -> str:
    """Return the table of some records, and why variants have no number."""
    rows = [[cell_text(cell, record) for _, cell in columns] for record in records if where(record)]
    table = markdown_table([title for title, _ in columns], rows) if rows else NOT_MEASURED
    return "\n\n".join([table, *skipped(records)])


def per_machine(suite: str, content: Draw, results: Path | None = None, *, titled: bool = True) -> str:
    """Return a suite's table for every machine, below a line with the machine if `titled`."""
    parts = [(f"{machine_line(m.facts)}:\n\n" if titled else "") + content(m.records) for m in measured(suite, results)]
    return "\n\n".join(parts) or NOT_MEASURED


def table_of(suite: str, columns: Columns, where: Callable[[Record], bool]) -> Table:
    """Return a table with a row for each of a suite's records."""
    return lambda results=None: per_machine(suite, partial(draw, columns, where), results)


def drawn_by(suite: str, content: Draw) -> Table:
    """Return a table of another form than a row for each record."""
    return lambda results=None: per_machine(suite, content, results)


def machine_line(facts: Record) -> str:
    """Return the machine, package versions and commit of a measurement in one line."""
    packages = facts["packages"]
    versions = f"torch {packages['torch']}, transformers {packages['transformers']}"
    return f"{device_text(facts)}; {versions}, commit {facts['commit']}"


def engine_text(record: Record) -> str:
    """Return a record's engine, back-end and dtype without the usual ones."""
    usual = {"engine": "", "backend": "auto", "dtype": "float32"}
    return ", ".join(word for key, default in usual.items() if (word := record.get(key, "")) and word != default)


def skipped(records: Iterable[Record]) -> list[str]:
    """Return a list of reasons, with the variants that have no number for each; empty if all have one."""
    found: dict[str, list[str]] = {}
    for record in records:
        for kind, word in ((harness.NOT_MEASURED, "Not measured"), (harness.REFUSED, "Refused")):
            if kind in record:
                # a refusal concerns one case, and so does a workload that cannot be built
                of_a_case = "case" in record and (kind == harness.REFUSED or not record.get("dtype"))
                name = engine_text(record) or "everything"
                name += f" ({record['case']})" if of_a_case else ""
                found.setdefault(f"- {word}: {{}}: {record[kind]}.", []).append(name)
    lines = [line.format(", ".join(dict.fromkeys(names))) for line, names in found.items()]
    return ["\n".join(lines)] if lines else []


def _has(*fields: str) -> Callable[[Record], bool]:
    return lambda record: all(name in record for name in fields)


def _beside_plain(record: Record) -> bool:
    """Whether a record is shown; comparisons with other baselines than the plain float32 model are in the JSON."""
    return "median_ms" in record and record["baseline"] in ("", PLAIN)


def _reached(record: Record) -> str:
    return "" if record.get("goal") is None else "yes" if record["goal_met"] else "no"


def _goal(text: str) -> Cell:
    return lambda record: "none" if record["goal"] is None else text.format_map(record)


def _words(key: str) -> Cell:
    return lambda record: record[key].replace("_", " ")


P50, P90, P99 = ((f"p{n} ms", f"{{{name}_ms:.1f}}") for n, name in ((50, "median"), (90, "p90"), (99, "p99")))
CASE, ENGINE = ("case", "{case}"), ("engine", engine_text)
LAYER_ROWS, RATE = ("layer-rows", "{layer_rows:.2f}"), ("rows / s", "{rows_per_second:.1f}")
BESIDE_PLAIN: Columns = (("time / plain", RATIO), ("efficiency", "{efficiency:.2f}"), ("flips", "{flips}"))
#: Suite of whole models -> columns.
WHOLE: dict[str, Columns] = {
    "single_stream": (CASE, ENGINE, LAYER_ROWS, P50, P90, P99, *BESIDE_PLAIN),
    "offline": (CASE, ENGINE, LAYER_ROWS, ("tokens", "{tokens:.2f}"), ("rows", "{rows}"), RATE, P50, *BESIDE_PLAIN),
    "newer_families": (CASE, ENGINE, LAYER_ROWS, RATE, P50, *BESIDE_PLAIN),
    "server": (
        *(CASE, ENGINE, ("rate", "{rate:.1f}"), RATE, ("answered / s", "{goodput:.1f}"), P50, P99),
        *(("p50 early, late ms", "{early_ms:.1f}, {late_ms:.1f}"), ("p50 / plain", RATIO)),
    ),
}
STORED: Columns = (
    *(CASE, ("weights", "{dtype}"), ("ms", "{median_ms:.2f}"), ("over", "{against}"), ("time ratio", RATIO)),
    *(("goal", _goal("{goal:.2f}")), ("reached", _reached), ("error of logits", "{error:.2g}")),
)
JOB: Columns = (
    *(
        ("task", "{case}"),
        ("way", "{engine}"),
        ("weights", "{dtype}"),
        ("exits", "{exits}"),
        ("seconds", "{seconds:.2f}"),
        ("time / pipeline", RATIO),
    ),
    *(("accuracy", "{accuracy:.4f}"), ("same labels", "{same:.2%}"), ("mean exit layer", "{mean_exit_layer:.2f}")),
)
# types other than these two are not multiplied in float32
ROOFLINE: Columns = (
    *(("weights", "{case}"), ("tokens", "{shape}"), ("ms", "{median_ms:.2f}"), ("GFLOP/s", "{gflops}")),
    ("of the peak", lambda r: f"{100 * r['operations_share']:.0f} %" * (r["case"] in ("float32", "float16"))),
    *(("GB/s", "{gb_per_second:.1f}"), ("of the peak", lambda r: f"{100 * r['bytes_share']:.0f} %")),
    ("goal", lambda r: "none" if r["goal"] is None else f"{100 * r['goal']:.0f} % of {r['goal_of'].split('_')[0]}"),
    ("reached", _reached),
)
CHECKS: Columns = (
    *(("model", "{case}"), ("caches", "{caches}")),
    *(("us a batch", "{microseconds:.1f} ({low:.1f} to {high:.1f})"), ("goal", "{goal:.0f}")),
)
OVERHEAD: Columns = (
    *(("one client", "{server}"), ("p50, ms", "{p50_ms:.2f}"), ("p99, ms", "{p99_ms:.2f}")),
    ("p50 less the model, ms", "{overhead_ms:.2f}"),
)
ARRIVALS: Columns = (
    *(("load", "{load}"), ("texts a second", "{rate:.0f}"), ("server", "{server}")),
    *((f"{p}, ms", f"{{{p}_ms:.1f}}") for p in ("p50", "p90", "p99")),
    *(("p50, ratio", "{p50_ratio:.2f}"), ("p99, ratio", "{p99_ratio:.2f}"), ("refused", "{turned_away}")),
)
SCORING: Columns = (
    *(("rows", "{rows:,}"), ("seconds", "{seconds:.0f}"), ("rows a second", "{rows_per_second:.0f}")),
    ("plain loop, rows a second", "{loop_rows_per_second[0]:.0f}, {loop_rows_per_second[1]:.0f}"),
    ("ratio", "{ratio:.2f}"),
    (
        "killed at half and resumed",
        lambda r: "every row once" if r["every_row_once"] else "rows lost or doubled",
    ),
)
GUARANTEE: Columns = (
    *(("rule", _words("rule")), ("risk against", _words("against")), ("allowed", "{epsilon:.0%} of draws")),
    ("exceeded", lambda r: f"{r['broken'] / r['draws']:.1%} of {r['draws']}"),
    *(("mean risk", "{mean_risk:.3f} (bound {delta:g})"), ("fewer layers, x", "{mean_layer_speed_up:.2f}")),
)
DROP: Columns = (
    *(("model", lambda r: r["trace"].partition("_")[0]), ("rows", "{rows}"), ("chosen", "{choice}")),
    ("fewer layers, x", "{layer_speed_up:.2f} ± {layer_speed_up_deviation:.2f}"),
    ("drop, points", lambda r: f"{100 * r['drop']:.1f} ± {100 * r['drop_deviation']:.1f}"),
)
SCALE: Columns = (
    *(("rule", _words("rule")), ("seconds", "{seconds:.1f}"), ("peak memory, GiB", "{peak_gib:.1f}")),
    ("mean exit layer", "{mean_exit_layer:.1f}"),
)


def end_to_end(results: Path | None = None) -> str:
    """Return every case with a goal, beside the number reached, and the plots, machine by machine."""
    machines: dict[str, list[Measured]] = {}
    for suite in ("single_stream", "offline"):
        for one in measured(suite, results):
            machines.setdefault(one.machine, []).append(one)
    parts = []
    for machine, suites in machines.items():
        commits = ", ".join(dict.fromkeys(str(one.facts["commit"]) for one in suites))
        # with the layers that `auto` chooses; the others are in the JSON
        ours = [r for one in suites for r in one.records if "ratio" in r and r["engine"] != FAMILY]
        with_goal = [r for r in ours if r.get("goal") is not None]
        shown = [r for r in ours if r in with_goal or (r["baseline"], r["exits"]) == (PEER, "never exit")]
        reached = sum(r["goal_met"] for r in with_goal)
        pictures = {f"{machine}-{name}.png": title for name, title in PLOTS.items()}
        folder = results or harness.RESULTS
        parts += [f"{machine_line(suites[0].facts | {'commit': commits})}:", draw(GOALS, _has(), shown)]
        parts += [f"Reached: {reached} of {len(with_goal)} goals; not measured: {len(END_TO_END) - len(with_goal)}."]
        parts += [f"![{t}](benchmarks/results/{n})" for n, t in pictures.items() if (folder / n).is_file()]
    return "\n\n".join(parts) or NOT_MEASURED


def _over(record: Record) -> str:
    name, against = record["baseline"], record["against"]
    return name if name.startswith(against) or against == record["engine"] else f"{name}: {against}"


GOALS: Columns = (
    *(CASE, ("dtype", "{dtype}"), ("engine", "{engine}, {backend}"), ("over", _over), ("time ratio", RATIO)),
    ("efficiency", "{efficiency:.2f}"),
    ("goal", lambda r: _goal("at most {goal:.2f}" if r["goal_of"] == "ratio" else "efficiency {goal:.2f}")(r)),
    ("reached", _reached),
)


def pivot(title: str, rows: dict[str, dict[tuple[str, ...], str]]) -> str:
    """Return a table with a row for each name of a row, and a column for each key within one, titled by its end."""
    keys = list(dict.fromkeys(key for cells in rows.values() for key in cells))
    header = (title, *(key[-1] for key in keys))
    return markdown_table(header, [(row, *(cells.get(key, "") for key in keys)) for row, cells in rows.items()])


def decisions(records: list[Record]) -> str:
    """Return the time of each rule's decision over entropy's, a table for each back-end."""
    parts = []
    for backend in dict.fromkeys(record["backend"] for record in records):
        rows: dict[str, dict[tuple[str, ...], str]] = {}
        for r in (r for r in records if r["backend"] == backend):
            if "not_measured" in r:
                parts.append(f"`{backend}`: not measured, {r['not_measured']}.")
                continue
            ratio = "1.00" if r["rule"] == "entropy" else cell_text(SHORT_RATIO, r)
            size = f"B {r['rows']}"
            cells = {(f"{size}: time / entropy",): ratio, (size, "us"): f"{r['microseconds']:.1f}"}
            rows.setdefault(r["rule"].replace("_", " "), {}).update(cells)
        parts += [pivot(f"`{backend}`", rows)] if rows else []
    return "\n\n".join(parts)


def products(records: list[Record]) -> str:
    """Return the time of one encoder layer over the family's own, by its tokens and the products it is made of."""
    rows: dict[str, dict[tuple[str, ...], str]] = {}
    for record in records:
        if "ratio" in record and record["case"] != "family":
            way = (record["case"].removeprefix("fused, "),)
            rows.setdefault(record["shape"], {})[way] = cell_text(SHORT_RATIO, record)
    return pivot("width and tokens", rows)


def roofline(records: list[Record]) -> str:
    """Return the operations and bytes per second of layers, and their share of the peaks of the processor."""
    shown = [r for r in records if "gflops" in r]
    peaks = [f"Peaks: {r['peak_gflops']} GFLOP/s in float32 and {r['peak_gb_per_second']} GB/s." for r in shown[:1]]
    return "\n\n".join([*peaks, draw(ROOFLINE, _has("gflops"), records)])


def http(part: str, columns: Columns) -> Table:
    """Return a table of a part of the suite ``http``, with ratios to full depth under the same load."""

    def content(records: list[Record]) -> str:
        rows = sorted((r for r in records if r.get("part") == part), key=lambda r: r.get("load", 0))
        full = {r.get("load"): r for r in rows if r["server"] == "full depth"}
        ratios = [
            {f"{p}_ratio": r[f"{p}_ms"] / full[r["load"]][f"{p}_ms"] for p in ("p50", "p99")} if full else {}
            for r in rows
        ]
        return draw(columns, _has(), [r | more for r, more in zip(rows, ratios, strict=True)])

    return drawn_by("http", content)


def gpu(content: Draw) -> Table:
    """Return a table of all suites of each GPU."""

    def table(results: Path | None = None) -> str:
        parts = []
        for document in harness.documents(results).values():
            suites = {name: facts for name, facts in document["suites"].items() if name.startswith("gpu_")}
            if suites:
                newest = max(suites.values(), key=lambda facts: facts["time"])
                commits = ", ".join(dict.fromkeys(str(facts["commit"]) for facts in suites.values()))
                line = machine_line(document["environment"] | newest | {"commit": commits})
                driver = newest.get("nvidia_smi", {}).get("driver_version")
                records = [record for record in document["records"] if record["suite"] in suites]
                parts += [f"{line}{f', driver {driver}' * bool(driver)}:", content(records)]
        return "\n\n".join(parts) or NO_GPU

    return table


def _gpu_number(record: Record) -> str:
    of = record["goal_of"]
    spread = {"ratio": ("ratio_low", "ratio_high"), "median_us": ("low_us", "high_us")}.get(of)
    if spread is None or spread[0] not in record:
        return f"{record[of]:g}"
    return f"{record[of]:.3g} ({record[spread[0]]:.3g} to {record[spread[1]]:.3g})"


def _gpu_input(record: Record) -> str:
    # exits are compiled ones, unless these could not be built
    by = f"by {record['backend']}" if record["backend"] not in ("", "cpp") else ""
    return ", ".join(word for word in (record.get("exits", ""), record["shape"], by) if word)


GPU_GOALS: Columns = (
    *(("what", "{goal_name}"), ("dtype", "{dtype}"), ("input", _gpu_input), ("is", _gpu_number)),
    *(("at most", "{goal:g}"), ("reached", _reached)),
)
GPU_DETAILS: Columns = (
    *(CASE, ("input", "{shape}"), ("dtype", "{dtype}"), ("variant", lambda r: engine_text(r | {"dtype": ""}))),
    *(("us", lambda r: f"{1000 * r['median_ms']:.4g}"), ("over", "{baseline}")),
    ("time ratio", "{ratio:.3g} ({ratio_low:.3g} to {ratio_high:.3g})"),
)


def gpu_goals(records: list[Record]) -> str:
    """Return every goal of a GPU beside the numbers reached."""
    rows = []
    for name in GPU:
        reached = [r for r in records if r.get("goal_name") == name]
        rows += [[cell_text(cell, r) for _, cell in GPU_GOALS] for r in reached]
        rows += [] if reached else [[name, "", "", "", "", "not measured"]]
    return "\n\n".join([markdown_table([title for title, _ in GPU_GOALS], rows), *skipped(records)])


TABLES: dict[str, Table] = {
    "end_to_end": end_to_end,
    **{suite: table_of(suite, columns, _beside_plain) for suite, columns in WHOLE.items()},
    "stored_weights": table_of("stored_weights", STORED, _has("ratio")),
    **{name: table_of(name, JOB, _has("seconds")) for name in ("job", "job_trec")},
    "decision_cost": drawn_by("decision_cost", decisions),
    "layer_products": drawn_by("layer_products", products),
    "layer_roofline": drawn_by("layer_roofline", roofline),
    "weight_checks": table_of("weight_checks", CHECKS, _has("microseconds")),
    "http_overhead": http("overhead", OVERHEAD),
    "http_arrivals": http("arrivals", ARRIVALS),
    "scoring": table_of("scoring", SCORING, _has("ratio")),
    "calibration_guarantee": table_of("calibration_guarantee", GUARANTEE, _has("broken")),
    "calibration_drop": table_of("calibration_drop", DROP, _has("drop")),
    "calibration_scale": table_of("calibration_scale", SCALE, _has("peak_gib")),
    "gpu": gpu(gpu_goals),
    "gpu_details": gpu(partial(draw, GPU_DETAILS, lambda r: "goal_name" not in r and "median_ms" in r)),
}
