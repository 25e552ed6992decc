"""Losses worked by hand, and compared with plain Python implementations of the papers' formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support.loss_cases import CASES, DEPTH, LENGTHS, REGRESSION, ROWS, SINGLE, Case

from earlyexit_kernels.methods import (
    Berxit,
    Dact,
    Deebert,
    Ensemble,
    Fastbert,
    Palbert,
    Smartbert,
    TrainingStep,
    mean_task_loss,
    method_of,
)
from earlyexit_kernels.methods.berxit import wrongness
from earlyexit_kernels.methods.dact import mixed_answer
from earlyexit_kernels.methods.palbert import log_posterior, log_prior
from earlyexit_kernels.types import ExitTrace

AT = TrainingStep(problem_type=SINGLE)
ZERO = torch.zeros(1, dtype=torch.long)


def near(*numbers):
    return pytest.approx(numbers, abs=1e-6)


def log(*rows):
    """Return logits ``[1, L, C]`` of one row with these class probabilities."""
    return torch.tensor([rows], dtype=torch.float64).log()


def logit(*numbers):
    """Return raw scalars ``[1, L]`` with these sigmoids."""
    return torch.tensor([numbers], dtype=torch.float64).logit()


@pytest.mark.parametrize("method", ["joint", "pabee"])
def test_joint(method):
    """Losses 1, .5 and .25 with weights 1/6, 2/6 and 3/6."""
    trace = ExitTrace(log(*((math.exp(-x), 1 - math.exp(-x)) for x in (1.0, 0.5, 0.25))))
    assert method_of(method).loss(trace, ZERO, AT).item() == pytest.approx(0.458333, abs=1e-6)


LAMBDA = (0.1, 0.2, 0.5, 0.3)


def test_palbert_prior():
    assert log_prior(0.1, 4).exp().tolist() == near(0.1, 0.09, 0.081, 0.729)
    assert log_prior(0.1, 12).exp().sum().item() == pytest.approx(1)
    assert log_prior(0.1, 1).exp().tolist() == [1.0]


@pytest.mark.parametrize("depth", [2, 3, 6, 12, 24])
def test_palbert_prior_of_a_depth(depth):
    """The last layer has the prior mass that the paper's has: .9^11."""
    prior = Palbert().at_depth(depth).prior
    assert log_prior(prior, depth).exp()[-1].item() == pytest.approx(0.9**11, abs=1e-12)
    assert Palbert().at_depth(6).prior == pytest.approx(0.2069, abs=1e-4)
    assert Palbert().at_depth(12).prior == 0.1 and 0 < Palbert().at_depth(1).prior < 1
    assert Palbert(prior=0.3).at_depth(depth) == Palbert(prior=0.3)


def test_palbert_without_a_prior_reads_the_depth():
    trace = ExitTrace(torch.tensor([[[100.0, -100.0]] * 4]).double(), {"halting": logit(*LAMBDA)})
    given = Palbert(prior=1 - 0.9 ** (11 / 3)).loss(trace, ZERO, AT)
    assert Palbert().loss(trace, ZERO, AT).item() == pytest.approx(given.item(), abs=1e-12)


def test_palbert_posterior():
    for closed, last in ((True, 0.36), (False, 0.108)):
        assert log_posterior(logit(*LAMBDA), close_tail=closed).exp()[0].tolist() == near(0.1, 0.18, 0.36, last)


@pytest.mark.parametrize(
    ("kl", "closed", "wanted"),
    [
        ("posterior_prior", True, 0.407757),
        ("prior_posterior", True, 0.331153),
        ("prior_posterior", False, 1.208849),
    ],
)
def test_palbert_divergence(kl, closed, wanted):
    """beta = 1 and exits with a loss of 0, so that the loss is the divergence."""
    trace = ExitTrace(torch.tensor([[[100.0, -100.0]] * 4]).double(), {"halting": logit(*LAMBDA)})
    loss = Palbert(beta=1, prior=0.1, kl=kl, close_tail=closed).loss(trace, ZERO, AT)
    assert loss.item() == pytest.approx(wanted, abs=1e-6)


def test_palbert_expected_loss():
    """.1 * 4 + .18 * 3 + .36 * 2 + .36 * 1, and .108 at the open end."""
    trace = ExitTrace(log(*((math.exp(-x), 1 - math.exp(-x)) for x in (4, 3, 2, 1))), {"halting": logit(*LAMBDA)})
    for closed, wanted in ((True, 2.02), (False, 1.768)):
        assert Palbert(beta=0, close_tail=closed).loss(trace, ZERO, AT).item() == pytest.approx(wanted)


def test_palbert_regression():
    trace = ExitTrace(torch.tensor([[[1.0], [2.0]]]), {"halting": torch.zeros(1, 2)})
    step = TrainingStep(problem_type=REGRESSION)
    assert Palbert(beta=0).loss(trace, torch.tensor([4.0]), step).item() == pytest.approx(0.5 * 9 + 0.5 * 4)


DACT = ((0.6, 0.4), (0.7, 0.3), (0.2, 0.8), (0.9, 0.1))


def test_dact():
    s = logit(0.7, 0.5, 0.5, 0.5)
    answers = [(0.6, 0.4), (0.63, 0.37), (0.5655, 0.4345), (0.5905875, 0.4094125)]
    for n, wanted in enumerate(answers, start=1):
        a, p = mixed_answer(log(*DACT[:n]).exp(), s[:, :n])
        assert a[0].tolist() == near(*wanted)
        assert p[0].tolist() == near(*(0.3, 0.15, 0.075, 0.0375)[:n])
    trace = ExitTrace(log(*DACT), {"halting": s})
    for include, rho in ((True, 0.5625), (False, 0.525)):
        for start, phase in ((None, 0), ("joint", 1), ("last", 1)):
            step = TrainingStep(problem_type=SINGLE, phase=phase)
            loss = Dact(start=start, ponder=0.2, include_last=include).loss(trace, ZERO, step)
            assert loss.item() == pytest.approx(-math.log(0.5905875) + 0.2 * rho, abs=1e-6)


def test_dact_starts_without_halting():
    """Losses 1, .5 and .25: weights 1/6, 2/6 and 3/6, or the last one."""
    trace = ExitTrace(log(*((math.exp(-x), 1 - math.exp(-x)) for x in (1.0, 0.5, 0.25))))
    for start, wanted in (("joint", 2.75 / 6), ("last", 0.25)):
        assert Dact(start=start).loss(trace, ZERO, AT).item() == pytest.approx(wanted)


def test_dact_limits_the_loss_of_a_wrong_answer():
    trace = ExitTrace(torch.tensor([[[-90.0, 90.0]] * 2]), {"halting": torch.zeros(1, 2)})
    assert Dact(start=None, ponder=0).loss(trace, ZERO, AT).item() == pytest.approx(-math.log(1e-8))


ENSEMBLE = ExitTrace(log((0.6, 0.4), (0.9, 0.1), (0.5, 0.5)))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"diversity": 0}, 1.309333),
        ({}, 1.141594),
        ({"min_over": "batch"}, 1.141594),
        ({"detach_target": True}, 1.141594),
        ({"skip_last": True}, 1.309333 - 0.0984250),
        ({"diversity": 1}, 1.309333 - 0.984250 - 0.693147),
        ({"diversity": 1, "cap": 0.8}, 1.309333 - 0.8 - 0.693147),
        ({"diversity": 1, "cap": 0.5}, 1.309333 - 1.0),
        ({"weights": "depth", "diversity": 0}, 0.5108256 + 2 * 0.1053605 + 3 * 0.6931472),
        ({"weights": "depth"}, 2.8009882 - 0.1 * (2 * 0.984250 + 3 * 0.693147)),
        ({"weights": "depth", "diversity": 1, "skip_last": True}, 2.8009882 - 2 * 0.984250),
        ({"weights": "depth", "diversity": 1, "min_over": "batch", "cap": 0.5}, 2.8009882 - 0.5 * 5),
    ],
)
def test_ensemble(arguments, wanted):
    assert Ensemble(**arguments).loss(ENSEMBLE, ZERO, AT).item() == pytest.approx(wanted, abs=1e-6)


def test_ensemble_by_depth_equals_the_formula():
    case = Case(Ensemble(weights="depth", diversity=0.3))
    p, labels = case.trace().logits.softmax(-1).tolist(), case.labels().tolist()
    total = 0.0
    for row, y in zip(p, labels, strict=True):
        for i, q in enumerate(row):
            nearest = min((-sum(b * math.log(a) for a, b in zip(q, row[j], strict=True)) for j in range(i)), default=0)
            total += (i + 1) * (-math.log(q[y]) - 0.3 * nearest)
    assert case.loss(case.trace(), case.labels()).item() == pytest.approx(total / ROWS, abs=1e-12)


def test_ensemble_minima_over_rows_and_over_the_batch_differ():
    """The third exit is nearest to the first in one row and to the second in the other."""
    a, b = (0.9, 0.1), (0.1, 0.9)
    trace = ExitTrace(torch.cat((log(a, b, a), log(b, a, a))))
    labels = torch.zeros(2, dtype=torch.long)
    same = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    other = -0.9 * math.log(0.1) - 0.1 * math.log(0.9)
    right = Ensemble(diversity=0).loss(trace, labels, AT).item()
    by_row = Ensemble(diversity=1).loss(trace, labels, AT).item()
    by_batch = Ensemble(diversity=1, min_over="batch").loss(trace, labels, AT).item()
    assert right - by_row == pytest.approx(other + same)
    assert right - by_batch == pytest.approx(other + (same + other) / 2)


def test_deebert():
    trace = ExitTrace(log(*((math.exp(-x), 1 - math.exp(-x)) for x in (1.0, 0.5, 0.25))))
    for phase, wanted in ((0, 0.25), (1, 1.5)):
        loss = Deebert().loss(trace, ZERO, TrainingStep(problem_type=SINGLE, phase=phase))
        assert loss.item() == pytest.approx(wanted)


def test_berxit_target():
    z = torch.tensor([[[1.0, 2.0], [2.0, 1.0]], [[3.0, 2.0], [0.0, 1.0]]])
    assert wrongness(z, torch.tensor([1, 1]), SINGLE).tolist() == [[0, 1], [1, 0]]
    by_half = wrongness(torch.tensor([[[1.5], [2.0]]]), torch.tensor([2.0]), REGRESSION)
    assert by_half[0].tolist() == near(0.462117, 0)


@pytest.mark.parametrize(
    ("arguments", "step", "phase", "exits"),
    [
        ({}, 0, 0, (3,)),
        ({}, 1, 0, (1, 2, 3)),
        ({}, 2, 0, (3,)),
        ({"odd_includes_last": False}, 3, 0, (1, 2)),
        ({"odd_includes_last": False}, 4, 0, (3,)),
        ({"strategy": "joint"}, None, 0, (1, 2, 3)),
        ({"strategy": "two_stage"}, None, 1, (1, 2)),
    ],
)
def test_berxit(arguments, step, phase, exits):
    """Exits 1 and 2 are correct, exit 3 is wrong; u = .2, .4, .5, so LTE = (.04 + .16 + .25) / 3."""
    p = {1: 0.6, 2: 0.8, 3: 0.4}
    trace = ExitTrace(log(*((x, 1 - x) for x in p.values())), {"uncertainty": logit(0.2, 0.4, 0.5)})
    at = TrainingStep(problem_type=SINGLE, step=step, phase=phase)
    loss = Berxit(learned_weight=2, **arguments).loss(trace, ZERO, at)
    assert loss.item() == pytest.approx(-sum(math.log(p[i]) for i in exits) + 2 * 0.15)


def test_berxit_by_depth():
    """Weights 1/6, 2/6 and 3/6, and the uncertainty as in `test_berxit`."""
    trace = ExitTrace(log((0.6, 0.4), (0.8, 0.2), (0.4, 0.6)), {"uncertainty": logit(0.2, 0.4, 0.5)})
    loss = Berxit(strategy="weight_linear", learned_weight=2).loss(trace, ZERO, AT)
    wanted = -(math.log(0.6) + 2 * math.log(0.8) + 3 * math.log(0.4)) / 6 + 2 * 0.15
    assert loss.item() == pytest.approx(wanted, abs=1e-12)


def test_berxit_two_stages_start_without_the_uncertainty():
    trace = ExitTrace(log((0.6, 0.4), (0.8, 0.2)))
    assert Berxit(strategy="two_stage").loss(trace, ZERO, AT).item() == pytest.approx(-math.log(0.8))


@pytest.mark.parametrize("kl", ["teacher_student", "student_teacher"])
def test_fastbert(kl):
    students, teacher = [(0.6, 0.4), (0.5, 0.5)], (0.9, 0.1)
    trace = ExitTrace(log(*students, teacher))
    pairs = [(teacher, s) if kl == "teacher_student" else (s, teacher) for s in students]
    wanted = sum(p * math.log(p / q) for one, other in pairs for p, q in zip(one, other, strict=True))
    loss = Fastbert(kl=kl).loss(trace, None, TrainingStep(problem_type=SINGLE, phase=1))
    assert loss.item() == pytest.approx(wanted)
    assert Fastbert().loss(trace, ZERO, AT).item() == pytest.approx(-math.log(0.9))


def test_fastbert_equals_kl_div_of_torch():
    case = CASES["fastbert, exits"]
    z = case.trace().logits
    wanted = [F.kl_div(z[:, i].log_softmax(-1), z[:, -1].softmax(-1), reduction="batchmean") for i in range(DEPTH - 1)]
    assert case.loss(ExitTrace(z), None).item() == pytest.approx(sum(wanted).item())


def test_smartbert_gate_term():
    """Twelve gates at .5, lambda = .04: .04 / 6; linear .04 * 6."""
    trace = ExitTrace(torch.tensor([[[100.0, -100.0]] * 12]).double(), {"gate": logit(*[0.5] * 12)})
    for penalty, wanted in (("reciprocal", 0.0066667), ("linear", 0.24)):
        loss = Smartbert(gate_penalty=penalty, contrast_backbone=0).loss(trace, ZERO, AT)
        assert loss.item() == pytest.approx(wanted, abs=1e-7)


def test_smartbert_gates_are_averaged_over_rows_before_the_reciprocal():
    gates = torch.cat((logit(0.2, 0.4), logit(0.6, 0.8)))
    trace = ExitTrace(torch.tensor([[[100.0, -100.0]] * 2] * 2).double(), {"gate": gates})
    loss = Smartbert(gate_weight=1, contrast_backbone=0).loss(trace, torch.tensor([0, 0]), AT)
    assert loss.item() == pytest.approx(1 / (0.4 + 0.6), abs=2e-6)


def info_nce(a, b, temperature, positive):
    """Return the mean over the tokens of one sequence, from vectors as lists of floats."""

    def cosine(x, y):
        return sum(p * q for p, q in zip(x, y, strict=True)) / math.dist(x, [0] * len(x)) / math.dist(y, [0] * len(y))

    total = 0.0
    for t, anchor in enumerate(a):
        share = [math.exp(cosine(anchor, other) / temperature) for other in b]
        below = sum(share) if positive else sum(share) - share[t]
        total -= math.log(share[t] / below) if below > 0 else 0.0
    return total / len(a)


def contrast(trace, temperature, positive):
    """Return the sum over successive projections of the mean over sequences."""
    projections, ends = trace.projections.tolist(), trace.offsets.tolist()
    total = 0.0
    for first, second in itertools.pairwise(projections):
        for i, end in itertools.pairwise(ends):
            total += info_nce(first[i:end], second[i:end], temperature, positive)
    return total / ROWS


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("phase", [0, 1])
def test_smartbert_equals_a_plain_implementation(phase, positive):
    """Sequences of 1 to 5 tokens; that of one token has no negatives."""
    assert 1 in LENGTHS
    eta, temperature = (0.01, 0.5) if phase == 0 else (0.05, 0.55)
    method = Smartbert(positive_backbone=positive, positive_exits=positive)
    case = Case(method, phase=phase)
    trace, labels = case.trace(), case.labels()
    losses = [mean_task_loss(trace.logits[:, i], labels, SINGLE).item() for i in range(DEPTH)]
    pairs = contrast(trace, temperature, positive)
    if phase == 0:
        gate = 0.04 / trace.aux["gate"].sigmoid().mean(dim=0).sum().item()
        wanted = (1 - eta) * (losses[-1] + gate) + eta * pairs
    else:
        wanted = (1 - eta) * sum(losses[:-1]) + eta / (DEPTH - 2) * pairs
    assert case.loss(trace, labels).item() == pytest.approx(wanted, abs=1e-7)


def test_contrast_of_one_token_is_zero():
    """With the positive in the denominator the loss is log 1 = 0; without it there are no terms, and it is 0 too."""
    trace = ExitTrace(log((0.5, 0.5), (0.5, 0.5)), {"gate": logit(0.5, 0.5)}, projections=torch.rand(2, 1, 3).double())
    trace = ExitTrace(trace.logits, trace.aux, projections=trace.projections, offsets=torch.tensor([0, 1]).int())
    for positive in (True, False):
        method = Smartbert(positive_backbone=positive, contrast_backbone=1)
        assert method.loss(trace, ZERO, AT).item() == pytest.approx(0, abs=1e-12)


def test_contrast_worked_example():
    """Two orthogonal tokens, equal in both layers, t = .5: -log(e^2 / (e^2 + 1)), or -log(e^2) without the positive."""
    trace = ExitTrace(
        log((0.5, 0.5), (0.5, 0.5)),
        {"gate": logit(0.5, 0.5)},
        projections=torch.eye(2).double().expand(2, 2, 2) * 3,
        offsets=torch.tensor([0, 2]).int(),
    )
    for positive, wanted in ((True, math.log1p(math.exp(-2))), (False, -2.0)):
        method = Smartbert(positive_backbone=positive, contrast_backbone=1)
        assert method.loss(trace, ZERO, AT).item() == pytest.approx(wanted)
