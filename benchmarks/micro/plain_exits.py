"""The same decisions in plain torch, as a user writes them into a loop over padded rows, without the package.

In float32 this is the baseline that is timed, and in float64 the reference that all that is timed has to match. It does
less than the op: nothing looks for logits without a meaning, all rows have one length, and none has moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.micro.decisions import DEPTH, LAYER, Outcome, aux_of
from benchmarks.micro.measure import compiled
from benchmarks.micro.plain_rules import STEPS, first_state
from earlyexit_kernels.types import ExitTrace

#: Logits ``[B, C]`` of an exit, and its scalar ``[B]`` or None; and what computes them from tensors.
Exit: TypeAlias = tuple[Tensor, Tensor | None]
Source: TypeAlias = Callable[..., Exit]

#: Logits and scalars are scaled by 1 plus and minus this: a row whose decision turns lies within rounding.
ROUNDING = 1e-5
#: Largest difference of an answer, absolute and relative.
TOLERANCE = 1e-4


def ready(z: Tensor, aux: Tensor | None = None) -> Exit:
    """Ready logits ``[B, C]``, and a ready scalar ``[B]`` where the rule reads one."""
    return z, aux


def first_linear(padded: Tensor, weight: Tensor, bias: Tensor, aux: Tensor | None = None) -> Exit:
    """A linear exit on the first token of padded ``[B, S, H]``."""
    return F.linear(padded[:, 0], weight, bias), aux


def mean_linear(padded: Tensor, weight: Tensor, bias: Tensor, aux: Tensor | None = None) -> Exit:
    """A linear exit on the mean of padded ``[B, S, H]``; no row is shorter than S, so there is no mask."""
    return F.linear(padded.mean(dim=1), weight, bias), aux


LINEAR: dict[str, Source] = {"first": first_linear, "mean": mean_linear}


def given_by(rule: Any, trace: ExitTrace) -> list[Exit]:
    """Logits and scalar of every exit of a trace."""
    return [(trace.logits[:, k].contiguous(), aux) for k, aux in enumerate(aux_of(rule, trace))]


class PlainExit:
    """One rule at the middle layer in plain torch; `Decision` is the same with the package.

    Args:
        rule: the criterion.
        given: logits and scalar of every exit, float32 or float64.
        keys: ``[B]``, for the draws.
        source: computes the middle layer's logits and scalar, as part of what is timed.
        inputs: what it computes them from; default: those given.
        compiles: run what is timed under torch.compile.
    """

    def __init__(
        self,
        rule: Any,
        given: Sequence[Exit],
        keys: Tensor | None,
        source: Source = ready,
        inputs: Sequence[Tensor] = (),
        *,
        compiles: bool = False,
    ) -> None:
        self.rule, self.given, self.step = rule, given, STEPS[rule.name]
        z = given[0][0]
        state = first_state(rule, z, keys)
        for layer in range(1, LAYER):
            _, _, state = self.step(rule, *given[layer - 1], state, layer)
        zeros = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        chain = _chain(rule, source, len(state))
        inputs = inputs or tuple(x for x in given[LAYER - 1] if x is not None)
        #: Decides at the middle layer; what is timed.
        self.decide = functools.partial(
            compiled(chain) if compiles else chain, zeros.bool(), torch.zeros_like(z), zeros, *state, *inputs
        )

    def outcome(self) -> Outcome:
        """Run what is timed, then the layers that remain."""
        left, answers, exit_layer, live, *state = self.decide()
        done = left
        for layer in range(LAYER + 1, DEPTH + 1):
            answer, leaves, state = self.step(self.rule, *self.given[layer - 1], state, layer)
            leaves = ~done if layer == DEPTH else leaves & ~done
            answers, exit_layer = torch.where(leaves[:, None], answer, answers), torch.where(leaves, layer, exit_layer)
            done = done | leaves
        return Outcome(left, int(live), answers, exit_layer)


def _chain(rule: Any, source: Source, kept: int) -> Callable[..., tuple[Tensor, ...]]:
    """What is timed, on tensors alone: torch.compile looks at everything else it is given, at every call."""
    step = STEPS[rule.name]

    def chain(done: Tensor, answers: Tensor, exit_layer: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        answer, leaves, state = step(rule, *source(*given[kept:]), given[:kept], LAYER)
        leaves = leaves & ~done
        done = done | leaves
        answers, exit_layer = torch.where(leaves[:, None], answer, answers), torch.where(leaves, LAYER, exit_layer)
        return done, answers, exit_layer, (~done).sum(), *state

    return chain


class Reference:
    """The decision in float64: as it is, and with logits and scalars a rounding step lower and higher.

    Args:
        rule, given, keys: as in `PlainExit`.
        middle: logits and scalar of the middle layer in float64; None takes `given`.
    """

    def __init__(self, rule: Any, given: Sequence[Exit], keys: Tensor | None, middle: Exit | None = None) -> None:
        exits = list(given)
        exits[LAYER - 1] = middle or exits[LAYER - 1]

        def outcome(factor: float) -> Outcome:
            scaled = [(z.double() * factor, None if a is None else a.double() * factor) for z, a in exits]
            return PlainExit(rule, scaled, keys).outcome()

        self.wanted, lower, higher = (outcome(factor) for factor in (1.0, 1 - ROUNDING, 1 + ROUNDING))
        self.sure = (lower.exit_layer == self.wanted.exit_layer) & (higher.exit_layer == self.wanted.exit_layer)

    def difference(self, got: Outcome) -> str:
        """What of an outcome isn't the reference's; ``""`` where nothing is. Rows within rounding may go either way."""
        want, sure, rows = self.wanted, self.sure, len(self.sure)
        if int((~sure).sum()) > rows // 30:
            return f"the decisions of {int((~sure).sum())} of {rows} rows lie within rounding"
        turned = int((got.left != want.left)[sure].sum())
        if turned:
            return f"{turned} of {rows} rows decide otherwise"
        if got.live != int((~got.left).sum()):
            return f"{got.live} rows are counted live, {int((~got.left).sum())} are"
        if not torch.equal(got.exit_layer[sure], want.exit_layer[sure]):
            return "rows leave at other layers after it"
        error = (got.answers.double() - want.answers).abs()[sure]
        allowed = TOLERANCE * (1 + want.answers.abs()[sure])
        if not bool((error <= allowed).all()):
            return f"answers are off by up to {float(error.max()):.2g}"
        return ""
