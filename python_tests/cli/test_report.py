"""The page of `earlyexit eval --report`, the JSON file beside it, and what is printed."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import error_of
from support.html_pages import BROWSER, Page, overflow

from earlyexit_cli import build_parser, main
from earlyexit_kernels import Calibration, MaxDrop, calibrate, predict_with_exits
from earlyexit_kernels.cli import demo
from earlyexit_kernels.cli.eval import evaluation_splits, trace_splits
from earlyexit_kernels.cli.saved import load_saved
from earlyexit_kernels.criteria import Entropy, FullDepth, Margin, SkipGate
from earlyexit_kernels.data import toy
from earlyexit_kernels.data.table import write_table
from earlyexit_kernels.tuning import report
from earlyexit_kernels.tuning.flops import row_macs
from earlyexit_kernels.tuning.sweep import Sweep
from earlyexit_kernels.tuning.traces import collect_trace

pytest.importorskip("matplotlib")
HOSTILE = '<script>alert("x")</script> & <b>bold</b>'


def trained(folder: Path, *more: str) -> Path:
    """Return the folder of a model of three layers, trained on 96 rows, with 180 that it has not seen."""
    toy.toy_model(0, layers=3, hidden=16).save_pretrained(folder / "base")
    toy.toy_tokenizer().save_pretrained(folder / "base")
    for name, split in toy.write_splits(train_rows=96, dev_rows=180, test_rows=0).items():
        if split:
            # twice, since a tokenizer that knows less than half of the tokens is refused
            texts = [f"{HOSTILE} {row.text} {row.text}" if name == "dev" else row.text for row in split]
            labels = [toy.LABEL_NAMES[row.label] for row in split]
            write_table(folder / f"{name}.csv", {"text": texts, "label": labels})
    rows = ["--data", str(folder / "train.csv"), "--dev", str(folder / "dev.csv")]
    command = ["train", str(folder / "base"), *rows, "--output", str(folder / "my model")]
    assert main([*command, "--lr", "1e-3", "--epochs", "1", *more]) == 0
    return folder / "my model"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folder of a trained model without a criterion."""
    return trained(tmp_path_factory.mktemp("plain"))


def traced(folder: Path):
    saved = load_saved(folder)
    splits, kinds = evaluation_splits(build_parser().parse_args(["eval", str(folder)]), saved)
    return trace_splits(saved, splits, kinds)


@pytest.fixture(scope="module")
def calibrated(plain, tmp_path_factory):
    """Folder of the same model with a calibration."""
    folder = tmp_path_factory.mktemp("calibrated") / "my model"
    shutil.copytree(plain, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a model this small learns little
        found = traced(folder)
        model = found.saved.model
        batching = {"collate_fn": found.saved.collate, "target": MaxDrop(0.5)}
        first = calibrate(model, found.data["tuning"], temperature=True, **batching)
        rule = Margin(threshold=middle_margins(found))
        second = calibrate(model, found.data["tuning"], criterion=[rule], **batching)
    replace(second, temperatures=first.temperatures).apply(model)
    model.save_pretrained(folder)
    return folder


def middle_margins(found) -> tuple[float, ...]:
    """Thresholds with which about half of the rows leave at each exit of a model, however little it has learnt."""
    trace, _ = collect_trace(found.saved.model, found.data["reporting"], collate_fn=found.saved.collate)
    ordered = trace.logits.double().softmax(dim=-1).sort(dim=-1).values
    margins, middle = (ordered[..., -1] - ordered[..., -2]).sort(dim=0).values[:, :-1], len(ordered) // 2
    # between two rows: one at the threshold would leave or stay by rounding
    return tuple(((margins[middle - 1] + margins[middle]) / 2).tolist())


def reported(folder: Path, *arguments: str) -> tuple[str, dict]:
    """Run the command and return the page and the data."""
    target = folder.parent / "pages" / "page.html"
    assert main(["eval", str(folder), "--report", str(target), *arguments]) == 0
    assert sorted(path.name for path in target.parent.iterdir()) == ["page.html", "page.json"]
    return target.read_text(encoding="utf-8"), json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(calibrated):
    return reported(calibrated)


def numbers_in(value) -> list[float]:
    if isinstance(value, dict):
        return numbers_in(list(value.values()))
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    if isinstance(value, str):
        return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", value)]
    return [] if value is None else [float(value)]


def is_rounded(shown: str, known: np.ndarray) -> bool:
    """Whether a number of the page is one of the data, as it is, in per cent or in millions."""
    digits = len(shown.partition(".")[2])
    values = np.concatenate([known, 100 * known, known / 1e6])
    return bool((np.abs(np.abs(values) - float(shown)) <= 0.500001 * 10**-digits).any())


def test_page_names_the_train_file_as_it_is(page):
    _, data = page
    assert "rows of my_train_rows.csv." in report.page(
        {**data, "model": {**data["model"], "task": "my_train_rows.csv"}}
    )


def test_page_is_well_formed_and_loads_nothing(page):
    source, _ = page
    found = Page(source)
    assert not found.problems and not found.loaded
    tags = {tag for tag, _ in found.elements}
    assert {"h1", "h2", "table", "img", "title", "figcaption"} <= tags and not tags & {"script", "iframe"}
    images = [values for tag, values in found.elements if tag == "img"]
    assert all(len(values["alt"]) > 20 and values["src"].startswith("data:image/svg+xml;base64,") for values in images)
    assert len({values["src"] for values in images}) == len(images) >= 5
    written = re.sub(r'src="data:[^"]*"', "", source)
    assert "http" not in written and "@import" not in written
    assert all(values.get("scope") in ("col", "row") for tag, values in found.elements if tag == "th")
    named = [values["aria-labelledby"] for tag, values in found.elements if tag == "table"]
    assert set(named) <= {values.get("id") for _, values in found.elements} and len(set(named)) == len(named)


def test_texts_are_shown_as_texts(page):
    source, data = page
    listed = [text for row in data["rows"]["first"] for text in row["texts"]]
    assert len(listed) == 10 and all(HOSTILE in text for text in listed)
    cells = [text for tags, text in Page(source).texts if tags[-1] == "td"]
    assert set(listed) <= set(cells)


def test_every_number_of_the_page_is_in_the_data(page):
    """The numbers of sentences, tables and descriptions of charts; the texts of rows are left out."""
    source, data = page
    known = np.array([*numbers_in(data), *range(4), 95, 1.0])
    found, shown = Page(source), []
    for tags, text in found.texts:
        ours = tags[-1] in ("dd", "small", "td", "p", "li", "strong", "em", "figcaption")
        if ours and HOSTILE not in text:
            shown += re.findall(r"\d+(?:\.\d+)?", text)
    for alt in (values["alt"] for tag, values in found.elements if tag == "img"):
        shown += re.findall(r"\d+(?:\.\d+)?", alt)
    assert len(shown) > 150
    assert not [number for number in shown if not is_rounded(number, known)]


def test_numbers_are_those_of_the_model(page, calibrated):
    _, data = page
    found = traced(calibrated)
    rows, model = found.data["reporting"], found.saved.model
    out = predict_with_exits(model, rows, collate_fn=found.saved.collate)
    right = out.logits.argmax(axis=1) == out.labels
    now = data["summary"]
    assert now["source"] == "model" and now["criterion"] == model.criterion.to_dict()
    assert now["score"] == pytest.approx(right.mean()) and now["rows"] == 90
    trace, labels = found.traces["reporting"]
    assert now["full_depth"] == pytest.approx((trace.logits[:, -1].argmax(-1).numpy() == labels).mean())
    assert now["mean_exit_layer"] == pytest.approx(out.exit_layer.mean()) and 1 < out.exit_layer.mean() < 3
    leaving = [float((out.exit_layer == layer).mean()) for layer in (1, 2, 3)]
    assert [entry["leaving"] for entry in data["layers"]] == pytest.approx(leaving)
    assert data["histograms"]["all"][0]["shares"] == pytest.approx(leaving)
    calibration = Calibration.of(model).to_dict()
    assert data["calibration"] == json.loads(json.dumps(calibration)) and calibration["temperatures"]
    lengths = [len(rows[row]["input_ids"]) for row in range(len(rows))]
    early = row_macs(model, lengths, torch.from_numpy(out.exit_layer)).total.sum()
    full = row_macs(model, lengths, [3] * 90, criterion=FullDepth()).total.sum()
    assert data["multiply_adds"]["total"] == pytest.approx(float(early / full))
    parts = sum(data["multiply_adds"][part] for part in ("encoder", "exits", "gates"))
    assert parts == pytest.approx(data["multiply_adds"]["total"])


def test_what_the_check_rows_contradict_is_said(page):
    source, data = page
    assert "target missed" not in source and "check row leaves" not in source
    bound = {"delta": 0.02, "epsilon": 0.05, "against": "labels", "risk": 0.0123, "p_value": 0.0456}
    found = {**data["calibration"], "drop": 0.75, "exit_shares": [1.0, 0.0, 0.0], "latency": 3.25, "guarantee": bound}
    changed = report.page({**data, "calibration": found})
    assert "on the check rows the drop is 0.7500" in changed and "every check row leaves at layer 1" in changed
    assert "risk at most 0.02 with probability 1 - 0.05, measured 0.0123 (p = 0.0456)" in changed
    assert "3.25 ms for a batch" in changed and not Page(changed).problems


def test_same_model_gives_the_same_page(page, calibrated):
    again, _ = reported(calibrated)
    without_time = [re.sub(r"at \d{4}-[^ ]+", "", source) for source in (page[0], again)]
    assert without_time[0] == without_time[1]


def test_no_texts(plain):
    source, data = reported(plain, "--no-texts")
    assert "bold" not in source + json.dumps(data) and not data["rows"]["texts"]
    assert all(not row["texts"] and row["tokens"] for row in data["rows"]["last"])
    assert not Page(source).problems


def test_model_without_a_criterion(plain):
    """The fastest setting of all rules within the drop, or full depth where there is none."""
    source, data = reported(plain, "--drop", "1")
    best = min(
        (r for r in data["records"] if r["kind"] == "point" and r["chosen"]),
        key=lambda r: r["tuning"]["mean_layers_run"],
    )
    assert data["summary"]["source"] == "fastest" and data["summary"]["criterion"] == best["criterion"]
    assert data["summary"]["score"] == pytest.approx(best["reporting"]["scores"]["accuracy"])
    assert "No criterion is saved with the model" in source and "<h2>Calibration</h2>" not in source


def test_no_setting_is_good_enough(plain, monkeypatch):
    monkeypatch.setattr(Sweep, "chosen", lambda *_: None)
    source, data = reported(plain)
    assert data["summary"]["source"] == "full_depth" and data["summary"]["drop"] == 0.0
    assert data["layers"][-1]["leaving"] == 1.0 and not any(entry["dead"] for entry in data["layers"])  # never computed
    assert "no setting loses so little" in source and not Page(source).problems


@pytest.mark.thorough
def test_rule_that_skips_layers(tmp_path):
    folder = trained(tmp_path, "--method", "smartbert")
    found = traced(folder)
    model = found.saved.model
    rule = SkipGate(threshold=0.5, exit=Entropy(threshold=0.69))
    model.set_criterion(rule)
    out = predict_with_exits(model, found.data["reporting"], collate_fn=found.saved.collate)
    model.save_pretrained(folder)
    source, data = reported(folder)
    now = data["summary"]
    assert now["criterion"] == rule.to_dict() and now["random_exit"] is None and data["multiply_adds"]["gates"] > 0
    assert now["mean_layers_run"] == pytest.approx(out.layers_run.mean())
    assert any(curve["rules"] == ["skip_gate"] for curve in data["curves"]) and not Page(source).problems


def test_numbers_as_labels(tmp_path):
    """Own rows of two texts for regression: no calibration error, no overthinking, no oracle."""
    generator = np.random.default_rng(0)
    lines = [f"the plot was dull,{'so ' * (i % 7)}it was,{generator.normal():.3f}" for i in range(150)]
    (tmp_path / "rows.csv").write_text("\n".join(["first,second,score", *lines]), encoding="utf-8")
    toy.toy_model(0, layers=3, hidden=16).save_pretrained(tmp_path / "base")
    toy.toy_tokenizer().save_pretrained(tmp_path / "base")
    command = ["train", str(tmp_path / "base"), "--data", str(tmp_path / "rows.csv")]
    columns = "--text-column first --pair-column second --label-column score --holdout 60 --epochs 1".split()
    assert main([*command, *columns, "--output", str(tmp_path / "out")]) == 0
    source, data = reported(tmp_path / "out", "--drop", "0.5")
    assert data["oracle"] is None and data["chance_level"] is None and data["summary"]["metric"] == "pearson"
    assert all(entry["ece"] is None and entry["overthinking"] is None for entry in data["layers"])
    assert sum(group["rows"] for group in data["histograms"]["class"]) == data["summary"]["rows"]
    assert len(data["rows"]["first"][0]["texts"]) == 2 and not Page(source).problems


def test_what_is_printed_and_written(calibrated, tmp_path, capsys):
    """The saved criterion is measured on the rows that calibrate did not choose on, or on all rows of a file."""
    output = tmp_path / "points.json"
    assert main(["eval", str(calibrated), "--output", str(output), "--metric", "accuracy", "auroc", "ece"]) == 0
    out = capsys.readouterr().out
    assert "on 90 other rows of dev.csv" in out and "chosen on 90 rows of dev.csv (loss of accuracy at most 0.5)" in out
    assert "| all rows leave at layer | accuracy |  auroc |" in out and "* exit rule from the method's paper" in out
    records = json.loads(output.read_text())["records"]
    assert sum(record["kind"] == "static_truncation" for record in records) == 3
    assert main(["eval", str(calibrated), "--data", str(calibrated.parent / "other.csv")]) == 2
    write_table(tmp_path / "other.csv", {"text": ["the plot was dull ."] * 30, "label": ["positive", "negative"] * 15})
    capsys.readouterr()
    assert main(["eval", str(calibrated), "--data", str(tmp_path / "other.csv")]) == 0
    out = capsys.readouterr().out
    assert "on 30 rows of other.csv" in out and "chosen on 180 rows of dev.csv" in out and "accuracy 0.5000" in out
    for metric, words in (("ece", "ece is an error"), ("pearson", "--metric: expected a metric of these rows")):
        assert words in error_of(capsys, ["eval", str(calibrated), "--metric", metric])


def test_demo_runs_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "QUICK", (700, 40, 2))
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    steps = [line.split()[1] for line in out.splitlines() if line.startswith("    earlyexit ")]
    assert steps == ["train", "calibrate", "eval", "predict"] and demo.QUICK_NOTE in out and "time saved" in out
    assert (tmp_path / "report.html").is_file() and (tmp_path / "predictions.csv").is_file()
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 0, "it replaces its own files"


def test_nothing_is_written_where_the_page_cannot_be_made(capsys, tmp_path, plain, monkeypatch):
    def fail(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "page", fail)
    assert "No space" in error_of(capsys, ["eval", str(plain), "--report", str(tmp_path / "p.html")])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_page_fits_the_window_of_a_browser(page, width, tmp_path):
    contents, window, charts, logged = overflow(page[0], width, tmp_path)
    assert window == width and contents <= width and charts >= 5 and not logged
