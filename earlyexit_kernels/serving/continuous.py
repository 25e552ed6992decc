"""The scheduler that lets rows of all depths share steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.hf.continuous import ContinuousBatch
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.hf.predict import PadRight
from earlyexit_kernels.serving.protocol import Found, Row
from earlyexit_kernels.serving.schedulers import Done, row_inputs, taken_out
from earlyexit_kernels.serving.settings import POOL_STEPS

logger = logging.getLogger("earlyexit_kernels")

#: Thresholds whose rows share exits, those used last.
THRESHOLDS = 64


class Continuous:
    """Rows join at layer 1 while others are deeper, and leave on their own; see `ContinuousBatch`.

    Args:
        model: in eval mode, with a criterion that skips no layers.
        max_tokens: of a step.
    """

    def __init__(self, model: EarlyExitForSequenceClassification, max_tokens: int) -> None:
        config: Any = model.config
        longest = model.adapter.longest(config.backbone_config)
        self._model, self._max_tokens = model, max(POOL_STEPS * max_tokens, longest)
        self._pool = ContinuousBatch(model, max_tokens=self._max_tokens, step_tokens=max_tokens)
        self._collate = PadRight.of(model)
        self._waiting: deque[Row] = deque()
        self._keys: dict[int, int] = {}
        self._refused: list[int] = []
        self._rule = lru_cache(THRESHOLDS)(self._with_threshold)

    @property
    def busy(self) -> bool:
        """Whether there are rows without an answer."""
        return bool(self._waiting or self._keys or self._refused)

    def add(self, rows: Iterable[Row]) -> None:
        """Take further rows."""
        self._waiting.extend(rows)

    def drop(self, keys: Iterable[int]) -> list[int]:
        """Remove rows, at whatever depth, and return their keys."""
        unwanted = set(keys)
        dropped = taken_out(self._waiting, unwanted)
        for number in [number for number, key in self._keys.items() if key in unwanted]:
            self._pool.discard(number)
            dropped.append(self._keys.pop(number))
        return dropped

    def step(self) -> Done:
        """Let rows join, and run some of the pool through a layer."""
        while rows := self._next_rows():
            self._join(rows)
        answers = self._pool.step()
        for answer in answers:
            if answer.error is not None:
                logger.error("the model failed on a row at layer %d: %s", answer.exit_layer, answer.error)
        found = [(self._keys.pop(answer.id), answer) for answer in answers]
        done = Done(
            [Found(key, answer.exit_layer, answer.logits.tolist()) for key, answer in found if answer.error is None],
            [key for key, answer in found if answer.error is not None] + self._refused,
        )
        self._refused = []
        return done

    def _next_rows(self) -> list[Row]:
        """Take the first rows of one threshold for which the pool has room."""
        rows: list[Row] = []
        tokens = self._pool.tokens
        while self._waiting and self._waiting[0].threshold == (rows or self._waiting)[0].threshold:
            tokens += len(self._waiting[0].input_ids)
            if tokens > self._max_tokens:
                break
            rows.append(self._waiting.popleft())
        return rows

    def _join(self, rows: list[Row]) -> None:
        """Put rows of one threshold into the pool; those that are refused have failed."""
        batch = self._collate([row_inputs(row) for row in rows])
        inputs: dict[str, Any] = {name: value.to(self._model.device) for name, value in batch.items()}
        try:
            numbers = self._pool.add(criterion=self._rule(rows[0].threshold), **inputs)
        except ValueError as error:
            if len(rows) > 1:
                for row in rows:
                    self._join([row])
                return
            logger.error("the model refuses a row of %d tokens: %s", len(rows[0].input_ids), error)
            self._refused.append(rows[0].key)
        else:
            self._keys.update(zip(numbers, (row.key for row in rows), strict=True))

    def _with_threshold(self, threshold: float | None) -> Criterion | None:
        if threshold is None:
            return None
        rule: Any = self._model.view().criterion
        return replace(rule, threshold=threshold)
