"""Skipped layers: inference against a plain loop over single rows, training against a plain mixture."""

from __future__ import annotations

import pytest
import torch
from support import reference_networks
from support.leaving_models import LENGTHS
from support.models import DEPTH, batch_for, entropies, rows_of, stock

import earlyexit_kernels as ee
from earlyexit_kernels.core import loop
from earlyexit_kernels.criteria import Entropy, FullDepth, HiddenCosine, Patience, QExit, SkipGate

#: One of each code path: norms after, groups that layers share, norms before.
FAMILIES = ("bert", "albert", "roberta-prelayernorm")
SKIP_FROM = 0.5
TOLERANCE = 1e-5
#: Bias with which a gate is open or closed for all inputs.
SHUT, OPEN = -50.0, 50.0


class GatedModel:
    """A model with gates, the stock model around the same parameters, and a batch as single rows without padding."""

    def __init__(self, family="bert", *, pooling=None, rows=16, **arguments):
        self.base = stock(family, dropout=0.0)
        self.model = ee.to_early_exit(self.base, method="smartbert", pooling=pooling, **arguments)
        self.heads, self.layers = self.model.heads, reference_networks.layers_of(self.base)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for head in (*self.heads.out, *(module.out for module in (*self.heads.gates, *self.heads.halting))):
                spread = torch.randn(head.weight.shape, generator=generator)
                head.weight.copy_(2 * spread / head.weight.shape[1] ** 0.5)
        self.batch = batch_for(self.model, lengths=LENGTHS[:rows])
        self.ids = [row["input_ids"][None] for row in rows_of(self.batch)]
        self.read = self.model.adapter.exit_norm(self.model.backbone) or torch.nn.Identity()

    def gate(self, layer, hidden):
        return reference_networks.gate(self.heads, layer, self.read(hidden), torch.ones(hidden.shape[:2])).sigmoid()

    def exit(self, layer, hidden):
        return reference_networks.attention_exit(self.heads, layer, self.read(hidden), torch.ones(hidden.shape[:2]))[0]

    def set_gate(self, layer, bias):
        with torch.no_grad():
            self.heads.gates[layer - 1].out.bias.fill_(bias)

    @torch.no_grad()
    def balance(self, runs=0.5):
        """Set biases: of the gates so that a share `runs` of the rows runs each layer, of the exits against a preferred
        class. Return an entropy rule by which some of the rows that ran leave, with no score near a threshold."""
        present = {i: reference_networks.embedded(self.base, ids) for i, ids in enumerate(self.ids)}
        thresholds = []
        for layer, run in enumerate(self.layers, start=1):
            self.set_gate(layer, 0.0)
            g = {i: self.gate(layer, h).logit().item() for i, h in present.items()}
            middle = split(list(g.values()), runs)
            self.set_gate(layer, -middle)
            ran = {i: run(h) for i, h in present.items() if g[i] < middle}
            present |= ran
            z = {i: self.exit(layer, h) for i, h in (ran or present).items()}
            self.heads.out[layer - 1].bias.sub_(torch.cat(list(z.values())).mean(0))
            scores = {i: entropies(self.exit(layer, h))[0].item() for i, h in ran.items()}
            if layer < DEPTH:
                thresholds.append(max(split(list(scores.values()), 0.3), 0.0))
                present = {i: h for i, h in present.items() if scores.get(i, 9.0) >= thresholds[-1]}
        return Entropy(threshold=thresholds)

    @torch.no_grad()
    def alone(self, leaves):
        """Return logits, exit layer and layers run of each row, from a plain loop."""
        found = [self._row(reference_networks.embedded(self.base, ids), leaves()) for ids in self.ids]
        logits, exit_layer, layers_run = zip(*found, strict=True)
        return torch.cat(logits), torch.tensor(exit_layer), torch.tensor(layers_run)

    def _row(self, hidden, leaves):
        layers_run = 0
        for layer, run in enumerate(self.layers, start=1):
            before = hidden
            if not self.gate(layer, hidden).item() >= SKIP_FROM:
                hidden, layers_run = run(hidden), layers_run + 1
                if layer < DEPTH:
                    z = self.exit(layer, hidden)
                    if leaves(layer, z[0], self.read(before), self.read(hidden)):
                        return z, layer, layers_run
        return self.exit(DEPTH, hidden), DEPTH, layers_run


def split(values, share):
    """A number in the middle between two of the values, with about this share of the values below it."""
    ordered = sorted(values)
    wanted = max(round(share * len(ordered)), 1)
    near = [k for k in (wanted - 1, wanted, wanted + 1) if 0 < k < len(ordered)]
    if not near:
        return -1.0
    best = max(near, key=lambda k: ordered[k] - ordered[k - 1])
    assert ordered[best] - ordered[best - 1] > 20 * TOLERANCE
    return (ordered[best] + ordered[best - 1]) / 2


def by_entropy(rule):
    return lambda: lambda layer, z, before, after: entropies(z) < rule.threshold[layer - 1]


def by_patience(patience):
    def fresh():
        labels = []

        def leaves(layer, z, before, after):
            labels.append(z.argmax().item())
            last = labels[-patience - 1 :]
            return len(last) == patience + 1 and len(set(last)) == 1

        return leaves

    return fresh


def by_cosine(threshold):
    def leaves(layer, z, before, after):
        a, b = before[0, 0], after[0, 0]
        return (a @ b / (a.norm() * b.norm())).item() >= threshold

    return lambda: leaves


def never():
    return lambda layer, z, before, after: False


def agrees(out, expected):
    logits, exit_layer, layers_run = expected
    assert torch.equal(out.exit_layer, exit_layer) and torch.equal(out.layers_run, layers_run)
    assert (out.logits - logits).abs().max() < TOLERANCE


def skipping(exit):
    return SkipGate(threshold=SKIP_FROM, exit=exit)


@pytest.mark.parametrize(("family", "pooling"), [*((family, None) for family in FAMILIES), ("bert", "mean")])
def test_equals_a_plain_loop(family, pooling, backend, monkeypatch):
    """With every compaction, alone and together."""
    monkeypatch.setitem(loop.COMPACTION_COSTS, "cpu", loop.CompactionCost(value=4 * 64 + 2 * 96, fixed=0))
    gated = GatedModel(family, pooling=pooling, rows=8 if backend == "triton" else 16)
    rule = gated.balance()
    gated.model.configure(backend=backend)
    gated.model.set_criterion(skipping(rule))
    expected = gated.alone(by_entropy(rule))
    _, exit_layer, layers_run = expected
    assert len(exit_layer.unique()) >= 3 and (layers_run < exit_layer).sum() >= 3 and layers_run.max() >= 2
    for compaction in ("always", "never", "auto"):
        gated.model.configure(compaction=compaction)
        agrees(gated.model(**gated.batch), expected)
    for row in range(4):
        one = {name: values[row : row + 1] for name, values in gated.batch.items()}
        agrees(gated.model(**one), [x[row : row + 1] for x in expected])


@pytest.mark.parametrize(
    ("family", "rule", "loop"),
    [("bert", Patience(patience=1), by_patience(1)), ("albert", HiddenCosine(threshold=0.5), by_cosine(0.5))],
)
def test_other_exit_rules_equal_a_plain_loop(family, rule, loop):
    """The state of a rule depends only on the layers that ran."""
    gated = GatedModel(family)
    gated.balance(runs=0.75)
    gated.model.set_criterion(skipping(rule))
    expected = gated.alone(loop)
    assert len(expected[1].unique()) >= 2 and len(expected[2].unique()) >= 2
    agrees(gated.model(**gated.batch), expected)


@pytest.mark.parametrize("compaction", ["always", "never"])
def test_gates_all_open_or_all_closed(compaction):
    """All rows skip no layer, one, the last one, or all; without skips the answers are those of the exit rule."""
    gated = GatedModel()
    gated.model.configure(compaction=compaction)
    rule = gated.balance()
    for opened, exit, plain in (
        (set(), rule, by_entropy(rule)),
        ({2}, rule, by_entropy(rule)),
        ({1, DEPTH}, FullDepth(), never),
        ({DEPTH}, rule, by_entropy(rule)),
        ({1, 2, 3, 4}, rule, by_entropy(rule)),
    ):
        for layer in range(1, DEPTH + 1):
            gated.set_gate(layer, OPEN if layer in opened else SHUT)
        gated.model.set_criterion(skipping(exit))
        out = gated.model(**gated.batch)
        agrees(out, gated.alone(plain))
        assert not set(out.exit_layer.tolist()) & (opened - {DEPTH})
        passed = torch.tensor([len([k for k in opened if k <= layer]) for layer in out.exit_layer.tolist()])
        assert torch.equal(out.layers_run, out.exit_layer - passed)
        if not opened:
            gated.model.set_criterion(exit)
            plain = gated.model(**gated.batch)
            agrees(out, (plain.logits, plain.exit_layer, plain.layers_run))
            assert len(plain.exit_layer.unique()) >= 3
    none = gated.model(**{name: values[:0] for name, values in gated.batch.items()})
    assert none.logits.shape == (0, 3) and none.layers_run.shape == none.exit_layer.shape == (0,)


def test_gate_value_equal_to_the_threshold_skips():
    """sigmoid(0) = 0.5: the layer is skipped at threshold 0.5, and runs above."""
    gated = GatedModel()
    for gate in gated.heads.gates:
        with torch.no_grad():
            gate.out.weight.zero_()
            gate.out.bias.zero_()
    for threshold, layers_run in ((0.5, 0), (0.51, DEPTH), (0.0, 0), (1.0, DEPTH)):
        gated.model.set_criterion(SkipGate(threshold=threshold, exit=FullDepth()))
        assert gated.model(**gated.batch).layers_run.tolist() == [layers_run] * len(LENGTHS)


def test_nan_gate_runs_the_layer():
    gated = GatedModel()
    for layer, bias in enumerate((OPEN, float("nan"), OPEN, OPEN), start=1):
        gated.set_gate(layer, bias)
    gated.model.set_criterion(skipping(Entropy(threshold=0.0)))
    out = gated.model(**gated.batch)
    assert out.layers_run.tolist() == [1] * len(LENGTHS)
    agrees(out, gated.alone(never))


def test_nan_row_runs_all_layers_and_does_not_affect_others():
    gated = GatedModel()
    gated.model.set_criterion(skipping(gated.balance()))
    expected = gated.model(**gated.batch)
    poison = 119
    ids = torch.cat([torch.full_like(gated.batch["input_ids"][:1], poison), gated.batch["input_ids"]])
    mask = torch.cat([gated.batch["attention_mask"][1:2], gated.batch["attention_mask"]])
    with torch.no_grad():
        gated.model.get_input_embeddings().weight[poison] = float("nan")
    out = gated.model(input_ids=ids, attention_mask=mask)
    assert (out.exit_layer[0], out.layers_run[0]) == (DEPTH, DEPTH) and out.logits[0].isnan().all()
    for got, wanted in ((out.exit_layer, expected.exit_layer), (out.layers_run, expected.layers_run)):
        assert torch.equal(got[1:], wanted)
    assert (out.logits[1:] - expected.logits).abs().max() < TOLERANCE


def test_skipped_layers_do_not_change_the_halting_probability():
    """A halting probability of 0.4 at each layer passes q = 0.6 at the second one that ran."""
    gated = GatedModel(halting=True)
    for layer, bias in enumerate((SHUT, OPEN, SHUT, SHUT), start=1):
        gated.set_gate(layer, bias)
    with torch.no_grad():
        for head in gated.heads.halting:
            head.out.weight.zero_()
            head.out.bias.fill_(torch.tensor(0.4).logit())
    gated.model.set_criterion(skipping(QExit(q=0.6)))
    out = gated.model(**gated.batch)
    assert out.exit_layer.tolist() == [3] * len(LENGTHS) and out.layers_run.tolist() == [2] * len(LENGTHS)


def test_full_depth_pass_is_refused():
    """Skips change the input of all later layers, so a full-depth pass does not contain their results."""
    gated = GatedModel(rows=2)
    gated.model.set_criterion(skipping(Entropy(threshold=0.3)))
    words = r"cannot be replayed, since a layer that a row|changes all later hidden states"
    for options in ({"output_all_logits": True}, None):
        with pytest.raises(ValueError, match=words):
            gated.model.trace(**gated.batch) if options is None else gated.model(**gated.batch, **options)
    gated.model.set_criterion(None)
    assert gated.model.trace(**gated.batch).logits.shape == (2, DEPTH, 3)


class HardGate(torch.autograd.Function):
    """1 from the threshold on, else 0; the gradient is that of the identity."""

    @staticmethod
    def forward(ctx, g):
        return (g >= SKIP_FROM).to(g.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def plain_exits(gated, hard):
    """Return logits ``[N, L, C]`` and gate logits ``[N, L]`` of rows mixed by their gates, one row at a time."""
    exits, gates = [], []
    for ids in gated.ids:
        h, row, opened = reference_networks.embedded(gated.base, ids), [], []
        for layer, run in enumerate(gated.layers, start=1):
            own, g = run(h), gated.gate(layer, h)
            opened.append(g)
            share = HardGate.apply(g) if hard else g
            h = (1 - share) * own + share * h
            row.append(gated.exit(layer, h if layer == DEPTH else own))
        exits.append(torch.stack(row, dim=1))
        gates.append(torch.stack(opened, dim=1))
    return torch.cat(exits), torch.cat(gates)


@pytest.mark.parametrize("epoch", [2.9, 3.0], ids=["soft to the end", "hard"])
@pytest.mark.parametrize(("family", "pooling"), [("bert", None), ("albert", "mean"), ("roberta-prelayernorm", None)])
def test_training_equals_a_plain_loop(family, epoch, pooling):
    """Soft gates g up to epoch 3, then 1[g >= s] with the gradient of g."""
    gated = GatedModel(family, pooling=pooling, rows=6)
    gated.balance()
    gated.model.train()
    gated.base.train()
    gated.model.schedule.enter(gated.model, 0)
    gated.model.schedule.set_progress(5, epoch)
    weights = torch.randn(6, DEPTH, 3, generator=torch.Generator().manual_seed(2))

    def gradients(logits):
        gated.model.zero_grad()
        (logits * weights).sum().backward()
        return {name: p.grad.clone() for name, p in gated.model.named_parameters() if p.grad is not None}

    hard = epoch >= 3
    wanted, gates = plain_exits(gated, hard)
    assert ((gates >= SKIP_FROM).any(0) & (gates < SKIP_FROM).any(0)).any()
    expected = gradients(wanted)
    got = gated.model(**gated.batch).all_logits
    assert (got - wanted).abs().max() < TOLERANCE
    found = gradients(got)
    assert {name for name, value in found.items() if value.abs().max() > 0} >= set(expected)
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        assert (found[name] - value).abs().max() < 2e-5 * scale, name
    assert all(expected[f"heads.gates.{k}.out.weight"].abs().max() > 1e-3 for k in range(DEPTH))


def test_a_gate_at_the_threshold_skips_its_layer():
    """In hard training as in inference."""
    gated = GatedModel(rows=4)
    torch.nn.init.zeros_(gated.heads.gates[0].out.weight)
    for layer in range(1, DEPTH + 1):
        gated.set_gate(layer, 0.0 if layer == 1 else SHUT)
    gated.model.set_criterion(skipping(FullDepth()))
    expected = gated.model(**gated.batch)
    assert expected.layers_run.tolist() == [DEPTH - 1] * 4
    gated.model.train()
    gated.model.schedule.enter(gated.model, 1)
    assert (gated.model(**gated.batch).logits - expected.logits).abs().max() < TOLERANCE
