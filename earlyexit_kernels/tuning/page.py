"""Write a report page about an early-exit model as HTML: every number comes from the data that is saved as JSON."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from earlyexit_kernels.page_style import PAGE
from earlyexit_kernels.tuning.page_charts import exit_bars, tradeoff
from earlyexit_kernels.tuning.page_format import NONE, fixed, interval, loss, percent, table, words
from earlyexit_kernels.tuning.page_style import STYLE
from earlyexit_kernels.tuning.tables import device_text

#: Where the criterion of a report comes from -> how the page says so.
SOURCES = {
    "model": "This is the criterion that is saved with the model.",
    "fastest": "No criterion is saved with the model, so that it runs all layers. The report describes the fastest "
    "setting of all rules that loses at most {drop} on the tuning rows; <code>earlyexit calibrate</code> saves a "
    "setting with the model.",
    "full_depth": "No criterion is saved with the model, and no setting of any rule loses at most {drop} on the "
    "tuning rows. The report describes full depth.",
}
#: Name of a calibration's target -> the target in words.
TARGETS = {
    "max_drop": "the fastest setting that loses at most {drop:g}",
    "speed_up": "the best score with at least {speed_up:g} times fewer layers",
    "latency": "the best score within {ms:g} ms for a batch of {batch_size}",
    "risk": "risk against {against} at most {delta:g}, with probability 1 - {epsilon:g}",
}


def page(data: Mapping[str, Any]) -> str:
    """Return the HTML page of the data that `earlyexit report` saves as JSON.

    Raises:
        ImportError: matplotlib is not installed.
    """
    parts = (_headline, _warnings, _calibration, _tradeoff, _rules, _histograms, _layers, _multiply_adds, _rows, _about)
    title = html.escape(f"Early-exit report: {data['model']['name']}")
    body = "\n".join(part for make in parts if (part := make(data)))
    return PAGE.substitute(title=title, style=STYLE, body=f"<h1>{title}</h1>\n{body}")


def _headline(data: Mapping[str, Any]) -> str:
    model, now, macs = data["model"], data["summary"], data["multiply_adds"]
    about = (
        f"{words(model['family'])}, {model['depth']} layers of width {model['width']}, trained with the method "
        f"{words(model['method'])} on {model['train_rows']} rows of {words(model['task'])}. Settings are chosen on "
        f"{model['tuning_rows']} {words(model['tuning'])} (the tuning rows); all other numbers are of "
        f"{words(model['reporting'])} ({now['rows']} rows)."
    )
    metric, setting = words(now["metric"]), words(", ".join(filter(None, (now["criterion"]["name"], now["setting"]))))
    lead = (
        f"With <strong>{setting}</strong>, the model runs {fixed(now['mean_layers_run'], 2)} of {now['depth']} layers "
        f"on average. Against full depth it {loss(now['drop'], now['metric'])} of {metric}; the 95 % interval of the "
        f"loss is {interval(now['drop_interval'], now['metric'])}. It takes {percent(macs['total'])} of the "
        "multiply-adds of full depth, exits included."
    )
    speed = NONE if now["layer_speed_up"] is None else f"{fixed(now['layer_speed_up'], 2)} times fewer"
    tiles = (
        (metric, fixed(now["score"]), f"full depth {fixed(now['full_depth'])}"),
        ("layers run", fixed(now["mean_layers_run"], 2), f"of {now['depth']}: {speed}"),
        ("multiply-adds", percent(macs["total"]), "of full depth"),
    )
    shown = "".join(f"<div><dt>{name}</dt><dd>{value} <small>{note}</small></dd></div>" for name, value, note in tiles)
    source = SOURCES[now["source"]].format(drop=f"{data['drop']:g}")
    return f'<p class="about">{about}</p>\n<p class="lead">{lead}</p>\n<dl class="tiles">{shown}</dl>\n<p>{source}</p>'


def _warnings(data: Mapping[str, Any]) -> str:
    now, found = data["summary"], []
    chance, dead = (
        ", ".join(str(entry["layer"]) for entry in data["layers"] if entry[name]) for name in ("chance", "dead")
    )
    if chance:
        level = data["chance_level"]
        than = "0, the correlation of a guess," if level is None else f"{fixed(level)}, the share of the largest class,"
        found.append(
            f"Exits at chance: {chance}. Their score is not above {than} by two standard errors. Rows that leave "
            "there are answered by chance: train longer, on more rows, or with exits that read the mean of the tokens."
        )
    if dead:
        share = percent(data["dead_share"])
        found.append(
            f"Dead exits: {dead}. Less than {share} of the rows leave there; the others compute them in "
            "vain. A more lenient setting, or longer training of these exits, lets more rows leave there."
        )
    random = now["random_exit"]
    early = now["mean_exit_layer"] < now["depth"]
    if early and random is not None and now["score"] - random <= now["standard_error"]:
        than = f"one standard error ({fixed(now['standard_error'])}) above"
        than = "below" if now["score"] < random else f"less than {than}"
        found.append(
            f"The criterion hardly finds the rows that are easy: its score, {fixed(now['score'])}, is {than} that of "
            f"random exit, {fixed(random)} (see below)."
        )
    items = "".join(f"<li>{text}</li>" for text in found)
    return f'<ul class="warnings">{items}</ul>' if found else ""


def _calibration(data: Mapping[str, Any]) -> str:
    found = data["calibration"]
    if found is None:
        return ""
    metric = found["metric"]
    rows = [
        ("target", TARGETS[found["target"]["name"]].format(**found["target"])),
        ("chosen on", f"{found['rows']['tuning']} rows"),
        ("checked on", f"{found['rows']['check']} other rows, on which:"),
        (words(metric), f"{fixed(found['score'])}, full depth {fixed(found['full_depth'])}"),
        ("against full depth", f"{loss(found['drop'], metric)}"),
        ("95 % interval of the loss", interval(found["drop_interval"], metric)),
        ("mean exit layer", f"{fixed(found['mean_exit_layer'], 2)} of {len(found['exit_shares'])}"),
    ]
    bound = found["guarantee"]
    if bound is not None:
        text = f"risk at most {bound['delta']:g} with probability 1 - {bound['epsilon']:g}, measured "
        rows.append(("guarantee", f"{text}{fixed(bound['risk'], 4)} (p = {fixed(bound['p_value'], 4)})"))
    if found["temperatures"] is not None:
        rows.append(("logits divided by", ", ".join(fixed(value) for value in found["temperatures"])))
    if found["latency"] is not None:
        full = found.get("full_depth_latency")
        beside = "" if full is None else f", full depth {fixed(full, 2)} ms"
        rows.append(("latency", f"{fixed(found['latency'], 2)} ms for a batch{beside}"))
    rows.append(("date", html.escape(found["date"][:10])))
    caption = "How the saved criterion was chosen, and what it did on rows that it was not chosen on."
    shown = table("calibration", ("item", "value"), rows, caption=caption, classes={"value": "text"})
    return f"<h2>Calibration</h2>\n{shown}"


def _chart_numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every chart of score against layers shows, and the ends of its axes."""
    now, layers = data["summary"], [entry["score"] for entry in data["layers"]]
    oracle = data["oracle"] if now["metric"] == "accuracy" else None
    points = [point for curve in data["curves"] for point in curve["points"]]
    bands = [p["score"] + sign * (p["standard_error"] or 0) for p in points for sign in (-1, 1)]
    scores = [*layers, now["score"], *bands, *([oracle["score"]] if oracle else ())]
    return {
        "depth": now["depth"],
        "metric": now["metric"].replace("_", " "),
        "layers": layers,
        "oracle": oracle,
        "fewest_layers": min([1.0, now["mean_layers_run"], *(point["mean_layers_run"] for point in points)]),
        "scores": (min(scores), max(scores)),
    }


def _tradeoff(data: Mapping[str, Any]) -> str:
    now, numbers = data["summary"], _chart_numbers(data)
    rule = now["criterion"]["name"]
    ours = next((curve for curve in data["curves"] if rule in curve["rules"]), None)
    others = [curve for curve in data["curves"] if curve is not ours]
    name = rule.replace("_", " ")
    title = f"{numbers['metric']} against mean layers run, for {name} and the baselines"
    ring = [(now["mean_layers_run"], now["score"])]
    chart = tradeoff("tradeoff", title, ours, others, numbers, label=name, rings=ring)
    notes = (
        "Each point is one setting; further to the left is faster, further up is better. <em>Truncation</em> answers "
        "every row at one layer. <em>Random exit</em> lets as many rows leave at each layer as the rule does, but "
        "draws them at random: a rule that is not above it does not find the easy rows. "
    )
    if numbers["oracle"]:
        best = numbers["oracle"]
        notes += (
            f"The <em>oracle</em> ({fixed(best['score'])} at {fixed(best['mean_layers_run'], 2)} layers) knows the "
            "labels and lets each row leave at its first right exit; no rule gets beyond it. "
        )
    return f"<h2>Score against layers run</h2>\n<p>{notes}</p>\n<figure>{chart}</figure>"


def _rules(data: Mapping[str, Any]) -> str:
    numbers, panels, rows = _chart_numbers(data), [], []
    for number, curve in enumerate(data["curves"]):
        names = words(", ".join(curve["rules"]))
        title = f"{numbers['metric']} against mean layers run: {', '.join(curve['rules'])}".replace("_", " ")
        rings = [(p["mean_layers_run"], p["score"]) for p in curve["chosen"].values() if p]
        svg = tradeoff(f"rule{number}", title, curve, [], numbers, label=names, rings=rings, size=(3.4, 2.5))
        panels.append(f"<figure><figcaption>{names}</figcaption>{svg}</figure>")
        rows += [(name, point) for name, point in curve["chosen"].items()]
    cells = [
        (words(name), "no setting loses so little", *[NONE] * 5)
        if point is None
        else (
            words(name),
            words(point["setting"]),
            fixed(point["score"]),
            fixed(point["standard_error"]),
            fixed(point["mean_layers_run"], 2),
            fixed(point["layer_speed_up"], 2),
            fixed(point["random_exit"]),
        )
        for name, point in sorted(rows, key=lambda row: row[1]["mean_layers_run"] if row[1] else numbers["depth"] + 1)
    ]
    metric = numbers["metric"]
    header = ("rule", "chosen setting", metric, "standard error", "layers run", "fewer layers, x", "random exit")
    caption = (
        f"The fastest setting of each rule that loses at most {data['drop']:g} on the tuning rows, chosen without the "
        "margin for chance of <code>earlyexit calibrate</code>, with which a rule may get a slower setting."
    )
    chosen = table("rules", header, cells, caption=caption, classes={"chosen setting": "setting"})
    note = (
        "The lines and marks are those of the chart above, rings are the chosen settings. Rules that give the same "
        "curve share a chart."
    )
    return f'<h2>Every rule</h2>\n{chosen}\n<p>{note}</p>\n<div class="panels">{"".join(panels)}</div>'


def _histograms(data: Mapping[str, Any]) -> str:
    groups = data["histograms"]
    charts = [
        ("Where rows leave", "all", "share of all rows that leave at each layer"),
        ("By label", "class", "share of the rows of each label that leave at each layer"),
        ("By length", "length", "share of the rows that leave at each layer, in three groups by number of tokens"),
    ]
    parts = [
        f"<h{2 if kind == 'all' else 3}>{heading}</h{2 if kind == 'all' else 3}>\n"
        f"<figure>{exit_bars(f'exits-{kind}', title, groups[kind])}</figure>"
        for heading, kind, title in charts
    ]
    return "\n".join(parts)


def _layers(data: Mapping[str, Any]) -> str:
    rows = []
    for entry in data["layers"]:
        notes = [note for name, note in (("chance", "at chance"), ("dead", "dead")) if entry[name]]
        leaving = (percent(entry["leaving"]), percent(entry["right_of_leaving"]))
        alone = (fixed(entry["score"]), fixed(entry["ece"]), percent(entry["overthinking"]))
        rows.append((str(entry["layer"]), *alone, *leaving, ", ".join(notes)))
    metric = data["summary"]["metric"].replace("_", " ")
    header = ("layer", metric, "ECE", "right here, wrong at the last", "leave here", "of these right", "note")
    caption = "Each exit alone on all rows, and the rows that leave there."
    note = (
        "<em>ECE</em> is the expected calibration error, the mean distance of confidence from accuracy. Rows that are "
        "<em>right here and wrong at the last</em> exit are lost by running on (overthinking)."
    )
    shown = table("layers", header, rows, caption=caption, classes={"note": "text"})
    return f"<h2>Exits by layer</h2>\n<p>{note}</p>\n{shown}"


def _multiply_adds(data: Mapping[str, Any]) -> str:
    macs = data["multiply_adds"]
    labels = {"encoder": "encoder layers", "exits": "exits", "gates": "gates", "total": "together"}
    rows = [
        (label, f"{fixed(100 * macs[name], 2)} %") for name, label in labels.items() if name != "gates" or macs[name]
    ]
    millions = fixed(macs["full_depth_per_row"] / 1e6, 1)
    caption = f"Mean of a row, relative to full depth with its last exit alone ({millions} million multiply-adds)."
    note = (
        "Counted, not measured: time also depends on the batch and on the machine; "
        "<code>earlyexit calibrate --latency-ms</code> measures it."
    )
    found = table("multiply-adds", ("part", "share"), rows, caption=caption, classes={})
    return f"<h2>Multiply-adds</h2>\n{found}\n<p>{note}</p>"


def _rows(data: Mapping[str, Any]) -> str:
    captions = {
        "first": "The first to leave; of rows that leave together, those with the highest probability. Rows are "
        "numbered from 0 in the order of the data.",
        "last": "The last to leave; of rows that leave together, those with the lowest probability.",
    }
    shows = data["rows"]["texts"]
    header = ("row", "layer", *(("text",) if shows else ()), "label", "answer", "probability", "tokens")
    classes = {"text": "long", "label": "text", "answer": "text"}
    tables = []
    for which, caption in captions.items():
        cells = [
            (
                str(row["row"]),
                str(row["exit_layer"]),
                *(("<br>".join(html.escape(text) for text in row["texts"]),) if shows else ()),
                html.escape(row["label"]),
                html.escape(row["prediction"]) + (" <strong>(wrong)</strong>" if row["right"] is False else ""),
                fixed(row["probability"]),
                str(row["tokens"]),
            )
            for row in data["rows"][which]
        ]
        tables.append(table(f"rows-{which}", header, cells, caption=caption, classes=classes))
    return "<h2>First and last rows</h2>\n" + "\n".join(tables)


def _about(data: Mapping[str, Any]) -> str:
    facts = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    made = f"Made by earlyexit report at {facts['time']} on {device_text(facts)}; {versions}."
    return f'<h2>About this page</h2>\n<p class="about">{html.escape(made)} All numbers are in the JSON file.</p>'
