"""PEFT for sequence classification: adapters in the encoder, exits trained and saved in full."""

from __future__ import annotations

import logging

import pytest
import torch
from support.models import batch_for, stock
from support.trainers import batch_of, dataset, logged_losses, trainer

import earlyexit_kernels as ee
from earlyexit_kernels.hf.schedule import part_of

peft = pytest.importorskip("peft")

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
TARGETS = {
    "bert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "albert": ["query", "value"],
    "modernbert": ["Wqkv"],
    "qwen3": ["q_proj", "v_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
}
METHODS = [(family, "palbert" if family == "albert" else "joint") for family in TARGETS]


def adapted(family="bert", *, saved=("heads",), **arguments):
    """Return an early-exit model in a PEFT wrapper whose adapters change the answers."""
    model = ee.to_early_exit(stock(family, dropout=0.0, **TINY), **arguments)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=TARGETS[family], modules_to_save=list(saved), init_lora_weights=False, r=4
    )
    return peft.get_peft_model(model, config)


def learning(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "method"), METHODS)
def test_training_and_evaluation(tmp_path, family, method):
    model, data = adapted(family, method=method), dataset()
    before = learning(model)
    assert any("lora_A" in name for name in before) and any("heads" in name for name in before)
    assert not any("original_module" in name or "base_layer" in name for name in before)
    run = trainer(model, tmp_path, data, eval_dataset=data)
    run.train()
    assert all(torch.isfinite(torch.tensor(logged_losses(run))))
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert any("lora_A" in name for name in changed) and any(".heads.modules_to_save" in name for name in changed)
    found = ee.predict_with_exits(run, data)
    assert run.evaluate()["eval_loss"] > 0
    assert abs(run.predict(data).predictions - found.logits).max() < 1e-6
    assert len(found.exit_layer) == len(data)


def test_save_load_and_merge(tmp_path):
    model, batch = adapted().eval(), batch_of(dataset(5))
    plain = ee.to_early_exit(stock(dropout=0.0, **TINY)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    expected = model(**batch).logits
    assert (plain(**batch).logits - expected).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.allclose(model(**batch).logits, plain(**batch).logits, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.allclose(loaded(**batch).logits, expected, atol=1e-6)
    merged = model.merge_and_unload()
    assert isinstance(merged, ee.EarlyExitForSequenceClassification)
    assert torch.allclose(merged(**batch).logits, expected, atol=1e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["deebert", "smartbert"])
def test_phases_of_an_adapted_model(tmp_path, name):
    """Phases freeze exits inside the wrapper of PEFT, and the callback finds the model."""
    data, model = dataset(8), ee.to_early_exit(stock(dropout=0.0, **TINY), method=name)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS["bert"], modules_to_save=["heads"], r=4)
    wrapped = peft.get_peft_model(model, config)
    for phase in ee.phases(model):
        names = learning(wrapped)
        assert any("lora_" in n for n in names) == ("backbone" in phase.spec.trains)
        assert {part_of(model, n.removeprefix("base_model.model.")) for n in names} <= phase.spec.trains
        run = trainer(wrapped, tmp_path, data, max_steps=1)
        for callback in phase.callbacks():
            run.add_callback(callback)
        run.train()


def test_frozen_exits_are_reported_once(caplog):
    """Without modules_to_save PEFT freezes the exits, since it does not know them as classifiers."""
    model = adapted(saved=()).train()
    with caplog.at_level(logging.WARNING, "earlyexit_kernels"):
        for _ in range(2):
            model(**batch_of(dataset(4))).loss.backward()
    found = [r.getMessage() for r in caplog.records if "modules_to_save=['heads']" in r.getMessage()]
    assert len(found) == 1


@pytest.mark.parametrize("training", [True, False])
def test_adapters_in_an_exit_are_refused(training):
    """Inference reads the last weight of an exit without calling its module, which would ignore an adapter."""
    model = ee.to_early_exit(stock(**TINY))
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "out.0", "out.1"], r=4)
    model = peft.get_peft_model(model, config).train(training)
    with pytest.raises(TypeError, match=r"exit after layer [12]: expected torch.nn.Linear, got peft.*modules_to_save"):
        model(**batch_of(dataset(4)))


def test_conversion_requires_merged_adapters():
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS["bert"], init_lora_weights=False)
    base = peft.get_peft_model(stock(dropout=0.0, **TINY), config).eval()
    with pytest.raises(TypeError, match=r"merge its adapters first, to_early_exit\(peft_model.merge_and_unload\(\)\)"):
        ee.to_early_exit(base)
    with pytest.raises(TypeError, match="merge its adapters"):
        ee.to_early_exit(base.get_base_model())
    batch = batch_for(base)
    expected = base(**batch).logits
    model = ee.to_early_exit(base.merge_and_unload())
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
