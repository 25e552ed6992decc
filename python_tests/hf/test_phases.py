"""Training in phases with the stock Trainer: arguments, callbacks, optimizers, resuming."""

from __future__ import annotations

import math
import re

import pytest
import torch
import transformers as tf
from support.method_cases import METHOD_CASES
from support.models import stock
from support.trainers import dataset, training_arguments

import earlyexit_kernels as ee
from earlyexit_kernels import methods
from earlyexit_kernels.hf.training import ProgressCallback

TINY = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
DATA = dataset(16)


def arguments(folder, **changes):
    return training_arguments(folder, **{"per_device_train_batch_size": 4, "learning_rate": 1e-3, **changes})


def converted(method, seed=0):
    torch.manual_seed(0)
    return ee.to_early_exit(stock(seed=seed, **TINY), method=method)


def trainer(model, phase, args, **others):
    settings = {"callbacks": phase.callbacks(), "train_dataset": DATA, **others}
    return tf.Trainer(model=model, args=phase.args(args), **settings)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_every_parameter_of_the_exits_has_a_gradient():
    """DDP waits for all of them, used or not."""
    model = converted("joint")
    trace = ee.ExitTrace(torch.randn(4, 3, 2, requires_grad=True))
    model.schedule.loss(model.heads, trace, torch.tensor([0, 1, 1, 0]), "single_label_classification").backward()
    assert [p.grad.abs().sum().item() for p in model.heads.parameters()] == [0.0] * len(list(model.heads.parameters()))


def test_arguments_of_a_phase(tmp_path):
    base = arguments(tmp_path, num_train_epochs=7)
    before = base.to_dict()
    seen = []
    for phase in ee.phases(converted("smartbert")):
        args = phase.args(base, num_train_epochs=phase.spec.epochs, learning_rate=phase.spec.lr)
        assert isinstance(args, tf.TrainingArguments) and args is not base and args.learning_rate == 2e-5
        changed = {k for k, v in args.to_dict().items() if v != before[k]}
        assert changed <= {"output_dir", "num_train_epochs", "learning_rate"}
        seen.append((phase.number, phase.name, args.output_dir, args.num_train_epochs))
    assert seen == [
        (1, "backbone", str(tmp_path / "phase-1-backbone"), 5.0),
        (2, "exits", str(tmp_path / "phase-2-exits"), 4.0),
    ]
    assert base.to_dict() == before
    (only,) = ee.phases(converted("joint"))
    assert only.args(base, output_dir="elsewhere").output_dir == "elsewhere"
    with pytest.raises((TypeError, ValueError), match="num_epochs"):
        only.args(base, num_epochs=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-3])
def test_invalid_numbers_are_refused(tmp_path, value):
    (phase,) = ee.phases(converted("palbert"))
    for name in ("learning_rate", "weight_decay", "adam_epsilon", "adam_beta1", "num_train_epochs"):
        words = rf"\({name}=...\): expected a finite number .* got {value}"
        with pytest.raises(ValueError, match="phase.args" + words):
            phase.args(arguments(tmp_path), **{name: value})
        base = arguments(tmp_path)
        setattr(base, name, value)
        with pytest.raises(ValueError, match="phase.optimizer" + words):
            phase.optimizer(base)
    for name in ("head_lr", "halting_lr", "gate_lr"):
        with pytest.raises(ValueError, match=rf"phase.optimizer\({name}=...\): expected a finite .* got {value}"):
            phase.optimizer(arguments(tmp_path), **{name: value})


def test_berxit_alternates_by_optimizer_steps(tmp_path, monkeypatch):
    """Also if a step takes two batches."""
    seen, loss = [], methods.Berxit.loss
    monkeypatch.setattr(
        methods.Berxit,
        "loss",
        lambda self, trace, labels, step: seen.append(step) or loss(self, trace, labels, step),
    )
    model = converted("berxit")
    for phase in ee.phases(model):
        trainer(model, phase, arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2)).train()
    assert [step.step for step in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [step.epoch for step in seen] == pytest.approx([0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5])


def test_progress_callback_finds_a_wrapped_model():
    model = converted("berxit")

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    state = tf.TrainerState(global_step=7, epoch=1.25)
    ProgressCallback().on_step_begin(None, state, None, model=Wrapper(Wrapper(model)))
    step = model.schedule.position(model.problem_type)
    assert (step.step, step.epoch, step.phase) == (7, 1.25, 0)


#: Method, rates asked for -> learning rate by prefix of a parameter's name, if it is not the encoder's 1e-3.
RATES = [
    ("joint", {"gate_lr": 7e-4}, {}),
    ("deebert", {"head_lr": 5e-3}, {"heads.": 5e-3}),
    ("palbert", {"halting_lr": 7e-3}, {"heads.halting.": 7e-3}),
    ("dact", {"head_lr": 5e-3, "halting_lr": 7e-3}, {"heads.halting.": 7e-3, "heads.": 5e-3}),
    ("smartbert", {"head_lr": 5e-3}, {"heads.gates.": 1e-3, "heads.": 5e-3}),
    ("smartbert", {"head_lr": 5e-3, "gate_lr": 7e-4}, {"heads.gates.": 7e-4, "heads.": 5e-3}),
]


@pytest.mark.parametrize(("name", "asked", "rates"), RATES)
def test_groups_of_the_optimizer(tmp_path, name, asked, rates):
    """Every trained parameter is listed once; biases, norms and PALBERT's halting heads have no weight decay."""
    model = converted(name)
    args = arguments(tmp_path, weight_decay=0.1, adam_beta1=0.8, adam_epsilon=1e-7)
    for phase in ee.phases(model):
        optimizer = phase.optimizer(phase.args(args), **asked)
        assert isinstance(optimizer, torch.optim.AdamW)
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert set(groups) == set(learning.values())
        plain = {p for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
        for n, p in learning.items():
            group = groups[p]
            assert group["lr"] == next((rate for prefix, rate in rates.items() if n.startswith(prefix)), 1e-3), n
            spared = n.endswith("bias") or p in plain or (name == "palbert" and n.startswith("heads.halting."))
            assert group["weight_decay"] == (0.0 if spared else 0.1), n
            assert group["betas"] == (0.8, 0.999) and group["eps"] == 1e-7


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", METHOD_CASES)
def test_every_method_under_the_stock_trainer(tmp_path, name):
    """Each phase changes only the parts it trains and writes to its own folder; FastBERT's exits need no labels."""
    model = converted(name)
    base = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, weight_decay=0.1)
    folders, with_optimizer = [], name in ("palbert", "smartbert", "berxit")
    for phase in ee.phases(model):
        before = weights(model)
        others = {"optimizers": (phase.optimizer(base, head_lr=2e-3), None)} if with_optimizer else {}
        if not phase.spec.needs_labels:
            others["train_dataset"] = [{k: v for k, v in row.items() if k != "labels"} for row in DATA]
        run = trainer(model, phase, base, **others)
        result = run.train()
        assert result.global_step == 2 and torch.isfinite(torch.tensor(result.training_loss))
        after, learning = weights(model), {n for n, p in model.named_parameters() if p.requires_grad}
        moved = {n for n in after if not torch.equal(after[n], before[n])}
        assert moved <= learning
        assert {n for n in learning - moved if not re.search(r"key\.bias|embeddings", n)} == set()
        if with_optimizer:
            assert {round(group["initial_lr"], 6) for group in run.optimizer.param_groups} <= {1e-3, 2e-3}
        folders.append(f"phase-{phase.number}-{phase.name}/checkpoint-2/model.safetensors")
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.safetensors")) == folders
    got = ee.predict_with_exits(model, DATA)
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained((tmp_path / folders[-1]).parent)
    assert (ee.predict_with_exits(loaded, DATA).logits == got.logits).all()


#: Method and the phase that is interrupted.
CUT = [
    (methods.Deebert(), 2),
    (methods.Fastbert(), 2),
    (methods.Smartbert(soft_epochs=0.5), 2),
    (methods.Smartbert(soft_epochs=0.5), 1),
    (methods.Berxit(), 1),
    (methods.Berxit(strategy="two_stage"), 2),
]


@pytest.mark.sample(6)
@pytest.mark.parametrize(("method", "cut"), CUT, ids=[f"{method.name}-{number}" for method, number in CUT])
def test_resume_in_the_middle_of_a_phase(tmp_path, method, cut):
    """A resumed run gives the weights of an uninterrupted one."""
    base = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    whole = converted(method)
    for phase in ee.phases(whole):
        trainer(whole, phase, base).train()
    resumed = converted(method, seed=4)
    assert not torch.equal(resumed.heads.out[0].weight, whole.heads.out[0].weight)
    for phase in ee.phases(resumed):
        run = trainer(resumed, phase, base)
        if phase.number == cut:
            checkpoint = f"{run.args.output_dir}/checkpoint-2"
            assert run.train(resume_from_checkpoint=checkpoint).global_step == 3
        elif phase.number > cut:
            run.train()
    expected, got = weights(whole), weights(resumed)
    assert set(got) == set(expected) and all(torch.equal(got[n], value) for n, value in expected.items())
