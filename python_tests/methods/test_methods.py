"""All training methods on two kinds of backbone, trained phase by phase on a small batch that they can fit."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from support.method_cases import FREEZING, METHOD_CASES, MULTI, PHASED, REGRESSION, method_case
from support.models import CLASSES, batch_for, stock

import earlyexit_kernels as ee
from earlyexit_kernels import methods
from earlyexit_kernels.methods import METHODS

FAMILIES = ("bert", "albert")
TINY = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "initializer_range": 0.08,
}
DEPTH, ROWS = 3, 64
LENGTHS = [3 + i * 5 % 4 for i in range(ROWS)]
LABELS = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
STEPS, STEPS_IN_EPOCH, RATE = 24, 6, 5e-3
#: The bias of a key shifts all scores of a query equally, so its gradient is zero up to rounding.
NO_GRADIENT = re.compile(r"\.key\.bias$")


@dataclass
class PhaseRecord:
    """What happened to the parameters in one phase, by name; `astray` got a gradient without being trained."""

    trains: set[str]
    learns: set[str]
    reached: set[str] = field(default_factory=set)
    astray: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)
    losses: list[float] = field(default_factory=list)
    exits: list[list[float]] = field(default_factory=list)


def converted(family, name, **sizes):
    return ee.to_early_exit(stock(family, dropout=0.0, **{**TINY, **sizes}), method=name)


def train(model, batch, labels, *, steps=STEPS, of_exit=F.cross_entropy):
    """Train each phase with an optimiser over all parameters, so that unexpected gradients are detected."""
    told = []
    for number, phase in enumerate(ee.phases(model)):
        model.train()
        parameters = dict(model.named_parameters())
        pattern = METHOD_CASES[model.method.name].trains[number]
        now = PhaseRecord(
            {n for n in parameters if re.match(pattern, n)}, {n for n, p in parameters.items() if p.requires_grad}
        )
        before = {n: p.detach().clone() for n, p in parameters.items()}
        optimiser = torch.optim.Adam(parameters.values(), lr=RATE)
        assert phase.number == number + 1
        for step in range(steps):
            model.schedule.set_progress(step, step / STEPS_IN_EPOCH)
            out = model(**batch, labels=labels)
            optimiser.zero_grad()
            out.loss.backward()
            gradients = {n for n, p in parameters.items() if p.grad is not None}
            now.astray |= gradients - now.learns
            now.reached |= {n for n in gradients if parameters[n].grad.abs().max() > 0}
            optimiser.step()
            now.losses.append(out.loss.item())
            if step in (0, steps - 1):
                now.exits.append([of_exit(out.all_logits[:, k], labels).item() for k in range(model.depth)])
        now.moved = {n for n, p in parameters.items() if not torch.equal(p, before[n])}
        told.append(now)
        model.zero_grad()
    return told


def trained(family, name):
    """Return a trained model, its batch and the record of its training; cached for each method."""
    return _trained(family, METHODS[name].name)


@functools.cache
def _trained(family, name):
    model = converted(family, name)
    batch = batch_for(model, lengths=LENGTHS)
    return model, batch, train(model, batch, LABELS)


def families_and_methods(names=tuple(METHODS)):
    """Parametrise a test over families and methods."""
    return lambda test: pytest.mark.parametrize("family", FAMILIES)(pytest.mark.parametrize("name", names)(test))


def test_every_method_has_a_row():
    assert set(METHOD_CASES) == {cls.name for cls in METHODS.values()}
    assert all(METHODS[name].rule == case.rule.name for name, case in METHOD_CASES.items())
    assert {name for name in METHOD_CASES if len(METHODS[name]().phases) > 1} == set(PHASED)


@pytest.mark.sample(4)
@families_and_methods()
def test_training_fits_a_small_batch(family, name):
    """With the default criterion of the method, and with the rule of its paper.

    A second phase that trains exits which the first has trained can only gain less.
    """
    model, batch, told = trained(family, name)
    shares = [0.5] * len(told) if name in FREEZING else [0.5, 1.0]
    assert all(phase.losses[-1] < share * phase.losses[0] for phase, share in zip(told, shares, strict=False))
    model.eval()
    model.set_criterion(method_case(name).rule if model.method.answering() else None)
    assert (model(**batch).logits.argmax(1) == LABELS).float().mean() >= 0.95
    model.set_criterion(method_case(name).rule)
    out = model(**batch)
    assert (out.logits.argmax(1) == LABELS).float().mean() >= 0.95
    assert name == "dact" or (out.layers_run < DEPTH).float().mean() > 0.2


@families_and_methods(FREEZING)
def test_second_phase_trains_early_exits_only(family, name):
    _, _, (_, told) = trained(family, name)
    before, after = told.exits
    assert all(late < 0.5 * early for early, late in zip(before[:-1], after, strict=False))
    assert before[-1] == after[-1]


@families_and_methods()
def test_only_the_parts_of_a_phase_change(family, name):
    for told in trained(family, name)[2]:
        assert told.learns == told.trains
        assert not told.astray
        assert {n for n in told.trains - told.reached if not NO_GRADIENT.search(n)} == set()
        assert told.moved <= told.trains and told.trains - told.moved <= told.trains - told.reached


@pytest.mark.sample(3)
@families_and_methods()
def test_all_parts_are_trainable_after_the_phases(family, name):
    model = converted(family, name).train()
    for _ in ee.phases(model):
        pass
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    assert (model.schedule.phase is None) is (name in PHASED)
    with pytest.raises(KeyError):
        for phase in ee.phases(model):
            if phase.number == len(model.method.phases):
                raise KeyError
    for phase in ee.phases(model):
        if phase.number == len(model.method.phases):
            break
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


@pytest.mark.parametrize("name", METHODS)
def test_parameters_frozen_by_the_user_stay_frozen(name):
    model = converted("bert", name)
    frozen = {n: p for n, p in model.named_parameters() if "embeddings" in n or re.match(r"heads\.out\.0\.", n)}
    assert len(frozen) >= 6
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    before = {n: p.clone() for n, p in frozen.items()}
    for told in train(model, batch_for(model, lengths=LENGTHS[:8]), LABELS[:8], steps=2):
        assert told.learns == told.trains - set(frozen) and not told.astray & set(frozen)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(frozen)
    assert all(torch.equal(p, before[n]) for n, p in frozen.items())


@pytest.mark.parametrize("by_user", [False, True])
@pytest.mark.parametrize("name", FREEZING)
def test_a_frozen_encoder_runs_without_dropout(name, by_user):
    """Its hidden states are equal in two passes, and differ while it is trained; the exits apply dropout in both."""
    model = ee.to_early_exit(stock("bert", dropout=0.4, **TINY), method=name).train()
    for parameter in model.backbone.embeddings.parameters():
        parameter.requires_grad_(not by_user)
    batch = batch_for(model, lengths=LENGTHS[:8])
    seen = []
    model.backbone.encoder.layer[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    for phase in ee.phases(model):
        model.train()
        assert model.heads.training
        frozen = phase.number == 2
        assert all(module.training is not frozen for module in model.backbone.modules())
        seen.clear()
        model.schedule.set_progress(0, 0.0)
        once, again = model(**batch).all_logits, model(**batch).all_logits
        hidden = [out[0] if isinstance(out, tuple) else out for out in seen]
        assert len(hidden) == 2 and torch.equal(*hidden) is frozen
        assert not torch.equal(once[:, 0], again[:, 0])
        model.eval()
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["fastbert", "smartbert"])
def test_other_frozen_parts_run_without_dropout(name):
    """In the second phase FastBERT's teacher and the layers that SmartBERT's gates skip are deterministic."""
    model = ee.to_early_exit(stock("bert", dropout=0.4, **TINY), method=name).train()
    batch = batch_for(model, lengths=LENGTHS)
    model.schedule.enter(model, 1)
    inputs = []
    model.backbone.encoder.layer[2].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    once, again = model(**batch).logits, model(**batch).logits
    assert torch.equal(*inputs) and (name == "smartbert" or torch.equal(once, again))


@pytest.mark.parametrize("problem_type", [MULTI, REGRESSION])
@pytest.mark.parametrize("name", METHODS)
def test_methods_refuse_undefined_tasks(name, problem_type):
    able = {other for other in METHODS if problem_type in method_case(other).tasks}
    base = stock("bert", num_labels=1 if problem_type == REGRESSION else CLASSES, problem_type=problem_type, **TINY)
    if name in able:
        assert ee.to_early_exit(base, method=name).problem_type == problem_type
        return
    with pytest.raises(ValueError, match=f"is defined for .*problem_type='{problem_type}'") as error:
        ee.to_early_exit(base, method=name)
    named = str(error.value).partition("methods for that: ")[2]
    assert all(f"'{other}'" in named for other in able) and f"'{name}'" not in named
    model = ee.to_early_exit(base, method="joint")
    with pytest.raises(ValueError, match="is defined for"):
        next(iter(ee.phases(model, name)))


@pytest.mark.parametrize("name", ["joint", "palbert", "deebert", "berxit"])
def test_regression(name):
    model = converted("bert", name, num_labels=1)
    batch = batch_for(model, lengths=LENGTHS[:32])
    values = torch.linspace(-1, 2, 32)[torch.randperm(32)]
    told = train(model, batch, values, of_exit=lambda z, y: F.mse_loss(z[:, 0], y))
    out = model.eval()(**batch, labels=values)
    assert F.mse_loss(out.logits[:, 0], values) < 0.05 < values.var() / 2
    assert out.loss == pytest.approx(F.mse_loss(out.logits[:, 0], values).item(), abs=1e-6)
    assert all(late < 0.5 * early for early, late in zip(*told[-1].exits, strict=True) if early > 0.05)
    if name in ("palbert", "berxit"):
        model.set_criterion(method_case(name).rule)
        assert model(**batch).logits.shape == (32, 1)


@pytest.mark.sample(3)
@families_and_methods()
def test_save_and_load(family, name, tmp_path):
    method = method_case(name).otherwise
    defaults = type(method)()
    assert all(getattr(method, argument) != getattr(defaults, argument) for argument in vars(method))
    model = converted(family, method)
    batch = batch_for(model, lengths=LENGTHS[:8])
    expected = model(**batch)
    model.save_pretrained(tmp_path)
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.method == method and loaded.heads.config == model.heads.config
    assert loaded.criterion == model.criterion
    out = loaded(**batch)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.exit_layer, expected.exit_layer) and torch.equal(out.layers_run, expected.layers_run)
    loaded.set_criterion(None)
    model.set_criterion(None)
    for loose in (loaded, model):
        loose.schedule.enter(loose, len(method.phases) - 1)
        loose.train().schedule.set_progress(1, 0.0)
    assert torch.equal(loaded(**batch, labels=LABELS[:8]).loss, model(**batch, labels=LABELS[:8]).loss)


@pytest.mark.parametrize("name", PHASED)
def test_labels_outside_of_a_phase(name):
    """In train mode labels are refused, since the phase is unknown; without labels, and in eval mode, they are not."""
    model = converted("bert", name)
    batch = batch_for(model, lengths=LENGTHS[:8])
    assert torch.isfinite(model(**batch, labels=LABELS[:8]).loss)
    model.train()
    assert model(**batch).loss is None
    with pytest.raises(ValueError, match=r"2 phases and none is entered.*phases\(model\)"):
        model(**batch, labels=LABELS[:8])
    next(iter(ee.phases(model)))
    with pytest.raises(ValueError, match="none is entered"):
        model(**batch, labels=LABELS[:8])


@pytest.mark.parametrize("name", ["berxit", "smartbert"])
def test_methods_that_depend_on_steps_or_epochs_require_them(name):
    model = converted("bert", name)
    batch = batch_for(model, lengths=LENGTHS[:8])
    for _ in range(2):
        for phase in ee.phases(model):
            model.train()
            if phase.number == 1:
                with pytest.raises(ValueError, match=r"callbacks=phase\.callbacks\(\)"):
                    model(**batch, labels=LABELS[:8])
                model.schedule.set_progress(1, 0.1)
            assert torch.isfinite(model(**batch, labels=LABELS[:8]).loss)


def test_phase_of_the_halting_head():
    model = converted("bert", methods.Palbert(halting_phase=True))
    batch, labels = batch_for(model, lengths=LENGTHS[:8]), LABELS[:8]
    ponder, halting = ee.phases(model)
    assert ponder.spec.trains == set(methods.PARTS) and halting.spec.other_rows
    model.schedule.enter(model, 1)
    model.train()(**batch, labels=labels).loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {n for n, p in model.named_parameters() if n.startswith("heads.halting.")}
    assert all(p.requires_grad == n.startswith("heads.halting.") for n, p in model.named_parameters())


def test_phases_of_dact():
    """The first phase leaves the halting outputs as they are; the paper's first phase the early exits too."""
    wanted = {"joint": r"(?!heads\.halting\.)", "last": r"backbone\.|heads\.(dense|out\.2)\."}
    for start, pattern in wanted.items():
        model = converted("bert", methods.Dact(start=start))
        names = dict(model.named_parameters())
        first, second = ({n for n, p in names.items() if p.requires_grad} for _ in ee.phases(model))
        assert first == {n for n in names if re.match(pattern, n)} and second == set(names)
    (only,) = ee.phases(ee.to_early_exit(model, method=methods.Dact(start=None)))
    assert only.name == "dact"


def test_berxit_of_two_stages():
    model = converted("bert", methods.Berxit(strategy="two_stage"))
    names = dict(model.named_parameters())
    wanted = (r"backbone\.|heads\.(dense|out)\.2\.", r"heads\.(dense|out)\.[01]\.|heads\.uncertainty\.")
    for phase, pattern in zip(ee.phases(model), wanted, strict=True):
        assert {n for n, p in names.items() if p.requires_grad} == {n for n in names if re.match(pattern, n)}, (
            phase.name
        )


def test_phases_of_another_method():
    """A method that requires other exits is refused with the fix; one that fits is used and saved."""
    model = converted("bert", "deebert")
    assert [phase.name for phase in ee.phases(model, "joint")] == ["joint"]
    assert model.method == methods.Joint() and model.config.method == methods.Joint().to_dict()
    for name, lacks in (("palbert", "halting"), ("smartbert", "gates"), ("berxit", "uncertainty")):
        with pytest.raises(ValueError, match=rf"{lacks}.*to_early_exit\(\.\.\., method='{name}'\)"):
            next(iter(ee.phases(model, name)))
    assert model.method == methods.Joint()


def test_an_unknown_method():
    with pytest.raises(ValueError, match=r"method: expected one of \[.*'smartbert'.*\], got 'smrtbert'"):
        ee.to_early_exit(stock("bert", **TINY), method="smrtbert")
