"""Hidden states of rows as exits and gates read them, packed or padded; both are `types.RowStates`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.engine.attention import attend_by_plan
from earlyexit_kernels.engine.attention_plan import AttentionPlan
from earlyexit_kernels.types import normed


class PackedStates(NamedTuple):
    """Hidden states ``[T, H]`` of packed rows, their offsets ``[B + 1]`` and attention plan; a `types.RowStates`."""

    hidden: Tensor
    offsets: Tensor
    plan: AttentionPlan
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def tokens(self) -> Tensor:
        """``[T, H]`` after the norm."""
        return normed(self.norm, self.hidden)

    @property
    def rows(self) -> int:
        """B."""
        return self.offsets.shape[0] - 1

    def pool(self, tokens: Tensor, pooling: str) -> Tensor:
        """Return one vector ``[B, F]`` per row of tokens ``[T, F]``, as in `RowStates`."""
        if pooling == "mean":
            return torch.segment_reduce(tokens.float(), "mean", offsets=self.offsets.long(), axis=0)
        if pooling == "last":
            return tokens.index_select(0, (self.offsets[1:] - 1).clamp(min=0))
        return tokens.index_select(0, self.offsets[:-1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Return attention within each row, over and to ``[T, heads, D]``."""
        return attend_by_plan(query, key, value, self.plan, None, dropout)


class PaddedStates(NamedTuple):
    """Hidden states ``[N, S, H]`` of padded rows, and the kept tokens ``[N, S]``, None for all; a `types.RowStates`."""

    hidden: Tensor
    keep: Tensor | None
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def tokens(self) -> Tensor:
        """``[N, S, H]`` after the norm."""
        return normed(self.norm, self.hidden)

    @property
    def rows(self) -> int:
        """N."""
        return self.hidden.shape[0]

    def pool(self, tokens: Tensor, pooling: str) -> Tensor:
        """Return one vector ``[N, F]`` per row of tokens ``[N, S, F]``, as in `RowStates`."""
        if pooling == "first":
            return tokens[:, 0]
        if pooling == "last":
            return tokens[:, -1] if self.keep is None else _at(tokens, last_kept(self.keep))
        if self.keep is None:
            return tokens.float().mean(dim=1)
        kept = self.keep[:, :, None]
        return torch.where(kept, tokens.float(), 0.0).sum(dim=1) / kept.sum(dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Return attention within each row, over and to ``[N, S, heads, D]``."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        mask = None if self.keep is None else self.keep[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)


def last_kept(keep: Tensor) -> Tensor:
    """Return the column ``[N]`` of the last kept token of each row ``[N, S]``, 0 for a row without any."""
    return torch.where(keep, torch.arange(keep.shape[1], device=keep.device), 0).amax(dim=1)


def _at(tokens: Tensor, columns: Tensor) -> Tensor:
    """Return the tokens ``[N, F]`` at one column ``[N]`` of each row ``[N, S, F]``."""
    return tokens.gather(1, columns[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]
