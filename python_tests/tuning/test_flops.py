"""Multiply-adds, compared with the counter of torch and with formulas."""

import pytest
import torch
from support.models import ALL_FAMILIES, CLASSES, DEPTH, batch_for, early_exit, stock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import earlyexit_kernels as ee
from earlyexit_kernels.backbones.base import query_width
from earlyexit_kernels.criteria import Entropy, FullDepth, Learned, Patience, QExit, SkipGate
from earlyexit_kernels.hf import runner
from earlyexit_kernels.hf.config import weights_per_layer
from earlyexit_kernels.tuning.flops import encoder_macs, exit_macs, gate_macs, row_macs

H, INNER, W, S = 64, 96, 128, 9
LAYER = S * (4 * H * H + 2 * H * INNER + 2 * S * H)
NARROW = S * (H * W + 3 * W * W + 2 * S * W)


@pytest.fixture(autouse=True)
def family_layers(monkeypatch):
    """Use the layers of the family: the counter of torch does not see the products of the fused layers."""
    monkeypatch.setitem(runner.AUTO, "cpu", ("eager",))


def counted(call, **arguments) -> int:
    """Return the multiply-adds of a call as counted by torch, with attention as two matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(**arguments)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def tensor(*values):
    return torch.tensor(values)


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "electra", "distilbert"])
@pytest.mark.parametrize(
    ("method", "pooling", "needs"),
    [
        ("joint", None, None),
        ("joint", "mean", None),
        ("deebert", None, None),
        ("palbert", None, "halting"),
        ("dact", "mean", "halting"),
        ("berxit", "first", "uncertainty"),
        ("fastbert", None, None),
        ("smartbert", "mean", None),
    ],
)
def test_full_depth_matches_the_counter_of_torch(family, method, pooling, needs):
    model = ee.to_early_exit(stock(family), method=method, pooling=pooling)
    model.set_criterion(None)
    batch = batch_for(model, "full", lengths=(S, S, S))
    lengths = tensor(S, S, S)
    every_exit = encoder_macs(model, lengths) + model.depth * exit_macs(model, lengths, needs)
    assert counted(model.trace, **batch) == int(every_exit.sum())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_compaction_a_report_and_the_limit_of_parameters_count_the_same_layer(family):
    model = early_exit(family)
    costs = [int(encoder_macs(model, tensor(S), layers)) for layers in (1, 2)]
    config = model.config.backbone_config
    assert costs[1] - costs[0] == S * (model._layer_macs + 2 * S * query_width(config))
    assert 0.7 < weights_per_layer(config) / model._layer_macs < 1.6


def test_layers_and_exits_match_formulas():
    lengths, exit_layer = tensor(S, S, S), tensor(1, 3, DEPTH)
    linear = early_exit(pooling="mean", criterion=Entropy(threshold=0.1))
    costs = row_macs(linear, lengths, exit_layer)
    assert costs.encoder.tolist() == [LAYER, 3 * LAYER, 4 * LAYER]
    assert costs.exits.tolist() == [H * CLASSES, 3 * H * CLASSES, 4 * H * CLASSES]
    assert costs.gates.tolist() == [0, 0, 0]
    assert torch.equal(costs.total, costs.encoder + costs.exits)
    family = early_exit(criterion=Patience(patience=1))
    assert row_macs(family, lengths, exit_layer).exits.tolist() == [k * (H * H + H * CLASSES) for k in (1, 3, 4)]
    full_depth = early_exit(pooling="first")
    assert row_macs(full_depth, [S], [DEPTH]).total.tolist() == [DEPTH * LAYER + H * CLASSES], "the last exit only"


def test_only_the_scalar_read_by_the_rule_is_counted():
    halting = ee.to_early_exit(stock("bert"), method="palbert")
    plain = exit_macs(halting, tensor(S))
    read = exit_macs(halting, tensor(S), "halting")
    assert int(read - plain) == 3 * (2 * H) ** 2 + 2 * H  # three hidden layers on two exits' features
    assert torch.equal(row_macs(halting, [S], [2], criterion=QExit(q=0.5)).exits, 2 * read)
    assert torch.equal(row_macs(halting, [S], [2], criterion=Entropy(threshold=0.5)).exits, 2 * plain)
    learned = ee.to_early_exit(stock("bert"), method="berxit", criterion=Learned(threshold=0.5))
    assert row_macs(learned, [S], [1]).exits.tolist() == [H * H + H * CLASSES + H]


def test_attention_exits_and_gates_match_formulas():
    model = ee.to_early_exit(stock("bert"), method="smartbert")
    attention_exit, gate = NARROW + W * W + W * CLASSES, NARROW + W
    assert exit_macs(model, tensor(S)).tolist() == [attention_exit]
    assert gate_macs(model, tensor(S)).tolist() == [gate]
    rule = SkipGate(threshold=0.5, exit=Entropy(threshold=0.1))
    # left at layer 3 after 2 layers; ran all layers; skipped one layer; skipped all layers
    costs = row_macs(model, [S] * 4, [3, DEPTH, DEPTH, DEPTH], [2, DEPTH, 3, 0], criterion=rule)
    assert costs.encoder.tolist() == [2 * LAYER, 4 * LAYER, 3 * LAYER, 0]
    assert costs.gates.tolist() == [3 * gate, 4 * gate, 4 * gate, 4 * gate]
    assert costs.exits.tolist() == [k * attention_exit for k in (2, 4, 4, 1)]
    last_only = row_macs(
        model, [S] * 3, [DEPTH] * 3, [DEPTH, 3, 0], criterion=SkipGate(threshold=0.5, exit=FullDepth())
    )
    assert last_only.exits.tolist() == [attention_exit] * 3 and last_only.gates.tolist() == [4 * gate] * 3


@pytest.mark.parametrize("gates", [(1, -1, 1, -1), (-1, -1, -1, -1), (1, 1, 1, 1), (-1, 1, -1, 1)])
def test_skipped_layers_match_the_counter_of_torch(gates):
    """The last linear of an exit runs in the op `exit_step`, which the counter of torch does not see."""
    model = ee.to_early_exit(stock("bert"), method="smartbert")
    with torch.no_grad():
        for gate, bias in zip(model.heads.gates, gates, strict=True):
            gate.out.weight.zero_()
            gate.out.bias.fill_(float(bias))
    model.set_criterion(SkipGate(threshold=0.5, exit=Entropy(threshold=0.0)))
    batch = batch_for(model, "full", lengths=(S,))
    out = model(**batch)
    costs = row_macs(model, [S], out.exit_layer, out.layers_run)
    exits = costs.exits // exit_macs(model, tensor(S))
    fused = exits * W * CLASSES
    ran_the_last = gates[-1] < 0 and int(out.layers_run) < DEPTH
    surplus = exit_macs(model, tensor(S)) - W * CLASSES if ran_the_last else 0
    assert counted(model, **batch) == int(costs.total - fused - surplus)


@pytest.mark.parametrize(
    ("exit_layer", "layers_run", "match"),
    [
        ([0], None, "1 <= exit_layer"),
        ([DEPTH + 1], None, "1 <= exit_layer"),
        ([1, 2], None, "of one length N"),
        ([2], [3], "layers_run <= exit_layer"),
        ([2], [1], "skips no layers"),
    ],
)
def test_contradictory_numbers_are_refused(exit_layer, layers_run, match):
    with pytest.raises(ValueError, match=match):
        row_macs(early_exit(pooling="first"), [S], exit_layer, layers_run)
