"""Replicas of `nn.DataParallel`, which a Trainer makes where it sees several GPUs, answer and learn as the model."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.method_cases import METHOD_CASES, method_case
from support.models import ALL_FAMILIES, VARIED_LENGTHS, batch_for, early_exit, parameter_set, varied
from support.replicas import CpuDataParallel, in_threads, replicas_of
from support.trainers import dataset, logged_losses, trainer
from torch import nn

import earlyexit_kernels as ee
from earlyexit_kernels.core import invalid
from earlyexit_kernels.core.invalid import InvalidRows

LABELS = torch.arange(12) % 3
TOLERANCE = 1e-5
PHASES = [(name, number) for name, case in METHOD_CASES.items() for number in range(len(case.phases))]


def halves(batch):
    """The parts of a batch that two replicas get."""
    return [dict(zip(batch, part, strict=True)) for part in zip(*(x.chunk(2) for x in batch.values()), strict=True)]


def learned(model, loss):
    """The gradients of a loss by name, which are dropped from the model."""
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def assert_learns_alike(model, batch):
    """Compare loss and gradients of two replicas with those of the model on their rows."""
    expected = sum(model(**half).loss for half in halves(batch)) / 2
    gradients = learned(model, expected)
    got = CpuDataParallel(model)(**batch).loss.mean()
    assert abs(got - expected) < TOLERANCE
    of_replicas = learned(model, got)
    assert of_replicas.keys() == gradients.keys() and any(x.abs().max() > 1e-3 for x in of_replicas.values())
    for name, gradient in of_replicas.items():
        assert (gradient - gradients[name]).abs().max() < TOLERANCE * max(1, gradient.abs().max()), name


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_replicas_answer_and_learn_as_the_model(family):
    model, batch = varied(family, dropout=0.0)
    model.configure(path="eager")
    expected = model(**batch)
    with torch.no_grad():
        for out in (replicas_of(model, 1)[0](**batch), CpuDataParallel(model)(**batch, output_all_logits=True)):
            assert torch.allclose(out.logits, expected.logits, atol=TOLERANCE)
            assert torch.equal(out.exit_layer, expected.exit_layer)
    assert len(expected.exit_layer.unique()) > 2
    assert_learns_alike(model.train(), {**batch, "labels": LABELS})


@pytest.mark.sample(3)
@pytest.mark.parametrize(("method", "number"), PHASES)
def test_every_phase_of_every_method_learns_in_replicas(method, number):
    model = early_exit("bert", dropout=0.0, method=method)
    batch = {**batch_for(model, lengths=VARIED_LENGTHS), "labels": LABELS}
    model.schedule.enter(model.train(), number)
    for step in (0, 1):
        model.schedule.set_progress(step, 0.5 * step)
        assert_learns_alike(model, batch)
    model.eval().set_criterion(method_case(method).rule)
    expected = model(**batch)
    with torch.no_grad():
        out = CpuDataParallel(model)(**batch)
    assert torch.allclose(out.logits, expected.logits, atol=TOLERANCE)
    assert torch.equal(out.exit_layer, expected.exit_layer)
    assert torch.equal(out.layers_run, expected.layers_run)


def test_replicas_learn_adapters_alone():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], modules_to_save=["heads"])
    model = peft.get_peft_model(early_exit("bert", dropout=0.0), config).train()
    batch = {**batch_for(model.base_model.model, lengths=VARIED_LENGTHS), "labels": LABELS}
    assert_learns_alike(model, batch)


def test_replicas_learn_under_autocast_and_with_checkpoints():
    model = early_exit("eurobert", dropout=0.0).train()
    batch = {**batch_for(model, lengths=VARIED_LENGTHS), "labels": LABELS}
    model.gradient_checkpointing_enable()
    assert_learns_alike(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = CpuDataParallel(model)(**batch).loss.mean()
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in learned(model, loss).values())


@pytest.mark.parametrize("layers", ["auto", "eager"])
def test_replicas_follow_the_weights_and_leave_nothing_behind(layers):
    model, batch = varied("bert")
    model.configure(path=layers)
    model(**batch)
    packed = dict(model.runner.paths["fused"].layers._made)
    for change in (0.0, 0.3, -0.2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(change * torch.randn_like(parameter))
            out = CpuDataParallel(model)(**batch)
            assert model.runner.paths["fused"].layers._made == packed
            expected = model(**batch)
        packed = dict(model.runner.paths["fused"].layers._made)
        assert torch.allclose(out.logits, expected.logits, atol=1e-4)
        assert torch.equal(out.exit_layer, expected.exit_layer)


def test_layers_of_a_replica_are_not_captured(replays):
    """Its weights are in other memory at each batch."""
    model = early_exit()
    batch = batch_for(model, lengths=VARIED_LENGTHS)
    (replica,) = replicas_of(model, 1)
    assert model.explain().path == "captured" and replica.explain().path == "eager"
    for _ in range(3):
        CpuDataParallel(model)(**batch)
    assert not replays.captures


def test_replicas_count_invalid_rows_in_the_model():
    model = early_exit()
    batch = batch_for(model, lengths=VARIED_LENGTHS)
    with parameter_set(model.heads.out[1].bias, 0, math.nan), torch.no_grad():
        CpuDataParallel(model)(**batch)
        assert model.invalid_rows == 0, "no row is answered there"
        model.train()
        CpuDataParallel(model)(**batch)
    assert model.invalid_rows == len(VARIED_LENGTHS)


@pytest.mark.parametrize("waits", [False, True])
def test_threads_count_invalid_rows(waits, monkeypatch):
    if waits:
        monkeypatch.setattr(invalid, "SYNCHRONOUS_DEVICES", ())
    counts, logits = InvalidRows(), torch.full((2, 3, 4), math.nan)
    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(counts.add_pass, logits, False, training=True) for _ in range(500)]:
            each.result()
    assert counts.total() == 3000


def test_replicas_do_not_warn_of_frozen_exits(caplog):
    model = early_exit(dropout=0.0).train()
    batch = {**batch_for(model), "labels": torch.tensor([0, 1, 2, 0])}
    CpuDataParallel(model)(**batch)
    assert not caplog.records
    model.heads.requires_grad_(False)
    model(**batch)
    assert "no parameter of model.heads requires a gradient" in caplog.text


def test_errors_of_replicas_reach_the_caller():
    model = early_exit()
    with pytest.raises(ValueError, match=r"input_ids is on meta, the model on cpu"):
        replicas_of(model, 1)[0](input_ids=torch.zeros(2, 3, dtype=torch.long, device="meta"))
    with pytest.raises(ValueError, match="expected at least one token a row"):
        in_threads(replicas_of(model, 2), [batch_for(model), {"input_ids": torch.zeros(2, 0, dtype=torch.long)}])


def test_a_trainer_that_sees_two_gpus(tmp_path, monkeypatch):
    """It trains, evaluates and predicts as with one GPU and batches of twice the size."""
    data, found = dataset(24), []
    monkeypatch.setattr(nn, "DataParallel", CpuDataParallel)
    for gpus in (1, 2):
        model = early_exit(dropout=0.0, criterion=ee.criteria.Patience(patience=1))
        sizes = dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 8 // gpus)
        run = trainer(model, tmp_path / str(gpus), data, eval_dataset=data, learning_rate=0.02, **sizes)
        run.args._n_gpu = gpus
        run._train_batch_size = run.args.train_batch_size
        run.train()
        assert isinstance(run.model_wrapped, CpuDataParallel) == (gpus == 2)
        found.append((logged_losses(run), run.evaluate()["eval_loss"], run.predict(data), model.state_dict()))
    (losses, loss, predicted, weights), (got_losses, got_loss, got_predicted, got_weights) = found
    assert got_losses == pytest.approx(losses, abs=1e-5) and got_loss == pytest.approx(loss, abs=1e-5)
    for name, values in weights.items():
        assert (got_weights[name] - values).abs().max() < TOLERANCE, name
    for expected, got in zip(predicted.predictions, got_predicted.predictions, strict=True):
        assert abs(got - expected).max() < 1e-4
