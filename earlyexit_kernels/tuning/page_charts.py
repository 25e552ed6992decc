"""Charts of a report page as SVG to stand in HTML: text as text, colours as CSS variables, no outside reference."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from earlyexit_kernels.tuning.plots import new_figure

#: Colours that matplotlib draws with -> what the page shows, so that dark and light mode have colours of their own.
INK, GRID, BLUE, ORANGE, GREY = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
CSS = {INK: "currentColor", GRID: "var(--grid)", BLUE: "var(--blue)", ORANGE: "var(--orange)", GREY: "var(--grey)"}
#: Line style and marker of each kind of curve; each chart names them beside the curves.
TRUNCATION: dict[str, Any] = {"color": GREY, "linestyle": "--", "marker": "x", "markersize": 5, "linewidth": 1.2}
RANDOM: dict[str, Any] = {"color": ORANGE, "linestyle": ":", "marker": "+", "markersize": 4, "linewidth": 1.4}
CURVE: dict[str, Any] = {"color": BLUE, "linestyle": "-", "marker": "o", "markersize": 2.5, "linewidth": 1.6}
OTHERS: dict[str, Any] = {"color": GREY, "linestyle": "-", "linewidth": 0.9, "alpha": 0.45, "zorder": 1}
ORACLE: dict[str, Any] = {"color": INK, "linestyle": "none", "marker": "*", "markersize": 9}
RING: dict[str, Any] = {"color": INK, "linestyle": "none", "marker": "o", "markersize": 11, "markerfacecolor": "none"}
#: Parts of matplotlib's SVG -> their replacement: no metadata, no styles and fonts beside those of the page, and no ids
#: that every chart has.
_REWRITTEN = {
    r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->": "",
    r"font-family: [^;\"]+;": "",
    r' id="[A-Za-z0-9.]+_\d+"': "",
    r' transform="rotate\(-?0 [^)]*\)"': "",
    r"xlink:href": "href",
}
#: Inches; on a phone the letters are then about as large as drawn.
WIDTH = 4.8
#: Exits up to which a bar bears its share.
MAX_LABELLED = 12


def tradeoff(
    name: str,
    title: str,
    curve: Mapping[str, Any] | None,
    others: Sequence[Mapping[str, Any]],
    numbers: Mapping[str, Any],
    *,
    label: str,
    rings: Sequence[tuple[float, float]],
    size: tuple[float, float] = (WIDTH, 4.2),
) -> str:
    """Draw score against mean layers run.

    Args:
        name: prefix of the ids in the SVG.
        title: what the chart shows, in a sentence.
        curve: an entry of `page_numbers.curves`, drawn with its band and its random exits, or None.
        others: further entries, drawn as thin grey lines.
        numbers: ``depth``, ``metric``, ``layers`` (score of each exit), ``oracle`` or None, ``fewest_layers`` and the
            ends of the ``scores``.
        label: name of the curve in the legend.
        rings: points to mark.
        size: inches.
    """
    with _style():
        figure = new_figure(*size)
        axes = _axes(figure, numbers)
        for other in others:
            axes.plot(*_columns(other["points"], "score"), **OTHERS)
        depth = numbers["depth"]
        axes.plot(range(1, depth + 1), numbers["layers"], label="truncation: all rows leave there", **TRUNCATION)
        if curve is not None:
            _draw_curve(axes, curve, label)
        if numbers["oracle"]:
            oracle = numbers["oracle"]
            axes.plot([oracle["mean_layers_run"]], [oracle["score"]], label="oracle", zorder=5, **ORACLE)
        if rings:
            axes.plot(*zip(*rings, strict=True), label="the setting of this report", zorder=6, **RING)
        if others:
            axes.plot([], [], label="other rules, drawn below", **OTHERS)
        if size[0] == WIDTH:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return _svg(figure, name, title)


def _axes(figure: Any, numbers: Mapping[str, Any]) -> Any:
    axes = figure.add_subplot()
    axes.set_xlabel(f"mean layers run (of {numbers['depth']})")
    axes.set_ylabel(numbers["metric"])
    low, high = numbers["scores"]
    axes.set_xlim(numbers["fewest_layers"] - 0.2, numbers["depth"] + 0.2)
    margin = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    step = -(-numbers["depth"] // 12)
    axes.set_xticks(range(1, numbers["depth"] + 1, step))
    axes.grid(color=GRID, linewidth=0.5)
    return axes


def _draw_curve(axes: Any, curve: Mapping[str, Any], label: str) -> None:
    xs, ys = _columns(curve["points"], "score")
    _, errors = _columns(curve["points"], "standard_error")
    if None not in errors:
        low, high = ([y + sign * e for y, e in zip(ys, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=BLUE, alpha=0.2, linewidth=0, label="± one standard error")
    axes.plot(xs, ys, label=label, **CURVE)
    drawn = [(x, y) for x, y in zip(*_columns(curve["points"], "random_exit"), strict=True) if y is not None]
    if drawn:
        axes.plot(*zip(*drawn, strict=True), label="random exit, same shares", **RANDOM)


def _columns(points: Sequence[Mapping[str, Any]], value: str) -> tuple[list[Any], list[Any]]:
    ordered = sorted(points, key=lambda p: (p["mean_layers_run"], p["score"]))
    return [p["mean_layers_run"] for p in ordered], [p[value] for p in ordered]


def exit_bars(name: str, title: str, groups: Sequence[Mapping[str, Any]]) -> str:
    """Draw the share of rows that leave at each layer, one row of bars for each group of `page_numbers.histograms`."""
    depth = len(groups[0]["shares"])
    top = 1.25 * max(share for group in groups for share in group["shares"])
    with _style():
        figure = new_figure(WIDTH, 0.5 + 1.05 * len(groups))
        figure.get_layout_engine().set(h_pad=0.07)
        panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
        for axes, group in zip(panels, groups, strict=True):
            layers = range(1, depth + 1)
            axes.bar(layers, group["shares"], color=BLUE, alpha=0.75, width=0.8)
            if depth <= MAX_LABELLED:
                for layer, share in ((k, share) for k, share in zip(layers, group["shares"], strict=True) if share):
                    axes.text(layer, share + 0.03 * top, f"{share:.0%}", ha="center", va="bottom", fontsize=9)
            heading = f"{group['name']} ({group['rows']} rows, mean layer {group['mean_exit_layer']:.2f})"
            axes.set_title(_plain(heading), loc="left", fontsize=10)
            axes.set_ylim(0, top)
            axes.set_yticks([])
            axes.spines[["left", "right", "top"]].set_visible(False)
        panels[-1].set_xticks(range(1, depth + 1, -(-depth // 24)))
        panels[-1].set_xlabel("layer at which the row leaves")
        return _svg(figure, name, title)


def _plain(text: str) -> str:
    """Return a text that matplotlib does not read as mathematics, shortened."""
    return (text if len(text) <= 70 else text[:69] + "…").replace("$", r"\$")


def _style() -> Any:
    """Return a context with text as text, ids that depend on the contents alone, and the ink of the page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError("plots require matplotlib: `pip install matplotlib`") from error
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "earlyexit", "font.size": 10, "legend.fontsize": 9}
    style.update(dict.fromkeys(inks, INK))
    return rc_context(style)


def _svg(figure: Any, name: str, title: str) -> str:
    """Return a figure as an SVG element with a title, without metadata, fonts of its own and repeated ids."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts for other scripts
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    found = stream.getvalue()
    box = re.search(r'viewBox="([^"]+)"', found)
    assert box is not None
    body = found[found.index(">", found.index("<svg")) + 1 :]
    for pattern, replacement in _REWRITTEN.items():
        body = re.sub(pattern, replacement, body, flags=re.DOTALL)
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for drawn, shown in CSS.items():
        body = body.replace(drawn, shown)
    head = f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-title">'
    return f'{head}<title id="{name}-title">{html.escape(title)}</title>{body.strip()}'
