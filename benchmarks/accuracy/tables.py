"""Tables of the experiments on real text, from ``benchmarks/results/accuracy``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.runs import RESULTS, SPEED_UPS
from benchmarks.tables import NOT_MEASURED
from earlyexit_kernels.criteria import Dact
from earlyexit_kernels.objectives import OBJECTIVES
from earlyexit_kernels.tuning.report import markdown_table


def load(experiment: str, task: str = "*", *, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the JSON of every run of an experiment, in the order of methods and settings."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob(f"{experiment}-{task}-*.json"))]
    return sorted(found, key=lambda document: _place(document["run"]))


def _place(run: dict[str, Any]) -> tuple[int, str]:
    return list(OBJECTIVES).index(run["method"]), run.get("label", "")


def near(document: dict[str, Any], target: float, **fields: Any) -> dict[str, Any]:
    """Return the record of the setting nearest to a speed-up."""
    wanted = {"kind": "near", "target": target, **fields}
    return next(r for r in document["records"] if wanted.items() <= r.items())


def metric_of(document: dict[str, Any]) -> str:
    """Return the metric that settings are chosen by."""
    return next(iter(document["recipe"]["scores"][0]))


def truncation(document: dict[str, Any], layer: int) -> float:
    """Return the score on the reporting split of the model cut to its first layers, answering as its method does."""
    by_kind = {r["kind"]: r["reporting"] for r in document["records"] if r.get("layer") == layer}
    return by_kind.get("answer_truncation", by_kind["static_truncation"])[metric_of(document)]


def methods(task: str, *, experiment: str = "methods", results: Path = RESULTS) -> str:
    """Each method's own rule: the chosen setting, and the settings near each speed-up beside truncation."""
    documents = load(experiment, task, results=results)
    if not documents:
        return NOT_MEASURED
    table = markdown_table(("method", "rule", *_COLUMNS), [_row(document) for document in documents])
    bounds = [_bound_alone(document) for document in documents if document["run"]["method"] == "dact"]
    return "\n\n".join([table, *([f"DACT by its paper's bound alone: {'; '.join(bounds)}."] if bounds else [])])


def lambda_ablation(*, results: Path = RESULTS) -> str:
    """PALBERT's Lambda layers, by what they read and their depth."""
    documents = load("lambda_ablation", results=results)
    if not documents:
        return NOT_MEASURED
    rows = [(*document["run"]["label"].split(", "), *_row(document)[2:]) for document in documents]
    return markdown_table(("Lambda reads", "hidden layers", *_COLUMNS), rows)


def smartbert(*, results: Path = RESULTS) -> str:
    """Skips, exits, and both: score, layers, and multiply-adds with gates and exits."""
    documents = load("smartbert", results=results)
    if not documents:
        return NOT_MEASURED
    header = ("task", "rule", "score", "mean exit layer", "mean layers run", "multiply-adds", "of these gates, exits")
    rows = []
    for document in documents:
        task, metric = document["run"]["task"], metric_of(document)
        for record in document["records"]:
            if record["kind"] == "majority":
                rows.append((task, "most frequent class", f"{record['share']:.3f}", "", "", "", ""))
            elif record["kind"] in ("fixed", "near"):
                target = f", about {record['target']:g}x" if "target" in record else ""
                rows.append((task, record["rule"] + target, *_measured(record["measured"], metric)))
    return markdown_table(header, rows)


def robustness(*, results: Path = RESULTS) -> str:
    """Accuracy and speed-up of every rule on clean and noisy text."""
    documents = load("robustness", results=results)
    if not documents:
        return NOT_MEASURED
    records = documents[0]["records"]
    rules = list(dict.fromkeys(record["rule"] for record in records))
    rows: dict[str, list[str]] = {}
    for record in records:
        share = f", {record['share']:.0%} of the words" if record["share"] else ""
        speed = "" if record["rule"] == "full depth" else f" ({record['layer_speed_up']:.2f}x)"
        rows.setdefault(record["noise"].replace("_", " ") + share, []).append(f"{record['score']:.3f}{speed}")
    return markdown_table(("text", *rules), [(title, *cells) for title, cells in rows.items()])


def _bound_alone(document: dict[str, Any]) -> str:
    """DACT's own bound without an epsilon: the speed that it was trained for."""
    rule = Dact().to_dict()
    points = (r for r in document["records"] if r["kind"] == "point" and r["criterion"] == rule)
    reporting = next(points)["reporting"]
    score = reporting["scores"][metric_of(document)]
    return f"{document['run']['label']}, {score:.3f} ({reporting['layer_speed_up']:.2f}x)"


#: Columns after the first two: the chosen setting's score and mean layers, and for each speed-up score and layer
#: speed-up, multiply-adds over full depth, random exits of the same mix, and truncation to the nearest whole layer.
_COLUMNS = ["full depth", "chosen (layers)"]
for _target in SPEED_UPS:
    _COLUMNS += [f"about {_target:g}x", "multiply-adds", "random exit", "truncated"]


def _chosen(document: dict[str, Any]) -> str:
    """Score and mean layers run of the setting chosen on held-out train rows, if any lost no score there."""
    metric, depth = metric_of(document), len(document["recipe"]["scores"])
    chosen = [r["reporting"] for r in document["records"] if r["kind"] == "point" and r["chosen"]]
    return f"{chosen[0]['scores'][metric]:.3f} ({chosen[0]['mean_layers_run']:.2f} of {depth})" if chosen else ""


def _row(document: dict[str, Any]) -> Sequence[str]:
    metric, depth = metric_of(document), len(document["recipe"]["scores"])
    cells = [f"{truncation(document, depth):.3f}", _chosen(document)]
    for target in SPEED_UPS:
        record = near(document, target)
        reporting = record["reporting"]
        layer = min(max(round(reporting["mean_layers_run"]), 1), depth)
        random, speed = reporting["random_exit"], reporting["layer_speed_up"]
        cells += [
            f"{reporting['scores'][metric]:.3f} ({'all skipped' if speed is None else f'{speed:.2f}x'})",
            f"{record['measured']['macs_share']:.2f}",
            "" if random is None else f"{random:.3f}",
            f"{truncation(document, layer):.3f} ({layer} of {depth})",
        ]
    method, label = (document["run"][name] for name in ("method", "label"))
    rule = near(document, SPEED_UPS[0])["criterion"]["name"].replace("_", " ")
    return (f"{method}, {label}" if label else method, rule, *cells)


def _measured(measured: dict[str, Any], metric: str) -> Sequence[str]:
    parts = f"{measured['macs_share_gates']:.1%}, {measured['macs_share_exits']:.1%}"
    layers = (f"{measured['mean_exit_layer']:.2f}", f"{measured['mean_layers_run']:.2f}")
    return (f"{measured['scores'][metric]:.3f}", *layers, f"{measured['macs_share']:.1%}", parts)


TABLES: dict[str, Callable[[], str]] = {
    "methods_sst2": functools.partial(methods, "sst2"),
    "methods_trec": functools.partial(methods, "trec"),
    "lambda_ablation": lambda_ablation,
    "smartbert": smartbert,
    "robustness": robustness,
}
