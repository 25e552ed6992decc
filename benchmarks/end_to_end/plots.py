"""The plots of whole models, ``results/<machine>-<name>.png``, from each machine's JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.end_to_end.baselines import BASELINES, PLAIN
from benchmarks.end_to_end.forced import FAMILY, FULL, NEVER

Record = dict[str, Any]
#: What is drawn.
SUITES = ("single_stream", "offline")
#: Name -> title.
PLOTS = {
    "exits": "time against mean exit layer",
    "never_exit": "time where nobody leaves",
    "batch": "cost of a row against batch size",
}
#: Shapes drawn against mean exit layer; times above this many of the plain model's are off the plot.
EXIT_SHAPES, TOP = ("B 1, S 32", "B 32, S 32"), 1.6
HALF = "half of the layer-rows"
#: What is drawn against batch size: exits of our engines, by the name in the plot, and full depth of the others.
BATCH_MIXES = {NEVER: (NEVER,), HALF: ("uniform, 50 %", "all at 50 %"), FULL: (FULL,)}
#: First word of a mix -> its name and marker.
_KINDS = {"all": ("all together", "o"), "long": ("long tail", "^"), "one": ("one row stays", "P")}
_GREYS = {
    "transformers": "s",
    "torch.compile": "v",
    "item loop": "x",
    "mask loop": "+",
    "truncation": "D",
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
        records = [r for r in document["records"] if r["suite"] in SUITES and "median_ms" in r]
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
    large = [r for r in records if r["subject"] == "BERT-base"]
    shapes = [shape for shape in EXIT_SHAPES if any(r["shape"] == shape for r in large)]
    if not shapes:
        return None
    figure = _figure(4.4 * len(shapes), 5.0)
    labels: dict[str, Any] = {}
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        here = [r for r in large if r["shape"] == shape]
        depth = here[0]["depth"]
        axes.plot([0, depth], [0, 1], color="black", linestyle="--", linewidth=1, label="ideal: only the layers run")
        for number, (label, mine) in enumerate(_ours(here).items()):
            _draw_mixes(axes, mine, label, f"C{number}")
        others = [r for r in here if r["engine"] in _GREYS and r["baseline"] == PLAIN and r["dtype"] == "float32"]
        for record in others:
            style = {"color": "0.35", "marker": _GREYS[record["engine"]], "markersize": 6, "linestyle": "none"}
            axes.plot([record["mean_exit_layer"]], [record["ratio"]], label=record["engine"], **style)
        axes.set(title=f"BERT-base, {shape}", xlabel=f"mean exit layer (of {depth})")
        axes.set(ylim=(0, min(TOP, axes.get_ylim()[1])), xlim=(0, depth + 0.4))
        axes.grid(alpha=0.3)
        labels |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.axes[0].set_ylabel("time / plain Hugging Face")
    figure.legend(labels.values(), labels.keys(), fontsize="small", loc="outside lower center", ncols=len(shapes) + 1)
    return figure


def _draw_mixes(axes: Any, records: Sequence[Record], label: str, color: str) -> None:
    """One engine: a line for each kind of mix, up to where nobody leaves; a mix alone of its kind is a point."""
    end = [r for r in records if r["exits"] == NEVER]
    kinds: dict[str, list[Record]] = {}
    for record in records:
        if record["exits"] not in (FULL, FAMILY, NEVER):
            kinds.setdefault(record["exits"].split()[0].strip(","), []).append(record)
    for kind, found in kinds.items():
        line = sorted([*found, *end] if len(found) > 1 else found, key=lambda r: r["mean_exit_layer"])
        points = [r["mean_exit_layer"] for r in line], [r["ratio"] for r in line]
        name, marker = _KINDS.get(kind, (kind, "o"))
        axes.plot(*points, color=color, marker=marker, markersize=4, linewidth=1.2, label=f"{label}: {name}")


def never_exit(records: Sequence[Record]) -> Any:
    """Time over the plain model's where every exit and decision is computed and nobody leaves, for every shape."""
    mine = _ours(r for r in records if r["exits"] == NEVER)
    shapes = sorted({(r["subject"], r["shape"]) for found in mine.values() for r in found}, key=_by_size)
    if not shapes:
        return None
    figure = _figure(8.0, 1.0 + 0.2 * (len(shapes) + sum(map(len, mine.values()))))
    axes = figure.subplots()
    place, ticks, named = 0.0, [], set()
    for shape in shapes:
        start = place
        for number, (label, found) in enumerate(mine.items()):
            for record in (r for r in found if (r["subject"], r["shape"]) == shape):
                spread = [[record["ratio"] - record["ratio_low"]], [record["ratio_high"] - record["ratio"]]]
                shown = {"label": label} if label not in named else {}
                axes.barh(place, record["ratio"], 0.9, color=f"C{number}", xerr=spread, ecolor="0.3", **shown)
                named.add(label)
                place += 1.0
        ticks.append((start + place - 1.0) / 2)
        place += 0.7
    axes.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(ticks, [", ".join(shape) for shape in shapes], fontsize="small")
    axes.set(xlabel="time / plain Hugging Face, where nobody leaves", xlim=(0, None), ylim=(place, -1.0))
    axes.grid(alpha=0.3, axis="x")
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    return figure


def _by_size(shape: tuple[str, str]) -> tuple[str, list[int]]:
    """Models by name, their shapes by the numbers in them."""
    return shape[0], [int(number) for number in re.findall(r"\d+", shape[1])]


def batch(records: Sequence[Record]) -> Any:
    """Milliseconds a row against batch size, MiniLM's shape."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        of_shape = record["subject"] == "MiniLM" and record["shape"].endswith("S 32") and record["dtype"] == "float32"
        if not of_shape or record["baseline"] not in ("", PLAIN):
            continue
        for mix, names in BATCH_MIXES.items():
            # full depth of the others, exits of ours
            if record["exits"] in names and (record["engine"] in BASELINES) == (mix == FULL):
                points = lines.setdefault((_label(record), mix), {})
                points[record["rows"]] = record["median_ms"] / record["rows"]
    # those that were timed at every size
    most = max(map(len, lines.values()), default=0)
    lines = {key: points for key, points in lines.items() if len(points) == most}
    if most < 2:
        return None
    figure = _figure(8.0, 4.2)
    axes = figure.subplots()
    ours = list(dict.fromkeys(label for label, mix in lines if mix != FULL))
    for (label, mix), points in lines.items():
        color = f"C{ours.index(label)}" if label in ours else "0.35"
        style = {"linestyle": ":" if mix == HALF else "-", "marker": _GREYS.get(label, "o"), "markersize": 4}
        name = label if mix == FULL else f"{label}, {mix}"
        axes.plot(*zip(*sorted(points.items()), strict=True), color=color, label=name, **style)
    sizes = sorted({rows for points in lines.values() for rows in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="rows of a batch", ylabel="ms a row", title="MiniLM's shape, S 32", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


_DRAW = {"exits": exits, "never_exit": never_exit, "batch": batch}
