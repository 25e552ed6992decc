"""The rows of a batch, packed and embedded: what the first encoder layer reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.packing import PackedBatch, pack, row_keys
from earlyexit_kernels.engine.view import ModelView


class EmbeddedRows(NamedTuple):
    """Packed rows after the embeddings.

    Attributes:
        hidden: ``[1, T, H]``.
        batch: the rows.
        keys: ``[N]`` int64 of `packing.row_keys`, or None.
    """

    hidden: Tensor
    batch: PackedBatch
    keys: Tensor | None


def embed_rows(view: ModelView, inputs: Inputs, *, with_keys: bool) -> EmbeddedRows:
    """Pack and embed a batch of at least one row.

    Args:
        view: of the model.
        inputs: checked.
        with_keys: compute a key for each row, for criteria that draw random numbers.

    Raises:
        ValueError: the first token of a row is masked and the exits read it.
    """
    ids, mask, types, positions = inputs
    batch = pack(ids, mask, first_token=view.heads.config.pooling != "mean")
    if positions is None:
        positions = view.adapter.positions(view.backbone, ids)
    types = torch.zeros_like(ids) if types is None else types
    tokens = batch.take(ids)
    hidden = view.adapter.first_states(
        view.backbone, tokens, batch.take(positions.expand(ids.shape)), batch.take(types.expand(ids.shape))
    )
    return EmbeddedRows(hidden, batch, row_keys(tokens, batch.offsets) if with_keys else None)
