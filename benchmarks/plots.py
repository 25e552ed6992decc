"""The plots of committed results, ``results/*.png``: ``python -m benchmarks.plots`` draws them again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.end_to_end.baselines import BASELINES, PLAIN
from benchmarks.end_to_end.forced import FAMILY, FULL, NEVER
from benchmarks.end_to_end.suites import HALF, OFFLINE, ONE_AT_HALF, SINGLE_STREAM
from benchmarks.harness import Record
from earlyexit_kernels.tuning.charts import COLORS, add_speed_up_axis, new_figure, plot_tradeoff
from earlyexit_kernels.tuning.tables import device_text

#: Name -> title, of each machine's plots.
PLOTS = {
    "exits": "time against mean exit layer",
    "never_exit": "time where no row leaves",
    "batch": "time per row against batch size",
}
#: The accuracy plot: JSON of `earlyexit eval`, PNG, title, and rows of SST-2's dev split.
ACCURACY = ("sst2-minilm-l6.json", "sst2.png", "SST-2 dev split, MiniLM-L6, joint training", 872)
#: Shapes drawn against mean exit layer; larger time ratios are outside of the plot.
EXIT_SHAPES, TOP = ("B 1, S 32", "B 32, S 32"), 1.6
#: Drawn against batch size: label -> mixes of our engines; the others run at full depth.
BATCH_MIXES = {NEVER: (NEVER,), "half of the layer-rows": (HALF, ONE_AT_HALF), FULL: (FULL,)}
#: First word of a mix -> its name, marker and line style.
_KINDS = {
    "all": ("all rows together", "o", "-"),
    "uniform,": ("uniform", "s", "-"),
    "long": ("long tail", "^", "--"),
    "one": ("one row stays", "P", "none"),
}
#: Baseline -> colour and marker.
_OTHERS = {
    "transformers": ("#000000", "s"),
    "torch.compile": ("#CC79A7", "v"),
    "item loop": ("#E69F00", "x"),
    "mask loop": ("#56B4E9", "+"),
    "truncation": ("#8C510A", "D"),
    "ONNX Runtime": ("#7F3C8D", "<"),
    "OpenVINO": ("#666666", ">"),
}


def write(results: Path | None = None) -> list[Path]:
    """Draw the results of every machine, and the accuracy plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder = results or harness.RESULTS
    drawn = []
    for machine, document in harness.documents(folder).items():
        records = [r for r in document["records"] if r["suite"] in (SINGLE_STREAM, OFFLINE) and "median_ms" in r]
        for name, draw in _DRAW.items():
            figure = draw(records)
            if figure is not None:
                title = f"{PLOTS[name]} ({device_text(document['environment'])}, float32)"
                figure.suptitle(title[0].upper() + title[1:], fontsize="medium")
                drawn.append(folder / f"{machine}-{name}.png")
                figure.savefig(drawn[-1])
    if (folder / ACCURACY[0]).is_file():
        drawn.append(accuracy(folder))
    return drawn


def accuracy(folder: Path) -> Path:
    """Draw accuracy against the mean exit layer from the JSON of `earlyexit eval`."""
    source, target, title, rows = ACCURACY
    document = json.loads((folder / source).read_text(encoding="utf-8"))
    curves: dict[str, list[tuple[float, float]]] = {}
    chosen, random = {}, []
    for record in (r for r in document["records"] if r["kind"] == "point"):
        name, found = record["criterion"]["name"], record["reporting"]
        point = found["mean_exit_layer"], found["scores"]["accuracy"]
        curves.setdefault(name, []).append(point)
        if record["chosen"]:
            chosen[name] = point
        if name == "entropy":
            random.append((point[0], found["random_exit"]))
    layers = [r for r in document["records"] if r["kind"] == "static_truncation"]
    truncation = [(float(r["layer"]), r["reporting"]["accuracy"]) for r in layers]
    return plot_tradeoff(
        folder / target,
        curves,
        baselines={"static truncation": truncation, "random exit, shares of entropy": random},
        chosen=chosen,
        depth=len(layers),
        metric="accuracy",
        title=f"{title}\n{device_text(document['environment'])}, float32",
        rows=rows,
    )


def _ours(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return label -> records of our engines in float32, compared with the plain model."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["engine"] not in BASELINES and record["baseline"] == PLAIN and record["dtype"] == "float32":
            found.setdefault(_label(record), []).append(record)
    return found


def _label(record: Record) -> str:
    return ", ".join(word for word in (record["engine"], record["backend"]) if word)


def _band(axes: Any, records: Sequence[Record], key: str, color: str) -> None:
    """Fill the area between the .2 and .8 quantiles of the rounds' ratios."""
    xs, low, high = ([r[name] for r in records] for name in (key, "ratio_low", "ratio_high"))
    axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)


def exits(records: Sequence[Record]) -> Any:
    """Draw the time over the plain model's time against the mean exit layer, for one row and for a batch."""
    large = [r for r in records if r["subject"] == "BERT-base"]
    shapes = [shape for shape in EXIT_SHAPES if any(r["shape"] == shape for r in large)]
    if not shapes:
        return None
    figure = new_figure(4.6 * len(shapes) + 0.6, 6.4)
    labels: dict[str, Any] = {}
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        here = [r for r in large if r["shape"] == shape]
        depth = here[0]["depth"]
        axes.plot([0, depth], [0, 1], color="black", linestyle=":", linewidth=1, label="time in proportion to layers")
        for number, (label, mine) in enumerate(_ours(here).items()):
            _draw_mixes(axes, mine, label, COLORS[number])
        for record in here:
            if record["engine"] in _OTHERS and record["baseline"] == PLAIN and record["dtype"] == "float32":
                color, marker = _OTHERS[record["engine"]]
                style = {"color": color, "marker": marker, "markersize": 8, "linestyle": "none"}
                # hollow, so that markers at the same place stay visible
                style |= {"markerfacecolor": "none", "markeredgewidth": 1.5, "zorder": 3}
                axes.plot([record["mean_exit_layer"]], [record["ratio"]], label=record["engine"], **style)
        axes.set(xlabel=f"BERT-base, {shape}: mean exit layer (of {depth})")
        axes.set(ylim=(0, min(TOP, axes.get_ylim()[1])), xlim=(0, depth + 0.4))
        add_speed_up_axis(axes, depth)
        axes.grid(alpha=0.3)
        labels |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.axes[0].set_ylabel("time / plain Hugging Face (band: .2 to .8 quantiles)")
    figure.legend(labels.values(), labels.keys(), fontsize="small", loc="outside lower center", ncols=len(shapes) + 1)
    return figure


def _draw_mixes(axes: Any, records: Sequence[Record], label: str, color: str) -> None:
    """Draw one engine: a line through the mixes of each kind to `never exit`, or a point where a kind has one mix."""
    end = [r for r in records if r["exits"] == NEVER]
    kinds: dict[str, list[Record]] = {}
    for record in records:
        if record["exits"] not in (FULL, FAMILY, NEVER):
            kinds.setdefault(record["exits"].split()[0], []).append(record)
    for kind, found in kinds.items():
        points = sorted([*found, *end] if len(found) > 1 else found, key=lambda r: r["mean_exit_layer"])
        name, marker, line = _KINDS.get(kind, (kind, "o", "-"))
        style = {"color": color, "marker": marker, "markersize": 5, "linestyle": line, "linewidth": 1.2}
        xs, ys = ([r[key] for r in points] for key in ("mean_exit_layer", "ratio"))
        axes.plot(xs, ys, label=f"{label}: {name}", **style)
        if len(points) > 1:
            _band(axes, points, "mean_exit_layer", color)


def never_exit(records: Sequence[Record]) -> Any:
    """Draw the time of `never exit` over the plain model's time, for every shape."""
    mine = _ours(r for r in records if r["exits"] == NEVER)
    shapes = sorted({(r["subject"], r["shape"]) for found in mine.values() for r in found}, key=_by_size)
    if not shapes:
        return None
    figure = new_figure(8.0, 1.6 + 0.2 * (len(shapes) + sum(map(len, mine.values()))))
    axes = figure.subplots()
    place, ticks, named = 0.0, [], set()
    for shape in shapes:
        start = place
        for number, (label, found) in enumerate(mine.items()):
            for record in (r for r in found if (r["subject"], r["shape"]) == shape):
                spread = [[record["ratio"] - record["ratio_low"]], [record["ratio_high"] - record["ratio"]]]
                shown = {"label": label} if label not in named else {}
                style = {"color": COLORS[number], "hatch": ("", "//", "..", "xx")[number % 4], "edgecolor": "white"}
                axes.barh(place, record["ratio"], 0.9, xerr=spread, ecolor="0.2", **style, **shown)
                named.add(label)
                place += 1.0
        ticks.append((start + place - 1.0) / 2)
        place += 0.7
    axes.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(ticks, [", ".join(shape) for shape in shapes], fontsize="small")
    axes.set(xlabel="time / plain Hugging Face (lines: .2 to .8 quantiles)", xlim=(0, None), ylim=(place, -1.0))
    axes.grid(alpha=0.3, axis="x")
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    return figure


def _by_size(shape: tuple[str, str]) -> tuple[str, list[int]]:
    """Sort models by name, and their shapes by the numbers in them."""
    return shape[0], [int(number) for number in re.findall(r"\d+", shape[1])]


def batch(records: Sequence[Record]) -> Any:
    """Draw the milliseconds per row against the batch size, in MiniLM's shape."""
    lines: dict[tuple[str, str], dict[int, Record]] = {}
    for record in records:
        of_shape = record["subject"] == "MiniLM" and record["shape"].endswith("S 32") and record["dtype"] == "float32"
        if not of_shape or record["baseline"] not in ("", PLAIN):
            continue
        for mix, names in BATCH_MIXES.items():
            # full depth of the baselines, exits of our engines
            if record["exits"] in names and (record["engine"] in BASELINES) == (mix == FULL):
                lines.setdefault((_label(record), mix), {})[record["rows"]] = record
    # those that were timed at every size
    most = max(map(len, lines.values()), default=0)
    lines = {key: points for key, points in lines.items() if len(points) == most}
    if most < 2:
        return None
    figure = new_figure(8.0, 5.2)
    axes = figure.subplots()
    ours = list(dict.fromkeys(label for label, mix in lines if mix != FULL))
    for (label, mix), points in lines.items():
        color, marker = (COLORS[ours.index(label)], "o") if label in ours else _OTHERS[label]
        half = mix not in (FULL, NEVER)
        style = {"linestyle": "--" if half else "-", "marker": "^" if half else marker, "markersize": 5}
        sizes = sorted(points)
        name = label if mix == FULL else f"{label}, {mix}"
        axes.plot(sizes, [points[n]["median_ms"] / n for n in sizes], color=color, label=name, **style)
    sizes = sorted({rows for points in lines.values() for rows in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="MiniLM's shape, S 32: rows per batch", ylabel="ms per row (log scale)")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    return figure


_DRAW = {"exits": exits, "never_exit": never_exit, "batch": batch}

if __name__ == "__main__":
    for path in write():
        print(f"drew {path}")
