"""Charts of score against layers and of exit layers: images of a report page, and a plot of a sweep in a file."""

from __future__ import annotations

import bisect
import io
import math
import os
import warnings
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

_Points: TypeAlias = Sequence[tuple[float, float]]
#: The palette of Okabe and Ito (2008) without yellow, which is hard to see on white, and markers for more curves.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")  # 7 and 11 are coprime: 77 pairs differ
#: Colour, marker and line style of the baselines of `plot_tradeoff`.
_BASELINES = (("0.25", "x", "--"), ("0.5", "+", ":"))
INK, GRID, BLUE, ORANGE, GREY = "#1a1d21", "#d3d8de", "#005f9e", "#b34700", "#5c6670"
#: Line style and marker of each kind of curve on a page; each chart names them.
TRUNCATION: dict[str, Any] = {"color": GREY, "linestyle": "--", "marker": "x", "markersize": 5, "linewidth": 1.2}
RANDOM: dict[str, Any] = {"color": ORANGE, "linestyle": ":", "marker": "+", "markersize": 4, "linewidth": 1.4}
CURVE: dict[str, Any] = {"color": BLUE, "linestyle": "-", "marker": "o", "markersize": 2.5, "linewidth": 1.6}
OTHERS: dict[str, Any] = {"color": GREY, "linestyle": "-", "linewidth": 0.9, "alpha": 0.45, "zorder": 1}
ORACLE: dict[str, Any] = {"color": INK, "linestyle": "none", "marker": "*", "markersize": 9, "zorder": 5}
RING: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 11, "markerfacecolor": "none", "zorder": 6}
#: Fonts are those of the reader, "$5" is no formula, and ids depend on the contents alone.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "earlyexit",
    "text.parse_math": False,
    "font.size": 10,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
#: Inches; on a phone the letters are then about as large as drawn. Panels are so small that they have no legend.
WIDTH, PANEL = 4.8, (3.4, 2.5)
#: Exits up to which a bar bears its share, and characters of a group's name.
MAX_LABELLED, MAX_NAME = 12, 50


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of some inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots require matplotlib: `pip install matplotlib`") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style() -> Any:
    """Return a context in which the images of a page are drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError("plots require matplotlib: `pip install matplotlib`") from error
    return rc_context(STYLE)


def image(figure: Any, alt: str) -> dict[str, str]:
    """Return ``src`` and ``alt`` of a figure as an SVG image in a page."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader has fonts for other scripts
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return {"src": f"data:image/svg+xml;base64,{b64encode(stream.getvalue().encode()).decode()}", "alt": alt}


def tradeoff(
    data: Mapping[str, Any], curve: Mapping[str, Any] | None, *, label: str, rings: _Points, panel: bool = False
) -> dict[str, str]:
    """Draw score against mean layers run.

    Args:
        data: of the page.
        curve: one of its curves, drawn with its band and its random exits, or None.
        label: name of the curve.
        rings: points to mark.
        panel: draw it small, without the other curves and the legend.
    """
    now, metric = data["summary"], data["summary"]["metric"].replace("_", " ")
    figure = new_figure(*PANEL if panel else (WIDTH, 4.2))
    axes = figure.add_subplot()
    others = [] if panel else [other for other in data["curves"] if other is not curve]
    for other in others:
        axes.plot(*_sorted(other["points"], "score"), **OTHERS)
    scores = [entry["score"] for entry in data["layers"]]
    axes.plot(range(1, now["depth"] + 1), scores, label="truncation: all rows leave there", **TRUNCATION)
    if curve is not None:
        _draw_curve(axes, curve, label)
    oracle = data["oracle"] if now["metric"] == "accuracy" else None
    if oracle:
        axes.plot([oracle["mean_layers_run"]], [oracle["score"]], label="oracle", **ORACLE)
    if rings:
        axes.plot(*zip(*rings, strict=True), label="the setting of this report", color=INK, **RING)
    if others:
        axes.plot([], [], label="other rules, drawn below", **OTHERS)
    _set_axes(axes, data, oracle)
    if not panel:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    beside = "" if panel else ", beside the baselines"
    marks = "; ".join(f"{score:.3f} at {layers:.2f} layers" for layers, score in rings)
    return image(figure, f"{metric} against mean layers run of {label}{beside}{marks and ': ' + marks}")


def _draw_curve(axes: Any, curve: Mapping[str, Any], label: str) -> None:
    xs, ys = _sorted(curve["points"], "score")
    _, errors = _sorted(curve["points"], "standard_error")
    if None not in errors:
        low, high = ([y + sign * e for y, e in zip(ys, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=BLUE, alpha=0.2, linewidth=0, label="± one standard error")
    axes.plot(xs, ys, label=label, **CURVE)
    drawn = [(x, y) for x, y in zip(*_sorted(curve["points"], "random_exit"), strict=True) if y is not None]
    if drawn:
        axes.plot(*zip(*drawn, strict=True), label="random exit, same shares", **RANDOM)


def _set_axes(axes: Any, data: Mapping[str, Any], oracle: Mapping[str, float] | None) -> None:
    """Give every chart of a page the same axes."""
    now = data["summary"]
    points = [point for curve in data["curves"] for point in curve["points"]]
    scores = [p["score"] + sign * (p["standard_error"] or 0) for p in points for sign in (-1, 1)]
    scores += [now["score"], *(entry["score"] for entry in data["layers"]), *([oracle["score"]] if oracle else ())]
    margin = 0.05 * (max(scores) - min(scores)) or 0.01
    fewest = min([1.0, now["mean_layers_run"], *(point["mean_layers_run"] for point in points)])
    axes.set(xlabel=f"mean layers run (of {now['depth']})", ylabel=now["metric"].replace("_", " "))
    axes.set_xlim(fewest - 0.2, now["depth"] + 0.2)
    axes.set_ylim(min(scores) - margin, max(scores) + margin)
    axes.set_xticks(range(1, now["depth"] + 1, -(-now["depth"] // 12)))
    axes.grid(color=GRID, linewidth=0.5)


def _sorted(points: Sequence[Mapping[str, Any]], value: str) -> tuple[list[Any], list[Any]]:
    ordered = sorted(points, key=lambda p: (p["mean_layers_run"], p["score"]))
    return [p["mean_layers_run"] for p in ordered], [p[value] for p in ordered]


def exit_bars(title: str, groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Draw the share of rows that leave at each layer, one row of bars for each group of `report.histograms`."""
    depth = len(groups[0]["shares"])
    top = 1.25 * max(share for group in groups for share in group["shares"])
    figure = new_figure(WIDTH, 0.5 + 1.05 * len(groups))
    figure.get_layout_engine().set(h_pad=0.07)
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    spoken = []
    for axes, group in zip(panels, groups, strict=True):
        layers, shares = range(1, depth + 1), group["shares"]
        axes.bar(layers, shares, color=BLUE, alpha=0.75, width=0.8)
        if depth <= MAX_LABELLED:
            for layer, share in ((k, share) for k, share in zip(layers, shares, strict=True) if share):
                axes.text(layer, share + 0.03 * top, f"{share:.0%}", ha="center", va="bottom", fontsize=9)
        name = group["name"] if len(group["name"]) <= MAX_NAME else group["name"][: MAX_NAME - 1] + "…"
        heading = f"{name} ({group['rows']} rows, mean layer {group['mean_exit_layer']:.2f})"
        spoken.append(f"{heading}: {', '.join(f'{share:.0%}' for share in shares)}")
        axes.set_title(heading, loc="left", fontsize=10)
        axes.set_ylim(0, top)
        axes.set_yticks([])
        axes.spines[["left", "right", "top"]].set_visible(False)
    panels[-1].set_xticks(range(1, depth + 1, -(-depth // 24)))
    panels[-1].set_xlabel("layer at which the row leaves")
    return image(figure, f"{title}. {'; '.join(spoken)}")


def add_speed_up_axis(axes: Any, depth: int) -> None:
    """Add an axis on top with the layer speed-up, depth over layers run, to a plot against layers run."""
    top = axes.secondary_xaxis("top")
    ticks = [speed for speed in (1, 1.2, 1.5, 2, 3, 4, 6, 12) if speed <= depth]
    top.set_xticks([depth / speed for speed in ticks], [f"{speed:g}x" for speed in ticks])
    top.set_xlabel("layer speed-up")


def plot_tradeoff(
    path: str | os.PathLike[str],
    curves: Mapping[str, _Points],
    *,
    baselines: Mapping[str, _Points],
    chosen: Mapping[str, tuple[float, float]],
    depth: int,
    metric: str,
    title: str,
    rows: int | None = None,
) -> Path:
    """Draw score against the mean number of layers run.

    Args:
        path: PNG file; missing folders are created.
        curves: criterion -> points (mean layers run, score).
        baselines: name -> points, drawn grey and dashed.
        chosen: criterion -> its chosen point, drawn as a ring.
        depth: number of layers L.
        metric: name of the score.
        title: title of the plot.
        rows: number of rows scored. For an accuracy, each curve gets a band of one standard error,
            ``sqrt(p (1 - p) / rows)``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(9.0, 5.2)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(baselines.items()):
        color, marker, line = _BASELINES[number % len(_BASELINES)]
        axes.plot(*_columns(points), color=color, linestyle=line, marker=marker, label=name)
    rows = rows if metric == "accuracy" else None
    for number, (names, points) in enumerate(merged(curves)):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        xs, ys = _columns(points)
        axes.plot(xs, ys, color=color, marker=marker, markersize=4, label=" =\n".join(names))
        if rows is not None:
            errors = [math.sqrt(y * (1 - y) / rows) for y in ys]
            low, high = ([y + sign * e for y, e in zip(ys, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0)
        for x, y in {chosen[name] for name in names if name in chosen}:
            axes.plot([x], [y], color=color, **RING)
    if chosen:
        axes.plot([], [], color="black", label="chosen on the tuning split", **RING)
    if rows is not None:
        axes.fill_between([], [], [], color="0.5", alpha=0.25, linewidth=0, label="one standard error")
    axes.set(xlabel=f"mean layers run (of {depth})", ylabel=metric, title=title)
    axes.set_xlim(right=depth + 0.2)
    axes.set_xticks(range(1, depth + 1))
    axes.grid(alpha=0.3)
    add_speed_up_axis(axes, depth)
    figure.legend(loc="outside right upper", fontsize="small")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _columns(points: _Points) -> tuple[list[float], list[float]]:
    ordered = sorted(points)
    return [x for x, _ in ordered], [y for _, y in ordered]


def merged(curves: Mapping[str, _Points]) -> list[tuple[list[str], _Points]]:
    """Merge curves that coincide; with two classes all confidence rules are equivalent."""
    groups: list[tuple[list[str], _Points]] = []
    for name, points in curves.items():
        same = next((names for names, others in groups if _coincide(points, others)), None)
        if same is None:
            groups.append(([name], points))
        else:
            same.append(name)
    return groups


def _coincide(first: _Points, second: _Points, *, tolerance: float = 0.005) -> bool:
    """Return whether two curves span the same costs and differ by at most `tolerance` times the range of scores."""
    (x1, y1), (x2, y2) = _columns(first), _columns(second)
    if max(abs(x1[0] - x2[0]), abs(x1[-1] - x2[-1])) > 0.05:
        return False
    gaps = [abs(_height(x1, y1, x) - _height(x2, y2, x)) for x in {*x1, *x2}]
    return max(gaps) <= tolerance * (max(*y1, *y2) - min(*y1, *y2))


def _height(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Interpolate linearly; beyond the ends, return the end values."""
    right = bisect.bisect_left(xs, x)
    if right in (0, len(xs)):
        return ys[min(right, len(xs) - 1)]
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])
