"""Drift of the exit layers: the test of two mixes of layers, its windows, and its warnings."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

import earlyexit_kernels as ee
from earlyexit_kernels.serving.drift import mix_p_value

#: Shares of the layers: even, most rows early, all but one layer hardly used, and a layer that no row leaves at.
MIXES = ([0.25] * 4, [0.6, 0.25, 0.12, 0.03], [0.01, 0.01, 0.01, 0.97], [0.7, 0.0, 0.2, 0.1])


@pytest.fixture(scope="module")
def calibration():
    labels = torch.arange(60) % 2
    logits = torch.nn.functional.one_hot(labels, 2).float()[:, None].repeat(1, 4, 1)
    return ee.calibrate(ee.ExitTrace(logits), labels, target=ee.MaxDrop(0.0))


def with_mix(calibration, shares, rows=1000):
    return replace(calibration, exit_shares=tuple(shares), rows={"tuning": rows, "check": rows})


def drawn(shares, rows, seed=0):
    return np.random.default_rng(seed).choice(np.arange(1, len(shares) + 1), size=rows, p=shares)


def test_p_values_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scikit-learn, from the extra 'test', brings scipy")
    for first, second in ([[30, 40, 50], [35, 90, 20]], [[400, 30, 6], [900, 80, 20]], [[20, 20], [20, 20]]):
        expected = stats.chi2_contingency([first, second], correction=False)
        assert expected.expected_freq.min() >= 5
        assert mix_p_value(np.array(first), np.array(second)) == pytest.approx(expected.pvalue, rel=1e-9)


def test_layers_that_hardly_a_row_leaves_at_are_joined_with_their_neighbours():
    joined = mix_p_value(np.array([100, 102, 298]), np.array([120, 140, 240]))
    assert mix_p_value(np.array([100, 1, 101, 296, 2]), np.array([120, 0, 140, 239, 1])) == pytest.approx(joined)
    assert mix_p_value(np.array([3, 1, 0]), np.array([0, 0, 4])) == 1.0, "too few rows"
    assert mix_p_value(np.array([0, 0]), np.array([10, 10])) == 1.0
    assert mix_p_value(np.array([0, 0, 500]), np.array([0, 0, 500])) == 1.0, "one layer only"
    assert mix_p_value(np.array([0, 0, 500]), np.array([500, 0, 0])) < 1e-100


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("rows", [(400, 1000), (1000, 200)])
def test_false_alarms_are_as_frequent_as_asked_for(mix, rows):
    """Both samples from one mix: a share alpha of the p-values is below alpha, within five standard errors."""
    generator, draws = np.random.default_rng(0), 1000
    samples = [generator.multinomial(n, mix, size=draws) for n in rows]
    p_values = np.array([mix_p_value(first, second) for first, second in zip(*samples, strict=True)])
    for alpha in (0.05, 0.01):
        assert (p_values < alpha).mean() <= alpha + 5 * np.sqrt(alpha * (1 - alpha) / draws)


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_another_mix_is_found(calibration, mix):
    drift = ee.ExitDrift(with_mix(calibration, mix), window=500)
    other = 0.8 * np.array(mix) + 0.2 * np.array(mix)[::-1] if mix[0] != mix[-1] else [0.4, 0.25, 0.2, 0.15]
    drift.observe(drawn(mix, 500))
    assert not drift.drifting and drift.distance < 0.07
    drift.observe(drawn(other, 500))
    assert drift.drifting and drift.p_value < 1e-3
    assert drift.distance == pytest.approx(np.abs(np.array(other) - mix).sum() / 2, abs=0.07)


def test_one_warning_until_the_mix_has_recovered(calibration, caplog):
    drift = ee.ExitDrift(with_mix(calibration, MIXES[0]), window=100)
    warnings = []
    for mix in (MIXES[0], MIXES[2], MIXES[2], MIXES[0], MIXES[2]):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="earlyexit_kernels"):
            drift.observe(drawn(mix, 100))
        warnings.append([record.getMessage() for record in caplog.records])
    assert [len(found) for found in warnings] == [0, 1, 0, 0, 1]
    assert "the last 100 rows leave at other layers than the 1000 rows" in warnings[1][0]
    assert "calibrated 25% 25% 25% 25%" in warnings[1][0] and "calibrate again" in warnings[1][0]


def test_windows_do_not_depend_on_how_the_rows_arrive(calibration):
    rows = np.concatenate([drawn(MIXES[0], 250), drawn(MIXES[2], 155, seed=1)])
    whole, parts, single = (ee.ExitDrift(with_mix(calibration, MIXES[0]), window=100) for _ in range(3))
    whole.observe(rows)
    for part in np.split(rows, [7, 7, 100, 333]):
        parts.observe(torch.from_numpy(part))
    for row in rows.tolist():
        single.observe([row])
    for drift in (whole, parts, single):
        assert (drift.tests, drift.rows, drift.drifting) == (4, 100, True)
        assert drift.observed == whole.observed == tuple((rows[-100:] == k).mean() for k in range(1, 5))


def test_without_rows(calibration):
    drift = ee.ExitDrift(with_mix(calibration, MIXES[1]))
    drift.observe([])
    assert (drift.rows, drift.tests, drift.drifting, drift.distance, drift.p_value) == (0, 0, False, 0.0, 1.0)
    assert drift.observed == (0.0,) * 4 and drift.expected == tuple(MIXES[1])


def test_copies_start_without_rows(calibration):
    drift = ee.ExitDrift(with_mix(calibration, MIXES[1]), window=70, alpha=0.01)
    drift.observe([1, 2])
    twin = copy.deepcopy(drift)
    assert (twin.rows, twin.window, twin.alpha, twin.calibration) == (0, 70, 0.01, drift.calibration)


@pytest.mark.parametrize("layers", [[0], [5], [1.5], [[1, 2]], ["1"], [True], 1])
def test_other_values_than_layers_are_refused(calibration, layers):
    drift = ee.ExitDrift(with_mix(calibration, MIXES[0]))
    with pytest.raises(ValueError, match=r"expected layers \[N\] from 1 to 4"):
        drift.observe(layers)
    assert drift.rows == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"window": 0}, "whole number at least 1"), ({"alpha": 0}, r"in \(0, 1\)"), ({"alpha": 1.0}, r"in \(0, 1\)")],
)
def test_arguments_are_checked(calibration, arguments, words):
    with pytest.raises(ValueError, match=words):
        ee.ExitDrift(calibration, **arguments)


def test_a_model_without_a_calibration_is_refused():
    with pytest.raises(TypeError, match="expected a calibration, got NoneType"):
        ee.ExitDrift(None)
