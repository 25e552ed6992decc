"""Batches as on CUDA, where the host does not know how long their rows are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from earlyexit_kernels.core import rows


def hide_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `pack` keep the longest length only."""
    pack = rows.pack

    def unknown(*arguments: Any, **options: Any) -> Any:
        batch = pack(*arguments, **options)
        return dataclasses.replace(batch, lengths=None, longest=max(batch.lengths))

    monkeypatch.setattr(rows, "pack", unknown)
