"""Losses worked by hand, and compared with plain Python implementations of the papers' formulas."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from support.loss_cases import DEPTH, LENGTHS, REGRESSION, ROWS, SINGLE, Case
from torch import Tensor

from earlyexit_kernels.methods import (
    Berxit,
    Dact,
    Deebert,
    Ensemble,
    Fastbert,
    Joint,
    Method,
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


def near(*numbers):
    return pytest.approx(numbers, abs=1e-6)


def log(*rows) -> Tensor:
    """Return logits ``[1, L, C]`` of one row with these class probabilities."""
    return torch.tensor([rows], dtype=torch.float64).log()


def logit(*numbers) -> Tensor:
    """Return raw scalars ``[1, L]`` with these sigmoids."""
    return torch.tensor([numbers], dtype=torch.float64).logit()


def losing(*losses) -> Tensor:
    """Return logits of exits with these cross entropies for class 0."""
    return log(*((math.exp(-x), 1 - math.exp(-x)) for x in losses))


def certain(exits: int, rows: int = 1) -> Tensor:
    """Return logits of exits without a loss for class 0."""
    return torch.tensor([[[100.0, -100.0]] * exits] * rows).double()


AT = TrainingStep(problem_type=SINGLE)


@dataclasses.dataclass(frozen=True)
class Worked:
    """A loss worked by hand; the label of each row is 0 unless it is given."""

    method: Method
    trace: ExitTrace
    loss: float
    labels: tuple[float, ...] | None = None
    step: TrainingStep = AT


def at(**position) -> TrainingStep:
    return TrainingStep(**{"problem_type": SINGLE, **position})


LAMBDA = (0.1, 0.2, 0.5, 0.3)
#: Exits without a loss, so that PALBERT's loss is the divergence.
DIVERGENCE = ExitTrace(certain(4), {"halting": logit(*LAMBDA)})
EXPECTED = ExitTrace(losing(4, 3, 2, 1), {"halting": logit(*LAMBDA)})
THREE = ExitTrace(losing(1.0, 0.5, 0.25))
DACT = ((0.6, 0.4), (0.7, 0.3), (0.2, 0.8), (0.9, 0.1))
MIXED = ExitTrace(log(*DACT), {"halting": logit(0.7, 0.5, 0.5, 0.5)})
ENSEMBLE = ExitTrace(log((0.6, 0.4), (0.9, 0.1), (0.5, 0.5)))
#: Exits 1 and 2 are correct, exit 3 is wrong; u = .2, .4, .5, so LTE = (.04 + .16 + .25) / 3.
P = (0.6, 0.8, 0.4)
UNCERTAIN = ExitTrace(log(*((p, 1 - p) for p in P)), {"uncertainty": logit(0.2, 0.4, 0.5)})
STUDENTS, TEACHER = ((0.6, 0.4), (0.5, 0.5)), (0.9, 0.1)
TAUGHT = ExitTrace(log(*STUDENTS, TEACHER))
GATED = ExitTrace(certain(12), {"gate": logit(*[0.5] * 12)})
GATES_OF_TWO_ROWS = ExitTrace(certain(2, rows=2), {"gate": torch.cat((logit(0.2, 0.4), logit(0.6, 0.8)))})


def projecting(projections: Tensor) -> ExitTrace:
    """Return a trace of two exits and one row with these token projections ``[2, T, P]``."""
    offsets = torch.tensor([0, projections.shape[1]]).int()
    logits, aux = log((0.5, 0.5), (0.5, 0.5)), {"gate": logit(0.5, 0.5)}
    return ExitTrace(logits, aux, projections=projections.double(), offsets=offsets)


ONE_TOKEN = projecting(torch.tensor([[[0.2, 0.5, 0.1]], [[0.7, 0.3, 0.9]]]))
#: Two orthogonal tokens, equal in both layers.
ORTHOGONAL = projecting(torch.eye(2).expand(2, 2, 2) * 3)


def divergence(one, other) -> float:
    return sum(p * math.log(p / q) for p, q in zip(one, other, strict=True))


def told(*exits) -> float:
    """Return the cross entropies of some exits of `UNCERTAIN`, and twice its uncertainty term."""
    return -sum(math.log(P[k - 1]) for k in exits) + 2 * 0.15


WORKED = [
    *(
        Worked(method, THREE, (1.0 + 2 * 0.5 + 3 * 0.25) / 6)
        for method in (Joint(), method_of("pabee"), Joint(equilibrium=True))
    ),
    Worked(Palbert(beta=1, prior=0.1, kl="posterior_prior"), DIVERGENCE, 0.407757),
    Worked(Palbert(beta=1, prior=0.1), DIVERGENCE, 0.331153),
    Worked(Palbert(beta=1, prior=0.1, close_tail=False), DIVERGENCE, 1.208849),
    Worked(Palbert(beta=0), EXPECTED, 0.1 * 4 + 0.18 * 3 + 0.36 * 2 + 0.36 * 1),
    Worked(Palbert(beta=0, close_tail=False), EXPECTED, 0.1 * 4 + 0.18 * 3 + 0.36 * 2 + 0.108 * 1),
    Worked(
        Palbert(beta=0),
        ExitTrace(torch.tensor([[[1.0], [2.0]]]), {"halting": torch.zeros(1, 2)}),
        0.5 * 9 + 0.5 * 4,
        (4.0,),
        at(problem_type=REGRESSION),
    ),
    *(
        Worked(Dact(start=start, ponder=0.2, include_last=last), MIXED, -math.log(0.5905875) + 0.2 * rho, None, step)
        for last, rho in ((True, 0.5625), (False, 0.525))
        for start, step in ((None, at()), ("joint", at(phase=1)), ("last", at(phase=1)))
    ),
    Worked(Dact(start="joint"), THREE, 2.75 / 6),
    Worked(Dact(start="last"), THREE, 0.25),
    # the loss of a wrong answer is limited
    Worked(
        Dact(start=None, ponder=0), ExitTrace(-certain(2), {"halting": torch.zeros(1, 2).double()}), -math.log(1e-8)
    ),
    *(
        Worked(Ensemble(**arguments), ENSEMBLE, loss)
        for arguments, loss in (
            ({"diversity": 0}, 1.309333),
            ({}, 1.141594),
            ({"min_over": "batch"}, 1.141594),
            ({"detach_target": True}, 1.141594),
            ({"skip_last": True}, 1.309333 - 0.0984250),
            ({"diversity": 1}, 1.309333 - 0.984250 - 0.693147),
            ({"diversity": 1, "cap": 0.8}, 1.309333 - 0.8 - 0.693147),
            ({"weights": "depth", "diversity": 0}, 0.5108256 + 2 * 0.1053605 + 3 * 0.6931472),
            ({"weights": "depth"}, 2.8009882 - 0.1 * (2 * 0.984250 + 3 * 0.693147)),
            ({"weights": "depth", "diversity": 1, "skip_last": True}, 2.8009882 - 2 * 0.984250),
            ({"weights": "depth", "diversity": 1, "min_over": "batch", "cap": 0.5}, 2.8009882 - 0.5 * 5),
        )
    ),
    Worked(Deebert(), THREE, 0.25),
    Worked(Deebert(), THREE, 1.5, None, at(phase=1)),
    *(
        Worked(Berxit(learned_weight=2, **arguments), UNCERTAIN, told(*exits), None, step)
        for arguments, step, exits in (
            ({}, at(step=0), (3,)),
            ({}, at(step=1), (1, 2, 3)),
            ({}, at(step=2), (3,)),
            ({"odd_includes_last": False}, at(step=3), (1, 2)),
            ({"odd_includes_last": False}, at(step=4), (3,)),
            ({"strategy": "joint"}, at(), (1, 2, 3)),
            ({"strategy": "two_stage"}, at(phase=1), (1, 2)),
        )
    ),
    Worked(
        Berxit(strategy="weight_linear", learned_weight=2),
        UNCERTAIN,
        -(math.log(0.6) + 2 * math.log(0.8) + 3 * math.log(0.4)) / 6 + 2 * 0.15,
    ),
    # the first stage needs no uncertainty
    Worked(Berxit(strategy="two_stage"), ExitTrace(UNCERTAIN.logits), -math.log(0.4)),
    Worked(Fastbert(), TAUGHT, -math.log(0.9)),
    Worked(Fastbert(), TAUGHT, sum(divergence(TEACHER, s) for s in STUDENTS), None, at(phase=1)),
    Worked(Fastbert(kl="student_teacher"), TAUGHT, sum(divergence(s, TEACHER) for s in STUDENTS), None, at(phase=1)),
    # twelve gates at .5
    Worked(Smartbert(contrast_backbone=0), GATED, 0.04 / 6),
    Worked(Smartbert(contrast_backbone=0, gate_penalty="linear"), GATED, 0.04 * 6),
    # gates are averaged over the rows before the reciprocal
    Worked(Smartbert(gate_weight=1, contrast_backbone=0), GATES_OF_TWO_ROWS, 1 / (0.4 + 0.6)),
    # one token has no negatives
    *(Worked(Smartbert(positive_backbone=p, contrast_backbone=1), ONE_TOKEN, 0.0) for p in (True, False)),
    # t = .5: -log(e^2 / (e^2 + 1)), or -log(e^2) without the positive
    Worked(Smartbert(contrast_backbone=1), ORTHOGONAL, math.log1p(math.exp(-2))),
    Worked(Smartbert(contrast_backbone=1, positive_backbone=False), ORTHOGONAL, -2.0),
]


@pytest.mark.parametrize("case", WORKED, ids=lambda case: f"{case.method.name}-{case.loss:.4f}")
def test_losses_worked_by_hand(case):
    rows = case.trace.logits.shape[0]
    labels = torch.zeros(rows, dtype=torch.long) if case.labels is None else torch.tensor(case.labels)
    assert case.method.loss(case.trace, labels, case.step).item() == pytest.approx(case.loss, abs=2e-6)


def test_palbert_prior_and_posterior():
    assert log_prior(0.1, 4).exp().tolist() == near(0.1, 0.09, 0.081, 0.729)
    assert log_prior(0.1, 12).exp().sum().item() == pytest.approx(1)
    assert log_prior(0.1, 1).exp().tolist() == [1.0]
    for closed, last in ((True, 0.36), (False, 0.108)):
        assert log_posterior(logit(*LAMBDA), close_tail=closed).exp()[0].tolist() == near(0.1, 0.18, 0.36, last)


@pytest.mark.parametrize("depth", [2, 3, 6, 12, 24])
def test_palbert_prior_of_a_depth(depth):
    """The last layer has the prior mass that the paper's has: .9^11."""
    prior = Palbert().at_depth(depth).prior
    assert log_prior(prior, depth).exp()[-1].item() == pytest.approx(0.9**11, abs=1e-12)
    assert Palbert().at_depth(12).prior == 0.1 and 0 < Palbert().at_depth(1).prior < 1
    assert Palbert(prior=0.3).at_depth(depth) == Palbert(prior=0.3)
    given, read = Palbert(prior=1 - 0.9 ** (11 / 3)), Palbert()
    assert read.loss(DIVERGENCE, torch.tensor([0]), at()).item() == pytest.approx(
        given.loss(DIVERGENCE, torch.tensor([0]), at()).item(), abs=1e-12
    )


def test_dact_mixes_the_answers_of_its_exits():
    for n, wanted in enumerate([(0.6, 0.4), (0.63, 0.37), (0.5655, 0.4345), (0.5905875, 0.4094125)], start=1):
        a, p = mixed_answer(log(*DACT[:n]).exp(), MIXED.aux["halting"][:, :n])
        assert a[0].tolist() == near(*wanted)
        assert p[0].tolist() == near(*(0.3, 0.15, 0.075, 0.0375)[:n])


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
    same = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    other = -0.9 * math.log(0.1) - 0.1 * math.log(0.9)
    settings = ({"diversity": 0}, {"diversity": 1}, {"diversity": 1, "min_over": "batch"})
    right, by_row, by_batch = (Ensemble(**s).loss(trace, torch.tensor([0, 0]), at()).item() for s in settings)
    assert right - by_row == pytest.approx(other + same)
    assert right - by_batch == pytest.approx(other + (same + other) / 2)


def test_berxit_target():
    z = torch.tensor([[[1.0, 2.0], [2.0, 1.0]], [[3.0, 2.0], [0.0, 1.0]]])
    assert wrongness(z, torch.tensor([1, 1]), SINGLE).tolist() == [[0, 1], [1, 0]]
    by_half = wrongness(torch.tensor([[[1.5], [2.0]]]), torch.tensor([2.0]), REGRESSION)
    assert by_half[0].tolist() == near(0.462117, 0)


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


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("phase", [0, 1])
def test_smartbert_equals_a_plain_implementation(phase, positive):
    """Sequences of 1 to 5 tokens; that of one token has no negatives."""
    assert 1 in LENGTHS
    eta, temperature = (0.01, 0.5) if phase == 0 else (0.05, 0.55)
    case = Case(Smartbert(positive_backbone=positive, positive_exits=positive), phase=phase)
    trace, labels = case.trace(), case.labels()
    losses = [mean_task_loss(trace.logits[:, i], labels, SINGLE).item() for i in range(DEPTH)]
    pairs = sum(
        info_nce(first[i:end], second[i:end], temperature, positive)
        for first, second in itertools.pairwise(trace.projections.tolist())
        for i, end in itertools.pairwise(trace.offsets.tolist())
    )
    if phase == 0:
        gate = 0.04 / trace.aux["gate"].sigmoid().mean(dim=0).sum().item()
        wanted = (1 - eta) * (losses[-1] + gate) + eta * pairs / ROWS
    else:
        wanted = (1 - eta) * sum(losses[:-1]) + eta / (DEPTH - 2) * pairs / ROWS
    assert case.loss(trace, labels).item() == pytest.approx(wanted, abs=1e-7)
