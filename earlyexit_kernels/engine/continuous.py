"""Continuous batching by depth: a pool of rows that have run different numbers of layers, and the choice of a step.

Rows whose next layer is the same wait together, the oldest first; where all layers are one, as in an ALBERT, that is
the whole pool. A step takes the oldest of them, up to `step_tokens` tokens, through that layer and its exits.

The clock of the pool counts work in tokens that ran a layer, and `TOKENS_PER_STEP` more for each step. A step pays

    sum over its rows of (1 + waited / deadline)  /  (its tokens + TOKENS_PER_STEP)

and the step that pays most is taken. Every `FAIR_EVERY` steps, the layer of the oldest row is taken instead. So the
oldest row of the pool leaves within FAIR_EVERY * L steps, and a row with m older ones within FAIR_EVERY * L * (m + 1).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.advance import Row, Step, Weights, advance
from earlyexit_kernels.errors import InvalidLogitsError
from earlyexit_kernels.ops.exit_step import valid_rows
from earlyexit_kernels.types import Answer

logger = logging.getLogger("earlyexit_kernels")

#: Fixed cost of a step in tokens: rows of 25 tokens cost 2.3 times as much a token one by one as in batches of 32
#: (MiniLM in the suite `profile`, benchmarks/results).
TOKENS_PER_STEP = 32
FAIR_EVERY = 8


class DepthPool:
    """Rows at different depths.

    Args:
        depth: L.
        step_tokens: most tokens of a step; a longer row runs alone.

    Attributes:
        clock: work so far, in tokens.
        steps: number of steps so far.
        tokens: in the pool.
    """

    def __init__(self, depth: int, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self.clock = self.steps = self.tokens = 0
        self._numbers = itertools.count()
        self._rows: dict[int, Row] = {}
        #: For each depth the lane of its rows: the first depth with the same next layer.
        self._lane_of = list(range(depth))
        #: Rows in order of arrival, by lane.
        self._lanes: list[list[Row]] = [[] for _ in range(depth)]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Number of rows that wait for each layer 1..L."""
        depths = [row.depth for row in self._rows.values()]
        return tuple(depths.count(depth) for depth in range(len(self._lanes)))

    def add(self, rule: Criterion, inputs: Sequence[Tensor], deadline: int) -> list[int]:
        """Add rows with their ids, positions and types ``[3, t]``, and return their numbers."""
        rows = [Row(next(self._numbers), rule, own, own.shape[1], self.clock, deadline) for own in inputs]
        self._rows.update((row.number, row) for row in rows)
        self._lanes[0] += rows
        self.tokens += sum(row.tokens for row in rows)
        return [row.number for row in rows]

    def discard(self, number: int) -> bool:
        """Remove a row; return whether it was in the pool."""
        row = self._rows.pop(number, None)
        if row is None:
            return False
        self._lanes[self._lane_of[row.depth]].remove(row)
        self.tokens -= row.tokens
        return True

    def restart(self, layers: Sequence[Callable[..., Any]]) -> None:
        """Take all rows back to the start, for other layers."""
        firsts = {id(layer): depth for depth, layer in reversed(list(enumerate(layers)))}
        self._lane_of = [firsts[id(layer)] for layer in layers]
        for row in self._rows.values():
            row.depth, row.hidden, row.state, row.memory = 0, None, None, {}
        self._lanes = [[] for _ in layers]
        self._lanes[0] += self._rows.values()

    @torch.no_grad()
    def step(self, weights: Weights, *, strict: bool) -> tuple[list[Answer], list[int]]:
        """Take the step that pays most.

        A step that raises is taken again row by row, and a row that raises alone leaves with the exception.

        Args:
            weights: of the model, with the layers of the last `restart`.
            strict: a row with invalid logits leaves with an error at that exit.

        Returns:
            The answers of the rows that leave, and for each layer 1..L the number of rows with invalid logits.
        """
        lane = self._next_lane()
        count, tokens, _ = self._load(self._lanes[lane])
        rows = self._lanes[lane][:count]
        failures: list[Answer] = []
        try:
            steps = [advance(weights, rows, find_invalid=strict)]
        except torch.AcceleratorError:
            raise  # after an error of the device nothing runs in this process
        except Exception as error:
            logger.warning("a step over %d rows failed and is taken row by row: %s", count, error)
            steps = []
            for row in rows:
                try:
                    steps.append(advance(weights, [row], find_invalid=strict))
                except Exception as own:
                    failures.append(_failure(row, weights, own))
        # only now, so that an interrupt leaves the pool as it was
        del self._lanes[lane][:count]
        self.steps += 1
        self.clock += tokens + TOKENS_PER_STEP
        answers = failures + [answer for step in steps for answer in self._move(weights, step)]
        for answer in answers:
            self.tokens -= self._rows.pop(answer.id).tokens
        return answers, [sum(each) for each in zip([0] * weights.depth, *(step.invalid for step in steps), strict=True)]

    def _next_lane(self) -> int:
        """Return the lane of the next step; among equals the deepest."""
        filled = [lane for lane, rows in enumerate(self._lanes) if rows]
        if self.steps % FAIR_EVERY == 0:
            return min(filled, key=lambda lane: self._lanes[lane][0].number)
        return max(filled, key=lambda lane: (self._load(self._lanes[lane])[2], lane))

    def _load(self, waiting: Sequence[Row]) -> tuple[int, int, float]:
        """Return the number of rows and tokens of a step over the oldest of these rows, and what it pays."""
        count, tokens, worth = 0, 0, 0.0
        for row in waiting:
            if count and tokens + row.tokens > self.step_tokens:
                break
            count, tokens = count + 1, tokens + row.tokens
            worth += 1 + (self.clock - row.arrived) / row.deadline
        return count, tokens, worth / (tokens + TOKENS_PER_STEP)

    def _move(self, weights: Weights, step: Step) -> list[Answer]:
        """Put the rows of a step into their next lanes, and return the answers of those that leave."""
        answers, filled = [], set()
        for row, progress in zip(step.rows, step.progress, strict=True):
            if progress.invalid:
                answers.append(_failure(row, weights, _invalid_logits(row, weights)))
            elif progress.logits is not None:
                found = any(step.invalid) and not bool(valid_rows(progress.logits[None], None))
                error = _invalid_logits(row, weights) if found else None
                answers.append(Answer(row.number, progress.logits, row.depth + 1, error))
            else:
                row.hidden, row.state, row.memory, *_ = progress
                row.depth += 1
                filled.add(self._lane_of[row.depth])
                self._lanes[self._lane_of[row.depth]].append(row)
        for lane in filled:
            self._lanes[lane].sort(key=_number)
        return answers


def _number(row: Row) -> int:
    return row.number


def _failure(row: Row, weights: Weights, error: Exception) -> Answer:
    """Return the answer of a row whose next layer or exit failed."""
    logits = torch.full((weights.view.classes,), math.nan, dtype=torch.float32, device=weights.device)
    return Answer(row.number, logits, row.depth + 1, error)


def _invalid_logits(row: Row, weights: Weights) -> InvalidLogitsError:
    return InvalidLogitsError(
        f"the row has invalid logits (NaN, several +inf, or all -inf) at layer {row.depth + 1} of {weights.depth}; "
        "check the weights and the input"
    )
