"""Entropy and patience in plain torch, as written without the package: the baseline, and in float64 the reference.

The baseline does less than the op: it does not look for invalid logits, all rows have one length, and none has moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Checked
from benchmarks.micro.decisions import DEPTH, LAYER, Outcome

State: TypeAlias = Sequence[Tensor]
#: ``(criterion, z [B, C], state) -> leaves [B], new state``.
Step: TypeAlias = Callable[[Any, Tensor, State], tuple[Tensor, State]]
#: Logits and scores are scaled by 1 plus and minus this: a row whose decision changes is within rounding.
ROUNDING = 1e-5
#: Largest difference of an answer, absolute and relative.
TOLERANCE = 1e-4


def _entropy(rule: Any, z: Tensor, state: State) -> tuple[Tensor, State]:
    return torch.special.entr(z.softmax(-1)).sum(-1) < rule.threshold, state


def _patience(rule: Any, z: Tensor, state: State) -> tuple[Tensor, State]:
    last, count = state
    label = z.argmax(-1)
    count = torch.where(label == last, count + 1, 0)
    return count >= rule.patience, (label, count)


#: How the chain computes logits: ready ones, or a linear on the first token or the mean of padded ``[B, S, H]``.
SOURCES: dict[str, Callable[..., Tensor]] = {
    "logits": lambda z: z,
    "first": lambda padded, weight, bias: F.linear(padded[:, 0], weight, bias),
    "mean": lambda padded, weight, bias: F.linear(padded.mean(dim=1), weight, bias),
}
STEPS: dict[str, Step] = {"entropy": _entropy, "patience": _patience}


def _first_state(name: str, z: Tensor) -> State:
    zeros = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    return (zeros - 1, zeros) if name == "patience" else ()


class PlainDecision:
    """A criterion at the middle layer in plain torch; `Decision` does the same with the package.

    Args:
        rule: entropy or patience.
        logits: ``[B, C]`` of every exit.
        source: computes the middle layer's logits from `inputs`, as part of what is timed; default: they are ready.
        inputs: tensors.
    """

    def __init__(
        self,
        rule: Any,
        logits: Sequence[Tensor],
        source: Callable[..., Tensor] = SOURCES["logits"],
        inputs: Sequence[Tensor] = (),
    ) -> None:
        self.rule, self.logits, self.step = rule, logits, STEPS[rule.name]
        z = logits[LAYER - 1]
        state = _first_state(rule.name, z)
        for layer in range(1, LAYER):
            _, state = self.step(rule, logits[layer - 1], state)
        zeros = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        #: Decides at the middle layer; this is what is timed.
        self.decide = functools.partial(
            chain_of(rule, source, len(state)), zeros.bool(), torch.zeros_like(z), zeros, *state, *(inputs or (z,))
        )

    def outcome(self) -> Outcome:
        """Run what is timed, then the remaining layers."""
        left, answers, exit_layer, live, *state = self.decide()
        done = left
        for layer in range(LAYER + 1, DEPTH + 1):
            z = self.logits[layer - 1]
            leaves, state = self.step(self.rule, z, state)
            leaves = ~done if layer == DEPTH else leaves & ~done
            answers, exit_layer = torch.where(leaves[:, None], z, answers), torch.where(leaves, layer, exit_layer)
            done = done | leaves
        return Outcome(left, int(live), answers, exit_layer)


def chain_of(rule: Any, source: Callable[..., Tensor], kept: int = 0) -> Callable[..., tuple[Tensor, ...]]:
    """Return a decision as a function of tensors alone, since torch.compile guards all other arguments at every call.

    It takes which rows have left ``[B]``, answers ``[B, C]``, exit layers ``[B]``, `kept` tensors of state and the
    inputs of `source`; it returns the first three, the count of live rows and the state.
    """
    step = STEPS[rule.name]

    def chain(done: Tensor, answers: Tensor, exit_layer: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        z = source(*given[kept:])
        leaves, state = step(rule, z, given[:kept])
        leaves = leaves & ~done
        done = done | leaves
        answers, exit_layer = torch.where(leaves[:, None], z, answers), torch.where(leaves, LAYER, exit_layer)
        return done, answers, exit_layer, (~done).sum(), *state

    return chain


class Reference:
    """The decision in float64: as it is, and with the logits of all exits scaled slightly down and up."""

    def __init__(self, rule: Any, logits: Sequence[Tensor]) -> None:
        def outcome(factor: float) -> Outcome:
            return PlainDecision(rule, [z.double() * factor for z in logits]).outcome()

        self.wanted, lower, higher = (outcome(factor) for factor in (1.0, 1 - ROUNDING, 1 + ROUNDING))
        self.sure = (lower.exit_layer == self.wanted.exit_layer) & (higher.exit_layer == self.wanted.exit_layer)

    def check(self, got: Outcome) -> Checked:
        """Compare an outcome with the reference; rows within rounding may go either way."""
        want, sure, rows = self.wanted, self.sure, len(self.sure)
        if int((~sure).sum()) > rows // 30:
            return Checked(f"the decisions of {int((~sure).sum())} of {rows} rows lie within rounding")
        turned = int((got.left != want.left)[sure].sum())
        if turned:
            return Checked(f"{turned} of {rows} rows decide otherwise")
        if got.live != int((~got.left).sum()):
            return Checked(f"{got.live} rows are counted live, {int((~got.left).sum())} are")
        if not torch.equal(got.exit_layer[sure], want.exit_layer[sure]):
            return Checked("rows leave at other layers after it")
        error = (got.answers.double() - want.answers).abs()[sure]
        allowed = TOLERANCE * (1 + want.answers.abs()[sure])
        return Checked("" if bool((error <= allowed).all()) else f"answers are off by up to {float(error.max()):.2g}")
