"""Training on packed tokens, compared with a padded reference that shares no code with the package."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F
from support.models import ALL_FAMILIES, CLASSES, DECODERS, DEPTH, batch_for, early_exit, encoder_of, stock

import earlyexit_kernels as ee
from earlyexit_kernels.backbones import adapter_of
from earlyexit_kernels.core.full_depth import TraceOptions, trace_exits
from earlyexit_kernels.core.packing import pack
from earlyexit_kernels.core.rows import Rows
from earlyexit_kernels.core.view import Inputs
from earlyexit_kernels.heads import HeadOutput
from earlyexit_kernels.types import Gating

LABELS = torch.tensor([2, 0, 1, 1])
ACTIVATIONS = {"bert": torch.tanh, "roberta": torch.tanh, "albert": torch.tanh, "electra": F.gelu, "distilbert": F.relu}


def padded_loss(base, heads, pooling, activation, batch):
    """Return the joint loss over padded hidden states of the stock encoder, with reference heads."""
    hidden = encoder_of(base)(**batch, output_hidden_states=True).hidden_states[1:]
    assert len(hidden) == DEPTH
    mask = batch["attention_mask"][:, :, None]
    loss = 0.0
    for j, (states, out) in enumerate(zip(hidden, heads.out, strict=True), start=1):
        x = (states * mask).sum(1) / mask.sum(1) if pooling == "mean" else states[:, 0]
        if pooling is None:
            x = activation(x @ heads.dense[0].weight.T + heads.dense[0].bias)
        loss = loss + j * F.cross_entropy(x @ out.weight.T + out.bias, LABELS)
    return loss / (DEPTH * (DEPTH + 1) / 2)


def pair(family, pooling):
    """Return two models with equal weights that share no tensors, and the stock model of the second."""
    model = early_exit(family, dropout=0.0, pooling=pooling)
    base = stock(family, dropout=0.0)
    twin = ee.to_early_exit(base, pooling=pooling)
    twin.load_state_dict(model.state_dict())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    return model.train(), twin.train(), base.train()


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", ["right", "holes"])
@pytest.mark.parametrize("pooling", [None, "first", "mean"])
@pytest.mark.parametrize("family", ACTIVATIONS)
def test_loss_and_gradients_equal_a_padded_reference(family, pooling, kind):
    model, twin, base = pair(family, pooling)
    batch = batch_for(model, kind)
    loss = model(**batch, labels=LABELS).loss
    expected = padded_loss(base, twin.heads, pooling, ACTIVATIONS[family], batch)
    loss.backward()
    expected.backward()
    assert abs(loss - expected) < 1e-6
    others = dict(twin.named_parameters())
    largest = worst = 0.0
    for name, parameter in model.named_parameters():
        worst = max(worst, (parameter.grad - others[name].grad).abs().max().item())
        largest = max(largest, others[name].grad.abs().max().item())
    print(
        f"{family} {pooling} {kind}: loss off by {abs(loss - expected):.1e}, gradients by {worst:.1e} of {largest:.2f}"
    )
    assert largest > 0.01 and worst < 2e-6


#: Settings of exits, and tasks with their labels.
SETTINGS = ({}, {"pooling": "first"}, {"pooling": "mean"}, {"halting": True})
TASKS = (
    ("single_label_classification", LABELS),
    ("regression", torch.tensor([0.1, -1.0, 2.0, 0.5])),
    ("multi_label_classification", F.one_hot(LABELS, CLASSES).float()),
)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("family", "settings", "problem_type", "labels"),
    [(*case, *task) for case, task in zip(product(ALL_FAMILIES, SETTINGS), cycle(TASKS))],
)
def test_every_parameter_gets_a_gradient(family, settings, problem_type, labels):
    if settings == {"pooling": "first"} and family in DECODERS:
        settings = {"pooling": "last"}
    model = early_exit(
        family, num_labels=1 if problem_type == "regression" else CLASSES, problem_type=problem_type, **settings
    ).train()
    model(**batch_for(model), labels=labels).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(head.weight.grad.abs().max() > 0 for head in model.heads.out)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_dropout_only_in_training(family):
    model = early_exit(family, dropout=0.3)
    batch = batch_for(model)
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    torch.manual_seed(1)
    first = model(**batch).all_logits
    assert not torch.equal(model(**batch).all_logits, first)
    torch.manual_seed(1)
    assert torch.equal(model(**batch).all_logits, first)


def dropped_before_dense(family):
    """Return whether dropout of the stock head with p=1 leaves nothing for its dense module to read."""
    base, head = stock(family, dropout=0.0).train(), adapter_of(family).head
    base.get_submodule(head.dropout).p = 1.0
    seen = []
    base.get_submodule(head.dense).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().max()))
    base(**batch_for(base))
    return bool(seen[0] == 0)


@pytest.mark.parametrize("family", [f for f in ALL_FAMILIES if adapter_of(f).head.dropout is not None])
def test_head_dropout_is_that_of_the_family(family):
    """RoBERTa and ELECTRA also apply dropout before the dense module; with p=1 only biases remain."""
    assert early_exit(family, dropout=0.25).heads.config.dropout == 0.25
    model = early_exit(family, dropout=0.0)
    heads = model.heads.train()
    twice = dropped_before_dense(family)
    assert heads.config.dropout_before_dense is twice
    object.__setattr__(heads.config, "dropout", 1.0)
    seen = []
    heads.dense[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().max().item()))
    segments = pack(torch.zeros(2, 4).long(), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    states = Rows(torch.randn(6, 64), segments, None, None, 2, 6)
    assert torch.equal(heads(2, states, {}).logits, heads.out[1].bias.expand(2, -1))
    assert (seen[0] == 0.0) is twice


def test_gradient_equilibrium_is_a_suffix_mean():
    """Gradients of the exits 4, 8, 2 and 6 reach the layers as suffix means, 5, 5 1/3, 4 and 6."""
    segments = pack(torch.zeros(1, 3), None)
    rows = Rows(torch.zeros(3, 1, requires_grad=True), segments, None, None, 1, 3)
    seen = []

    def layer(states, plan):
        states = states * 1.0
        states.register_hook(lambda gradient: seen.append(gradient[0, 0].item()))
        return states

    class Heads:
        def first_memory(self, states, needs):
            return {}

        def __call__(self, layer, states, memory, projects):
            return HeadOutput(states.hidden[:1], {}, {}, None)

    trace = trace_exits(rows, [layer] * 4, Heads(), TraceOptions(balances=True))
    (trace.logits[0, :, 0] * torch.tensor([4.0, 8.0, 2.0, 6.0])).sum().backward()
    assert seen == pytest.approx([6.0, 4.0, 16 / 3, 5.0], abs=1e-6)


def traced(model, inputs, options):
    return model.runner.trace(model.view(), inputs, options, training=True)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_gradient_equilibrium_with_gates(hard):
    """The outputs are those of the gated pass; the gradients of layer l and of its gate are divided by L - l + 1."""
    model = early_exit(dropout=0.0, method="smartbert").train()
    weights = torch.randn(len(LABELS), DEPTH, CLASSES, generator=torch.Generator().manual_seed(4))
    inputs = Inputs(**batch_for(model))
    gating, traces, gradients = Gating(hard=hard, threshold=0.5), [], []
    for layer, gate in enumerate(model.heads.gates):  # so that some rows skip each layer and some do not
        scores = traced(model, inputs, TraceOptions("halting", gating)).aux["gate"][:, layer]
        gate.out.bias.data.sub_(scores.detach().median() + 0.01)
    for balances in (False, True):
        model.zero_grad()
        traces.append(traced(model, inputs, TraceOptions("halting", gating, balances=balances)))
        (traces[-1].logits * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(traces[0].logits, traces[1].logits)
    assert torch.equal(traces[0].aux["gate"], traces[1].aux["gate"])
    for layer in range(1, DEPTH + 1):
        for name in (f"backbone.encoder.layer.{layer - 1}.output.dense.weight", f"heads.gates.{layer - 1}.out.weight"):
            plain, balanced = (found[name] for found in gradients)
            assert plain.abs().max() > 1e-3, name
            expected = plain / (DEPTH - layer + 1)
            assert (balanced - expected).abs().max() < 1e-5 * plain.abs().max(), name
