"""The numbers of a report page against loops over the rows, and its charts."""

from __future__ import annotations

import base64
import math
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef
from support.html_pages import Page

from earlyexit_kernels import ExitTrace, replay
from earlyexit_kernels.criteria import Margin, MaxProbability
from earlyexit_kernels.tuning import charts, report
from earlyexit_kernels.tuning import rows as rows_module
from earlyexit_kernels.tuning import sweep as sweeps
from earlyexit_kernels.tuning.metrics import matthews
from earlyexit_kernels.tuning.report import fixed, interval, loss, percent
from earlyexit_kernels.tuning.rows import Answers, Rows, score_error

ROWS, DEPTH, NAMES = 240, 4, ["one", "two", "three"]
CURVES = {"entropy": [(3.0, 0.9), (1.0, 0.7), (6.0, 0.9)], "patience": [(2.0, 0.8)]}
LENGTHS = [3 + (7 * row) % 23 for row in range(ROWS)]
NUMBERS = range(1, ROWS + 1)


def rows_of(classes: int = 3, *, metric: str = "accuracy", seed: int = 0) -> Rows:
    """Rows of which deeper exits answer more correctly, and the first exit none better than chance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (ROWS,), generator=generator)
    right = torch.nn.functional.one_hot(labels, classes).float()[:, None]
    strength = torch.tensor([0.0, 1.0, 2.0, 2.5])[:, None]
    logits = right * strength + torch.randn(ROWS, DEPTH, classes, generator=generator)
    return Rows(ExitTrace(logits), labels.numpy(), metric, "single_label_classification")


def answers_of(rows: Rows, rule: MaxProbability | Margin) -> Answers:
    logits, layers = replay(rows.trace, rule)
    return Answers(rule, logits.numpy(), layers.numpy(), layers.numpy())


@pytest.fixture
def rows():
    return rows_of()


@pytest.fixture
def answers(rows):
    found = answers_of(rows, MaxProbability(threshold=(0.995, 0.8, 0.8)))
    assert {2, 3, 4} <= set(found.exit_layer)
    return found


@pytest.fixture
def right(rows):
    """Whether each exit answers each row correctly, by row."""
    return [
        [int(z.argmax()) == label for z in exits] for exits, label in zip(rows.trace.logits, rows.labels, strict=True)
    ]


def test_summary_and_oracle(rows, answers, right):
    found = report.summary(rows, answers)
    score = sum(right[n][layer - 1] for n, layer in enumerate(answers.exit_layer)) / ROWS
    full = sum(row[-1] for row in right) / ROWS
    assert found["score"] == pytest.approx(score) and found["full_depth"] == pytest.approx(full)
    assert found["drop"] == pytest.approx(full - score)
    assert found["drop_interval"][0] < found["drop"] < found["drop_interval"][1]
    assert found["mean_layers_run"] == pytest.approx(sum(answers.exit_layer) / ROWS)
    assert found["layer_speed_up"] == pytest.approx(DEPTH * ROWS / sum(answers.exit_layer))
    first = [1 + row.index(True) if any(row) else 1 for row in right]
    oracle = {"score": pytest.approx(sum(map(any, right)) / ROWS), "mean_layers_run": pytest.approx(sum(first) / ROWS)}
    assert report.oracle(rows) == oracle


def calibration_error(logits, right):
    """The definition of Naeini et al. (2015), with 15 bins."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for z, hit in zip(logits.tolist(), right, strict=True):
        sure = math.exp(max(z)) / sum(map(math.exp, z))
        bins.setdefault(int(sure * 15), []).append((sure, hit))
    gaps = [abs(sum(sure for sure, _ in one) - sum(hit for _, hit in one)) for one in bins.values()]
    return sum(gaps) / len(right)


def test_by_layer(rows, answers, right):
    table = report.by_layer(rows, answers)
    for layer, entry in enumerate(table, start=1):
        here, leaving = [row[layer - 1] for row in right], answers.exit_layer == layer
        hits = [hit for hit, leaves in zip(here, leaving, strict=True) if leaves]
        over = sum(hit and not row[-1] for hit, row in zip(here, right, strict=True))
        assert entry["layer"] == layer and entry["score"] == pytest.approx(sum(here) / ROWS)
        assert entry["overthinking"] == pytest.approx(over / ROWS)
        assert entry["leaving"] == pytest.approx(len(hits) / ROWS)
        assert entry["right_of_leaving"] == (pytest.approx(sum(hits) / len(hits)) if hits else None)
        assert entry["dead"] == (layer < DEPTH and len(hits) < 0.005 * ROWS)
        assert entry["ece"] == pytest.approx(calibration_error(rows.trace.logits[:, layer - 1], here))
    assert [entry["chance"] for entry in table] == [True, False, False, False] and table[0]["dead"]
    assert sum(entry["leaving"] for entry in table) == pytest.approx(1)
    assert table[1]["overthinking"] > 0 and min(entry["ece"] for entry in table) > 0


def test_histograms(rows, answers):
    found = report.histograms(rows, answers, LENGTHS, NAMES)
    assert [group["name"] for group in found["class"]] == NAMES
    for kind in ("class", "length", "all"):
        assert sum(group["rows"] for group in found[kind]) == ROWS
        assert all(sum(group["shares"]) == pytest.approx(1) for group in found[kind])
    two = [layer for layer, label in zip(answers.exit_layer, rows.labels, strict=True) if label == 1]
    assert found["class"][1]["shares"] == pytest.approx([two.count(k) / len(two) for k in range(1, DEPTH + 1)])
    assert found["class"][1]["mean_exit_layer"] == pytest.approx(sum(two) / len(two))
    ends = [[int(end) for end in group["name"].removesuffix(" tokens").split(" to ")] for group in found["length"]]
    assert ends[0][0] == 3 and ends[-1][1] == 25 and ends[0][1] < ends[1][0] and ends[1][1] < ends[2][0]
    assert [sum(low <= n <= high for n in LENGTHS) for low, high in ends] == [g["rows"] for g in found["length"]]
    assert min(group["rows"] for group in found["length"]) > ROWS / 4
    (group,) = report.histograms(rows, answers, [7] * ROWS, NAMES)["length"]
    assert group["name"] == "7 tokens" and group["rows"] == ROWS


def test_many_classes_share_a_histogram():
    rows = rows_of(classes=12)
    answers = answers_of(rows, MaxProbability(threshold=0.9))
    found = report.histograms(rows, answers, LENGTHS, [f"class {k}" for k in range(12)])["class"]
    assert len(found) == 9 and found[-1]["name"] == "4 other classes" and sum(g["rows"] for g in found) == ROWS
    counts = sorted(np.bincount(rows.labels, minlength=12).tolist(), reverse=True)
    assert [group["rows"] for group in found[:-1]] == counts[:8]


def test_first_and_last(rows, answers):
    texts = [f"row {n} " + "x" * (300 * (n % 2)) for n in range(ROWS)]
    found = report.first_and_last(rows, answers, texts, NUMBERS, LENGTHS, NAMES)
    sure = [max(torch.softmax(torch.tensor(z).double(), 0)).item() for z in answers.logits]
    first = sorted(range(ROWS), key=lambda n: (answers.exit_layer[n], -sure[n]))[:10]
    last = sorted(range(ROWS), key=lambda n: (-answers.exit_layer[n], sure[n]))[:10]
    for name, expected in (("first", first), ("last", last)):
        assert [row["row"] for row in found[name]] == [NUMBERS[n] for n in expected]
    for row in found["first"] + found["last"]:
        n = row["row"] - 1
        assert row["label"] == NAMES[rows.labels[n]] and row["prediction"] == NAMES[answers.logits[n].argmax()]
        assert row["right"] == (row["label"] == row["prediction"]) and row["tokens"] == LENGTHS[n]
        (text,) = row["texts"]
        assert len(text) == (200 if n % 2 else len(texts[n])) and text.startswith(f"row {n} ")
    hidden = report.first_and_last(rows, answers, None, NUMBERS, LENGTHS, NAMES)
    assert all(row["texts"] == [] for row in hidden["first"])


def test_several_labels_a_row():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (ROWS, 3), generator=generator)
    logits = (labels[:, None] * 4 - 2.0) * torch.tensor([0.2, 1, 1, 2])[:, None] + torch.randn(ROWS, DEPTH, 3)
    rows = Rows(ExitTrace(logits), labels.numpy(), "accuracy", "multi_label_classification")
    layers = np.full(ROWS, 2)
    answers = Answers(MaxProbability(threshold=0.5), logits[:, 1].numpy(), layers, layers)
    table = report.by_layer(rows, answers)
    exact = float(((logits[:, 1] > 0) == labels).all(dim=1).double().mean())
    assert table[1]["score"] == pytest.approx(exact) == table[1]["right_of_leaving"] and table[1]["ece"] is None
    groups = report.histograms(rows, answers, LENGTHS, NAMES)["class"]
    assert [group["rows"] for group in groups] == labels.sum(dim=0).tolist()
    row = report.first_and_last(rows, answers, None, NUMBERS, LENGTHS, NAMES)["first"][0]
    assert row["label"] == (
        ", ".join(name for name, k in zip(NAMES, labels[row["row"] - 1], strict=True) if k) or "none"
    )


def test_curves_are_those_of_the_sweep():
    tuning, rows = rows_of(classes=2, seed=1), rows_of(classes=2)
    result = sweeps.sweep((tuning.trace, tuning.labels), (rows.trace, rows.labels), drop=0.02, points=12)
    found = report.curves(result, rows)
    assert sorted(name for curve in found for name in curve["rules"]) == sorted(result.points)
    for curve in found:
        for point, swept in zip(curve["points"], result.points[curve["rules"][0]], strict=True):
            score = swept.reporting.scores["accuracy"]
            assert (point["mean_layers_run"], point["score"]) == (swept.reporting.mean_layers_run, score)
            assert point["standard_error"] == pytest.approx(math.sqrt(score * (1 - score) / ROWS))
            assert point["random_exit"] == swept.reporting.random_exit
        for name, chosen in curve["chosen"].items():
            swept = result.chosen(name)
            assert (chosen is None) == (swept is None)
            assert chosen is None or chosen["score"] == swept.reporting.scores["accuracy"]
    assert any(point for curve in found for point in curve["chosen"].values())


def test_standard_error_of_another_metric(monkeypatch):
    """The jackknife that leaves out one row at a time, where there are as many groups as rows."""
    rows = rows_of(classes=2, metric="matthews")
    labels, predictions = rows.labels[:20], rows.at_layer(2)[:20]
    kept = [[m for m in range(20) if m != n] for n in range(20)]
    values = [matthews_corrcoef(labels[k], predictions[k]) for k in kept]
    mean = sum(values) / 20
    expected = math.sqrt(19 / 20 * sum((value - mean) ** 2 for value in values))
    assert score_error(matthews, predictions, labels) == pytest.approx(expected) and expected > 0
    monkeypatch.setattr(rows_module, "RANDOM_DRAWS", 1)  # slow, and not looked at
    monkeypatch.setattr(sweeps, "settings", lambda *_, **__: {"margin": [Margin(threshold=t) for t in (0.2, 0.6)]})
    result = sweeps.sweep((rows.trace, rows.labels), (rows.trace, rows.labels), metrics=("matthews",))
    errors = [point["standard_error"] for curve in report.curves(result, rows) for point in curve["points"]]
    assert all(0 < error < 0.2 for error in errors)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (fixed(None), "\N{EN DASH}"),
        (fixed(-0.12345), "\N{MINUS SIGN}0.123"),
        (percent(0.1234), "12.3 %"),
        (loss(0.0123, "accuracy"), "loses 1.2 points"),
        (loss(-0.0123, "pearson"), "gains 0.012"),
        (loss(0.0, "accuracy"), "loses nothing"),
        (interval([-0.01, 0.02], "accuracy"), "\N{MINUS SIGN}1.0 to 2.0 points"),
        (interval([-0.01, 0.02], "matthews"), "\N{MINUS SIGN}0.010 to 0.020"),
    ],
)
def test_numbers_in_words(shown, expected):
    assert shown == expected


def drawn(image: dict[str, str]) -> Page:
    """The elements and texts of an image."""
    return Page(base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,")).decode())


def test_names_of_classes_are_shown_as_they_are(recwarn):
    """Also those of other scripts, with signs of HTML, or that matplotlib would read as mathematics: "$5" is none."""
    pytest.importorskip("matplotlib")
    names = ["日本語", "<b>&", "$x_1$", "$5", "5 $ < 6 $"]
    groups = [{"name": name, "rows": 2, "mean_exit_layer": 1.5, "shares": [0.5, 0.5]} for name in names]
    with charts.style():
        images = [charts.exit_bars("A title <1>", groups) for _ in range(2)]
    texts = [text for tags, text in drawn(images[0]).texts if tags[-1] == "text"]
    assert [f"{name} (2 rows, mean layer 1.50)" for name in names] == [t for t in texts if "rows" in t]
    assert images[0] == images[1] and not recwarn.list
    assert images[0]["alt"].startswith("A title <1>. 日本語 (2 rows, mean layer 1.50): 50%, 50%; <b>&")


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = charts.plot_tradeoff(
        tmp_path / "p" / "curve.png",
        CURVES,
        baselines={"static truncation": [(1.0, 0.6), (6.0, 0.9)]},
        chosen={"entropy": (3.0, 0.9)},
        depth=6,
        metric="accuracy",
        title="t",
        rows=100,
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_coinciding_curves_are_merged():
    same = [(6.0, 0.9), (2.0, 0.8002), (3.0, 0.9), (1.0, 0.7)]
    merged = charts.merged({**CURVES, "margin": same})
    assert [names for names, _ in merged] == [["entropy", "margin"], ["patience"]]


@pytest.mark.parametrize("module", ["matplotlib", "matplotlib.figure"])
def test_without_matplotlib_the_error_names_it(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install matplotlib"), charts.style():
        charts.new_figure(1, 1)


def test_many_curves_differ_in_colour_or_marker():
    pairs = {(charts.COLORS[n % len(charts.COLORS)], charts.MARKERS[n % len(charts.MARKERS)]) for n in range(77)}
    assert len(pairs) == 77
