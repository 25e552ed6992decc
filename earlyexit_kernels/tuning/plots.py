"""Plots with colours that colour-blind readers can tell apart, and markers and line styles that differ as well."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

_Points: TypeAlias = Sequence[tuple[float, float]]
#: The palette of Okabe and Ito (2008) without yellow, which is hard to see on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")  # 7 and 11 are coprime: 77 pairs differ
#: Colour, marker and line style of the baselines.
_BASELINES = (("0.25", "x", "--"), ("0.5", "+", ":"))


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
    ring: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "linestyle": "none"}
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
            axes.plot([x], [y], color=color, **ring)
    if chosen:
        axes.plot([], [], color="black", label="chosen on the tuning split", **ring)
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
    found: list[tuple[list[str], _Points]] = []
    for name, points in curves.items():
        for names, others in found:
            if _coincide(points, others):
                names.append(name)
                break
        else:
            found.append(([name], points))
    return found


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
