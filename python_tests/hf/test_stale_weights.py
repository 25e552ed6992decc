"""Detection of changed weights by fused and captured layers."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref

import pytest
import torch
from support.backends import missing_reason
from support.models import batch_for, early_exit, stock
from support.trained_weight_changes import OF_ALL_LAYERS, WAYS
from support.weight_changes import AT, BIASES, SAME_NUMBERS, weight_of

import earlyexit_kernels as ee
from earlyexit_kernels.core import seal
from earlyexit_kernels.core.locks import ForkSafeLock
from earlyexit_kernels.core.seal import Seal, sampled_elements
from earlyexit_kernels.cpu import layers

#: Difference allowed between the family's layers and fused ones, by dtype.
ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 0.15}


def answers(model, batch):
    """Return the logits of all exits."""
    return model.trace(**batch).logits


def captured_answers(model, batch):
    """Return full-depth answers of captured layers; the first batch of a size runs eagerly, the second captures."""
    for _ in range(3):
        logits = model(**batch).logits
    return logits


def family_answers(model, batch, ask):
    model.configure(path="eager")
    return answers(model, batch) if ask is answers else model(**batch).logits


@pytest.fixture(params=["compiled", "python"])
def implementation(request, monkeypatch):
    """The implementations of the seal."""
    if request.param == "python":
        monkeypatch.setattr(seal, "_implementation", lambda: seal.PythonSeal)
    elif reason := missing_reason(ee.available_backends("cpu")["cpp"]):
        pytest.skip(reason)


def check_change_is_detected(name, ask, family="bert", path="fused"):
    base = stock(family, **BIASES[family])
    model = ee.to_early_exit(base, pooling="first")
    assert model.explain().path == path
    batch = batch_for(model)
    before = ask(model, batch)
    changed = WAYS[name](model, base) or model
    got, expected = ask(changed, batch), family_answers(changed, batch, ask)
    tolerance = ROUNDING.get(changed.dtype, 5e-5)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0.0)
    if name not in SAME_NUMBERS:
        assert (expected - before).abs().max() > 10 * tolerance, "a stale answer would not be detected"


def changes():
    """Return each change in each family, with both implementations of the seal, and in each layer of one family."""
    places = [(family, 1, "compiled") for family in BIASES] + [("bert", 1, "python")]
    found = [(*place, name) for place in places for name in WAYS]
    return found + [("bert", at, "compiled", name) for at in (0, -1) for name in WAYS if name not in OF_ALL_LAYERS]


@pytest.mark.sample(5)
@pytest.mark.parametrize(("family", "at", "implementation", "name"), changes(), indirect=["implementation"])
def test_fused_layers_detect_changes(family, at, name, implementation):
    token = AT.set(at)
    check_change_is_detected(name, answers, family)
    AT.reset(token)


@pytest.mark.parametrize("name", ["data_in_place", "new_linear", "layer_hook", "layer_replaced", "state_assigned"])
def test_changes_are_detected_when_a_layer_is_reached(name):
    """A batch that leaves before does not check the layer."""
    token = AT.set(3)
    base = stock()
    model = ee.to_early_exit(base, pooling="first")
    batch = batch_for(model)
    answers(model, batch)
    WAYS[name](model, base)
    model.set_criterion(ee.criteria.Entropy(threshold=2.0))
    assert model(**batch).exit_layer.max() == 1
    AT.reset(token)
    torch.testing.assert_close(answers(model, batch), family_answers(model, batch, answers), atol=5e-5, rtol=0.0)


@pytest.mark.parametrize("name", ["data_in_place", "new_linear", "state_assigned"])
def test_a_change_while_a_layer_is_packed_is_detected(name, monkeypatch):
    """It comes after the weights have been read, as from another thread."""
    base = stock()
    model = ee.to_early_exit(base, pooling="first")
    batch, read = batch_for(model), layers.Source.read

    def read_and_change(source, layer):
        weights = read(source, layer)
        if layer is model.adapter.layers(model.backbone)[1]:
            monkeypatch.undo()
            WAYS[name](model, base)
        return weights

    model.configure(path="fused")  # reads the layers once, to check them
    monkeypatch.setattr(layers.Source, "read", read_and_change)
    token = AT.set(1)
    answers(model, batch)
    AT.reset(token)
    torch.testing.assert_close(answers(model, batch), family_answers(model, batch, answers), atol=5e-5, rtol=0.0)


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", [name for name in WAYS if "quantized" not in name])
def test_captured_layers_detect_changes(name, replays):
    """Linears that torch quantizes dynamically run on the CPU only, and scale by all tokens of a buffer."""
    check_change_is_detected(name, captured_answers, path="captured")
    assert replays.captures


def _replaced(path, module):
    return lambda model: model.backbone.set_submodule(path, module)


def _scaled(path):
    return lambda model: model.get_parameter(f"backbone.{path}").data.mul_(1.5)


def _new_angles(model):
    rotary = model.backbone.rotary_emb
    rotary.sliding_attention_inv_freq = rotary.sliding_attention_inv_freq * 3


#: Changes of ModernBERT that captured layers have to detect.
PRENORM_WAYS = {
    "in_place": _scaled("layers.1.mlp.Wi.weight"),
    "norm_in_place": _scaled("final_norm.weight"),
    "embeddings_in_place": _scaled("embeddings.norm.weight"),
    "new_linear": _replaced("layers.1.attn.Wqkv", torch.nn.Linear(64, 192, bias=False)),
    "new_bias": lambda model: setattr(model.backbone.layers[2].mlp.Wo, "bias", torch.nn.Parameter(torch.arange(64.0))),
    "new_norm": _replaced("layers.2.attn_norm", torch.nn.LayerNorm(64, eps=0.1)),
    "norm_removed": _replaced("layers.2.attn_norm", torch.nn.Identity()),
    "new_norm_at_the_end": _replaced("final_norm", torch.nn.LayerNorm(64, eps=0.3)),
    "window": lambda model: setattr(model.backbone.layers[1].attn, "sliding_window", 2),
    "angles": _new_angles,
    "angles_in_place": lambda model: model.backbone.rotary_emb.full_attention_inv_freq.mul_(3),
    "activation": _replaced("layers.1.mlp.act", torch.nn.ReLU()),
    "refused_activation": _replaced("layers.1.mlp.act", torch.nn.SiLU()),
    "hook": lambda model: model.backbone.layers[1].mlp.register_forward_hook(lambda *given: given[2] * 2),
}


@pytest.mark.parametrize("name", PRENORM_WAYS)
def test_captured_layers_of_prenorm_form_detect_changes(name, replays):
    model = early_exit("modernbert", pooling="first")
    batch = batch_for(model)
    before = captured_answers(model, batch)
    captures = replays.captures
    PRENORM_WAYS[name](model)
    got, expected = captured_answers(model, batch), family_answers(model, batch, captured_answers)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0.0)
    assert (expected - before).abs().max() > 1e-3, "a stale answer would not be detected"
    assert (replays.captures > captures) is not (name == "hook" or name.endswith("in_place"))


def test_in_place_changes_keep_the_captures(replays):
    """Graphs hold no copies of weights, so training between evaluations needs no new capture."""
    base = stock()
    model = ee.to_early_exit(base, pooling="first")
    batch = batch_for(model)
    captured_answers(model, batch)
    captures = replays.captures
    for name in ("in_place", "data_in_place", "adamw_fused", "state_loaded"):
        WAYS[name](model, base)
        captured_answers(model, batch)
    assert replays.captures == captures
    WAYS["data_replaced"](model, base)
    captured_answers(model, batch)
    assert replays.captures > captures


def test_change_outside_the_samples_requires_refresh(implementation):
    model = early_exit("bert", pooling="first")
    batch, weight = batch_for(model), weight_of(model)
    before = answers(model, batch)
    unseen = next(k for k in range(weight.numel()) if k not in sampled_elements(weight.numel()))
    weight.detach().numpy().reshape(-1)[unseen] += 50.0
    assert torch.equal(answers(model, batch), before), "a write to one element through a view, a documented limit"
    model.refresh()
    got = answers(model, batch)
    assert not torch.allclose(got, before, atol=1e-3)
    torch.testing.assert_close(got, family_answers(model, batch, answers), atol=5e-5, rtol=0.0)
    model.configure(path="auto")
    answers(model, batch)
    with torch.no_grad():
        weight.view(-1)[unseen] -= 50.0
    assert torch.allclose(answers(model, batch), before, atol=1e-3), "the version counter has seen this write"


def test_unchanged_weights_are_packed_once(implementation, monkeypatch):
    """Running a batch is not detected as a change."""
    model = early_exit("bert", pooling="first")
    batch = batch_for(model)
    answers(model, batch)
    packed = dict(model.runner.paths["fused"].layers._made)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            model(**batch)
            answers(model, batch)
            model.explain()
    model.eval()
    assert packed and model.runner.paths["fused"].layers._made == packed


def zeros():
    module = torch.nn.Linear(8, 8)
    torch.nn.init.zeros_(module.weight)
    return module


def holding(shape):
    """Return a module of one parameter, whose axes are in another order than its memory."""
    value = torch.zeros(shape).transpose(0, -1) if shape else torch.zeros(())
    return torch.nn.ParameterList([torch.nn.Parameter(value)])


#: Module, and a change of its first parameter that is seen.
CHANGES_OF_A_PARAMETER = {
    "zero to minus zero": (zeros, lambda weight: weight.data.fill_(-0.0)),
    "number to NaN": (zeros, lambda weight: weight.data.fill_(torch.nan)),
    "storage freed": (zeros, lambda weight: weight.untyped_storage().resize_(0)),
    **{
        f"shape {shape}": (lambda shape=shape: holding(shape), lambda p: p.data.add_(1))
        for shape in ((), (5,), (3, 4, 5))
    },
}


@pytest.mark.parametrize("name", CHANGES_OF_A_PARAMETER)
def test_a_seal_compares_samples_by_their_bytes(implementation, name):
    make, change = CHANGES_OF_A_PARAMETER[name]
    module = make()
    weight = next(module.parameters())
    sealed = Seal([module], [weight])
    assert sealed.holds([module]) and not sealed.holds([make()]) and not sealed.holds([])
    change(weight)
    assert not sealed.holds([module])
    if weight.untyped_storage().size():
        assert Seal([module], [weight]).holds([module]), "NaN is equal to itself"
    empty = holding((0, 3))
    sealed = Seal([empty], list(empty))
    empty[0].data.add_(1)
    assert sealed.holds([empty])


def test_a_seal_compares_each_sampled_element(implementation):
    module = holding((40, 30))
    for position in sampled_elements(module[0].numel()):
        sealed = Seal([module], list(module))
        module[0].data[torch.unravel_index(torch.tensor(position), module[0].shape)] += 1
        assert not sealed.holds([module])


def test_a_seal_compares_classes(implementation):
    module = zeros()
    sealed = Seal([module])
    module.__class__ = type("Other", (torch.nn.Linear,), {})
    assert not sealed.holds([module])


def test_model_referenced_by_its_own_hook_is_collected(implementation):
    model = early_exit("bert", pooling="first")
    model.backbone.register_forward_pre_hook(lambda module, inputs, holder=model: None)
    answers(model, batch_for(model))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", ["sparse", "nested", "mkldnn"])
def test_tensors_without_an_address_are_compared_by_identity(implementation, kind):
    made = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "mkldnn": lambda: torch.ones(2, 2).to_mkldnn(),
    }[kind]
    module = torch.nn.Module()
    module.register_buffer("table", made())
    sealed = Seal([module])
    assert sealed.holds([module])
    module.table = made()
    assert not sealed.holds([module])


def test_reverted_change_is_not_detected(implementation):
    module = torch.nn.Linear(8, 8)
    own = module.weight
    sealed = Seal([module], [own])
    module.extra = 1
    assert not sealed.holds([module])
    del module.extra
    assert sealed.holds([module])
    module.weight = torch.nn.Parameter(torch.zeros(8, 8))
    assert not sealed.holds([module])
    module.weight = own
    assert sealed.holds([module]) and sealed.holds([module])


def test_explaining_packs_captures_and_drops_nothing(request):
    model = early_exit("bert", pooling="first")
    assert model.explain().path == "fused" and not model.runner.paths["fused"].layers._made
    replays = request.getfixturevalue("replays")
    batch = batch_for(model)
    captured_answers(model, batch)
    captures, levels = replays.captures, dict(model.runner.paths["captured"].layers._levels)
    WAYS["layer_replaced"](model, None)
    assert model.explain().path == "captured"
    assert replays.captures == captures and model.runner.paths["captured"].layers._levels == levels


def test_lock_held_at_a_fork_stays_held_in_the_child():
    """The thread that forks goes on in the child, and releases the lock there."""
    lock, child = ForkSafeLock(), None
    try:
        with lock:
            child = os.fork()
            held = lock._lock.locked()
        if child == 0:
            os._exit(0 if held and not lock._lock.locked() else 1)
    finally:
        if child == 0:
            os._exit(1)
    assert exit_code_within(child, seconds=60) == 0


def test_change_while_weights_are_packed_is_detected(monkeypatch):
    """A hook that is added after the layers were checked and before they are packed."""
    model = early_exit("bert", pooling="first")
    batch, layer = batch_for(model), model.backbone.encoder.layer[0]
    model.configure(path="fused")
    read = layers.read_layer

    def add_hook(adapter, backbone, module):
        weights = read(adapter, backbone, module)
        if module is layer and not layer._forward_hooks:
            layer.register_forward_hook(lambda *_: None)
        return weights

    with monkeypatch.context() as patch:
        patch.setattr(layers, "read_layer", add_hook)
        model(**batch)
    model.configure(path="auto")
    assert "forward hook" in model.explain().reason
    model(**batch)
    assert "forward hook" in model.runner.paths["fused"].layers._made[layer].reason


def exit_code_within(child: int, seconds: float) -> int:
    """Return the exit code of a child process, which is killed if it hangs."""
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    timer.cancel()
    return code
