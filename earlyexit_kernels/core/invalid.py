"""Counting rows with invalid logits: NaN, several +inf, or all -inf."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from earlyexit_kernels.core.locks import ForkSafeLock
from earlyexit_kernels.errors import InvalidLogitsError
from earlyexit_kernels.ops.exit_step import valid_rows

logger = logging.getLogger("earlyexit_kernels")

#: Device types on which reading a number does not wait for queued kernels.
SYNCHRONOUS_DEVICES = ("cpu",)
#: Training passes after which counts that were left on the device are read.
PASSES_BETWEEN_READS = 100


class InvalidRows:
    """Number of rows with invalid logits, counted once for each exit.

    Counts of training passes stay on the device, since reading them synchronises. They are read by `total`, by the next
    call of `add`, and every `PASSES_BETWEEN_READS` passes. Counts on the CPU are read at once. Threads may count at the
    same time, on several devices.
    """

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._total = 0
        self._waiting: dict[torch.device, Tensor] = {}
        self._passes = 0

    def total(self) -> int:
        """Return the number so far; synchronises with the device if counts were left there."""
        with self._lock:
            self._read()
            return self._total

    def add(self, by_layer: Sequence[int], strict: bool) -> None:
        """Count the invalid rows of layers 1..L.

        Raises:
            InvalidLogitsError: there are some, and `strict` is set.
        """
        with self._lock:
            self._read()
            self._count(by_layer, strict)

    def _count(self, by_layer: Sequence[int], strict: bool) -> None:
        if not any(by_layer):
            return
        if strict:
            refuse_invalid(by_layer)
        if self._total == 0:
            where = {layer: rows for layer, rows in enumerate(by_layer, start=1) if rows}
            logger.warning(
                "invalid logits (NaN, several +inf, or all -inf), rows by layer: %s. Such a row does not exit there; "
                "model.invalid_rows counts further ones. Set model.config.strict = True to raise instead",
                where,
            )
        self._total += sum(by_layer)

    @torch.no_grad()
    def add_pass(self, logits: Tensor, strict: bool, *, training: bool) -> None:
        """Count the invalid rows of a full-depth pass.

        Args:
            logits: ``[N, L, C]``.
            strict: read the counts at once and raise.
            training: leave the counts on the device.

        Raises:
            InvalidLogitsError: there are some, and `strict` is set.
        """
        by_layer = (~valid_rows(logits.flatten(0, 1), None)).view(logits.shape[:2]).sum(0)
        if strict or not training or by_layer.device.type in SYNCHRONOUS_DEVICES:
            self.add(by_layer.tolist(), strict)
            return
        with self._lock:
            before = self._waiting.get(by_layer.device)
            self._waiting[by_layer.device] = by_layer if before is None else before + by_layer
            self._passes += 1
            if self._passes >= PASSES_BETWEEN_READS:
                self._read()

    def _read(self) -> None:
        """Add the counts that were left on the device."""
        waiting, self._waiting, self._passes = self._waiting, {}, 0
        for counts in waiting.values():
            self._count(counts.tolist(), strict=False)


def refuse_invalid(by_layer: Sequence[int]) -> None:
    """Raise if a layer has rows with invalid logits.

    Args:
        by_layer: their number at each layer 1..L.

    Raises:
        InvalidLogitsError: names the first such layer.
    """
    for layer, rows in enumerate(by_layer, start=1):
        if rows:
            raise InvalidLogitsError(
                f"{rows} row(s) have invalid logits (NaN, several +inf, or all -inf) at layer {layer} of "
                f"{len(by_layer)}; check the weights and the input, or use strict=False to let such rows continue"
            )
