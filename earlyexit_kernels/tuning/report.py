"""The report page of a model and its numbers: what a criterion does on some rows, and which rows leave where."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from earlyexit_kernels.criteria import FullDepth
from earlyexit_kernels.page_style import COMMON
from earlyexit_kernels.tuning.charts import exit_bars, merged, style, tradeoff
from earlyexit_kernels.tuning.flops import row_macs
from earlyexit_kernels.tuning.metrics import ece, probabilities
from earlyexit_kernels.tuning.record import Calibration
from earlyexit_kernels.tuning.rows import Answers, Rows, exit_shares
from earlyexit_kernels.tuning.sweep import Point, Sweep
from earlyexit_kernels.tuning.tables import device_text, parameter_text

SINGLE_LABEL, REGRESSION = "single_label_classification", "regression"
#: Share of the rows below which hardly any row leaves at an exit.
DEAD_SHARE = 0.005
#: Classes that get a histogram of their own; the others are counted together.
MAX_CLASSES = 8
#: Rows in each of the lists of the first and the last to leave, and characters of a text.
LISTED, SHOWN = 10, 200
#: Metrics of which a hundredth is called a point.
POINTS = {"accuracy", "f1", "macro_f1", "agreement"}
NONE = "\N{EN DASH}"


def summary(rows: Rows, answers: Answers) -> dict[str, Any]:
    """Return score, loss and layers of a criterion."""
    early, full = rows.predictions(answers), rows.full_depth
    mean = float(answers.layers_run.mean())
    return {
        "criterion": answers.criterion.to_dict(),
        "metric": rows.metric,
        "rows": len(rows),
        "depth": rows.trace.depth,
        "score": rows.score(early),
        "full_depth": rows.score(full),
        "drop": rows.score(full) - rows.score(early),
        "drop_interval": list(rows.drop_interval(early)),
        "mean_exit_layer": float(answers.exit_layer.mean()),
        "mean_layers_run": mean,
        "layer_speed_up": rows.trace.depth / mean if mean else None,
    }


def multiply_adds(model: Any, lengths: Sequence[int], answers: Answers) -> dict[str, float]:
    """Return the mean multiply-adds of a row by part, relative to full depth with its one exit."""
    depth = torch.full((len(lengths),), model.depth)
    full = row_macs(model, lengths, depth, criterion=FullDepth()).total.double().mean()
    early = row_macs(
        model,
        lengths,
        torch.from_numpy(answers.exit_layer),
        torch.from_numpy(answers.layers_run),
        criterion=answers.criterion,
    )
    parts = {name: getattr(early, name).double().mean() / full for name in ("encoder", "exits", "gates", "total")}
    return {"full_depth_per_row": float(full), **{name: float(share) for name, share in parts.items()}}


def by_layer(rows: Rows, answers: Answers) -> list[dict[str, Any]]:
    """Return what each exit does alone, and how many rows leave there.

    Each entry has the layer, its score, ``ece`` and ``overthinking`` (the share of rows that are right at this exit and
    wrong at the last; both None where they are not defined), the share of the rows that leave there and the score of
    those, whether the exit is no better than ``chance``, and whether it is ``dead``: not the last, read by the
    rule, and fewer than `DEAD_SHARE` of the rows leave there.
    """
    depth, classes = rows.trace.depth, rows.trace.logits.shape[2]
    classified = rows.problem_type != REGRESSION
    calibrated = rows.problem_type == SINGLE_LABEL and classes > 1
    right, right_of_answers = rows.right_by_layer, rows.right(rows.predictions(answers))
    found = []
    for layer, share in enumerate(exit_shares(answers.exit_layer, depth), start=1):
        leaves = answers.exit_layer == layer
        found.append(
            {
                "layer": layer,
                "score": rows.score(rows.at_layer(layer)),
                "ece": ece(rows.trace.logits[:, layer - 1].numpy(), rows.labels) if calibrated else None,
                "overthinking": float((right[:, layer - 1] & ~right[:, -1]).mean()) if classified else None,
                "leaving": share,
                "right_of_leaving": float(right_of_answers[leaves].mean()) if classified and leaves.any() else None,
                "chance": rows.is_chance(layer),
                "dead": layer < depth and share < DEAD_SHARE and answers.criterion.exit_rule.is_due(layer, depth),
            }
        )
    return found


def chance_level(rows: Rows) -> float | None:
    """Return the accuracy of always answering the most frequent label; None for regression."""
    if rows.problem_type == REGRESSION:
        return None
    return float(np.unique(rows.labels, axis=0, return_counts=True)[1].max() / len(rows))


def oracle(rows: Rows) -> dict[str, float] | None:
    """Return accuracy and mean layer if each row left at its first right exit, or at exit 1 if none is right.

    No rule that takes the answer of one exit is above and to the left of this point. None for regression.
    """
    if rows.problem_type == REGRESSION:
        return None
    table = rows.right_by_layer
    return {"score": float(table.any(axis=1).mean()), "mean_layers_run": float((1 + table.argmax(axis=1)).mean())}


def histograms(rows: Rows, answers: Answers, lengths: Sequence[int], names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the share of rows that leave at each layer, by class (of a number: by terciles) and by length."""
    tokens = np.asarray(lengths)
    if rows.problem_type == REGRESSION:
        labels = _terciles(np.asarray(rows.labels, dtype=np.float64), "{}")
    elif rows.labels.ndim == 2:
        labels = [(name, rows.labels[:, k] == 1) for k, name in enumerate(names)]
    else:
        labels = [(name, rows.labels == k) for k, name in enumerate(names)]
    labels = sorted(labels, key=lambda group: -int(group[1].sum())) if len(labels) > MAX_CLASSES else labels
    if len(labels) > MAX_CLASSES:
        others = np.any([mask for _, mask in labels[MAX_CLASSES:]], axis=0)
        labels = [*labels[:MAX_CLASSES], (f"{len(labels) - MAX_CLASSES} other classes", others)]
    groups = {"all": [("all", tokens > 0)], "class": labels, "length": _terciles(tokens, "{} tokens")}
    return {
        kind: [_histogram(name, answers.exit_layer[mask], rows.trace.depth) for name, mask in found if mask.any()]
        for kind, found in groups.items()
    }


def _terciles(values: NDArray, form: str) -> list[tuple[str, NDArray]]:
    """Return three groups of about equal size; fewer where many values are equal."""
    edges = [-math.inf, *np.quantile(values, (1 / 3, 2 / 3), method="inverted_cdf"), math.inf]
    masks = [(values > low) & (values <= high) for low, high in itertools.pairwise(edges)]
    kept = [values[mask] for mask in masks if mask.any()]
    names = [f"{v.min():g}" if v.min() == v.max() else f"{v.min():g} to {v.max():g}" for v in kept]
    return [(form.format(name), mask) for name, mask in zip(names, [m for m in masks if m.any()], strict=True)]


def _histogram(name: str, exit_layer: NDArray, depth: int) -> dict[str, Any]:
    return {
        "name": name,
        "rows": len(exit_layer),
        "mean_exit_layer": float(exit_layer.mean()),
        "shares": list(exit_shares(exit_layer, depth)),
    }


def first_and_last(
    rows: Rows,
    answers: Answers,
    texts: Sequence[Any] | None,
    numbers: Sequence[int],
    lengths: Sequence[int],
    names: Sequence[str],
) -> dict[str, list[dict[str, Any]]]:
    """Return the `LISTED` rows that leave first and last; of rows that leave together the surest, or least sure, first.

    Args:
        rows: labels and problem type.
        answers: of the criterion.
        texts: N texts, or pairs of texts, shortened here to `SHOWN` characters; None leaves them out.
        numbers: of the rows in their file.
        lengths: tokens of each row.
        names: of the classes.
    """
    predictions = rows.predictions(answers)
    single = rows.problem_type == SINGLE_LABEL and answers.logits.shape[1] > 1
    sure = probabilities(answers.logits).max(axis=1) if single else np.zeros(len(rows))
    correct = rows.right(predictions)

    def row(number: int) -> dict[str, Any]:
        text = None if texts is None else texts[number]
        parts = [] if text is None else [text] if isinstance(text, str) else list(text)
        return {
            "row": int(numbers[number]),
            "exit_layer": int(answers.exit_layer[number]),
            "tokens": int(lengths[number]),
            "texts": [part if len(part) <= SHOWN else part[: SHOWN - 1].rstrip() + "…" for part in parts],
            "label": named(rows.labels[number], rows.problem_type, names),
            "prediction": named(predictions[number], rows.problem_type, names),
            "probability": float(sure[number]) if single else None,
            "right": bool(correct[number]) if rows.problem_type != REGRESSION else None,
        }

    first = np.lexsort((-sure, answers.exit_layer))[:LISTED]
    last = np.lexsort((sure, -answers.exit_layer))[:LISTED]
    return {"first": [row(int(n)) for n in first], "last": [row(int(n)) for n in last]}


def named(label: Any, problem_type: str, names: Sequence[str]) -> str:
    """Return a label in words: the name of the class, the names of all labels that are set, or a number."""
    if problem_type == REGRESSION:
        return f"{float(label):.2f}"
    if np.ndim(label) == 1:
        return ", ".join(name for name, is_set in zip(names, label, strict=True) if is_set) or "none"
    return names[int(label)]


def curves(result: Sweep, rows: Rows) -> list[dict[str, Any]]:
    """Return the curve of each rule on the reporting rows; rules whose curves coincide are one entry.

    Each entry has the names of the rules, the points (layers, score, standard error, the expected score of random exit
    at the same shares), and the chosen setting of each rule, or None where no setting keeps the score.
    """

    def place(point: Point) -> dict[str, Any]:
        found = point.reporting
        return {
            "mean_layers_run": found.mean_layers_run,
            "layer_speed_up": found.layer_speed_up,
            "score": found.scores[result.metric],
            "standard_error": _standard_error(rows, point),
            "random_exit": found.random_exit,
        }

    scored = {
        name: [(p.reporting.mean_layers_run, p.reporting.scores[result.metric]) for p in points]
        for name, points in result.points.items()
    }
    found = []
    for names, _ in merged(scored):
        chosen = {name: result.chosen(name) for name in names}
        found.append(
            {
                "rules": names,
                "points": [place(point) for point in result.points[names[0]]],
                "chosen": {
                    name: point and {"setting": parameter_text(point.criterion), **place(point)}
                    for name, point in chosen.items()
                },
            }
        )
    return found


def _standard_error(rows: Rows, point: Point) -> float | None:
    """Return the standard error of a score; None where a rule skips layers and the metric is not an accuracy."""
    score = point.reporting.scores[rows.metric]
    if rows.metric == "accuracy":
        return math.sqrt(score * (1 - score) / len(rows))
    if point.criterion.skip_from is not None:
        return None
    return rows.score_error(rows.predictions(*rows.replay([point.criterion])))


def page(data: Mapping[str, Any]) -> str:
    """Return the HTML page of the data that `earlyexit eval --report` saves as JSON.

    Raises:
        ImportError: matplotlib is not installed.
    """
    points = [(name, point) for curve in data["curves"] for name, point in curve["chosen"].items()]
    points.sort(key=lambda item: item[1]["mean_layers_run"] if item[1] else data["summary"]["depth"] + 1)
    calibration = None if data["calibration"] is None else Calibration.from_dict(data["calibration"])
    values = {**data, **_images(data), "chosen": points, "device": device_text(data["environment"])}
    values |= {
        "target_miss": calibration and calibration.target_miss,
        "one_layer": calibration and calibration.one_layer,
    }
    return _TEMPLATES.get_template("report.html.j2").render(values, common=COMMON) + "\n"


def _images(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the images of a page, by the names that the template gives them."""
    now, groups = data["summary"], data["histograms"]
    rule = now["criterion"]["name"]
    ours = next((curve for curve in data["curves"] if rule in curve["rules"]), None)
    with style():
        ring = [(now["mean_layers_run"], now["score"])]
        panels = []
        for curve in data["curves"]:
            names = ", ".join(curve["rules"]).replace("_", " ")
            rings = [(p["mean_layers_run"], p["score"]) for p in curve["chosen"].values() if p]
            panels.append({"names": names, **tradeoff(data, curve, label=names, rings=rings, panel=True)})
        return {
            "chart": tradeoff(data, ours, label=rule.replace("_", " "), rings=ring),
            "panels": panels,
            "bars": {
                "Where rows leave": exit_bars("Share of all rows that leave at each layer", groups["all"]),
                "By label": exit_bars("Share of the rows of each label that leave at each layer", groups["class"]),
                "By length": exit_bars("Share of the rows of each length that leave at each layer", groups["length"]),
            },
        }


def fixed(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(share: float | None) -> str:
    """Return a share as a percentage with one decimal; a dash for None."""
    return NONE if share is None else f"{fixed(100 * share, 1)} %"


def loss(value: float, metric: str) -> str:
    """Return a difference of scores in words."""
    size, unit = (100 * abs(value), " points") if metric in POINTS else (abs(value), "")
    shown = fixed(size, 1 if unit else 3)
    return f"loses {shown}{unit}" if value > 0 else f"gains {shown}{unit}" if value < 0 else "loses nothing"


def interval(ends: Sequence[float], metric: str) -> str:
    """Return an interval of losses in words."""
    scale, digits, unit = (100, 1, " points") if metric in POINTS else (1, 3, "")
    low, high = (fixed(scale * end, digits) for end in ends)
    return f"{low} to {high}{unit}"


def _words(name: str) -> str:
    """Return a name with spaces for underscores."""
    return name.replace("_", " ")


_TEMPLATES = Environment(
    loader=PackageLoader("earlyexit_kernels.tuning", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"fixed": fixed, "percent": percent, "loss": loss, "interval": interval, "words": _words}
