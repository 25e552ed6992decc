"""Detection of changed weights by fused layers and CUDA graphs."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref

import pytest
import torch
from support.models import batch_for, early_exit, stock
from support.trained_weight_changes import WAYS
from support.weight_changes import BIASES, SAME_NUMBERS, weight_of

import earlyexit_kernels as ee
from earlyexit_kernels.engine import fingerprint, fused_layers
from earlyexit_kernels.engine.fingerprint import ModuleFingerprint, sampled_elements
from earlyexit_kernels.engine.graphs import CaptureError
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.locks import ForkSafeLock

#: Difference allowed between the family's layers and fused ones, by dtype.
ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 0.15}


def answers(model, batch):
    """Return the logits of all exits."""
    return model.trace(**batch).logits


def graph_answers(model, batch):
    """Return full-depth answers from a graph, or from the family's layers if none can be captured."""
    try:
        return model.execution.graphs.run(model.view(), "torch", Inputs(**batch)).logits
    except CaptureError:
        model.set_layers("family")
        return model(**batch).logits


def family_answers(model, batch, ask):
    model.set_layers("family")
    return answers(model, batch) if ask is answers else model(**batch).logits


@pytest.fixture(params=["compiled", "python"])
def snapshots(request, monkeypatch):
    """The implementations of the fingerprint."""
    if request.param == "python":
        monkeypatch.setattr(fingerprint, "_snapshot_class", lambda: fingerprint.PythonFingerprint)
    elif reason := ee.available_backends("cpu")["cpp"]:
        pytest.skip(reason)


def check_change_is_detected(name, ask, family="bert"):
    base = stock(family, **BIASES[family])
    model = ee.to_early_exit(base, pooling="first")
    assert model.layer_kind == "fused"
    batch = batch_for(model)
    before = ask(model, batch)
    changed = WAYS[name](model, base) or model
    got, expected = ask(changed, batch), family_answers(changed, batch, ask)
    tolerance = ROUNDING.get(changed.dtype, 5e-5)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0.0)
    if name not in SAME_NUMBERS:
        assert (expected - before).abs().max() > 10 * tolerance, "a stale answer would not be detected"


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("family", BIASES)
def test_fused_layers_detect_changes(family, name, snapshots):
    check_change_is_detected(name, answers, family)


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", WAYS)
def test_graphs_detect_changes(name, captures):
    check_change_is_detected(name, graph_answers)


def _replaced(path, module):
    return lambda model: model.backbone.set_submodule(path, module)


def _scaled(path):
    return lambda model: model.get_parameter(f"backbone.{path}").data.mul_(1.5)


def _new_angles(model):
    rotary = model.backbone.rotary_emb
    rotary.sliding_attention_inv_freq = rotary.sliding_attention_inv_freq * 3


#: Changes of ModernBERT that graphs have to detect.
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
def test_graphs_of_prenorm_layers_detect_changes(name, captures):
    model = early_exit("modernbert", pooling="first")
    batch = batch_for(model)
    before = graph_answers(model, batch)
    PRENORM_WAYS[name](model)
    got, expected = graph_answers(model, batch), family_answers(model, batch, graph_answers)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0.0)
    assert (expected - before).abs().max() > 1e-3, "a stale answer would not be detected"
    refused = name in ("hook", "refused_activation")
    assert len(captures) == (1 if refused or name.endswith("in_place") else 2)


def test_in_place_changes_keep_the_graphs(captures):
    """Graphs hold no copies of weights, so training between evaluations needs no new capture."""
    base = stock()
    model = ee.to_early_exit(base, pooling="first")
    batch = batch_for(model)
    graph_answers(model, batch)
    for name in ("in_place", "data_in_place", "adamw_fused", "state_loaded"):
        WAYS[name](model, base)
        graph_answers(model, batch)
    assert len(captures) == 1
    WAYS["data_replaced"](model, base)
    graph_answers(model, batch)
    assert len(captures) == 2


def test_graph_refuses_weights_that_are_not_contiguous(captures):
    model = early_exit("bert", pooling="first")
    model.heads.out[0].weight.data = model.heads.out[0].weight.data.t().contiguous().t()
    with pytest.raises(CaptureError, match="are not contiguous"):
        model.execution.graphs.run(model.view(), "torch", Inputs(batch_for(model)["input_ids"]))


def test_change_outside_the_samples_requires_refresh(snapshots):
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


def test_unchanged_weights_are_packed_once(snapshots, monkeypatch):
    """Running a batch is not detected as a change."""
    model = early_exit("bert", pooling="first")
    batch = batch_for(model)
    answers(model, batch)
    packed = model.execution.layers.fused._packed
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            model(**batch)
            answers(model, batch)
            model.explain(**batch)
    model.eval()
    assert model.execution.layers.fused._packed is packed


@pytest.mark.parametrize("changed", [torch.nan, -0.0])
def test_samples_are_compared_by_their_bytes(snapshots, changed):
    module = torch.nn.Linear(8, 8)
    with torch.no_grad():
        module.weight.fill_(0.0)
    made_from = ModuleFingerprint([module], [module.weight])
    assert made_from.is_current([module])
    module.weight.data.fill_(changed)
    assert not made_from.is_current([module])
    again = ModuleFingerprint([module], [module.weight])
    assert again.is_current([module]), "NaN is compared by its bytes"
    assert not again.is_current([torch.nn.Linear(8, 8)]) and not again.is_current([])


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 5)])
def test_samples_of_shapes(snapshots, shape):
    module = torch.nn.ParameterList(
        [torch.nn.Parameter(torch.zeros(shape).transpose(0, -1) if shape else torch.zeros(()))]
    )
    made_from = ModuleFingerprint([module], list(module))
    assert made_from.is_current([module])
    module[0].data.add_(1)
    assert made_from.is_current([module]) == (0 in shape)


def test_model_referenced_by_its_own_hook_is_collected(snapshots):
    model = early_exit("bert", pooling="first")
    model.backbone.register_forward_pre_hook(lambda module, inputs, holder=model: None)
    answers(model, batch_for(model))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", ["sparse", "nested", "mkldnn"])
def test_tensors_without_an_address_are_compared_by_identity(snapshots, kind):
    made = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "mkldnn": lambda: torch.ones(2, 2).to_mkldnn(),
    }[kind]
    module = torch.nn.Module()
    module.register_buffer("table", made())
    made_from = ModuleFingerprint([module])
    assert made_from.is_current([module])
    module.table = made()
    assert not made_from.is_current([module])


def test_reverted_change_is_not_detected(snapshots):
    module = torch.nn.Linear(8, 8)
    own = module.weight
    made_from = ModuleFingerprint([module], [own])
    module.extra = 1
    assert not made_from.is_current([module])
    del module.extra
    assert made_from.is_current([module])
    module.weight = torch.nn.Parameter(torch.zeros(8, 8))
    assert not made_from.is_current([module])
    module.weight = own
    assert made_from.is_current([module]) and made_from.is_current([module])


def test_freed_storage_is_detected(snapshots):
    module = torch.nn.Linear(8, 8)
    made_from = ModuleFingerprint([module], [module.weight])
    module.weight.untyped_storage().resize_(0)
    assert not made_from.is_current([module])


def test_explaining_changes_nothing(captures, monkeypatch):
    """`explain` neither packs weights nor drops graphs."""
    model = early_exit("bert", pooling="first")
    batch = batch_for(model)
    assert (
        model.explain(**batch).layers.name == "fused" == model.layer_kind
        and model.execution.layers.fused._packed is None
    )
    graph_answers(model, batch)
    held = dict(model.execution.graphs._captured)
    WAYS["layer_replaced"](model, None)
    model.explain(**batch)
    assert model.execution.graphs._captured == held


def test_child_forked_while_weights_are_packed():
    """Locks that another thread holds at the fork are renewed in the child."""
    model = early_exit("bert", pooling="first")
    batch, threads = batch_for(model, lengths=(3,)), torch.get_num_threads()
    torch.set_num_threads(1)  # a child cannot use its parent's OpenMP threads
    try:
        expected = answers(model, batch)
        model.execution.layers.fused.forget()
        taken, release = threading.Event(), threading.Event()

        def packs():
            with model.execution.layers.fused._lock, model.execution.graphs._lock:
                taken.set()
                release.wait(60)

        thread = threading.Thread(target=packs)
        thread.start()
        taken.wait()
        child = os.fork()
        if child == 0:
            model.execution.graphs.forget()
            os._exit(0 if torch.equal(answers(model, batch), expected) else 1)
        assert exit_code_within(child, seconds=60) == 0
    finally:
        release.set()
        thread.join()
        torch.set_num_threads(threads)


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
    check = fused_layers.layers_unsupported_reason

    def add_hook(*arguments):
        reason = check(*arguments)
        layer.register_forward_hook(lambda *_: None)
        return reason

    with monkeypatch.context() as patch:
        patch.setattr(fused_layers, "layers_unsupported_reason", add_hook)
        model(**batch)
    assert model.layer_kind == "family"
    model(**batch)
    assert "forward hook" in model.execution.layers.fused._packed.reason


def exit_code_within(child: int, seconds: float) -> int:
    """Return the exit code of a child process, which is killed if it hangs."""
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    timer.cancel()
    return code
