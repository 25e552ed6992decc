"""The plots of whole models, ``results/<machine>-<name>.png``, from each machine's JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.end_to_end.baselines import BASELINES, LEAVE_EARLY, PEERS, PLAIN
from benchmarks.end_to_end.forced import FAMILY, FULL, NEVER

Record = dict[str, Any]
#: Name -> title.
PLOTS = {
    "exits": "time against mean exit layer",
    "never_exit": "time where nobody leaves",
    "batch": "cost of a row against batch size",
}
#: Shapes drawn against mean exit layer, and the mix whose cost is drawn against batch size.
EXIT_SHAPES = ("B 1, S 32", "B 32, S 32")
BATCH_MIX = "uniform, 50 %"
_MARKERS = {"all": "o", "uniform": "o", "long": "^", "one": "P", "never": "s"}
_GREYS = {
    "item loop": "x",
    "mask loop": "+",
    "truncation": "D",
    "torch.compile": "v",
    "ONNX Runtime": "<",
    "OpenVINO": ">",
}


def write(results: Path | None = None) -> list[Path]:
    """Draw what every machine has measured.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    folder = results or store.RESULTS
    drawn = []
    for machine, document in store.documents(folder).items():
        records = [r for r in document["records"] if "median_ms" in r and "exits" in r]
        for name, draw in _DRAW.items():
            figure = draw(records)
            if figure is not None:
                drawn.append(folder / f"{machine}-{name}.png")
                figure.savefig(drawn[-1])
    return drawn


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: `pip install earlyexit_kernels[plot]`") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _ours(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Our engines' records beside the plain model, by engine, back-end where there are several, and dtype."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["engine"] not in BASELINES and record["baseline"] == PLAIN:
            found.setdefault(_label(record), []).append(record)
    return found


def _label(record: Record) -> str:
    words = [record["engine"], record["backend"], record["dtype"] if record["dtype"] != "float32" else ""]
    return ", ".join(word for word in words if word)


def exits(records: Sequence[Record]) -> Any:
    """Time over the plain model's against the mean exit layer, at one row and in a batch."""
    shapes = [
        shape for shape in EXIT_SHAPES if any(r["shape"] == shape and r["subject"] == "BERT-base" for r in records)
    ]
    if not shapes:
        return None
    figure = _figure(4.6 * len(shapes), 4.2)
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        here = [r for r in records if r["shape"] == shape and r["subject"] == "BERT-base"]
        depth = here[0]["depth"]
        axes.plot([0, depth], [0, 1], color="black", linestyle="--", linewidth=1, label="ideal: only the layers run")
        for number, (label, mine) in enumerate(_ours(here).items()):
            _draw_mixes(axes, mine, label, f"C{number}")
        for record in here:
            if record["engine"] in _GREYS and record["baseline"] == PLAIN and record["dtype"] == "float32":
                marker = _GREYS[record["engine"]]
                point = [record["mean_exit_layer"]], [record["ratio"]]
                axes.plot(*point, color="0.35", marker=marker, linestyle="none", label=record["engine"])
        axes.set(
            title=f"BERT-base, {shape}", xlabel=f"mean exit layer (of {depth})", ylim=(0, None), xlim=(0, depth + 0.4)
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="upper left")
    figure.axes[0].set_ylabel("time / plain Hugging Face")
    return figure


def _draw_mixes(axes: Any, records: Sequence[Record], label: str, color: str) -> None:
    """One engine: a line through the mixes of each kind, all from the first point to never exit."""
    end = [r for r in records if r["exits"] == NEVER]
    kinds: dict[str, list[Record]] = {}
    for record in records:
        if record["exits"] not in (FULL, FAMILY, NEVER):
            kinds.setdefault(record["exits"].split()[0].strip(","), []).append(record)
    for kind, found in kinds.items():
        line = sorted([*found, *end], key=lambda r: r["mean_exit_layer"])
        points = [r["mean_exit_layer"] for r in line], [r["ratio"] for r in line]
        style = {"linestyle": "none"} if kind == "one" else {"linewidth": 1.2}
        if kind == "one":
            points = [r["mean_exit_layer"] for r in found], [r["ratio"] for r in found]
        name = {"one": "one row stays", "long": "long tail", "all": "all together"}.get(kind, kind)
        axes.plot(*points, color=color, marker=_MARKERS.get(kind, "o"), markersize=4, label=f"{label}: {name}", **style)


def never_exit(records: Sequence[Record]) -> Any:
    """Time over the plain model's where every exit and decision is computed and nobody leaves, for every shape."""
    mine = _ours(r for r in records if r["exits"] == NEVER and r["suite"] in ("single_stream", "offline"))
    shapes = list(dict.fromkeys((r["subject"], r["shape"]) for found in mine.values() for r in found))
    if not shapes:
        return None
    figure = _figure(8.4, 0.9 + 0.22 * len(shapes) * max(len(mine), 1.6))
    axes = figure.subplots()
    height = 0.8 / len(mine)
    for number, (label, found) in enumerate(mine.items()):
        for record in found:
            place = shapes.index((record["subject"], record["shape"])) + number * height
            spread = [[record["ratio"] - record["ratio_low"]], [record["ratio_high"] - record["ratio"]]]
            axes.barh(place, record["ratio"], height, color=f"C{number}", xerr=spread, ecolor="0.3")
        axes.barh(0, 0, 0, color=f"C{number}", label=label)
    axes.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(shapes))], [", ".join(shape) for shape in shapes])
    axes.invert_yaxis()
    axes.set(xlabel="time / plain Hugging Face, nobody leaves", xlim=(0, None))
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="x-small")
    return figure


def batch(records: Sequence[Record]) -> Any:
    """Milliseconds a row against batch size, MiniLM's shape."""
    wanted = {f"{NEVER}": "-", BATCH_MIX: ":", FULL: "-"}
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        is_ours = record["engine"] not in BASELINES
        right = record["subject"] == "MiniLM" and record["shape"].endswith("S 32") and record["dtype"] == "float32"
        if not right or record["exits"] not in wanted or record["baseline"] not in ("", PLAIN):
            continue
        if record["engine"] in LEAVE_EARLY or (is_ours and record["exits"] == FULL):
            continue
        if is_ours or record["engine"] in (PLAIN, *PEERS):
            name = f"{_label(record)}, {record['exits']}" if is_ours else _label(record)
            lines.setdefault((name, record["exits"]), {})[record["rows"]] = record["median_ms"] / record["rows"]
    lines = {key: points for key, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure = _figure(7.2, 4.2)
    axes = figure.subplots()
    ours = [name for name, _ in lines if name.split(",")[0] not in BASELINES]
    for (name, mix), points in lines.items():
        color = f"C{ours.index(name) // 2}" if name in ours else "0.35"
        marker = "o" if name in ours else _GREYS.get(name, "s")
        line = sorted(points.items())
        axes.plot(*zip(*line, strict=True), color=color, marker=marker, markersize=4, linestyle=wanted[mix], label=name)
    sizes = sorted({rows for points in lines.values() for rows in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="rows of a batch (S 32)", ylabel="ms a row", title="MiniLM's shape", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    return figure


_DRAW = {"exits": exits, "never_exit": never_exit, "batch": batch}
