"""The command `earlyexit report`: the page, the JSON file beside it, and what is refused."""

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

from earlyexit_cli import main
from earlyexit_kernels import Calibration, MaxDrop, calibrate, predict_with_exits
from earlyexit_kernels.cli.evaluate import trace_splits
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.criteria import Entropy, FullDepth, Margin, SkipGate
from earlyexit_kernels.data import toy
from earlyexit_kernels.tasks import load
from earlyexit_kernels.tuning import report
from earlyexit_kernels.tuning.flops import row_macs
from earlyexit_kernels.tuning.sweep import Sweep
from earlyexit_kernels.tuning.traces import collect_trace

pytest.importorskip("matplotlib")
HOSTILE = '<script>alert("x")</script> & <b>bold</b>'


@pytest.fixture(scope="module")
def splits():
    """Generated rows, one of the reporting split with a text that is HTML."""
    found = load.toy_splits(train_rows=160, dev_rows=90, test_rows=0)
    found["dev"].sentences[:] = [f"{text} {HOSTILE}" for text in found["dev"].sentences]
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch, splits):
    monkeypatch.setattr(load, "toy_splits", lambda **_: splits)


def trained(folder: Path, splits, *arguments: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "toy_splits", lambda **_: splits)
        base = folder / "base"
        toy.toy_model(0, layers=3, hidden=16).save_pretrained(base)
        toy.toy_tokenizer().save_pretrained(base)
        command = ["train", "--model", str(base), "--task", "toy", "--output", str(folder / "my model")]
        numbers = "--train-rows 96 --holdout 64 --lr 1e-3 --epochs".split()
        assert main([*command, *numbers, "1", *arguments]) == 0
    return folder / "my model"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, splits):
    """Folder of a trained model without a criterion."""
    return trained(tmp_path_factory.mktemp("plain"), splits)


@pytest.fixture(scope="module")
def calibrated(plain, tmp_path_factory, splits):
    """Folder of the same model with a calibration."""
    folder = tmp_path_factory.mktemp("calibrated") / "my model"
    shutil.copytree(plain, folder)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(load, "toy_splits", lambda **_: splits)
        warnings.simplefilter("ignore", UserWarning)  # a model this small learns little
        found = trace_splits(folder, Recipe.load(folder), task=None, batch_size=32)
        batching = {"collate_fn": found.batching["collate_fn"], "target": MaxDrop(0.5)}
        first = calibrate(found.model, found.data["tuning"], temperature=True, **batching)
        rule = Margin(threshold=middle_margins(found))
        second = calibrate(found.model, found.data["tuning"], criterion=[rule], **batching)
    replace(second, temperatures=first.temperatures).apply(found.model)
    found.model.save_pretrained(folder)
    return folder


def middle_margins(found) -> tuple[float, ...]:
    """Thresholds with which about half of the rows leave at each exit of a model, however little it has learnt."""
    trace, _ = collect_trace(found.model, found.data["reporting"], collate_fn=found.batching["collate_fn"])
    ordered = trace.logits.double().softmax(dim=-1).sort(dim=-1).values
    return tuple((ordered[..., -1] - ordered[..., -2]).median(dim=0).values.tolist()[:-1])


def reported(folder: Path, *arguments: str) -> tuple[str, dict]:
    """Run the command and return the page and the data."""
    target = folder.parent / "pages" / "page.html"
    assert main(["report", "--model", str(folder), "--output", str(target), *arguments]) == 0
    assert sorted(path.name for path in target.parent.iterdir()) == ["page.html", "page.json"]
    return target.read_text(encoding="utf-8"), json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(calibrated, splits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "toy_splits", lambda **_: splits)
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
    recipe = Recipe.load(calibrated)
    found = trace_splits(calibrated, recipe, task=None, batch_size=32)
    rows = found.data["reporting"]
    out = predict_with_exits(found.model, rows, collate_fn=found.batching["collate_fn"])
    right = out.logits.argmax(axis=1) == out.labels
    now = data["summary"]
    assert now["source"] == "model" and now["criterion"] == found.model.criterion.to_dict()
    assert now["score"] == pytest.approx(right.mean()) and now["rows"] == 90
    assert now["full_depth"] == pytest.approx(recipe.scores[-1]["accuracy"])  # temperatures change no answer
    assert now["mean_exit_layer"] == pytest.approx(out.exit_layer.mean()) and 1 < out.exit_layer.mean() < 3
    leaving = [float((out.exit_layer == layer).mean()) for layer in (1, 2, 3)]
    assert [entry["leaving"] for entry in data["layers"]] == pytest.approx(leaving)
    assert data["histograms"]["all"][0]["shares"] == pytest.approx(leaving)
    calibration = Calibration.of(found.model).to_dict()
    assert data["calibration"] == json.loads(json.dumps(calibration)) and calibration["temperatures"]
    lengths = [len(rows[row]["input_ids"]) for row in range(len(rows))]
    early = row_macs(found.model, lengths, torch.from_numpy(out.exit_layer)).total.sum()
    full = row_macs(found.model, lengths, [3] * 90, criterion=FullDepth()).total.sum()
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
def test_rule_that_skips_layers(tmp_path, splits):
    folder = trained(tmp_path, splits, "--method", "smartbert")
    found = trace_splits(folder, Recipe.load(folder), task=None, batch_size=32)
    rule = SkipGate(threshold=0.5, exit=Entropy(threshold=0.69))
    found.model.set_criterion(rule)
    out = predict_with_exits(found.model, found.data["reporting"], collate_fn=found.batching["collate_fn"])
    found.model.save_pretrained(folder)
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
    command = ["train", "--model", str(tmp_path / "base"), "--train", str(tmp_path / "rows.csv")]
    columns = "--text-column first --pair-column second --label-column score --holdout 60 --epochs 1".split()
    assert main([*command, *columns, "--output", str(tmp_path / "out")]) == 0
    source, data = reported(tmp_path / "out", "--drop", "0.5")
    assert data["oracle"] is None and data["chance_level"] is None and data["summary"]["metric"] == "pearson"
    assert all(entry["ece"] is None and entry["overthinking"] is None for entry in data["layers"])
    assert sum(group["rows"] for group in data["histograms"]["class"]) == data["summary"]["rows"]
    assert len(data["rows"]["first"][0]["texts"]) == 2 and not Page(source).problems


def test_refused(capsys, tmp_path, plain):
    message = error_of(capsys, ["report", "--model", str(tmp_path / "none")])
    assert "expected a folder written by `earlyexit train`" in message
    (tmp_path / "page.html").mkdir()
    message = error_of(capsys, ["report", "--model", str(plain), "--output", str(tmp_path / "page.html")])
    assert "--output: expected a file" in message
    (tmp_path / "other.json").mkdir()
    message = error_of(capsys, ["report", "--model", str(plain), "--output", str(tmp_path / "other.html")])
    assert "--output: expected a file" in message and "other.json" in message


def test_nothing_is_written_where_the_page_cannot_be_made(capsys, tmp_path, plain, monkeypatch):
    def fail(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "page", fail)
    assert "No space" in error_of(capsys, ["report", "--model", str(plain), "--output", str(tmp_path / "p.html")])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_page_fits_the_window_of_a_browser(page, width, tmp_path):
    contents, window, charts, logged = overflow(page[0], width, tmp_path)
    assert window == width and contents <= width and charts >= 5 and not logged
