"""Entropy and patience in plain torch, as written without the package: what the ops are timed beside and compared with.

The chain does less than the op: it does not look for invalid logits, all rows have one length, and none has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Checked
from benchmarks.micro.decisions import LAYER

State: TypeAlias = Sequence[Tensor]
#: ``(criterion, z [B, C], state) -> leaves [B], new state``.
Step: TypeAlias = Callable[[Any, Tensor, State], tuple[Tensor, State]]
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


def chain_of(rule: Any, source: Callable[..., Tensor], kept: int = 0) -> Callable[..., tuple[Tensor, ...]]:
    """Return a decision as a function of tensors alone, since torch.compile guards all other arguments at every call.

    It takes which rows have left ``[B]``, answers ``[B, C]``, exit layers ``[B]``, `kept` tensors of state and the
    inputs of `source`; it returns the first three, the count of live rows and the state.
    """
    step = STEPS[rule.name]

    def chain(done: Tensor, answers: Tensor, exit_layer: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        z = source(*given[kept:])
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        leaves, state = step(rule, z, given[:kept])
        leaves = leaves & ~done
        done = done | leaves
        answers, exit_layer = torch.where(leaves[:, None], z, answers), torch.where(leaves, LAYER, exit_layer)
        return done, answers, exit_layer, (~done).sum(), *state

    return chain


class PlainDecision:
    """A criterion at the middle layer in plain torch; `Decision` does the same with the package.

    Args:
        rule: entropy or patience.
        logits: ``[B, C]`` of the exits up to the middle layer.
        source: a name of `SOURCES`, by which the middle layer's logits are computed as part of what is timed.
        inputs: of the source.
    """

    def __init__(self, rule: Any, logits: Sequence[Tensor], source: str, inputs: Sequence[Tensor]) -> None:
        zeros = torch.zeros(len(logits[0]), dtype=torch.int64, device=logits[0].device)
        state: State = (zeros - 1, zeros) if rule.name == "patience" else ()
        for z in logits[: LAYER - 1]:
            _, state = STEPS[rule.name](rule, z, state)
        self.chain = chain_of(rule, SOURCES[source], len(state))
        self.start, self.inputs = (zeros.bool(), torch.zeros_like(logits[0]), zeros, *state), inputs

    def __call__(self) -> tuple[Tensor, ...]:
        """Decide; this is what is timed."""
        return self.chain(*self.start, *self.inputs)

    def check(
        self, left: Tensor, live: int, answers: Tensor, *, tolerance: float = TOLERANCE, turns: int = 30
    ) -> Checked:
        """Compare a decision with this one in float64; one row in `turns` may lie within rounding of the threshold.

        Args:
            left: rows that left, ``[B]``.
            live: how many rows were counted live.
            answers: ``[B, C]``, read for the rows that left.
            tolerance: largest difference of an answer, absolute and relative.
            turns: see above.
        """
        done, zeros, *rest = self.start
        want, expected, *_ = self.chain(done, zeros.double(), *rest, *(x.double() for x in self.inputs))
        turned, both = int((left != want).sum()), left & want
        if turned > len(left) // turns:
            return Checked(f"{turned} of {len(left)} rows decide otherwise")
        if live != int((~left).sum()):
            return Checked(f"{live} rows are counted live, {int((~left).sum())} are")
        error = (answers.double() - expected).abs()[both]
        allowed = tolerance * (1 + expected.abs()[both])
        return Checked("" if bool((error <= allowed).all()) else f"answers are off by up to {float(error.max()):.2g}")
