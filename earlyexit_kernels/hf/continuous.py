"""Continuous batching by depth: rows join at layer 1 while others are deeper, and leave on their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from earlyexit_kernels.arguments import whole
from earlyexit_kernels.criteria import RULES, Criterion, check_fits, check_known
from earlyexit_kernels.criteria.base import refused_criterion_message
from earlyexit_kernels.engine.advance import Weights
from earlyexit_kernels.engine.continuous import DepthPool
from earlyexit_kernels.engine.embedding import pack_inputs
from earlyexit_kernels.engine.fingerprint import ContentFingerprint
from earlyexit_kernels.engine.packing import check_attention
from earlyexit_kernels.errors import PoolFullError
from earlyexit_kernels.hf.inputs import check_backbone, check_batch
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.types import Answer

AT_LEAST_ONE = whole(low=1)


class ContinuousBatch:
    """A pool of rows at different depths of one model, for servers: rows are added at any time and leave on their own.

    `add` puts rows into the pool; each `step` runs some of them through one layer and returns the answers of those that
    leave there. A row gets the answer and exit layer that `forward` gives it, up to the rounding of another batch size,
    whatever shares the pool. A row with invalid logits, or that makes a layer raise, does not affect the others; its
    `Answer.error` says so.

    A step takes the rows that wait for one layer, oldest first, or rows of all depths where layers are one, as in an
    ALBERT. It is chosen by what it pays: the sum of 1 + waited / deadline over its rows, divided by its cost; both
    waiting and cost are counted in tokens that ran a layer. Every eighth step takes the layer of the oldest row, so
    that a row with m older ones in the pool leaves within 8 * L * (m + 1) steps.

    Weights may change between steps: rows in the pool then start again at layer 1, and their bound too, so that no
    answer mixes two states of the weights. A row keeps the criterion with which it was added. Not thread-safe: use a
    pool, and change its model, from one thread or under a lock.

    Args:
        model: in eval mode.
        max_tokens: most tokens in the pool; rows that do not fit are refused by `add`. A token takes 24 bytes, and from
            layer 1 on its hidden state.
        step_tokens: most tokens of a step; a longer row runs alone.
        deadline: default of `add`.

    Raises:
        TypeError: not an early-exit model.
        ValueError: a number is not whole or below 1, or the criterion of the model skips layers.

    Example:

        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> from earlyexit_kernels.tasks.toy import toy_model
        >>> pool = ee.ContinuousBatch(ee.to_early_exit(toy_model(layers=2, hidden=8)).eval())
        >>> pool.add(input_ids=torch.tensor([[2, 7, 3], [2, 9, 3]])), pool.waiting
        ([0, 1], (2, 0))
        >>> pool.step(), pool.waiting  # without a criterion, rows leave at the last layer
        ([], (0, 2))
        >>> pool.add(input_ids=torch.tensor([[2, 8, 3]]))
        [2]
        >>> [(answer.id, answer.exit_layer) for answer in pool.drain()]
        [(0, 2), (1, 2), (2, 2)]
    """

    def __init__(
        self,
        model: EarlyExitForSequenceClassification,
        *,
        max_tokens: int = 65536,
        step_tokens: int = 1024,
        deadline: int = 512,
    ) -> None:
        if not isinstance(model, EarlyExitForSequenceClassification):
            raise TypeError(f"ContinuousBatch: expected an early-exit model, got {type(model).__name__}")
        self._model = model
        self._criterion(None)
        self._max_tokens = AT_LEAST_ONE("ContinuousBatch(max_tokens=...)", max_tokens)
        self._deadline = AT_LEAST_ONE("ContinuousBatch(deadline=...)", deadline)
        self._pool = DepthPool(model.depth, AT_LEAST_ONE("ContinuousBatch(step_tokens=...)", step_tokens))
        self._weights: Weights | None = None
        self._made_from: Any = None
        self._settings: Any = None

    def __len__(self) -> int:
        """Return the number of rows in the pool."""
        return len(self._pool)

    @property
    def tokens(self) -> int:
        """Number of tokens in the pool."""
        return self._pool.tokens

    @property
    def waiting(self) -> tuple[int, ...]:
        """Number of rows that wait for each layer 1..L."""
        return self._pool.waiting

    def add(self, *, criterion: Criterion | None = None, deadline: int | None = None, **batch: Tensor) -> list[int]:
        """Add the rows of a batch, all or none, and return their ids, which count from 0.

        Args:
            criterion: of these rows; default: the current one of the model. Rows with the same object share exits.
            deadline: the work of the pool, in tokens that ran a layer, after which a row has waited so long that it
                counts twice; not a guarantee. A smaller number is more urgent. Default: that of the pool.
            batch: inputs as for `forward`, without labels.

        Raises:
            PoolFullError: the rows do not fit now.
            RuntimeError: the model is in train mode.
            TypeError: not a criterion.
            ValueError: the inputs, as for `forward`; more tokens than a pool ever holds; a criterion that does not fit,
                or that skips layers.
        """
        model, rule = self._model, self._criterion(criterion)
        urgency = self._deadline if deadline is None else AT_LEAST_ONE("add(deadline=...)", deadline)
        inputs = check_batch(model, "add", batch, encoder=False)  # a step checks that
        if not inputs.rows:
            return []
        packed = pack_inputs(model.view(), inputs)
        own, tokens = packed.by_row(), packed.ids.shape[1]
        if tokens > self._max_tokens:
            raise ValueError(
                f"add: expected at most max_tokens={self._max_tokens} tokens, got {tokens}; add fewer rows at a time"
            )
        if self.tokens + tokens > self._max_tokens:
            raise PoolFullError(
                f"the pool holds {self.tokens} of at most {self._max_tokens} tokens, {tokens} more do not fit; take "
                "steps, then add them again"
            )
        return self._pool.add(rule, own, urgency)

    def step(self) -> list[Answer]:
        """Run some rows through one layer and return the answers of those that leave; an empty pool returns none.

        Raises:
            RuntimeError: the model is in train mode.
            torch.AcceleratorError: the device has failed; the pool is as before, but nothing runs in this process.
            AttentionReplacedError: the attention of the backbone has been changed.
            ValueError: the backbone no longer fits the exits.
        """
        if not len(self):
            return []
        model = self._model
        strict = bool(model.config.strict)
        answers, invalid = self._pool.step(self._current_weights(), strict=strict)
        if not strict:
            model.execution.invalid.add(invalid, strict=False)
        return answers

    def drain(self) -> Iterator[Answer]:
        """Take steps until the pool is empty, and yield the answers as rows leave."""
        while len(self):
            yield from self.step()

    def discard(self, id: int) -> bool:
        """Remove a row without an answer, as for a client that has gone; return whether it was in the pool."""
        return self._pool.discard(id)

    def _criterion(self, given: Any) -> Criterion:
        """Return the exit rule of new rows, checked."""
        model = self._model
        rule = model.view().criterion if given is None else given
        if not isinstance(rule, Criterion):
            raise TypeError(refused_criterion_message("criterion", given, none_allowed=False))
        if rule.skip_from is not None:
            raise ValueError(
                f"criterion {rule.name!r} skips layers, which rows of a pool cannot do; run the model on whole "
                "batches, or choose another criterion"
            )
        if given is not None:
            classes, aux = model.config.num_labels, model.heads.aux_names
            check_fits(rule, depth=model.depth, classes=classes, problem_type=model.problem_type, aux=aux)
            model.execution.check_criterion(model.view(rule))
        elif rule.name not in RULES:
            check_known(rule)
        return rule.exit_rule

    def _current_weights(self) -> Weights:
        """Return the weights of the next step; rows start again if they have changed."""
        model = self._model
        if model.training:
            raise RuntimeError("step: expected the model in eval mode, got train mode; call model.eval() first")
        view, known = model.view(), self._weights
        check_attention(view.backbone.config._attn_implementation)
        same_settings = model.execution.settings() == self._settings
        if known is not None and same_settings and self._made_from.is_current(view.roots):
            return known
        check_backbone(model)
        # taken first, so that a change while the layers are read is detected at the next step
        self._made_from = ContentFingerprint(view.roots)
        layers, linear = tuple(model.execution.encoder_layers(view)), view.heads.linear_exits(view.backbone.dtype)
        self._weights = Weights(view, layers, linear, model.execution.requested_backend(view), model.device)
        self._settings = model.execution.settings()
        self._pool.restart(layers)
        return self._weights
