"""Properties of all training methods: gradients, row order, ignored labels, extreme values, missing inputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.loss_cases import CASES, DEPTH, ROWS, SINGLE, Case, rebuilt, take, tensors

from earlyexit_kernels.methods import METHODS, Berxit, Ensemble, Smartbert, TrainingStep, distributed_mean
from earlyexit_kernels.types import ExitTrace, Gating


def cases(wanted):
    """Parametrise a test over the cases that `wanted` selects."""
    names = [name for name, case in CASES.items() if wanted(case)]
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


every_case = cases(lambda case: True)


def gradients(case: Case, trace: ExitTrace, labels) -> dict[str, torch.Tensor]:
    values = tensors(trace)
    reached = torch.autograd.grad(case.loss(trace, labels), list(values.values()), allow_unused=True)
    zero = [torch.zeros_like(value) for value in values.values()]
    return dict(zip(values, (z if g is None else g for g, z in zip(reached, zero, strict=True)), strict=True))


def where_nonzero(gradient: torch.Tensor) -> tuple[int, ...]:
    """Return the layers, along dimension 1, that have a gradient in every row."""
    reached = gradient.reshape(ROWS, gradient.shape[1], -1).abs().sum(dim=2) > 0
    assert torch.equal(reached.any(dim=0), reached.all(dim=0)), "some rows only"
    return tuple(reached[0].nonzero()[:, 0].tolist())


def test_the_cases_cover_every_method_and_phase():
    covered = {(type(case.method), case.phase) for case in CASES.values()}
    assert covered >= {(cls, i) for cls in METHODS.values() for i in range(len(cls().phases))}


@every_case
def test_gradients_reach_the_trained_parts_only(case):
    reached = gradients(case, case.trace(), case.labels())
    assert where_nonzero(reached["logits"]) == case.exits
    for name in ("halting", "uncertainty", "gate"):
        assert where_nonzero(reached[name]) == case.aux.get(name, ()), name
    assert bool(reached["projections"].abs().sum(dim=(1, 2)).gt(0).all()) == case.projected
    trains = case.method.phases[case.phase].trains
    parts = {"early_exits": set(case.exits) - {DEPTH - 1}, "last_exit": DEPTH - 1 in case.exits}
    parts |= {"halting": "halting" in case.aux, "uncertainty": "uncertainty" in case.aux, "gates": "gate" in case.aux}
    assert {part for part, learns in parts.items() if learns} <= trains


@cases(lambda case: not case.detached)
def test_gradients_equal_finite_differences(case):
    trace = case.trace()

    def loss(*values):
        return case.loss(rebuilt(trace, dict(zip(tensors(trace), values, strict=True))), case.labels())

    assert loss(*tensors(trace).values()).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, tuple(tensors(trace).values()), eps=1e-6, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("name", ["fastbert, exits", "fastbert, student first"])
def test_teacher_has_no_gradient(name):
    case = CASES[name]
    trace = case.trace()
    teacher = trace.logits[:, -1:].detach()

    def loss(students):
        return case.loss(ExitTrace(torch.cat((students, teacher), dim=1)), None)

    assert torch.autograd.gradcheck(loss, (trace.logits[:, :-1],), atol=1e-7)


def test_uncertainty_of_a_regression_has_no_gradient_into_exits():
    case = CASES["berxit, regression"]
    alone = dataclasses.replace(case, method=Berxit(learned_weight=0.0))
    both, without = (gradients(c, c.trace(), c.labels())["logits"] for c in (case, alone))
    assert torch.equal(both, without)
    trace = case.trace()

    def loss(u):
        return case.loss(ExitTrace(trace.logits.detach(), {"uncertainty": u}), case.labels())

    assert torch.autograd.gradcheck(loss, (trace.aux["uncertainty"],), atol=1e-7)


def test_detached_target_has_no_gradient():
    """The first exit is a target only: its gradient is that of its cross entropy."""
    labels, trace = CASES["ensemble"].labels(), CASES["ensemble"].trace()
    plain, detached, attached = (
        gradients(Case(method), trace, labels)["logits"]
        for method in (Ensemble(diversity=0), Ensemble(detach_target=True), Ensemble())
    )
    assert torch.equal(detached[:, 0], plain[:, 0])
    assert (attached[:, 0] - plain[:, 0]).abs().max() > 1e-3
    assert (detached[:, 1:] - plain[:, 1:]).abs().amin() > 0


@every_case
def test_rows_count_alike_in_any_order_and_in_halves(case):
    trace, labels, order = case.trace(), case.labels(), [4, 0, 5, 2, 1, 3]
    whole = case.loss(trace, labels)
    assert torch.allclose(case.loss(take(trace, order), labels[order]), whole, rtol=1e-13, atol=0)
    halves = [case.loss(take(trace, rows), labels[rows]) for rows in ([0, 1, 2], [3, 4, 5])]
    apart = abs(sum(halves) / 2 - whole)
    assert apart < 1e-12 if case.linear else apart > 1e-5
    assert case.loss(take(trace, []), labels[:0]) == 0


@cases(lambda case: case.problem_type == SINGLE)
def test_unlabelled_rows_have_no_loss(case):
    trace, labels, kept = case.trace(), case.labels(), [0, 1, 3, 4]
    masked = labels.clone()
    masked[[2, 5]] = -100
    assert abs(case.loss(trace, masked) - case.loss(take(trace, kept), labels[kept])) < 1e-13
    reached = gradients(case, trace, masked)
    starts = trace.offsets.tolist()
    for row in (2, 5):
        assert all(reached[name][row].abs().max() == 0 for name in ("logits", *trace.aux))
        assert reached["projections"][:, starts[row] : starts[row + 1]].abs().max() == 0
    nothing = torch.full_like(labels, -100)
    assert case.loss(trace, nothing) == 0
    assert all((gradient == 0).all() for gradient in gradients(case, trace, nothing).values())


@every_case
def test_extreme_numbers_stay_finite(case):
    """Saturated softmaxes, halting values, gates and equal tokens; float32."""
    trace = case.trace(torch.float32)
    g = torch.Generator().manual_seed(2)
    logits = 80.0 * torch.randint(0, 2, trace.logits.shape, generator=g) * 2 - 80.0
    for raw in (80.0, -80.0):
        values = {"logits": logits, **{name: torch.full_like(x, raw) for name, x in trace.aux.items()}}
        for tokens in (torch.zeros_like(trace.projections), torch.full_like(trace.projections, 1e4)):
            extreme = rebuilt(trace, {**values, "projections": tokens.detach()})
            for tensor in tensors(extreme).values():
                tensor.requires_grad_()
            loss = case.loss(extreme, case.labels())
            assert loss.isfinite() and loss.dtype == torch.float32
            assert all(gradient.isfinite().all() for gradient in gradients(case, extreme, case.labels()).values())


@every_case
def test_losses_of_few_layers(case):
    """If there is no exit or pair of a kind, its part of the loss is 0 and differentiable."""
    for depth in (1, 2, 3):
        loss = case.loss(case.trace(depth=depth), case.labels())
        loss.backward()
        assert loss.shape == () and loss.isfinite()
        nothing_learns = depth == 1 and case.exits == (0, 1, 2) and not case.aux
        assert (loss == 0) == nothing_learns


@every_case
def test_half_precision_exits_give_a_float32_loss(case):
    trace = case.trace(torch.bfloat16)
    loss = case.loss(trace, case.labels())
    wide = rebuilt(trace, {name: value.float() for name, value in tensors(trace).items()})
    assert loss.dtype == torch.float32 and torch.equal(loss, case.loss(wide, case.labels()))


@every_case
def test_what_a_loss_lacks_is_named(case):
    """Labels, scalars of the heads or token projections."""
    trace, labels = case.trace(), case.labels()
    if case.method.phases[case.phase].needs_labels:
        with pytest.raises(ValueError, match=r"labels: .* got None"):
            case.loss(trace, None)
    else:
        assert torch.equal(case.loss(trace, None), case.loss(trace, labels))
    for name in case.aux:
        with pytest.raises(ValueError, match=rf"needs heads with the output '{name}', these produce none; .*method="):
            case.loss(ExitTrace(trace.logits), labels)
    if case.projected:
        with pytest.raises(ValueError, match="reads token projections, and the trace has none"):
            case.loss(ExitTrace(trace.logits, trace.aux), labels)


def test_steps_and_epochs_must_be_counted():
    case = CASES["berxit, odd"]
    with pytest.raises(ValueError, match=r"optimiser steps done, got None; .*callbacks=phase.callbacks\(\)"):
        dataclasses.replace(case, step=None).loss(case.trace(), case.labels())
    with pytest.raises(ValueError, match=r"epochs done, got None; .*callbacks=phase.callbacks\(\)"):
        Smartbert().gating(TrainingStep(problem_type=SINGLE))


def test_gates_are_soft_in_the_first_epochs():
    def gating(method, phase, epoch):
        return method.gating(TrainingStep(problem_type=SINGLE, phase=phase, epoch=epoch))

    soft, hard = Gating(False, 0.5), Gating(True, 0.5)

    assert [gating(Smartbert(), 0, epoch) for epoch in (0.0, 2.99, 3.0, 4.5)] == [soft, soft, hard, hard]
    assert gating(Smartbert(), 1, 0.0) == gating(Smartbert(), 1, None) == hard
    assert gating(Smartbert(soft_epochs=0), 0, None) == hard
    assert all(gating(cls(), 0, None) is None for cls in METHODS.values() if cls is not Smartbert)


def test_distributed_mean_of_one_process():
    x = torch.tensor(3.0)
    assert distributed_mean(x) is x
