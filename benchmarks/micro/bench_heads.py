"""One exit of one layer, form by form, up to its decision; and the gate before a layer.

    python -m pytest benchmarks/micro/bench_heads.py --benchmark-only -k attention

An exit is run as the engine runs it: the features in torch, their last linear and the decision in `exit_step`. A gate
has no op of its own, so it runs in torch alone. Forms that multiply large matrices, beside which the last linear is
nothing, stop at 128 rows and don't vary the classes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.micro import measure, plain_heads
from benchmarks.micro.decisions import LAYER, Decision, Head, nbytes, on_device, random_trace
from benchmarks.micro.measure import BASE, COMPILED, COPY, EAGER, Group, Shape, Way, around, repeated
from benchmarks.micro.plain_exits import TOLERANCE, PlainExit, Reference, given_by
from benchmarks.micro.plain_rules import entropy_of
from earlyexit_kernels.criteria import Criterion, Entropy, Learned, QExit
from earlyexit_kernels.engine.packing import PackedStates, pack, plan_attention
from earlyexit_kernels.heads import ExitHeads, HeadConfig
from earlyexit_kernels.types import ExitTrace, read_aux


def between(scores: Tensor) -> float:
    """A threshold that half of the scores ``[B]`` lie below, and none lies on."""
    ordered = scores.sort().values
    middle = len(ordered) // 2
    return float((ordered[middle] + (ordered[middle - 1] if middle else 0.9 * ordered[0])) / 2)


def entropy(trace: ExitTrace) -> Criterion:
    return Entropy(threshold=between(entropy_of(trace.logits[:, LAYER - 1])))


def q_exit(trace: ExitTrace) -> Criterion:
    return QExit(q=between(1 - (1 - read_aux(trace.aux["halting"], "halting"))[:, :LAYER].prod(dim=1)))


def learned(trace: ExitTrace) -> Criterion:
    return Learned(threshold=between(read_aux(trace.aux["uncertainty"], "uncertainty")[:, LAYER - 1]))


@dataclass(frozen=True)
class Form:
    """One form of exit.

    Attributes:
        config: its shape.
        plain: the same in plain torch.
        rule: that decides, given the trace of a batch.
        every_token: it reads all tokens, not only the first of each row.
        is_heavy: it multiplies large matrices.
    """

    config: HeadConfig
    plain: plain_heads.PlainHead
    rule: Callable[[ExitTrace], Criterion] = entropy
    every_token: bool = False
    is_heavy: bool = False


FORMS = {
    "linear": Form(HeadConfig(pooling="mean"), plain_heads.linear, every_token=True),
    "family dense": Form(HeadConfig(), plain_heads.family),
    "attention": Form(HeadConfig(form="attention"), plain_heads.attention, every_token=True, is_heavy=True),
    "halting": Form(
        HeadConfig(halting=True, halting_input="concat", halting_layers=3), plain_heads.halting, q_exit, is_heavy=True
    ),
    "uncertainty": Form(HeadConfig(uncertainty=True), plain_heads.uncertainty, learned),
}
GATE, GATE_SKIPS_FROM = "gate", 0.5
LIGHT, HEAVY = around("rows", "classes", "width"), around("rows", "width", most_rows=128)
CASES = [(name, shape) for name, form in FORMS.items() for shape in (HEAVY if form.is_heavy else LIGHT)]
CASES += [(GATE, shape) for shape in HEAVY]


def ways_of(name: str, shape: Shape) -> list[str]:
    """A gate runs in torch; one form is compiled, at the base point."""
    found = list(measure.ways_of(*([COMPILED] if (name, shape) == ("family dense", BASE) else [])))
    return [way for way in found if name != GATE or way in ("torch", EAGER, COPY)]


def heads_of(config: HeadConfig, shape: Shape) -> ExitHeads:
    """The heads of one layer, random, on the device."""
    torch.manual_seed(0)
    with torch.inference_mode(False):
        return ExitHeads(config, shape.width, shape.classes, 1).eval().requires_grad_(False).to(measure.DEVICE)


def states_of(shape: Shape) -> PackedStates:
    """Random tokens of rows of one length, and the attention over them."""
    hidden = torch.randn(shape.rows * shape.length, shape.width, generator=torch.Generator().manual_seed(0))
    batch = pack(torch.ones(shape.rows, shape.length, dtype=torch.long, device=measure.DEVICE), None)
    return PackedStates(hidden.to(measure.DEVICE), batch.offsets, plan_attention(batch))


class ThroughHeads(Decision):
    """A decision on what heads make of packed tokens.

    Args:
        rule, trace, backend, calls: as in `Decision`.
        heads: of one layer.
        states, memory: what they read.
    """

    def __init__(
        self,
        rule: Criterion,
        trace: ExitTrace,
        backend: str,
        calls: int,
        heads: ExitHeads,
        states: PackedStates,
        memory: dict[str, Tensor],
    ) -> None:
        linear = heads.linear_exits(states.hidden.dtype)
        head = None if linear is None else Head(states.hidden, states.offsets, *linear.weights[0], linear.pooling)
        super().__init__(rule, trace, backend, calls, head)
        self.heads, self.states, self.memory, self.is_linear = heads, states, memory, linear is not None

    def __call__(self) -> Tensor:
        if self.is_linear:
            return super().__call__()
        op, tail, needs, offsets = self.op, self.tail, self.rule.needs, self.states.offsets
        for buffers in self.copies:
            features, weight, bias, raw, _ = self.heads.fused(1, self.states, self.memory, needs)
            aux = None if raw is None or needs is None else read_aux(raw, needs)
            counts = op(features, offsets, weight, bias, None, aux, *buffers, *tail)
        return counts


def exit_group(name: str, shape: Shape) -> Group:
    """One exit and its decision; in the trace, the heads' output stands at the middle layer."""
    form, states, heads = FORMS[name], states_of(shape), heads_of(FORMS[name].config, shape)
    padded = states.hidden.view(shape.rows, shape.length, shape.width)
    memory = {key: torch.randn_like(x) for key, x in heads.first_memory(states, "halting").items()}
    inputs = (padded, *memory.values())
    middle = in_float64(form.plain, heads, inputs)
    heads.out[0].weight.mul_(float(2 / middle[0].std()))  # logits as a trained exit's
    middle = in_float64(form.plain, heads, inputs)
    trace = on_device(random_trace(shape.rows, shape.classes), measure.DEVICE)
    trace.logits[:, LAYER - 1] = middle[0]
    for values in trace.aux.values():
        values[:, LAYER - 1] = 0.0 if middle[1] is None else middle[1].logit()
    rule = form.rule(trace)
    given = given_by(rule, trace)
    reference = Reference(rule, given, trace.keys, middle)
    one = Decision(rule, trace, "torch", 1)
    read = padded if form.every_token else padded[:, 0]
    # memory is read, and written for the next exit
    moved = one.kept_bytes() + nbytes(read, *heads.parameters(), *memory.values(), *memory.values())
    calls = measure.calls_for(moved)

    def fused(backend: str) -> Way:
        decision = ThroughHeads(rule, trace, backend, calls, heads, states, memory)
        return Way(decision, lambda: reference.difference(decision.outcome()), decision.restore)

    def plain(compiles: bool) -> Way:
        source = functools.partial(form.plain, heads)
        chain = PlainExit(rule, given, trace.keys, source, inputs, compiles=compiles)
        return Way(repeated(chain.decide, calls), lambda: reference.difference(chain.outcome()))

    ways = {backend: fused(backend) for backend in measure.TIMED}
    ways |= {EAGER: plain(False), COPY: measure.copying(moved, calls)}
    if COMPILED in ways_of(name, shape):
        ways[COMPILED] = plain(True)
    facts = {"rule": rule.to_dict(), "left": one.left}
    return Group("head", name, shape, moved, calls, ways, facts)


def in_float64(plain: Callable[..., Any], heads: ExitHeads, inputs: Sequence[Tensor]) -> Any:
    """What a plain head gives in float64."""
    with torch.inference_mode(False), torch.no_grad():
        exact = copy.deepcopy(heads).double()
    return plain(exact, *(x.double() for x in inputs))


def gate_group(shape: Shape) -> Group:
    """The gate before a layer, and which rows skip it."""
    states, heads = states_of(shape), heads_of(HeadConfig(form="attention", gates=True), shape)
    padded = states.hidden.view(shape.rows, shape.length, shape.width)
    wanted = in_float64(plain_heads.gate, heads, (padded,))
    skips = torch.empty(shape.rows, dtype=torch.bool)
    moved = nbytes(padded, *heads.gates.parameters(), skips)
    calls = measure.calls_for(moved)

    def way(gate: Callable[[], Tensor]) -> Way:
        def difference() -> str:
            error = float((gate().double() - wanted).abs().max())
            return "" if error <= TOLERANCE else f"the gate is off by up to {error:.2g}"

        return Way(repeated(lambda: gate() >= GATE_SKIPS_FROM, calls), difference)

    ways = {
        "torch": way(lambda: torch.sigmoid(heads.gate(1, states).float())),
        EAGER: way(lambda: plain_heads.gate(heads, padded)),
        COPY: measure.copying(moved, calls),
    }
    return Group("head", GATE, shape, moved, calls, ways)


@functools.lru_cache(maxsize=1)
def group_of(name: str, shape: Shape) -> Group:
    """The ways of one case; they are timed one after the other, so one group is kept."""
    return gate_group(shape) if name == GATE else exit_group(name, shape)


@pytest.mark.parametrize(
    ("name", "shape", "way"),
    [
        pytest.param(name, shape, way, id=f"{name.replace(' ', '_')}-{shape.slug}-{way}")
        for name, shape in CASES
        for way in ways_of(name, shape)
    ],
)
def test_head(timed, name, shape, way):
    timed(group_of(name, shape), way)
