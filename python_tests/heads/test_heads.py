"""Exit heads on packed tokens compared with reference networks on padded ones, and their scalars."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support import reference_networks
from support.leaving_models import LENGTHS
from support.models import DEPTH, batch_for, early_exit, encoder_of, ragged, stock

import earlyexit_kernels as ee
from earlyexit_kernels.core.packing import pack
from earlyexit_kernels.core.rows import Rows
from earlyexit_kernels.heads import ExitHeads, HeadConfig
from earlyexit_kernels.hf.schedule import part_of

SIZE, CLASSES, LAYERS = 24, 3, 3


def build(**fields):
    """Return heads for three layers of width 24."""
    torch.manual_seed(3)
    return ExitHeads(HeadConfig(**fields), SIZE, CLASSES, LAYERS).eval()


def states(kind, count=LAYERS + 1):
    """Return hidden states ``[N, S, H]`` after each layer, their mask, and the same states packed."""
    batch = ragged(kind)
    mask = batch["attention_mask"]
    padded = torch.randn(count, *mask.shape, SIZE, generator=torch.Generator().manual_seed(1))
    segments = pack(batch["input_ids"], mask)
    packed = [Rows(x[mask.bool()], segments, None, None, len(mask), int(mask.sum())) for x in padded]
    return padded, mask, packed


def close(got, expected, tolerance=1e-5):
    return got.shape == expected.shape and (got - expected).abs().max() < tolerance


@pytest.mark.parametrize(("pooling", "kind"), [(None, "full"), ("first", "right"), ("mean", "holes")])
def test_attention_exits_gates_and_projections_equal_the_reference(pooling, kind):
    heads = build(form="attention", width=16, pooling=pooling, gates=True, contrast=True)
    padded, mask, packed = states(kind)
    for layer in range(1, LAYERS + 1):
        expected, narrow = reference_networks.attention_exit(heads, layer, padded[layer], mask)
        got = heads(layer, packed[layer], {}, projects=layer < LAYERS)
        fused = heads.fused(layer, packed[layer], {}, None)
        assert close(got.logits, expected) and close(F.linear(fused.features, fused.weight, fused.bias), expected)
        if layer < LAYERS:
            wanted = reference_networks.projected(heads.contrast[layer - 1], narrow)[mask.bool()]
            assert close(got.projection, wanted)
        assert close(heads.gate(layer, packed[layer]), reference_networks.gate(heads, layer, padded[layer], mask))
        wanted = reference_networks.projected(heads.projectors[layer - 1], padded[layer])[mask.bool()]
        assert close(heads.project(layer, packed[layer]), wanted)


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_gradients_of_attention_exits_equal_the_reference(pooling):
    heads = build(form="attention", width=16, pooling=pooling, gates=True, contrast=True).train()
    padded, mask, packed = states("holes")

    def total(logits, gate, projection):
        return logits.sin().sum() + gate.sin().sum() + projection.sin().sum()

    def gradients(loss):
        heads.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in heads.named_parameters() if p.grad is not None}

    out = heads(1, packed[1], {}, projects=True)
    got = gradients(total(out.logits, heads.gate(1, packed[0]), out.projection))
    logits, narrow = reference_networks.attention_exit(heads, 1, padded[1], mask)
    projection = reference_networks.projected(heads.contrast[0], narrow)[mask.bool()]
    expected = gradients(total(logits, reference_networks.gate(heads, 1, padded[0], mask), projection))
    assert set(got) == set(expected) and len(got) > 20
    assert all(close(got[name], value, 1e-4) for name, value in expected.items())
    assert max(value.abs().max() for value in expected.values()) > 0.1


def halting(heads, layer, now, before):
    """Return the reference halting logit for the features of an exit and the previous one, both ``[N, F]``."""
    reads = heads.config.halting_input
    x = torch.cat((now, before), dim=1) if reads == "concat" else now - before if reads == "diff" else now
    head = heads.halting[0 if heads.config.halting_shared else layer - 1]
    assert len(head.hidden) == (0 if heads.config.halting_layers == 1 else heads.config.halting_layers)
    for hidden in head.hidden:
        x = torch.tanh(reference_networks.linear(hidden, x))
    return reference_networks.linear(head.out, x)[:, 0]


@pytest.mark.parametrize(("layers", "shared"), [(1, True), (3, False)])
@pytest.mark.parametrize("reads", ["single", "concat", "diff"])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_halting_equals_the_reference(pooling, reads, layers, shared):
    """r_0 = 0; at each layer its features and those of the previous layer."""
    heads = build(pooling=pooling, halting=True, halting_input=reads, halting_layers=layers, halting_shared=shared)
    padded, mask, packed = states("holes")
    kept = heads.first_memory(packed[0], "halting")
    fused = heads.first_memory(packed[0], "halting")
    before = torch.zeros(len(mask), SIZE)
    for layer in range(1, LAYERS + 1):
        now = reference_networks.pooled(padded[layer], mask, pooling)
        now = now if pooling else torch.tanh(reference_networks.linear(heads.dense[0], now))
        expected = halting(heads, layer, now, before)
        out = heads(layer, packed[layer], kept)
        alone = heads.fused(layer, packed[layer], fused, "halting")
        assert close(out.aux["halting"], expected) and close(alone.aux, expected)
        kept, fused, before = out.memory, alone.memory, now
    assert bool(kept) is (reads != "single")


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_dropout_of_a_difference_is_applied_once(pooling):
    """The difference of two equal exits is zero under dropout; otherwise entries are scaled by 2 or become zero."""
    heads = build(pooling=pooling, dropout=0.5, halting=True, halting_input="diff", halting_shared=True).train()
    out = heads.halting[0].out
    torch.nn.init.normal_(out.weight)
    torch.nn.init.constant_(out.bias, 0.25)
    _, _, packed = states("holes")
    before = heads(1, packed[1], heads.first_memory(packed[0], "halting"))
    same = heads(2, packed[1], before.memory)
    assert torch.equal(same.aux["halting"], torch.full_like(same.aux["halting"], 0.25))

    torch.nn.init.zeros_(out.weight)
    out.weight.data[0, 3] = 1.0
    after = heads(2, packed[2], before.memory)
    difference = (after.memory["features"] - before.memory["features"])[:, 3]
    seen = set()
    for _ in range(20):
        noise = (heads(2, packed[2], before.memory).aux["halting"] - 0.25) / difference
        seen |= {round(value, 3) for value in noise.tolist()}
    assert seen == {0.0, 2.0}


def test_biases_of_gates_and_halting_outputs_start_as_they_are_given():
    """Those of gates at -1.5; 0 is how all linears of the family start. Other weights do not depend on them."""
    torch.manual_seed(0)
    closed = early_exit("bert", method="smartbert").heads.state_dict()
    torch.manual_seed(0)
    plain = early_exit("bert", method=ee.methods.Smartbert(gate_bias=0.0)).heads.state_dict()
    biases = [name for name in closed if name.startswith("gates.") and name.endswith(".out.bias")]
    assert len(biases) == DEPTH and all(closed[n].tolist() == [-1.5] and plain[n].tolist() == [0.0] for n in biases)
    assert all(torch.equal(closed[name], value) for name, value in plain.items() if name not in biases)
    model = early_exit("bert", method=ee.methods.Dact(halting_bias=-2.5))
    assert [head.out.bias.item() for head in model.heads.halting] == [-2.5] * DEPTH


@pytest.mark.parametrize("kind", ["right", "holes"])
@pytest.mark.parametrize(("family", "pooling"), [("bert", None), ("bert", "mean"), ("albert", "first")])
def test_hidden_cosine_equals_that_of_the_stock_model(family, pooling, kind):
    model, base = early_exit(family, pooling=pooling), stock(family)
    batch = batch_for(model, kind)
    mask = batch["attention_mask"]
    with torch.no_grad():
        hidden = encoder_of(base)(**batch, output_hidden_states=True).hidden_states
        if family == "albert":
            assert hidden[0].shape == hidden[1].shape
    vectors = [reference_networks.pooled(x, mask, pooling) for x in hidden]
    assert len(vectors) == DEPTH + 1
    expected = torch.stack(
        [(a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)) for a, b in zip(vectors[1:], vectors, strict=False)], dim=1
    )
    got = model.trace(**batch).aux["hidden_cosine"]
    assert close(got, expected) and expected.std() > 1e-3


def left_at(cdf, q):
    """Return the first layer at which a row's cdf exceeds q, else the last layer."""
    return torch.where((cdf > q).any(1), (cdf > q).int().argmax(1) + 1, DEPTH)


@pytest.mark.parametrize(("family", "reads"), [("bert", "concat"), ("albert", "diff")])
def test_memory_stays_with_its_row(family, reads, backend):
    """When rows leave and move, a halting output still reads the previous exit of its own row."""
    model = early_exit(family, method=ee.methods.Palbert(halting_input=reads, halting_layers=1))
    model.configure(backend=backend)
    lengths = LENGTHS[:6] if backend == "triton" else LENGTHS
    batch = batch_for(model, lengths=lengths)
    with torch.no_grad():
        model.heads.halting[0].out.weight.mul_(3)
        model.heads.halting[0].out.bias.sub_(model.trace(**batch).aux["halting"].mean() + 1)
    trace = model.trace(**batch)
    cdf = (1 - (1 - trace.aux["halting"].sigmoid()).cumprod(dim=1))[:, : DEPTH - 1]
    values = cdf.flatten().sort().values
    choices = [float(a + b) / 2 for a, b in itertools.pairwise(values) if b - a > 1e-4]
    q = max(choices, key=lambda q: len(left_at(cdf, q).unique()))
    model.set_criterion(ee.criteria.QExit(q=q))
    expected = left_at(cdf, q)
    assert len(expected.unique()) >= 3
    outputs = []
    for compaction in ("always", "never"):
        model.configure(compaction=compaction)
        out = model(**batch)
        outputs.append((out.exit_layer, out.logits))
    ones = [model(**{name: x[i : i + 1] for name, x in batch.items()}) for i in range(len(lengths))]
    outputs.append((torch.cat([out.exit_layer for out in ones]), torch.cat([out.logits for out in ones])))
    answers = trace.logits[torch.arange(len(lengths)), expected - 1]
    for exits, logits in outputs:
        assert torch.equal(exits, expected) and close(logits, answers)


def test_shared_layers_share_their_exit():
    """PALBERT on ALBERT has one linear and one halting output for all layers; on BERT one linear for each layer."""
    model = early_exit("albert", method="palbert")
    heads = model.heads
    assert heads.config.shared_exit and [len(bank) for bank in (heads.out, heads.halting, heads.dense)] == [1, 1, 1]
    assert {part_of(model, f"heads.out.0.{name}") for name in ("weight", "bias")} == {"last_exit"}
    batch = batch_for(model)
    with torch.no_grad():
        hidden = encoder_of(stock("albert"))(**batch, output_hidden_states=True).hidden_states[1:]
        features = [torch.tanh(reference_networks.linear(heads.dense[0], x[:, 0])) for x in hidden]
        expected = torch.stack([reference_networks.linear(heads.out[0], x) for x in features], dim=1)
    assert close(model.trace(**batch).logits, expected)
    assert len(early_exit("bert", method="palbert").heads.out) == DEPTH


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
def test_own_dense_modules(family):
    """Each exit starts as a copy of the stock head and has its own dense module."""
    base = stock(family)
    model = ee.to_early_exit(base, method="deebert")
    names = {"bert": "bert.pooler.dense", "roberta": "classifier.dense", "albert": "albert.pooler"}
    dense = dict(base.named_modules())[names[family]]
    assert len(model.heads.dense) == DEPTH
    out = getattr(base.classifier, "out_proj", base.classifier)
    for bank, first in ((model.heads.dense, dense), (model.heads.out, out)):
        for own in bank:
            assert torch.equal(own.weight, first.weight) and torch.equal(own.bias, first.bias)
    parts = [part_of(model, f"heads.dense.{k}.weight") for k in range(DEPTH)]
    assert parts == ["early_exits"] * (DEPTH - 1) + ["last_exit"]
    batch = batch_for(model)
    before = model.trace(**batch).logits
    with torch.no_grad():
        model.heads.dense[1].bias.add_(1.0)
    changed = (model.trace(**batch).logits != before).any(dim=2).any(dim=0)
    assert changed.tolist() == [False, True, False, False]


REFUSED = [
    ({"pooling": "max"}, r"\(pooling=...\): expected one of \(None, 'first', 'mean', 'last'\), got 'max'"),
    ({"form": "lstm"}, r"\(form=...\): expected one of \('linear', 'attention'\), got 'lstm'"),
    ({"exit_dense": "none"}, r"\(exit_dense=...\): expected one of \('shared', 'own'\), got 'none'"),
    ({"halting_input": "sum"}, r"\(halting_input=...\): expected one of \('single', 'concat', 'diff'\), got 'sum'"),
    ({"width": 0}, r"\(width=...\): expected a whole number at least 1, got 0"),
    ({"width": 2.5}, r"\(width=...\): expected a whole number at least 1, got 2.5"),
    ({"width": "8"}, r"\(width=...\): expected a whole number at least 1, got '8'"),
    ({"attention_heads": 0}, r"\(attention_heads=...\): expected a whole number at least 1, got 0"),
    ({"halting_layers": -1}, r"\(halting_layers=...\): expected a whole number at least 1, got -1"),
    ({"halting_layers": True}, r"\(halting_layers=...\): expected a whole number at least 1, got True"),
    ({"halting": 1}, r"\(halting=...\): expected True or False, got 1"),
    ({"uncertainty": "no"}, r"\(uncertainty=...\): expected True or False, got 'no'"),
    ({"halting_bias": float("nan")}, r"\(halting_bias=...\): expected a finite number, got nan"),
    ({"dropout": 2.0}, r"\(dropout=...\): expected a finite number in \[0, 1\], got 2.0"),
    ({"activation": "zzz"}, r"\(activation=...\): expected one of .* got 'zzz'"),
    ({"form": "attention", "width": 10}, r"\(width=...\): expected a multiple of the 4 attention heads, got 10"),
    ({"gates": True, "width": 3}, "multiple of the 2 attention heads, got 3"),
    ({"contrast": True}, r"\(contrast=True\): expected form='attention'"),
]


def test_config_refuses():
    for fields, message in REFUSED:
        with pytest.raises(ValueError, match=f"^HeadConfig{message}" if message[0] == "\\" else message):
            HeadConfig(**fields)
