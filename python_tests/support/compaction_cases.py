"""Batches in which some rows have left."""

from __future__ import annotations

import torch

#: Name -> mask of the live rows of B rows.
PATTERNS = {
    "none": lambda b: torch.zeros(b, dtype=torch.bool),
    "all": lambda b: torch.ones(b, dtype=torch.bool),
    "alternating": lambda b: torch.arange(b) % 2 == 0,
    "first": lambda b: torch.arange(b) == 0,
    "last": lambda b: torch.arange(b) == b - 1,
    "random": lambda b: torch.rand(b, generator=torch.Generator().manual_seed(b)) < 0.4,
}


def rows_of(b, pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row ids in random order, and offsets of ragged rows; rows that have left may be empty."""
    g = torch.Generator().manual_seed(b)
    live = PATTERNS[pattern](b)
    row_ids = torch.randperm(2 * b, generator=g)[:b].to(torch.int32).masked_fill(~live, -1)
    lengths = torch.randint(1, 5, (b,), generator=g)
    lengths[~live] -= 1
    offsets = torch.zeros(b + 1, dtype=torch.int32)
    offsets[1:] = lengths.cumsum(0)
    return row_ids, offsets
