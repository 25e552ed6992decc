"""`MaxDrop` keeps its word: on average over draws, and where the check rows contradict the tuning rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import earlyexit_kernels as ee
from earlyexit_kernels.tuning.calibrate import split_indices
from earlyexit_kernels.tuning.targets import UnreachableTargetError


def population(rows: int, seed: int = 0) -> tuple[ee.ExitTrace, np.ndarray]:
    """Return a trace of easy and hard rows of three classes, whose exits are better the deeper they are."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=generator)
    ease = 6 * torch.rand(rows, 1, 1, generator=generator)
    noise = torch.randn(rows, 4, 3, generator=generator) * torch.linspace(1.6, 0.6, 4)[:, None]
    return ee.ExitTrace(noise + F.one_hot(labels, 3)[:, None] * ease), labels.numpy()


@pytest.mark.parametrize("criterion", ["entropy", "auto"])
def test_loss_on_other_rows_is_within_the_drop_on_average(criterion):
    trace, labels = population(20_000)
    full = trace.logits[:, -1].argmax(dim=1).numpy() == labels
    losses = []
    for seed in range(25):
        drawn = np.random.default_rng(seed).integers(len(labels), size=600)
        part = trace.take(torch.from_numpy(drawn))
        chosen = ee.calibrate(
            part, labels[drawn], target=ee.MaxDrop(0.005), criterion=criterion, points=16, seed=seed
        ).criterion
        early = ee.replay(trace, chosen)[0].argmax(dim=1).numpy() == labels
        losses.append(full.mean() - early.mean())
    assert 0 < np.mean(losses) <= 0.005


def contradicting(seed: int = 0) -> tuple[ee.ExitTrace, np.ndarray]:
    """Return a trace whose first exit is right on all tuning rows and wrong on a fifth of the check rows.

    Its second exit is right everywhere, and surer of the rows that the first one knows.
    """
    labels = np.arange(400) % 2
    checked = split_indices(400, seed=seed)[1]
    answers = labels.copy()
    answers[checked[::5]] ^= 1
    first = F.one_hot(torch.from_numpy(answers), 2) * 2.0
    second, third = (F.one_hot(torch.from_numpy(labels), 2) * scale for scale in (4.0, 8.0))
    return ee.ExitTrace(torch.stack([first, second, third], dim=1)), labels


def test_a_setting_that_the_check_rows_contradict_is_passed_over_and_said_first():
    trace, labels = contradicting()
    settings = [ee.criteria.Entropy(threshold=(10.0, 0.0)), ee.criteria.Entropy(threshold=(0.0, 10.0))]
    calibration = ee.calibrate(trace, labels, target=ee.MaxDrop(0.01), criterion=settings)
    assert calibration.criterion == settings[1] and calibration.passed_over == 1
    assert calibration.drop == 0 and calibration.target_miss is None
    assert "1 faster setting was passed over" in str(calibration).splitlines()[1]
    assert ee.Calibration.from_dict(calibration.to_dict()) == calibration


def test_a_target_that_the_check_rows_contradict_in_every_setting_is_unreachable():
    trace, labels = contradicting()
    with pytest.raises(UnreachableTargetError, match=r"which loses .* or more on 200 check rows"):
        ee.calibrate(trace, labels, target=ee.MaxDrop(0.01), criterion=[ee.criteria.Entropy(threshold=(10.0, 0.0))])
