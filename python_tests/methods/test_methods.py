"""All training methods on two kinds of backbone, trained phase by phase on a small batch that they can fit."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from support.method_cases import FREEZING, METHOD_CASES, MULTI, PHASED, REGRESSION
from support.models import CLASSES, batch_for, stock

import earlyexit_kernels as ee
from earlyexit_kernels import methods
from earlyexit_kernels.methods import METHODS

TINY = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "initializer_range": 0.08,
}
DEPTH, ROWS, FEW = 3, 32, 8
LENGTHS = [3 + i * 5 % 4 for i in range(ROWS)]
LABELS = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
#: Steps that fit the batch; the gates of SmartBERT become hard at the 19th.
STEPS, STEPS_IN_EPOCH, RATE = 24, 6, 5e-3
#: The bias of a key shifts all scores of a query equally, so its gradient is zero up to rounding.
NO_GRADIENT = re.compile(r"\.key\.bias$")
#: Methods with other settings, and for each phase a pattern of the names of the parameters that learn.
OTHER_SETTINGS = {
    "palbert, halting": (methods.Palbert(halting_phase=True), ("", r"heads\.halting\.")),
    "dact, last": (methods.Dact(start="last"), (r"backbone\.|heads\.(dense|out\.2)\.", "")),
    "dact alone": (methods.Dact(start=None), ("",)),
    "berxit, two stages": (
        methods.Berxit(strategy="two_stage"),
        (r"backbone\.|heads\.(dense|out)\.2\.", r"heads\.(dense|out)\.[01]\.|heads\.uncertainty\."),
    ),
}
every_method = pytest.mark.parametrize("name", METHOD_CASES)


@dataclass
class PhaseRecord:
    """What happened to the parameters in one phase, by name; `astray` got a gradient without being trained."""

    learns: set[str]
    reached: set[str] = field(default_factory=set)
    astray: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)
    losses: list[float] = field(default_factory=list)
    exits: list[list[float]] = field(default_factory=list)


def converted(family, method, **sizes):
    return ee.to_early_exit(stock(family, dropout=0.0, **{**TINY, **sizes}), method=method)


def train(model, batch, labels, *, steps=STEPS, of_exit=F.cross_entropy):
    """Train each phase with an optimiser over all parameters, so that unexpected gradients are detected."""
    told = []
    for number, phase in enumerate(ee.phases(model), start=1):
        model.train()
        parameters = dict(model.named_parameters())
        now = PhaseRecord({n for n, p in parameters.items() if p.requires_grad})
        before = {n: p.detach().clone() for n, p in parameters.items()}
        optimiser = torch.optim.Adam(parameters.values(), lr=RATE)
        assert phase.number == number
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


@functools.cache
def trained(family, name):
    """Return a trained model, its batch and the record of its training."""
    model = converted(family, name)
    batch = batch_for(model, lengths=LENGTHS)
    return model, batch, train(model, batch, LABELS)


def few(model):
    return batch_for(model, lengths=LENGTHS[:FEW])


def test_every_method_has_a_row():
    assert set(METHOD_CASES) == {cls.name for cls in METHODS.values()}
    assert all(METHODS[name].rule == case.rule.name for name, case in METHOD_CASES.items())
    assert {name for name in METHOD_CASES if len(METHODS[name]().phases) > 1} == set(PHASED)


@pytest.mark.parametrize("family", ["bert", pytest.param("albert", marks=pytest.mark.thorough)])
@every_method
def test_training_fits_a_small_batch(family, name):
    """With the default criterion of the method, and with the rule of its paper.

    A second phase that trains exits which the first has trained can only gain less.
    """
    model, batch, told = trained(family, name)
    shares = [0.5] * len(told) if name in FREEZING else [0.5, 1.0]
    assert all(phase.losses[-1] < share * phase.losses[0] for phase, share in zip(told, shares, strict=False))
    if name in FREEZING:
        before, after = told[1].exits
        assert all(late < 0.5 * early for early, late in zip(before[:-1], after, strict=False))
        assert before[-1] == after[-1], "the last exit is frozen"
    model.eval()
    model.set_criterion(METHOD_CASES[name].rule if model.method.answering() else None)
    assert (model(**batch).logits.argmax(1) == LABELS).float().mean() >= 0.95
    model.set_criterion(METHOD_CASES[name].rule)
    out = model(**batch)
    assert (out.logits.argmax(1) == LABELS).float().mean() >= 0.95
    assert name == "dact" or (out.layers_run < DEPTH).float().mean() > 0.2


def of_each_phase():
    """Return family, method and patterns of the names of the parameters that learn in each phase."""
    tables = {name: (name, case.trains) for name, case in METHOD_CASES.items()}
    cases = [("albert", *case) for case in tables.values()]
    return cases + [("bert", *case) for case in (*tables.values(), *OTHER_SETTINGS.values())]


@pytest.mark.parametrize(("family", "method", "patterns"), of_each_phase(), ids=str)
def test_only_the_parts_of_a_phase_change(family, method, patterns):
    """Trained parameters get a gradient and move; all others get none and keep their numbers."""
    if isinstance(method, str) and family == "bert":
        model, _, told = trained(family, method)
    else:
        model = converted(family, method)
        told = train(model, few(model), LABELS[:FEW], steps=2)
    for phase, pattern in zip(told, patterns, strict=True):
        trains = {name for name, _ in model.named_parameters() if re.match(pattern, name)}
        assert phase.learns == trains
        assert not phase.astray
        assert {n for n in trains - phase.reached if not NO_GRADIENT.search(n)} == set()
        assert phase.moved <= trains and trains - phase.moved <= trains - phase.reached


@every_method
def test_all_parts_are_trainable_after_the_phases(name):
    """Also where the loop over the phases ends early, by an error or a break."""
    model = converted("bert", name).train()
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


@every_method
def test_parameters_frozen_by_the_user_stay_frozen(name):
    model = converted("bert", name)
    frozen = {n: p for n, p in model.named_parameters() if "embeddings" in n or re.match(r"heads\.out\.0\.", n)}
    assert len(frozen) >= 6
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    before = {n: p.clone() for n, p in frozen.items()}
    told = train(model, few(model), LABELS[:FEW], steps=2)
    for phase, pattern in zip(told, METHOD_CASES[name].trains, strict=True):
        trains = {n for n, _ in model.named_parameters() if re.match(pattern, n)}
        assert phase.learns == trains - set(frozen) and not phase.astray & set(frozen)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(frozen)
    assert all(torch.equal(p, before[n]) for n, p in frozen.items())


@pytest.mark.parametrize("by_user", [False, True])
@pytest.mark.parametrize("name", FREEZING)
def test_a_frozen_encoder_runs_without_dropout(name, by_user):
    """Its hidden states are equal in two passes, and differ while it is trained; the exits apply dropout in both."""
    model = ee.to_early_exit(stock("bert", dropout=0.4, **TINY), method=name).train()
    for parameter in model.backbone.embeddings.parameters():
        parameter.requires_grad_(not by_user)
    batch, states = few(model), []
    model.backbone.encoder.layer[0].register_forward_hook(lambda module, inputs, output: states.append(output))
    for phase in ee.phases(model):
        model.train()
        assert model.heads.training
        frozen = phase.number == 2
        assert all(module.training is not frozen for module in model.backbone.modules())
        states.clear()
        model.schedule.set_progress(0, 0.0)
        once, again = model(**batch).all_logits, model(**batch).all_logits
        hidden = [out[0] if isinstance(out, tuple) else out for out in states]
        assert len(hidden) == 2 and torch.equal(*hidden) is frozen
        assert not torch.equal(once[:, 0], again[:, 0])
        model.eval()
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["fastbert", "smartbert"])
def test_other_frozen_parts_run_without_dropout(name):
    """In the second phase FastBERT's teacher and the layers that SmartBERT's gates skip are deterministic."""
    model = ee.to_early_exit(stock("bert", dropout=0.4, **TINY), method=name).train()
    batch, inputs = batch_for(model, lengths=LENGTHS), []
    model.schedule.enter(model, 1)
    model.backbone.encoder.layer[2].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    once, again = model(**batch).logits, model(**batch).logits
    assert torch.equal(*inputs) and (name == "smartbert" or torch.equal(once, again))


@pytest.mark.parametrize("problem_type", [MULTI, REGRESSION])
@every_method
def test_methods_refuse_undefined_tasks(name, problem_type):
    able = {other for other, case in METHOD_CASES.items() if problem_type in case.tasks}
    base = stock("bert", num_labels=1 if problem_type == REGRESSION else CLASSES, problem_type=problem_type, **TINY)
    if name in able:
        assert ee.to_early_exit(base, method=name).problem_type == problem_type
        return
    with pytest.raises(ValueError, match=f"is defined for .*problem_type='{problem_type}'") as error:
        ee.to_early_exit(base, method=name)
    named = str(error.value).partition("methods for that: ")[2]
    assert all(f"'{other}'" in named for other in able) and f"'{name}'" not in named
    with pytest.raises(ValueError, match="is defined for"):
        next(iter(ee.phases(ee.to_early_exit(base), name)))


@pytest.mark.parametrize("name", ["joint", "palbert", "deebert", "berxit"])
def test_regression(name):
    model = converted("bert", name, num_labels=1)
    batch = batch_for(model, lengths=LENGTHS[:16])
    values = torch.linspace(-1, 2, 16)[torch.randperm(16)]
    told = train(model, batch, values, of_exit=lambda z, y: F.mse_loss(z[:, 0], y))
    out = model.eval()(**batch, labels=values)
    assert F.mse_loss(out.logits[:, 0], values) < 0.05 < values.var() / 2
    assert out.loss == pytest.approx(F.mse_loss(out.logits[:, 0], values).item(), abs=1e-6)
    assert all(late < 0.5 * early for early, late in zip(*told[-1].exits, strict=True) if early > 0.05)
    if name in ("palbert", "berxit"):
        model.set_criterion(METHOD_CASES[name].rule)
        assert model(**batch).logits.shape == (16, 1)


@pytest.mark.parametrize("family", ["bert", pytest.param("albert", marks=pytest.mark.thorough)])
@every_method
def test_settings_of_a_method_are_saved_with_the_model(family, name, tmp_path):
    method = METHOD_CASES[name].otherwise
    defaults = type(method)()
    assert all(getattr(method, argument) != getattr(defaults, argument) for argument in vars(method))
    model = converted(family, method)
    batch = few(model)
    expected = model(**batch)
    model.save_pretrained(tmp_path)
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.method == method and loaded.heads.config == model.heads.config
    assert loaded.criterion == model.criterion
    out = loaded(**batch)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.exit_layer, expected.exit_layer) and torch.equal(out.layers_run, expected.layers_run)
    for each in (loaded, model):
        each.set_criterion(None)
        each.schedule.enter(each, len(method.phases) - 1)
        each.train().schedule.set_progress(1, 0.0)
    assert torch.equal(loaded(**batch, labels=LABELS[:FEW]).loss, model(**batch, labels=LABELS[:FEW]).loss)


@every_method
def test_a_batch_without_rows_has_no_loss_and_gradients_of_zero(name):
    model = converted("bert", name)
    batch = {key: values[:0] for key, values in few(model).items()}
    for phase in ee.phases(model):
        model.train().schedule.set_progress(phase.number, 0.0)
        loss = model(**batch, labels=LABELS[:0]).loss
        loss.backward()
        learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert loss == 0 and all(not parameter.grad.any() for parameter in learns if parameter.grad is not None)
        assert any(parameter.grad is not None for parameter in learns)
        model.zero_grad()


@pytest.mark.parametrize("name", PHASED)
def test_labels_outside_of_a_phase(name):
    """In train mode labels are refused, since the phase is unknown; without labels, and in eval mode, they are not."""
    model = converted("bert", name)
    batch, labels = few(model), LABELS[:FEW]
    assert torch.isfinite(model(**batch, labels=labels).loss)
    model.train()
    assert model(**batch).loss is None
    with pytest.raises(ValueError, match=r"2 phases and none is entered.*phases\(model\)"):
        model(**batch, labels=labels)
    next(iter(ee.phases(model)))
    with pytest.raises(ValueError, match="none is entered"):
        model(**batch, labels=labels)


@pytest.mark.parametrize("name", ["berxit", "smartbert"])
def test_methods_that_depend_on_steps_or_epochs_require_them(name):
    """In every run of a phase again: the numbers of an earlier one do not count."""
    model = converted("bert", name)
    batch, labels = few(model), LABELS[:FEW]
    for _ in range(2):
        for phase in ee.phases(model):
            model.train()
            if phase.number == 1:
                with pytest.raises(ValueError, match=r"callbacks=phase\.callbacks\(\)"):
                    model(**batch, labels=labels)
                model.schedule.set_progress(1, 0.1)
            assert torch.isfinite(model(**batch, labels=labels).loss)


#: Method of a model, another one whose exits have another shape, and words of the refusal.
UNFIT = [
    ("joint", "fastbert", "'form': 'attention'"),
    ("joint", "deebert", "'exit_dense': 'own'"),
    ("joint", "dact", "'halting': True"),
    ("deebert", "smartbert", "'gates': True"),
    ("deebert", "berxit", "'uncertainty': True"),
    ("fastbert", "smartbert", "'attention_heads': 4"),
    ("palbert", methods.Palbert(halting_input="diff"), "'halting_input': 'diff'"),
]


@pytest.mark.parametrize(("made_for", "asked", "words"), UNFIT)
def test_phases_of_a_method_with_other_exits_are_refused(made_for, asked, words):
    model = converted("bert", made_for)
    before, name = model.config.method, asked if isinstance(asked, str) else asked.name
    with pytest.raises(ValueError, match=rf"trains exits with .*to_early_exit\(\.\.\., method='{name}'\)") as caught:
        next(ee.phases(model, asked))
    assert words in str(caught.value) and model.config.method == before == model.method.to_dict()


@pytest.mark.parametrize(
    ("made_for", "pooling", "asked", "phases"),
    [
        ("deebert", None, "joint", ["joint"]),
        # sharing is irrelevant without a dense module
        ("joint", "mean", "deebert", ["backbone", "exits"]),
        # halting heads may be unused
        ("palbert", None, "joint", ["joint"]),
        (methods.Dact(halting_bias=-1.0), None, "dact", ["exits", "dact"]),
    ],
)
def test_phases_of_a_method_that_fits_are_entered_and_saved(made_for, pooling, asked, phases):
    model = ee.to_early_exit(stock("bert", **TINY), method=made_for, pooling=pooling)
    assert [phase.name for phase in ee.phases(model, asked)] == phases
    assert model.method == METHODS[asked]() and model.config.method == model.method.to_dict()


@pytest.mark.parametrize("phase", [-1, 1, 7])
def test_unknown_phase_is_refused(phase):
    model = converted("bert", "joint")
    with pytest.raises(ValueError, match=f"has phases 0 to 0, got {phase}"):
        model.schedule.enter(model, phase)
    assert model.schedule.phase is not None and model.schedule.phase.name == "joint"


@pytest.mark.parametrize(("method", "form"), [("fastbert", "linear"), ("joint", "attention")])
def test_form_of_the_exits_is_chosen_at_conversion(method, form, tmp_path):
    model = ee.to_early_exit(stock("bert", **TINY), method=method, pooling="mean", form=form)
    assert model.heads.config.form == form and bool(len(model.heads.attention)) == (form == "attention")
    names = [phase.name for phase in ee.phases(model)]
    model.save_pretrained(tmp_path)
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.heads.config.form == form and [phase.name for phase in ee.phases(loaded)] == names
