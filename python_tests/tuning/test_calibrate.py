"""Calibration: the setting chosen for each target, the record saved with the model, and refused input."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import CLASSES, early_exit

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, FixedLayer, Margin, Patience
from earlyexit_kernels.tuning import calibrate as calibrate_module
from earlyexit_kernels.tuning import rows as rows_module
from earlyexit_kernels.tuning.targets import last_passed, risk_p_values
from earlyexit_kernels.tuning.temperature import fit_temperatures, scaled

DEPTH = 4


def noisy_trace(rows=2000, *, seed=0, classes=3, noise=(1.6, 1.2, 0.8, 0.6)):
    """Return a trace of easy and hard rows, whose exits are more often right the deeper they are, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    right = torch.nn.functional.one_hot(labels, classes).float()
    hard = torch.rand(rows, 1, 1, generator=generator)
    errors = torch.randn(rows, DEPTH, classes, generator=generator) * torch.tensor(noise)[:, None]
    return ee.ExitTrace(right[:, None] * 6 * (1 - hard) + errors), labels.numpy()


def scored(trace, labels, criterion):
    logits, layers = ee.replay(trace, criterion)
    return float((logits.argmax(1).numpy() == labels).mean()), float(layers.double().mean())


def test_max_drop_chooses_the_fastest_setting_within_the_drop():
    """Against a plain search over the same settings and rows."""
    trace, labels = noisy_trace()
    found = ee.calibrate(trace, labels, target=ee.MaxDrop(0.01), check=0.25, seed=3)
    order = np.random.default_rng(3).permutation(2000)
    tuning, checked = np.sort(order[500:]), np.sort(order[:500])
    own = trace.take(torch.from_numpy(tuning))
    full = own.logits[:, -1].argmax(1).numpy() == labels[tuning]
    within = []
    for threshold in [point.criterion["threshold"] for point in found.curve]:
        logits, layers = ee.replay(own, Entropy(threshold=threshold))
        losses = full.astype(float) - (logits.argmax(1).numpy() == labels[tuning])
        if losses.mean() + 0.5 * losses.std(ddof=1) / 1500**0.5 <= 0.01:
            within.append((float(layers.double().mean()), threshold))
    assert len(found.curve) >= 40 and found.criterion == Entropy(threshold=min(within)[1])
    score, layer = scored(trace.take(torch.from_numpy(checked)), labels[checked], found.criterion)
    assert (found.score, found.mean_exit_layer) == (score, layer)
    assert found.layer_speed_up == DEPTH / layer > 1.1 and sum(found.exit_shares) == pytest.approx(1)
    low, high = found.drop_interval
    assert low <= found.drop <= high and found.drop == found.full_depth - found.score
    assert found.rows == {"tuning": 1500, "check": 500} and len(found.layer_scores) == DEPTH


def test_speed_up_chooses_the_slowest_setting_within_one_standard_error_of_the_best():
    """Against a plain search: time that is allowed is used, instead of the luckiest setting."""
    trace, labels = noisy_trace()
    found = ee.calibrate(trace, labels, target=ee.SpeedUp(1.5))
    tuning = np.sort(np.random.default_rng(0).permutation(2000)[1000:])
    own = trace.take(torch.from_numpy(tuning))
    full = own.logits[:, -1].argmax(1).numpy() == labels[tuning]
    fast = []
    for threshold in [p.criterion["threshold"] for p in found.curve if DEPTH / p.mean_exit_layer >= 1.5]:
        logits, layers = ee.replay(own, Entropy(threshold=threshold))
        right = logits.argmax(1).numpy() == labels[tuning]
        error = (right.astype(float) - full).std(ddof=1) / 1000**0.5
        fast.append((float(layers.double().mean()), right.mean(), error, threshold))
    best = max(fast, key=lambda setting: setting[1])
    near = [s for s in fast if best[1] - s[1] < np.hypot(best[2], s[2])]
    assert 1 < len(near) < len(fast) < len(found.curve)
    assert found.criterion.threshold == max(near)[3] != best[3]


def test_missed_target_is_said():
    trace, labels = noisy_trace(200, seed=5)
    for seed in range(8):
        found = ee.calibrate(trace, labels, target=ee.MaxDrop(0.0), seed=seed, points=8)
        assert (
            ("note         on the check rows the drop is" in str(found))
            == (found.drop > 1e-9)
            == bool(found.target_miss)
        )
    found = ee.calibrate(trace, labels, target=ee.SpeedUp(1.5))
    assert ("the layer speed-up is" in str(found)) == (found.layer_speed_up < 1.5)
    assert "CurvePoint" not in repr(found)


def test_auto_is_at_least_as_fast_as_each_rule():
    trace, labels = noisy_trace()
    options = {"target": ee.MaxDrop(0.02), "points": 24}

    def layers_when_chosen(criterion):
        found = ee.calibrate(trace, labels, criterion=criterion, **options)
        return next(p.mean_exit_layer for p in found.curve if p.criterion == found.criterion.to_dict())

    alone = {name: layers_when_chosen(name) for name in ("entropy", "margin", "patience", "energy")}
    assert layers_when_chosen("auto") <= min(alone.values()) < max(alone.values())


def test_auto_says_where_no_rule_beats_a_fixed_cut():
    """The second exit is as good as the last, and no exit is surer of the rows that it knows."""
    labels = np.arange(400) % 2
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    right = F.one_hot(torch.from_numpy(labels), 2) * 6.0
    trace = ee.ExitTrace(torch.stack([noise, right, right, right], dim=1))
    with pytest.warns(UserWarning, match=r"no rule beats a fixed cut on the 200 tuning rows: .* at layer 2, and"):
        found = ee.calibrate(trace, labels, target=ee.MaxDrop(0.0), criterion="auto")
    assert found.criterion == FixedLayer(layer=2) and found.one_layer == 2
    assert "every check row leaves at layer 2" in str(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for, or not the choice
        assert ee.calibrate(trace, labels, target=ee.MaxDrop(0.0), criterion="fixed_layer") is not None
        better = ee.calibrate(*noisy_trace(), target=ee.MaxDrop(0.01), criterion="auto")
    assert better.one_layer is None and not isinstance(better.criterion, FixedLayer)


def test_setting_under_which_every_row_leaves_at_one_layer_is_said():
    """On few rows a setting that never runs the layers above looks harmless."""
    trace, labels = noisy_trace(60, noise=(0.3, 0.3, 0.3, 0.3))
    with pytest.warns(
        UserWarning, match="every one of the 30 check rows leaves at layer 1 under entropy, set on 30 tuning rows"
    ):
        found = ee.calibrate(trace, labels, target=ee.MaxDrop(0.2))
    assert found.one_layer == 1 and "every check row leaves at layer 1" in str(found)


def test_settings_to_choose_from_may_be_given():
    given = [Margin(threshold=0.9), Patience(patience=3)]
    assert ee.calibrate(*noisy_trace(), target=ee.MaxDrop(0.2), criterion=given).criterion in given


@pytest.mark.parametrize("against", ["labels", "full_depth"])
def test_risk_tests_from_the_slowest_setting_to_the_fastest(against):
    pytest.importorskip("mapie")
    trace, labels = noisy_trace(4000)
    found = ee.calibrate(trace, labels, target=ee.Risk(delta=0.03, against=against))
    bound = found.guarantee
    assert bound.p_value <= bound.epsilon == 0.05 and bound.risk < bound.delta == 0.03
    assert found.metric == ("accuracy" if against == "labels" else "agreement")
    assert found.layer_speed_up > 1
    looser = ee.calibrate(trace, labels, target=ee.Risk(delta=0.1, against=against))
    assert looser.mean_exit_layer < found.mean_exit_layer


def test_each_setting_is_tested_at_the_whole_error_rate_until_one_fails():
    pytest.importorskip("mapie")
    assert last_passed(np.array([0.01, 0.04, 0.2, 0.001]), 0.05) == 1
    assert last_passed(np.array([0.06, 0.001]), 0.05) is None


@pytest.mark.thorough
@pytest.mark.parametrize("rule", ["entropy", "patient_confidence"])
def test_risk_exceeds_the_bound_at_most_as_often_as_promised(rule):
    """The risk over 20,000 rows, for settings chosen on 600 rows each; `benchmarks.guarantee` draws more."""
    pytest.importorskip("mapie")
    (trace, labels), delta, epsilon, draws = noisy_trace(20_000), 0.05, 0.2, 60
    right = trace.logits[:, -1].argmax(1).numpy() == labels
    risks = {}
    for seed in range(draws):
        rows = np.random.default_rng(seed).integers(len(labels), size=600)
        part, target = trace.take(torch.from_numpy(rows)), ee.Risk(delta=delta, epsilon=epsilon)
        rule_found = ee.calibrate(part, labels[rows], target=target, criterion=rule, points=8).criterion
        if rule_found not in risks:
            early = ee.replay(trace, rule_found)[0].argmax(1).numpy() == labels
            risks[rule_found, seed] = float((right & ~early).mean())
    broken = sum(risk > delta for risk in risks.values())
    assert len(risks) == draws and max(risks.values()) > 0
    assert broken <= 20, "by chance in 1 of 400 runs at most"


def test_a_risk_that_never_occurred_is_as_likely_as_its_rows_allow():
    """If each row loses with probability .05, none of 100 does with probability .95^100."""
    pytest.importorskip("mapie")
    assert risk_p_values([np.zeros(100, dtype=bool)], 0.05) == pytest.approx([0.95**100])


def test_without_labels_full_depth_is_the_truth():
    trace, _ = noisy_trace()
    found = ee.calibrate(trace, target=ee.MaxDrop(0.02))
    assert found.metric == "agreement" and found.full_depth == 1.0 and 0.95 < found.score < 1


@pytest.mark.parametrize("metric", ["matthews", "macro_f1"])
def test_other_metrics_decide(metric, monkeypatch):
    monkeypatch.setattr(rows_module, "DRAWS", 100)
    trace, labels = noisy_trace(400)
    found = ee.calibrate(trace, labels, target=ee.MaxDrop(0.02), metric=metric, points=8)
    assert found.metric == metric and found.layer_speed_up > 1
    low, high = found.drop_interval
    assert low < high


def test_regression_and_several_labels():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(400, generator=generator)
    logits = truth[:, None, None] + torch.randn(400, 3, 1, generator=generator) * torch.tensor([1.0, 0.3, 0.1])[:, None]
    with pytest.warns(UserWarning, match="leaves at layer 2 under patience"):
        found = ee.calibrate(ee.ExitTrace(logits), truth, target=ee.MaxDrop(0.05), criterion="patience")
    assert found.metric == "pearson" and found.score > 0.9 and found.untrained == ()
    labels = (torch.randn(400, 4, generator=generator) > 0).long()
    several = ee.ExitTrace(
        (labels[:, None] * 2.0 - 1) * torch.tensor([0.0, 2.0, 3.0])[:, None]
        + torch.randn(400, 3, 4, generator=generator) * 0.1,
        {"hidden_cosine": torch.rand(400, 3, generator=generator)},
        problem_type="multi_label_classification",
    )
    found = ee.calibrate(several, labels, target=ee.SpeedUp(1.2), criterion="hidden_cosine")
    assert 0.3 < found.score < found.full_depth == 1.0 and found.untrained == (1,)


def test_exits_at_chance_are_named():
    trace, labels = noisy_trace()
    logits = trace.logits.clone()
    logits[:, 0] = torch.randn_like(logits[:, 0])
    assert ee.calibrate(ee.ExitTrace(logits), labels, target=ee.MaxDrop(0.05)).untrained == (1,)
    with pytest.warns(UserWarning, match="last exit is no better than chance"):
        found = ee.calibrate(ee.ExitTrace(torch.randn(400, 3, 3)), labels[:400], target=ee.MaxDrop(0.5))
    assert found.untrained == (1, 2, 3) and "exits 1, 2, 3" in str(found)


def test_threshold_of_each_layer_is_at_least_as_fast_on_the_tuning_rows():
    """A trace whose first exit is overconfident: one threshold for all layers has to be low."""
    trace, labels = noisy_trace(6000)
    logits = trace.logits.clone()
    logits[:, 0] *= 3
    trace, options = ee.ExitTrace(logits), {"target": ee.MaxDrop(0.02), "check": 0.2, "points": 24}
    uniform = ee.calibrate(trace, labels, **options)
    found = ee.calibrate(trace, labels, per_layer=True, **options)
    assert len(found.criterion.threshold) == DEPTH - 1 and found.criterion.threshold[0] < found.criterion.threshold[1]
    assert found.layer_speed_up > uniform.layer_speed_up + 0.3 and found.drop < 0.04
    fast = ee.calibrate(trace, labels, per_layer=True, **{**options, "target": ee.SpeedUp(1.8)})
    assert fast.score >= ee.calibrate(trace, labels, **{**options, "target": ee.SpeedUp(1.8)}).score - 0.01


def test_temperature_minimises_the_loss_of_each_exit():
    trace, labels = noisy_trace(500)
    found = fit_temperatures(trace, labels)
    truth = torch.from_numpy(labels)
    for layer, temperature in enumerate(found):
        loss = [
            float(F.cross_entropy(trace.logits[:, layer].double() / (temperature * k), truth)) for k in (0.99, 1, 1.01)
        ]
        assert loss[1] < min(loss[0], loss[2])
    assert fit_temperatures(scaled(trace, found), labels) == pytest.approx((1.0,) * DEPTH, rel=1e-5)


# the model


@pytest.fixture(scope="module")
def rows():
    """Items of different lengths with labels, drawn for a model of random weights."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 12, size=60)
    return [{"input_ids": generator.integers(5, 90, size=n).tolist(), "labels": int(n % CLASSES)} for n in lengths]


def calibrated(rows, **options):
    model = early_exit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random weights
        return model, ee.calibrate(model, rows, **{"target": ee.SpeedUp(1.2), "points": 8, **options})


def test_model_takes_criterion_and_record_and_saves_both(rows, tmp_path):
    model, found = calibrated(rows)
    assert model.criterion == found.criterion and ee.Calibration.of(model) == found and found.layer_speed_up >= 1.1
    json.dumps(found.to_dict())
    model.save_pretrained(tmp_path)
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert ee.Calibration.of(loaded) == found and str(ee.Calibration.of(loaded)) == str(found)
    assert loaded.criterion == found.criterion
    exits = ee.predict_with_exits(loaded, rows).exit_layer
    order = np.random.default_rng(0).permutation(len(rows))
    checked = np.sort(order[: len(rows) // 2])
    shares = [float((exits[checked] == layer).mean()) for layer in range(1, loaded.depth + 1)]
    assert shares == pytest.approx(found.exit_shares)


def test_record_belongs_to_its_criterion_and_its_weights(rows):
    model, found = calibrated(rows)
    model.set_criterion(found.criterion)
    assert ee.Calibration.of(model) == found
    model.set_criterion(Entropy(threshold=0.123))
    assert ee.Calibration.of(model) is None
    found.apply(model)
    model.config.calibration = {**model.config.calibration, "criterion": Entropy(threshold=0.5).to_dict()}
    assert ee.Calibration.of(model) is None
    found.apply(model)
    ee.collect_trace(model, rows)  # runs without the criterion
    assert ee.Calibration.of(model) == found and model.criterion == found.criterion
    model.train()
    model(input_ids=torch.tensor([rows[0]["input_ids"]]), labels=torch.tensor([0])).loss.backward()
    assert ee.Calibration.of(model) is None


def test_latency_is_measured(rows, monkeypatch):
    """In milliseconds, and with a clock that counts the layers run."""
    _, found = calibrated(rows, target=ee.Latency(ms=10_000))
    assert 0 < found.latency < 10_000
    asked = []

    class Clock:
        def __init__(self, model, dataset, *, batch_size, collate_fn):
            asked.append(batch_size)
            self.model, self.dataset = model, dataset

        def __call__(self, criterion):
            before = self.model.criterion
            self.model.set_criterion(criterion)
            layers = float(ee.predict_with_exits(self.model, self.dataset).exit_layer.mean())
            self.model.set_criterion(before)
            return layers

    monkeypatch.setattr(calibrate_module, "BatchLatency", Clock)
    _, found = calibrated(rows, target=ee.Latency(ms=2.5, batch_size=4))
    assert asked == [4] and found.latency <= 2.5
    with pytest.raises(ValueError, match=r"no setting reaches Latency\(ms=0.5.*with 1.0"):
        calibrated(rows, target=ee.Latency(ms=0.5))


def test_temperatures_are_put_into_the_exits(rows):
    """The saved model needs no temperature at run time, and gives each exit's labels as before."""
    plain = early_exit()
    before, _ = ee.collect_trace(plain, rows)
    model, found = calibrated(rows, temperature=True)
    after, _ = ee.collect_trace(model, rows)
    assert len(found.temperatures) == model.depth and len(set(found.temperatures)) > 1
    assert (after.logits - scaled(before, found.temperatures).logits).abs().max() < 1e-5
    assert torch.equal(after.logits.argmax(-1), before.logits.argmax(-1)) and ee.Calibration.of(model) == found
    shared = early_exit(num_labels=1)
    with pytest.raises(ValueError, match="temperature=True is for one class a row, got regression"):
        ee.calibrate(
            shared, [{**row, "labels": float(i)} for i, row in enumerate(rows)], target=ee.SpeedUp(1), temperature=True
        )


# refused input

TRACE, LABELS = noisy_trace(60)
NAN = ee.ExitTrace(TRACE.logits.clone().index_fill_(0, torch.tensor([3]), torch.nan))


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        (r"expected a label for each row of the trace, \[60\], got \[59\]", {"data": LABELS[:59]}),
        (r"labels in \[0, 2\], got 7", {"data": np.where(LABELS == 1, 7, LABELS)}),
        ("at least two different labels, all 60 are 0", {"data": LABELS * 0}),
        ("NaN or infinity in 1 of 60 rows", {"model_or_trace": NAN}),
        (r"expected target=MaxDrop\(0.005\)", {"target": 0.005}),
        ("metric to be one of", {"metric": "acuracy"}),
        (r"check in \(0, 1\)", {"check": 1.0}),
        ("rows to choose on and rows to check on, got 1 rows", {"model_or_trace": TRACE.take(slice(1)), "data": None}),
        (
            "at least 50 rows, of which 25 or more are tuning rows and as many are check rows, got 49",
            {"model_or_trace": TRACE.take(slice(49)), "data": LABELS[:49]},
        ),
        ("at least 63 rows", {"check": 0.4}),
        ("'auto' or one of .*got 'entrophy'", {"criterion": "entrophy"}),
        ("skips layers cannot be replayed", {"criterion": "skip_gate"}),
        ("got 'learned'; the exits or the problem type", {"criterion": "learned"}),
        ("a name, 'auto', or a list of criteria", {"criterion": [Entropy]}),
        ("a name, 'auto', or a list of criteria", {"criterion": []}),
        ("an early-exit model or a trace", {"model_or_trace": TRACE.logits}),
        ("Latency is measured", {"target": ee.Latency(ms=1)}),
        ("at least 299 check rows.*got 30 of 60 rows; give at least 598 rows", {"target": ee.Risk(0.01)}),
        (
            "the nearest is patience, patience 1, with a layer speed-up of",
            {"target": ee.SpeedUp(4), "criterion": "patience"},
        ),
        ("points >= 8", {"points": 3}),
        (
            "per_layer=True requires a rule with a threshold for each layer",
            {"criterion": "patience", "per_layer": True},
        ),
        ("per_layer=True is for MaxDrop and SpeedUp", {"target": ee.Risk(0.3), "per_layer": True}),
        ("temperature=True changes the exits of a model, got a trace", {"temperature": True}),
    ],
)
def test_refused(expected, given):
    arguments = {"model_or_trace": TRACE, "data": LABELS, "target": ee.MaxDrop(0.5), **given}
    with pytest.raises(ValueError, match=expected):
        ee.calibrate(arguments.pop("model_or_trace"), arguments.pop("data"), **arguments)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (ee.MaxDrop, {"drop": -0.1}),
        (ee.MaxDrop, {"drop": 1}),  # a point of accuracy is 0.01
        (ee.SpeedUp, {"speed_up": 0.5}),
        (ee.Latency, {"ms": float("nan")}),
        (ee.Latency, {"ms": 1, "batch_size": 0}),
        (ee.Risk, {"delta": 0}),
        (ee.Risk, {"delta": 0.1, "epsilon": 1}),
        (ee.Risk, {"delta": 0.1, "against": "truth"}),
    ],
)
def test_targets_out_of_range(target, arguments):
    with pytest.raises(ValueError, match="expected"):
        target(**arguments)


@pytest.mark.parametrize("damage", [{"curve": [{"x": 1}]}, {"curve": 3}, {"guarantee": {}}, {"more": 1}])
def test_damaged_record_is_refused_where_it_is_read(damage, rows):
    model, found = calibrated(rows)
    for data in ({**found.to_dict(), **damage}, {"criterion": found.criterion.to_dict()}, {}, []):
        model.config.calibration = data
        with pytest.raises(ValueError, match=r"calibration: expected the data of Calibration\.to_dict"):
            ee.Calibration.of(model)
    with pytest.raises(ValueError, match="calibration: expected the data of"):
        ee.EarlyExitConfig(calibration=[])
